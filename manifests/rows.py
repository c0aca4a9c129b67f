"""Whole rows of a token set by image id, for looking at: boxes, locators and carried columns beside the codes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from manifests.images import ImageSource
from manifests.reader import OpenManifest
from manifests.schema import ShardEntry, SourceIdentity
from manifests.shard_reader import UNREADABLE, damaged, open_shard


@dataclass(frozen=True)
class ShardRow:
    """Where a row stands, and all that its shard says of the image: a table of one row."""

    shard: ShardEntry
    row: int
    values: pa.Table


class Place(NamedTuple):
    """Where the row of an image stands: `shard` is a place in the list of the set's shards, `row` a row of that shard."""

    shard: int
    row: int


def find_places(opened: OpenManifest, image_ids: Sequence[str]) -> list[Place]:
    """Where the rows of some images stand, in the order asked, from one pass over the index.

    Raises KeyError for an image that the index lacks.
    """
    wanted = pa.array(dict.fromkeys(image_ids), pa.string())
    found: dict[str, Place] = {}
    for batch in opened.iter_index(["image_id", "shard", "row"]):
        for row in batch.filter(pc.is_in(batch["image_id"], value_set=wanted)).to_pylist():
            found.setdefault(row["image_id"], Place(row["shard"], row["row"]))
        if len(found) == len(wanted):
            break
    return [found[name] for name in image_ids]


def read_rows(opened: OpenManifest, places: Sequence[Place]) -> list[ShardRow]:
    """The rows at some places, in the order asked, with every column; only their row groups are decoded.

    `VerificationFailed` for a damaged shard.
    """
    shards = np.asarray([place.shard for place in places], np.int64)
    rows = np.asarray([place.row for place in places], np.int64)
    found: dict[int, ShardRow] = {}
    for ordinal in np.unique(shards):
        mine = np.flatnonzero(shards == ordinal)
        table = take_rows(opened, opened.shards[ordinal], rows[mine])
        for at, position in enumerate(mine):
            values = pa.Table.from_batches(table.slice(at, 1).to_batches(), table.schema)
            found[int(position)] = ShardRow(opened.shards[ordinal], int(rows[position]), values)
    return [found[position] for position in range(len(places))]


def take_rows(
    opened: OpenManifest, shard: ShardEntry, rows: npt.NDArray[np.integer[Any]], columns: Sequence[str] | None = None
) -> pa.Table:
    """Some rows of a shard, in the order asked: all columns, or some. `VerificationFailed` for a damaged shard."""
    with open_shard(opened.store, shard.path) as file:
        sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        starts = np.concatenate([[0], np.cumsum(sizes)])
        name = opened.store.where(shard.path)
        if rows.max() >= starts[-1]:
            raise damaged(name, ValueError(f"it has {starts[-1]} rows, the index names row {rows.max()}"))
        if absent := set(columns or ()) - set(file.schema_arrow.names):
            raise damaged(name, ValueError(f"it lacks the columns {sorted(absent)}"))
        groups = np.searchsorted(starts, rows, side="right") - 1
        needed, ranks = np.unique(groups, return_inverse=True)
        try:
            table = file.read_row_groups(needed.tolist(), columns=None if columns is None else list(columns))
        except UNREADABLE as error:
            raise opened.store.fault(shard.path, error) or damaged(name, error) from error
    bases = np.concatenate([[0], np.cumsum(np.asarray(sizes)[needed])])
    return table.take(pa.array(bases[ranks] + rows - starts[groups]))


def source_of(source: SourceIdentity, unit: str) -> ImageSource:
    """Where the locators of a unit lead; of merged and filtered sets, where those of the set lead that it came from."""
    if source.kind == "merge":
        number, _, rest = unit.partition(".")
        return source_of(SourceIdentity.model_validate(source.settings["sources"][int(number)]), rest)
    if source.kind == "filter":
        return source_of(SourceIdentity.model_validate(source.settings["source"]), unit)
    column = source.settings.get("image_column")
    return ImageSource(str(source.settings.get("image_root") or source.location), str(column) if column else None)
