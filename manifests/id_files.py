"""Lists of image ids in a file: text, JSON lines or Parquet."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from manifests.errors import InputError

_COLUMN = "image_id"


def read_ids(path: Path) -> pa.Array:
    """The image ids of a file, as an Arrow array of text.

    `.parquet`: its column `image_id`; `.jsonl`: a text, or an object with a text `image_id`, on each line; any other
    name: one id on each line, as it is. `InputError` says what is wrong with the file, and where.
    """
    if not path.is_file():
        raise InputError(f"the file of image ids {path} does not exist: correct --ids or --exclude-ids")
    try:
        if path.suffix == ".parquet":
            return _parquet_ids(path)
        lines = path.read_text(encoding="utf-8").split("\n")
    except (UnicodeDecodeError, pa.ArrowException, OSError) as error:
        raise InputError(f"the file of image ids {path} cannot be read ({str(error)[:200]}): write it again") from error
    names = [line.removesuffix("\r") for line in lines]
    if path.suffix == ".jsonl":
        names = [_named(path, number, line) for number, line in enumerate(names, 1) if line.strip()]
    return pa.array([name for name in names if name], pa.string())


def _parquet_ids(path: Path) -> pa.Array:
    with pq.ParquetFile(path) as file:
        if _COLUMN not in file.schema_arrow.names:
            raise InputError(
                f"{path} has no column {_COLUMN!r}, it has {', '.join(file.schema_arrow.names)[:200]}: "
                f"name the column of the ids {_COLUMN}"
            )
        column = file.read([_COLUMN])[_COLUMN]
    return pa.concat_arrays([pa.array([], pa.string()), *column.cast(pa.string()).chunks])


def _named(path: Path, number: int, line: str) -> str:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        value = None
    name = value.get("image_id") if isinstance(value, dict) else value
    if not isinstance(name, str):
        raise InputError(f"line {number} of {path} holds no image_id: write a text or an object with a text image_id")
    return name
