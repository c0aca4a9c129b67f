from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny_set

from manifests.commits import ManifestHeader, assemble_manifest
from manifests.errors import InputError, VerificationFailed
from manifests.reader import open_manifest
from manifests.schema import FeaturesSpec, Geometry, SourceIdentity
from manifests.storage import Store
from train_stage.codes import NO_ROW, CodeTables


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ASVR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "codes"


def test_rows_are_those_of_the_shards(tmp_path: Path) -> None:
    ids = tiny_set.save_pictures(tmp_path / "images", 13)
    wanted = tiny_set.save_manifest(tmp_path / "tokens", tmp_path / "images", ids)
    tables = CodeTables([open_manifest(tmp_path / "tokens")])
    rows = tables.find([*reversed(ids), "absent.png"])
    assert rows.tolist() == [*range(12, -1, -1), NO_ROW]
    for row in range(13):
        codes = tables.codes(row)
        assert codes.dtype == np.uint16
        assert np.array_equal(codes, wanted[row][None])
    assert tables.source_size[3] == (tmp_path / "images" / ids[3]).stat().st_size


def test_the_copy_is_made_once_and_again_when_it_is_damaged(tmp_path: Path, cache: Path) -> None:
    ids = tiny_set.save_pictures(tmp_path / "images", 4)
    wanted = tiny_set.save_manifest(tmp_path / "tokens", tmp_path / "images", ids)
    opened = open_manifest(tmp_path / "tokens")
    CodeTables([opened])
    (copy,) = cache.glob("*.uint16")
    made = copy.stat().st_mtime_ns
    CodeTables([opened])
    assert copy.stat().st_mtime_ns == made
    copy.write_bytes(copy.read_bytes()[:-1])
    assert np.array_equal(CodeTables([opened]).codes(3)[0], wanted[3])


def test_what_a_killed_copy_left_is_overwritten(tmp_path: Path, cache: Path) -> None:
    ids = tiny_set.save_pictures(tmp_path / "images", 4)
    wanted = tiny_set.save_manifest(tmp_path / "tokens", tmp_path / "images", ids)
    opened = open_manifest(tmp_path / "tokens")
    cache.mkdir(parents=True)
    (cache / f"{opened.digest}.unfinished").write_bytes(b"half")
    assert np.array_equal(CodeTables([opened]).codes(2)[0], wanted[2])


def test_manifests_of_one_fingerprint_are_one_table(tmp_path: Path) -> None:
    first = tiny_set.save_pictures(tmp_path / "a", 3)
    second = tiny_set.save_pictures(tmp_path / "b" / "more", 2, seed=9)
    one = tiny_set.save_manifest(tmp_path / "one", tmp_path / "a", first)
    two = tiny_set.save_manifest(tmp_path / "two", tmp_path / "b", [f"more/{name}" for name in second], seed=5)
    tables = CodeTables([open_manifest(tmp_path / "one"), open_manifest(tmp_path / "two")])
    assert np.array_equal(tables.codes(int(tables.find(["p002.png"])[0]))[0], one[2])
    assert np.array_equal(tables.codes(int(tables.find(["more/p001.png"])[0]))[0], two[1])


def test_manifests_that_disagree_are_refused(tmp_path: Path) -> None:
    ids = tiny_set.save_pictures(tmp_path / "images", 2)
    tiny_set.save_manifest(tmp_path / "pad", tmp_path / "images", ids)
    squash = Geometry(mode="squash", size=tiny_set.VIEW)
    tiny_set.save_manifest(tmp_path / "squash", tmp_path / "images", ids, geometry=squash)
    with pytest.raises(InputError, match=r"geometry\.mode: \"pad\" -> \"squash\".*must agree"):
        CodeTables([open_manifest(tmp_path / "pad"), open_manifest(tmp_path / "squash")])


def test_one_id_for_two_pictures_is_refused(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 9)):
        ids = tiny_set.save_pictures(tmp_path / name, 2, seed=seed)
        tiny_set.save_manifest(tmp_path / f"set_{name}", tmp_path / name, ids)
    with pytest.raises(InputError, match=r"2 image ids stand for different pictures .* p00\d\.png"):
        CodeTables([open_manifest(tmp_path / "set_a"), open_manifest(tmp_path / "set_b")])


def test_a_damaged_shard_is_named(tmp_path: Path) -> None:
    ids = tiny_set.save_pictures(tmp_path / "images", 2)
    tiny_set.save_manifest(tmp_path / "tokens", tmp_path / "images", ids)
    opened = open_manifest(tmp_path / "tokens")
    (shard,) = (tmp_path / "tokens" / "shards").iterdir()
    data = bytearray(shard.read_bytes())
    data[len(data) // 3] ^= 0xFF
    shard.write_bytes(data)
    with pytest.raises(VerificationFailed, match=shard.name):
        CodeTables([opened])


def test_a_set_of_features_has_no_codes_to_train_on(tmp_path: Path) -> None:
    spec = FeaturesSpec(
        kind="features", origin="vit", weights_sha256={}, view_size=28, grid=(2, 2), width=8, dtype="bfloat16"
    )
    header = ManifestHeader(
        fingerprint_keys={"tokenizer": spec.model_dump(mode="json")},
        tokenizer=spec,
        geometry=Geometry(mode="pad", size=28),
        codebooks=[],
        source=SourceIdentity(kind="folder", location="images"),
        source_errors=0,
        command=["test"],
        versions={},
    )
    assemble_manifest(Store.open(tmp_path / "features"), header, [])
    ids = tiny_set.save_pictures(tmp_path / "images", 2)
    tiny_set.save_manifest(tmp_path / "tokens", tmp_path / "images", ids)
    features, codes = open_manifest(tmp_path / "features"), open_manifest(tmp_path / "tokens")
    for manifests in ([features], [codes, features]):
        with pytest.raises(InputError, match=r"features holds features, not codes: give a token set whose tokenizer"):
            CodeTables(manifests)
