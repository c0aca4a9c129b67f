"""verify --recompute on real sets: equal codes, flips by rounding, plain mismatches, and images that say nothing."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from made_containers import Place, parquet_of, samples, tar_of
from made_jobs import CODES, DEPTH, job_config, picture

from manifests.commits import read_commit, write_commit
from manifests.cut import count_codes, entry_of
from manifests.errors import FingerprintMismatch, InputError
from manifests.filter import Choice, filter_set
from manifests.forget import forget_images
from manifests.reader import open_manifest
from manifests.rebuild import rebuild
from manifests.shard_reader import read_parquet
from manifests.shards import code_column, encode_rows, list_values
from manifests.storage import Store
from manifests.usage import encode_usage
from manifests.verify import verify
from tokenize_stage.job import run_job
from tokenize_stage.margin import TOLERANCE
from tokenize_stage.recompute import recompute


def tokenized(pictures: Path, codebook: Path, output: Path, **changes) -> Store:
    run_job(job_config(pictures, codebook, output, **changes))
    return Store.open(output)


def change_codes(store: Store, unit: str, row: int, position: int, depth: int, code: int | None = None) -> None:
    """Put another code into the shard of a unit, and let record and manifest agree with that."""
    record = read_commit(store, unit)
    table = read_parquet(pa.py_buffer(store.read(record.shard.path)), unit)
    values, offsets = list_values(table["codes"])
    values = values.copy()
    at = offsets[row] + position * DEPTH + depth
    values[at] = (values[at] + 1) % CODES if code is None else code
    column = pa.ListArray.from_arrays(
        pa.array(offsets, pa.int32()), pa.array(values), type=table.schema.field("codes").type
    )
    table = table.set_column(table.schema.get_field_index("codes"), table.schema.field("codes"), column)
    data = encode_rows(table, code_column(np.uint16), fingerprint=record.fingerprint, unit=unit)
    shard = entry_of(unit, data, table.num_rows)
    store.write(shard.path, data)
    usage = encode_usage(count_codes(values, (CODES,) * DEPTH))
    write_commit(store, record.model_copy(update={"shard": shard, "usage": usage}))
    rebuild(store)
    assert verify(store.location).problems == []


def test_a_fresh_set_is_equal(pictures, codebook, tmp_path):
    store = tokenized(pictures, codebook, tmp_path / "out")
    seen = []
    report = recompute(store, 100, progress=lambda done, total: seen.append((done, total)))
    assert (report.sampled, report.compared, report.equal, report.positions) == (20, 20, 20, 80)
    assert (report.flips, report.problems, report.changed, report.unreadable) == (0, [], [], [])
    assert seen[-1] == (20, 20)


def test_the_seed_decides_the_sample(pictures, codebook, tmp_path):
    store = tokenized(pictures, codebook, tmp_path / "out")
    change_codes(store, "u000000", 3, 0, 0)
    hits = [len(recompute(store, 5, seed=seed).problems) for seed in range(8)]
    assert hits == [len(recompute(store, 5, seed=seed).problems) for seed in range(8)]
    assert set(hits) == {0, 1}


@pytest.mark.parametrize("depth", [0, 1])
def test_another_code_is_a_problem(pictures, codebook, tmp_path, depth):
    store = tokenized(pictures, codebook, tmp_path / "out")
    change_codes(store, "u000001", 2, 3, depth)
    report = recompute(store, 100)
    assert (report.compared, report.equal, report.flips) == (20, 19, 0)
    (problem,) = report.problems
    assert problem.code == "recompute_mismatch"
    assert problem.path.startswith("shards/u000001-")
    assert f"a code of depth {depth} that would take a shift of" in problem.message


def test_what_rounding_explains_is_a_flip(pictures, codebook, tmp_path, monkeypatch):
    store = tokenized(pictures, codebook, tmp_path / "out")
    change_codes(store, "u000001", 2, 3, 0)
    monkeypatch.setitem(TOLERANCE, "float32", 10.0)  # so much that rounding explains everything
    report = recompute(store, 100)
    assert (report.equal, report.flips, report.problems) == (19, 1, [])
    assert 0 < report.largest_shift < 10


def test_other_batches_and_threads_flip_at_most(pictures, codebook, tmp_path):
    store = tokenized(pictures, codebook, tmp_path / "out")
    job = json.loads(store.read("job.json"))
    job["config"].update({"batch_size": 7, "torch_threads": 2})
    store.write("job.json", json.dumps(job).encode())
    report = recompute(store, 100)
    assert report.compared == 20
    assert report.problems == []


def test_changed_and_lost_images_are_left_out(pictures, codebook, tmp_path):
    store = tokenized(pictures, codebook, tmp_path / "out")
    (pictures / "000001.jpg").write_bytes(picture(99, ".jpg"))
    (pictures / "more/000000.png").unlink()
    report = recompute(store, 100)
    assert (report.compared, report.equal) == (18, 18)
    assert report.changed == ["000001.jpg"]
    assert len(report.unreadable) == 1
    assert report.unreadable[0].startswith("more/000000.png: there is no file")
    assert report.problems == []


def test_nothing_to_compare_is_an_error(pictures, codebook, tmp_path):
    store = tokenized(pictures, codebook, tmp_path / "out")
    for path in pictures.rglob("*.*"):
        path.unlink()
    with pytest.raises(
        InputError, match=r"none of the 20 images sampled .* can be compared \(first: .*there is no file"
    ):
        recompute(store, 100)


def test_another_size_of_the_same_bytes_is_a_problem(pictures, codebook, tmp_path):
    store = tokenized(pictures, codebook, tmp_path / "out")
    record = read_commit(store, "u000000")
    table = read_parquet(pa.py_buffer(store.read(record.shard.path)), "u000000")
    widths = pa.array(np.asarray(table["width"].to_pylist(), np.int32) + 1)
    table = table.set_column(table.schema.get_field_index("width"), table.schema.field("width"), widths)
    data = encode_rows(table, code_column(np.uint16), fingerprint=record.fingerprint, unit="u000000")
    store.write(entry_of("u000000", data, 8).path, data)
    write_commit(store, record.model_copy(update={"shard": entry_of("u000000", data, 8)}))
    rebuild(store)
    report = recompute(store, 100)
    assert {problem.code for problem in report.problems} == {"recompute_views"}
    assert len(report.problems) == 8


def test_features(pictures, codebook, tmp_path):
    encoder = codebook.parent / "encoder"
    tokenizer = {
        "kind": "features",
        "encoder": {"path": str(encoder), "layer": 1, "dtype": "bfloat16"},
        "view_size": 28,
    }
    store = tokenized(pictures, codebook, tmp_path / "out", tokenizer=tokenizer)
    report = recompute(store, 100)
    assert (report.compared, report.equal, report.problems) == (20, 20, [])


def test_what_cannot_be_recomputed_says_why(pictures, codebook, tmp_path):
    store = tokenized(pictures, codebook, tmp_path / "out")
    filter_set(store.location, Choice(condition="width > 1"), Store.open(tmp_path / "filtered"))
    with pytest.raises(InputError, match=r"has no job.json|made by asvr manifest filter"):
        recompute(Store.open(tmp_path / "filtered"), 3)
    document = json.loads(store.read("manifest.json"))
    document["fingerprint_keys"]["dtype"] = "bfloat16"
    store.write("manifest.json", json.dumps(document).encode())
    with pytest.raises(FingerprintMismatch, match=r'makes other codes \(dtype: "bfloat16" -> "float32"\)'):
        recompute(store, 3)
    assert hashlib.sha256(store.read("job.json")).hexdigest()


def test_a_bfloat16_set_survives_another_batch_size(pictures, codebook, tmp_path):
    """Here codes do flip (or may), and none is called a mismatch."""
    store = tokenized(pictures, codebook, tmp_path / "out", dtype="bfloat16")
    job = json.loads(store.read("job.json"))
    job["config"]["batch_size"] = 1
    store.write("job.json", json.dumps(job).encode())
    report = recompute(store, 100)
    assert (report.compared, report.problems) == (20, [])
    assert report.largest_shift <= TOLERANCE["bfloat16"]
    change_codes(store, "u000000", 0, 0, 0)
    shifted = recompute(store, 100)
    assert len(shifted.problems) + shifted.flips > report.flips


def test_images_in_tars_and_parquet_files(codebook, tmp_path):
    """Through their locators, and with what the shards carry of the source kept by every verb."""
    place = Place(str(tmp_path / "source"))
    place.put("a.tar", tar_of(samples(6)))
    place.put("b.tar", tar_of(samples(5, first=6)))
    tars = {"kind": "webdataset", "path": place.location, "carry": ["txt"]}
    store = tokenized(tmp_path, codebook, tmp_path / "tars", source=tars)
    pictures = [{"bytes": picture(number), "path": None} for number in range(9)]
    table = pa.table({"image": pictures, "caption": [f"caption {number}" for number in range(9)]})
    Place(str(tmp_path / "tables")).put("part.parquet", parquet_of(table))
    rows = {"kind": "parquet", "path": str(tmp_path / "tables"), "carry": ["caption"]}
    tables = tokenized(tmp_path, codebook, tmp_path / "parquet", source=rows)
    for one, count, carried in ((store, 11, "txt"), (tables, 9, "caption")):
        before = recompute(one, 100)
        assert (before.compared, before.equal, before.problems) == (count, count, [])
        gone = open_manifest(one.location).index()["image_id"][3].as_py()
        forget_images(one, [gone], purge=True)
        after = recompute(one, 100)
        assert (after.compared, after.equal) == (count - 1, count - 1)
        assert verify(one.location).problems == []
        texts = [text for shard in open_manifest(one.location).iter_shards() for text in shard[carried].to_pylist()]
        assert texts == [f"caption {number}" for number in range(count) if number != 3]
