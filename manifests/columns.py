"""The one column in which shards of different kinds differ: integer codes, or the numbers of features.

numpy and Arrow have no bfloat16, so those features stand in the files as their 16 bits, a uint16, and the file's
metadata says so (`asvr.dtype`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from manifests.schema import FeatureDtype, FeaturesSpec, Kind, Producer

ROW_GROUP_ROWS = 128
ROW_GROUP_BYTES = 4 << 20
"""Rows of features are long (1.7 MB for 729 positions x 1,152 in bfloat16): one row must not cost the reading of 128."""

_STORED: dict[FeatureDtype, type[np.generic]] = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}
_EXPONENT = np.uint16(0x7F80)


@dataclass(frozen=True)
class ValueColumn:
    """The column called `kind`: one flat list a row, of `dtype` as stored; `features` is None for codes."""

    kind: Kind
    dtype: np.dtype[Any]
    features: FeatureDtype | None = None

    @property
    def leaf(self) -> str:
        """The Parquet path of the list's values: options asked for by the name of the column silently do nothing."""
        return f"{self.kind}.list.element"

    @property
    def field(self) -> pa.Field:
        """The Arrow field."""
        item = pa.field("element", pa.from_numpy_dtype(self.dtype), nullable=False)
        return pa.field(self.kind, pa.list_(item), nullable=False)

    @property
    def marks(self) -> dict[str, str]:
        """What the metadata of a file says of the column."""
        return {"asvr.kind": self.kind} | ({"asvr.dtype": self.features} if self.features else {})

    def group_rows(self, values_in_row: int) -> int:
        """Rows of a row group."""
        if self.features is None:
            return ROW_GROUP_ROWS
        return max(1, min(ROW_GROUP_ROWS, ROW_GROUP_BYTES // max(1, values_in_row * self.dtype.itemsize)))

    def finite(self, stored: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
        """Which stored values are numbers, neither NaN nor infinite; codes always are."""
        if self.features == "bfloat16":
            return (stored & _EXPONENT) != _EXPONENT
        return np.isfinite(stored)

    def widened(self, stored: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """A copy that numpy can calculate with: bfloat16 bits as the float32 of the same value, others as they are."""
        if self.features == "bfloat16":
            return (stored.astype(np.uint32) << 16).view(np.float32)
        return stored.copy()


def code_dtype(codebook_sizes: Sequence[int]) -> np.dtype[Any]:
    """uint16 while every code fits, uint32 above 65,536 codes."""
    return np.dtype(np.uint16 if max(codebook_sizes) <= 1 << 16 else np.uint32)


def code_column(dtype: np.dtype[Any] | type[np.unsignedinteger[Any]]) -> ValueColumn:
    """The column of a shard of codes."""
    return ValueColumn("codes", np.dtype(dtype))


def feature_column(dtype: FeatureDtype) -> ValueColumn:
    """The column of a shard of features."""
    if dtype not in get_args(FeatureDtype):
        raise ValueError(f"features are one of {', '.join(get_args(FeatureDtype))}, not {dtype}")
    return ValueColumn("features", np.dtype(_STORED[dtype]), dtype)


def value_column(spec: Producer) -> ValueColumn:
    """The column of the shards that `spec` makes."""
    return (
        feature_column(spec.dtype) if isinstance(spec, FeaturesSpec) else code_column(code_dtype(spec.codebook_sizes))
    )
