from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_jobs import CODES, DEPTH, ROOT, VIEW, WIDTH

from manifests.codebook import encode_codebooks
from manifests.errors import InputError
from manifests.fingerprint import fingerprint
from manifests.hashes import file_sha256
from manifests.schema import Geometry
from tokenize_stage.codebook_folder import encoder_reference, read_codebooks, read_description
from tokenize_stage.config import FittedTokenizer
from tokenize_stage.identity import describe, fingerprint_keys, identify

PAD = Geometry(mode="pad", size=VIEW)


@pytest.fixture
def folder(codebook: Path, tmp_path: Path) -> Path:
    """A codebook folder and its encoder that a test may damage."""
    shutil.copytree(codebook.parent, tmp_path / "moved")
    return tmp_path / "moved" / codebook.name


def tokenizer(folder: Path) -> FittedTokenizer:
    return FittedTokenizer(path=folder)


def edit(folder: Path, **changes: Any) -> None:
    file = folder / "codebook.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def replace_tensors(folder: Path, data: bytes) -> None:
    """Other tensors, with a description that vouches for them."""
    (folder / "codebook.safetensors").write_bytes(data)
    edit(folder, codebook_sha256=file_sha256(folder / "codebook.safetensors"))


def test_the_spec_says_what_the_files_hold(folder: Path) -> None:
    identity = identify(tokenizer(folder), PAD)
    spec = identity.spec
    assert [(book.shape, book.dtype) for book in identity.codebooks()] == [((CODES, WIDTH), np.float32)] * DEPTH
    assert (spec.kind, spec.view_size, spec.grid, spec.code_dim) == ("fitted", VIEW, (2, 2), WIDTH)
    assert spec.codebook_sizes == (CODES,) * DEPTH
    assert spec.settings["layer"] == 1
    assert set(spec.weights_sha256) == {
        "codebook.safetensors", "encoder/config.json", "encoder/preprocessor_config.json", "encoder/model.safetensors",
    }  # fmt: skip
    assert spec.weights_sha256["encoder/model.safetensors"] == file_sha256(folder / "../encoder/model.safetensors")


def test_moving_the_folder_changes_no_fingerprint_but_dtype_and_geometry_do(codebook: Path, folder: Path) -> None:
    here, there = (describe(tokenizer(path)).spec for path in (codebook, folder))
    assert here.origin != there.origin
    keys = fingerprint_keys(here, PAD, "float32")
    assert fingerprint(keys) == fingerprint(fingerprint_keys(there, PAD, "float32"))
    others = [
        fingerprint_keys(here, PAD, "bfloat16"),
        fingerprint_keys(here, Geometry(mode="squash", size=VIEW), "float32"),
        fingerprint_keys(here.model_copy(update={"settings": {**here.settings, "layer": 2}}), PAD, "float32"),
    ]
    assert len({fingerprint(other) for other in [keys, *others]}) == 4


def test_views_of_another_size_are_refused(folder: Path) -> None:
    with pytest.raises(InputError, match=f"set geometry.size to {VIEW}"):
        identify(tokenizer(folder), Geometry(mode="pad", size=VIEW * 2))


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json", "model.safetensors"])
def test_another_encoder_is_refused_by_the_file_that_differs(folder: Path, name: str) -> None:
    file = folder.parent / "encoder" / name
    file.write_bytes(file.read_bytes() + b" ")
    with pytest.raises(InputError, match=f"{name} differ") as error:
        describe(tokenizer(folder))
    assert "\n" not in str(error.value)


def test_an_encoder_that_is_gone_is_refused(folder: Path) -> None:
    shutil.rmtree(folder.parent / "encoder")
    with pytest.raises(InputError, match="there is no encoder folder"):
        describe(tokenizer(folder))


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": "other"}, {"grid": [2]}, {"grid": [2, -2]}, {"codebook_sizes": []}, {"code_dim": "wide"},
        {"image_std": [0, 1, 1]}, {"image_mean": [float("nan")] * 3}, {"codebook_sha256": "0"}, {"surprise": 1},
        {"encoder": {"path": "../encoder", "layer": -1, "sha256": {}}},
    ],
)  # fmt: skip
def test_an_invalid_description_is_one_sentence(folder: Path, changes: dict[str, Any]) -> None:
    edit(folder, **changes)
    with pytest.raises(InputError, match=r"codebook\.json is not valid") as error:
        describe(tokenizer(folder))
    assert "\n" not in str(error.value)


def test_missing_and_swapped_files(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="asvr fit-codebook"):
        describe(tokenizer(tmp_path / "absent"))
    (folder / "codebook.safetensors").write_bytes(b"other")
    with pytest.raises(InputError, match=r"not the file that codebook\.json describes"):
        describe(tokenizer(folder))
    (folder / "codebook.safetensors").unlink()
    with pytest.raises(InputError, match=r"has no codebook\.safetensors"):
        describe(tokenizer(folder))
    (folder / "codebook.json").write_bytes(b"\xff{")
    with pytest.raises(InputError, match="is not valid"):
        describe(tokenizer(folder))


def books(**changes: Any) -> list[np.ndarray]:
    depth, size, width, value = ({"depth": DEPTH, "size": CODES, "width": WIDTH, "value": 0.0} | changes).values()
    return [np.full((size, width), value, np.float32) for _ in range(depth)]


@pytest.mark.parametrize(
    "data",
    [
        encode_codebooks(books(depth=DEPTH + 1)),
        encode_codebooks(books(size=CODES - 1)),
        encode_codebooks(books(width=WIDTH + 1)),
        encode_codebooks(books(value=np.nan)),
        encode_codebooks(books())[:-4],
        b"",
    ],
    ids=["depth", "size", "width", "not finite", "truncated", "empty"],
)
def test_tensors_that_do_not_fit_the_description_are_refused(folder: Path, data: bytes) -> None:
    replace_tensors(folder, data)
    with pytest.raises(InputError, match="fit the codebook again") as error:
        read_codebooks(folder, read_description(folder))
    assert "\n" not in str(error.value)


def test_a_near_encoder_is_named_relatively(tmp_path: Path) -> None:
    assert encoder_reference(tmp_path / "codebook", tmp_path / "encoder") == "../encoder"
    assert encoder_reference(tmp_path / "codebook", tmp_path / "codebook" / "encoder") == "encoder"
    assert encoder_reference(tmp_path / "a" / "codebook", tmp_path / "encoder") == str(tmp_path / "encoder")


def test_identifying_imports_no_torch(folder: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from manifests.schema import Geometry\n"
        "from tokenize_stage.config import FittedTokenizer; from tokenize_stage.identity import *\n"
        f"spec = identify(FittedTokenizer(path=Path(sys.argv[1])), Geometry(mode='pad', size={VIEW})).spec\n"
        "fingerprint_keys(spec, Geometry(mode='pad', size=28), 'float32'); import tokenize_stage.fit\n"
        "print(sorted({'torch', 'transformers', 'ray', 'huggingface_hub'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script, folder], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"
