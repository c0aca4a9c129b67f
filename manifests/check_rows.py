"""Everything that can be wrong with the rows of a shard, which come some at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from manifests.schema import FeaturesSpec, Kind, Producer
from manifests.shards import list_values, value_column

IDENTITY_COLUMNS = ["image_id", "sha256", "width", "height"]

Places = npt.NDArray[np.int64]


@dataclass
class _Bad:
    """Rows with one thing wrong: how many, and the id of the first."""

    rows: int = 0
    first: str = ""

    def add(self, rows: Places, names: pa.ChunkedArray) -> None:
        if len(rows) and not self.rows:
            self.first = names[int(rows[0])].as_py()
        self.rows += len(rows)

    def __str__(self) -> str:
        return f"{self.rows} rows, first {self.first!r},"


class RowCheck:
    """Counts what the rows of a shard hold, and collects what is wrong with them.

    `identities` has the `IDENTITY_COLUMNS` of all rows; `histograms` how often each code occurs, D arrays (K_d,).
    """

    def __init__(self, spec: Producer, kind: Kind) -> None:
        self._spec, self._kind = spec, kind
        self._identities: list[pa.Table] = []
        self._lengths, self._values = _Bad(), _Bad()
        self._boxes_finite = True
        self._aligned = True  # every row has all depths of its positions
        self.histograms = [np.zeros(size, np.int64) for size in spec.codebook_sizes]
        self.views = self.codes = 0

    @property
    def columns(self) -> list[str]:
        """What `add` needs."""
        return [*IDENTITY_COLUMNS, "view_boxes", self._kind]

    @property
    def identities(self) -> pa.Table:
        """Of the rows so far."""
        return pa.concat_tables(self._identities)

    def add(self, table: pa.Table) -> None:
        """The next rows."""
        spec = self._spec
        self._identities.append(table.select(IDENTITY_COLUMNS).replace_schema_metadata(None))
        names = table["image_id"]
        values, offsets = list_values(table[self._kind])
        boxes, box_offsets = list_values(table["view_boxes"])
        lengths, box_lengths = np.diff(offsets), np.diff(box_offsets)
        self.views += int(box_lengths.sum()) // 4
        self._lengths.add(np.flatnonzero((lengths == 0) | (lengths * 4 != box_lengths * self._per_view)), names)
        self._boxes_finite = self._boxes_finite and bool(np.isfinite(boxes).all())
        if isinstance(spec, FeaturesSpec):
            finite = value_column(spec).finite(values)
            if not finite.all():
                self._values.add(_rows_of(np.flatnonzero(~finite), offsets), names)
            return
        self.codes += int(lengths.sum())
        self._aligned = self._aligned and not (lengths % spec.depth).any()
        if self._aligned:
            self._count(values.reshape(-1, spec.depth), offsets, names)

    def problems(self) -> Iterator[tuple[str, str]]:
        """Code and message of each, once all rows were added."""
        if self._lengths.rows:
            yield "row_length", f"{self._lengths} do not have {self._per_view} {self._kind} for each view"
        if not self._boxes_finite:
            yield "row_length", "some view_boxes are not finite"
        if not self._aligned:
            self.histograms = []  # depths cannot be told apart, and nothing can be said of codes
        elif self._values.rows and self._kind == "features":
            yield "not_finite", f"{self._values} have features that are NaN or infinite"
        elif self._values.rows:
            yield "code_range", f"{self._values} have codes beyond their codebook"

    @property
    def _per_view(self) -> int:
        return self._spec.positions * self._spec.values

    def _count(self, codes_ND: npt.NDArray[Any], offsets: Places, names: pa.ChunkedArray) -> None:
        sizes = np.asarray(self._spec.codebook_sizes)
        if len(codes_ND) and (codes_ND.max(axis=0) >= sizes).any():
            outside = (codes_ND >= sizes).any(axis=1)
            self._values.add(_rows_of(np.flatnonzero(outside) * len(sizes), offsets), names)
            codes_ND = codes_ND[~outside]
        for depth, counts in enumerate(self.histograms):
            counts += np.bincount(codes_ND[:, depth], minlength=len(counts))


def _rows_of(places: Places, offsets: Places) -> Places:
    """The rows that have a value at some places."""
    return np.unique(np.searchsorted(offsets, places, side="right") - 1)
