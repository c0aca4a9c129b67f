"""A worker has two units in hand: one that has the encoder, and one whose first batches are being decoded."""

from __future__ import annotations

import threading
import time
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pytest
from made_orders import order_of, tokenize, units_of

from tokenize_stage.decoding import Decoded, ThreadDecoder
from tokenize_stage.order import WorkOrder
from tokenize_stage.outcomes import UnitDone
from tokenize_stage.worker import Stopped, Worker


def test_two_units_at_once_are_what_they_are_one_by_one(pictures: Path, codebook: Path, tmp_path: Path) -> None:
    units = units_of(pictures, codebook, size=3)
    apart = [tokenize(order_of(pictures, codebook, tmp_path / "apart"), unit).record for unit in units]
    worker = Worker(order_of(pictures, codebook, tmp_path / "together"))
    with ThreadPoolExecutor(2) as threads:
        together = list(threads.map(worker.tokenize, units))
    worker.close()
    for one, other in zip(apart, together, strict=True):
        assert isinstance(other, UnitDone)
        assert other.record.shard == one.shard
        assert other.record.usage == one.usage
        assert 0 <= other.metrics.waited <= other.metrics.seconds


class HeldDecoder:
    """Decodes as usual, tells when a unit begins, and holds back each unit's second group until it is let go."""

    def __init__(self, order: WorkOrder) -> None:
        self._threads = ThreadDecoder(order)
        self.began: list[str] = []
        self.let_go = threading.Event()

    def decode(self, members: pa.Table) -> Generator[Decoded, None, None]:
        self.began.append(members["image_id"][0].as_py())
        for number, group in enumerate(self._threads.decode(members)):
            if number and not self.let_go.wait(60):
                raise TimeoutError
            yield group

    def close(self) -> None:
        self._threads.close()


def test_the_next_unit_is_decoded_while_one_has_the_encoder(pictures: Path, codebook: Path, tmp_path: Path) -> None:
    order = order_of(pictures, codebook, tmp_path / "out", batch_size=2)
    units = units_of(pictures, codebook, size=8)[:2]
    decoder = HeldDecoder(order)
    worker = Worker(order, decoder)
    with ThreadPoolExecutor(2) as threads:
        futures = [threads.submit(worker.tokenize, unit) for unit in units]
        ends = time.monotonic() + 60
        while len(decoder.began) < 2 and time.monotonic() < ends:
            time.sleep(0.01)
        assert len(decoder.began) == 2
        assert not any(future.done() for future in futures)
        decoder.let_go.set()
        assert all(isinstance(future.result(), UnitDone) for future in futures)
    worker.close()


def test_a_closed_worker_leaves_its_units_undone(pictures: Path, codebook: Path, tmp_path: Path) -> None:
    order = order_of(pictures, codebook, tmp_path / "out", batch_size=2)
    [unit] = units_of(pictures, codebook)
    decoder = HeldDecoder(order)
    worker = Worker(order, decoder)
    with ThreadPoolExecutor(1) as threads:
        future = threads.submit(worker.tokenize, unit)
        while not decoder.began:
            time.sleep(0.01)
        worker.close()
        decoder.let_go.set()
        with pytest.raises((Stopped, RuntimeError)):
            future.result(60)
    assert not (tmp_path / "out" / "shards").exists()
