"""Reading images by their locators: from many threads, in any order, and what happens when something is not as listed."""

from __future__ import annotations

import io
import os
import random
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from manifests.errors import StorageError
from manifests.image_containers import Forward, Tar, TarZst
from manifests.images import ImageSource, UnitReader, read_image
from manifests.rejects import Reject, RejectReason
from manifests.storage import Store

IMAGES = 300


@pytest.fixture(params=["disk", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Where a source is: on this disk, and in an object store."""
    if request.param == "disk":
        yield str(tmp_path)
        return
    location = f"memory://{tmp_path.name}"
    yield location
    store = Store.open(location)
    for name in store.list():
        store.delete(name)


def images(count: int = IMAGES) -> list[bytes]:
    rng = random.Random(0)
    return [rng.randbytes(rng.choice([0, 1, 700, 60_000])) for _ in range(count)]


def members(root: str, rows: list[tuple[str, str | None, int, int]]) -> pa.Table:
    """The columns of an inventory from (image_id, file, offset, size)."""
    ids, files, offsets, sizes = zip(*rows, strict=True)
    stats = [Store.open(root).stat(file) if file else None for file in files]
    return pa.table(
        {
            "image_id": list(ids),
            "size": list(sizes),
            "mtime_ns": [stat.mtime_ns if stat else 0 for stat in stats],
            "source_row": list(range(len(rows))),
            "file": pa.array(files, pa.string()).dictionary_encode(),
            "offset": list(offsets),
        }
    )


def put_all(root: str) -> tuple[list[bytes], pa.Table]:
    """The same images in a tar, a compressed tar, a Parquet file and files of their own, one unit of all of them."""
    data, store, stream = images(), Store.open(root), io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for number, image in enumerate(data):
            info = tarfile.TarInfo(f"{number}.jpg")
            info.size = len(image)
            tar.addfile(info, io.BytesIO(image))
    with tarfile.open(fileobj=io.BytesIO(stream.getvalue())) as tar:
        places = [(info.offset_data, info.size) for info in tar]
    store.write("t.tar", stream.getvalue())
    store.write("t.tar.zst", zstandard.compress(stream.getvalue()))
    sink = io.BytesIO()
    pq.write_table(pa.table({"image": data}), sink, row_group_size=70)
    store.write("t.parquet", sink.getvalue())
    rows: list[tuple[str, str | None, int, int]] = []
    for file in ("t.tar", "t.tar.zst"):
        rows += [(f"{file}!{number}", file, offset, size) for number, (offset, size) in enumerate(places)]
    rows += [(f"t.parquet!{row}", "t.parquet", row, 99) for row in range(len(data))]
    for number, image in enumerate(data[:20]):
        store.write(f"own/{number}.jpg", image)
        rows.append((f"own/{number}.jpg", None, 0, len(image)))
    return [*data, *data, *data, *data[:20]], members(root, rows)


@pytest.mark.parametrize("seed", [None, 1, 2])
def test_threads_in_any_order_get_their_images(root: str, seed: int | None) -> None:
    expected, table = put_all(root)
    order = list(range(len(expected)))
    if seed is not None:
        random.Random(seed).shuffle(order)
    with UnitReader(ImageSource(root), table, range(len(expected))) as reader, ThreadPoolExecutor(8) as pool:
        found = list(pool.map(reader.read, order))
        assert found == [expected[row] for row in order]
        again = order[:: len(order) // 6]  # a read that is tried again
        assert list(pool.map(reader.read, again)) == [expected[row] for row in again]


def test_some_of_a_container_and_what_memory_holds_meanwhile(root: str) -> None:
    expected, table = put_all(root)
    wanted = list(range(IMAGES + 7, 2 * IMAGES, 11))
    with UnitReader(ImageSource(root), table, wanted) as reader:
        for row in wanted:
            assert reader.read(row) == expected[row]
            (container,) = reader._open.values()
            assert isinstance(container, Forward)
            assert not container._kept


def test_one_image_by_its_locator(root: str) -> None:
    expected, table = put_all(root)
    store = Store.open(root)
    rows = table.to_pylist()
    for number in random.Random(3).sample(range(len(rows)), 30):
        row = rows[number]
        assert read_image(store, row["file"], row["image_id"], row["offset"], row["size"]) == expected[number]
    assert read_image(store, "own/3.jpg", "own/3.jpg", 0, len(expected[3])) == expected[3]


def reason(root: str, file: str | None, image_id: str, offset: int, length: int, **options: str) -> RejectReason:
    with pytest.raises(Reject) as caught:
        read_image(Store.open(root), file, image_id, offset, length, **options)
    assert "\n" not in caught.value.message
    return caught.value.reason


def test_what_is_not_where_a_locator_says(root: str) -> None:
    put_all(root)
    store = Store.open(root)
    end = store.size("t.tar")
    for file in ("t.tar", "t.tar.zst"):
        assert reason(root, file, "x", end - 10, 11) == "truncated"
        assert reason(root, file, "x", 2**50, 1) == "truncated"
        assert reason(root, file, "x", 0, 2**33) == "unsupported"
    assert reason(root, "t.parquet", "x", IMAGES, 1) == "missing"
    assert reason(root, "t.parquet", "x", -1, 1) == "missing"
    assert reason(root, None, "own/absent.jpg", 0, 1) == "missing"
    assert reason(root, None, "../absent.jpg", 0, 1) == "outside_root"
    assert reason(root, None, "a\\b.jpg", 0, 1) == "unreadable"
    whole = store.read("t.tar.zst")
    store.write("cut.tar.zst", whole[: len(whole) // 2])
    store.write("noise.tar.zst", b"no zstd at all")
    assert reason(root, "cut.tar.zst", "x", end - 600_000, 10) == "unreadable"
    assert reason(root, "noise.tar.zst", "x", 0, 10) == "unreadable"
    for file in ("gone.tar", "gone.tar.zst", "gone.parquet"):
        with pytest.raises(StorageError, match="gone"):
            read_image(store, file, "x", 0, 1)


def test_a_container_that_changed_since_it_was_listed_fails_the_unit(tmp_path: Path) -> None:
    expected, table = put_all(str(tmp_path))
    os.utime(tmp_path / "t.tar", ns=(1, 1))
    (tmp_path / "t.parquet").unlink()
    with UnitReader(ImageSource(str(tmp_path)), table, range(len(expected))) as reader:
        with pytest.raises(StorageError, match="has changed since"):
            reader.read(0)
        with pytest.raises(StorageError, match="is gone since"):
            reader.read(2 * IMAGES)
        assert reader.read(IMAGES) == expected[IMAGES]


def test_a_locator_names_the_container_or_the_file(tmp_path: Path) -> None:
    _, table = put_all(str(tmp_path))
    with UnitReader(ImageSource(str(tmp_path)), table, []) as reader:
        assert reader.locator(1, 5) == ("t.tar", table["offset"][1].as_py(), 5)
        assert reader.locator(table.num_rows - 1, 5) == ("own/19.jpg", 0, 5)


def test_strict_checks_of_files_on_a_disk_stay(tmp_path: Path) -> None:
    (tmp_path / "secret.jpg").write_bytes(b"secret")
    root = tmp_path / "root"
    root.mkdir()
    (root / "link.jpg").symlink_to("../secret.jpg")
    os.mkfifo(root / "pipe.jpg")
    assert reason(str(root), None, "link.jpg", 0, 6) == "outside_root"
    assert reason(str(root), None, "pipe.jpg", 0, 6) == "unreadable"


def test_a_stuttering_disk_costs_no_image(tmp_path: Path) -> None:
    expected, table = put_all(str(tmp_path))
    store = Store.open(str(tmp_path))
    places = list(zip(table["offset"].to_pylist(), table["size"].to_pylist(), strict=True))[:IMAGES]

    class Stutters(TarZst):
        failures = 0

        def next(self, offset: int, length: int) -> bytes:
            if Stutters.failures < 5 and offset > 100_000 and random.Random(offset).random() < 0.1:
                Stutters.failures += 1
                raise OSError(5, "Input/output error")
            return super().next(offset, length)

    container = Stutters(store, "t.tar.zst", places)
    for image, (offset, length) in zip(expected, places, strict=False):
        while True:
            try:
                assert container.read(offset, length) == image
                break
            except OSError:
                continue
    assert Stutters.failures == 5
    container.close()


def test_an_object_store_is_asked_once_for_many_images() -> None:
    location = "memory://windows"
    expected, table = put_all(location)
    store = Store.open(location)
    places = list(zip(table["offset"].to_pylist(), table["size"].to_pylist(), strict=True))[:IMAGES]

    class Counted(Tar):
        requests = 0

        def _fetch(self, offset: int, length: int) -> bytes:
            Counted.requests += 1
            return super()._fetch(offset, length)

    container = Counted(store, "t.tar", places)
    assert [container.read(*place) for place in places] == expected[:IMAGES]
    assert Counted.requests <= 2
    container.close()
    for name in store.list():
        store.delete(name)
