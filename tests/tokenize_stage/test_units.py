"""Planning is a set difference: whatever is committed already, the rest becomes the same units as in a clean run."""

from __future__ import annotations

import pickle
import random
import time

import pyarrow as pa
import pytest

from tokenize_stage.sources.inventory import INVENTORY_SCHEMA, build_table
from tokenize_stage.units import Plan, plan_units, same_images, unchanged_rows


def table(*names: str, mtime: int = 1) -> pa.Table:
    return build_table((name, 10, mtime, row) for row, name in enumerate(names))


def images(count: int) -> pa.Table:
    return table(*(f"{number:04d}" for number in range(count)))


def committed(plan: Plan) -> list[tuple[str, pa.Table]]:
    return [(unit.name, unit.members) for unit in plan.units]


def shape(plan: Plan) -> dict[str, list[str]]:
    return {unit.name: unit.members["image_id"].to_pylist() for unit in plan.units}


def test_a_source_is_cut_in_order() -> None:
    assert shape(plan_units(table("a", "b", "c"), [], 2)) == {"u000000": ["a", "b"], "u000001": ["c"]}
    assert shape(plan_units(table("a"), [], 1000)) == {"u000000": ["a"]}
    assert plan_units(INVENTORY_SCHEMA.empty_table(), [], 2).units == []


@pytest.mark.parametrize("seed", range(20))
def test_a_killed_run_is_planned_again_as_it_was(seed: int) -> None:
    inventory = images(53)
    clean = plan_units(inventory, [], 5)
    survived = random.Random(seed).sample(committed(clean), seed % 11)
    again = plan_units(inventory, survived, 5)
    assert {**shape(again), **{name: rows["image_id"].to_pylist() for name, rows in survived}} == shape(clean)
    assert (again.added, again.changed, again.removed) == (53 - again.unchanged, 0, 0)


def test_nothing_is_planned_when_all_is_committed() -> None:
    inventory = images(10)
    plan = plan_units(inventory, committed(plan_units(inventory, [], 4)), 3)
    assert (plan.units, plan.unchanged) == ([], 10)


def test_new_images_form_new_units_wherever_they_sort() -> None:
    before = committed(plan_units(table("b", "c", "d"), [], 2))
    plan = plan_units(table("a", "b", "bb", "c", "d", "e"), before, 2)
    assert shape(plan) == {"u000002": ["a", "bb"], "u000003": ["e"]}
    assert not any(unit.rewrites for unit in plan.units)


def test_changed_and_removed_images_rewrite_their_unit_only() -> None:
    before = committed(plan_units(images(6), [], 2))
    now = pa.concat_tables([images(6).slice(0, 2), table("0002", mtime=2), images(6).slice(3, 2)])
    plan = plan_units(now, before, 2)
    assert shape(plan) == {"u000001": ["0002", "0003"], "u000002": ["0004"]}
    assert all(unit.rewrites for unit in plan.units)
    assert (plan.changed, plan.removed, plan.unchanged) == (1, 1, 4)
    assert unchanged_rows(plan.units[0].members, before[1][1]).tolist() == [False, True]


def test_an_emptied_unit_gives_its_name_back() -> None:
    before = committed(plan_units(images(4), [], 2))
    plan = plan_units(pa.concat_tables([images(4).slice(2), table("new")]), before, 2)
    assert plan.emptied == ["u000000"]
    assert shape(plan) == {"u000000": ["new"]}


def test_same_images_is_a_comparison_of_sets() -> None:
    assert same_images(images(5), images(5).take([4, 0, 1, 3, 2]))
    assert not same_images(images(5), images(4))
    assert not same_images(images(1), table("0000", mtime=2))
    assert not same_images(images(1), table("other"))


def test_a_pickled_unit_carries_its_own_rows_only() -> None:
    unit = plan_units(images(100_000), [], 10).units[5_000]
    data = pickle.dumps(unit)
    assert len(data) < 5_000
    again = pickle.loads(data)  # noqa: S301
    assert (again.name, again.rewrites) == (unit.name, unit.rewrites)
    assert again.members.equals(unit.members)


def test_planning_is_quick() -> None:
    inventory = images(300_000)
    before = committed(plan_units(inventory.slice(0, 250_000), [], 4096))
    start = time.perf_counter()
    plan = plan_units(inventory, before, 4096)
    assert plan.added == 50_000
    assert time.perf_counter() - start < 3
