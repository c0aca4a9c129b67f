"""The Ray engine gives the bytes of the local one, survives lost workers, and says when a cluster is too small."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import cast

import pyarrow as pa
import pytest
import ray
from bad_inputs import make_bad_inputs
from made_jobs import content, job_config, make_pictures, start_driver
from pydantic import ValidationError
from ray._private.node import Node
from ray.cluster_utils import Cluster

from manifests.errors import EnvironmentProblem, FingerprintMismatch, StorageError
from manifests.reader import open_manifest
from tokenize_stage.config import Device, RayConfig
from tokenize_stage.engines import ray_pool
from tokenize_stage.engines.ray_pool import CROWDED_SECONDS, Member, WorkerPool
from tokenize_stage.engines.room import WorkerSize, room_for, worker_device, worker_size, workers_wanted
from tokenize_stage.job import run_job
from tokenize_stage.order import WorkOrder
from tokenize_stage.progress import JobProgress
from tokenize_stage.units import Unit

pytestmark = pytest.mark.usefixtures("ray_cluster")


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
    assert {state.units_done for state in seen} == set(range(8))
    assert max(state.workers for state in seen) == workers
    assert seen[-1].by_worker.keys() <= named(tmp_path / "ray")
    assert 1 <= len(named(tmp_path / "ray")) <= workers
    assert not any(name.endswith(f":{os.getpid()}") for name in named(tmp_path / "ray"))
    assert not (tmp_path / "ray" / "progress.json").exists()


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
        pytest.raises(EnvironmentProblem, match="a Ray worker died 4 times on unit u000000"),
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


def test_nodes_that_die_and_nodes_that_join(codebook: Path, tmp_path: Path, ray_cluster: Cluster) -> None:
    """The only node with room for a worker dies; the job waits for another one and loses nothing."""
    pictures = make_pictures(tmp_path / "pictures", 200)
    run_job(job_config(pictures, codebook, tmp_path / "local", unit_size=2))
    ray = RayConfig(cpus_per_worker=3, wait_for_nodes=60)
    config = job_config(pictures, codebook, tmp_path / "ray", engine="ray", ray=ray, unit_size=2)
    with ChangingNodes(ray_cluster, lambda: bool(named(Path(config.output)))) as nodes:
        run_job(config, progress=nodes)
    assert nodes.died
    assert len(named(Path(config.output))) == 2
    assert content(tmp_path / "ray") == content(tmp_path / "local")


def test_decoding_on_other_nodes(codebook: Path, tmp_path: Path, ray_cluster: Cluster) -> None:
    """Views come from Ray tasks, one of whose nodes dies: the same shards, rejects and all."""
    pictures = make_pictures(tmp_path / "pictures", 200)
    make_bad_inputs(pictures / "bad")
    changes = {"unit_size": 16, "max_reject_rate": 0.5}
    run_job(job_config(pictures, codebook, tmp_path / "local", **changes))
    ray = RayConfig(num_workers=1, decode="cluster")
    config = job_config(pictures, codebook, tmp_path / "ray", engine="ray", ray=ray, decode_threads=4, **changes)
    with ChangingNodes(ray_cluster, lambda: bool(named(Path(config.output)))) as nodes:
        run_job(config, progress=nodes)
    assert nodes.died
    assert content(tmp_path / "ray") == content(tmp_path / "local")


def test_a_cluster_without_room_is_one_sentence(pictures: Path, codebook: Path, tmp_path: Path) -> None:
    ray = RayConfig(cpus_per_worker=64, wait_for_nodes=1)
    began = time.monotonic()
    with pytest.raises(EnvironmentProblem, match=r"no node .* 64 CPUs, 0 GPUs \(nodes: 2 CPUs, 0 GPUs\): ask for less"):
        run_job(job_config(pictures, codebook, tmp_path / "out", engine="ray", ray=ray))
    assert 1 < time.monotonic() - began < 15


def test_an_address_where_nobody_listens_is_one_sentence(pictures: Path, codebook: Path, tmp_path: Path) -> None:
    """In a process of its own, which has no Ray yet; Ray itself would try for ten minutes."""
    config = job_config(pictures, codebook, tmp_path / "out", engine="ray", ray=RayConfig(address="ray://127.0.0.1:1"))
    driver = start_driver(config)
    told, noise = driver.communicate(timeout=60)
    assert driver.returncode == EnvironmentProblem.exit_code
    assert told.startswith("EnvironmentProblem: no Ray cluster lets us in at ray://127.0.0.1:1 (")
    assert noise == ""


def test_a_signal_ends_the_job_and_its_ray(codebook: Path, tmp_path: Path) -> None:
    pictures = make_pictures(tmp_path / "pictures", 400)
    ray = RayConfig(address="local")
    config = job_config(pictures, codebook, tmp_path / "out", engine="ray", ray=ray, unit_size=2)
    driver = start_driver(config, env={**os.environ, "RAY_ADDRESS": ""})
    while not named(Path(config.output)):
        assert driver.poll() is None, driver.communicate()
        time.sleep(0.05)
    started = descendants(driver.pid)
    assert len(started) > 3
    driver.send_signal(signal.SIGTERM)
    told, noise = driver.communicate(timeout=20)
    assert driver.returncode == 143
    assert told.startswith("Interrupted: stopped by a signal with ")
    assert noise == ""
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in started))
    kept = len(list((Path(config.output) / "commits").iterdir()))
    assert run_job(config.model_copy(update={"engine": "local"})).encoded == 400 - 2 * kept


@pytest.mark.parametrize(
    ("config", "nodes", "units", "workers"),
    [
        ({}, [{"CPU": 2}], 9, 1),  # one worker a node, without GPUs
        ({}, [{"CPU": 8}, {"CPU": 8}, {"CPU": 0}], 9, 2),
        ({"num_workers": 6}, [{"CPU": 8}], 4, 4),  # never more workers than units
        ({"num_workers": 6}, [{"CPU": 4}], 9, 6),  # two of them wait for a node
        ({"num_workers": 6}, [{"CPU": 0.5}], 9, 0),
        ({"cpus_per_worker": 0.5, "num_workers": 2}, [{"CPU": 1}], 9, 2),
        ({}, [{"CPU": 32, "GPU": 8}, {"CPU": 32}], 99, 8),  # one worker a GPU
        ({"gpus_per_worker": 0.5}, [{"CPU": 8, "GPU": 2}], 99, 4),
        ({"cpus_per_worker": 8}, [{"CPU": 16, "GPU": 4}], 99, 2),
        ({"gpus_per_worker": 0}, [{"CPU": 8, "GPU": 2}], 99, 1),
        ({"gpus_per_worker": 1}, [{"CPU": 8}], 99, 0),
        ({"memory_per_worker": 3}, [{"CPU": 8, "GPU": 2, "memory": 4 << 30}], 99, 1),
        ({"memory_per_worker": 3}, [{"CPU": 8, "memory": 2 << 30}], 99, 0),
        ({"decode": "cluster"}, [{"CPU": 1}], 9, 0),  # the worker and its decode task
        ({"decode": "cluster"}, [{"CPU": 2}], 9, 1),
        ({"decode": "cluster"}, [{"CPU": 1}, {"CPU": 1}, {"CPU": 1}], 9, 2),
        ({"decode": "cluster", "num_workers": 6}, [{"CPU": 4}], 9, 3),
        ({"decode": "cluster"}, [{"CPU": 8, "GPU": 8}, {"CPU": 32}], 99, 8),
        ({"decode": "cluster"}, [{"CPU": 8, "GPU": 8}], 99, 7),
        ({"decode": "cluster", "num_workers": 8}, [{"CPU": 8, "GPU": 8}], 99, 7),  # an eighth would take the last core
        ({"decode": "cluster", "num_workers": 16}, [{"CPU": 8, "GPU": 8}, {"CPU": 2}], 99, 16),  # these wait for a GPU
        (
            {"decode": "cluster", "num_workers": 6, "cpus_per_worker": 0.5},
            [{"CPU": 2}, {"CPU": 2}],
            99,
            5,
        ),  # not 3 and 3
        ({}, [], 9, 0),
    ],
)
def test_the_pool_fits_the_cluster(
    config: dict[str, object], nodes: list[dict[str, float]], units: int, workers: int
) -> None:
    asked = RayConfig.model_validate(config)
    size = worker_size(asked, nodes)
    assert workers_wanted(asked, size, nodes, units) == workers
    assert bool(room_for(size, nodes)) == bool(workers)


def test_workers_make_way_where_a_lost_node_had_the_cores_to_decode(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two workers hold both cores that are left: one of them goes, and its units are begun again first."""
    stopped: list[str] = []
    monkeypatch.setattr(ray_pool.ray, "kill", stopped.append)
    units = [Unit(name, pa.table({})) for name in "abc"]
    pool = WorkerPool(cast("WorkOrder", None), RayConfig(decode="cluster"), units)
    for name in ("one", "two"):
        pool._members.append(Member(name, None, units={name: pool._waiting.pop()}))
    for now in (100.0, 101.0, 101.0 + CROWDED_SECONDS - 2):  # the loss of more of them may come to be known
        pool._leave_cores(now, room=1)
        assert stopped == []
    pool._leave_cores(100.0 + CROWDED_SECONDS, room=1)
    assert stopped == ["two"]
    assert [member.actor for member in pool._members] == ["one"]
    assert [pool._waiting.pop().name for _ in range(len(pool._waiting))] == ["b", "c"]
    pool._leave_cores(200.0, room=1)
    assert stopped == ["two"]


@pytest.mark.parametrize(
    ("asked", "config", "nodes", "device"),
    [
        ("auto", {"gpus_per_worker": 0}, [{"CPU": 8, "GPU": 2}], "cpu"),
        ("auto", {}, [{"CPU": 8}], "cpu"),
        ("auto", {}, [{"CPU": 8, "GPU": 2}, {"CPU": 8}], "auto"),
        ("auto", {"gpus_per_worker": 0.25}, [{"CPU": 8, "GPU": 2}], "auto"),
        ("cpu", {"gpus_per_worker": 1}, [{"CPU": 8, "GPU": 2}], "cpu"),
        (
            "cuda",
            {"gpus_per_worker": 0},
            [{"CPU": 8, "GPU": 2}],
            "cuda",
        ),  # asked for, so it is not for us to know better
    ],
)
def test_a_worker_without_a_gpu_of_its_own_computes_on_the_cpu(
    asked: Device, config: dict[str, object], nodes: list[dict[str, float]], device: str
) -> None:
    assert worker_device(asked, worker_size(RayConfig.model_validate(config), nodes).gpus) == device


@pytest.mark.gpu
def test_on_a_gpu_a_worker_that_reserved_none_leaves_it_alone(pictures: Path, codebook: Path, tmp_path: Path) -> None:
    ray = RayConfig(gpus_per_worker=0)
    run_job(job_config(pictures, codebook, tmp_path / "out", device="auto", engine="ray", ray=ray))
    [numerics] = open_manifest(tmp_path / "out").manifest.provenance.numerics
    assert "cpu" in numerics.device


@pytest.mark.parametrize("address", ["auto", "local", "ray://head:10001"])
def test_addresses(address: str) -> None:
    assert RayConfig(address=address).address == address


@pytest.mark.parametrize("address", ["head:10001", "ray://head", "ray:head:10001", ""])
def test_no_address(address: str) -> None:
    with pytest.raises(ValidationError, match="address"):
        RayConfig(address=address)


def test_sizes_are_told_in_words() -> None:
    assert str(WorkerSize(8, 1, 3 << 30, 1)) == "8 CPUs, 1 GPUs, 3 GiB of memory and 1 core to decode"


def named(output: Path) -> set[str]:
    """The workers that have finished a unit."""
    path = output / "metrics.jsonl"
    return {json.loads(line)["worker"] for line in path.read_text().splitlines()} if path.exists() else set()


class ChangingNodes:
    """A second node of the cluster that dies during a job, and a third one that joins then; listens to its progress."""

    def __init__(self, cluster: Cluster, when: Callable[[], bool]) -> None:
        self.cluster, self.when = cluster, when
        self.died = False

    def __call__(self, _: JobProgress) -> None:
        if not self.died and self.when():
            self.cluster.remove_node(self.node, allow_graceful=False)
            self.died = True
            self.node = self._join()

    def __enter__(self) -> ChangingNodes:
        self.node = self._join()
        return self

    def __exit__(self, *_: object) -> None:
        self.cluster.remove_node(self.node)
        # Ray goes on listing a node for a while; the next test is to find the head alone.
        wait_until(lambda: sum(node["Alive"] for node in ray.nodes()) == 1)

    def _join(self) -> Node:
        return self.cluster.add_node(num_cpus=3, object_store_memory=100 << 20)


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def descendants(pid: int) -> set[int]:
    """The processes below this one."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(FileNotFoundError, ProcessLookupError):
                parents[int(entry.name)] = parent(int(entry.name))
    found, above = set(), {pid}
    while above:
        above = {child for child, up in parents.items() if up in above} - found
        found |= above
    return found


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
