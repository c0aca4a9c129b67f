"""A whole job with several views an image: the same bytes from both engines, resumed or not, and rows that verify."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from bad_inputs import make_bad_inputs
from made_jobs import DEPTH, VIEW, content, job_config, make_pictures

from manifests.anyres import NEWLINE, anyres_order, tiling
from manifests.commits import commit_path
from manifests.geometry import content_mask
from manifests.reader import open_manifest
from manifests.schema import MANIFEST_NAME
from manifests.verify import verify
from tokenize_stage.job import run_job

CHANGES: dict[str, Any] = {
    "geometry": {"mode": "anyres", "size": VIEW},
    "max_reject_rate": 0.7,
    "batch_size": 6,
}


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Good pictures of many shapes between files that are rejects."""
    pictures = make_pictures(tmp_path / "pictures", 30)
    make_bad_inputs(pictures / "bad")
    return pictures


def test_rows_have_the_views_of_their_layout(mixed: Path, codebook: Path, tmp_path: Path) -> None:
    manifest = run_job(job_config(mixed, codebook, tmp_path / "out", **CHANGES)).manifest
    assert verify(tmp_path / "out").problems == []
    assert manifest.geometry.mode == "anyres"
    views = 0
    for row in rows_of(tmp_path / "out"):
        tiles = tiling(row["width"], row["height"], manifest.geometry)
        boxes_V4 = np.reshape(row["view_boxes"], (-1, 4))
        assert len(boxes_V4) == 1 + tiles.rows * tiles.columns
        codes_ND = np.reshape(row["codes"], (len(boxes_V4) * 4, DEPTH))
        order = anyres_order(row["width"], row["height"], manifest.geometry, (2, 2))
        kept = codes_ND[order[order != NEWLINE]]
        shows = content_mask(boxes_V4, (2, 2), row["width"], row["height"])
        assert 4 < len(kept) <= len(codes_ND)
        assert np.array_equal(kept[:4], codes_ND[:4])
        assert shows[:4].all()
        views += len(boxes_V4)
    assert manifest.totals.views == views > 3 * manifest.totals.ok
    assert manifest.totals.codes == views * 4 * DEPTH


def rows_of(output: Path) -> list[dict[str, Any]]:
    opened = open_manifest(output)
    tables = [pq.read_table(output / shard.path) for shard in opened.shards]
    return [row for table in tables for row in table.to_pylist()]


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("decode", ["local", "cluster"])
def test_ray_gives_the_bytes_of_the_local_engine(mixed: Path, codebook: Path, tmp_path: Path, decode: str) -> None:
    run_job(job_config(mixed, codebook, tmp_path / "local", **CHANGES))
    ray = {"num_workers": 1, "decode": decode}
    run_job(job_config(mixed, codebook, tmp_path / "ray", engine="ray", ray=ray, **CHANGES, decode_threads=3))
    assert content(tmp_path / "ray") == content(tmp_path / "local")


def test_a_resumed_job_gives_the_same_bytes(mixed: Path, codebook: Path, tmp_path: Path) -> None:
    config = job_config(mixed, codebook, tmp_path / "out", **CHANGES)
    run_job(config)
    before = content(tmp_path / "out")
    for unit in ("u000001", "u000003"):
        (tmp_path / "out" / commit_path(unit)).unlink()
    (tmp_path / "out" / MANIFEST_NAME).unlink()
    assert run_job(config).encoded == 16
    assert content(tmp_path / "out") == before
