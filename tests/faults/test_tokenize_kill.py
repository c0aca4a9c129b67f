"""SIGKILL of driver and workers at random moments: the end is what an undisturbed run makes, and nothing is done twice."""

from __future__ import annotations

import json
import os
import random
import time
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path

import pytest
from made_jobs import content, job_config, make_pictures, make_tokenizer
from warm_drivers import kill_a_worker, kill_all, start, warm_up

from manifests.storage import FileStat, Store
from manifests.verify import status, verify
from tokenize_stage.config import RayConfig, TokenSetConfig
from tokenize_stage.job import run_job

KILLS = int(os.environ.get("ASVR_SOAK_KILLS", "5"))
UNITS = 12 * KILLS + 20
"""Enough that no kill finds the job finished: one comes after at most ten units more, and a few are in flight."""


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> TokenSetConfig:
    """A job that nobody disturbed."""
    folder = tmp_path_factory.mktemp("clean")
    pictures = make_pictures(folder / "pictures", 3 * UNITS)
    config = job_config(pictures, make_tokenizer(folder / "tokenizer"), folder / "out", unit_size=3, batch_size=2)
    run_job(config)
    return config


@pytest.fixture(scope="module")
def warm() -> ForkServerContext:
    return warm_up()


@pytest.mark.timeout(300 + 60 * KILLS)
@pytest.mark.parametrize(("engine", "place"), [("local", "disk"), ("local", "s3"), ("ray", "disk")])
def test_kills_at_random_moments(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    clean: TokenSetConfig,
    warm: ForkServerContext,
    engine: str,
    place: str,
) -> None:
    """The local engine's worker is a thread of its driver. Of Ray's job every other kill is of a worker alone."""
    output = str(tmp_path / "out") if place == "disk" else request.getfixturevalue("s3")
    config = clean.model_copy(update={"output": output, "engine": engine, "ray": RayConfig(address="local")})
    store = Store.open(output)
    kept: dict[str, FileStat] = {}
    driver = None
    for kill in range(KILLS):
        driver = driver or start(warm, config)
        wait_for(store, driver, random.randrange(1, 11))
        time.sleep(random.random() * 0.02)
        if engine == "ray" and kill % 2 == 0:
            kill_a_worker(driver)
            continue
        kill_all(driver)
        driver = None
        now = records(store)
        assert kept.items() <= now.items()  # no committed unit was committed again
        kept = now
        assert status(output).state == "interrupted"
    if driver:
        driver.join()
        assert driver.exitcode == 0
    else:
        assert run_job(config).encoded == 3 * (UNITS - len(kept))
    assert kept.items() <= records(store).items()
    assert content(output) == content(clean.output)
    assert verify(output).problems == []
    lines = [json.loads(line)["unit"] for line in store.read("metrics.jsonl").splitlines()]
    assert len(lines) == len(set(lines))  # no unit has two
    if store.is_local:
        assert len(lines) >= UNITS - KILLS  # a kill between a unit's commit and its line loses the line


def records(store: Store) -> dict[str, FileStat]:
    """The commit records and when they were written."""
    return dict(store.walk("commits/"))


def wait_for(store: Store, driver: ForkServerProcess, units: int) -> None:
    """Until that many units more are committed."""
    wanted = len(records(store)) + units
    while len(records(store)) < wanted:
        assert driver.is_alive()
        time.sleep(0.001 if store.is_local else 0.1)
