"""Units: which images are tokenized and committed together, decided by a set difference and nothing else.

A pure function of the inventory and of what is committed. Membership is decided once and stays in the unit's commit
record: new images form new units; a changed, removed or retried image makes its unit be rewritten, and the other rows
of that unit are copied. What a killed run had not committed is sliced again into the same units, because those take the
lowest free numbers in source order.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, overload

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from manifests.id_index import IdIndex
from tokenize_stage.table_rows import numbers, take_rows

EXAMPLES = 3
"""Ids that a plan names of each kind of work."""


@dataclass(frozen=True)
class Unit:
    """A slice of the source. `members` has the columns of an inventory, in the order of the shard's rows.

    `rewrites` says that the unit is committed already and its unchanged rows are to be copied; but rejects of a reason
    in `retry` are read again.
    """

    name: str
    members: pa.Table
    rewrites: bool = False
    retry: frozenset[str] = frozenset()

    def __reduce__(self) -> tuple[Any, ...]:
        # Arrow pickles the whole table that a slice was cut from; its stream format holds the slice alone.
        members = _with_own_files(self.members)
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, members.schema) as stream:
            stream.write_table(members)
        return _unpickle, (self.name, sink.getvalue().to_pybytes(), self.rewrites, self.retry)


def _with_own_files(members: pa.Table) -> pa.Table:
    """The same rows, with the names of their own containers only: a slice keeps those of the whole inventory."""
    at = members.schema.get_field_index("file")
    if at < 0:
        return members
    return members.set_column(at, members.schema.field(at), members.column(at).cast(pa.string()).dictionary_encode())


def _unpickle(name: str, members: bytes, rewrites: bool, retry: frozenset[str]) -> Unit:
    return Unit(name, pa.ipc.open_stream(members).read_all(), rewrites, retry)


class Committed(NamedTuple):
    """A committed unit as the plan sees it: `members` with image_id, size and mtime_ns; `again` are ids to be retried.

    `files` has image_id and file of the rows of its shard, where the ids of the source do not say in which file they are.
    """

    name: str
    members: pa.Table
    again: frozenset[str] = frozenset()
    files: pa.Table | None = None


class PlannedUnits(Sequence[Unit]):
    """Units whose members are cut out of the inventory when they are asked for, so that a plan stays small."""

    def __init__(self, inventory: pa.Table, cuts: Sequence[Cut], retry: frozenset[str] = frozenset()) -> None:
        self.inventory, self.cuts, self.retry = inventory, cuts, retry

    def __len__(self) -> int:
        return len(self.cuts)

    @overload
    def __getitem__(self, at: int) -> Unit: ...
    @overload
    def __getitem__(self, at: slice) -> PlannedUnits: ...
    def __getitem__(self, at: int | slice) -> Unit | PlannedUnits:
        if isinstance(at, slice):
            return PlannedUnits(self.inventory, self.cuts[at], self.retry)
        cut = self.cuts[at]
        retry = self.retry if cut.rewrites else frozenset()
        return Unit(cut.name, take_rows(self.inventory, cut.rows), cut.rewrites, retry)

    @property
    def images(self) -> int:
        """Members of all units."""
        return sum(len(cut.rows) for cut in self.cuts)


class Cut(NamedTuple):
    """A unit before it is cut: the rows of the inventory that are its members, in order."""

    name: str
    rows: npt.NDArray[np.int64]
    rewrites: bool


@dataclass
class Changes:
    """How many images there are of a kind, and the first few of them."""

    count: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, ids: pa.ChunkedArray, rows: npt.NDArray[np.int64]) -> None:
        """The ids at `rows` are of this kind."""
        self.count += len(rows)
        self.examples += [ids[int(row)].as_py() for row in rows[: EXAMPLES - len(self.examples)]]


@dataclass(frozen=True)
class Plan:
    """What a job has to do. `emptied` units lost all their members: their commit records go.

    `encode` is how many images the encoder will see if all can be read: `new`, `changed` and `retried` ones. Those that
    `moved` to another file are copied.
    """

    units: PlannedUnits
    emptied: list[str]
    new: Changes
    changed: Changes
    removed: Changes
    retried: Changes
    moved: Changes
    unchanged: int

    @property
    def encode(self) -> int:
        return self.new.count + self.changed.count + self.retried.count

    def sample(self, images: int) -> PlannedUnits:
        """As few whole units as have about `images` images, spread evenly over the plan; at least one, at most all.

        Units stay what they are, so a later run takes them over and makes the rest as if this one had not been.
        """
        cuts = self.units.cuts
        wanted = min(len(cuts), -(-images * len(cuts) // max(self.units.images, 1)))
        chosen = [cuts[number * len(cuts) // wanted] for number in range(wanted)]
        return PlannedUnits(self.units.inventory, chosen, self.units.retry)


def unit_name(number: int) -> str:
    return f"u{number:06d}"


def plan_units(
    inventory: pa.Table, committed: Iterable[Committed], unit_size: int, retry: frozenset[str] = frozenset()
) -> Plan:
    """Compare the inventory with the committed units, which are looked at one by one and not kept.

    Rewritten units come first, then the new ones in source order. `retry`: the reasons for which `Committed.again` was
    filled, handed on to the workers.
    """
    ids = inventory["image_id"]
    index = IdIndex(ids)
    size, mtime_ns = numbers(inventory["size"]), numbers(inventory["mtime_ns"])
    is_new = np.ones(inventory.num_rows, bool)
    new, changed, removed, retried, moved = Changes(), Changes(), Changes(), Changes(), Changes()
    cuts: list[Cut] = []
    emptied: list[str] = []
    taken: set[str] = set()
    unchanged = 0
    for unit in committed:
        known = unit.members
        now = index.find(known["image_id"])
        gone = now < 0
        other = _differs(size, now, known["size"]) | _differs(mtime_ns, now, known["mtime_ns"])
        again = np.zeros(len(now), bool)
        if unit.again:
            again = ~gone & ~other & [name in unit.again for name in known["image_id"].to_pylist()]
        elsewhere = np.zeros(len(now), bool)
        if unit.files is not None:
            names = unit.files["image_id"].filter(pa.array(_in_other_files(inventory, index, unit.files)))
            elsewhere[IdIndex(known["image_id"]).find(names)] = True
            elsewhere &= ~other & ~again
        is_new[now[~gone]] = False
        removed.add(known["image_id"], np.flatnonzero(gone))
        changed.add(known["image_id"], np.flatnonzero(other))
        retried.add(known["image_id"], np.flatnonzero(again))
        moved.add(known["image_id"], np.flatnonzero(elsewhere))
        unchanged += int((~gone & ~other & ~again & ~elsewhere).sum())
        remaining = now[~gone]
        if len(remaining):
            taken.add(unit.name)
            if len(remaining) < len(now) or (other | again | elsewhere).any():
                cuts.append(Cut(unit.name, remaining, rewrites=True))
        else:
            emptied.append(unit.name)

    new_rows = np.flatnonzero(is_new)
    new.add(ids, new_rows)
    free = _free_names(taken)
    cuts += [
        Cut(next(free), new_rows[start : start + unit_size], rewrites=False)
        for start in range(0, len(new_rows), unit_size)
    ]
    return Plan(PlannedUnits(inventory, cuts, retry), emptied, new, changed, removed, retried, moved, unchanged)


def same_images(inventory: pa.Table, known: Iterable[pa.Table]) -> bool:
    """Whether the tables of `known` (image_id, size, mtime_ns) hold exactly the inventory's images, all unchanged.

    No image may stand in them twice.
    """
    index = IdIndex(inventory["image_id"])
    size, mtime_ns = numbers(inventory["size"]), numbers(inventory["mtime_ns"])
    rows = 0
    for table in known:
        rows += table.num_rows
        now = index.find(table["image_id"])
        if (now < 0).any():
            return False
        if _differs(size, now, table["size"]).any() or _differs(mtime_ns, now, table["mtime_ns"]).any():
            return False
    return rows == inventory.num_rows


def same_files(inventory: pa.Table, shards: Iterable[pa.Table]) -> bool:
    """Whether the rows of shards (image_id, file) are where they were, as far as the inventory has them."""
    index = IdIndex(inventory["image_id"])
    return not any(_in_other_files(inventory, index, table).any() for table in shards)


def unchanged_rows(members: pa.Table, previous: pa.Table) -> npt.NDArray[np.bool_]:
    """Which `members` of a rewritten unit stood in its `previous` members with the same size and mtime."""
    before = IdIndex(previous["image_id"]).find(members["image_id"])
    same = before >= 0
    for column in ("size", "mtime_ns"):
        same &= ~_differs(numbers(previous[column]), before, members[column])
    return same


def _differs(values: npt.NDArray[np.int64], at: npt.NDArray[np.int64], known: pa.ChunkedArray) -> npt.NDArray[np.bool_]:
    """Whether `values[at]` are other numbers than `known`; where `at` is -1 they are not."""
    here = at >= 0
    other = np.zeros(len(at), bool)
    other[here] = values[at[here]] != numbers(known)[here]
    return other


def _in_other_files(inventory: pa.Table, index: IdIndex, files: pa.Table) -> npt.NDArray[np.bool_]:
    """Which rows of `files` (image_id, file) the inventory has in another file."""
    now = index.find(files["image_id"])
    here = now >= 0
    other = np.zeros(len(now), bool)
    real = take_rows(inventory.select(["file"]), now[here])["file"].cast(pa.string())
    same = pc.equal(real, files["file"].filter(pa.array(here)))
    other[here] = ~np.asarray(same.to_pylist(), bool)
    return other


def _free_names(taken: set[str]) -> Iterator[str]:
    return (name for number in itertools.count() if (name := unit_name(number)) not in taken)
