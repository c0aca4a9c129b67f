"""The parquet source: bytes, Hugging Face structs, columns of paths, Arrow files; ids, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest
from made_containers import Place, hf_images, parquet_of, write_arrow
from made_jobs import make_pictures, picture

from manifests.errors import InputError
from manifests.images import UnitReader
from manifests.rejects import Reject
from tokenize_stage.config import ParquetSource
from tokenize_stage.sources import INVENTORY_SCHEMA, Inventory, take_inventory
from tokenize_stage.sources.inventory import ABSENT


def inventory_of(path: str, **settings: object) -> Inventory:
    return take_inventory(ParquetSource.model_validate({"path": path, **settings}))


def ids(inventory: Inventory) -> list[str]:
    return inventory.table["image_id"].to_pylist()


def contents(inventory: Inventory) -> list[bytes | str]:
    """The bytes of every image, or the reason that there are none."""
    rows = range(inventory.images)
    found: list[bytes | str] = []
    with UnitReader(inventory.images_at, inventory.table, rows) as reader:
        for row in rows:
            try:
                found.append(reader.read(row))
            except Reject as reject:
                found.append(reject.reason.value)
    return found


def refused(place: Place, **settings: object) -> str:
    with pytest.raises(InputError) as caught:
        inventory_of(place.location, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.binary_view()])
def test_a_column_of_bytes(place: Place, kind: pa.DataType) -> None:
    pictures = [picture(number) for number in range(7)]
    place.put("data/train-00000.parquet", parquet_of({"image": pa.array([*pictures[:4], None], kind)}))
    place.put("data/train-00001.parquet", parquet_of({"image": pa.array(pictures[4:], kind), "more": [1, 2, 3]}))
    inventory = inventory_of(place.location)
    assert ids(inventory)[3:6] == [
        f"data/train-{name}" for name in ("00000.parquet!3", "00000.parquet!4", "00001.parquet!0")
    ]
    assert inventory.table.schema == INVENTORY_SCHEMA
    stat = place.store.stat("data/train-00001.parquet")
    assert stat is not None
    assert inventory.table.slice(5, 1).to_pylist() == [
        {
            "image_id": "data/train-00001.parquet!0",
            "size": stat.size,
            "mtime_ns": stat.mtime_ns,
            "source_row": 5,
            "file": "data/train-00001.parquet",
            "offset": 0,
        }
    ]
    assert contents(inventory) == [*pictures[:4], "missing", *pictures[4:]]


def test_a_hugging_face_data_set(place: Place) -> None:
    pictures = [picture(number) for number in range(4)]
    place.put("beside/x.png", pictures[3])
    column = hf_images(
        [pictures[0], pictures[1], None, None, None, None],
        ["a.png", None, "beside/x.png", "beside/absent.png", "../secret.png", None],
    )
    place.put("train.parquet", parquet_of(pa.table({"label": range(6), "image": column})))
    inventory = inventory_of(f"{place.location}/*.parquet")
    found = contents(inventory)
    assert found == [pictures[0], pictures[1], pictures[3], "missing", "outside_root", "missing"]


def test_what_datasets_saved_to_disk(tmp_path: Path) -> None:
    pictures = [picture(number) for number in range(7)]
    for split, rows in (("train", slice(0, 5)), ("test", slice(5, 7))):
        table = pa.table(
            {"image": hf_images(pictures[rows]), "text": [f"{split} {n}" for n in range(len(pictures[rows]))]}
        )
        write_arrow(tmp_path / split / "data-00000-of-00001.arrow", table)
    write_arrow(tmp_path / "train" / "cache-0123.arrow", pa.table({"other": [1]}))
    (tmp_path / "train" / "state.json").write_text("{}")
    inventory = inventory_of(str(tmp_path), carry=["text"])
    assert contents(inventory) == [*pictures[5:], *pictures[:5]]
    with UnitReader(inventory.images_at, inventory.table, []) as reader:
        extra = reader.carried([6, 0, 3])
        assert extra is not None
        assert extra.to_pydict() == {"text": ["train 4", "test 0", "train 1"]}


def test_ids_of_the_source_and_what_is_carried(place: Place) -> None:
    for file in range(2):
        names = [f"id {file * 10 + row}" for row in range(5)]
        table = {"image": [picture(row) for row in range(5)], "key": names, "n": range(5), "tags": [["a", "b"]] * 5}
        place.put(f"{file}.parquet", parquet_of(table, rows=2))
    inventory = inventory_of(place.location, id_column="key", carry=["tags", "n"])
    assert ids(inventory) == [f"id {file * 10 + row}" for file in range(2) for row in range(5)]
    with UnitReader(inventory.images_at, inventory.table, range(10)) as reader:
        extra = reader.carried([9, 1, 4, 3])
        assert extra is not None
        assert extra.to_pydict() == {"tags": [["a", "b"]] * 4, "n": [4, 1, 4, 3]}
        assert reader.carried([]) is None


def test_carried_columns_keep_their_types_and_what_is_empty(place: Place) -> None:
    always = pa.field("always", pa.int64(), nullable=False)
    schema = pa.schema([("image", pa.binary()), ("text", pa.string()), ("n", pa.int32()), always])
    columns = [[picture(1)] * 4, [None, None, "x", None], [None, None, None, 3], [1, 2, 3, 4]]
    place.put("a.parquet", parquet_of(pa.Table.from_arrays(list(map(pa.array, columns)), schema=schema), rows=2))
    other = schema.set(3, always.with_nullable(True))
    nothing = [pa.nulls(2, field.type) for field in other]
    place.put("b.parquet", parquet_of(pa.Table.from_arrays(nothing, schema=other)))
    inventory = inventory_of(place.location, carry=["text", "n", "always"])
    expected = pa.schema([("text", pa.string()), ("n", pa.int32()), ("always", pa.int64())])
    for rows in ([0, 1], [4, 0, 3], [5]):
        with UnitReader(inventory.images_at, inventory.table, []) as reader:
            extra = reader.carried(rows)
        assert extra is not None
        assert extra.schema == expected
        texts, numbers, always_numbers = ([*column, None, None] for column in columns[1:])
        assert extra["text"].to_pylist() == [texts[row] for row in rows]
        assert extra["n"].to_pylist() == [numbers[row] for row in rows]
        assert extra["always"].to_pylist() == [always_numbers[row] for row in rows]


def test_ids_that_cannot_be(place: Place) -> None:
    images = [picture(1), picture(2)]
    place.put("a.parquet", parquet_of({"image": images, "id": [7, 8], "name": ["x", ""], "score": [0.5, 1.5]}))
    place.put("b.parquet", parquet_of({"image": images, "id": [9, 8], "name": ["y", "z"], "score": [0.5, 1.5]}))
    assert "the id '8' occurs twice in 'id'" in refused(place, id_column="id")
    assert "row 1 of" in refused(place, id_column="name")
    assert "not text or an integer" in refused(place, id_column="score")


def test_columns_that_cannot_be(place: Place) -> None:
    place.put("a.parquet", parquet_of({"image": [picture(1)], "path": ["a.png"], "n": [1]}))
    assert "has no column 'picture', it has image, path, n" in refused(place, image_column="picture")
    assert "source.carry" in refused(place, carry=["caption"])
    assert "source.id_column" in refused(place, id_column="caption")
    assert "give source.image_root" in refused(place, image_column="path")
    assert "holds no image bytes" in refused(place, image_column="n")
    assert "holds no paths" in refused(place, image_root=place.location)
    assert "source.carry needs" in refused(place, image_column="path", image_root=place.location, carry=["n"])
    place.put("b.parquet", parquet_of({"image": [picture(1)], "path": ["a.png"], "n": ["one"]}))
    assert "'n' is string in" in refused(place, carry=["n"])


def test_a_column_of_paths(place: Place, tmp_path: Path) -> None:
    place.put("images/a.png", picture(1))
    place.put("images/b/c.png", picture(2))
    paths = ["a.png", "b/c.png", None, "./a.png", "absent.png", "../../secret.png", ""]
    place.put("rows.parquet", parquet_of({"file_name": paths}))
    settings = {"image_column": "file_name", "image_root": f"{place.location}/images"}
    inventory = inventory_of(f"{place.location}/rows.parquet", **settings)
    assert ids(inventory) == ["a.png", "b/c.png", "absent.png", "../../secret.png"]
    assert inventory.table["source_row"].to_pylist() == [0, 1, 4, 5]
    assert [size == ABSENT for size in inventory.table["size"].to_pylist()][:3] == [False, False, True]
    assert inventory.table["file"].null_count == 4
    assert [error.row for error in inventory.errors] == [2, 6]
    assert contents(inventory) == [picture(1), picture(2), "missing", "outside_root"]
    assert inventory.containers == ()


def test_damaged_files_are_counted_and_damaged_rows_are_rejects(tmp_path: Path) -> None:
    place = Place(str(tmp_path))
    pictures = [picture(number) for number in range(9)]
    whole = parquet_of({"image": pictures}, rows=3, compression="none", use_dictionary=False)
    place.put("cut.parquet", whole[: len(whole) // 2])
    place.put("page.parquet", b"<html>404</html>")
    place.put("empty.parquet", b"")
    at = whole.index(pictures[3]) - 4  # the length of the first picture of the second row group
    place.put("good.parquet", whole[:at] + b"\xff" * 4 + whole[at + 4 :])
    inventory = inventory_of(place.location)
    assert sorted(error.message.split("/")[-1].split(" ")[0] for error in inventory.errors) == [
        "cut.parquet", "empty.parquet", "page.parquet",
    ]  # fmt: skip
    found = contents(inventory)
    assert found[:3] == pictures[:3]
    assert found[3:6] == ["unreadable"] * 3
    assert found[6:] == pictures[6:]


def test_a_source_without_rows_is_one_sentence(place: Place) -> None:
    place.put("a.parquet", parquet_of({"image": pa.array([], pa.binary())}))
    assert "no file below" in (told := refused(place))
    assert "(first a.parquet; 0 errors)" in told
    place.put("b.parquet", b"")
    assert "(first a.parquet; 1 errors: " in (told := refused(place))
    assert "b.parquet is no readable parquet" in told


def test_a_folder_of_pictures_is_no_parquet_source(tmp_path: Path) -> None:
    make_pictures(tmp_path, 2)
    assert "no file (.parquet .arrow)" in refused(Place(str(tmp_path)))
