"""The lease on an object store, between processes that share nothing but the bucket."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from manifests import object_lease
from manifests.errors import EnvironmentProblem, LeaseHeld, StorageError
from manifests.object_lease import TTL_VARIABLE
from manifests.object_store import ObjectStore
from manifests.processes import is_dead, this_process
from manifests.storage import LEASE_FILES, LEASE_NAME, Store

TTL = 3
"""Seconds; the shortest there is."""

HOLDER = """
import sys
from manifests.errors import LeaseHeld
from manifests.storage import Store
store = Store.open(sys.argv[1])
with store.lease("tokenize"):
    print("held", flush=True)
    for line in sys.stdin:
        try:
            store.check_lease()
            print("mine", flush=True)
        except LeaseHeld as error:
            print(error, flush=True)
"""


@pytest.fixture(autouse=True)
def short_ttl(monkeypatch):
    monkeypatch.setenv(TTL_VARIABLE, str(TTL))


class Holder:
    """A process that holds the lease of `location` and says what a check gives."""

    def __init__(self, location: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, location], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._line() == "held"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.communicate()

    def check(self) -> str:
        assert self.process.stdin is not None
        self.process.stdin.write("check\n")
        self.process.stdin.flush()
        return self._line()

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()


def test_a_second_process_is_refused_while_the_first_renews_and_a_killed_one_blocks_nobody(s3):
    store = Store.open(s3)
    assert store.lease_owner() is None
    with Holder(s3) as holder:
        time.sleep(TTL + 2)  # it would have expired without renewal
        owner = store.lease_owner()
        assert owner is not None
        assert owner.pid == holder.process.pid
        with (
            pytest.raises(LeaseHeld, match=f"is being written by process {holder.process.pid} on .*tokenize"),
            store.lease("x"),
        ):
            pass
        assert holder.check() == "mine"
        holder.send(signal.SIGKILL)
        holder.process.wait()
        assert store.lease_owner() is None
        with store.lease("next"):
            store.check_lease()
    assert store.lease_owner() is None
    with store.lease("once more"):
        pass
    assert set(store.list()) <= LEASE_FILES


def test_who_is_suspended_for_longer_than_the_time_to_live_loses_the_lease_and_notices(s3):
    store = Store.open(s3)
    with Holder(s3) as holder:
        holder.send(signal.SIGSTOP)
        with pytest.raises(LeaseHeld), store.lease("too early"):
            pass
        time.sleep(TTL + 3)
        assert store.lease_owner() is None
        with store.lease("the next one"):
            holder.send(signal.SIGCONT)
            said = holder.check()
            assert said.startswith(f"{s3} was taken over by process {os.getpid()} on ")
            assert "the next one" in said
            time.sleep(2)  # the other one's renewals would come now
            store.check_lease()
    with store.lease("and again"):
        store.check_lease()


def test_who_is_suspended_in_the_middle_of_a_renewal_does_not_take_the_lease_back(s3, monkeypatch):
    """Between reading that the lease is its own and writing it again, while another driver comes and goes."""
    store, read, waited = Store.open(s3), ObjectStore.read, threading.Event()

    def read_and_wait(self, rel):
        found = read(self, rel)
        if threading.current_thread().name == "lease" and not waited.is_set():
            Store.open(s3).write(LEASE_NAME, b"")
            time.sleep(TTL)
            waited.set()
        return found

    with store.lease("x"):
        monkeypatch.setattr(ObjectStore, "read", read_and_wait)
        assert waited.wait(timeout=60)
        time.sleep(1)  # the renewal would come now
        with pytest.raises(LeaseHeld, match="was taken over by another driver"):
            store.check_lease()


def test_a_renewed_lease_is_as_long_as_it_was(s3, monkeypatch):
    """Who checks it while it is replaced by a longer one would read a part of it, and take it for lost."""
    monkeypatch.setattr(object_lease, "_RENEWALS_PER_TTL", 100)
    store, renewal, sizes = Store.open(s3), 0, set()
    with store.lease("x"):
        while renewal < 12:
            sizes.add(store.size(LEASE_NAME))
            renewal = int(json.loads(store.read(LEASE_NAME))["renewal"])
    assert len(sizes) == 1


def test_who_wakes_before_anybody_came_goes_on(s3):
    with Holder(s3) as holder:
        holder.send(signal.SIGSTOP)
        time.sleep(TTL + 3)
        holder.send(signal.SIGCONT)
        assert holder.check() == "mine"
        time.sleep(1)
        with pytest.raises(LeaseHeld), Store.open(s3).lease("x"):
            pass


def test_a_holder_on_another_host_is_believed_until_it_stops_renewing(s3):
    """Whether it lives cannot be told from here, so its time to live decides, by the server's clock."""
    store = Store.open(s3)
    owner = {"host": "elsewhere", "pid": 1, "started": "today", "purpose": "tokenize", "command": "asvr"}
    claim = {"token": "t", "process": "boot ns 1 2", "ttl_s": TTL, "owner": owner}
    store.write(LEASE_NAME, json.dumps(claim).encode())
    with pytest.raises(LeaseHeld, match="process 1 on elsewhere since today"), store.lease("x"):
        pass
    time.sleep(TTL + 3)
    with store.lease("x"):
        store.check_lease()


def test_of_many_that_come_at_once_at_most_one_gets_it(s3):
    held, refused, together = [], [], threading.Barrier(6)

    def come(number: int) -> None:
        store = Store.open(s3)
        together.wait()
        try:
            with store.lease(f"driver {number}"):
                store.check_lease()
                held.append(number)
                time.sleep(1.5)
                store.check_lease()
        except LeaseHeld:
            refused.append(number)

    threads = [threading.Thread(target=come, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(held) == 1
    assert len(refused) == 5


def test_a_lease_object_that_says_nothing_is_nobodys(s3):
    store = Store.open(s3)
    for content in (b"", b"{", b"[1]", b'{"token": 1}'):
        store.write(LEASE_NAME, content)
        assert store.lease_owner() is None
    with store.lease("x"):
        store.check_lease()


def test_a_lease_that_somebody_deletes_is_lost(s3):
    store = Store.open(s3)
    with store.lease("x"):
        store.delete(LEASE_NAME)
        with pytest.raises(LeaseHeld, match="was taken over by another driver"):
            store.check_lease()


def test_a_bucket_that_is_gone_is_not_taken_for_another_driver(s3, s3_server):
    store, bucket = Store.open(s3), s3.split("/")[2]
    client = s3_server.client()
    with store.lease("x"):
        for found in client.list_objects_v2(Bucket=bucket)["Contents"]:
            client.delete_object(Bucket=bucket, Key=found["Key"])
        client.delete_bucket(Bucket=bucket)
        with pytest.raises(StorageError, match="the bucket does not exist"):
            store.check_lease()
        client.create_bucket(Bucket=bucket)


def test_a_forked_child_neither_renews_nor_gives_back(s3):
    """pyarrow's client does not survive a fork, so the child must not even try."""
    store = Store.open(s3)
    with store.lease("x"):
        if os.fork() == 0:
            os._exit(0)
        os.wait()
        store.check_lease()


@pytest.mark.parametrize("text", ["", "soon", "1", "nan", "inf", "-5"])
def test_a_wrong_time_to_live_is_one_sentence(s3, monkeypatch, text):
    monkeypatch.setenv(TTL_VARIABLE, text)
    with (
        pytest.raises(EnvironmentProblem, match=r"ASVR_LEASE_TTL is .*: give a number of seconds, 3 or more"),
        Store.open(s3).lease("x"),
    ):
        pass


def test_processes_are_told_apart():
    me = this_process()
    assert not is_dead(me)
    boot, namespace, pid, start = me.split(" ")
    assert is_dead(f"{boot} {namespace} {pid} {int(start) - 1}")  # another process that had this number
    assert is_dead(f"{boot} {namespace} 4194305 1")
    assert not is_dead(f"other-boot {namespace} 4194305 1")
    assert not is_dead(f"{boot} pid:[1] 4194305 1")
    for nonsense in ("", "a", "a b c d e", f"{boot} {namespace} x 1"):
        assert not is_dead(nonsense)
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    while os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT) is None:
        pass
    assert is_dead(f"{boot} {namespace} {child.pid} {start}")  # a zombie
    child.wait()


def test_a_driver_that_lost_the_lease_leaves_the_log_of_the_next_one_alone(s3):
    loser, winner = Store.open(s3), Store.open(s3)
    with loser.lease("x"):
        loser.append("metrics.jsonl", b"mine\n")
        loser.delete(LEASE_NAME)
        with winner.lease("y"):
            winner.append("metrics.jsonl", b"theirs\n")
    assert winner.read("metrics.jsonl") == b"theirs\n"
