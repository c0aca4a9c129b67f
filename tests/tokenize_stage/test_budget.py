"""Reject budgets: rejects in a row are found across units that come in any order, and the job that has them stops."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_jobs import job_config, make_pictures

from manifests.commit_record import CommitRecord, MemberColumns, RejectRow, UnitMember
from manifests.errors import BudgetExceeded
from manifests.schema import Numerics, ShardEntry
from manifests.usage import encode_usage
from tokenize_stage.budget import RejectRuns
from tokenize_stage.job import run_job


def record(unit: str, rows: list[int], rejected: set[int]) -> CommitRecord:
    bad = [row for row in rows if row in rejected]
    shard = ShardEntry(path=f"shards/{unit}", bytes=1, sha256="0" * 64, unit=unit, rows=len(rows) - len(bad))
    return CommitRecord(
        fingerprint="0" * 64,
        unit=unit,
        shard=shard if shard.rows else None,
        members=MemberColumns.of(UnitMember(f"{row}.jpg", 1, 1, row) for row in rows),
        rejects=[RejectRow(image_id=f"{row}.jpg", reason="missing", message="gone", source_row=row) for row in bad],
        usage=encode_usage([]),
        views=shard.rows,
        codes=shard.rows,
        numerics=Numerics(device="cpu", torch="2", dtype="float32", batch_size=1),
        seconds=0,
    )


def longest(rejected: set[int], images: int) -> int:
    best = run = 0
    for row in range(images):
        run = run + 1 if row in rejected else 0
        best = max(best, run)
    return best


@given(st.sets(st.integers(0, 29)), st.integers(1, 7), st.integers(1, 12), st.randoms(use_true_random=False))
def test_runs_are_those_of_the_source_whatever_the_order(
    rejected: set[int], unit_size: int, limit: int, order: random.Random
) -> None:
    units = {f"u{start}": list(range(start, min(start + unit_size, 30))) for start in range(0, 30, unit_size)}
    runs = RejectRuns(limit, {name: np.array(rows) for name, rows in units.items()})
    names = list(units)
    order.shuffle(names)
    stopped = False
    for name in names:
        try:
            runs.add(record(name, units[name], rejected))
        except BudgetExceeded:
            stopped = True
            break
    assert stopped == (longest(rejected, 30) >= limit)


def test_the_error_names_both_ends() -> None:
    runs = RejectRuns(5, {"a": np.arange(4), "b": np.arange(4, 8), "c": np.arange(8, 12)})
    runs.add(record("a", [0, 1, 2, 3], {2, 3}))
    runs.add(record("c", [8, 9, 10, 11], {8}))
    with pytest.raises(BudgetExceeded, match=r"7 images in a row are rejects \(from 2.jpg to 8.jpg; mostly missing\)"):
        runs.add(record("b", [4, 5, 6, 7], {4, 5, 6, 7}))


def test_never_is_never() -> None:
    RejectRuns(None, {"a": np.arange(4)}).add(record("a", [0, 1, 2, 3], {0, 1, 2, 3}))


def test_a_job_stops_at_rejects_in_a_row_and_goes_on_when_told(codebook: Path, tmp_path: Path) -> None:
    """Half the references name files that are not there. The unit that tells is not committed, those before are."""
    pictures = make_pictures(tmp_path / "pictures", 16)
    found = sorted(path.relative_to(pictures).as_posix() for path in pictures.rglob("*.*"))
    images = [*found, *(f"gone/{number}.jpg" for number in range(16))]
    turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "yes"}]
    path = tmp_path / "data.json"
    path.write_text(json.dumps([{"id": image, "image": image, "conversations": turns} for image in images]))
    source = {"kind": "llava", "path": path, "image_root": pictures}
    changes = {"source": source, "max_reject_rate": 0.9, "unit_size": 4}
    config = job_config(pictures, codebook, tmp_path / "out", max_consecutive_rejects=7, **changes)
    with pytest.raises(BudgetExceeded, match=r"8 images in a row are rejects \(from gone/0.jpg to gone/7.jpg"):
        run_job(config)
    assert len(list((tmp_path / "out" / "commits").iterdir())) == 5
    result = run_job(config.model_copy(update={"max_consecutive_rejects": None}))
    assert result.encoded == 12
    assert (result.manifest.totals.ok, result.manifest.totals.rejected) == (16, 16)
