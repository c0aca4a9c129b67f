import hashlib
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from manifests.errors import InputError, LeaseHeld, StorageError
from manifests.storage import Store, cache_dir, file_sha256

PLACES = ["disk", "memory", "s3"]


@pytest.fixture(params=PLACES)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """An empty folder on a disk, behind fsspec, and behind Arrow's own client."""
    if request.param == "s3":
        return Store.open(request.getfixturevalue("s3"))
    return Store.open(tmp_path / "deep" / "out" if request.param == "disk" else f"memory://{tmp_path.name}/out")


PART = st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="/\\"), min_size=1, max_size=20)
NAME = st.lists(PART.filter(lambda part: part not in (".", "..") and len(part.encode()) < 200), min_size=1, max_size=4)


@given(data=st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_name_and_content_come_back(tmp_path_factory, s3, data):
    """The same names in all three, so that what one of them cannot keep is noticed."""
    rel = "/".join(data.draw(NAME))
    old, new = data.draw(st.none() | st.binary(max_size=10)), data.draw(st.binary(max_size=2000))
    offset, length = data.draw(st.integers(0, 2100)), data.draw(st.integers(0, 2100))
    folder = tmp_path_factory.mktemp("store")
    for place in (str(folder), f"memory://{folder.name}", f"{s3}/{folder.name}"):
        store = Store.open(place)
        if old is not None:
            store.write(rel, old)
        store.write(rel, memoryview(new))
        assert store.read(rel) == new
        assert store.read_range(rel, offset, length) == new[offset : offset + length]
        assert store.list() == [rel]
        assert dict(store.walk()) == {rel: store.stat(rel)}
        assert store.sizes([rel] * 9) == [store.size(rel)] * 9 == [len(new)] * 9
        with store.open_input(rel) as file:
            file.seek(min(offset, len(new)))
            assert file.read() == new[offset:]
        store.delete(rel)
        assert store.stat(rel) is None
        assert not store.exists(rel)


def test_a_large_object_is_whole(store):
    data = os.urandom(12 << 20)  # more than one part of an upload
    store.write("big.bin.zst", data)
    assert store.read("big.bin.zst") == data
    assert store.read_range("big.bin.zst", 11 << 20, 5) == data[11 << 20 : (11 << 20) + 5]


def test_an_open_file_is_written_by_pieces(store):
    data = np.random.default_rng(0).bytes(20 << 20)
    with store.scratch() as file:
        file.write(data)
        store.write("a/b", file)
    assert store.read("a/b") == data
    assert store.sha256("a/b", len(data)) == hashlib.sha256(data).hexdigest()
    assert store.sha256("a/b", 9) == hashlib.sha256(data[:9]).hexdigest()
    assert store.list() == ["a/b"]
    if store.is_local:
        assert [path.name for path in Path(store.location).iterdir()] == ["a"]  # the scratch file had no name


def test_listing_takes_a_prefix(store):
    for name in ["commits/u1", "commits/u2", "commits-old", "shards/x", "top", "a/b/c/d"]:
        store.write(name, b"")
    assert store.list("commits/") == ["commits/u1", "commits/u2"]
    assert store.list("commits") == ["commits-old", "commits/u1", "commits/u2"]
    assert store.list("commits/u") == ["commits/u1", "commits/u2"]
    assert store.list("a/") == ["a/b/c/d"]
    assert store.list("absent/") == store.list("absent/deep") == []
    assert store.list() == ["a/b/c/d", "commits-old", "commits/u1", "commits/u2", "shards/x", "top"]
    assert store.sizes(["commits/u1", "absent", "top", "shards/x", "none/x"]) == [0, None, 0, 0, None]
    store.delete("commits/u1")
    store.delete("commits/u1")
    assert not store.exists("commits/u1")
    assert store.exists("commits")
    assert not store.exists("commit")
    assert store.stat("commits") is None


@pytest.mark.parametrize("strange", ["/x", "/", "a//b", "a//", "a/../b", "a/b/."])
@pytest.mark.parametrize("below", ["", "/below"])
def test_a_key_that_is_no_path_hides_and_repeats_nothing(s3, s3_server, strange, below):
    """Arrow takes `below//x` for a folder `below` in itself, and a store would take `a//b` for `a/b`."""
    url = s3.removesuffix("/below") + below
    store, bucket = Store.open(url), s3.split("/")[2]
    for name in ("a/b", "a/c/d", "top"):
        store.write(name, name.encode())
    s3_server.client().put_object(
        Bucket=bucket, Key=f"{below}/{strange}".removeprefix("/"), Body=b"" if strange.endswith("/") else b"1"
    )
    pathless = []
    assert sorted(rel for rel, _ in store.walk("", pathless)) == ["a/b", "a/c/d", "top"]
    assert pathless == (
        [] if strange.endswith("/") else [f"{url}/{strange}"]
    )  # a key that ends so is a mark of a folder
    assert store.list() == ["a/b", "a/c/d", "top"]
    assert store.list("a/") == ["a/b", "a/c/d"]
    assert store.read("a/b") == b"a/b"


def test_many_small_files_come_in_order(store):
    names = [f"commits/u{number:03d}" for number in range(100)]
    for name in names:
        store.write(name, name.encode())
    assert [data.decode() for data in store.read_many(names)] == names
    with pytest.raises(StorageError, match="absent"):
        list(store.read_many([*names, "absent"]))


def test_a_log_grows(store):
    store.append("log", b"1\n")
    assert store.read("log") == b"1\n"
    with store.lease("tokenize"):
        store.append("log", b"2\n")
        store.append("log", b"3\n")
    assert store.read("log") == b"1\n2\n3\n"
    store.write("log", b"")
    store.append("log", b"4\n")
    assert store.read("log") == b"4\n"


def test_a_store_travels_to_another_process(s3):
    Store.open(s3).write("x", b"1")
    assert pickle.loads(pickle.dumps(Store.open(s3))).read("x") == b"1"  # noqa: S301


def test_temporary_files_are_not_listed(tmp_path):
    (tmp_path / "commits").mkdir()
    (tmp_path / "commits/.tmp-1-abc").write_bytes(b"half")
    assert Store.open(tmp_path).list() == []


@pytest.mark.parametrize("rel", ["", "/etc/passwd", "../x", "a/../../x", "a\\b", "a\0b"])
def test_a_path_stays_inside_the_store(store, rel):
    for attempt in (store.where, store.read, store.stat, store.exists, store.delete, store.open_input):
        with pytest.raises(InputError, match="not a path inside"):
            attempt(rel)


def test_locations(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Store.open("out").location == str(tmp_path / "out")
    assert Store.open(f"file://{tmp_path}/a%20b").location == f"{tmp_path}/a b"
    assert Store.open("memory://a/b/").location == "memory://a/b"
    assert Store.open("memory://a/b").where("./c//d") == "memory://a/b/c/d"
    with pytest.raises(StorageError, match="on another machine"):
        Store.open("file://other-host/x")


def test_files_follow_the_umask(tmp_path):
    old = os.umask(0o027)
    try:
        Store.open(tmp_path).write("x", b"1")
    finally:
        os.umask(old)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o640


def test_what_the_system_refuses_is_one_sentence(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    store = Store.open(tmp_path / "file" / "below")
    for attempt in (lambda: store.read("x"), lambda: store.write("x", b""), lambda: store.size("x")):
        with pytest.raises(
            StorageError, match=r"cannot (read|write) .*: (not a directory|file exists); choose"
        ) as caught:
            attempt()
        assert "\n" not in str(caught.value)
    with pytest.raises(StorageError, match="no such file or directory; check that the path is right"):
        Store.open(tmp_path).read("absent")


def test_a_full_disk_is_a_storage_error_and_leaves_the_old_content(tmp_path):
    """A file size limit makes the kernel refuse the write half way, as a full disk does."""
    code = """
import resource, signal, sys
from manifests.storage import Store
from manifests.errors import StorageError
store = Store.open(sys.argv[1])
store.write("x", b"old")
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
try:
    store.write("x", bytes(1 << 20))
except StorageError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True)
    assert "cannot write" in done.stdout
    assert "file too large" in done.stdout
    assert (tmp_path / "x").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["x"]  # noqa: PTH208


WRITER = """
import sys
from manifests.storage import Store
store = Store.open(sys.argv[1])
print("ready", flush=True)
turn = 0
while True:
    turn += 1
    store.write("x", bytes([turn % 256]) * 3_000_000)
"""


def test_a_killed_writer_leaves_old_or_new_content(tmp_path):
    for delay in (0.0, 0.02, 0.05, 0.11):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, tmp_path], stdout=subprocess.PIPE, text=True)
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
        time.sleep(delay)
        writer.kill()
        writer.wait()
        writer.stdout.close()
        store = Store.open(tmp_path)
        if store.exists("x"):
            data = store.read("x")
            assert len(data) == 3_000_000
            assert data == data[:1] * len(data)
        assert set(store.list()) <= {"x"}


HOLDER = """
import os, sys, time
from manifests.storage import Store
with Store.open(sys.argv[1]).lease("tokenize"):
    if len(sys.argv) > 2 and os.fork() == 0:
        print(os.getpid(), flush=True)
        time.sleep(60)
        os._exit(0)
    if len(sys.argv) <= 2:
        print("held", flush=True)
    time.sleep(60)
"""


def _hold(folder: Path, *extra: str) -> tuple[subprocess.Popen, str]:
    process = subprocess.Popen([sys.executable, "-c", HOLDER, folder, *extra], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, process.stdout.readline().strip()


def test_a_second_process_is_refused_and_a_killed_one_blocks_nobody(tmp_path):
    store = Store.open(tmp_path / "out")
    assert store.lease_owner() is None
    holder, _ = _hold(tmp_path / "out")
    try:
        owner = store.lease_owner()
        assert owner is not None
        assert owner.pid == holder.pid
        with (
            pytest.raises(LeaseHeld, match=f"is being written by process {holder.pid} on .*tokenize"),
            store.lease("x"),
        ):
            pass
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.communicate()
    assert store.lease_owner() is None
    with store.lease("tokenize"):
        assert store.lease_owner() is not None
        with pytest.raises(LeaseHeld), store.lease("again"):
            pass
        assert store.lease_owner() is not None
    with store.lease("once more"):
        pass


def test_a_forked_child_does_not_keep_the_lease_of_a_killed_parent(tmp_path):
    holder, child = _hold(tmp_path, "fork")
    try:
        assert Store.open(tmp_path).lease_owner() is not None
        holder.kill()
        holder.wait()
        with Store.open(tmp_path).lease("next"):
            os.kill(int(child), 0)  # the child is still there
    finally:
        os.kill(int(child), signal.SIGKILL)
        holder.communicate()


def test_asking_who_holds_the_lease_refuses_no_driver(tmp_path):
    code = "import sys\nfrom manifests.storage import Store\nwhile True: Store.open(sys.argv[1]).lease_owner()"
    asker = subprocess.Popen([sys.executable, "-c", code, tmp_path])
    try:
        for _ in range(50):
            with Store.open(tmp_path).lease("tokenize"):
                pass
    finally:
        asker.kill()
        asker.wait()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ASVR_CACHE", str(tmp_path / "cache"))
    return cache_dir() / "sha256.json"


def _file(path: Path, data: bytes, seconds_ago: int = 100) -> Path:
    path.write_bytes(data)
    when = time.time_ns() - seconds_ago * 10**9
    os.utime(path, ns=(when, when))
    return path


EMPTY = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


def test_a_hash_is_remembered_until_the_file_changes(tmp_path, cache):
    path = _file(tmp_path / "w", b"")
    assert file_sha256(path) == EMPTY
    assert EMPTY in cache.read_text()
    cache.write_text(cache.read_text().replace(EMPTY, "remembered"))
    assert file_sha256(path) == "remembered"
    (tmp_path / "link").symlink_to(path)
    assert file_sha256(tmp_path / "link") == "remembered"
    assert file_sha256(_file(path, b"", seconds_ago=50)) == EMPTY
    _file(path, b"x")
    assert file_sha256(path).startswith("2d711642")


@pytest.mark.parametrize("damage", [b"", b"{", b"[1]", b'{"w": 3}'])
def test_a_damaged_hash_cache_is_made_again(tmp_path, cache, damage):
    cache.parent.mkdir(parents=True)
    cache.write_bytes(damage)
    assert file_sha256(_file(tmp_path / "w", b"")) == EMPTY


def test_a_fresh_file_is_not_remembered(tmp_path, cache):
    file_sha256(_file(tmp_path / "w", b"", seconds_ago=0))
    assert not cache.exists()


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("ASVR_CACHE", str(tmp_path / "file"))
    assert file_sha256(_file(tmp_path / "w", b"")) == EMPTY


def test_a_missing_file_to_hash_is_a_storage_error(tmp_path, cache):
    with pytest.raises(StorageError, match="cannot read"):
        file_sha256(tmp_path / "absent")
