import hashlib
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_sets import KEYS, MARK, SIZES, assemble, codebooks, commit_unit, header, histograms, make_set, random_codes
from pydantic import ValidationError

from manifests import commits
from manifests.commits import (
    CommitRecord,
    MemberColumns,
    UnitMember,
    assemble_manifest,
    commit_path,
    decode_usage,
    depth_usage,
    encode_usage,
    list_commits,
    read_commit,
    write_commit,
)
from manifests.errors import FingerprintMismatch, VerificationFailed
from manifests.fingerprint import fingerprint
from manifests.reader import open_manifest
from manifests.schema import MANIFEST_NAME
from manifests.storage import Store
from manifests.verify import verify


def files(folder: Path) -> dict[str, tuple[str, int]]:
    """Every file with its content's hash and its inode, which changes when it is written again."""
    store = Store.open(folder)
    return {rel: (hashlib.sha256(store.read(rel)).hexdigest(), store.path(rel).stat().st_ino) for rel in store.list()}


@given(st.lists(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=50), min_size=1, max_size=4))
def test_usage_round_trips(counts):
    sizes = [len(count) for count in counts]
    text = encode_usage([np.asarray(count, np.uint64) for count in counts])
    assert [found.tolist() for found in decode_usage(text, sizes)] == counts
    with pytest.raises(ValueError, match="code usage"):
        decode_usage(text, [*sizes, 1])
    for damaged in (text[:-4], "not base64!", ""):
        with pytest.raises(ValueError, match="code usage"):
            decode_usage(damaged, sizes)


def test_a_count_beyond_32_bits_is_refused():
    with pytest.raises(ValueError, match="32 bits"):
        encode_usage([np.asarray([2**32])])


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=64))
def test_perplexity_lies_between_one_and_the_codes_used(counts):
    usage = depth_usage(np.asarray(counts))
    assert usage.used == sum(count > 0 for count in counts)
    assert (usage.used == 0 and usage.perplexity == 0) or 1 - 1e-3 <= usage.perplexity <= usage.used + 1e-3


def test_perplexity_of_an_even_distribution_is_its_size():
    assert depth_usage(np.full(32, 7)).perplexity == 32


def test_members_round_trip():
    rows = [UnitMember("a", 1, 2, 3), UnitMember("b", -1, 0, 4)]
    columns = MemberColumns.of(rows)
    assert columns.rows() == rows
    assert MemberColumns.of_table(columns.table()) == columns
    assert len(columns) == 2


def test_a_commit_record_round_trips_and_is_listed(tmp_path):
    store = Store.open(tmp_path)
    assert list_commits(store) == []
    second = commit_unit(store, "u1000000", ["c"])
    record = commit_unit(store, "u000001", ["a", "b"], {"b"})
    assert list_commits(store) == ["u000001", "u1000000"]
    assert read_commit(store, "u000001") == record
    assert read_commit(store, "u1000000") == second


def read_outcome(store: Store) -> CommitRecord | VerificationFailed:
    try:
        return read_commit(store, "u000000")
    except VerificationFailed as error:
        return error


@given(st.data())
def test_a_damaged_commit_record_is_noticed_at_any_offset(tmp_path_factory, data):
    store = Store.open(tmp_path_factory.mktemp("out"))
    record = commit_unit(store, "u000000", ["a", "b"], {"b"})
    blob = bytearray(store.read(commit_path("u000000")))
    at = data.draw(st.integers(0, len(blob) - 1))
    if data.draw(st.booleans()):
        blob[at] ^= data.draw(st.integers(1, 255))
    else:
        del blob[at:]
    store.write(commit_path("u000000"), bytes(blob))
    outcome = read_outcome(store)
    if outcome != record:  # a bit of the frame's header may mean nothing
        assert "u000000.json.zst is damaged" in str(outcome)
        assert "\n" not in str(outcome)


def test_a_commit_record_under_another_name_is_refused(tmp_path):
    store = Store.open(tmp_path)
    commit_unit(store, "u000000", ["a"])
    store.write(commit_path("u000001"), store.read(commit_path("u000000")))
    with pytest.raises(VerificationFailed, match="the record of unit u000000"):
        read_commit(store, "u000001")
    with pytest.raises(VerificationFailed, match=r"u000002\.json\.zst is missing"):
        read_commit(store, "u000002")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rejects": []}, r"1 rows \+ 0 rejects are not 2 members"),
        ({"shard": None}, r"0 rows \+ 1 rejects are not 2 members"),
        ({"unit": "u000009"}, "the shard is of unit u000000"),
        ({"unit": "../x"}, "pattern"),
        ({"members": {"image_id": ["a", "a"], "size": [1, 1], "mtime_ns": [1, 1], "source_row": [1, 1]}}, "twice"),
        ({"members": {"image_id": ["a", "b"], "size": [1], "mtime_ns": [1, 1], "source_row": [1, 1]}}, "length"),
    ],
)
def test_a_commit_record_accounts_for_every_member(tmp_path, change, message):
    record = commit_unit(Store.open(tmp_path), "u000000", ["a", "b"], {"b"})
    with pytest.raises(ValidationError, match=message):
        CommitRecord.model_validate({**record.model_dump(), **change})


def test_the_manifest_says_what_the_commits_hold(tmp_path):
    manifest = make_set(tmp_path, units=3, rows=5)
    assert manifest.totals.model_dump() == {
        "images": 16,
        "ok": 12,
        "rejected": 4,
        "source_errors": 0,
        "rejected_by_reason": {"corrupt": 4},
        "views": 12,
        "codes": 12 * 12,
    }
    assert [shard.unit for shard in manifest.shards] == ["u000000", "u000001", "u000002"]
    assert manifest.fingerprint == MARK == fingerprint(KEYS)
    codes = np.concatenate([random_codes(np.random.default_rng(seed), 4) for seed in range(3)])
    assert manifest.usage == [depth_usage(counts) for counts in histograms(codes)]
    index = pq.read_table(tmp_path / manifest.index.path)
    assert index["image_id"].to_pylist() == [f"{unit}/{i}.jpg" for unit in range(3) for i in (0, 2, 3, 4)]
    assert index["shard"].to_pylist() == [0] * 4 + [1] * 4 + [2] * 4
    assert index["row"].to_pylist() == [0, 1, 2, 3] * 3
    assert index["source_size"].to_pylist() == [100, 102, 103, 104] * 3
    rejects = pq.read_table(tmp_path / manifest.rejects.path).to_pylist()
    assert [row["image_id"] for row in rejects] == ["0/1.jpg", "1/1.jpg", "2/1.jpg", "bad.jpg"]
    assert rejects[0] == {
        "image_id": "0/1.jpg",
        "reason": "corrupt",
        "message": "bad bytes",
        "source_row": 1,
        "source_size": 101,
        "source_mtime_ns": 10**18 + 1,
    }


def test_assembling_again_writes_nothing(tmp_path):
    first = make_set(tmp_path)
    before = files(tmp_path)
    assert len([name for name in before if name.startswith("snapshots/")]) == 1
    time.sleep(0.01)
    assert assemble(Store.open(tmp_path), command=["another", "command"], versions={"asvr": "9"}) == first
    assert files(tmp_path) == before


def test_the_order_of_records_and_settings_changes_no_byte(tmp_path):
    make_set(tmp_path)
    store = Store.open(tmp_path)
    before = files(tmp_path)
    backwards = [read_commit(store, unit) for unit in reversed(list_commits(store))]
    assemble_manifest(store, header(fingerprint_keys=dict(reversed(KEYS.items()))), backwards)
    assert files(tmp_path) == before


def test_an_iterator_of_records_comes_in_unit_order(tmp_path):
    """Rows are written as they come, so another order is refused rather than written."""
    make_set(tmp_path)
    store = Store.open(tmp_path)
    backwards = (read_commit(store, unit) for unit in reversed(list_commits(store)))
    with pytest.raises(ValueError, match="u000002 comes after u000003"):
        assemble_manifest(store, header(), backwards)


def test_ids_of_one_hash_are_told_apart(tmp_path, monkeypatch):
    before = make_set(tmp_path / "a")
    monkeypatch.setattr("manifests.repeated_ids.hash_column", lambda ids: np.zeros(len(ids), np.uint64))
    assert make_set(tmp_path / "b").index == before.index
    commit_unit(Store.open(tmp_path / "b"), "u000099", ["1/3.jpg"])
    with pytest.raises(
        VerificationFailed, match=r"'1/3.jpg' is a member of more than one unit of .* \(1 such images\)"
    ):
        assemble(Store.open(tmp_path / "b"))


def test_two_folders_agree_in_all_but_the_provenance(tmp_path):
    one = make_set(tmp_path / "a").model_dump(exclude={"provenance"})
    two = make_set(tmp_path / "b").model_dump(exclude={"provenance"})
    assert one == two


def test_new_units_make_a_new_snapshot_and_keep_the_old(tmp_path):
    make_set(tmp_path)
    store = Store.open(tmp_path)
    old = store.read(MANIFEST_NAME)
    commit_unit(store, "u000099", ["new.jpg"])
    manifest = assemble(store)
    assert manifest.totals.ok == 13
    snapshots = store.list("snapshots/")
    assert {store.read(name) for name in snapshots} == {old, store.read(MANIFEST_NAME)}
    for name in snapshots:
        assert Path(name).stem == hashlib.sha256(store.read(name)).hexdigest()[:16]
        assert open_manifest(tmp_path / name).folder == str(tmp_path)


@pytest.mark.parametrize("name", ["index", "rejects", "codebook"])
def test_a_damaged_or_lost_side_file_is_written_again(tmp_path, name):
    entry = getattr(make_set(tmp_path), name)
    store = Store.open(tmp_path)
    good = store.read(entry.path)
    for damage in (None, bytes(len(good))):
        store.delete(entry.path) if damage is None else store.write(entry.path, damage)
        assemble(store)
        assert store.read(entry.path) == good


def test_a_damaged_manifest_is_made_again(tmp_path):
    manifest = make_set(tmp_path)
    store = Store.open(tmp_path)
    store.write(MANIFEST_NAME, store.read(MANIFEST_NAME)[:-50])
    assert assemble(store).totals == manifest.totals
    assert open_manifest(tmp_path).manifest.totals == manifest.totals


def test_a_set_without_a_single_ok_image(tmp_path):
    commit_unit(Store.open(tmp_path), "u000000", ["a"], {"a"})
    manifest = assemble(Store.open(tmp_path))
    assert (manifest.totals.ok, manifest.totals.rejected) == (0, 1)
    assert [usage.perplexity for usage in manifest.usage] == [0, 0]
    assert assemble_manifest(Store.open(tmp_path / "empty"), header(), []).totals.images == 0
    assert verify(tmp_path).problems == verify(tmp_path / "empty").problems == []


def test_records_of_another_fingerprint_are_refused(tmp_path):
    commit_unit(Store.open(tmp_path), "u000000", ["a"], mark="1" * 64)
    with pytest.raises(FingerprintMismatch, match=r"u000000\.json\.zst has fingerprint 1111111111111111"):
        assemble(Store.open(tmp_path))


def test_an_image_of_two_units_is_refused(tmp_path):
    store = Store.open(tmp_path)
    commit_unit(store, "u000000", ["a", "b"])
    commit_unit(store, "u000001", ["c", "b"], {"b"})
    with pytest.raises(VerificationFailed, match="'b' is a member of more than one unit"):
        assemble(store)
    assert not store.exists(MANIFEST_NAME)


def test_a_shard_that_is_not_that_of_its_record_is_refused(tmp_path):
    store = Store.open(tmp_path)
    first = commit_unit(store, "u000000", ["a", "b"])
    second = commit_unit(store, "u000001", ["c", "d"], seed=1)
    assert first.shard
    assert second.shard
    mixed = {**first.model_dump(), "shard": {**second.shard.model_dump(), "unit": "u000000"}}
    with pytest.raises(VerificationFailed, match="does not hold the images of its commit record"):
        assemble_manifest(store, header(), [CommitRecord.model_validate(mixed)])
    store.delete(first.shard.path)
    with pytest.raises(VerificationFailed, match=r"is missing .*delete commits/u000000\.json\.zst"):
        assemble(store)


def test_long_shard_lists_go_to_a_side_file(tmp_path, monkeypatch):
    monkeypatch.setattr(commits, "INLINE_SHARDS", 2)
    manifest = make_set(tmp_path, units=3)
    assert manifest.shards == []
    assert manifest.shards_file is not None
    opened = open_manifest(tmp_path)
    assert [shard.unit for shard in opened.shards] == ["u000000", "u000001", "u000002"]
    assert verify(tmp_path).problems == []
    assert verify(tmp_path).shards == 3
    before = files(tmp_path)
    assemble(Store.open(tmp_path))
    assert files(tmp_path) == before
    data = bytearray((tmp_path / manifest.shards_file.path).read_bytes())
    data[20] ^= 1
    (tmp_path / manifest.shards_file.path).write_bytes(data)
    with pytest.raises(VerificationFailed, match="sha256 differs"):
        open_manifest(tmp_path)
    assert [problem.code for problem in verify(tmp_path).problems] == ["shards_file_invalid"]


KILLED = """
import sys
sys.path.insert(0, sys.argv[2])
from made_sets import assemble, commit_unit
from manifests.storage import Store
store = Store.open(sys.argv[1])
print("ready", flush=True)
for number in range(1, 500):
    commit_unit(store, f"u{number:06d}", [f"{number}/a", f"{number}/b"], seed=number)
    assemble(store)
"""


def test_a_driver_killed_at_any_moment_leaves_a_whole_manifest(tmp_path):
    store = Store.open(tmp_path)
    commit_unit(store, "u000000", ["0/a"])
    assemble(store)
    for delay in (0.05, 0.17, 0.31):
        driver = subprocess.Popen(
            [sys.executable, "-c", KILLED, tmp_path, Path(__file__).parent], stdout=subprocess.PIPE, text=True
        )
        assert driver.stdout is not None
        assert driver.stdout.readline() == "ready\n"
        time.sleep(delay)
        driver.kill()
        driver.communicate()
        assert verify(tmp_path).problems == []
    assemble(store)
    assert verify(tmp_path).shards == len(list_commits(store))


def test_the_manifest_can_be_read_by_eye(tmp_path):
    make_set(tmp_path)
    text = (tmp_path / MANIFEST_NAME).read_text()
    assert list(json.loads(text))[:3] == ["format", "schema_version", "kind"]
    assert text.count("\n") > 100
    assert codebooks()[0].shape == (SIZES[0], 4)


def test_writing_a_record_again_replaces_it(tmp_path):
    store = Store.open(tmp_path)
    record = commit_unit(store, "u000000", ["a"])
    changed = record.model_copy(update={"seconds": 2.0})
    write_commit(store, changed)
    assert read_commit(store, "u000000") == changed
