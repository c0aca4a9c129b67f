"""What is remembered of a committed unit: its members, decided once, and what became of each."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Literal

import pyarrow as pa
from pydantic import Field, model_validator

from manifests.schema import Frozen, Numerics, Sha256, ShardEntry

UnitName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]*$", max_length=128)]


_MEMBER_SCHEMA = pa.schema(
    [("image_id", pa.string()), ("size", pa.int64()), ("mtime_ns", pa.int64()), ("source_row", pa.int64())]
)


COMMITS = "commits/"
RECORD_SUFFIX = ".json.zst"


@dataclass(frozen=True)
class UnitMember:
    """One image of a unit as the inventory knew it: its identity (size, mtime) and the source row that names it."""

    image_id: str
    size: int
    mtime_ns: int
    source_row: int


class MemberColumns(Frozen):
    """The members of a unit as columns of equal length, in source order."""

    image_id: list[str]
    size: list[int]
    mtime_ns: list[int]
    source_row: list[int]

    @classmethod
    def of(cls, members: Iterable[UnitMember]) -> MemberColumns:
        """The columns of some members."""
        rows = list(members)
        return cls(
            image_id=[row.image_id for row in rows],
            size=[row.size for row in rows],
            mtime_ns=[row.mtime_ns for row in rows],
            source_row=[row.source_row for row in rows],
        )

    @classmethod
    def of_table(cls, table: pa.Table) -> MemberColumns:
        """The members in the columns of the same names of an Arrow table."""
        return cls(**{name: table[name].to_pylist() for name in _MEMBER_SCHEMA.names})

    def table(self) -> pa.Table:
        """The members as an Arrow table: image_id string; size, mtime_ns, source_row int64."""
        return pa.table({name: getattr(self, name) for name in _MEMBER_SCHEMA.names}, schema=_MEMBER_SCHEMA)

    def rows(self) -> list[UnitMember]:
        """The members one by one."""
        return [UnitMember(*row) for row in zip(self.image_id, self.size, self.mtime_ns, self.source_row, strict=True)]

    def __len__(self) -> int:
        return len(self.image_id)

    @model_validator(mode="after")
    def _same_length(self) -> MemberColumns:
        if len({len(self.image_id), len(self.size), len(self.mtime_ns), len(self.source_row)}) > 1:
            raise ValueError("the member columns differ in length")
        if len(set(self.image_id)) != len(self.image_id):
            raise ValueError("an image_id occurs twice among the members")
        return self


class RejectRow(Frozen):
    """A member that could not be tokenized, and why."""

    image_id: str
    reason: str
    message: str
    source_row: int


class CommitRecord(Frozen):
    """A committed unit: its members, decided once, and what became of each; `ok + rejected == members`."""

    schema_version: Literal[1] = 1
    fingerprint: Sha256
    unit: UnitName
    shard: ShardEntry | None = Field(description="None when every member was rejected")
    members: MemberColumns
    rejects: list[RejectRow] = Field(description="in the order of the members")
    usage: str = Field(description="how often each code occurs, see `manifests.usage.encode_usage`; empty for features")
    views: int = Field(ge=0)
    codes: int = Field(ge=0)
    numerics: Numerics
    copied_numerics: list[Numerics] = Field(
        default=[], description="those of rows that were taken from earlier commits of the unit, where they differ"
    )
    seconds: float = Field(ge=0)

    @model_validator(mode="after")
    def _every_member_once(self) -> CommitRecord:
        rejected = {row.image_id for row in self.rejects}
        rows = self.shard.rows if self.shard else 0
        if len(rejected) != len(self.rejects) or not rejected <= set(self.members.image_id):
            raise ValueError("a reject is not a member, or is named twice")
        if rows + len(self.rejects) != len(self.members):
            raise ValueError(f"{rows} rows + {len(self.rejects)} rejects are not {len(self.members)} members")
        if self.shard and self.shard.unit != self.unit:
            raise ValueError(f"the shard is of unit {self.shard.unit}, not {self.unit}")
        return self


def commit_path(unit: str) -> str:
    """The path of a unit's record below the output folder."""
    return f"{COMMITS}{unit}{RECORD_SUFFIX}"


def unit_order(unit: str) -> tuple[int, str]:
    """Sort key of units: `u1000000` comes after `u999999`."""
    return len(unit), unit
