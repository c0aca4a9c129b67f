"""Tars and Parquet files made for a test, and a place to put them: a folder, or an object store."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard
from made_jobs import picture

from manifests.storage import Store


@dataclass(frozen=True)
class Place:
    """A folder for sources, on a disk or not."""

    location: str

    @property
    def store(self) -> Store:
        return Store.open(self.location)

    def put(self, name: str, data: bytes) -> str:
        self.store.write(name, data)
        return f"{self.location}/{name}"


def sample(number: int) -> dict[str, bytes]:
    """The members of one sample: a picture and what is said of it."""
    suffix = ".jpg" if number % 2 else ".png"
    return {f"{number:06d}{suffix}": picture(number, suffix), f"{number:06d}.txt": f"caption {number}".encode()}


def samples(count: int, first: int = 0) -> dict[str, bytes]:
    return {name: data for number in range(first, first + count) for name, data in sample(number).items()}


def tar_of(members: dict[str, bytes] | Iterable[tuple[str, bytes]], form: int = tarfile.GNU_FORMAT) -> bytes:
    """The bytes of a tar, as Python's own writer makes it."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=form) as tar:
        for name, data in members.items() if isinstance(members, dict) else members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def zst(data: bytes) -> bytes:
    return zstandard.compress(data)


def parquet_of(columns: dict[str, Any] | pa.Table, rows: int = 3, **options: Any) -> bytes:
    """The bytes of a Parquet file with row groups of `rows`."""
    stream = io.BytesIO()
    table = columns if isinstance(columns, pa.Table) else pa.table(columns)
    pq.write_table(table, stream, row_group_size=rows, **options)
    return stream.getvalue()


def hf_images(pictures: list[bytes | None], paths: list[str | None] | None = None) -> pa.Array:
    """A column as Hugging Face writes images."""
    cells = [
        {"bytes": data, "path": path} for data, path in zip(pictures, paths or [None] * len(pictures), strict=True)
    ]
    return pa.array(cells, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))


def write_arrow(path: Path, table: pa.Table, batch: int = 2) -> None:
    """An Arrow stream, as `save_to_disk` writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=batch)
