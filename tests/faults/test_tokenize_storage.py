"""Storage that fails in mid-run, and writers that wake up late: what is committed stays, and a rerun finishes."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import resource
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import requests
from cable import Cable
from made_jobs import content, job_config, make_pictures, make_tokenizer, start_driver
from s3_server import S3Server

from manifests.commits import commit_path, list_commits
from manifests.errors import EXIT_CODES, LeaseHeld, StorageError
from manifests.object_lease import TTL_VARIABLE
from manifests.reader import open_manifest
from manifests.storage import Store
from manifests.verify import status, verify
from tokenize_stage.config import TokenSetConfig
from tokenize_stage.job import run_job

IMAGES, UNIT = 150, 3
TTL = 3
"""Seconds; the shortest there is."""


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> TokenSetConfig:
    """A job that nobody disturbed."""
    folder = tmp_path_factory.mktemp("clean")
    pictures = make_pictures(folder / "pictures", IMAGES)
    config = job_config(pictures, make_tokenizer(folder / "tokenizer"), folder / "out", unit_size=UNIT, batch_size=2)
    run_job(config)
    return config


def test_a_full_disk(tmp_path: Path, clean: TokenSetConfig) -> None:
    with small_disk(tmp_path / "disk") as disk:
        config = clean.model_copy(update={"output": str(disk / "out")})
        driver = start_driver(config)
        told = ends_in_one_sentence(config, driver, full(disk, driver.pid))
        assert re.search(f"cannot write {disk}.*: (no space left on device|file too large); ", told)
        finishes(config, clean)


def test_no_permission_on_a_disk(tmp_path: Path, clean: TokenSetConfig) -> None:
    config = clean.model_copy(update={"output": str(tmp_path / "out")})
    driver = start_driver(config, preexec_fn=obey_permissions)
    told = ends_in_one_sentence(config, driver, read_only(tmp_path / "out"))
    assert re.search(f"cannot write {tmp_path}.*: permission denied; ", told)
    finishes(config, clean)


def test_no_permission_in_a_bucket(s3: str, s3_server: S3Server, clean: TokenSetConfig) -> None:
    config = clean.model_copy(update={"output": s3})
    told = ends_in_one_sentence(config, start_driver(config), without_rights(s3_server))
    assert re.search(f"cannot (read|write) {s3}/.*: access is denied .*; check the credentials", told)
    finishes(config, clean)


def test_a_server_that_goes_away(s3: str, s3_server: S3Server, clean: TokenSetConfig) -> None:
    config = clean.model_copy(update={"output": s3})
    with Cable(s3_server.endpoint) as cable:
        driver = start_driver(config, env={**os.environ, "AWS_ENDPOINT_URL_S3": cable.endpoint})
        told = ends_in_one_sentence(config, driver, cable.cut())
    assert re.search(f"cannot (read|write) {s3}/.*: the server cannot be reached .*; check the endpoint", told)
    finishes(config, clean)


def test_a_bucket_that_goes_away(s3: str, s3_server: S3Server, clean: TokenSetConfig) -> None:
    config = clean.model_copy(update={"output": s3})
    driver = start_driver(config)
    told = ends_in_one_sentence(config, driver, without_bucket(s3_server, s3.split("/")[2], driver))
    assert re.search(f"cannot (read|write) {s3}/.*: the bucket does not exist .*; check its name", told)
    finishes(config, clean)


def test_a_driver_that_wakes_after_another_took_its_place_changes_nothing(
    s3: str, clean: TokenSetConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(TTL_VARIABLE, str(TTL))
    config = clean.model_copy(update={"output": s3})
    store = Store.open(s3)
    late = start_driver(config)
    wait_for_commits(store, late)
    late.send_signal(signal.SIGSTOP)
    before = commits(store)
    refused(config, late.pid)
    time.sleep(TTL + 2)
    assert run_job(config).encoded == IMAGES - UNIT * len(before)
    after, manifest = commits(store), store.read("manifest.json")
    late.send_signal(signal.SIGCONT)
    told, noise = late.communicate(timeout=60)
    assert late.returncode == LeaseHeld.exit_code, told
    assert re.fullmatch(f"LeaseHeld: {s3} was taken over by another driver, .*\n", told)
    assert "Traceback" not in noise
    # Stopped between its last look at the lease and its write, it writes what it had in hand: the same unit once more.
    changed = [path for path, data in commits(store).items() if data != after[path]]
    assert len(changed) <= 1
    assert commits(store).keys() == after.keys()
    assert store.read("manifest.json") == manifest
    assert content(s3) == content(clean.output)
    assert verify(s3).problems == []
    assert status(s3).state == "complete"
    assert run_job(config).plan is None


def test_a_suspended_driver_keeps_its_lease_on_a_disk(tmp_path: Path, clean: TokenSetConfig) -> None:
    """The kernel holds it, for however long."""
    config = clean.model_copy(update={"output": str(tmp_path / "out")})
    driver = start_driver(config)
    wait_for_commits(Store.open(config.output), driver)
    driver.send_signal(signal.SIGSTOP)
    refused(config, driver.pid)
    driver.send_signal(signal.SIGCONT)
    assert driver.communicate(timeout=60)[0] == f"encoded {IMAGES}\n"
    assert content(config.output) == content(clean.output)


@pytest.mark.parametrize("place", ["disk", "s3"])
def test_a_shard_that_a_lost_worker_writes_late_is_nobodys(
    request: pytest.FixtureRequest, tmp_path: Path, clean: TokenSetConfig, place: str
) -> None:
    """Whole, or a half that its writer left behind; of a unit that is committed, or of one that is not."""
    output = str(tmp_path / "out") if place == "disk" else request.getfixturevalue("s3")
    config = clean.model_copy(update={"output": output})
    run_job(config)
    store, first = Store.open(output), open_manifest(output).shards[0]
    before = content(output), verify(output), status(output)
    shard = store.read(first.path)
    for name, data in [("u000000-0123456789abcdef", shard), ("u000999-0123456789abcdef", shard[: len(shard) // 2])]:
        store.write(f"shards/{name}.parquet", data)
    (folder := tmp_path / "out" / "shards").mkdir(parents=True, exist_ok=True)
    (folder / ".tmp-1-abc").write_bytes(shard[:100])
    assert (content(output), verify(output), status(output)) == before
    assert run_job(config).plan is None


def ends_in_one_sentence(
    config: TokenSetConfig, driver: subprocess.Popen[str], fault: AbstractContextManager[None]
) -> str:
    """Let the fault strike when a few units are committed; the driver's sentence. The fault is over then."""
    store = Store.open(config.output)
    wait_for_commits(store, driver)
    before = commits(store)
    with fault:
        told, noise = driver.communicate(timeout=120)
    assert driver.returncode == StorageError.exit_code, (told, noise)
    assert "the storage refused" in EXIT_CODES[StorageError.exit_code]
    assert re.fullmatch("StorageError: .*\n", told)
    assert "Traceback" not in noise
    assert before.items() <= commits(store).items()
    assert not store.exists("manifest.json")
    return told


def finishes(config: TokenSetConfig, clean: TokenSetConfig) -> None:
    """The same command again does what is missing, and the end is that of a run without faults."""
    store = Store.open(config.output)
    kept = commits(store)
    assert status(config.output).state == "interrupted"
    assert run_job(config).encoded == IMAGES - UNIT * len(kept)
    assert kept.items() <= commits(store).items()
    assert content(config.output) == content(clean.output)
    assert verify(config.output).problems == []


def refused(config: TokenSetConfig, owner: int) -> None:
    """A second driver is told who the first is, and writes nothing."""
    before = commits(Store.open(config.output))
    with pytest.raises(LeaseHeld, match=f"is being written by process {owner} on ") as caught:
        run_job(config)
    assert EXIT_CODES[caught.value.exit_code] == "another driver is writing to the output folder"
    assert commits(Store.open(config.output)) == before


def commits(store: Store) -> dict[str, bytes]:
    return {path: store.read(path) for path in map(commit_path, list_commits(store))}


def wait_for_commits(store: Store, driver: subprocess.Popen[str], units: int = 3) -> None:
    while len(list_commits(store)) < units:
        assert driver.poll() is None, driver.communicate()
        time.sleep(0.02)


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A file system of a few MiB where this process may mount one, else a folder."""
    folder.mkdir()
    mounted = not subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "none", folder], capture_output=True
    ).returncode
    try:
        yield folder
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", folder], check=True)


@contextlib.contextmanager
def full(disk: Path, pid: int) -> Iterator[None]:
    """Fill a small disk. A folder on a large one: no file of the process may grow, which it is told in like manner."""
    if not disk.is_mount():
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (1, 1))
        yield
        return
    filler = disk / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    yield
    filler.unlink()


@contextlib.contextmanager
def read_only(output: Path) -> Iterator[None]:
    for folder in ("commits", "shards"):
        (output / folder).chmod(0o555)
    yield
    for folder in ("commits", "shards"):
        (output / folder).chmod(0o755)


def obey_permissions() -> None:
    """Before a program starts: root's program loses the capabilities to pass over permissions."""
    drop_from_bounding_set, override, read_search = 24, 1, 2
    for capability in (override, read_search):
        ctypes.CDLL(None).prctl(drop_from_bounding_set, capability)


@contextlib.contextmanager
def without_rights(server: S3Server) -> Iterator[None]:
    """The server looks at credentials for a while, and knows nobody's."""
    free_requests(server, "0")
    yield
    free_requests(server, "inf")


def free_requests(server: S3Server, count: str) -> None:
    requests.post(f"{server.endpoint}/moto-api/reset-auth", data=count, timeout=10).raise_for_status()


@contextlib.contextmanager
def without_bucket(server: S3Server, bucket: str, driver: subprocess.Popen[str]) -> Iterator[None]:
    """The bucket is deleted, and comes back from a backup. The driver is held meanwhile, lest it refill the bucket."""
    client: Any = server.client()
    driver.send_signal(signal.SIGSTOP)
    backup = {}
    while found := client.list_objects_v2(Bucket=bucket).get("Contents"):  # again, for what it had just sent
        for key in (entry["Key"] for entry in found):
            backup[key] = client.get_object(Bucket=bucket, Key=key)["Body"].read()
            client.delete_object(Bucket=bucket, Key=key)
    client.delete_bucket(Bucket=bucket)
    driver.send_signal(signal.SIGCONT)
    yield
    client.create_bucket(Bucket=bucket)
    for key, data in backup.items():
        client.put_object(Bucket=bucket, Key=key, Body=data)
