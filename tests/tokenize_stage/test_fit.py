from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import tiny_encoders
import torch
from made_jobs import make_pictures
from PIL import Image

from manifests.errors import InputError
from manifests.geometry import background_from_mean, content_mask, make_views
from manifests.schema import Geometry
from tokenize_stage.codebook_folder import read_codebooks, read_description
from tokenize_stage.config import CodebookConfig, FittedTokenizer
from tokenize_stage.fit import fit_codebook, read_views
from tokenize_stage.identity import identify
from tokenize_stage.kmeans import _revive, fit_residual, perplexity
from tokenize_stage.reservoir import Reservoir
from tokenize_stage.search import residual_search
from tokenize_stage.sources import take_inventory
from tokenize_stage.tokenizers import load

Sample = npt.NDArray[np.float32]


def blobs(seed: int = 0, count: int = 3000, width: int = 12, centres: int = 20, offset: float = 5.0) -> Sample:
    """Clusters with noise, far from the origin as a vision encoder's features are."""
    random = np.random.default_rng(seed)
    middle = random.standard_normal((centres, width)) * 2 + offset
    return (middle[random.integers(centres, size=count)] + random.standard_normal((count, width)) * 0.3).astype(
        np.float32
    )


def fit(sample: Sample, **changes: Any) -> Any:
    arguments = {"depth": 3, "size": 32, "iterations": 40, "minibatch": 500, "seed": 0, **changes}
    return fit_residual(sample.copy(), **arguments)


def test_every_depth_leaves_less_and_the_report_is_what_the_codes_give() -> None:
    sample = blobs()
    codebooks, reports = fit(sample)
    assert [book.shape for book in codebooks] == [(32, 12)] * 3
    errors = [report.relative_error for report in reports]
    assert 1 > errors[0] > errors[1] > errors[2] > 0
    assert errors[0] < 0.05  # 20 clusters, 32 vectors
    codes = residual_search(torch.from_numpy(sample), codebooks).numpy()
    rebuilt = np.zeros(sample.shape)
    for depth, (book, report) in enumerate(zip(codebooks, reports, strict=True)):
        rebuilt += book[codes[:, depth]]
        wins = np.bincount(codes[:, depth], minlength=32)
        assert report.used == (wins > 0).sum()
        assert report.perplexity == pytest.approx(perplexity(wins), rel=0.01)
        energy = np.square(sample - sample.mean(0, dtype=np.float64)).sum()
        assert report.relative_error == pytest.approx(np.square(sample - rebuilt).sum() / energy, rel=1e-3)


def test_a_seed_fixes_the_codebooks() -> None:
    first, again, other = (fit(blobs(), seed=seed)[0] for seed in (1, 1, 2))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first[0], other[0])


def test_a_mini_batch_of_everything_is_lloyd_and_comes_to_rest() -> None:
    """Then each vector is the mean of the points it wins."""
    sample = blobs(count=800)
    book = fit(sample, depth=1, size=10, minibatch=800, iterations=100)[0][0]
    codes = residual_search(torch.from_numpy(sample), [book])[:, 0].numpy()
    means = np.stack([sample[codes == k].mean(0) for k in range(10)])
    np.testing.assert_allclose(book, means, rtol=1e-4)


def test_dead_codes_move_onto_badly_reconstructed_points() -> None:
    centres, weights = torch.zeros(4, 2), torch.full((4,), 9.0)
    points = torch.tensor([[0.0, 0], [0, 0], [7, 7], [8, 8]])
    wins = torch.tensor([5, 0, 3, 0])
    error = torch.tensor([0.0, 0, 98, 128])
    _revive(centres, weights, wins, points, error, torch.Generator().manual_seed(0))
    assert sorted(centres[[1, 3]].tolist()) == [[7, 7], [8, 8]]
    assert centres[[0, 2]].tolist() == [[0, 0], [0, 0]]
    assert weights.tolist() == [9, 0, 9, 0]


def test_fewer_different_points_than_vectors_leave_codes_unused() -> None:
    sample = np.repeat(blobs(count=5), 40, 0)
    codebooks, reports = fit(sample, size=16)
    assert reports[0].used <= 5 + 1
    assert reports[-1].relative_error < 1e-6
    assert all(np.isfinite(book).all() for book in codebooks)


def test_constant_features_have_nothing_to_explain() -> None:
    _, reports = fit(np.full((100, 4), 3, np.float32))
    assert reports[0].relative_error == 0
    assert reports[0].perplexity == pytest.approx(1)


def test_too_few_or_broken_features_are_one_sentence() -> None:
    with pytest.raises(InputError, match="31 positions are too few for codebooks of 32 vectors"):
        fit(blobs(count=31))
    sample = blobs()
    sample[5, 5] = np.nan
    with pytest.raises(InputError, match="NaN or infinity"):
        fit(sample)


def test_perplexity_counts_equal_codes() -> None:
    assert perplexity(np.array([5, 5, 0, 5, 5])) == pytest.approx(4)
    assert perplexity(np.array([0, 7])) == pytest.approx(1)
    assert perplexity(np.zeros(3, np.int64)) == 0


def test_a_reservoir_keeps_everything_up_to_its_capacity() -> None:
    rows = np.arange(20, dtype=np.float32).reshape(10, 2)
    reservoir = Reservoir(10, 2, seed=0)
    for part in np.split(rows, [3, 4, 9]):
        reservoir.add(part)
    assert np.array_equal(reservoir.sample(), rows)


def test_a_reservoir_keeps_each_row_with_the_same_chance_however_the_stream_is_cut() -> None:
    stream = np.arange(400, dtype=np.float32)[:, None]
    kept = np.zeros(400, int)
    for seed in range(400):
        whole, parts = Reservoir(100, 1, seed), Reservoir(100, 1, seed)
        whole.add(stream)
        for part in np.split(stream, [1, 60, 150, 151]):
            parts.add(part)
        assert parts.seen == 400
        assert np.array_equal(whole.sample(), parts.sample())
        kept[whole.sample()[:, 0].astype(int)] += 1
    quarters = kept.reshape(4, 100).sum(1) / (400 * 100)
    np.testing.assert_allclose(quarters, 0.25, atol=0.01)


def codebook_config(tmp_path: Path, **changes: Any) -> CodebookConfig:
    if not (tmp_path / "encoder").exists():
        tiny_encoders.save(tiny_encoders.build("dinov2"), tmp_path / "encoder")
        make_pictures(tmp_path / "pictures", 24)
    values = {
        "source": {"kind": "folder", "path": tmp_path / "pictures"},
        "geometry": {"mode": "pad", "size": tiny_encoders.SIZE},
        "encoder": {"path": str(tmp_path / "encoder"), "layer": -2},
        "output": tmp_path / "codebook",
        "depth": 2, "size": 16, "iterations": 10, "minibatch": 100, "batch_size": 5, "device": "cpu",
    }  # fmt: skip
    return CodebookConfig.model_validate({**values, **changes})


def test_a_fit_from_pictures_makes_a_tokenizer(tmp_path: Path) -> None:
    config = codebook_config(tmp_path)
    (tmp_path / "pictures" / "bad.png").write_bytes(b"<html>")
    calls: list[tuple[str, int, int]] = []
    report = fit_codebook(config, lambda phase, done, total: calls.append((phase, done, total)))
    assert (report.images, report.rejected) == (24, 1)
    assert report.sampled == report.positions < 24 * 16  # the padding cells are left out
    assert [depth.relative_error for depth in report.depths] == sorted(
        (depth.relative_error for depth in report.depths), reverse=True
    )
    assert calls[-1] == ("depth 2/2", 10, 10)
    assert ("features", 25, 25) in calls
    assert {call[0] for call in calls} == {"features", "depth 1/2", "depth 2/2"}

    description = read_description(config.output)
    assert description.encoder.path == "../encoder"
    assert description.encoder.layer == tiny_encoders.BLOCKS - 1
    assert description.report == report
    assert description.geometry.background == background_from_mean(description.image_mean)  # as the job will letterbox
    tokenizer_config = FittedTokenizer(path=config.output)
    tokenizer = load(
        tokenizer_config, identify(tokenizer_config, description.geometry).spec, dtype="float32", device="cpu"
    )
    views = torch.zeros(2, tiny_encoders.SIZE, tiny_encoders.SIZE, 3, dtype=torch.uint8)
    assert tokenizer.encode(views).shape == (2, 16, 2)


def test_the_same_fit_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        fit_codebook(codebook_config(tmp_path, output=tmp_path / name, images=10))
    one, two = ((tmp_path / name / "codebook.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two
    books = read_codebooks(tmp_path / "one", read_description(tmp_path / "one"))
    assert [book.shape for book in books] == [(16, tiny_encoders.WIDTH)] * 2
    assert json.loads((tmp_path / "one" / "codebook.json").read_text())["report"]["images"] == 10


def test_views_come_in_order_with_their_content(tmp_path: Path) -> None:
    config = codebook_config(tmp_path)
    inventory = take_inventory(config.source)
    ids = inventory.table["image_id"].to_pylist()
    batches = list(read_views(config, config.geometry.resolve(), inventory.images_at, inventory.table, (4, 4)))
    assert [len(batch.views_BSSC) for batch in batches] == [5, 5, 5, 5, 4]
    for image_id, view, content in zip(
        ids,
        np.concatenate([b.views_BSSC for b in batches]),
        np.concatenate([b.content_BP for b in batches]),
        strict=True,
    ):
        if image_id.endswith(".png"):
            image = np.asarray(Image.open(Path(inventory.root, image_id)))
            views, boxes = make_views(image, Geometry(mode="pad", size=tiny_encoders.SIZE))
            assert np.array_equal(view, views[0])
            assert np.array_equal(content, content_mask(boxes, (4, 4), image.shape[1], image.shape[0]))


def test_a_source_without_a_single_usable_picture(tmp_path: Path) -> None:
    config = codebook_config(tmp_path)
    for file in (tmp_path / "pictures").rglob("*.*"):
        file.write_bytes(b"no picture")
    with pytest.raises(InputError, match="could be decoded"):
        fit_codebook(config)
    assert not config.output.exists()
