"""DualToken as ASVR used it: the numbers of its published code, from PNG files to a manifest.

The golden numbers cover the first generation's semantic branch; `test_dualtoken_layouts` has the rest.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from made_dualtoken import CODES, DATA, DEPTH, GOLDEN, LAYERS, WIDTH, edit_state, job, loaded, tokenizer, views
from made_jobs import DRIVER, ROOT

from manifests.errors import FingerprintMismatch, InputError
from manifests.reader import open_manifest
from manifests.verify import verify
from tokenize_stage.identity import describe
from tokenize_stage.job import run_job
from tokenize_stage.search import oracle
from tokenize_stage.tokenizers import load


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The golden tokenizer in a folder that a test may change."""
    return shutil.copytree(DATA, tmp_path / "tokenizer")


def test_the_golden_codes_features_and_sums() -> None:
    found = loaded(tokenizer())
    features = found.encoder.features(views())
    torch.testing.assert_close(features, GOLDEN["hidden"], atol=5e-5, rtol=0)
    codes = found.encode(views())
    assert codes.dtype == torch.int32
    assert torch.equal(codes, GOLDEN["semantic_codes"].int())
    books = [torch.from_numpy(book) for book in found.codebooks()]
    assert [tuple(book.shape) for book in books] == [(CODES, WIDTH)] * DEPTH
    z_q = sum(book[codes[..., depth].long()] for depth, book in enumerate(books))
    torch.testing.assert_close(z_q, GOLDEN["z_q_semantic"], atol=1e-5, rtol=0)
    assert torch.equal(codes.flatten(0, 1), oracle(features.flatten(0, 1), found.codebooks()))


def test_the_spec_comes_from_the_configurations() -> None:
    spec = describe(tokenizer()).spec
    assert (spec.kind, spec.view_size, spec.grid, spec.code_dim, spec.residual) == (
        "dualtoken",
        56,
        (4, 4),
        WIDTH,
        True,
    )
    assert spec.codebook_sizes == (CODES,) * DEPTH
    assert set(spec.weights_sha256) == {"checkpoint", "config", "encoder_config"}
    assert (spec.settings["branch"], spec.settings["layer"]) == ("semantic", LAYERS - 1)


def test_codebooks_are_read_without_an_encoder() -> None:
    found = loaded(tokenizer())
    for alone, whole in zip(describe(tokenizer()).codebooks(), found.codebooks(), strict=True):
        np.testing.assert_array_equal(alone, whole)


def test_bfloat16_runs_and_agrees_mostly() -> None:
    codes = loaded(tokenizer(), "bfloat16").encode(views())
    assert (codes[..., 0] == GOLDEN["semantic_codes"][..., 0]).float().mean() > 0.8


def test_from_png_files_to_golden_codes_and_a_rerun_without_torch(folder: Path, tmp_path: Path, cache: Path) -> None:
    config = job(folder, tmp_path / "out")
    result = run_job(config)
    assert result.manifest.geometry.background == (127, 127, 127)
    assert verify(tmp_path / "out").problems == []
    opened = open_manifest(tmp_path / "out")
    codes = opened.read_codes([f"{number}.png" for number in range(4)])
    np.testing.assert_array_equal(np.stack(codes)[:, 0], GOLDEN["semantic_codes"].numpy())
    for book, own in zip(opened.codebooks(), describe(tokenizer()).codebooks(), strict=True):
        np.testing.assert_array_equal(book, own)

    code = f"{DRIVER}\nprint(result.plan, sorted({{'torch', 'ray', 'transformers'}} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code, config.model_dump_json()],
        capture_output=True, text=True, check=True, cwd=ROOT, env={**os.environ, "ASVR_CACHE": str(cache)},
    )  # fmt: skip
    assert done.stdout.splitlines() == ["encoded 0", "None []"]

    entry = next((cache / "specs").iterdir())
    for damaged in (b"{", entry.read_bytes().replace(b'"code_dim": 32', b'"code_dim": 16')[:-3], b"[]"):
        entry.write_bytes(damaged)
        assert run_job(config).encoded == 0


def test_another_branch_in_the_same_output_is_refused_by_name(folder: Path, tmp_path: Path) -> None:
    run_job(job(folder, tmp_path / "out"))
    with pytest.raises(FingerprintMismatch, match="branch"):
        run_job(job(folder, tmp_path / "out", tokenizer=tokenizer(folder, "appearance").model_dump()))


def test_moving_the_files_changes_only_the_origin(folder: Path) -> None:
    here, there = describe(tokenizer()).spec, describe(tokenizer(folder)).spec
    assert here.origin != there.origin
    assert here == there.model_copy(update={"origin": here.origin})


def test_a_checkpoint_that_changed_after_planning_is_refused(folder: Path) -> None:
    spec = describe(tokenizer(folder)).spec
    edit_state(folder, lambda state: state["quantizer_semantic.codebooks.0.weight"].add_(1))
    with pytest.raises(InputError, match="changed while the job ran"):
        load(tokenizer(folder), spec, dtype="float32", device="cpu")


def test_views_of_another_size_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"set geometry\.size to 56"):
        run_job(job(folder, tmp_path / "out", geometry={"mode": "squash", "size": 64}))
