"""One unit becomes one shard: every member ends as a row or a reject, and nothing but the unit decides the bytes."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from bad_inputs import make_bad_inputs
from made_jobs import CODES, DEPTH, VIEW, job_config, make_pictures
from made_orders import order_of, tokenize, units_of

from manifests.commits import decode_usage, write_commit
from manifests.decode import decode
from manifests.geometry import make_views
from manifests.shard_reader import read_shard
from manifests.shards import list_values
from manifests.storage import Store
from tokenize_stage.outcomes import UnitDone, UnitFailed
from tokenize_stage.sources import take_inventory
from tokenize_stage.sources.inventory import build_table
from tokenize_stage.tokenizers import load
from tokenize_stage.units import Committed, Unit, plan_units
from tokenize_stage.worker import Worker


def test_a_row_holds_what_the_tokenizer_makes_of_the_view(pictures: Path, codebook: Path, tmp_path: Path) -> None:
    order = order_of(pictures, codebook, tmp_path / "out")
    [unit] = units_of(pictures, codebook)
    record = tokenize(order, unit).record
    assert record.shard is not None
    table = read_shard(Store.open(tmp_path / "out"), record.shard.path)
    assert table["image_id"].to_pylist() == unit.members["image_id"].to_pylist()
    tokenizer = load(order.tokenizer, order.spec, dtype="float32", device="cpu")
    codes, _ = list_values(table["codes"])
    for row, name in enumerate(table["image_id"].to_pylist()):
        data = (pictures / name).read_bytes()
        image = decode(data)
        views, boxes = make_views(image, order.geometry)
        batch = np.zeros((4, VIEW, VIEW, 3), np.uint8)
        batch[row % 4] = views[0]
        expected = tokenizer.encode(torch.from_numpy(batch))[row % 4].numpy()
        assert np.array_equal(codes.reshape(20, 4, DEPTH)[row], expected)
        fields = table.slice(row, 1).to_pylist()[0]
        assert fields["sha256"] == hashlib.sha256(data).hexdigest()
        assert (fields["height"], fields["width"]) == image.shape[:2]
        assert (fields["file"], fields["offset"], fields["length"]) == (name, 0, len(data))
        assert np.allclose(fields["view_boxes"], boxes.reshape(-1))
    assert record.codes == codes.size == 20 * 4 * DEPTH
    usage = decode_usage(record.usage, (CODES,) * DEPTH)
    assert [int(depth.sum()) for depth in usage] == [80, 80]


@pytest.mark.parametrize("threads", [1, 3, 7])
def test_decode_threads_change_no_byte(pictures: Path, codebook: Path, tmp_path: Path, threads: int) -> None:
    [unit] = units_of(pictures, codebook)
    one = tokenize(order_of(pictures, codebook, tmp_path / "one", decode_threads=1), unit).record
    other = tokenize(order_of(pictures, codebook, tmp_path / "other", decode_threads=threads), unit).record
    assert one.shard == other.shard
    assert one.usage == other.usage


def test_a_reject_changes_nothing_about_its_neighbours(pictures: Path, codebook: Path, tmp_path: Path) -> None:
    [unit] = units_of(pictures, codebook)
    before = tokenize(order_of(pictures, codebook, tmp_path / "before"), unit).record
    victim = unit.members["image_id"][5].as_py()
    (pictures / victim).write_bytes(b"<html>")
    after = tokenize(order_of(pictures, codebook, tmp_path / "after"), unit).record
    assert before.shard is not None
    assert after.shard is not None
    whole = read_shard(Store.open(tmp_path / "before"), before.shard.path).to_pylist()
    assert read_shard(Store.open(tmp_path / "after"), after.shard.path).to_pylist() == whole[:5] + whole[6:]
    assert [(row.image_id, row.reason) for row in after.rejects] == [(victim, "not_an_image")]


def test_every_bad_input_is_a_reject_with_its_reason(codebook: Path, tmp_path: Path) -> None:
    root = tmp_path / "bad"
    expected = {
        **make_bad_inputs(root),
        "absent.png": "missing",
        "../outside.png": "outside_root",
        "nul\0.png": "missing",
    }
    members = build_table((name, 0, 0, row) for row, name in enumerate(expected))
    record = tokenize(order_of(root, codebook, tmp_path / "out"), Unit("u000000", members)).record
    found: dict[str, str | None] = {row.image_id: row.reason for row in record.rejects}
    assert record.shard is not None
    found |= dict.fromkeys(read_shard(Store.open(tmp_path / "out"), record.shard.path)["image_id"].to_pylist())
    assert {**expected, "nul\0.png": found["nul\0.png"]} == found
    assert found["nul\0.png"] is not None
    assert all(row.message for row in record.rejects)


def test_a_unit_of_rejects_only_has_no_shard(codebook: Path, tmp_path: Path) -> None:
    members = build_table((f"absent{row}.png", -1, 0, row) for row in range(9))
    record = tokenize(order_of(tmp_path, codebook, tmp_path / "out"), Unit("u000000", members)).record
    assert record.shard is None
    assert len(record.rejects) == 9
    assert not (tmp_path / "out" / "shards").exists()


def test_storage_that_fails_is_not_the_image_s_fault(codebook: Path, tmp_path: Path) -> None:
    # Reading a process's memory at address 0 is an I/O error that the kernel gives to everybody.
    members = build_table([("mem", 1, 0, 0)])
    worker = Worker(order_of(Path("/proc/self"), codebook, tmp_path / "out"))
    outcome = worker.tokenize(Unit("u000000", members))
    worker.close()
    assert isinstance(outcome, UnitFailed)
    assert "mem" in outcome.message
    assert "4 times" in outcome.message


def test_a_rewritten_unit_copies_what_did_not_change(pictures: Path, codebook: Path, tmp_path: Path) -> None:
    order = order_of(pictures, codebook, tmp_path / "out")
    [unit] = units_of(pictures, codebook)
    (pictures / unit.members["image_id"][3].as_py()).write_bytes(b"")
    [unit] = units_of(pictures, codebook)
    first = tokenize(order, unit).record
    write_commit(Store.open(tmp_path / "out"), first)

    victim = unit.members["image_id"][7].as_py()
    (pictures / unit.members["image_id"][12].as_py()).unlink()
    (pictures / victim).write_bytes((pictures / unit.members["image_id"][8].as_py()).read_bytes())
    inventory = take_inventory(job_config(pictures, codebook, tmp_path).source).table
    [again] = plan_units(inventory, [Committed("u000000", unit.members)], 100).units
    done = tokenize(order, again)
    assert (done.metrics.encoded, done.metrics.copied, done.metrics.rejected) == (1, 18, 1)
    assert done.record.rejects == first.rejects

    fresh = tokenize(order_of(pictures, codebook, tmp_path / "fresh"), Unit("u000000", inventory)).record
    assert done.record.shard == fresh.shard  # the same bytes as if all of it had been encoded now
    assert done.record.usage == fresh.usage


def test_metrics_say_where_the_time_went(pictures: Path, codebook: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    worker = Worker(order_of(pictures, codebook, tmp_path / "out"))
    outcome = worker.tokenize(units_of(pictures, codebook)[0], lambda images, rejects: seen.append((images, rejects)))
    worker.close()
    assert isinstance(outcome, UnitDone)
    assert sum(images for images, _ in seen) == 20
    assert 0 <= outcome.metrics.waited <= outcome.metrics.seconds
    assert (outcome.metrics.images, outcome.metrics.encoded, outcome.metrics.copied) == (20, 20, 0)


def test_a_unit_larger_than_the_source_and_a_batch_larger_than_the_unit(codebook: Path, tmp_path: Path) -> None:
    root = make_pictures(tmp_path / "few", 3)
    [unit] = units_of(root, codebook, size=10_000)
    record = tokenize(order_of(root, codebook, tmp_path / "out", batch_size=64), unit).record
    assert record.shard is not None
    assert record.shard.rows == 3
