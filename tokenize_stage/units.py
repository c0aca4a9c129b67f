"""Units: which images are tokenized and committed together, decided by a set difference and nothing else.

A pure function of the inventory and of what is committed. Membership is decided once and stays in the unit's commit
record: new images form new units; a changed or removed image makes its unit be rewritten, and the other rows of
that unit are copied. What a killed run had not committed is sliced again into the same units, because those take the
lowest free numbers in source order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from tokenize_stage.sources.inventory import INVENTORY_SCHEMA


@dataclass(frozen=True)
class Unit:
    """A slice of the source. `members` has the columns of an inventory, in the order of the shard's rows.

    `rewrites` says that the unit is committed already and its unchanged rows are to be copied.
    """

    name: str
    members: pa.Table
    rewrites: bool = False

    def __reduce__(self) -> tuple[Any, ...]:
        # Arrow pickles the whole table that a slice was cut from; its stream format holds the slice alone.
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, self.members.schema) as stream:
            stream.write_table(self.members)
        return _unpickle, (self.name, sink.getvalue().to_pybytes(), self.rewrites)


def _unpickle(name: str, members: bytes, rewrites: bool) -> Unit:
    return Unit(name, pa.ipc.open_stream(members).read_all(), rewrites)


@dataclass(frozen=True)
class Plan:
    """What a job has to do. `emptied` units lost all their members: their commit records go."""

    units: list[Unit]
    emptied: list[str] = field(default_factory=list)
    added: int = 0
    changed: int = 0
    removed: int = 0
    unchanged: int = 0


def unit_name(number: int) -> str:
    return f"u{number:06d}"


def plan_units(inventory: pa.Table, committed: Sequence[tuple[str, pa.Table]], unit_size: int) -> Plan:
    """Compare the inventory with the committed units, given as (name, members with the inventory's columns).

    `rewrites` come first, then the new units in source order.
    """
    names = [name for name, _ in committed]
    known = pa.concat_tables([members for _, members in committed]) if committed else INVENTORY_SCHEMA.empty_table()
    sizes = [members.num_rows for _, members in committed]
    starts = np.cumsum([0, *sizes])
    unit_of = np.repeat(np.arange(len(committed)), sizes)

    now = _positions(known["image_id"], inventory["image_id"])  # where each committed image is in the inventory
    removed = now < 0
    changed = ~removed & ~_same_file(known, inventory, now)
    touched = np.unique(unit_of[removed | changed])

    units: list[Unit] = []
    emptied: list[str] = []
    for unit in touched:
        rows = slice(starts[unit], starts[unit + 1])
        remaining = now[rows][~removed[rows]]
        if len(remaining):
            units.append(Unit(names[unit], inventory.take(remaining), rewrites=True))
        else:
            emptied.append(names[unit])

    is_new = np.ones(inventory.num_rows, bool)
    is_new[now[~removed]] = False
    added = inventory.filter(pa.array(is_new))
    free = _free_names(set(names) - set(emptied))
    units += [Unit(next(free), added.slice(start, unit_size)) for start in range(0, added.num_rows, unit_size)]
    return Plan(
        units=units,
        emptied=emptied,
        added=added.num_rows,
        changed=int(changed.sum()),
        removed=int(removed.sum()),
        unchanged=int((~removed & ~changed).sum()),
    )


def same_images(inventory: pa.Table, known: pa.Table) -> bool:
    """Whether `known` (image_id, size, mtime_ns) holds exactly the images of the inventory, all unchanged."""
    if inventory.num_rows != known.num_rows:
        return False
    now = _positions(known["image_id"], inventory["image_id"])
    return bool((now >= 0).all() and _same_file(known, inventory, now).all())


def unchanged_rows(members: pa.Table, previous: pa.Table) -> npt.NDArray[np.bool_]:
    """Which `members` of a rewritten unit stood in its `previous` members with the same size and mtime."""
    before = _positions(members["image_id"], previous["image_id"])
    return (before >= 0) & _same_file(members, previous, before)


def _positions(wanted: pa.ChunkedArray, among: pa.ChunkedArray) -> npt.NDArray[np.int64]:
    """For each of `wanted` its place in `among`, or -1."""
    found = pc.index_in(wanted, value_set=among)
    return _numbers(found.fill_null(-1) if found.null_count else found).astype(np.int64)


def _same_file(left: pa.Table, right: pa.Table, at: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Whether row i of `left` and row `at[i]` of `right` are one unchanged file; rows at -1 mean nothing."""
    if right.num_rows == 0:
        return np.zeros(left.num_rows, bool)
    same = np.ones(left.num_rows, bool)
    for column in ("size", "mtime_ns"):
        same &= _numbers(left[column]) == _numbers(right[column])[at]
    return same


def _numbers(column: pa.ChunkedArray) -> npt.NDArray[np.int64]:
    """A column without nulls. Arrow's own `to_numpy` imports pandas, a quarter of the time of a run with no work."""
    return np.from_dlpack(column.combine_chunks()).astype(np.int64, copy=False)


def _free_names(taken: set[str]) -> Iterator[str]:
    number = 0
    while True:
        if (name := unit_name(number)) not in taken:
            yield name
        number += 1
