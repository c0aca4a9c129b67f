"""The outcomes of a unit's members while they come in, and the shard and the record that they become."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from manifests.anyres import most_views
from manifests.commits import RejectRow
from manifests.errors import StorageError
from manifests.images import DamagedCells, UnitReader
from manifests.rejects import Reject, RejectReason
from manifests.schema import Producer, ShardEntry
from manifests.shards import ShardData, encode_shard, shard_name, value_column
from manifests.storage import Store
from tokenize_stage.decoding import SourceFailedError
from tokenize_stage.order import WorkOrder
from tokenize_stage.outcomes import Picture
from tokenize_stage.retry import with_retries
from tokenize_stage.units import Unit

_AT_ONCE = 256
"""Views whose codes are counted at once: counting widens them to 8 bytes each."""


class UnitRows:
    """What is known of the members of a unit so far.

    `values_NL` holds the codes or features of a view (L = positions x values, as stored) at the view's place in the
    unit's stream (see `tokenize_stage.batches`); N is the most that the stream can have, and what is never written
    takes no memory.
    """

    def __init__(self, unit: Unit, order: WorkOrder) -> None:
        self.unit = unit
        self.pictures: dict[int, Picture] = {}
        self.rejects: dict[int, RejectRow] = {}
        self._order = order
        self._ids: list[str] = unit.members["image_id"].to_pylist()
        self._source_rows: list[int] = unit.members["source_row"].to_pylist()
        self._places: dict[int, int] = {}
        self._end = 0
        self._told = 0, 0
        spec, views = order.spec, len(self._ids) * most_views(order.geometry)
        self.values_NL = np.zeros((views, spec.positions * spec.values), value_column(spec).dtype)

    def add(self, member: int, outcome: Picture | Reject) -> int:
        """Take the outcome of the next member that was tried and give it its place; the slots it has in the stream."""
        if isinstance(outcome, Reject):
            self._reject(member, outcome)
            return self._take(1)
        self.pictures[member] = outcome
        self._places[member] = self._end
        return self._take(len(outcome.boxes_V4))

    def add_copied(self, member: int, copied: tuple[Picture, npt.NDArray[Any]] | RejectRow) -> int:
        """The same for a member whose outcome is that of an earlier commit: its picture and values (V, L), or reject."""
        if isinstance(copied, RejectRow):
            self.rejects[member] = copied.model_copy(update={"source_row": self._source_rows[member]})
            return self._take(1)
        picture, values_VL = copied
        slots = self.add(member, picture)
        self.values_NL[self._end - slots : self._end] = values_VL
        return slots

    def _reject(self, member: int, why: Reject) -> None:
        self.rejects[member] = RejectRow(
            image_id=self._ids[member],
            reason=why.reason.value,
            message=why.message,
            source_row=self._source_rows[member],
        )

    def _take(self, slots: int) -> int:
        self._end += slots
        return slots

    def news(self) -> tuple[int, int]:
        """Members with an outcome and rejects, since this was last asked."""
        (images, rejects), self._told = self._told, (len(self.pictures) + len(self.rejects), len(self.rejects))
        return self._told[0] - images, self._told[1] - rejects

    @property
    def views(self) -> int:
        """Views of all pictures."""
        return sum(len(picture.boxes_V4) for picture in self.pictures.values())

    def reject_rows(self) -> list[RejectRow]:
        """The rejects in the order of the members."""
        return [self.rejects[member] for member in sorted(self.rejects)]

    def histograms(self) -> list[npt.NDArray[np.int64]]:
        """How often each code occurs, D arrays (K_d,); none for features."""
        return _histograms(self.values_NL[: self._end], self._are_views(), self._order.spec)

    def write_shard(self, store: Store, reader: UnitReader) -> ShardEntry | None:
        """Write the rows; None when there are none. Raises `StorageError`, or `SourceFailedError` for carried columns.

        A picture of which that is damaged becomes a reject here.
        """
        order, name = self._order, self.unit.name
        carried = self._carried(reader)
        rows = sorted(self.pictures)
        if not rows:
            return None
        pictures = [self.pictures[row] for row in rows]
        data = encode_shard(
            ShardData(
                image_ids=[self._ids[row] for row in rows],
                sha256=[picture.sha256 for picture in pictures],
                widths=[picture.width for picture in pictures],
                heights=[picture.height for picture in pictures],
                view_boxes=[picture.boxes_V4 for picture in pictures],
                locators=[reader.locator(row, self.pictures[row].length) for row in rows],
                codes=self._values(rows),
                extra=carried,
            ),
            fingerprint=order.fingerprint,
            unit=name,
            code_dtype=self.values_NL.dtype,
            feature_dtype=value_column(order.spec).features,
        )
        sha256 = hashlib.sha256(data).hexdigest()
        path = shard_name(name, sha256)
        store.write(path, data)
        return ShardEntry(path=path, bytes=len(data), sha256=sha256, unit=name, rows=len(rows))

    def _carried(self, reader: UnitReader) -> pa.Table | None:
        what = f"reading what the shard of unit {self.unit.name} carries along from {self._order.images.root}"
        try:
            return with_retries(lambda: reader.carried(sorted(self.pictures)), what)
        except StorageError as error:
            raise SourceFailedError(str(error)) from error
        except DamagedCells as damage:
            for member, message in damage.messages.items():
                del self.pictures[member], self._places[member]
                self._reject(member, Reject(RejectReason.UNREADABLE, message))
            return self._carried(reader)

    def _values(self, rows: list[int]) -> npt.NDArray[Any] | list[npt.NDArray[Any]]:
        if self._end == len(rows):  # one view an image and no reject: nothing to pick
            return self.values_NL[: self._end]
        return [self.values_NL[self._slots(row)] for row in rows]

    def _slots(self, row: int) -> slice:
        return slice(self._places[row], self._places[row] + len(self.pictures[row].boxes_V4))

    def _are_views(self) -> npt.NDArray[np.bool_]:
        marks = np.zeros(self._end, bool)
        for row in self._places:
            marks[self._slots(row)] = True
        return marks


def _histograms(
    codes_NL: npt.NDArray[Any], are_views_N: npt.NDArray[np.bool_], spec: Producer
) -> list[npt.NDArray[np.int64]]:
    counts = [np.zeros(size, np.int64) for size in spec.codebook_sizes]
    for start in range(0, len(codes_NL), _AT_ONCE):
        chunk = slice(start, start + _AT_ONCE)
        by_depth = codes_NL[chunk][are_views_N[chunk]].reshape(-1, spec.values)
        for depth, count in enumerate(counts):
            count += np.bincount(by_depth[:, depth], minlength=len(count))
    return counts
