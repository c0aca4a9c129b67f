import contextlib
import itertools
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_sets import MARK, random_codes, shard_data

from manifests.errors import VerificationFailed
from manifests.shard_reader import read_shard
from manifests.shards import (
    INDEX_SCHEMA,
    REJECTS_SCHEMA,
    Locator,
    ShardData,
    code_dtype,
    encode_index,
    encode_rejects,
    encode_shard,
    list_values,
    shard_name,
    shard_schema,
)
from manifests.storage import Store
from manifests.table_writer import TableWriter


def encode(data: ShardData, dtype=np.uint16) -> bytes:
    return encode_shard(data, fingerprint=MARK, unit="u000000", code_dtype=dtype)


names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)


@st.composite
def made_data(draw):
    rows = draw(st.integers(0, 300))
    wide = draw(st.booleans())
    dtype = np.dtype(np.uint32 if wide else np.uint16)
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    top = int(np.iinfo(dtype).max) + 1
    ragged = draw(st.booleans())
    views = rng.integers(1, 4, rows) if ragged else np.ones(rows, int)
    codes = [rng.integers(0, top, int(v) * 6).astype(draw(st.sampled_from([np.int64, dtype]))) for v in views[:1]]
    codes += [rng.integers(0, top, int(v) * 6) for v in views[1:]]
    boxes = [rng.standard_normal((int(v), 4)).astype(np.float32) for v in views]
    prefix = draw(names)
    same = not ragged and rows > 0
    return dtype, ShardData(
        image_ids=[f"{prefix}{i}" for i in range(rows)],
        sha256=["a" * 64] * rows,
        widths=rng.integers(1, 9999, rows),
        heights=rng.integers(1, 9999, rows),
        view_boxes=np.stack(boxes) if same else boxes,
        locators=[Locator(f"{prefix}{i % 3}", i, 2**40 + i) for i in range(rows)],
        codes=np.stack(codes) if same else codes,
    )


@given(made_data())
def test_a_shard_reads_as_it_was_written_and_has_one_encoding(tmp_path_factory, case):
    dtype, data = case
    blob = encode(data, dtype)
    assert encode(data, dtype) == blob
    path = tmp_path_factory.mktemp("shard") / "s.parquet"
    path.write_bytes(blob)
    table = read_shard(Store.open(path.parent), path.name)
    assert table.schema.equals(shard_schema(dtype))
    assert table["image_id"].to_pylist() == list(data.image_ids)
    assert table["width"].to_pylist() == np.asarray(data.widths).tolist()
    assert table["height"].to_pylist() == np.asarray(data.heights).tolist()
    found = zip(table["file"].to_pylist(), table["offset"].to_pylist(), table["length"].to_pylist(), strict=True)
    assert [Locator(*row) for row in found] == list(data.locators)
    values, offsets = list_values(table["codes"])
    assert values.dtype == dtype
    assert [values[a:b].tolist() for a, b in itertools.pairwise(offsets)] == [row.tolist() for row in data.codes]
    assert table["view_boxes"].to_pylist() == [row.reshape(-1).tolist() for row in data.view_boxes]


def test_bytes_do_not_depend_on_the_process(tmp_path):
    """Hash seeds, the heap and the array's memory layout differ between processes."""
    code = f"""
    import hashlib, sys
    sys.path.insert(0, {str(Path(__file__).parent)!r})
    import numpy as np
    from test_shards import encode
    from made_sets import random_codes, shard_data
    codes = random_codes(np.random.default_rng(1), 200)
    print(hashlib.sha256(encode(shard_data([str(i) for i in range(200)], codes))).hexdigest())
    """
    found = {
        subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code)],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert len(found) == 1


def test_layout_of_the_file(tmp_path):
    codes = random_codes(np.random.default_rng(0), 300)
    metadata = pq.read_metadata(pa.BufferReader(encode(shard_data([str(i) for i in range(300)], codes))))
    assert [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)] == [128, 128, 44]
    column = metadata.row_group(0).column(metadata.num_columns - 1)
    assert column.path_in_schema == "codes.list.element"
    assert "BYTE_STREAM_SPLIT" in column.encodings
    assert not column.has_dictionary_page
    assert column.compression == "ZSTD"
    assert metadata.metadata[b"asvr.fingerprint"].decode() == MARK
    assert metadata.metadata[b"asvr.unit"] == b"u000000"
    assert metadata.metadata[b"asvr.schema_version"] == b"1"
    assert metadata.metadata[b"asvr.kind"] == b"codes"


def test_random_codes_cost_less_than_two_bytes():
    codes = np.random.default_rng(0).integers(0, 1 << 14, (128, 5832), dtype=np.uint16)
    assert len(encode(shard_data([str(i) for i in range(128)], codes))) / codes.size < 1.8


READER = """
import sys
import duckdb, pandas, pyarrow.parquet
try:
    import manifests
except ImportError:
    pass
else:
    raise SystemExit("this package is importable, so the test shows nothing")
path = sys.argv[1]
frame = pandas.read_parquet(path)
arrow = pyarrow.parquet.read_table(path)
duck = duckdb.sql(f"select image_id, width, codes, view_boxes from '{path}' order by width").fetchall()
stats = duckdb.sql(f"select count(*), max(c) from (select unnest(codes) c from '{path}')").fetchall()[0]
for i in range(len(frame)):
    assert frame.image_id[i] == arrow["image_id"][i].as_py() == duck[i][0]
    assert frame.codes[i].tolist() == arrow["codes"][i].as_py() == duck[i][2]
    assert frame.view_boxes[i].tolist() == duck[i][3]
assert str(frame.codes[0].dtype) == "uint16"
print(len(frame), *stats, sum(map(sum, duck_codes)) if (duck_codes := [row[2] for row in duck]) else 0)
"""


def test_shards_open_without_this_package(tmp_path):
    codes = random_codes(np.random.default_rng(0), 200)
    (tmp_path / "s.parquet").write_bytes(encode(shard_data([f"ä/{i}.jpg" for i in range(200)], codes)))
    (tmp_path / "site").mkdir()
    packages = {Path(module.__file__).parents[1] for module in (duckdb, pd, pa, np)}
    for package in packages:
        for entry in package.iterdir():
            if not entry.name.startswith(("__editable__", "asvr", "_virtualenv")) and entry.suffix != ".pth":
                link = tmp_path / "site" / entry.name
                if not link.exists():
                    link.symlink_to(entry)
    done = subprocess.run(
        [sys.executable, "-S", "-P", "-c", READER, str(tmp_path / "s.parquet")],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path / "site"), "PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["200", str(codes.size), str(codes.max()), str(codes.sum())]


def test_source_columns_are_carried_along(tmp_path):
    data = shard_data(["a", "b"], random_codes(np.random.default_rng(0), 2))
    extra = pa.table({"caption": ["x", None], "turns": [[{"from": "human"}], []]})
    path = tmp_path / "s.parquet"
    path.write_bytes(encode(ShardData(**{**vars(data), "extra": extra})))
    assert read_shard(Store.open(path.parent), path.name, ["caption", "turns"]).to_pylist() == extra.to_pylist()
    with pytest.raises(ValueError, match=r"names of the shard's own: \['codes'\]"):
        encode(ShardData(**{**vars(data), "extra": pa.table({"codes": [1, 2]})}))
    with pytest.raises(ValueError, match="differ in length"):
        encode(ShardData(**{**vars(data), "extra": pa.table({"caption": ["x"]})}))


@pytest.mark.parametrize("bad", [-1, 1 << 16])
def test_a_code_that_does_not_fit_is_refused(bad):
    codes = random_codes(np.random.default_rng(0), 2)
    codes[1, 3] = bad
    with pytest.raises(ValueError, match="do not fit uint16"):
        encode(shard_data(["a", "b"], codes))


def test_columns_of_other_lengths_are_refused():
    data = shard_data(["a", "b"], random_codes(np.random.default_rng(0), 2))
    with pytest.raises(ValueError, match="differ in length"):
        encode(ShardData(**{**vars(data), "sha256": ["a" * 64]}))


def test_dtype_of_codes():
    assert code_dtype([256, 1 << 16]) == np.uint16
    assert code_dtype([256, (1 << 16) + 1]) == np.uint32
    assert shard_name("u000007", "abcd" * 16) == "shards/u000007-abcdabcdabcdabcd.parquet"


@pytest.mark.parametrize("damage", ["absent", "empty", "cut", "page"])
def test_a_damaged_shard_is_one_sentence_that_names_it(tmp_path, damage):
    path = tmp_path / "s.parquet"
    blob = bytearray(encode(shard_data([str(i) for i in range(50)], random_codes(np.random.default_rng(0), 50))))
    if damage == "cut":
        blob = blob[:-100]
    if damage == "page":
        column = pq.read_metadata(pa.BufferReader(bytes(blob))).row_group(0).column(8)
        start = column.data_page_offset + column.total_compressed_size - 20
        blob[start] ^= 1
    if damage != "absent":
        path.write_bytes(b"" if damage == "empty" else blob)
    with pytest.raises(VerificationFailed, match=r"s\.parquet is missing or damaged") as caught:
        read_shard(Store.open(path.parent), path.name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("rows", "groups"), [(0, [0]), (4, [4]), (10, [5, 5]), (12, [5, 5, 2])])
def test_a_table_is_written_as_its_rows_come(tmp_path, monkeypatch, rows, groups):
    monkeypatch.setattr("manifests.table_writer.ROW_GROUP_ROWS", 5)
    columns = {name: [f"{name}{row}" for row in range(rows)] for name in ("image_id", "reason", "message")}
    numbers = {name: range(rows) for name in ("source_row", "source_size", "source_mtime_ns")}
    table = pa.table(columns | numbers, schema=REJECTS_SCHEMA)
    with (tmp_path / "rejects").open("wb") as file, TableWriter(file, REJECTS_SCHEMA) as writer:
        for start in range(0, rows, 3):
            writer.add(table.slice(start, 3))
    assert writer.rows == rows
    written = pq.ParquetFile(tmp_path / "rejects")
    assert written.read() == table
    assert [written.metadata.row_group(group).num_rows for group in range(written.num_row_groups)] == groups
    assert (tmp_path / "rejects").read_bytes() == encode_rejects(table)


def test_index_and_rejects_have_one_schema_and_one_encoding():
    rows = 3
    index = pa.table(
        {
            field.name: pa.array(["x"] * rows if pa.types.is_string(field.type) else range(rows))
            for field in INDEX_SCHEMA
        }
    )
    assert encode_index(index) == encode_index(index.select(list(reversed(INDEX_SCHEMA.names))))
    assert pq.read_schema(pa.BufferReader(encode_index(index))).equals(INDEX_SCHEMA)
    blob = encode_rejects(REJECTS_SCHEMA.empty_table())
    assert pq.read_table(pa.BufferReader(blob)).schema.equals(REJECTS_SCHEMA)


@given(st.data())
@settings(max_examples=150)
def test_a_shard_with_a_damaged_byte_reads_or_is_named(tmp_path_factory, data):
    """Without the manifest's sha256 page checksums still guard the rows; no other error escapes."""
    blob = bytearray(encode(shard_data(["a", "b", "c"], random_codes(np.random.default_rng(0), 3))))
    at = data.draw(st.integers(0, len(blob) - 1))
    if data.draw(st.booleans()):
        blob[at] ^= data.draw(st.integers(1, 255))
    else:
        del blob[at:]
    path = tmp_path_factory.mktemp("shard") / "s.parquet"
    path.write_bytes(blob)
    with contextlib.suppress(VerificationFailed):
        read_shard(Store.open(path.parent), path.name, ["image_id", "codes"])
