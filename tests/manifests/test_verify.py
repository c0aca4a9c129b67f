import hashlib
import json
import signal
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_sets import MARK, assemble, commit_unit, make_set, random_codes, shard_data

from manifests.commits import commit_path, encode_usage
from manifests.errors import InputError
from manifests.schema import MANIFEST_NAME, Manifest
from manifests.shards import ShardData, encode_index, encode_rejects, encode_shard
from manifests.storage import LEASE_NAME, Store
from manifests.verify import status, verify


def codes_of(folder, **options) -> list[str]:
    return sorted(problem.code for problem in verify(folder, **options).problems)


def rewrite(folder, **changes) -> None:
    document = json.loads((folder / MANIFEST_NAME).read_text())
    (folder / MANIFEST_NAME).write_text(json.dumps({**document, **changes}))


def replace_file(folder, name: str, data: bytes, at: int | None = None, **extra) -> None:
    """Put other bytes in place of a file and make the manifest agree about its size and hash."""
    document = json.loads((folder / MANIFEST_NAME).read_text())
    entry = document[name] if at is None else document[name][at]
    (folder / entry["path"]).write_bytes(data)
    entry.update({"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest(), **extra})
    (folder / MANIFEST_NAME).write_text(json.dumps(document))


def shard_of(ids, codes, *, mark=MARK, unit="u000000", dtype=np.uint16, **columns) -> bytes:
    data = ShardData(**{**vars(shard_data(ids, codes)), **columns})
    return encode_shard(data, fingerprint=mark, unit=unit, code_dtype=dtype)


IDS = ["0/0.jpg", "0/2.jpg", "0/3.jpg", "0/4.jpg"]  # of the first unit of `make_set`
CODES = random_codes(np.random.default_rng(0), 4)


def test_a_good_set_has_no_problems(tmp_path):
    manifest = make_set(tmp_path)
    seen = []
    report = verify(tmp_path, progress=lambda done, total: seen.append((done, total)))
    assert report.as_dict() == {
        "images": 16,
        "ok": 12,
        "rejected": 4,
        "shards": 3,
        "fingerprint": manifest.fingerprint,
        "problems": [],
        "notes": [],
    }
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert verify(tmp_path, deep=False) == verify(tmp_path / MANIFEST_NAME) == report
    assert verify(tmp_path / Store.open(tmp_path).list("snapshots/")[0]) == report


def test_files_that_nothing_names_are_no_problem(tmp_path):
    make_set(tmp_path)
    (tmp_path / "shards/orphan.parquet").write_bytes(b"x")
    (tmp_path / "shards/.tmp-1-2").write_bytes(b"x")
    (tmp_path / "commits/notes.txt").write_bytes(b"x")
    assert verify(tmp_path).problems == []


@pytest.fixture(scope="module")
def good_set(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    make_set(folder, units=2)
    return folder


@given(st.data())
@settings(max_examples=150)
def test_a_damaged_byte_is_noticed_wherever_it_is(good_set, data):
    """Every file that the manifest names, and the commit records, at any offset: flipped or cut off."""
    store = Store.open(good_set)
    manifest = Manifest.model_validate_json(store.read(MANIFEST_NAME))
    named = [*manifest.shards, manifest.codebook, manifest.index, manifest.rejects]
    rel = data.draw(st.sampled_from([entry.path for entry in named]))
    good = store.read(rel)
    bad = bytearray(good)
    at = data.draw(st.integers(0, len(bad) - 1))
    if data.draw(st.booleans()):
        bad[at] ^= data.draw(st.integers(1, 255))
    else:
        del bad[at:]
    store.path(rel).write_bytes(bytes(bad))
    try:
        problems = verify(good_set).problems
    finally:
        store.path(rel).write_bytes(good)
    assert rel in {problem.path for problem in problems}
    assert all("\n" not in problem.message for problem in problems)


def test_several_problems_are_reported_in_one_go(tmp_path):
    manifest = make_set(tmp_path, units=4)
    one, two, three, _ = [tmp_path / shard.path for shard in manifest.shards]
    one.unlink()
    two.write_bytes(two.read_bytes()[:-1])
    damaged = bytearray(three.read_bytes())
    damaged[len(damaged) // 8] ^= 1
    three.write_bytes(damaged)
    (tmp_path / manifest.codebook.path).unlink()
    (tmp_path / manifest.rejects.path).unlink()
    (tmp_path / commit_path("u000001")).write_bytes(b"x")
    found = codes_of(tmp_path)
    assert set(found) >= {
        "codebook_missing",
        "commit_invalid",
        "rejects_missing",
        "shard_missing",
        "shard_sha256",
        "shard_size",
    }
    assert codes_of(tmp_path, deep=False) == ["codebook_missing", "rejects_missing", "shard_missing", "shard_size"]


def test_shard_schema_and_metadata(tmp_path):
    make_set(tmp_path)
    replace_file(tmp_path, "shards", shard_of(IDS, CODES, dtype=np.uint32), 0)
    assert codes_of(tmp_path) == ["shard_schema"]
    replace_file(tmp_path, "shards", shard_of(IDS, CODES, unit="u000007"), 0)
    assert codes_of(tmp_path) == ["shard_schema"]
    replace_file(tmp_path, "shards", shard_of(IDS, CODES, mark="1" * 64), 0)
    assert codes_of(tmp_path) == ["fingerprint_mismatch"]
    replace_file(tmp_path, "shards", b"no parquet", 0)
    assert codes_of(tmp_path) == ["shard_schema"]
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"image_id": IDS}), sink)
    replace_file(tmp_path, "shards", bytes(sink.getvalue()), 0)
    assert "shard_schema" in codes_of(tmp_path)
    assert "shard_schema" in codes_of(tmp_path, deep=False)


def test_shard_rows(tmp_path):
    make_set(tmp_path)
    replace_file(tmp_path, "shards", shard_of(IDS[:3], CODES[:3]), 0)
    assert set(codes_of(tmp_path)) == {"shard_rows", "index_mismatch"}
    assert codes_of(tmp_path, deep=False) == ["shard_rows"]


def test_row_lengths(tmp_path):
    make_set(tmp_path)
    rows = list(CODES)
    for bad in (rows[2][:-2], rows[2][:-1], rows[2][:0], np.concatenate([rows[2], rows[2]])):
        replace_file(tmp_path, "shards", shard_of(IDS, [*rows[:2], bad, rows[3]]), 0)
        report = verify(tmp_path)
        assert [problem.code for problem in report.problems] == ["row_length"]
        assert "1 rows, first '0/3.jpg'" in report.problems[0].message
    boxes = np.full((4, 1, 4), np.nan, np.float32)
    replace_file(tmp_path, "shards", shard_of(IDS, CODES, view_boxes=boxes), 0)
    assert codes_of(tmp_path) == ["row_length"]


def test_code_range_is_per_depth(tmp_path):
    make_set(tmp_path)
    codes = CODES.copy()
    codes[1, 2], codes[3, 0], codes[3, 3] = 16, 16, 31  # depth 0 has 16 codes, depth 1 has 32
    replace_file(tmp_path, "shards", shard_of(IDS, codes), 0)
    report = verify(tmp_path)
    assert [problem.code for problem in report.problems] == ["code_range"]
    assert "2 rows, first '0/2.jpg'" in report.problems[0].message


def test_changed_codes_show_in_the_usage(tmp_path):
    make_set(tmp_path)
    replace_file(tmp_path, "shards", shard_of(IDS, CODES * 0), 0)
    assert set(codes_of(tmp_path)) == {"usage"}


def test_duplicates(tmp_path):
    make_set(tmp_path)
    replace_file(tmp_path, "shards", shard_of([*IDS[:3], "1/0.jpg"], CODES), 0)
    report = verify(tmp_path)
    assert {problem.code for problem in report.problems} == {"duplicate_id", "index_mismatch"}
    assert any("1 images stand in the set twice, first '1/0.jpg'" in problem.message for problem in report.problems)
    assert codes_of(tmp_path, deep=False) == []


def test_an_ok_image_that_is_also_a_reject_is_a_duplicate(tmp_path):
    manifest = make_set(tmp_path)
    rejects = pq.read_table(tmp_path / manifest.rejects.path)
    renamed = rejects.set_column(
        0, rejects.schema.field(0), pa.array(["0/0.jpg", *rejects["image_id"].to_pylist()[1:]])
    )
    replace_file(tmp_path, "rejects", encode_rejects(renamed))
    assert codes_of(tmp_path) == codes_of(tmp_path, deep=False) == ["duplicate_id"]


@pytest.mark.parametrize("column", ["image_id", "sha256", "width", "shard", "row"])
def test_an_index_that_says_something_else(tmp_path, column):
    manifest = make_set(tmp_path)
    index = pq.read_table(tmp_path / manifest.index.path)
    at = index.schema.get_field_index(column)
    values = index[column].to_pylist()
    values[5] = "other" if isinstance(values[5], str) else values[5] + 1
    field = index.schema.field(at)
    replace_file(tmp_path, "index", encode_index(index.set_column(at, field, pa.array(values, field.type))))
    assert codes_of(tmp_path) == ["index_mismatch"]


def test_side_tables_with_other_columns_or_rows(tmp_path):
    manifest = make_set(tmp_path)
    index = pq.read_table(tmp_path / manifest.index.path)
    replace_file(tmp_path, "index", encode_index(index.slice(1)))
    replace_file(tmp_path, "rejects", encode_index(index))
    assert codes_of(tmp_path) == ["index_mismatch", "rejects_mismatch"]
    replace_file(tmp_path, "index", b"no parquet")
    assert codes_of(tmp_path) == ["index_mismatch", "rejects_mismatch"]


def test_the_manifest_must_agree_with_itself(tmp_path):
    document = make_set(tmp_path).model_dump(mode="json")
    totals = document["totals"]
    rewrite(tmp_path, fingerprint_keys={"other": 1})
    assert codes_of(tmp_path) == ["fingerprint_mismatch"]
    rewrite(tmp_path, fingerprint_keys=document["fingerprint_keys"], totals={**totals, "codes": 1})
    assert codes_of(tmp_path) == ["totals"]
    rewrite(tmp_path, totals={**totals, "ok": 11, "images": 15})
    assert set(codes_of(tmp_path)) == {"totals"}
    rewrite(tmp_path, totals={**totals, "rejected_by_reason": {"missing": 4}})
    assert codes_of(tmp_path) == ["rejects_mismatch"]
    rewrite(tmp_path, totals=totals, usage=document["usage"][:1])
    assert codes_of(tmp_path) == ["usage"]
    rewrite(tmp_path, usage=document["usage"], shards=[document["shards"][0], *document["shards"][:2]])
    assert {"manifest_invalid", "duplicate_id"} <= set(codes_of(tmp_path))


def test_a_codebook_of_another_shape(tmp_path):
    make_set(tmp_path)
    spec = json.loads((tmp_path / MANIFEST_NAME).read_text())["tokenizer"]
    rewrite(tmp_path, tokenizer={**spec, "code_dim": 8})
    assert codes_of(tmp_path) == ["codebook_invalid"]


def test_no_manifest_and_no_set(tmp_path):
    for place in (tmp_path, tmp_path / "absent"):
        with pytest.raises(InputError):
            verify(place)
        with pytest.raises(InputError, match="holds no token set"):
            status(place)
    commit_unit(Store.open(tmp_path), "u000000", ["a"])
    assert codes_of(tmp_path) == ["manifest_missing"]
    run = tmp_path / "run"
    run.mkdir()
    for name in (".lease", "config.json"):
        (run / name).write_text("{}")
    for look in (status, verify):
        with pytest.raises(InputError, match="is a training run, not a token set"):
            look(run)
    (tmp_path / MANIFEST_NAME).write_text("{")
    assert codes_of(tmp_path) == ["manifest_invalid"]
    assert [problem.code for problem in status(tmp_path).problems] == ["manifest_invalid"]


def test_status_of_a_job_from_its_first_second_to_its_end(tmp_path):
    store = Store.open(tmp_path)
    with store.lease("tokenize"):
        found = status(tmp_path)
        assert (found.state, found.images) == ("in progress", 0)
        assert found.owner
        assert "tokenize" in found.owner
        commit_unit(store, "u000000", ["a", "b"], {"b"})
        commit_unit(store, "u000001", ["c"], {"c"})
    found = status(tmp_path)
    assert found.as_dict() == {
        "images": 3,
        "ok": 1,
        "rejected": 2,
        "shards": 1,
        "fingerprint": MARK,
        "problems": [],
        "notes": [],
        "state": "interrupted",
        "owner": None,
        "progress": None,
        "progress_age": None,
    }
    assemble(store)
    assert status(tmp_path).state == "complete"
    commit_unit(store, "u000002", ["d"], seed=5)
    assert status(tmp_path).state == "interrupted"
    assert status(tmp_path).images == 3
    assemble(store)
    assert (status(tmp_path).state, status(tmp_path).ok) == ("complete", 2)
    assert (tmp_path / LEASE_NAME).exists()


def test_status_sees_missing_shards_and_damaged_records(tmp_path):
    manifest = make_set(tmp_path)
    (tmp_path / manifest.shards[0].path).unlink()
    (tmp_path / manifest.shards[1].path).write_bytes(b"")
    assert [problem.code for problem in status(tmp_path).problems] == ["shard_missing", "shard_size"]
    (tmp_path / MANIFEST_NAME).unlink()
    (tmp_path / commit_path("u000001")).write_bytes(b"x")
    commit_unit(Store.open(tmp_path), "u000009", ["z"], mark="1" * 64)
    found = status(tmp_path)
    assert [problem.code for problem in found.problems] == ["commit_invalid", "fingerprint_mismatch"]
    assert found.fingerprint is None


def test_status_of_a_killed_job(tmp_path):
    code = "import sys, time\nfrom manifests.storage import Store\n"
    code += "with Store.open(sys.argv[1]).lease('tokenize'):\n    print('held', flush=True)\n    time.sleep(60)"
    job = subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE, text=True)
    assert job.stdout is not None
    assert job.stdout.readline() == "held\n"
    assert status(tmp_path).state == "in progress"
    job.send_signal(signal.SIGKILL)
    job.communicate()
    assert status(tmp_path).state == "interrupted"


def test_usage_text_is_small_for_sparse_histograms():
    counts = np.zeros(16384, np.int64)
    counts[::100] = 5
    assert len(encode_usage([counts] * 8)) < 4000
