"""Product quantisation, and fits that go on from an existing codebook."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_encoders
import torch
from test_fit import blobs, codebook_config

from manifests.errors import InputError
from manifests.reader import open_manifest
from tokenize_stage.codebook_folder import (
    CodebookDescription,
    read_codebooks,
    read_description,
    write_codebooks,
    write_description,
)
from tokenize_stage.config import FittedTokenizer, TokenSetConfig
from tokenize_stage.encoder import VisionEncoder
from tokenize_stage.encoder_files import normalisation
from tokenize_stage.fit import fit_codebook
from tokenize_stage.identity import identify
from tokenize_stage.job import run_job
from tokenize_stage.kmeans import Sample, fit_product, fit_residual, perplexity
from tokenize_stage.search import oracle
from tokenize_stage.tokenizers import load
from train_stage.config import HeadConfig
from train_stage.visual_head import VisualHead

SETTINGS = {"size": 32, "iterations": 40, "minibatch": 500, "seed": 0}


def product(sample: Sample, **changes: Any) -> Any:
    return fit_product(sample, **{"depth": 3, **SETTINGS, **changes})


def residual(sample: Sample, **changes: Any) -> Any:
    return fit_residual(sample.copy(), **{"depth": 3, **SETTINGS, **changes})


def test_each_chunk_has_its_own_codebook_and_the_report_is_what_the_codes_give() -> None:
    sample = blobs()
    kept = sample.copy()
    codebooks, reports = product(sample)
    assert np.array_equal(sample, kept)
    assert [book.shape for book in codebooks] == [(32, 4)] * 3
    mean = sample.mean(0, dtype=np.float64)
    energy = np.square(sample - mean).sum()
    rebuilt = np.tile(mean, (len(sample), 1))
    for depth, (book, report) in enumerate(zip(codebooks, reports, strict=True)):
        chunk = slice(4 * depth, 4 * depth + 4)
        codes = oracle(torch.from_numpy(np.ascontiguousarray(sample[:, chunk])), [book])[:, 0].numpy()
        wins = np.bincount(codes, minlength=32)
        rebuilt[:, chunk] = book[codes]
        assert report.used == (wins > 0).sum()
        assert report.perplexity == pytest.approx(perplexity(wins))
        assert report.relative_error == pytest.approx(np.square(sample - rebuilt).sum() / energy, rel=1e-4)
    assert reports[-1].relative_error < 0.1


def test_one_chunk_is_one_residual_depth() -> None:
    assert np.array_equal(product(blobs(), depth=1)[0][0], residual(blobs(), depth=1)[0][0])


def test_a_seed_fixes_the_codebooks_of_a_product() -> None:
    first, again, other = (product(blobs(), seed=seed)[0] for seed in (1, 1, 2))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first[2], other[2])


@pytest.mark.parametrize("fit", [residual, product])
@pytest.mark.parametrize("minibatch", [500, 3000])
def test_going_on_from_a_converged_codebook_changes_next_to_nothing(fit: Any, minibatch: int) -> None:
    """Measured against the spread within a cluster, 0.3: a fit from new points ends somewhere else altogether."""
    done, was = fit(blobs(), size=20, iterations=200, minibatch=minibatch, depth=2)
    again, now = fit(blobs(), size=20, iterations=20, minibatch=minibatch, depth=2, start=done, seed=5)
    other, _ = fit(blobs(), size=20, iterations=20, minibatch=minibatch, depth=2, seed=5)
    moved, elsewhere = (float(np.sqrt(np.square(book - done[0]).mean())) for book in (again[0], other[0]))
    assert moved < 0.05
    assert elsewhere > 1
    assert now[-1].relative_error == pytest.approx(was[-1].relative_error, rel=0.05)


def test_a_start_at_rest_stays_where_it_is() -> None:
    """A mini-batch of everything, converged: every centre is the mean of its points, to float32's last digits."""
    done, _ = residual(blobs(count=800), size=10, minibatch=800, iterations=150, depth=1)
    again, _ = residual(blobs(count=800), size=10, minibatch=800, iterations=3, depth=1, start=done)
    np.testing.assert_allclose(again[0], done[0], rtol=1e-5)


def test_a_start_is_not_written_to() -> None:
    start = residual(blobs(), iterations=2)[0]
    kept = [book.copy() for book in start]
    residual(blobs(), start=start)
    assert all(np.array_equal(a, b) for a, b in zip(start, kept, strict=True))


def test_a_fit_makes_a_product_tokenizer_for_jobs_and_visual_heads(tmp_path: Path) -> None:
    """Of features 32 wide, four chunks of eight: codes of each chunk alone, through a job, to the head's context."""
    fit = codebook_config(tmp_path, method="product", depth=4)
    report = fit_codebook(fit)
    errors = [depth.relative_error for depth in report.depths]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] < 1
    description = read_description(fit.output)
    assert (description.method, description.code_dim, description.width) == ("product", 8, tiny_encoders.WIDTH)
    config = FittedTokenizer(path=fit.output)
    spec = identify(config, fit.geometry).spec
    assert (spec.residual, spec.code_dim, spec.depth) == (False, 8, 4)

    tokenizer = load(config, spec, dtype="float32", device="cpu")
    views = torch.randint(0, 256, (2, tiny_encoders.SIZE, tiny_encoders.SIZE, 3), dtype=torch.uint8)
    codes = tokenizer.encode(views)
    assert (codes.shape, codes.dtype) == ((2, 16, 4), torch.int32)
    assert tokenizer.fallbacks == 0
    folder = tmp_path / "encoder"
    encoder = VisionEncoder(
        folder, layer=-2, view_size=tiny_encoders.SIZE, normalisation=normalisation(folder), device="cpu"
    )
    features = encoder.features(views).flatten(0, 1)
    for d, book in enumerate(tokenizer.codebooks()):
        assert torch.equal(codes[..., d].flatten(), oracle(features[:, 8 * d : 8 * d + 8], [book])[:, 0])

    job = {"source": fit.source, "geometry": {"mode": "pad", "size": tiny_encoders.SIZE}, "tokenizer": config}
    output = tmp_path / "codes"
    run_job(TokenSetConfig.model_validate({**job, "output": output, "batch_size": 4, "device": "cpu"}))
    written = open_manifest(output)
    assert not written.manifest.tokenizer.residual
    books = written.codebooks()
    assert all(np.array_equal(a, b) for a, b in zip(books, tokenizer.codebooks(), strict=True))
    head = VisualHead(6, HeadConfig(width=8, layers=1, heads=2, ffn=8), books, residual=spec.residual)
    context = head._context(codes.flatten(0, 1).long())
    assert context.shape == (32, 3, 8)
    assert torch.equal(context[:, 1], torch.from_numpy(books[1])[codes.flatten(0, 1)[:, 1].long()])


def test_a_width_that_is_not_cut_into_equal_chunks(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="set depth to a divisor of 32") as error:
        fit_codebook(codebook_config(tmp_path, method="product", depth=5))
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="not cut into 5"):
        product(blobs(), depth=5)


def test_a_fit_goes_on_from_a_folder(tmp_path: Path) -> None:
    first = codebook_config(tmp_path, output=tmp_path / "first", iterations=60)
    was = fit_codebook(first)
    now = fit_codebook(codebook_config(tmp_path, start_from=tmp_path / "first", seed=3))
    before, after = read_description(tmp_path / "first"), read_description(tmp_path / "codebook")
    assert after.started_from == before.codebook_sha256
    assert before.started_from is None
    for one, two in zip(was.depths, now.depths, strict=True):
        assert two.relative_error == pytest.approx(one.relative_error, rel=0.05)


def test_dead_codes_of_the_start_come_to_life(tmp_path: Path) -> None:
    first = codebook_config(tmp_path, output=tmp_path / "first")
    fit_codebook(first)
    description = read_description(first.output)
    books = read_codebooks(first.output, description)
    spoilt = [np.concatenate([book[:4], np.full_like(book[4:], 1e4)]) for book in books]
    values = description.model_dump() | {"codebook_sha256": write_codebooks(first.output, spoilt)}
    write_description(first.output, CodebookDescription.model_validate(values))
    report = fit_codebook(codebook_config(tmp_path, start_from=first.output, iterations=40))
    assert [depth.used for depth in report.depths] == [16, 16]
    assert np.abs(read_codebooks(tmp_path / "codebook", read_description(tmp_path / "codebook"))).max() < 100


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"depth": 3}, "codebooks of depth 2, not depth 3"),
        ({"size": 8}, "codebooks of size 16, not size 8"),
        ({"method": "product"}, "codebooks of method residual, width 32, not method product, width 16"),
    ],
)
def test_a_start_of_another_shape_is_one_sentence(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    fit_codebook(codebook_config(tmp_path, output=tmp_path / "first", iterations=1))
    with pytest.raises(InputError, match=reason) as error:
        fit_codebook(codebook_config(tmp_path, start_from=tmp_path / "first", **changes))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "codebook").exists()


def test_folders_written_before_there_were_products_are_residual(tmp_path: Path) -> None:
    config = codebook_config(tmp_path, iterations=1)
    fit_codebook(config)
    file = config.output / "codebook.json"
    values = json.loads(file.read_text())
    del values["method"], values["started_from"]
    file.write_text(json.dumps(values))
    assert identify(FittedTokenizer(path=config.output), config.geometry.resolve()).spec.residual
