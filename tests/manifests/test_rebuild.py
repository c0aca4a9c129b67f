"""verify --rebuild: what is lost comes back exactly, or is said to be lost."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from flaky_store import die_everywhere
from made_sets import KEYS, assemble, commit_unit, make_set
from set_content import held, one_set
from test_features import make_features

from manifests.commits import list_commits, read_commit
from manifests.errors import InputError, VerificationFailed
from manifests.fingerprint import fingerprint
from manifests.forget import forget_images
from manifests.reader import open_manifest
from manifests.rebuild import rebuild
from manifests.schema import MANIFEST_NAME, ShardEntry
from manifests.storage import Store
from manifests.verify import verify


def lose(folder: Path, *patterns: str) -> None:
    for pattern in patterns:
        for path in folder.glob(pattern):
            path.unlink()


def test_a_lost_manifest_comes_back_byte_for_byte(tmp_path):
    make_set(tmp_path)
    before = (tmp_path / MANIFEST_NAME).read_bytes()
    for damage in (b"", before[:-40], None):
        lose(tmp_path, MANIFEST_NAME)
        if damage is not None:
            (tmp_path / MANIFEST_NAME).write_bytes(damage)
        report = rebuild(Store.open(tmp_path))
        assert (report.rebuilt, report.lost) == ([], [])
        assert (tmp_path / MANIFEST_NAME).read_bytes() == before
        assert len(Store.open(tmp_path).list("snapshots/")) == 1


def test_side_files_come_back_too(tmp_path):
    make_set(tmp_path)
    before = held(tmp_path)
    lose(tmp_path, "index-*", "rejects-*", MANIFEST_NAME)
    rebuild(Store.open(tmp_path))
    assert verify(tmp_path).problems == []
    assert held(tmp_path) == before


def test_records_know_more_than_the_newest_snapshot(tmp_path):
    make_set(tmp_path)
    store = Store.open(tmp_path)
    commit_unit(store, "u000001", [f"1/{i}.jpg" for i in range(5)], seed=9)  # rewritten, then killed
    lose(tmp_path, MANIFEST_NAME)
    rebuild(store)
    assert verify(tmp_path).problems == []
    assert read_commit(store, "u000001").shard in open_manifest(tmp_path).shards


def test_lost_records_come_back_from_the_snapshot(tmp_path):
    make_set(tmp_path)
    before, bytes_before = held(tmp_path), (tmp_path / MANIFEST_NAME).read_bytes()
    (tmp_path / "shards/u000009-0123456789abcdef.parquet").write_bytes(b"never committed")
    lose(tmp_path, "commits/*", MANIFEST_NAME)
    report = rebuild(Store.open(tmp_path))
    assert report.rebuilt == ["u000000", "u000001", "u000002"]
    assert report.lost == []
    assert verify(tmp_path).problems == []
    assert held(tmp_path) == before
    record = read_commit(Store.open(tmp_path), "u000000")
    assert record.members.size == [100, 102, 103, 104]
    rejects = read_commit(Store.open(tmp_path), "u000003")
    assert sorted(rejects.members.image_id) == ["0/1.jpg", "1/1.jpg", "2/1.jpg", "bad.jpg"]
    again = rebuild(Store.open(tmp_path))
    assert (again.rebuilt, again.lost) == ([], [])
    assert open_manifest(tmp_path).manifest.totals.model_dump() == report.manifest.totals.model_dump()
    assert bytes_before  # the order of the rejects may be another, so the bytes are not compared


def test_one_damaged_record_comes_back(tmp_path):
    make_set(tmp_path)
    before = held(tmp_path)
    path = tmp_path / "commits/u000001.json.zst"
    path.write_bytes(path.read_bytes()[:-3])
    report = rebuild(Store.open(tmp_path))
    assert report.rebuilt == ["u000001"]
    assert verify(tmp_path).problems == []
    assert held(tmp_path) == before


def test_a_damaged_record_of_no_known_shard_is_said_to_be_lost(tmp_path):
    make_set(tmp_path)
    (tmp_path / "commits/u000009.json.zst").write_bytes(b"x")
    report = rebuild(Store.open(tmp_path))
    assert report.lost == [
        "unit u000009, whose record is damaged and whose shard is not known: the next job makes it again"
    ]
    assert verify(tmp_path).problems == []


def test_forgotten_images_are_not_brought_back(tmp_path):
    make_set(tmp_path)
    store = Store.open(tmp_path)
    everything = [f"0/{i}.jpg" for i in range(5)]
    forget_images(store, [*everything, "1/0.jpg"])
    old = min(store.list("snapshots/"), key=lambda path: (tmp_path / path).stat().st_mtime_ns)
    for path in store.list("snapshots/"):
        if path != old:
            (tmp_path / path).unlink()
    lose(tmp_path, "commits/*", MANIFEST_NAME)
    rebuild(store)
    assert verify(tmp_path).problems == []
    assert set(held(tmp_path)) == {
        "1/1.jpg",
        "1/2.jpg",
        "1/3.jpg",
        "1/4.jpg",
        *(f"2/{i}.jpg" for i in range(5)),
        "bad.jpg",
    }


def test_shards_alone_need_a_manifest_of_the_same_fingerprint(tmp_path):
    make_set(tmp_path / "a")
    one_set(tmp_path / "like", {"u000000": ["other.jpg"]})
    before = held(tmp_path / "a")
    lose(tmp_path / "a", "commits/*", "snapshots/*", "index-*", "rejects-*", MANIFEST_NAME)
    with pytest.raises(InputError, match=r"has no snapshot that says .* --like"):
        rebuild(Store.open(tmp_path / "a"))
    (tmp_path / "a/shards/u000007-0123456789abcdef.parquet").write_bytes(b"not whole")
    report = rebuild(Store.open(tmp_path / "a"), like=tmp_path / "like")
    assert report.rebuilt == ["u000000", "u000001", "u000002"]
    assert "the rejects: the next job finds them again" in report.lost
    assert len(report.lost) == 5
    assert verify(tmp_path / "a").problems == []
    without_times = {name: value[:4] for name, value in held(tmp_path / "a").items()}
    assert without_times == {name: value[:4] for name, value in before.items() if len(value) > 2}
    assert read_commit(Store.open(tmp_path / "a"), "u000000").members.mtime_ns == [0] * 4


def test_two_shards_of_one_unit_are_not_chosen_between(tmp_path):
    one_set(tmp_path / "a", {"u000000": ["x.jpg", "y.jpg"]})
    shutil.copytree(tmp_path / "a", tmp_path / "like")
    commit_unit(Store.open(tmp_path / "a"), "u000000", ["x.jpg", "y.jpg"], seed=3)
    lose(tmp_path / "a", MANIFEST_NAME, "snapshots/*", "commits/*")
    with pytest.raises(VerificationFailed, match="are both of unit u000000"):
        rebuild(Store.open(tmp_path / "a"), like=tmp_path / "like")


def test_refusals(tmp_path):
    with pytest.raises(InputError, match="neither commit records nor shards"):
        rebuild(Store.open(tmp_path))
    make_set(tmp_path / "a")
    lose(tmp_path / "a", "snapshots/*", MANIFEST_NAME)
    keys = {**KEYS, "dtype": "bfloat16"}
    store = Store.open(tmp_path / "like")
    commit_unit(store, "u000000", ["x.jpg"], mark=fingerprint(keys))
    assemble(store, fingerprint_keys=keys)
    with pytest.raises(InputError, match="has another fingerprint than the commit records"):
        rebuild(Store.open(tmp_path / "a"), like=tmp_path / "like")
    lose(tmp_path / "a", "commits/*")
    with pytest.raises(InputError, match=r"no shard of .* has the fingerprint"):
        rebuild(Store.open(tmp_path / "a"), like=tmp_path / "like")
    commit_unit(Store.open(tmp_path / "a"), "u000000", ["x.jpg"])
    commit_unit(Store.open(tmp_path / "a"), "u000001", ["y.jpg"], mark=fingerprint(keys))
    with pytest.raises(InputError, match="commit records of 2 fingerprints"):
        rebuild(Store.open(tmp_path / "a"))


def test_sets_of_features(tmp_path):
    make_features(tmp_path, "float16")
    before = held(tmp_path)
    lose(tmp_path, "commits/*", MANIFEST_NAME)
    assert rebuild(Store.open(tmp_path)).lost == []
    assert verify(tmp_path).problems == []
    assert held(tmp_path) == before


@pytest.mark.parametrize("alone", [False, True])
def test_it_may_die_anywhere(tmp_path, alone):
    one_set(tmp_path / "like", {"u000000": ["other.jpg"]})

    def prepare(last: int) -> Path:
        folder = tmp_path / str(last)
        make_set(folder)
        lose(folder, "commits/*", MANIFEST_NAME, *(["snapshots/*"] if alone else []))
        return folder

    def act(store: Store) -> None:
        rebuild(store, like=tmp_path / "like" if alone else None)

    folders = die_everywhere(prepare, act)
    assert len(folders) > 5
    for folder in folders:
        if (folder / MANIFEST_NAME).exists():
            assert verify(folder).problems == []
        act(Store.open(folder))
        assert verify(folder).problems == []
        assert held(folder) == held(folders[-1])
        assert list_commits(Store.open(folder)) == list_commits(Store.open(folders[-1]))


def test_the_shards_are_what_they_were(tmp_path):
    before: list[ShardEntry] = list(make_set(tmp_path).shards)
    lose(tmp_path, "commits/*", MANIFEST_NAME)
    assert rebuild(Store.open(tmp_path)).manifest.shards == before
