"""What is remembered of a source is used where it must be right, or where the user is told; never silently."""

from __future__ import annotations

import io
import json
import logging
import os
import tarfile
from pathlib import Path

import pyarrow as pa
import pytest
from made_containers import Place, parquet_of
from made_jobs import content, job_config, make_pictures, picture

from manifests.errors import InputError
from manifests.forget import forget_images
from manifests.images import ImageSource
from manifests.reader import open_manifest
from manifests.schema import SourceIdentity
from manifests.storage import Store
from tokenize_stage.config import FolderSource, LlavaSource, ParquetSource, SourceConfig, WebdatasetSource
from tokenize_stage.inventory_cache import ALWAYS_LISTED, INVENTORY_NAME, Listing, list_source
from tokenize_stage.job import run_job
from tokenize_stage.sources.inventory import Inventory, build_table
from tokenize_stage.sources.looked_at import looked_at


def remember_many(store: Store, config: SourceConfig) -> None:
    """An inventory of one image more than is listed on every run."""
    table = build_table((f"{row:09d}.jpg", 10, 1, row) for row in range(ALWAYS_LISTED + 1))
    taken = Inventory(table, [], ImageSource("/images"), SourceIdentity(kind=config.kind, location="/images"))
    Listing(store, config, "2026-01-02T03:04:05", taken, None, looked_at(config)).remember()


def make_tar(path: Path, first: int, count: int) -> None:
    with tarfile.open(path, "w") as tar:
        for number in range(first, first + count):
            data = picture(number)
            member = tarfile.TarInfo(f"{number:06d}.png")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def test_the_types_of_carried_columns_are_remembered(tmp_path: Path) -> None:
    images, numbers = [picture(1), picture(2)], pa.array([1, 2], pa.int32())
    place = Place(str(tmp_path / "source"))
    place.put("a.parquet", parquet_of({"image": images, "n": numbers}))
    config = ParquetSource.model_validate({"path": place.location, "carry": ["n"]})
    store = Store.open(tmp_path / "out")
    list_source(store, config, refresh=False).remember()
    place.put("b.parquet", parquet_of({"image": images, "n": numbers.cast(pa.int64())}))
    with pytest.raises(
        InputError, match=r"'n' is int64 in .*b\.parquet and int32 in .*a\.parquet: write them with one"
    ):
        list_source(store, config, refresh=False)
    place.put("b.parquet", parquet_of({"image": images, "n": numbers}))
    list_source(store, config, refresh=False).remember()
    assert [one.carried for one in list_source(store, config, refresh=False).inventory.containers] == [("int32",)] * 2


def test_a_small_folder_is_listed_on_every_run(tmp_path: Path) -> None:
    config = FolderSource(path=make_pictures(tmp_path / "p", 3))
    store = Store.open(tmp_path / "out")
    first = list_source(store, config, refresh=False)
    first.remember()
    assert not (tmp_path / "out" / INVENTORY_NAME).exists()
    make_pictures(tmp_path / "p", 1, first=900)
    second = list_source(store, config, refresh=False)
    assert (first.inventory.images, second.inventory.images, second.note) == (3, 4, "")


def test_of_a_large_folder_the_last_listing_is_used_and_named(tmp_path: Path) -> None:
    config = FolderSource(path=tmp_path / "p")  # there is no such folder, so listing it would be an error
    store = Store.open(tmp_path / "out")
    remember_many(store, config)
    listing = list_source(store, config, refresh=False)
    assert listing.note == "inventory of 2026-01-02 03:04 UTC, --refresh lists again"
    inventory = listing.inventory
    assert inventory.images == ALWAYS_LISTED + 1
    assert inventory.table["image_id"][ALWAYS_LISTED].as_py() == "001000000.jpg"
    assert inventory.images_at.root == "/images"
    assert (tmp_path / "out" / INVENTORY_NAME).stat().st_size < 4 * inventory.images
    with pytest.raises(InputError, match="does not exist"):
        list_source(store, config, refresh=True)
    with pytest.raises(InputError, match="does not exist"):
        list_source(store, FolderSource(path=tmp_path / "other"), refresh=False)


def test_an_edited_records_file_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text("[]")
    config = LlavaSource(path=path, image_root=tmp_path)
    store = Store.open(tmp_path / "out")
    remember_many(store, config)
    assert list_source(store, config, refresh=False).inventory.images == ALWAYS_LISTED + 1
    turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "yes"}]
    path.write_text(json.dumps([{"id": 1, "image": "a.png", "conversations": turns}]))
    assert list_source(store, config, refresh=False).inventory.images == 1


def test_of_tars_only_the_new_ones_are_read(codebook: Path, tmp_path: Path) -> None:
    tars = tmp_path / "tars"
    tars.mkdir()
    make_tar(tars / "a.tar", 0, 5)
    source = {"kind": "webdataset", "path": tars}
    config = job_config(tars, codebook, tmp_path / "out", source=source)
    first = run_job(config)
    assert first.encoded == 5
    assert run_job(config).plan is None

    # What stands in the old tar cannot be read any more, though it looks as it did: so nobody may try to.
    stat = (tars / "a.tar").stat()
    whole = (tars / "a.tar").read_bytes()
    (tars / "a.tar").write_bytes(b"\xff" * stat.st_size)
    os.utime(tars / "a.tar", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    make_tar(tars / "b.tar", 5, 3)
    second = run_job(config)
    assert second.plan is not None
    assert (second.encoded, second.plan.new.count, second.plan.unchanged) == (3, 3, 5)
    assert second.plan.new.examples == [f"b.tar!{number:06d}" for number in (5, 6, 7)]
    assert second.manifest.totals.source_errors == 0

    (tars / "a.tar").write_bytes(whole)
    os.utime(tars / "a.tar", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    again = run_job(config, refresh=True)
    assert (again.plan is not None, again.encoded) == (True, 0)
    run_job(job_config(tars, codebook, tmp_path / "clean", source=source, unit_size=5))
    rows = [open_manifest(tmp_path / name).index().drop_columns("row").to_pylist() for name in ("out", "clean")]
    assert rows[0] == rows[1]


def test_a_complete_set_of_tars_needs_no_row_of_its_inventory(codebook: Path, tmp_path: Path) -> None:
    tars, output = tmp_path / "tars", tmp_path / "out"
    tars.mkdir()
    make_tar(tars / "a.tar", 0, 3)
    config = job_config(tars, codebook, output, source={"kind": "webdataset", "path": tars})
    run_job(config)
    job = json.loads((output / "job.json").read_text())
    before = content(output)
    assert job["completed"]["manifest"] == open_manifest(output).digest
    listing = list_source(Store.open(output), WebdatasetSource.model_validate(job["config"]["source"]), refresh=False)
    assert listing.remembered is not None
    assert run_job(config).plan is None
    (tars / "a.tar").touch()  # another time is another file, as for every image
    assert run_job(config).encoded == 3
    assert content(output)["manifest"]["totals"] == before["manifest"]["totals"]


def test_a_complete_set_is_found_complete_once(
    pictures: Path, codebook: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After an edited caption a large source is listed once, and after a forgotten image compared once."""
    monkeypatch.setattr("tokenize_stage.inventory_cache.ALWAYS_LISTED", 10)
    path, output = tmp_path / "data.json", tmp_path / "out"
    names = sorted(found.relative_to(pictures).as_posix() for found in pictures.rglob("*.*"))

    def write(caption: str) -> None:
        turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": caption}]
        path.write_text(json.dumps([{"id": name, "image": name, "conversations": turns} for name in names]))

    def found_complete_only_once() -> None:
        assert run_job(config).plan is None
        with monkeypatch.context() as patched:
            patched.setattr("tokenize_stage.inventory_cache.take_inventory", None)
            patched.setattr("tokenize_stage.completeness.same_images", None)
            result = run_job(config)
        assert result.plan is None
        assert "--refresh lists again" in result.listing_note

    write("a caption")
    config = job_config(pictures, codebook, output, source={"kind": "llava", "path": path, "image_root": pictures})
    assert run_job(config).encoded == 20
    write("an edited caption")
    found_complete_only_once()
    forget_images(Store.open(output), names[:1])
    found_complete_only_once()


def test_a_damaged_file_is_listed_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tars = tmp_path / "tars"
    tars.mkdir()
    make_tar(tars / "a.tar", 0, 2)
    store, config = Store.open(tmp_path / "out"), WebdatasetSource(path=tars)
    list_source(store, config, refresh=False).remember()
    path = tmp_path / "out" / INVENTORY_NAME
    path.write_bytes(path.read_bytes()[:-20])
    with caplog.at_level(logging.WARNING):
        assert list_source(store, config, refresh=False).inventory.images == 2
    assert "inventory.parquet is damaged" in caplog.text
