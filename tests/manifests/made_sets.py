"""Small token sets written with the contract's own functions, for the tests of the contract."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from manifests.commits import (
    CommitRecord,
    ManifestHeader,
    MemberColumns,
    RejectRow,
    UnitMember,
    assemble_manifest,
    encode_usage,
    list_commits,
    read_commit,
    write_commit,
)
from manifests.fingerprint import fingerprint
from manifests.schema import Geometry, Manifest, Numerics, ShardEntry, SourceIdentity, TokenizerSpec
from manifests.shards import Locator, ShardData, code_dtype, encode_shard, shard_name
from manifests.storage import Store

SIZES = (16, 32)
GRID = (2, 3)
DIM = 4
KEYS = {"geometry": {"mode": "pad", "size": 28}, "tokenizer": {"kind": "fitted", "weights": "0" * 64}}
MARK = fingerprint(KEYS)
NUMERICS = Numerics(device="cpu", torch="2.13.0", dtype="float32", batch_size=8)


def spec(sizes=SIZES, grid=GRID, dim=DIM) -> TokenizerSpec:
    return TokenizerSpec(
        kind="fitted",
        origin="encoder",
        weights_sha256={"model.safetensors": "0" * 64},
        view_size=28,
        grid=grid,
        codebook_sizes=sizes,
        code_dim=dim,
        settings={"layer": 8, "a": 1},
    )


def codebooks(sizes=SIZES, dim=DIM) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.standard_normal((size, dim)).astype(np.float32) for size in sizes]


def header(**changes) -> ManifestHeader:
    fields = {
        "fingerprint_keys": KEYS,
        "tokenizer": spec(),
        "geometry": Geometry(mode="pad", size=28),
        "codebooks": codebooks(),
        "source": SourceIdentity(kind="folder", location="images"),
        "source_errors": 0,
        "command": ["asvr", "tokenize"],
        "versions": {"asvr": "0.1.0"},
    }
    return ManifestHeader(**{**fields, **changes})


def shard_data(ids: list[str], codes: np.ndarray, sizes=SIZES, grid=GRID, views: int = 1) -> ShardData:
    """Rows whose pixels nobody needs: `codes` (N, V*P*D)."""
    boxes = np.tile(np.asarray([0, 0, 30, 30], np.float32), (len(ids), views, 1))
    return ShardData(
        image_ids=ids,
        sha256=[hashlib.sha256(name.encode()).hexdigest() for name in ids],
        widths=np.arange(10, 10 + len(ids)),
        heights=np.full(len(ids), 30),
        view_boxes=boxes,
        locators=[Locator(name, 0, 100 + i) for i, name in enumerate(ids)],
        codes=codes,
    )


def histograms(codes: np.ndarray, sizes=SIZES) -> list[np.ndarray]:
    levels = np.asarray(codes).reshape(-1, len(sizes))
    return [np.bincount(levels[:, depth], minlength=size) for depth, size in enumerate(sizes)]


def random_codes(rng: np.random.Generator, rows: int, sizes=SIZES, grid=GRID, views: int = 1) -> np.ndarray:
    levels = [rng.integers(0, size, (rows, views * grid[0] * grid[1])) for size in sizes]
    return np.stack(levels, axis=-1).reshape(rows, views * grid[0] * grid[1] * len(sizes)).astype(np.int32)


def commit_unit(
    store: Store, unit: str, ids: list[str], rejected: set[str] = frozenset(), *, seed: int = 0, mark: str = MARK
) -> CommitRecord:
    """Write the shard and the commit record of a unit."""
    kept = [name for name in ids if name not in rejected]
    codes = random_codes(np.random.default_rng(seed), len(kept))
    shard = None
    if kept:
        data = encode_shard(shard_data(kept, codes), fingerprint=mark, unit=unit, code_dtype=code_dtype(SIZES))
        digest = hashlib.sha256(data).hexdigest()
        store.write(shard_name(unit, digest), data)
        shard = ShardEntry(path=shard_name(unit, digest), bytes=len(data), sha256=digest, unit=unit, rows=len(kept))
    record = CommitRecord(
        fingerprint=mark,
        unit=unit,
        shard=shard,
        members=MemberColumns.of(UnitMember(name, 100 + i, 10**18 + i, i) for i, name in enumerate(ids)),
        rejects=[
            RejectRow(image_id=name, reason="corrupt", message="bad bytes", source_row=i)
            for i, name in enumerate(ids)
            if name in rejected
        ],
        usage=encode_usage(histograms(codes)),
        views=len(kept),
        codes=codes.size,
        numerics=NUMERICS,
        seconds=0.5,
    )
    write_commit(store, record)
    return record


def assemble(store: Store, **changes) -> Manifest:
    return assemble_manifest(store, header(**changes), (read_commit(store, unit) for unit in list_commits(store)))


def make_set(folder: Path, units: int = 3, rows: int = 5) -> Manifest:
    """A finished set: in every unit the second image is rejected, and the last unit is all rejects."""
    store = Store.open(folder)
    for number in range(units):
        ids = [f"{number}/{i}.jpg" for i in range(rows)]
        commit_unit(store, f"u{number:06d}", ids, {ids[1]}, seed=number)
    commit_unit(store, f"u{units:06d}", ["bad.jpg"], {"bad.jpg"})
    return assemble(store)
