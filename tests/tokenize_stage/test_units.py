"""Planning is a set difference: whatever is committed already, the rest becomes the same units as in a clean run."""

from __future__ import annotations

import pickle
import random
import time
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pytest

from manifests.id_index import IdIndex
from tokenize_stage.sources.inventory import INVENTORY_SCHEMA, build_table, container_rows, joined
from tokenize_stage.table_rows import take_rows
from tokenize_stage.units import Committed, Plan, Unit, plan_units, same_images, unchanged_rows


def table(*names: str, mtime: int = 1) -> pa.Table:
    return build_table((name, 10, mtime, row) for row, name in enumerate(names))


def images(count: int) -> pa.Table:
    return table(*(f"{number:04d}" for number in range(count)))


def committed(plan: Plan) -> list[Committed]:
    return [Committed(unit.name, unit.members) for unit in plan.units]


def shape(plan: Plan) -> dict[str, list[str]]:
    return {unit.name: unit.members["image_id"].to_pylist() for unit in plan.units}


def test_a_source_is_cut_in_order() -> None:
    assert shape(plan_units(table("a", "b", "c"), [], 2)) == {"u000000": ["a", "b"], "u000001": ["c"]}
    assert shape(plan_units(table("a"), [], 1000)) == {"u000000": ["a"]}
    assert plan_units(INVENTORY_SCHEMA.empty_table(), [], 2).units.images == 0


@pytest.mark.parametrize("seed", range(20))
def test_a_killed_run_is_planned_again_as_it_was(seed: int) -> None:
    inventory = images(53)
    clean = plan_units(inventory, [], 5)
    survived = random.Random(seed).sample(committed(clean), seed % 11)
    again = plan_units(inventory, survived, 5)
    assert {**shape(again), **{unit.name: unit.members["image_id"].to_pylist() for unit in survived}} == shape(clean)
    assert (again.new.count, again.changed.count, again.removed.count) == (53 - again.unchanged, 0, 0)


def test_nothing_is_planned_when_all_is_committed() -> None:
    inventory = images(10)
    plan = plan_units(inventory, committed(plan_units(inventory, [], 4)), 3)
    assert (len(plan.units), plan.unchanged) == (0, 10)


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
    assert (plan.changed.count, plan.removed.count, plan.unchanged) == (1, 1, 4)
    assert (plan.changed.examples, plan.removed.examples) == (["0002"], ["0005"])
    assert unchanged_rows(plan.units[0].members, before[1].members).tolist() == [False, True]


def test_an_emptied_unit_gives_its_name_back() -> None:
    before = committed(plan_units(images(4), [], 2))
    plan = plan_units(pa.concat_tables([images(4).slice(2), table("new")]), before, 2)
    assert plan.emptied == ["u000000"]
    assert shape(plan) == {"u000000": ["new"]}


def test_same_images_is_a_comparison_of_sets() -> None:
    assert same_images(images(5), [images(5).take([4, 0, 1, 3, 2])])
    assert same_images(images(5), [images(5).slice(3), images(3)])
    assert not same_images(images(5), [images(4)])
    assert not same_images(images(4), [images(5)])
    assert not same_images(images(1), [table("0000", mtime=2)])
    assert not same_images(images(1), [table("other")])


def test_a_pickled_unit_carries_its_own_rows_only() -> None:
    unit = plan_units(images(100_000), [], 10).units[5_000]
    data = pickle.dumps(unit)
    assert len(data) < 5_000
    again = pickle.loads(data)  # noqa: S301
    assert (again.name, again.rewrites) == (unit.name, unit.rewrites)
    assert again.members.equals(unit.members)


def test_a_pickled_unit_names_its_own_containers_only() -> None:
    tars = [
        container_rows(f"{n:05d}.tar", [f"{n}!a"], size=1, mtime_ns=1, source_row=0, offset=0) for n in range(9_000)
    ]
    unit = Unit("u000000", joined(tars).unify_dictionaries().slice(8_000, 3))
    data = pickle.dumps(unit)
    assert len(data) < 5_000
    again = pickle.loads(data)  # noqa: S301
    assert again.members.to_pylist() == unit.members.to_pylist()
    assert again.members["file"].to_pylist() == ["08000.tar", "08001.tar", "08002.tar"]


def test_planning_is_quick() -> None:
    inventory = images(300_000)
    before = committed(plan_units(inventory.slice(0, 250_000), [], 4096))
    start = time.perf_counter()
    plan = plan_units(inventory, before, 4096)
    assert plan.new.count == 50_000
    assert time.perf_counter() - start < 3


def test_a_retried_reject_rewrites_its_unit() -> None:
    [first, second] = committed(plan_units(images(4), [], 2))
    plan = plan_units(images(4), [first, second._replace(again=frozenset({"0003"}))], 2, frozenset({"missing"}))
    assert shape(plan) == {"u000001": ["0002", "0003"]}
    assert (plan.units[0].retry, plan.units[0].rewrites) == ({"missing"}, True)
    assert (plan.retried.examples, plan.unchanged, plan.encode) == (["0003"], 3, 1)


def test_an_emptied_source_empties_all_units() -> None:
    plan = plan_units(INVENTORY_SCHEMA.empty_table(), committed(plan_units(images(4), [], 2)), 2)
    assert (len(plan.units), plan.emptied, plan.removed.count) == (0, ["u000000", "u000001"], 4)


@pytest.mark.parametrize("wanted", [1, 5, 6, 17, 52, 53, 1000])
def test_a_sample_is_of_whole_units_and_changes_no_later_plan(wanted: int) -> None:
    inventory = images(53)
    clean = plan_units(inventory, [], 5)
    sample = clean.sample(wanted)
    assert min(wanted, 53) <= sample.images + 2 <= min(wanted, 53) + 7  # the last unit has 3 images, not 5
    again = plan_units(inventory, [Committed(unit.name, unit.members) for unit in sample], 5)
    sampled = {unit.name: unit.members["image_id"].to_pylist() for unit in sample}
    assert {**shape(again), **sampled} == shape(clean)


def test_a_sample_of_nothing_is_empty() -> None:
    assert len(plan_units(INVENTORY_SCHEMA.empty_table(), [], 2).sample(5)) == 0


def chunked(ids: Sequence[str], size: int) -> pa.ChunkedArray:
    chunks = [pa.array(ids[start : start + size], pa.string()) for start in range(0, len(ids), size)]
    return pa.chunked_array(chunks, pa.string())


@pytest.mark.parametrize("seed", range(10))
def test_an_id_index_finds_what_a_dictionary_finds(seed: int) -> None:
    rng = random.Random(seed)
    alphabet = ["", "a", "b", "é", "画", "/", "aa"]
    ids = sorted({"".join(rng.choices(alphabet, k=rng.randrange(6))) for _ in range(400)})
    rng.shuffle(ids)
    index, places = IdIndex(chunked(ids, 37)), {name: place for place, name in enumerate(ids)}
    assert index.duplicate() is None
    start = rng.randrange(len(ids))
    for wanted in (ids, ids[start:], ids[::-1], [*ids[3:90], "nowhere", *ids[:3]], rng.choices(ids, k=50), []):
        assert index.find(chunked(wanted, 23)).tolist() == [places.get(name, -1) for name in wanted]
    assert IdIndex(chunked([*ids, ids[start]], 37)).duplicate() == ids[start]


def test_rows_are_taken_from_many_chunks() -> None:
    parts = [container_rows(f"{n:03d}.tar", [f"{n}!{k}" for k in range(50)], size=1, mtime_ns=n, source_row=0, offset=0)
             for n in range(200)]  # fmt: skip
    whole = pa.concat_tables(parts)
    for rows in ([7, 8, 9], [9_999, 3, 5_000, 4], list(range(40, 160)), []):
        taken = take_rows(whole, np.array(rows, np.int64))
        assert taken.to_pylist() == whole.take(pa.array(rows, pa.int64())).to_pylist()
        assert taken["image_id"].num_chunks <= 1
