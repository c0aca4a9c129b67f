"""The webdataset source: ids, order, what is carried along, what is wrong with tars; on a disk and in an object store."""

from __future__ import annotations

import io
import os
import tarfile
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pytest
from made_containers import Place, samples, tar_of, zst
from made_jobs import picture

from manifests.errors import InputError
from manifests.images import UnitReader
from tokenize_stage.config import WebdatasetSource
from tokenize_stage.sources import INVENTORY_SCHEMA, Inventory, take_inventory
from tokenize_stage.sources.inventory import Container


def inventory_of(path: str | list[str], *carry: str) -> Inventory:
    return take_inventory(WebdatasetSource(path=path, carry=carry))


def ids(inventory: Inventory) -> list[str]:
    return inventory.table["image_id"].to_pylist()


def contents(inventory: Inventory) -> dict[str, bytes]:
    """The bytes of every image, read as a worker reads them."""
    rows = range(inventory.images)
    with UnitReader(inventory.images_at, inventory.table, rows) as reader:
        return {reader.name(row): reader.read(row) for row in rows}


def test_pictures_of_all_tars_in_order(place: Place) -> None:
    one, two = samples(3), {f"more/{name}": data for name, data in samples(2, first=7).items()}
    place.put("b.tar", tar_of(one))
    place.put("a/c.tar.zst", zst(tar_of(two)))
    place.put("notes.txt", b"not a tar")
    inventory = inventory_of(place.location)
    assert ids(inventory) == [
        "a/c.tar.zst!more/000007", "a/c.tar.zst!more/000008", "b.tar!000000", "b.tar!000001", "b.tar!000002",
    ]  # fmt: skip
    assert inventory.table.schema == INVENTORY_SCHEMA
    assert inventory.table["source_row"].to_pylist() == [0, 1, 2, 3, 4]
    assert inventory.table["size"].to_pylist()[2] == len(one["000000.png"])
    assert set(inventory.table["mtime_ns"].to_pylist()[2:]) == {place.store.stat("b.tar").mtime_ns}
    assert inventory.errors == []
    assert [(one.file, one.rows) for one in inventory.containers] == [("a/c.tar.zst", 2), ("b.tar", 3)]
    pictures = [data for name, data in [*two.items(), *one.items()] if not name.endswith(".txt")]
    assert list(contents(inventory).values()) == pictures


def test_ids_depend_on_nothing_that_comes_after(place: Place) -> None:
    members = [
        ("x.jpg", picture(1, ".jpg")),
        ("x.PNG", picture(2)),
        ("y.left.png", picture(3)),
        ("./y.png", picture(4)),
        ("y.right.png", picture(5)),
        ("d.1/z.Jpeg", picture(6, ".jpg")),
        ("._x.jpg", b"what macOS puts beside files"),
        (".webp", b"hidden"),
        ("x.gif", b"no kind that is read"),
        ("later.webp", b"webp"),
        ("x.webp", b"the key again, not beside its like"),
    ]
    expected = ["x", "x.PNG", "y.left.png", "y", "y.right.png", "d.1/z", "later", "x.webp"]
    for count in range(1, len(members) + 1):
        place.put("t.tar", tar_of(members[:count]))
        found = ids(inventory_of(place.location))
        assert found == [f"t.tar!{name}" for name in expected[: len(found)]]
    assert len(found) == len(expected)


def test_what_is_carried_along(place: Place) -> None:
    members = [
        ("a.jpg", picture(1, ".jpg")),
        ("a.txt", "ein Wörtchen".encode()),
        ("b.json", b'{"x": 1}'),
        ("b.png", picture(2)),
        ("c.png", picture(3)),
        ("c.second.png", picture(4)),
        ("a.json", b"{}"),
        ("c.txt", b""),
        ("huge.png", picture(5)),
        ("huge.txt", b"x" * (2**20 + 1)),
    ]
    place.put("plain.tar", tar_of(members))
    place.put("small.tar.zst", zst(tar_of(members[:3])))
    inventory = inventory_of(place.location, "txt", ".JSON")
    assert inventory.images_at.carry == ("txt", "json")
    rows = [5, 2, 0, 1, 3, 4]
    with UnitReader(inventory.images_at, inventory.table, range(inventory.images), carried=rows) as reader:
        extra = reader.carried(rows)
        assert [reader.read(row)[:4] for row in (5, 0)]
    assert extra is not None
    assert extra.schema == pa.schema([("txt", pa.string()), ("json", pa.string())])
    assert dict(zip(rows, extra["txt"].to_pylist(), strict=True)) == {
        0: "ein Wörtchen", 1: None, 2: "", 3: "", 4: None, 5: "ein Wörtchen",
    }  # fmt: skip
    assert dict(zip(rows, extra["json"].to_pylist(), strict=True)) == {
        0: "{}", 1: '{"x": 1}', 2: None, 3: None, 4: None, 5: None,
    }  # fmt: skip
    assert [error.message.count("huge.txt") for error in inventory.errors] == [1]


@pytest.mark.parametrize("carried", [(), (3,)])
def test_texts_that_nobody_asks_for_are_not_held(tmp_path: Path, carried: tuple[int, ...]) -> None:
    texts = [f"{number}".encode() * 2**20 for number in range(8)]
    members = [
        (f"{n}.{kind}", data) for n, text in enumerate(texts) for kind, data in (("png", picture(n)), ("txt", text))
    ]
    (tmp_path / "long.tar.zst").write_bytes(zst(tar_of(members)))
    inventory = inventory_of(str(tmp_path), "txt")
    rows = range(inventory.images)
    with UnitReader(inventory.images_at, inventory.table, rows, carried=carried) as reader:
        tracemalloc.start()
        try:
            assert [reader.read(row) for row in rows] == [picture(row) for row in rows]
            held, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert held < (len(carried) + 3) * 2**20  # what is decompressed ahead among it
        extra = reader.carried(carried)
    assert extra is not None
    assert extra["txt"].to_pylist() == [texts[row].decode() for row in carried]


def test_members_that_are_no_pictures_of_their_own_are_named(place: Place) -> None:
    stream = io.BytesIO()
    good = picture(1, ".jpg")
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.GNU_FORMAT) as tar:

        def add(name: str, kind: bytes = tarfile.REGTYPE, data: bytes = b"", link: str = "") -> None:
            info = tarfile.TarInfo(name)
            info.type, info.size, info.linkname = kind, len(data), link
            tar.addfile(info, io.BytesIO(data))

        add("first.jpg", data=good)
        add("hard.jpg", tarfile.LNKTYPE, link="first.jpg")
        add("nowhere.jpg", tarfile.LNKTYPE, link="absent.jpg")
        add("soft.jpg", tarfile.SYMTYPE, link="/etc/hostname")
        add("device.png", tarfile.CHRTYPE)
        add("pipe.webp", tarfile.FIFOTYPE)
        add("folder.jpg", tarfile.DIRTYPE)
        add("first.jpg", data=picture(2, ".jpg"))
        add("/etc/absolute.jpg", data=good)
        add("../../outside.jpg", data=good)
        add("l" * 300 + ".jpg", data=good)
        add("empty.jpg")
        add("\udcff.jpg", data=good)
    place.put("t.tar", stream.getvalue())
    inventory = inventory_of(place.location)
    names = ["first", "hard", "/etc/absolute", "../../outside", "l" * 300, "empty"]
    assert ids(inventory) == [f"t.tar!{name}" for name in names]
    assert list(contents(inventory).values()) == [*[good] * 5, b""]
    messages = [error.message for error in inventory.errors]
    assert len(messages) == 6
    for message, word in zip(
        messages, ["absent.jpg", "symbolic link", "device", "pipe", "second member 'first.jpg'", "UTF-8"], strict=True
    ):
        assert word in message
        assert message.startswith(f"{place.location}/t.tar")
        assert "\n" not in message
        message.encode()


@pytest.mark.parametrize("pack", [bytes, zst])
def test_a_truncated_tar_is_its_good_samples_and_one_error(place: Place, pack: type[bytes]) -> None:
    name = "cut.tar" if pack is bytes else "cut.tar.zst"
    data = tar_of(samples(6))
    place.put(name, pack(data[: len(data) * 2 // 3]))
    place.put("whole.tar", tar_of(samples(2)))
    place.put("page.tar", b"<html>404</html>" * 100)
    place.put("nothing.tar", b"")
    inventory = inventory_of(place.location)
    cut = [name for name in ids(inventory) if name.startswith("cut")]
    assert 1 < len(cut) < 6
    assert len(inventory.errors) == 3
    assert [(one.file, len(one.errors)) for one in inventory.containers] == [
        (name, 1), ("nothing.tar", 1), ("page.tar", 1), ("whole.tar", 0),
    ]  # fmt: skip
    assert {error.row for error in inventory.errors} == {-1}
    for image_id, content in contents(inventory).items():
        suffix = ".jpg" if int(image_id[-6:]) % 2 else ".png"
        assert content == picture(int(image_id[-6:]), suffix)


def test_patterns_and_lists(place: Place) -> None:
    for number in range(12):
        place.put(f"deep/er/t-{number:03d}.tar", tar_of(samples(1, first=number)))
    place.put("deep/val.tar", tar_of(samples(1)))
    at = place.location
    assert ids(inventory_of(f"{at}/deep/er/t-{{000..002}}.tar")) == [f"t-{n:03d}.tar!{n:06d}" for n in range(3)]
    assert len(ids(inventory_of(f"{at}/deep/*/t-00[13]*.tar"))) == 2
    assert len(ids(inventory_of(f"{at}/**/*.tar"))) == 13
    assert len(ids(inventory_of(f"{at}/d?ep/*.tar"))) == 1
    assert len(ids(inventory_of(f"{at}/deep/*.tar"))) == 1
    two = inventory_of([f"{at}/deep/val.tar", f"{at}/deep/er/t-{{011,003}}.tar", f"{at}/deep/er/t-003.tar"])
    assert ids(two) == ["val.tar!000000", "er/t-011.tar!000011", "er/t-003.tar!000003"]
    assert len(contents(two)) == 3


def test_a_source_that_is_not_there_is_one_sentence(place: Place) -> None:
    place.put("t.tar", tar_of({"a.txt": b"no picture"}))
    at = place.location
    for path, words in (
        (f"{at}/t-{{0..3}}.tar", "t-0.tar does not exist"),
        (f"{at}/x*.tar", "no file"),
        (f"{at}/nowhere", "nowhere"),
        (f"{at}/t-{{0..99999999}}.tar", "names"),
        (at, "no tar .* has a picture"),
        ([f"{at}/t.tar", "/tmp/other.tar"], "correct source.path|different disks"),
    ):
        with pytest.raises(InputError, match=words) as caught:
            inventory_of(path)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="names nothing"):
        inventory_of([])
    with pytest.raises(ValueError, match="column of the shards"):
        inventory_of(at, "codes")


def test_a_tar_that_is_known_is_not_read_again(place: Place) -> None:
    place.put("a.tar", tar_of(samples(2)))
    place.put("b.tar", tar_of(samples(3))[:-3000])
    first = inventory_of(place.location, "txt")

    class Known:
        asked: tuple[str, ...] = ()

        def rows(self, file: str, size: int, mtime_ns: int) -> tuple[pa.Table, Container] | None:
            self.asked += (file,)
            at = 0
            for one in first.containers:
                if (one.file, one.size, one.mtime_ns) == (file, size, mtime_ns):
                    return first.table.slice(at, one.rows), one
                at += one.rows
            return None

    known = Known()
    place.put("0.tar", tar_of(samples(1)))
    again = take_inventory(WebdatasetSource(path=place.location, carry=("txt",)), known)
    assert sorted(known.asked) == ["0.tar", "a.tar", "b.tar"]
    fresh = inventory_of(place.location, "txt")
    assert again.table.to_pylist() == fresh.table.to_pylist()
    assert (again.errors, again.containers) == (fresh.errors, fresh.containers)


def test_a_linked_folder_of_tars_is_named_and_a_linked_tar_is_read(tmp_path: Path) -> None:
    place = Place(str(tmp_path / "here"))
    Place(str(tmp_path / "there")).put("blob", tar_of(samples(2)))
    place.put("a.tar", tar_of(samples(1)))
    (tmp_path / "here" / "b.tar").symlink_to("../there/blob")
    (tmp_path / "here" / "linked").symlink_to("../there")
    (tmp_path / "here" / "c.tar").symlink_to("nowhere")
    os.mkfifo(tmp_path / "here" / "pipe.tar")
    inventory = inventory_of(place.location)
    assert len(contents(inventory)) == 3
    assert sorted("not followed" in error.message for error in inventory.errors) == [False, False, True]
