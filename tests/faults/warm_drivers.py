"""Drivers that start in a moment: forked from a process that has imported what is slow to import, and done nothing."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path

from tokenize_stage.config import TokenSetConfig
from tokenize_stage.job import run_job

SLOW_IMPORTS = ["torch", "transformers.models.dinov2.modeling_dinov2", "tokenize_stage.worker", "pyarrow.parquet"]


def warm_up() -> ForkServerContext:
    """The process to fork from, which is started by the first driver."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(SLOW_IMPORTS)
    return context


def start(context: ForkServerContext, config: TokenSetConfig) -> ForkServerProcess:
    """`run_job` in a new process, the leader of its own session, with this process's environment."""
    driver = context.Process(target=_drive, args=(config.model_dump_json(), dict(os.environ)))
    driver.start()
    return driver


def kill_all(driver: ForkServerProcess) -> None:
    """Kill a driver with all that it started."""
    assert driver.pid is not None
    os.killpg(driver.pid, signal.SIGKILL)
    driver.join()
    assert driver.exitcode == -signal.SIGKILL


def kill_a_worker(driver: ForkServerProcess) -> None:
    """Kill one of the driver's Ray workers, as soon as there is one at work: the driver goes on."""
    while not (workers := _workers_of(driver)):
        assert driver.is_alive()
        time.sleep(0.05)
    os.kill(random.choice(workers), signal.SIGKILL)


def _workers_of(driver: ForkServerProcess) -> list[int]:
    """Ray's processes in the driver's session that are at work: torch is loaded for the first image."""
    found = []
    for process in Path("/proc").iterdir():
        if not process.name.isdigit():
            continue
        try:
            session = int((process / "stat").read_text().rpartition(")")[2].split()[3])
            rays = session == driver.pid and (process / "cmdline").read_text().startswith("ray::")
            if rays and "libtorch_cpu" in (process / "maps").read_text():
                found.append(int(process.name))
        except (FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
            continue
    return found


def _drive(config: str, environment: dict[str, str]) -> None:
    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    run_job(TokenSetConfig.model_validate_json(config))
