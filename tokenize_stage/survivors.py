"""The rows of a unit that is written again which need no encoder: their files are what they were."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from manifests.commits import CommitRecord, RejectRow, read_commit
from manifests.schema import Numerics
from manifests.shards import list_values, read_shard
from manifests.storage import Store
from tokenize_stage.outcomes import Picture
from tokenize_stage.units import Unit, unchanged_rows


@dataclass(frozen=True)
class Survivors:
    """`unchanged` marks the members of a unit whose outcome, code or reject, is taken from the last commit."""

    unchanged: npt.NDArray[np.bool_]
    record: CommitRecord
    shard: pa.Table | None

    @classmethod
    def of(cls, store: Store, unit: Unit) -> Survivors:
        """What the committed shard of `unit` still has to give. Damage to it is `VerificationFailed`."""
        record = read_commit(store, unit.name)
        unchanged = unchanged_rows(unit.members, pa.table(record.members.model_dump()))
        shard = read_shard(store.path(record.shard.path)) if record.shard else None
        return cls(unchanged, record, shard)

    @property
    def numerics(self) -> Numerics:
        return self.record.numerics

    def copy_into(
        self,
        members: pa.Table,
        codes_NL: npt.NDArray[Any],
        pictures: dict[int, Picture],
        rejects: dict[int, RejectRow],
        *,
        column: str,
    ) -> None:
        """Fill in the surviving members by their place in the unit; `column` is what the codes are called in a shard."""
        place = {name: row for row, name in enumerate(members["image_id"].to_pylist()) if self.unchanged[row]}
        source_rows = members["source_row"].to_numpy()
        for reject in self.record.rejects:
            if (row := place.get(reject.image_id)) is not None:
                rejects[row] = reject.model_copy(update={"source_row": int(source_rows[row])})
        if self.shard is None:
            return
        codes, _ = list_values(self.shard[column])
        boxes, _ = list_values(self.shard["view_boxes"])
        codes_ML, boxes_MV4 = codes.reshape(-1, codes_NL.shape[1]), boxes.reshape(self.shard.num_rows, -1, 4)
        columns = self.shard.select(["image_id", "sha256", "width", "height", "length"]).to_pydict()
        for old, (name, *fields) in enumerate(zip(*columns.values(), strict=True)):
            if (row := place.get(name)) is not None:
                codes_NL[row] = codes_ML[old]
                sha256, width, height, length = fields
                pictures[row] = Picture(sha256, width, height, boxes_MV4[old], length)
