"""What codes cost on disk, and how fast they are read: whole shards, single rows, and as the trainer reads them.

    python -m benchmarks.shards                       8,192 images of 729 positions, D 8, K 16,384
    python -m benchmarks.shards --rows 4096 --positions 256 --size 4096

Codes are random, which is the worst case: nothing smaller than log2 K bits can hold them. Files are read once before they
are timed, so figures are of the page cache, not of a disk. Target: 1.9 bytes for a code of 14 bits.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from benchmarks.machine import describe
from manifests.commits import (
    CommitRecord,
    ManifestHeader,
    MemberColumns,
    UnitMember,
    assemble_manifest,
    encode_usage,
    write_commit,
)
from manifests.fingerprint import fingerprint
from manifests.reader import OpenManifest, open_manifest
from manifests.schema import Geometry, Numerics, ShardEntry, SourceIdentity, TokenizerSpec
from manifests.shards import Locator, ShardData, code_dtype, encode_shard, shard_name
from manifests.storage import Store
from train_stage.tables import Tables

UNIT = 4096
MARK_KEYS: dict[str, Any] = {"tokenizer": "random codes"}
_SINGLE_ROWS = 50


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rows", type=int, default=2 * UNIT)
    parser.add_argument("--positions", type=int, default=729, help="of an image, a square number")
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--size", type=int, default=16384, help="K")
    parser.add_argument("--reads", type=int, default=20_000, help="rows read from the trainer's table")
    options = parser.parse_args()
    print(describe(torch.device("cpu")), flush=True)
    with tempfile.TemporaryDirectory() as place:
        os.environ["ASVR_CACHE"] = str(Path(place) / "cache")
        spec = random_spec(options.positions, options.depth, options.size)
        began = time.perf_counter()
        plain_bytes = write_set(Path(place) / "set", spec, options.rows)
        wrote = time.perf_counter() - began
        report(open_manifest(Path(place) / "set"), spec, options, wrote, plain_bytes)


def report(
    opened: OpenManifest, spec: TokenizerSpec, options: argparse.Namespace, wrote: float, plain_bytes: int
) -> None:
    """Measure and print the table."""
    rows, width = options.rows, spec.positions * spec.depth
    codes = rows * width
    shard_bytes = sum(shard.bytes for shard in opened.shards)
    index_bytes = opened.manifest.index.bytes
    drain(opened.iter_shards())
    scan = seconds(lambda: drain(opened.iter_shards(["codes"])))
    scan_all = seconds(lambda: drain(opened.iter_shards()))
    rng = np.random.default_rng(1)
    ids = opened.index()["image_id"].to_pylist()
    picked = [ids[row] for row in rng.integers(rows, size=_SINGLE_ROWS)]
    single = seconds(lambda: [opened.read_codes([name]) for name in picked]) / len(picked)
    tables = Tables([opened])
    every = tables.find(ids)
    make = seconds(lambda: tables.open_values(every))
    found = every.take(rng.integers(rows, size=options.reads))
    for image in range(len(found)):
        tables.values(found, image).sum()
    random_read = seconds(lambda: [tables.values(found, image).copy() for image in range(len(found))]) / len(found)
    for name in picked[:5]:
        if not np.array_equal(opened.read_codes([name])[0], tables.values(tables.find([name]), 0)):
            raise SystemExit(f"the trainer's table has other codes of {name} than the shards")
    bits = np.log2(options.size)
    print(
        f"\n{rows:,} images of {spec.positions} positions, D {spec.depth}, K {options.size:,} ({bits:.4g} bits), in "
        f"{len(opened.shards)} shards\n\n| on disk | bytes per code | |\n|---|---|---|\n"
        f"| the shards, all columns | {shard_bytes / codes:.3f} | {shard_bytes / 1e6:,.1f} MB |\n"
        f"| the index | {index_bytes / codes:.4f} | {index_bytes / rows:.0f} bytes an image |\n"
        f"| the codes alone in one row group, pyarrow's defaults and zstd (it makes a dictionary) | {plain_bytes / codes:.3f} | {plain_bytes / 1e6:,.1f} MB |\n"
        f"| {bits:.4g} bits, packed | {bits / 8:.3f} | |\n\n"
        "| reading | rows/s | a row |\n|---|---|---|\n"
        f"{line('shards in order, codes', scan / rows)}{line('shards in order, all columns', scan_all / rows)}"
        f"{line('one random row of a shard at a time, by id', single)}"
        f"{line('copying the shards to the table of a training node, once', make / rows)}"
        f"{line('random rows of that table, as the trainer reads them', random_read)}"
        f"\nMaking and writing the random set took {wrote:.1f} s."
    )


def line(name: str, each: float) -> str:
    """A line of the table, from the seconds of a row."""
    return f"| {name} | {1 / each:,.0f} | {each * 1e6:,.1f} us |\n"


def random_spec(positions: int, depth: int, size: int) -> TokenizerSpec:
    """A tokenizer that nobody runs."""
    edge = round(positions**0.5)
    if edge * edge != positions:
        raise SystemExit(f"--positions {positions} is not a square number: give 256, 576 or 729")
    return TokenizerSpec(
        kind="random", origin="random", weights_sha256={}, view_size=14 * edge, grid=(edge, edge),
        codebook_sizes=(size,) * depth, code_dim=1,
    )  # fmt: skip


def write_set(folder: Path, spec: TokenizerSpec, rows: int) -> int:
    """A token set of random codes, with the contract's own functions; the bytes of plain Parquet for the same codes."""
    store, mark, rng, plain = Store.open(folder), fingerprint(MARK_KEYS), np.random.default_rng(0), 0
    records = []
    for number, start in enumerate(range(0, rows, UNIT)):
        ids = [f"train/{row:09d}.jpg" for row in range(start, min(start + UNIT, rows))]
        codes = rng.integers(spec.codebook_sizes[0], size=(len(ids), spec.positions * spec.depth), dtype=np.int32)
        record = unit(store, mark, f"u{number:06d}", ids, codes, spec)
        write_commit(store, record)
        records.append(record)
        plain += plain_parquet(codes.astype(np.uint16))
    header = ManifestHeader(
        fingerprint_keys=MARK_KEYS,
        tokenizer=spec,
        geometry=Geometry(mode="squash", size=spec.view_size),
        codebooks=[np.zeros((size, 1), np.float32) for size in spec.codebook_sizes],
        source=SourceIdentity(kind="folder", location="nowhere"),
        source_errors=0,
        command=["benchmarks.shards"],
        versions={},
    )
    assemble_manifest(store, header, records)
    return plain


def unit(
    store: Store, mark: str, name: str, ids: list[str], codes_NL: npt.NDArray[np.int32], spec: TokenizerSpec
) -> CommitRecord:
    """Write one shard."""
    data = encode_shard(
        ShardData(
            image_ids=ids,
            sha256=[hashlib.sha256(one.encode()).hexdigest() for one in ids],
            widths=np.full(len(ids), 640),
            heights=np.full(len(ids), 480),
            view_boxes=np.tile(np.array([0, 0, 640, 480], np.float32), (len(ids), 1, 1)),
            locators=[Locator(one, 0, 100_000 + place) for place, one in enumerate(ids)],
            codes=codes_NL,
        ),
        fingerprint=mark,
        unit=name,
        code_dtype=code_dtype(spec.codebook_sizes),
    )
    digest = hashlib.sha256(data).hexdigest()
    path = shard_name(name, digest)
    store.write(path, data)
    by_depth = codes_NL.reshape(-1, spec.depth)
    usage = [np.bincount(by_depth[:, depth], minlength=size) for depth, size in enumerate(spec.codebook_sizes)]
    return CommitRecord(
        fingerprint=mark,
        unit=name,
        shard=ShardEntry(path=path, bytes=len(data), sha256=digest, unit=name, rows=len(ids)),
        members=MemberColumns.of(UnitMember(one, 100_000 + place, 10**18, place) for place, one in enumerate(ids)),
        rejects=[],
        usage=encode_usage(usage),
        views=len(ids),
        codes=codes_NL.size,
        numerics=Numerics(device="none", torch="none", dtype="float32", batch_size=1),
        seconds=0,
    )


def plain_parquet(codes_NL: npt.NDArray[np.uint16]) -> int:
    """Bytes of a Parquet file of these rows, with zstd and pyarrow's other defaults."""
    offsets = pa.array(np.arange(len(codes_NL) + 1) * codes_NL.shape[1], pa.int32())
    sink = pa.BufferOutputStream()
    lists = pa.ListArray.from_arrays(offsets, pa.array(codes_NL.reshape(-1)))
    pq.write_table(pa.table({"codes": lists}), sink, compression="zstd")
    return int(sink.getvalue().size)


def drain(tables: Iterable[pa.Table]) -> None:
    """Decode all of it."""
    for table in tables:
        if table.num_rows == 0:
            raise SystemExit("a shard of the benchmark is empty")


def seconds(call: Callable[[], object]) -> float:
    """What a call takes."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
