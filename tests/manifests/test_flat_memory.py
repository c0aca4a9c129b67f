"""The verbs on a finished set hold pieces of its index: what Arrow holds at most is a part of what the whole index takes."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from made_sets import assemble, commit_unit, make_set
from set_content import held, one_set

from manifests.errors import InputError
from manifests.filter import Choice, filter_set
from manifests.forget import forget_images
from manifests.garbage import collect_garbage
from manifests.merge import merge_sets
from manifests.reader import load_manifest, open_manifest
from manifests.rebuild import rebuild
from manifests.rows import Place, find_places
from manifests.schema import MANIFEST_NAME
from manifests.storage import Store
from manifests.verify import verify
from pipeline.report.gallery import choose_images
from pipeline.report.inspect import find_image
from tokenize_stage.recompute import _draw, _sample
from tokenize_stage.retry_rejects import _ok_now

UNITS, ROWS = 120, 100
PART = 1 / 3

POOLS: list[pa.MemoryPool] = []
"""What was allocated of a pool must not outlive it."""


def name(number: int) -> str:
    """Ids are long, so that an index is much larger than the rows of some shards without them."""
    return f"{number:06d}/{'x' * 200}.jpg"


def large_set(folder: Path, first: int = 0) -> Path:
    store = Store.open(folder)
    for unit in range(UNITS):
        ids = [name(first + unit * ROWS + row) for row in range(ROWS)]
        commit_unit(store, f"u{unit:06d}", ids, {ids[1]}, seed=unit)
    assemble(store)
    return folder


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("manifests.table_reader.BATCH_ROWS", 100)
    monkeypatch.setattr("manifests.table_writer.ROW_GROUP_ROWS", 500)
    monkeypatch.setattr("manifests.gather._THREADS", 1)


@contextmanager
def holds_a_part_of(folder: Path) -> Iterator[None]:
    """Arrow must at no moment hold more than `PART` of what the index of this set takes."""
    whole = open_manifest(folder).index().nbytes
    usual = pa.default_memory_pool()
    pool = pa.proxy_memory_pool(usual)
    POOLS.append(pool)
    pa.set_memory_pool(pool)
    try:
        yield
    finally:
        pa.set_memory_pool(usual)
    assert pool.max_memory() < PART * whole


@pytest.mark.usefixtures("small_pieces")
def test_forget(tmp_path: Path) -> None:
    large_set(tmp_path)
    with holds_a_part_of(tmp_path):
        report = forget_images(Store.open(tmp_path), [name(3), name(UNITS * ROWS - 1), "absent"])
    assert (report.forgotten, report.absent, report.units, len(report.snapshots)) == (2, 1, 2, 1)


@pytest.mark.usefixtures("small_pieces")
def test_rebuild_of_lost_records(tmp_path: Path) -> None:
    large_set(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.parquet")}
    for number in (0, 1, 50, UNITS - 1):
        (tmp_path / f"commits/u{number:06d}.json.zst").unlink()
    with holds_a_part_of(tmp_path):
        report = rebuild(Store.open(tmp_path))
    assert len(report.rebuilt) == 4
    assert verify(tmp_path).problems == []
    after = {path.name: path.read_bytes() for path in tmp_path.glob("index-*.parquet")}
    assert after.items() <= before.items()


def test_an_index_that_does_not_follow_the_shards_gives_no_times(tmp_path: Path) -> None:
    """Its rows might be those of other images."""
    make_set(tmp_path)
    document = json.loads((tmp_path / MANIFEST_NAME).read_text())
    document["shards"] = document["shards"][::-1]
    for path in [*(tmp_path / "snapshots").iterdir(), *(tmp_path / "commits").iterdir()]:
        path.unlink()
    (tmp_path / MANIFEST_NAME).write_text(json.dumps(document))
    report = rebuild(Store.open(tmp_path))
    assert [text for text in report.lost if "file times of unit u000000" in text]
    assert verify(tmp_path).problems == []


@pytest.mark.usefixtures("small_pieces")
def test_counting_recovered_rejects(tmp_path: Path) -> None:
    large_set(tmp_path)
    with holds_a_part_of(tmp_path):
        assert _ok_now(load_manifest(tmp_path), pa.chunked_array([[name(1), name(2), "absent", name(0)]])) == 2


@pytest.mark.usefixtures("small_pieces")
def test_choosing_and_finding_images_to_show(tmp_path: Path) -> None:
    large_set(tmp_path)
    opened = open_manifest(tmp_path)
    with holds_a_part_of(tmp_path):
        chosen = choose_images(opened, 5, ["absent", name(7)])
        places = find_places(opened, chosen)
    last = UNITS * ROWS - 1
    assert chosen[:2] == [name(7), name(0)]
    assert places[:2] == [Place(0, 6), Place(0, 0)]  # of each unit the second image is a reject
    with holds_a_part_of(tmp_path):
        assert find_image(opened, name(last)).row.row == ROWS - 2
        with pytest.raises(InputError, match="did you mean 000000/"):
            find_image(opened, f"{'x' * 200}.jpg")
        with pytest.raises(InputError, match="was rejected as corrupt"):
            find_image(opened, name(1))


@pytest.mark.usefixtures("small_pieces")
def test_the_sample_of_a_recomputation(tmp_path: Path) -> None:
    large_set(tmp_path)
    opened = open_manifest(tmp_path)
    with holds_a_part_of(tmp_path):
        sampled, _ = _sample(opened, _draw(opened, 20, seed=0))
    assert len(sampled) == 20
    for image, codes in zip(sampled, opened.read_codes([image.image_id for image in sampled]), strict=True):
        assert (image.values_VPX == codes).all()


@pytest.mark.usefixtures("small_pieces")
def test_filter(tmp_path: Path) -> None:
    large_set(tmp_path / "a")
    choice = Choice(exclude=pa.array([name(0), name(1), "absent"]), condition="height > 0")
    with holds_a_part_of(tmp_path / "a"):
        report = filter_set(tmp_path / "a", choice, Store.open(tmp_path / "f"))
    assert (report.manifest.totals.ok, report.manifest.totals.rejected, report.absent) == (UNITS * (ROWS - 1) - 1, 0, 1)


@pytest.mark.usefixtures("small_pieces")
def test_merge(tmp_path: Path) -> None:
    large_set(tmp_path / "a")
    one_set(tmp_path / "b", {"u000000": ["new.jpg", *(name(row) for row in range(1, 4))]}, {name(2), name(3)})
    with holds_a_part_of(tmp_path / "a"):
        report = merge_sets([tmp_path / "a", tmp_path / "b"], Store.open(tmp_path / "m"))
    assert (report.duplicates, report.manifest.totals.images) == (3, UNITS * ROWS + 1)
    assert name(1) in held(tmp_path / "m")


def test_ids_of_one_hash_are_told_apart_in_a_merge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("repeated_ids", "id_index"):
        monkeypatch.setattr(f"manifests.{module}.hash_column", lambda ids: np.zeros(len(ids), np.uint64))
    monkeypatch.setattr("manifests.id_index.hash_ids", lambda ids: np.zeros(len(ids), np.uint64))
    one_set(tmp_path / "a", {"u000000": ["1.jpg", "2.jpg", "3.jpg"]}, {"3.jpg"})
    one_set(tmp_path / "b", {"u000000": ["1.jpg", "3.jpg"]})
    report = merge_sets([tmp_path / "a", tmp_path / "b"], Store.open(tmp_path / "m"))
    assert report.duplicates == 2
    assert set(held(tmp_path / "m")) == {"1.jpg", "2.jpg", "3.jpg"}


def peak(call: Callable[[], object]) -> int:
    """The most that Python held in the better of three calls: imports and what other threads do are not meant."""
    found = []
    for _ in range(3):
        tracemalloc.start()
        try:
            call()
            found.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
    return min(found)


@pytest.mark.parametrize("keep", [None, 25])
def test_gc_holds_one_snapshot(tmp_path: Path, keep: int | None) -> None:
    make_set(tmp_path, units=100)
    text = (tmp_path / MANIFEST_NAME).read_text()
    document = json.loads(text)
    for number in range(30):
        document["provenance"]["created_at"] = f"2026-01-01T00:00:{number:02d}+00:00"
        (tmp_path / f"snapshots/{number:016x}.json").write_text(json.dumps(document))
    load = peak(lambda: load_manifest(tmp_path))
    assert peak(lambda: collect_garbage(Store.open(tmp_path), keep_snapshots=keep)) < 4 * load
