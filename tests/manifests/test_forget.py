"""forget: the images are gone from everything that the set says, and stay gone."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from flaky_store import die_everywhere
from hypothesis import given
from hypothesis import strategies as st
from made_sets import MARK, assemble, commit_unit, make_set
from set_content import held, one_set

from manifests.commits import list_commits, read_commit
from manifests.errors import InputError, LeaseHeld, VerificationFailed
from manifests.forget import LISTING_NAME, forget_images
from manifests.forgotten import FORGOTTEN_NAME, forgotten_digests, name_digest, without_forgotten
from manifests.garbage import collect_garbage
from manifests.reader import open_manifest
from manifests.storage import Store
from manifests.verify import verify


def mentions(folder: Path, image_id: str) -> list[str]:
    """The Parquet files and records that still name an image."""
    found = [
        path.name
        for path in folder.rglob("*.parquet")
        if image_id in pq.read_table(path, columns=["image_id"])["image_id"].to_pylist()
    ]
    store = Store.open(folder)
    return found + [unit for unit in list_commits(store) if image_id in read_commit(store, unit).members.image_id]


def test_an_image_leaves_shard_index_rejects_and_record(tmp_path):
    make_set(tmp_path)
    before = held(tmp_path)
    report = forget_images(Store.open(tmp_path), ["0/0.jpg", "1/1.jpg", "absent.jpg"])
    assert (report.forgotten, report.absent, report.units) == (2, 1, 2)
    assert verify(tmp_path).problems == []
    gone = {"0/0.jpg", "1/1.jpg"}
    assert held(tmp_path) == {name: value for name, value in before.items() if name not in gone}
    totals = open_manifest(tmp_path).manifest.totals
    assert (totals.images, totals.ok, totals.rejected) == (14, 11, 3)


def test_older_snapshots_show_it_until_they_are_purged(tmp_path):
    make_set(tmp_path)
    store = Store.open(tmp_path)
    report = forget_images(store, ["0/0.jpg"])
    assert len(report.snapshots) == 1
    assert "0/0.jpg" in held(tmp_path / report.snapshots[0])
    assert len(mentions(tmp_path, "0/0.jpg")) == 2  # a shard and an index
    collect_garbage(store, older_than=-1, keep_snapshots=1)
    assert mentions(tmp_path, "0/0.jpg") == []


def test_purge_leaves_no_trace_at_once(tmp_path):
    make_set(tmp_path)
    (tmp_path / "notes.parquet").write_bytes(b"mine")
    pq.write_table(pa.table({"image_id": ["0/0.jpg"]}), tmp_path / LISTING_NAME)
    report = forget_images(Store.open(tmp_path), ["0/0.jpg", "0/1.jpg"], purge=True)
    (tmp_path / "notes.parquet").unlink()
    assert report.snapshots == []
    assert mentions(tmp_path, "0/0.jpg") == mentions(tmp_path, "0/1.jpg") == []
    assert "0/0.jpg" not in (tmp_path / FORGOTTEN_NAME).read_text()
    assert verify(tmp_path).problems == []
    assert len(Store.open(tmp_path).list("snapshots/")) == 1


def test_a_purge_can_follow_later(tmp_path):
    make_set(tmp_path)
    store = Store.open(tmp_path)
    forget_images(store, ["0/0.jpg"])
    report = forget_images(store, ["0/0.jpg"], purge=True)
    assert (report.forgotten, report.absent) == (0, 1)
    assert mentions(tmp_path, "0/0.jpg") == []


def test_a_unit_that_loses_all_its_images_goes(tmp_path):
    make_set(tmp_path)
    forget_images(Store.open(tmp_path), ["bad.jpg", *(f"0/{i}.jpg" for i in range(5))])
    assert list_commits(Store.open(tmp_path)) == ["u000001", "u000002"]
    assert verify(tmp_path).problems == []


def test_all_images_can_be_forgotten(tmp_path):
    make_set(tmp_path, units=1)
    forget_images(Store.open(tmp_path), ["bad.jpg", *(f"0/{i}.jpg" for i in range(5))], purge=True)
    assert verify(tmp_path).problems == []
    assert open_manifest(tmp_path).manifest.totals.images == 0
    assert Store.open(tmp_path).list("shards/") == []


def test_what_was_forgotten_does_not_come_back(tmp_path):
    store = Store.open(tmp_path)
    table = pa.table({"image_id": ["a.jpg", "b.jpg", "ü.jpg"], "size": [1, 2, 3]})
    assert without_forgotten(store, table) is table
    make_set(tmp_path)
    assert without_forgotten(store, table) is table
    forget_images(store, ["b.jpg"])
    forget_images(store, ["ü.jpg", "b.jpg"])
    assert forgotten_digests(store) == {name_digest("b.jpg"), name_digest("ü.jpg")}
    assert without_forgotten(store, table).to_pydict() == {"image_id": ["a.jpg"], "size": [1]}
    assert without_forgotten(store, table.slice(0, 1)).num_rows == 1


def test_a_damaged_list_is_not_ignored(tmp_path):
    (tmp_path / FORGOTTEN_NAME).write_text("b.jpg\n")
    with pytest.raises(VerificationFailed, match=r"forgotten\.txt is damaged"):
        without_forgotten(Store.open(tmp_path), pa.table({"image_id": ["a"]}))


def test_refusals_write_nothing(tmp_path):
    with pytest.raises(InputError, match="has no manifest"):
        forget_images(Store.open(tmp_path), ["a"])
    make_set(tmp_path)
    store = Store.open(tmp_path)
    with pytest.raises(InputError, match="no image id was given"):
        forget_images(store, [])
    with store.lease("tokenize"), pytest.raises(LeaseHeld):
        forget_images(Store.open(tmp_path), ["0/0.jpg"])
    record = commit_unit(store, "u000001", ["other.jpg"], mark="1" * 64)
    assert record.fingerprint != MARK
    with pytest.raises(InputError, match="another fingerprint"):
        forget_images(store, ["0/0.jpg"])
    (tmp_path / "commits/u000001.json.zst").unlink()
    with pytest.raises(InputError, match="no commit record of unit u000001"):
        forget_images(store, ["0/0.jpg"])
    assert not store.exists(FORGOTTEN_NAME)


def test_more_committed_than_listed_is_no_hindrance(tmp_path):
    make_set(tmp_path)
    store = Store.open(tmp_path)
    commit_unit(store, "u000007", ["new.jpg", "new2.jpg"])
    forget_images(store, ["0/0.jpg", "new.jpg"])
    assert verify(tmp_path).problems == []
    assert "new2.jpg" in held(tmp_path)


@pytest.mark.parametrize("purge", [False, True])
def test_it_may_die_anywhere(tmp_path, purge):
    gone = ["0/0.jpg", *(f"1/{i}.jpg" for i in range(5)), "2/3.jpg", "bad.jpg"]

    def prepare(last: int) -> Path:
        make_set(tmp_path / str(last))
        return tmp_path / str(last)

    folders = die_everywhere(prepare, lambda store: forget_images(store, gone, purge=purge))
    assert len(folders) > (12 if purge else 10)
    for folder in folders:
        assert verify(folder).problems == []
        assert set(held(folder)) & set(gone) in (set(gone), set())
        assert {shard.unit for shard in open_manifest(folder).shards} <= set(list_commits(Store.open(folder)))
        forget_images(Store.open(folder), gone, purge=purge)
        assert verify(folder).problems == []
        assert held(folder) == held(folders[-1])
        assert list_commits(Store.open(folder)) == ["u000000", "u000002"]
        if purge:
            assert [mentions(folder, name) for name in gone] == [[]] * len(gone)


def test_what_an_interrupted_call_has_emptied_does_not_come_back_with_another_one(tmp_path):
    gone = [f"1/{i}.jpg" for i in range(5)]

    def prepare(last: int) -> Path:
        make_set(tmp_path / str(last))
        return tmp_path / str(last)

    for folder in die_everywhere(prepare, lambda store: forget_images(store, gone)):
        left = set(held(folder))
        forget_images(Store.open(folder), ["0/0.jpg"])
        assert verify(folder).problems == []
        assert set(held(folder)) <= left - {"0/0.jpg"}


@given(data=st.data())
def test_the_others_keep_their_codes(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("set")
    names = [f"{i}.jpg" for i in range(9)]
    units = {"u000000": names[:4], "u000001": names[4:5], "u000002": names[5:]}
    one_set(folder, units, data.draw(st.sets(st.sampled_from(names))))
    before = held(folder)
    gone = data.draw(st.sets(st.sampled_from(names), min_size=1))
    report = forget_images(Store.open(folder), sorted(gone), purge=data.draw(st.booleans()))
    assert report.forgotten == len(gone)
    assert verify(folder).problems == []
    assert held(folder) == {name: value for name, value in before.items() if name not in gone}
    assert assemble(Store.open(folder)).totals.images == 9 - len(gone)
