"""Inventories: each distinct image once, with its identity; what is wrong is counted and never dropped."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import zstandard
from made_containers import Place
from made_jobs import make_pictures, picture
from s3_server import S3Server

from manifests.errors import InputError
from tokenize_stage.config import FolderSource, LlavaSource, WebdatasetSource
from tokenize_stage.sources import Inventory, inventory, references, take_inventory
from tokenize_stage.sources.inventory import ABSENT, CHUNK_ROWS, INVENTORY_SCHEMA


def ids(inventory: Inventory) -> list[str]:
    return inventory.table["image_id"].to_pylist()


def llava(path: Path, root: Path) -> Inventory:
    return take_inventory(LlavaSource(path=path, image_root=root))


def turns() -> list[dict[str, str]]:
    return [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "That."}]


def test_a_folder_is_listed_by_path(tmp_path: Path) -> None:
    root = make_pictures(tmp_path / "p", 4)
    (root / "notes.txt").write_text("no picture")
    (root / ".hidden.png").write_bytes(picture(1))
    (root / "UPPER.JPEG").write_bytes(picture(2, ".jpg"))
    inventory = take_inventory(FolderSource(path=root))
    assert ids(inventory) == ["000001.jpg", "000002.png", "UPPER.JPEG", "more/000000.png", "more/000003.jpg"]
    stat = (root / "000001.jpg").stat()
    assert inventory.table.schema == INVENTORY_SCHEMA
    assert inventory.table.slice(0, 1).to_pylist() == [
        {
            "image_id": "000001.jpg",
            "size": stat.st_size,
            "mtime_ns": stat.st_mtime_ns,
            "source_row": 0,
            "file": None,
            "offset": 0,
        }
    ]
    assert inventory.errors == []


def test_a_linked_folder_is_named_and_not_followed(tmp_path: Path) -> None:
    root, elsewhere = make_pictures(tmp_path / "p", 1), make_pictures(tmp_path / "q", 2)
    (root / "link").symlink_to(elsewhere)
    inventory = take_inventory(FolderSource(path=root))
    assert inventory.images == 1
    assert "link" in inventory.errors[0].message


def test_a_link_that_leads_nowhere_is_an_input(tmp_path: Path) -> None:
    root = make_pictures(tmp_path / "p", 1)
    (root / "loop.png").symlink_to("loop.png")
    (root / "dangling.png").symlink_to("nothing.png")
    inventory = take_inventory(FolderSource(path=root))
    assert inventory.table["image_id"].to_pylist()[:2] == ["dangling.png", "loop.png"]
    assert inventory.table["size"].to_pylist()[:2] == [ABSENT, ABSENT]


def test_a_name_that_is_not_text_is_named(tmp_path: Path) -> None:
    root = make_pictures(tmp_path / "p", 1)
    Path(os.fsdecode(os.fsencode(root) + b"/\xff.png")).write_bytes(picture(3))
    inventory = take_inventory(FolderSource(path=root))
    assert inventory.images == 1
    assert "UTF-8" in inventory.errors[0].message


def test_an_absent_or_empty_folder_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        take_inventory(FolderSource(path=tmp_path / "nowhere"))
    with pytest.raises(InputError, match="no picture"):
        take_inventory(FolderSource(path=tmp_path))


@pytest.mark.parametrize("form", ["json", "jsonl", "jsonl.zst"])
def test_llava_images_come_once_in_order_of_first_appearance(tmp_path: Path, form: str) -> None:
    root = make_pictures(tmp_path / "p", 4)
    records = [
        {"id": "0", "image": "more/000003.jpg", "conversations": turns()},
        {"id": "1", "conversations": turns()},
        {"id": "2", "image": ["000001.jpg", "./more//000003.jpg"], "conversations": turns()},
        {"id": "3", "image": "000001.jpg", "conversations": turns()},
    ]
    text = json.dumps(records) if form == "json" else "".join(json.dumps(record) + "\n" for record in records)
    data = text.encode()
    path = tmp_path / f"data.{form}"
    path.write_bytes(zstandard.compress(data) if form.endswith("zst") else data)
    inventory = llava(path, root)
    assert ids(inventory) == ["more/000003.jpg", "000001.jpg"]
    assert inventory.table["source_row"].to_pylist() == [0, 2]


def test_bad_records_are_errors_and_bad_references_stay_inputs(tmp_path: Path) -> None:
    root = make_pictures(tmp_path / "p", 2)
    records = [
        {"id": "0", "image": "more/000000.png", "conversations": turns()},
        {"id": "1", "image": 7, "conversations": turns()},
        {"id": "2", "image": "../secret.png", "conversations": turns()},
        {"id": "3", "image": "/etc/hostname", "conversations": turns()},
        {"id": "4", "image": "absent.png", "conversations": turns()},
        "not a record",
    ]
    path = tmp_path / "data.json"
    path.write_text(json.dumps(records))
    inventory = llava(path, root)
    assert ids(inventory) == ["more/000000.png", "../secret.png", "/etc/hostname", "absent.png"]
    assert [error.row for error in inventory.errors] == [1, 5]
    assert inventory.table["size"].to_pylist()[3] == -1


def test_a_file_without_images_is_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"id": "1", "conversations": turns()}) + "\n{broken\n")
    with pytest.raises(InputError, match=r"no record of .* has an image"):
        llava(path, tmp_path)
    with pytest.raises(InputError):
        llava(tmp_path / "absent.json", tmp_path)


def test_many_references_into_a_bucket_cost_one_listing(place: Place) -> None:
    for number in range(5):
        place.put(f"images/{number}.png", picture(number))
    names = [f"{number}.png" for number in range(1_200)]
    records = "".join(json.dumps({"image": name}) + "\n" for name in [*names, "../out.png", "0.png"])
    source = LlavaSource(path=place.put("data.jsonl", records.encode()), image_root=f"{place.location}/images")
    inventory = take_inventory(source)
    assert ids(inventory) == [*names, "../out.png"]
    sizes = inventory.table["size"].to_pylist()
    assert sizes[:5] == [len(picture(number)) for number in range(5)]
    assert set(sizes[5:]) == {ABSENT}


def test_ids_are_joined_chunk_by_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ids of 100 million images are more text than one Arrow string array holds, so that no step may need one."""
    assert CHUNK_ROWS * len("/".join(["x" * 255] * 16)) < 2**31  # no path is longer on Linux
    for module in (inventory, references):
        monkeypatch.setattr(module, "CHUNK_ROWS", 100)
    place = Place(f"memory://{tmp_path.name}")
    for number in range(250):
        place.put(f"images/{number}.png", b"x" * number)
    names = [f"{number}.png" for number in np.random.default_rng(0).permutation(1_250)]
    records = "".join(json.dumps({"image": name}) + "\n" for name in names)
    source = LlavaSource(path=place.put("data.jsonl", records.encode()), image_root=f"{place.location}/images")
    table = take_inventory(source).table
    assert table["image_id"].type == pa.string()
    assert [len(chunk) for chunk in table["image_id"].chunks] == [100] * 12 + [50]
    found = dict(zip(table["image_id"].to_pylist(), table["size"].to_pylist(), strict=True))
    assert found == {f"{number}.png": number if number < 250 else ABSENT for number in range(1_250)}
    times = [
        size == ABSENT or time > 0 for size, time in zip(found.values(), table["mtime_ns"].to_pylist(), strict=True)
    ]
    assert all(times)


def test_a_folder_in_a_bucket(place: Place) -> None:
    for name in ("b.png", "a/x.JPG", "a/.hidden.png", ".git/y.png", "notes.txt"):
        place.put(name, picture(1))
    inventory = take_inventory(FolderSource(path=place.location))
    assert ids(inventory) == ["a/x.JPG", "b.png"]
    assert inventory.table["size"].to_pylist() == [len(picture(1))] * 2
    with pytest.raises(InputError):
        take_inventory(FolderSource(path=f"{place.location}/nowhere"))


PATHLESS = ["/b.png", "more//x.png", "more/./x.png", "more/../x.png", "./x.png"]


def test_an_object_whose_key_is_no_path_is_a_source_error(s3: str, s3_server: S3Server) -> None:
    """A path in its place would be that of another object, which is listed once, as all others are."""
    put_keys(s3, s3_server, [*PATHLESS, "more//notes.txt", "b.png", "more/x.png"])
    inventory = take_inventory(FolderSource(path=s3))
    assert ids(inventory) == ["b.png", "more/x.png"]
    named = {error.message.partition(" is no path")[0] for error in inventory.errors}
    assert named == {f"{s3}/{key}" for key in PATHLESS}
    assert len(inventory.errors) == len(PATHLESS)


@pytest.mark.parametrize("kind", ["folder", "webdataset"])
def test_a_bucket_of_such_objects_alone_says_so(s3: str, s3_server: S3Server, kind: str) -> None:
    put_keys(s3, s3_server, ["/b.png", "/b.tar"])
    source = FolderSource(path=s3) if kind == "folder" else WebdatasetSource(path=s3)
    with pytest.raises(InputError, match=rf"{s3} \({s3}//b.* is no path, .*\): correct source.path"):
        take_inventory(source)


def put_keys(s3: str, server: S3Server, keys: list[str]) -> None:
    bucket, folder = s3.removeprefix("s3://").split("/")
    for key in keys:
        server.client().put_object(Bucket=bucket, Key=f"{folder}/{key}", Body=picture(1))
