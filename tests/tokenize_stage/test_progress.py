"""What a running job says of itself: to its listener, in `progress.json`, in `metrics.jsonl` and to `asvr status`."""

from __future__ import annotations

import json
import logging
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
from made_jobs import job_config, make_pictures, start_driver
from test_budget import record

from manifests.commits import list_commits, read_commit
from manifests.live import JobProgress, read_progress, write_progress
from manifests.report import mixed_devices
from manifests.schema import Numerics
from manifests.status import status
from manifests.storage import Store
from pipeline.job_line import live_rows, worker_notes
from tokenize_stage.engines.in_flight import Running
from tokenize_stage.job import run_job
from tokenize_stage.outcomes import UnitDone, UnitMetrics
from tokenize_stage.progress import Tracker


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def done(unit: str, worker: str = "a:1", images: int = 100, seconds: float = 10, waited: float = 1) -> UnitDone:
    metrics = UnitMetrics(images, images, 0, 0, seconds, waited, worker)
    return UnitDone(record(unit, [0], set()), metrics)


def tracker(folder: Path, seen: list[JobProgress], clock: Clock) -> Tracker:
    return Tracker(Store.open(folder), seen.append, done=50, total=1050, units_done=1, units_total=11, clock=clock)


def test_the_rate_leaves_out_the_warm_up(tmp_path: Path) -> None:
    seen: list[JobProgress] = []
    clock = Clock()
    job = tracker(tmp_path, seen, clock)
    job.start(3)
    assert (seen[-1].done, seen[-1].rejected, seen[-1].rate, seen[-1].eta) == (50, 3, 0, None)
    clock.now = 100  # the model was loaded
    job.on_running(Running(2, {"u1": (10, 1)}))
    clock.now = 110
    job.on_running(Running(2, {"u1": (60, 1), "u2": (50, 0)}))
    assert seen[-1] == JobProgress(160, 1050, 4, 1, 11, 10.0, 89.0, 0.0, 2, {})
    job.on_unit(done("u1"), 4)
    assert (seen[-1].done, seen[-1].units_done, seen[-1].wait_share) == (200, 2, 0.1)
    assert seen[-1].by_worker == {"a:1": 10.0}


def test_a_lost_worker_takes_its_images_back(tmp_path: Path) -> None:
    seen: list[JobProgress] = []
    clock = Clock()
    job = tracker(tmp_path, seen, clock)
    for second, images in enumerate((10, 20, 30, 5, 15)):
        clock.now = float(second)
        job.on_running(Running(1, {"u1": (images, 0)}))
    assert (seen[-1].done, seen[-1].rate) == (65, 10.0)


def test_metrics_are_one_line_a_unit(tmp_path: Path) -> None:
    job = tracker(tmp_path, [], Clock())
    job.on_unit(done("u1"), 0)
    job.on_unit(done("u2"), 0)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["unit"] for line in lines] == ["u1", "u2"]
    assert set(lines[0]) == {
        "time", "unit", "images", "encoded", "copied", "rejected", "seconds", "waited", "worker", "gap", "device_memory",
        "images_per_second", "wait_share",
    }  # fmt: skip


def test_much_waiting_is_worth_one_hint(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    job = tracker(tmp_path, [], Clock())
    with caplog.at_level(logging.WARNING):
        for number in range(9):
            job.on_unit(done(f"u{number}", waited=3), 0)
    assert [entry.message.split(",")[0] for entry in caplog.records] == ["the encoder stands still 30 % of the time"]


def test_status_of_a_job_that_runs(codebook: Path, tmp_path: Path) -> None:
    pictures = make_pictures(tmp_path / "pictures", 600)
    config = job_config(pictures, codebook, tmp_path / "out", unit_size=2, batch_size=1)
    driver = start_driver(config)
    store = Store.open(tmp_path / "out")
    deadline = time.monotonic() + 60
    while (live := read_progress(store)) is None or live.progress.eta is None:  # known from the second report on
        assert time.monotonic() < deadline
        assert driver.poll() is None, driver.communicate()
        time.sleep(0.02)
    report = status(tmp_path / "out")
    driver.send_signal(signal.SIGTERM)
    assert driver.wait(timeout=20) == 143
    assert report.state == "in progress"
    assert report.progress is not None
    assert report.progress_age is not None
    assert 0 < report.progress.done < report.progress.total == 600
    assert report.progress_age < 20
    rows = dict(live_rows(report))
    assert str(driver.pid) in str(rows["owner"])
    assert "/600 images (" in str(rows["progress"])
    assert "ETA" in str(rows["progress"])

    write_progress(store, replace(live.progress, done=0))  # as of a kill within seconds of its start
    stopped = status(tmp_path / "out")
    assert stopped.state == "interrupted"
    assert stopped.progress is not None
    assert "ETA" not in str(dict(live_rows(stopped))["progress"])
    committed = sum(len(read_commit(store, unit).members) for unit in list_commits(store))
    assert stopped.progress.done == stopped.images == stopped.ok == committed
    assert f"{committed}/600 images (" in str(dict(live_rows(stopped))["progress"])

    run_job(config.model_copy(update={"source": config.source, "unit_size": 64}))
    finished = status(tmp_path / "out")
    assert (finished.state, finished.progress) == ("complete", None)
    assert json.loads(json.dumps(report.as_dict()))["progress"]["total"] == 600


def test_a_damaged_progress_file_is_no_progress(tmp_path: Path) -> None:
    store = Store.open(tmp_path)
    store.write("progress.json", b"{")
    assert read_progress(store) is None


def test_notes_about_workers() -> None:
    alone = JobProgress(1, 2, 0, 0, 1, 5, 1, 0.25, 1, {"a:1": 5.0})
    assert worker_notes(alone) == ["25% waiting"]
    two = JobProgress(1, 2, 0, 0, 1, 5, 1, 0.0, 2, {"a:1": 5.0, "b:2": 3.0})
    assert worker_notes(two) == ["2 workers at 4.0/s (slowest 3.0)", "0% waiting"]
    assert worker_notes(JobProgress(0, 2, 0, 0, 1, 0, None, 0, 3)) == ["3 workers"]


def test_mixed_devices_are_told() -> None:
    records = [Numerics(device=name, torch="2", dtype="float32", batch_size=8) for name in ("H200", "A100", "H200")]
    note = mixed_devices(records)
    assert note is not None
    assert note.startswith(
        "units were computed on 2 kinds of device (A100; H200): codes whose margin is below rounding"
    )
    assert mixed_devices(records[:1]) is None
