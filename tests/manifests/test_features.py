"""Sets of features: the same contract, with numbers instead of codes in the shards."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import duckdb
import jsonschema
import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_sets import MARK, NUMERICS, header, make_set, shard_data
from pydantic import ValidationError

from manifests.columns import ROW_GROUP_BYTES, feature_column
from manifests.commits import (
    CommitRecord,
    MemberColumns,
    UnitMember,
    assemble_manifest,
    list_commits,
    read_commit,
    write_commit,
)
from manifests.errors import InputError, VerificationFailed
from manifests.reader import open_manifest
from manifests.schema import MANIFEST_NAME, FeaturesSpec, Manifest, ShardEntry, TokenizerSpec, published_schema
from manifests.shard_reader import read_shard
from manifests.shards import encode_shard, list_values, shard_name
from manifests.storage import Store
from manifests.verify import status, verify

GRID, WIDTH = (2, 3), 5
ROW = GRID[0] * GRID[1] * WIDTH
DTYPES = ["float32", "float16", "bfloat16"]


def spec(dtype: str) -> FeaturesSpec:
    return FeaturesSpec(
        kind="features",
        origin="encoder",
        weights_sha256={"model.safetensors": "0" * 64},
        view_size=28,
        grid=GRID,
        width=WIDTH,
        dtype=dtype,
        settings={"layer": 8},
    )


def stored(dtype: str, rows: int, seed: int = 0) -> np.ndarray:
    """Random values the way they stand in a shard, (rows, ROW)."""
    values = np.random.default_rng(seed).normal(size=(rows, ROW)).astype(np.float32)
    if dtype == "bfloat16":
        return (values.view(np.uint32) >> 16).astype(np.uint16)
    return values.astype(dtype)


def shard_of(ids: list[str], values, dtype: str, unit: str = "u000000", **changes) -> bytes:
    return encode_shard(shard_data(ids, values), fingerprint=MARK, unit=unit, feature_dtype=dtype, **changes)


def make_features(folder: Path, dtype: str, units: int = 2, rows: int = 4) -> Manifest:
    store = Store.open(folder)
    for number in range(units):
        unit, ids = f"u{number:06d}", [f"{number}/{i}.jpg" for i in range(rows)]
        write_unit(store, unit, ids, shard_of(ids, stored(dtype, rows, number), dtype, unit))
    return assemble(store, dtype)


def write_unit(store: Store, unit: str, ids: list[str], data: bytes) -> None:
    digest = hashlib.sha256(data).hexdigest()
    store.write(shard_name(unit, digest), data)
    write_commit(
        store,
        CommitRecord(
            fingerprint=MARK,
            unit=unit,
            shard=ShardEntry(path=shard_name(unit, digest), bytes=len(data), sha256=digest, unit=unit, rows=len(ids)),
            members=MemberColumns.of(UnitMember(name, 100, 10**18, i) for i, name in enumerate(ids)),
            rejects=[],
            usage="",
            views=len(ids),
            codes=0,
            numerics=NUMERICS,
            seconds=0.5,
        ),
    )


def assemble(store: Store, dtype: str) -> Manifest:
    records = (read_commit(store, unit) for unit in list_commits(store))
    return assemble_manifest(store, header(tokenizer=spec(dtype), codebooks=[]), records)


def damage(folder: Path, dtype: str, values) -> list[str]:
    """The codes of what `verify` finds when the first unit of a set holds `values`."""
    ids = [f"0/{i}.jpg" for i in range(len(values))]
    write_unit(Store.open(folder), "u000000", ids, shard_of(ids, values, dtype))
    assemble(Store.open(folder), dtype)
    return [problem.code for problem in verify(folder).problems]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_set_of_features_from_shards_to_reader(tmp_path, dtype):
    manifest = make_features(tmp_path, dtype)
    assert (manifest.kind, manifest.tokenizer, manifest.codebook, manifest.usage) == ("features", None, None, None)
    assert manifest.producer == manifest.features == spec(dtype)
    assert (manifest.totals.views, manifest.totals.codes) == (8, 0)
    assert verify(tmp_path).problems == verify(tmp_path, deep=False).problems == []
    assert (status(tmp_path).state, status(tmp_path).ok) == ("complete", 8)
    opened = open_manifest(tmp_path)
    found = opened.read_features(["1/2.jpg", "0/0.jpg"])
    wanted = [stored(dtype, 4, 1)[2], stored(dtype, 4, 0)[0]]
    for values, bits in zip(found, wanted, strict=True):
        assert values.shape == (1, GRID[0] * GRID[1], WIDTH)
        if dtype == "bfloat16":
            assert values.dtype == np.float32
            assert np.array_equal(values.view(np.uint32) >> 16, bits.reshape(values.shape))
            assert not (values.view(np.uint32) & 0xFFFF).any()
        else:
            assert values.dtype == dtype
            assert np.array_equal(values, bits.reshape(values.shape))


def test_codes_and_features_are_not_taken_for_each_other(tmp_path):
    make_features(tmp_path / "features", "bfloat16")
    make_set(tmp_path / "codes")
    features, codes = open_manifest(tmp_path / "features"), open_manifest(tmp_path / "codes")
    with pytest.raises(InputError, match=r"features holds features, not codes: give a token set"):
        features.read_codes(["0/0.jpg"])
    with pytest.raises(InputError, match=r"codes holds codes, not features: give a token set"):
        codes.read_features(["0/0.jpg"])
    with pytest.raises(InputError, match="not codes"):
        features.codebooks()
    with pytest.raises(InputError, match=r"has no features of 'absent' \(1 such images\)"):
        features.read_features(["absent"])


def test_a_manifest_of_codes_is_written_as_before(tmp_path):
    make_set(tmp_path)
    document = json.loads((tmp_path / MANIFEST_NAME).read_text())
    assert "features" not in document
    assert list(document)[:9] == [
        "format", "schema_version", "kind", "fingerprint", "fingerprint_keys", "tokenizer", "geometry", "codebook", "source"
    ]  # fmt: skip
    assert list(document["tokenizer"]) == [
        "kind", "origin", "revision", "weights_sha256", "view_size", "grid", "codebook_sizes", "code_dim", "residual",
        "settings",
    ]  # fmt: skip


def test_a_manifest_has_the_keys_of_its_kind_and_no_others(tmp_path):
    schema = json.loads(published_schema())
    features = make_features(tmp_path / "features", "float32").model_dump(mode="json")
    codes = make_set(tmp_path / "codes").model_dump(mode="json")
    for good in (features, codes):
        jsonschema.validate(good, schema)
    wrong = [
        {name: value for name, value in features.items() if name != "features"},
        {name: value for name, value in codes.items() if name != "codebook"},
    ]
    for document in [*wrong, {**features, "kind": "codes"}]:
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(document, schema)
        with pytest.raises(ValidationError, match="lacks"):
            Manifest.model_validate(document)
    with pytest.raises(ValidationError, match="has codebook"):
        Manifest.model_validate({**features, "codebook": codes["codebook"]})


@given(data=st.data())
def test_any_values_come_back_bit_by_bit(tmp_path_factory, data):
    """NaN and infinity too: what is finite is for `verify` to say."""
    dtype = data.draw(st.sampled_from(DTYPES))
    column = feature_column(dtype)
    size = column.dtype.itemsize
    raw = data.draw(st.binary(min_size=size, max_size=40 * size))
    values = np.frombuffer(raw[: len(raw) // size * size], column.dtype).reshape(1, -1)
    path = tmp_path_factory.mktemp("shard") / "one.parquet"
    path.write_bytes(shard_of(["a"], values, dtype))
    back, offsets = list_values(read_shard(Store.open(path.parent), path.name)["features"])
    assert offsets.tolist() == [0, values.size]
    assert back.dtype == column.dtype
    assert back.tobytes() == values.tobytes()
    with np.errstate(invalid="ignore"):  # a signalling NaN says so when it is cast
        meaning = column.widened(back).astype(np.float64)
    assert np.array_equal(np.isfinite(meaning), column.finite(back))


def test_layout_of_a_file(tmp_path):
    path = tmp_path / "one.parquet"
    values = np.random.default_rng(0).integers(0, 1 << 16, (20, 400_000), np.uint16)
    path.write_bytes(shard_of([str(i) for i in range(20)], values, "bfloat16"))
    file = pq.ParquetFile(path)
    assert file.schema_arrow.metadata[b"asvr.kind"] == b"features"
    assert file.schema_arrow.metadata[b"asvr.dtype"] == b"bfloat16"
    rows = ROW_GROUP_BYTES // (2 * 400_000)
    assert [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)] == [rows] * (20 // rows)
    (chunk,) = (
        file.metadata.row_group(0).column(i)
        for i in range(file.metadata.num_columns)
        if file.metadata.row_group(0).column(i).path_in_schema == "features.list.element"
    )
    assert "BYTE_STREAM_SPLIT" in chunk.encodings
    assert not chunk.has_dictionary_page


def test_splitting_bytes_makes_real_features_smaller():
    """The exponents of neighbouring features are alike; the bits of a mantissa are not."""
    normal = np.random.default_rng(0).normal(size=(8, 50_000)).astype(np.float32)
    values = (normal.view(np.uint32) >> 16).astype(np.uint16)
    assert len(shard_of([str(i) for i in range(8)], values, "bfloat16")) < 0.9 * values.nbytes


def test_duckdb_reads_the_numbers(tmp_path):
    manifest = make_features(tmp_path, "float32", units=1)
    (row,) = duckdb.sql(
        f"SELECT features FROM '{tmp_path / manifest.shards[0].path}' WHERE image_id = '0/3.jpg'"  # noqa: S608
    ).fetchall()
    assert np.array_equal(np.asarray(row[0], np.float32), stored("float32", 4)[3])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_named(tmp_path, dtype, bad):
    make_features(tmp_path, dtype)
    values = stored(dtype, 4)
    bits = (np.float32(bad).view(np.uint32) >> 16).astype(np.uint16)
    values[2, 7] = bits if dtype == "bfloat16" else bad
    assert damage(tmp_path, dtype, values) == ["not_finite"]
    (problem,) = verify(tmp_path).problems
    assert "1 rows, first '0/2.jpg', have features that are NaN or infinite" in problem.message


def test_rows_of_another_length_and_shards_of_another_type(tmp_path):
    make_features(tmp_path, "bfloat16")
    rows = list(stored("bfloat16", 4))
    for bad in (rows[1][:-1], rows[1][:0], np.concatenate([rows[1], rows[1]])):
        assert damage(tmp_path, "bfloat16", [rows[0], bad, *rows[2:]]) == ["row_length"]
    damage(tmp_path, "bfloat16", [rows[0], rows[1][:-1], *rows[2:]])
    with pytest.raises(VerificationFailed, match=r"has a row of 29 features: run asvr verify"):
        open_manifest(tmp_path).read_features(["0/1.jpg"])
    ids = [f"0/{i}.jpg" for i in range(4)]
    codes = encode_shard(shard_data(ids, stored("bfloat16", 4)), fingerprint=MARK, unit="u000000")
    for data in (codes, shard_of(ids, stored("float32", 4), "float32")):
        write_unit(Store.open(tmp_path), "u000000", ids, data)
        assemble(Store.open(tmp_path), "bfloat16")
        assert {problem.code for problem in verify(tmp_path).problems} == {"shard_schema"}
        with pytest.raises(VerificationFailed, match="damaged"):
            open_manifest(tmp_path).read_features(["0/1.jpg"])


def test_a_damaged_byte_is_found(tmp_path):
    manifest = make_features(tmp_path, "bfloat16")
    path = tmp_path / manifest.shards[0].path
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 4
    path.write_bytes(data)
    assert [problem.code for problem in verify(tmp_path).problems] == ["shard_sha256"]


def test_a_record_that_counts_codes_is_not_one_of_features(tmp_path):
    make_set(tmp_path, units=1)
    store = Store.open(tmp_path)
    records = (read_commit(store, unit) for unit in list_commits(store))
    with pytest.raises(VerificationFailed, match="counts codes, but the set is one of features"):
        assemble_manifest(store, header(tokenizer=spec("float32"), codebooks=[]), records)


def test_features_of_another_type_than_said_are_a_bug():
    with pytest.raises(ValueError, match="bfloat16 features are stored as uint16, not float32"):
        shard_of(["a"], stored("float32", 1), "bfloat16")
    with pytest.raises(ValueError, match="features are one of float32, float16, bfloat16, not int8"):
        feature_column("int8")


def test_both_specs_say_how_many_numbers_a_position_has():
    codes = TokenizerSpec(
        kind="fitted", origin="x", weights_sha256={}, view_size=28, grid=(2, 2), codebook_sizes=(4, 4), code_dim=3
    )
    assert (codes.values, spec("float32").values) == (2, WIDTH)
    assert spec("float32").codebook_sizes == ()
