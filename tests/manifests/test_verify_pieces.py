"""verify reads index, rejects and shards by pieces, and says what it would say if it held them."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_sets import MARK, assemble, commit_unit, make_set, random_codes, shard_data

from manifests.repeated_ids import RepeatedIds
from manifests.schema import MANIFEST_NAME
from manifests.shards import encode_index, encode_shard
from manifests.storage import Store
from manifests.verify import verify

ROWS = 300  # three row groups of a shard


def replace_file(folder: Path, entry: dict, data: bytes) -> None:
    (folder / entry["path"]).write_bytes(data)
    entry.update({"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()})


def spoil(folder: Path, shard: dict, *, beyond: list[int], short: list[tuple[int, int]]) -> None:
    """Codes beyond their codebook in some rows, and rows cut to a length."""
    codes = list(random_codes(np.random.default_rng(0), ROWS))
    for row in beyond:
        codes[row][2] = 31
    for row, length in short:
        codes[row] = codes[row][:length]
    names = pq.read_table(folder / shard["path"])["image_id"].to_pylist()
    data = encode_shard(shard_data(names, codes), fingerprint=MARK, unit=shard["unit"], code_dtype=np.uint16)
    replace_file(folder, shard, data)


@pytest.fixture(scope="module")
def spoiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set in which four shards and the index are wrong, here and there."""
    folder = tmp_path_factory.mktemp("spoiled")
    store = Store.open(folder)
    for unit in range(4):
        commit_unit(store, f"u{unit:06d}", [f"{unit}/{row}.jpg" for row in range(ROWS)], seed=unit)
    assemble(store)
    document = json.loads((folder / MANIFEST_NAME).read_text())
    spoil(folder, document["shards"][0], beyond=[5, 200, 290], short=[])
    spoil(folder, document["shards"][1], beyond=[], short=[(130, 6), (299, 10)])
    spoil(folder, document["shards"][2], beyond=[5, 290], short=[(140, 11)])  # not a multiple of the depths
    index = pq.read_table(folder / document["index"]["path"])
    widths = index["width"].to_numpy().copy()
    widths[3 * ROWS + 77] += 1
    replace_file(folder, document["index"], encode_index(index.set_column(2, index.schema.field(2), pa.array(widths))))
    (folder / MANIFEST_NAME).write_text(json.dumps(document))
    return folder


def test_pieces_change_no_finding(spoiled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = verify(spoiled)
    assert [(problem.code, problem.message.partition(",")[0]) for problem in whole.problems] == [
        ("code_range", "3 rows"),
        ("row_length", "2 rows"),
        ("row_length", "1 rows"),
        ("index_mismatch", f"the index and {whole.problems[-1].path} do not have the same width values"),
    ]
    assert [problem.message.split("'")[1] for problem in whole.problems[:3]] == ["0/5.jpg", "1/130.jpg", "2/140.jpg"]
    monkeypatch.setattr("manifests.check_shard._READ_AT_ONCE", 1)
    monkeypatch.setattr("manifests.table_reader.BATCH_ROWS", 7)
    assert verify(spoiled) == whole


@pytest.mark.parametrize("deep", [True, False])
def test_ids_of_one_hash_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, deep: bool) -> None:
    monkeypatch.setattr("manifests.repeated_ids.hash_column", lambda ids: np.zeros(len(ids), np.uint64))
    make_set(tmp_path)
    assert verify(tmp_path, deep=deep).problems == []
    document = json.loads((tmp_path / MANIFEST_NAME).read_text())
    document["shards"][1] = document["shards"][0]
    index = pq.read_table(tmp_path / document["index"]["path"])
    twice = pa.concat_tables([index.slice(0, 4), index.slice(0, 4), index.slice(8)])
    replace_file(tmp_path, document["index"], encode_index(twice))
    (tmp_path / MANIFEST_NAME).write_text(json.dumps(document))
    found = [problem.message for problem in verify(tmp_path, deep=deep).problems if problem.code == "duplicate_id"]
    assert found == ["4 images stand in the set twice, first '0/0.jpg'"]


@given(st.lists(st.lists(st.text("aé", max_size=3), max_size=8), max_size=8))
def test_repeated_ids_are_those_that_a_counter_finds(columns: list[list[str]]) -> None:
    ids = RepeatedIds()
    chunked = [pa.chunked_array([pa.array(column, pa.string())]) for column in columns]
    for column in chunked:
        ids.add(column)
    counts = Counter(name for column in columns for name in column)
    twice = [name for name, count in counts.items() if count > 1]
    found = ids.find(chunked)
    assert (found and (found.count, found.first)) == ((len(twice), twice[0]) if twice else None)
