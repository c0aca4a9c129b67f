"""The Ray engine gives the bytes of the local one, survives lost workers, and says when a cluster is too small."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from bad_inputs import make_bad_inputs
from made_jobs import content, job_config, make_pictures

from manifests.errors import EnvironmentProblem, FingerprintMismatch, StorageError
from tokenize_stage.config import RayConfig
from tokenize_stage.engines.ray import Pool, plan_pool
from tokenize_stage.job import run_job
from tokenize_stage.progress import JobProgress

pytestmark = pytest.mark.usefixtures("ray_session")


@pytest.mark.parametrize("workers", [1, 2])
def test_the_same_shards_as_the_local_engine(
    codebook: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    """Two workers of one core each on two cores: every core has an actor, and nothing waits for another one.

    The paths are relative to a folder in which no worker was started.
    """
    monkeypatch.chdir(tmp_path)
    pictures, codebook = make_pictures(Path("pictures"), 40), Path(os.path.relpath(codebook))
    make_bad_inputs(pictures / "bad")
    changes = {"max_reject_rate": 0.5, "batch_size": 4}
    run_job(job_config(pictures, codebook, Path("local"), **changes))
    seen: list[JobProgress] = []
    ray = RayConfig(num_workers=workers)
    config = job_config(pictures, codebook, Path("ray"), engine="ray", ray=ray, decode_threads=3, **changes)
    run_job(config, progress=seen.append)
    assert content(tmp_path / "ray") == content(tmp_path / "local")
    assert len({state.done for state in seen}) == 8  # the start and one line for each of the seven units
    named = {json.loads(line)["worker"] for line in (tmp_path / "ray" / "metrics.jsonl").read_text().splitlines()}
    assert 1 <= len(named) <= workers
    assert not any(name.endswith(f":{os.getpid()}") for name in named)


def test_a_killed_worker_costs_nothing_but_time(codebook: Path, tmp_path: Path) -> None:
    pictures = make_pictures(tmp_path / "pictures", 40)
    run_job(job_config(pictures, codebook, tmp_path / "local", unit_size=4))
    config = job_config(pictures, codebook, tmp_path / "ray", engine="ray", unit_size=4)
    with killing_workers(at_most=2) as killed:
        run_job(config)
    assert len(killed) == 2
    assert content(tmp_path / "ray") == content(tmp_path / "local")


def test_a_unit_that_kills_every_worker_ends_the_job(codebook: Path, tmp_path: Path) -> None:
    pictures = make_pictures(tmp_path / "pictures", 8)
    config = job_config(pictures, codebook, tmp_path / "ray", engine="ray")
    with (
        killing_workers(at_most=1000),
        pytest.raises(EnvironmentProblem, match="a Ray worker died 4 times on one unit"),
    ):
        run_job(config)
    assert run_job(config).encoded == 8


def test_errors_cross_the_process_border_as_themselves(codebook: Path, tmp_path: Path) -> None:
    pictures = make_pictures(tmp_path / "pictures", 8)
    output = tmp_path / "out"
    output.mkdir()
    (output / "shards").write_text("a file where the folder of the shards should be")
    with pytest.raises(StorageError, match="shards"):
        run_job(job_config(pictures, codebook, output, engine="ray"))
    (output / "shards").unlink()
    assert run_job(job_config(pictures, codebook, output, engine="ray")).encoded == 8
    with pytest.raises(FingerprintMismatch):
        run_job(job_config(pictures, codebook, output, engine="ray", dtype="bfloat16"))


def test_failing_storage_fails_units_and_not_the_workers(codebook: Path, tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "yes"}]
    path = tmp_path / "data.json"
    path.write_text(json.dumps([{"id": "0", "image": "mem", "conversations": turns}]))
    source = {"kind": "llava", "path": path, "image_root": "/proc/self"}
    with pytest.raises(StorageError, match="1 of 1 units could not be read"):
        run_job(job_config(tmp_path, codebook, tmp_path / "out", source=source, engine="ray", max_reject_rate=1.0))


def test_a_cluster_without_room_is_one_sentence(pictures: Path, codebook: Path, tmp_path: Path) -> None:
    ray = RayConfig(cpus_per_worker=64)
    with pytest.raises(EnvironmentProblem, match=r"no node .* 64 CPUs and 0 GPUs \(nodes: 2 CPUs and 0 GPUs\): lower"):
        run_job(job_config(pictures, codebook, tmp_path / "out", engine="ray", ray=ray))


@pytest.mark.parametrize(
    ("config", "nodes", "units", "pool"),
    [
        ({}, [{"CPU": 2}], 9, Pool(1, 1, 0)),  # one worker a node, without GPUs
        ({}, [{"CPU": 1}], 9, Pool(1, 1, 0)),
        ({}, [{"CPU": 8}, {"CPU": 8}, {"CPU": 0}], 9, Pool(2, 1, 0)),
        ({"num_workers": 6}, [{"CPU": 8}], 4, Pool(4, 1, 0)),  # never more workers than units
        ({"num_workers": 6}, [{"CPU": 4}], 9, Pool(4, 1, 0)),  # nor than there is room for
        ({"cpus_per_worker": 0.5, "num_workers": 2}, [{"CPU": 1}], 9, Pool(2, 0.5, 0)),
        ({}, [{"CPU": 32, "GPU": 8}, {"CPU": 32}], 99, Pool(8, 1, 1)),  # one worker a GPU
        ({"gpus_per_worker": 0.5}, [{"CPU": 8, "GPU": 2}], 99, Pool(4, 1, 0.5)),
        ({"cpus_per_worker": 8}, [{"CPU": 16, "GPU": 4}], 99, Pool(2, 8, 1)),
        ({"gpus_per_worker": 0}, [{"CPU": 8, "GPU": 2}], 99, Pool(1, 1, 0)),
    ],
)
def test_the_pool_fits_the_cluster(
    config: dict[str, float], nodes: list[dict[str, float]], units: int, pool: Pool
) -> None:
    assert plan_pool(RayConfig.model_validate(config), nodes, units) == pool


@pytest.mark.parametrize("nodes", [[], [{"CPU": 0.5}], [{"CPU": 0.5}, {"CPU": 0.5, "GPU": 1}]])
def test_no_room_for_one_worker(nodes: list[dict[str, float]]) -> None:
    with pytest.raises(EnvironmentProblem, match="no node of the Ray cluster has room"):
        plan_pool(RayConfig(), nodes, 1)


@contextmanager
def killing_workers(at_most: int) -> Iterator[list[int]]:
    """SIGKILL this session's workers as soon as they are at work; yields the pids."""
    killed: list[int] = []
    done = threading.Event()

    def kill() -> None:
        while not done.wait(0.02) and len(killed) < at_most:
            for pid in set(worker_pids()) - set(killed):
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)
                break

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        yield killed
    finally:
        done.set()
        thread.join()


def worker_pids() -> list[int]:
    """Processes with an actor of ours at work on a unit.

    Ours: the parent's parent is this process, which started Ray. At work: torch is loaded for the first image.
    """
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                ours = (entry / "cmdline").read_text().startswith("ray::") and parent(
                    parent(int(entry.name))
                ) == os.getpid()
                if ours and "libtorch_cpu" in (entry / "maps").read_text():
                    found.append(int(entry.name))
            except (FileNotFoundError, ProcessLookupError):
                continue
    return found


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
