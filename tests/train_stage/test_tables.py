from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import tiny_set
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import shards
from manifests.errors import InputError, VerificationFailed
from manifests.reader import OpenManifest, load_manifest, open_manifest
from manifests.schema import Geometry
from manifests.storage import Store
from train_stage.lookup import NO_ROW, Rows, find_rows
from train_stage.tables import Tables

UNIT = 3


def opened(manifests: list[OpenManifest], ids: list[str]) -> tuple[Tables, Rows]:
    tables = Tables(manifests)
    rows = tables.find(ids)
    tables.open_values(rows)
    return tables, rows


def several_shards(folder: Path, pictures: int = 4 * UNIT) -> tuple[list[str], np.ndarray]:
    ids = tiny_set.save_pictures(folder / "images", pictures)
    return ids, tiny_set.save_manifest(folder / "tokens", folder / "images", ids, unit_size=UNIT)


def assert_values(tables: Tables, rows: Rows, wanted: np.ndarray) -> None:
    assert len(rows) == len(wanted)
    for image, codes in enumerate(wanted):
        assert np.array_equal(tables.values(rows, image), codes[None])


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ASVR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "codes"


def test_rows_are_those_of_the_shards(tmp_path: Path) -> None:
    ids, wanted = several_shards(tmp_path, 13)
    tables, rows = opened([open_manifest(tmp_path / "tokens")], [*reversed(ids), "absent.png", ids[4]])
    assert rows.row.tolist() == [*range(12, -1, -1), NO_ROW, 4]
    for image in (*range(13), 14):
        codes = tables.values(rows, image)
        assert codes.dtype == np.uint16
        assert np.array_equal(codes, wanted[rows.row[image]][None])
        data = (tmp_path / "images" / ids[rows.row[image]]).read_bytes()
        assert (rows.source_size[image], rows.sha256[image].tobytes()) == (len(data), hashlib.sha256(data).digest())


@given(asked=st.lists(st.integers(-3, 12)))
def test_any_images_in_any_order_are_found(asked: list[int], thirteen: OpenManifest) -> None:
    names = thirteen.index()["image_id"].to_pylist()
    rows = find_rows([thirteen], [names[number] if number >= 0 else f"absent{number}" for number in asked])
    assert rows.row.tolist() == [max(number, NO_ROW) for number in asked]


@pytest.fixture(scope="module")
def thirteen(tmp_path_factory: pytest.TempPathFactory) -> OpenManifest:
    folder = tmp_path_factory.mktemp("thirteen")
    several_shards(folder, 13)
    return open_manifest(folder / "tokens")


def test_memory_is_that_of_the_pictures_asked_for(tmp_path: Path) -> None:
    """68 bytes for each of them, and nothing of the index, of whatever size, once it was read."""
    spec = shards.random_spec(4, 2, 16)
    shards.write_set(tmp_path / "set", spec, 20_000)
    tables = Tables([open_manifest(tmp_path / "set")])
    before = pa.total_allocated_bytes()
    rows = tables.find([f"train/{row:09d}.jpg" for row in range(0, 20_000, 40)])
    assert (rows.row != NO_ROW).all()
    assert rows.nbytes == 68 * 500
    assert pa.total_allocated_bytes() - before < 20_000


def test_only_the_shards_that_are_needed_are_copied(tmp_path: Path, cache: Path) -> None:
    ids, wanted = several_shards(tmp_path)
    manifest = open_manifest(tmp_path / "tokens")
    tables, rows = opened([manifest], ids[UNIT : UNIT + 2])
    (record,) = cache.glob("*.shards")
    assert record.read_bytes() == b"0100"
    assert_values(tables, rows, wanted[UNIT : UNIT + 2])
    with pytest.raises(RuntimeError, match="not asked for"):
        tables.values(tables.find(ids[:1]), 0)
    manifest.store.delete(manifest.shards[1].path)  # it is not read again
    more = tables.find(ids[2 * UNIT - 1 :])
    tables.open_values(more)
    assert record.read_bytes() == b"0111"
    assert_values(tables, more, wanted[2 * UNIT - 1 :])


def test_the_copy_is_made_once_and_again_when_it_is_damaged(tmp_path: Path, cache: Path) -> None:
    ids, wanted = several_shards(tmp_path)
    manifest = open_manifest(tmp_path / "tokens")
    opened([manifest], ids)
    (copy,) = cache.glob("*.uint16")
    made = copy.stat().st_mtime_ns
    opened([manifest], ids)
    assert copy.stat().st_mtime_ns == made
    copy.write_bytes(copy.read_bytes()[:-1])
    assert_values(*opened([manifest], ids), wanted)
    copy.write_bytes(b"x" * copy.stat().st_size)
    copy.with_suffix(".shards").unlink()  # a file whose record is lost is not believed
    assert_values(*opened([manifest], ids), wanted)


def test_a_killed_copy_goes_on_at_the_next_shard(tmp_path: Path, cache: Path) -> None:
    ids, wanted = several_shards(tmp_path)
    manifest = open_manifest(tmp_path / "tokens")
    paths = [tmp_path / "tokens" / shard.path for shard in manifest.shards]
    third = paths[2].read_bytes()
    paths[2].unlink()
    os.mkfifo(paths[2])  # whoever reads it waits for ever
    program = f"""
from manifests.reader import load_manifest
from train_stage.tables import Tables
tables = Tables([load_manifest({str(tmp_path / "tokens")!r})])
tables.open_values(tables.find({ids!r}))
"""
    child = subprocess.Popen([sys.executable, "-c", program], env=os.environ | {"ASVR_CACHE": str(cache.parent)})
    try:
        record, deadline = cache / f"{manifest.digest}.shards", time.monotonic() + 60
        while not (record.exists() and record.read_bytes() == b"1100") and time.monotonic() < deadline:
            time.sleep(0.02)
    finally:
        child.kill()
        child.wait()
    assert record.read_bytes() == b"1100"
    paths[2].unlink()
    paths[2].write_bytes(third)
    paths[0].unlink()  # what was copied is not asked for again
    assert_values(*opened([load_manifest(tmp_path / "tokens")], ids), wanted)
    assert record.read_bytes() == b"1111"
    (copy,) = cache.glob("*.uint16")
    assert copy.read_bytes() == wanted.astype("<u2").tobytes()


def test_a_shard_damaged_on_its_way_is_named_and_the_rest_goes_on(tmp_path: Path, cache: Path, s3: str) -> None:
    ids, wanted = several_shards(tmp_path)
    bucket = Store.open(f"{s3}/tokens")
    for path in (tmp_path / "tokens").rglob("*"):
        if path.is_file():
            bucket.write(path.relative_to(tmp_path / "tokens").as_posix(), path.read_bytes())
    manifest = open_manifest(f"{s3}/tokens")
    name = manifest.shards[2].path
    whole = bucket.read(name)
    bucket.write(name, whole[:100] + bytes([whole[100] ^ 1]) + whole[101:])
    with pytest.raises(VerificationFailed, match=rf"{name} did not arrive as .* \(sha256 differs\): run the command"):
        opened([manifest], ids)
    assert (cache / f"{manifest.digest}.shards").read_bytes() == b"1100"
    bucket.write(name, whole)
    bucket.delete(manifest.shards[0].path)
    assert_values(*opened([manifest], ids), wanted)


def test_an_index_that_is_not_the_manifests_is_refused(tmp_path: Path) -> None:
    ids, _ = several_shards(tmp_path)
    manifest = open_manifest(tmp_path / "tokens")
    path = tmp_path / "tokens" / manifest.manifest.index.path
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(VerificationFailed, match=f"{path.name} is not the file that its manifest names"):
        Tables([manifest]).find(ids)


def test_manifests_of_one_fingerprint_are_one_table(tmp_path: Path) -> None:
    first = tiny_set.save_pictures(tmp_path / "a", 3)
    second = tiny_set.save_pictures(tmp_path / "b" / "more", 2, seed=9)
    one = tiny_set.save_manifest(tmp_path / "one", tmp_path / "a", first)
    two = tiny_set.save_manifest(tmp_path / "two", tmp_path / "b", [f"more/{name}" for name in second], seed=5)
    manifests = [open_manifest(tmp_path / "one"), open_manifest(tmp_path / "two")]
    tables, rows = opened(manifests, ["more/p001.png", "p002.png"])
    assert_values(tables, rows, np.stack([two[1], one[2]]))


def test_manifests_that_disagree_are_refused(tmp_path: Path) -> None:
    ids = tiny_set.save_pictures(tmp_path / "images", 2)
    tiny_set.save_manifest(tmp_path / "pad", tmp_path / "images", ids)
    squash = Geometry(mode="squash", size=tiny_set.VIEW)
    tiny_set.save_manifest(tmp_path / "squash", tmp_path / "images", ids, geometry=squash)
    with pytest.raises(InputError, match=r"geometry\.mode: \"pad\" -> \"squash\".*must agree"):
        Tables([open_manifest(tmp_path / "pad"), open_manifest(tmp_path / "squash")])


def test_one_id_for_two_pictures_is_refused(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 9)):
        ids = tiny_set.save_pictures(tmp_path / name, 2, seed=seed)
        tiny_set.save_manifest(tmp_path / f"set_{name}", tmp_path / name, ids)
    tables = Tables([open_manifest(tmp_path / "set_a"), open_manifest(tmp_path / "set_b")])
    with pytest.raises(InputError, match=r"2 image ids stand for different pictures .* p00\d\.png"):
        tables.find(ids)


def test_a_damaged_shard_is_named(tmp_path: Path) -> None:
    ids = tiny_set.save_pictures(tmp_path / "images", 2)
    tiny_set.save_manifest(tmp_path / "tokens", tmp_path / "images", ids)
    manifest = open_manifest(tmp_path / "tokens")
    (shard,) = (tmp_path / "tokens" / "shards").iterdir()
    data = bytearray(shard.read_bytes())
    data[len(data) // 3] ^= 0xFF
    shard.write_bytes(data)
    with pytest.raises(VerificationFailed, match=shard.name):
        opened([manifest], ids)
