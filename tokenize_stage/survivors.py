"""The rows of a unit that is written again which need no encoder: their files are what they were."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy.typing as npt
import pyarrow as pa

from manifests.commits import RejectRow, read_commit
from manifests.schema import Numerics
from manifests.shard_reader import read_parquet
from manifests.shards import list_values
from manifests.storage import Store
from tokenize_stage.outcomes import Picture
from tokenize_stage.units import Unit, unchanged_rows

Copied = tuple[Picture, npt.NDArray[Any]] | RejectRow
"""What a member became in the last commit: a picture with its values (V, L), or a reject."""


@dataclass(frozen=True)
class Survivors:
    """`by_member` holds the members of a unit whose outcome is taken from the last commit, by their place in the unit.

    `numerics` of that commit: with what the values were computed, the newest first.
    """

    by_member: dict[int, Copied]
    numerics: list[Numerics]

    def numerics_with(self, own: Numerics | None) -> tuple[Numerics, list[Numerics]]:
        """What the unit's next record says of its values and of those copied, if others are computed with `own`."""
        has_values = any(not isinstance(row, RejectRow) for row in self.by_member.values())
        copied = self.numerics if has_values or own is None else []
        first, *others = dict.fromkeys(copied if own is None else [own, *copied])
        return first, others

    @classmethod
    def of(cls, store: Store, unit: Unit, column: str) -> Survivors:
        """What the last commit of `unit` still has to give; `column` is what the values are called in its shard.

        Damage to it is `VerificationFailed`.
        """
        record = read_commit(store, unit.name)
        unchanged = unchanged_rows(unit.members, record.members.table())
        places = {name: member for member, name in enumerate(unit.members["image_id"].to_pylist()) if unchanged[member]}
        copied: dict[int, Copied] = {
            places[reject.image_id]: reject
            for reject in record.rejects
            if reject.image_id in places and reject.reason not in unit.retry
        }
        if record.shard:
            path = record.shard.path
            table = read_parquet(pa.py_buffer(store.read(path)), store.where(path))
            copied |= {places[name]: row for name, row in _rows(table, column) if name in places}
        return cls(copied, [record.numerics, *record.copied_numerics])


def _rows(table: pa.Table, column: str) -> list[tuple[str, tuple[Picture, npt.NDArray[Any]]]]:
    """The rows of a shard by image id: what stays of the picture, and the values of its views, not copied."""
    values, value_offsets = list_values(table[column])
    boxes, box_offsets = list_values(table["view_boxes"])
    fields = table.select(["image_id", "sha256", "width", "height", "length"]).to_pydict().values()
    rows = []
    for row, (name, sha256, width, height, length) in enumerate(zip(*fields, strict=True)):
        boxes_V4 = boxes[box_offsets[row] : box_offsets[row + 1]].reshape(-1, 4)
        values_VL = values[value_offsets[row] : value_offsets[row + 1]].reshape(len(boxes_V4), -1)
        rows.append((name, (Picture(sha256, width, height, boxes_V4, length), values_VL)))
    return rows
