"""Whole rows of a token set by image id, for looking at: boxes, locators and carried columns beside the codes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
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


def read_rows(opened: OpenManifest, image_ids: Sequence[str]) -> list[ShardRow]:
    """The rows of some images, in the order asked, with every column; only their row groups are decoded.

    Raises KeyError for an image that the index lacks, `VerificationFailed` for a damaged shard.
    """
    index = opened.index()
    places = pc.index_in(pa.array(image_ids, pa.string()), value_set=index["image_id"]).to_pylist()
    if None in places:
        raise KeyError(image_ids[places.index(None)])
    shards = index["shard"].to_numpy()[places]
    rows = index["row"].to_numpy()[places]
    found: dict[int, ShardRow] = {}
    for ordinal in np.unique(shards):
        mine = np.flatnonzero(shards == ordinal)
        table = _take(opened, opened.shards[ordinal], rows[mine])
        for at, position in enumerate(mine):
            values = pa.Table.from_batches(table.slice(at, 1).to_batches(), table.schema)
            found[int(position)] = ShardRow(opened.shards[ordinal], int(rows[position]), values)
    return [found[position] for position in range(len(image_ids))]


def _take(opened: OpenManifest, shard: ShardEntry, rows: np.ndarray) -> pa.Table:
    """Some rows of a shard, in the order asked."""
    with open_shard(opened.store, shard.path) as file:
        sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        starts = np.concatenate([[0], np.cumsum(sizes)])
        name = opened.store.where(shard.path)
        if rows.max() >= starts[-1]:
            raise damaged(name, ValueError(f"it has {starts[-1]} rows, the index names row {rows.max()}"))
        groups = np.searchsorted(starts, rows, side="right") - 1
        needed, ranks = np.unique(groups, return_inverse=True)
        try:
            table = file.read_row_groups(needed.tolist())
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
