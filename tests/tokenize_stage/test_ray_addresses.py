"""Jobs on a real cluster from outside: through Ray Client (`ray://`), and through its job server (`ray job submit`).

The cluster asks for a token. It is another one than that of the other tests, and no process of its jobs is a child of ours.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from made_jobs import DRIVER, ROOT, content, job_config, make_pictures

from manifests.errors import EnvironmentProblem, InputError
from tokenize_stage.config import RayConfig, TokenSetConfig
from tokenize_stage.job import run_job

IMAGES, UNIT = 60, 4


@dataclass(frozen=True)
class Head:
    """A cluster of one node: its process, which leads a session, the port of each server, and who may come in."""

    process: subprocess.Popen[bytes]
    client: int
    jobs: int
    environment: dict[str, str]

    @property
    def job_server(self) -> str:
        return f"http://127.0.0.1:{self.jobs}"

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    gcs, client, jobs, agent = free_ports(4)
    folder = Path(tempfile.mkdtemp(prefix="ray"))  # pytest's own are too long for the names of sockets
    ours = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment = {
        **ours,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_CLIENT_RECONNECT_GRACE_PERIOD": "2",
        "GRPC_ENABLE_FORK_SUPPORT": "0",  # else Ray's server of a client may die at once, and is tried again for long
    }
    command = ["ray", "start", "--head", "--block", "--disable-usage-stats", "--num-cpus=2", f"--temp-dir={folder}"]
    command += [f"--port={gcs}", f"--ray-client-server-port={client}", f"--object-store-memory={100 << 20}"]
    command += [f"--dashboard-port={jobs}", f"--dashboard-agent-listen-port={agent}", "--include-dashboard=true"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    head = Head(process, client, jobs, environment)
    try:
        while not (answers(jobs) and listens(client)):
            assert process.poll() is None, (folder / "log").read_text()
            time.sleep(0.1)
        yield head
    finally:
        if process.poll() is None:
            head.kill()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def local(codebook: Path, tmp_path_factory: pytest.TempPathFactory) -> TokenSetConfig:
    """The job as the local engine does it."""
    folder = tmp_path_factory.mktemp("local")
    pictures = make_pictures(folder / "pictures", IMAGES)
    config = job_config(pictures, codebook, folder / "tokens", unit_size=UNIT)
    run_job(config)
    return config


@pytest.mark.parametrize("named_by", ["the recipe", "RAY_ADDRESS"])
def test_a_job_through_ray_client(head: Head, local: TokenSetConfig, tmp_path: Path, named_by: str) -> None:
    """In one of the two, tasks of the cluster decode."""
    address, environment = f"ray://127.0.0.1:{head.client}", head.environment
    ray = RayConfig(address=address)
    if named_by == "RAY_ADDRESS":
        ray, environment = RayConfig(decode="cluster"), {**environment, "RAY_ADDRESS": address}
    driver = drive(local, tmp_path / "ray", ray, environment)
    assert driver.communicate(timeout=120) == (f"encoded {IMAGES}\n", "")
    assert content(tmp_path / "ray") == content(local.output)


def test_another_version_of_ray_is_one_sentence(head: Head, local: TokenSetConfig, tmp_path: Path) -> None:
    ray = RayConfig(address=f"ray://127.0.0.1:{head.client}")
    driver = drive(local, tmp_path / "ray", ray, head.environment, before="import ray; ray.__version__ = '1.0'")
    told, noise = driver.communicate(timeout=60)
    assert re.fullmatch(
        r"EnvironmentProblem: the Ray cluster at ray://\S+ is another version \(.*\): install .*\n", told
    )
    assert noise == ""


@pytest.mark.parametrize("verb", ["tokenize", "run"])
def test_a_submitted_job(head: Head, local: TokenSetConfig, tmp_path: Path, verb: str) -> None:
    """What the environment says of other clusters does not lead it astray."""
    elsewhere = {"RAY_ADDRESS": "127.0.0.1:1", "RAY_API_SERVER_ADDRESS": "http://127.0.0.1:1"}
    submitted = submit(local, tmp_path, head.job_server, {**head.environment, **elsewhere}, verb=verb)
    assert submitted.wait(timeout=120) == 0, said(tmp_path)
    assert f"vqa: {IMAGES} images encoded" in said(tmp_path)
    assert content(tmp_path / "tokens") == content(local.output)


def test_a_submitted_job_that_is_stopped_is_not_done(head: Head, local: TokenSetConfig, tmp_path: Path) -> None:
    submitted = submit(local, tmp_path, head.job_server, head.environment, unit_size=1)
    while not (tmp_path / "tokens" / "metrics.jsonl").exists():
        assert submitted.poll() is None, said(tmp_path)
        time.sleep(0.02)
    job = re.findall(r"asvr-[0-9a-f]+", said(tmp_path))[0]
    stop = [sys.executable, "-m", "ray.scripts.scripts", "job", "stop", "--no-wait", "--address", head.job_server, job]
    subprocess.run(stop, env=head.environment, check=True, capture_output=True)
    assert submitted.wait(timeout=60) == 128 + signal.SIGTERM
    assert last_line(tmp_path) == (
        f"error: the job on {head.job_server} was stopped; what is committed is kept, and the same command goes on"
    )


def test_a_submitted_job_that_fails_says_why(head: Head, local: TokenSetConfig, tmp_path: Path) -> None:
    submitted = submit(local, tmp_path, head.job_server, head.environment, source={"kind": "folder", "path": "nothing"})
    assert submitted.wait(timeout=60) == InputError.exit_code
    assert f"error: the image folder {tmp_path}/nothing does not exist" in said(tmp_path)
    assert last_line(tmp_path).startswith(f"error: the job on {head.job_server} failed, and what it said stands above")


@pytest.mark.parametrize("answer", ["nobody", "no token"])
def test_a_job_server_that_does_not_take_the_job_is_one_sentence(
    head: Head, local: TokenSetConfig, tmp_path: Path, answer: str
) -> None:
    environment = {**head.environment, "RAY_AUTH_MODE": "disabled"}
    address = "http://127.0.0.1:1" if answer == "nobody" else head.job_server
    assert submit(local, tmp_path, address, environment).wait(timeout=60) == EnvironmentProblem.exit_code
    reason = "Failed to connect" if answer == "nobody" else "Authentication required"
    assert said(tmp_path).startswith(f"error: the job server at {address} did not take the job, or was lost ({reason}")
    assert said(tmp_path).count("\n") == 1


def test_a_cluster_that_is_lost_is_one_sentence(head: Head, local: TokenSetConfig, tmp_path: Path) -> None:
    """The last test, since it ends the cluster. Ray Client knocks for two seconds here before it gives up."""
    ray = RayConfig(address=f"ray://127.0.0.1:{head.client}")
    driver = drive(local, tmp_path / "ray", ray, head.environment, unit_size=1)
    while not (tmp_path / "ray" / "metrics.jsonl").exists():
        assert driver.poll() is None, driver.communicate()
        time.sleep(0.02)
    head.kill()
    told, _ = driver.communicate(timeout=60)  # Ray Client has things to say of its own
    assert driver.returncode == EnvironmentProblem.exit_code
    assert told.startswith(f"EnvironmentProblem: the Ray cluster at {ray.address} is lost (")
    assert told.count("\n") == 1
    kept = len(list((tmp_path / "ray" / "commits").iterdir()))
    again = local.model_copy(update={"output": str(tmp_path / "ray"), "unit_size": 1})
    assert run_job(again).encoded == IMAGES - kept


def drive(
    local: TokenSetConfig,
    output: Path,
    ray: RayConfig,
    environment: dict[str, str],
    *,
    before: str = "",
    unit_size: int = UNIT,
) -> subprocess.Popen[str]:
    """The job through the engine, in a process of its own."""
    changes = {"output": str(output), "engine": "ray", "ray": ray, "unit_size": unit_size}
    config = local.model_copy(update=changes).model_dump_json()
    return subprocess.Popen(
        [sys.executable, "-c", f"{before}\n{DRIVER}", config],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment,
    )  # fmt: skip


def submit(
    local: TokenSetConfig,
    folder: Path,
    address: str,
    environment: dict[str, str],
    *,
    verb: str = "tokenize",
    **changes: object,
) -> subprocess.Popen[bytes]:
    """`asvr tokenize --submit` of the job (or `asvr run --submit`), into `folder`."""
    keys = {"source", "geometry", "tokenizer", "unit_size", "batch_size", "torch_threads", "decode_threads", "device"}
    values = local.model_dump(mode="json", include=keys) | {"engine": "ray", "output": "tokens"} | changes
    (folder / "recipe.yaml").write_text(yaml.safe_dump({"tokenize": {"vqa": values}}))
    command = [sys.executable, "-m", "pipeline", verb, "recipe.yaml", "--submit", address]
    with (folder / "log").open("w") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, cwd=folder, env=environment)


def said(folder: Path) -> str:
    """What the submitting process and its job have written so far."""
    return (folder / "log").read_text()


def last_line(folder: Path) -> str:
    return said(folder).splitlines()[-1]


def answers(port: int) -> bool:
    """Whether the job server speaks, even if only to refuse us."""
    try:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/api/version", timeout=5).close()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def free_ports(count: int) -> list[int]:
    """Ports of the system's choice, which are none that Ray gives its workers."""
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [int(probe.getsockname()[1]) for probe in probes]
    for probe in probes:
        probe.close()
    return ports
