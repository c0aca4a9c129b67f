"""Units of images with several views: the views are one stream, cut into batches wherever that falls."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from made_jobs import CODES, DEPTH, VIEW, job_config
from made_orders import order_of, tokenize, units_of

from manifests.commits import decode_usage, write_commit
from manifests.decode import decode
from manifests.geometry import make_views
from manifests.shard_reader import read_shard
from manifests.storage import Store
from tokenize_stage.config import GeometryConfig
from tokenize_stage.sources import take_inventory
from tokenize_stage.tokenizers import load
from tokenize_stage.units import Committed, Unit, plan_units

ANYRES = GeometryConfig(mode="anyres", size=VIEW)
"""Pictures of 20 to 60 pixels have 3 to 5 views of 28."""


def test_views_of_an_image_may_lie_in_two_batches(pictures: Path, codebook: Path, tmp_path: Path) -> None:
    order = order_of(pictures, codebook, tmp_path / "out", geometry=ANYRES)
    [unit] = units_of(pictures, codebook)
    (pictures / unit.members["image_id"][3].as_py()).write_bytes(b"<html>")
    record = tokenize(order, unit).record
    assert record.shard is not None
    rows = read_shard(Store.open(tmp_path / "out"), record.shard.path).to_pylist()
    assert len(rows) == 19

    stream = []
    for member, name in enumerate(unit.members["image_id"].to_pylist()):
        # A reject counts as one view of zeros.
        views = np.zeros((1, VIEW, VIEW, 3), np.uint8)
        if member != 3:
            views, boxes = make_views(decode((pictures / name).read_bytes()), order.geometry)
            [row] = [row for row in rows if row["image_id"] == name]
            assert row["view_boxes"] == boxes.reshape(-1).tolist()
            assert len(row["codes"]) == len(views) * 4 * DEPTH
        stream.append(views)
    views_NSS3 = np.concatenate(stream)
    views_NSS3 = np.concatenate([views_NSS3, np.zeros((-len(views_NSS3) % 4, VIEW, VIEW, 3), np.uint8)])
    assert len({len(views) for views in stream}) > 2
    tokenizer = load(order.tokenizer, order.spec, dtype="float32", device="cpu")
    batches = torch.from_numpy(views_NSS3.reshape(-1, 4, VIEW, VIEW, 3))
    codes_N = np.concatenate([tokenizer.encode(batch).numpy().reshape(4, -1) for batch in batches])
    starts = np.cumsum([0, *(len(views) for views in stream)])
    expected = [codes_N[starts[i] : starts[i + 1]].reshape(-1).tolist() for i in range(20) if i != 3]
    assert [row["codes"] for row in rows] == expected
    assert record.views == starts[-1] - 1
    assert record.codes == record.views * 4 * DEPTH
    assert decode_usage(record.usage, (CODES,) * DEPTH)[0].sum() == record.views * 4


@pytest.mark.parametrize("threads", [1, 3, 7])
def test_decode_threads_change_no_byte_of_anyres(pictures: Path, codebook: Path, tmp_path: Path, threads: int) -> None:
    [unit] = units_of(pictures, codebook)
    (pictures / unit.members["image_id"][8].as_py()).write_bytes(b"")
    one = tokenize(order_of(pictures, codebook, tmp_path / "one", geometry=ANYRES, decode_threads=1), unit).record
    many = order_of(pictures, codebook, tmp_path / "many", geometry=ANYRES, decode_threads=threads)
    assert tokenize(many, unit).record.shard == one.shard


def test_a_rewritten_unit_of_anyres_puts_views_where_all_of_it_would(
    pictures: Path, codebook: Path, tmp_path: Path
) -> None:
    order = order_of(pictures, codebook, tmp_path / "out", geometry=ANYRES)
    [unit] = units_of(pictures, codebook)
    (pictures / unit.members["image_id"][3].as_py()).write_bytes(b"")
    [unit] = units_of(pictures, codebook)
    write_commit(Store.open(tmp_path / "out"), tokenize(order, unit).record)

    # The last image changes. Its place depends on the views of all the others, which only the old shard remembers.
    last = unit.members["image_id"][19].as_py()
    (pictures / last).write_bytes((pictures / unit.members["image_id"][6].as_py()).read_bytes())
    inventory = take_inventory(job_config(pictures, codebook, tmp_path).source).table
    [again] = plan_units(inventory, [Committed("u000000", unit.members)], 100).units
    done = tokenize(order, again)
    assert (done.metrics.encoded, done.metrics.copied, done.metrics.rejected) == (1, 19, 1)
    fresh = order_of(pictures, codebook, tmp_path / "fresh", geometry=ANYRES)
    assert done.record.shard == tokenize(fresh, Unit("u000000", inventory)).record.shard
