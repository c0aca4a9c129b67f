"""gc: orphans of the set's own kinds go, nothing else ever does."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from flaky_store import die_everywhere
from made_sets import assemble, commit_unit, make_set

from manifests.errors import InputError, LeaseHeld, VerificationFailed
from manifests.garbage import SAFETY_AGE_S, Orphan, collect_garbage, list_snapshots
from manifests.schema import MANIFEST_NAME
from manifests.storage import LEASE_NAME, Store
from manifests.verify import verify

ORPHANS = [
    "shards/u000001-0123456789abcdef.parquet",
    "shards/1.u000009-0123456789abcdef.parquet",
    "index-0123456789abcdef.parquet",
    "rejects-0123456789abcdef.parquet",
    "codebook-0123456789abcdef.safetensors",
    "shards-0123456789abcdef.json.zst",
    ".tmp-123-0123456789abcdef",
    "shards/.tmp-123-0123456789abcdef",
]
OTHERS = [
    "notes.txt",
    "shards/mine.parquet",
    "shards/u000009-0123456789ABCDEF.parquet",
    "index-0123456789abcdef.parquet.bak",
    "backup/shards/u000009-0123456789abcdef.parquet",
    "backup/index-0123456789abcdef.parquet",
    "commits/notes.txt",
    "snapshots/mine.json",
    ".tmp-mine",
]


def age(folder: Path, hours: float) -> None:
    """Everything in the folder was written so much earlier."""
    for path in folder.rglob("*"):
        then = path.stat().st_mtime_ns - int(hours * 3600e9)
        os.utime(path, ns=(then, then))


def litter(folder: Path) -> None:
    for name in [*ORPHANS, *OTHERS]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"12345")


def steady(name: str) -> str:
    return name.partition("/")[0] if name.startswith("snapshots/") else name


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} - {LEASE_NAME}


def test_orphans_go_and_nothing_else(tmp_path):
    make_set(tmp_path)
    before = files(tmp_path)
    litter(tmp_path)
    age(tmp_path, 25)
    dry = collect_garbage(Store.open(tmp_path), dry_run=True)
    assert files(tmp_path) == before | {*ORPHANS, *OTHERS}
    report = collect_garbage(Store.open(tmp_path))
    assert report == dry
    assert report.removed == [Orphan(name, 5) for name in sorted(ORPHANS)]
    assert report.bytes == 5 * len(ORPHANS)
    assert report.young == []
    assert files(tmp_path) == before | set(OTHERS)
    assert verify(tmp_path).problems == []


def test_young_orphans_stay(tmp_path):
    make_set(tmp_path)
    litter(tmp_path)
    age(tmp_path, 23.9)
    report = collect_garbage(Store.open(tmp_path))
    assert report.removed == []
    assert len(report.young) == len(ORPHANS)
    assert len(collect_garbage(Store.open(tmp_path), older_than=23 * 3600).removed) == len(ORPHANS)


def rewritten(folder: Path, times: int) -> None:
    """A set that was published `times` times, its first unit another each time."""
    store = Store.open(folder)
    for seed in range(times):
        commit_unit(store, "u000000", ["a.jpg", "b.jpg"], seed=seed)
        assemble(store)


def test_snapshots_keep_their_shards_until_told_otherwise(tmp_path):
    rewritten(tmp_path, 3)
    age(tmp_path, 48)
    store = Store.open(tmp_path)
    assert collect_garbage(store).removed == []
    snapshots = list_snapshots(store)
    assert len(snapshots) == 3
    report = collect_garbage(store, keep_snapshots=2)
    assert len(report.snapshots) == 2
    assert len(report.removed) == 2  # a snapshot and the shard that only it names
    assert all(verify(tmp_path / path).problems == [] for path in report.snapshots)
    report = collect_garbage(store, keep_snapshots=0)
    assert len(report.snapshots) == 1  # the one that manifest.json is a copy of
    assert (tmp_path / report.snapshots[0]).read_bytes() == (tmp_path / MANIFEST_NAME).read_bytes()
    assert verify(tmp_path).problems == []


def test_a_young_snapshot_stays_with_all_that_it_names(tmp_path):
    rewritten(tmp_path, 2)
    report = collect_garbage(Store.open(tmp_path), keep_snapshots=1)
    assert report.removed == report.young == []
    assert len(report.snapshots) == 2


def test_what_a_killed_job_committed_is_no_orphan(tmp_path):
    store = Store.open(tmp_path)
    record = commit_unit(store, "u000000", ["a.jpg"])
    age(tmp_path, 48)
    assert collect_garbage(store).removed == []
    assert store.exists(record.shard.path)


def test_refusals(tmp_path):
    with pytest.raises(InputError, match="holds no token set"):
        collect_garbage(Store.open(tmp_path))
    make_set(tmp_path)
    store = Store.open(tmp_path)
    with store.lease("tokenize"), pytest.raises(LeaseHeld):
        collect_garbage(Store.open(tmp_path))


@pytest.mark.parametrize("where", ["manifest.json", "snapshots/*.json", "commits/u000001.json.zst", "shards-*.zst"])
def test_nothing_goes_while_something_is_damaged(tmp_path, where, monkeypatch):
    monkeypatch.setattr("manifests.commits.INLINE_SHARDS", 0)
    make_set(tmp_path)
    litter(tmp_path)
    (tmp_path / ORPHANS[5]).unlink()
    age(tmp_path, 48)
    for path in tmp_path.glob(where):
        path.write_bytes(path.read_bytes()[:-9])
    before = files(tmp_path)
    with pytest.raises(VerificationFailed):
        collect_garbage(Store.open(tmp_path))
    assert files(tmp_path) == before


def test_it_may_die_anywhere(tmp_path):
    def prepare(last: int) -> Path:
        folder = tmp_path / str(last)
        rewritten(folder, 3)
        litter(folder)
        age(folder, 2 * SAFETY_AGE_S / 3600)
        return folder

    folders = die_everywhere(prepare, lambda store: collect_garbage(store, keep_snapshots=1))
    assert len(folders) == len(ORPHANS) + 2 + 2 + 1
    for folder in folders:
        assert verify(folder).problems == []
        for path in list_snapshots(Store.open(folder)):
            assert verify(folder / path).problems == []
        collect_garbage(Store.open(folder), keep_snapshots=1)
        # Snapshots are named by their bytes, which hold the time.
        assert sorted(map(steady, files(folder))) == sorted(map(steady, files(folders[-1])))
