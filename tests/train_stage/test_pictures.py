"""Pictures of a phase that lie in containers, and in object stores."""

from __future__ import annotations

import io
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny_set
import torch
import zstandard

from manifests.errors import InputError
from manifests.reader import open_manifest
from manifests.shards import Locator
from manifests.storage import Store
from train_stage.chat import ChatEncoder
from train_stage.collate import Collator
from train_stage.config import PhaseConfig
from train_stage.image_tokens import ImageTokens
from train_stage.pictures import image_column, join
from train_stage.samples import load_samples
from train_stage.tables import Tables
from train_stage.tokenizer import load_tokenizer

PICTURES = 7
TOKENS = ImageTokens(tiny_set.GEOMETRY, tiny_set.GRID)


class Packed:
    """Pictures as loose files, in a tar and in a Parquet file, and what a shard says of where they are."""

    def __init__(self, folder: Path) -> None:
        self.loose, self.root = folder / "loose", folder / "packed"
        self.root.mkdir()
        names = tiny_set.save_pictures(self.loose, PICTURES)
        self.bytes = [(self.loose / name).read_bytes() for name in names]
        self.ids: list[str] = []
        self.locators: dict[str, Locator] = {}

    def tar(self, name: str = "a.tar") -> None:
        """All pictures in `a.tar`, as `webdataset` calls them."""
        with tarfile.open(self.root / name, "w") as tar:
            for number, data in enumerate(self.bytes):
                member = tarfile.TarInfo(f"{number:03}.png")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
        with tarfile.open(self.root / name) as tar:
            for number, member in enumerate(tar.getmembers()):
                self._add(f"{name}!{number:03}", Locator(name, member.offset_data, member.size), number)

    def parquet(self, name: str = "b.parquet") -> None:
        """All pictures in `b.parquet`, three rows a group, as `parquet` calls them."""
        cells = [{"bytes": data, "path": None} for data in self.bytes]
        pq.write_table(pa.table({"n": list(range(PICTURES)), "image": cells}), self.root / name, row_group_size=3)
        for number, data in enumerate(self.bytes):
            self._add(f"{name}!{number}", Locator(name, number, len(data)), number)

    def _add(self, image_id: str, locator: Locator, number: int) -> None:
        (self.loose / image_id).write_bytes(self.bytes[number])
        self.ids.append(image_id)
        self.locators[image_id] = locator

    def tables(self, folder: Path) -> Tables:
        tiny_set.save_manifest(folder, self.loose, self.ids, locators=self.locators)
        return Tables([open_manifest(folder)])


@pytest.fixture
def packed(tmp_path: Path) -> Packed:
    return Packed(tmp_path)


def test_pictures_are_read_out_of_tars_and_parquet_files(packed: Packed, tmp_path: Path) -> None:
    packed.tar()
    packed.parquet()
    tables = packed.tables(tmp_path / "tokens")
    keys = [(0, image_id) for image_id in reversed(packed.ids)]
    pictures, problems = join(keys, [str(packed.root)], {"manifests": tables, "codes": tables}, threads=2)
    assert problems == {}
    assert [pictures.read(image) for image in range(len(keys))] == [*packed.bytes[::-1]] * 2
    assert pictures.where(0) == f"b.parquet!6 in {packed.root}"
    assert sorted(container.file for container in pictures.containers) == ["a.tar", "b.parquet"]


def test_files_of_their_own_and_members_of_tars_stand_side_by_side(packed: Packed, tmp_path: Path) -> None:
    packed.tar()
    tables = packed.tables(tmp_path / "tokens")
    shutil.copy(packed.loose / "a.tar!002", packed.root)  # unpacked: what is a file is read as a file
    keys = [(0, packed.ids[2]), (1, packed.ids[3]), (0, packed.ids[4]), (0, "a.tar!none")]
    pictures, problems = join(keys, [str(packed.root), str(packed.loose)], {"codes": tables}, threads=1)
    assert [pictures.read(image) for image in range(3)] == packed.bytes[2:5]
    assert pictures.container.tolist() == [-1, -1, 0, -1]
    assert {index: (bad.reason, str(bad)) for index, bad in problems.items()} == {
        3: ("missing_codes", "no codes for image a.tar!none")
    }


def test_a_container_that_is_not_there_is_named(packed: Packed, tmp_path: Path) -> None:
    packed.tar()
    tables = packed.tables(tmp_path / "tokens")
    plain = packed.root / "a.tar"
    packed_tar = packed.root / "a.tar.zst"
    keys = [(0, packed.ids[0])]
    packed_tar.write_bytes(zstandard.compress(plain.read_bytes()))
    plain.unlink()
    _, problems = join(keys, [str(packed.root)], {"codes": tables}, threads=1)
    assert str(problems[0]) == (
        f"a.tar!000 is in {packed_tar}, of which no picture can be read alone: decompress it beside it, with zstd -d"
    )
    packed_tar.unlink()
    _, problems = join(keys, [str(packed.root)], {"codes": tables}, threads=1)
    assert problems[0].reason == "missing_image"
    assert str(problems[0]) == f"a.tar!000 is not in {packed.root}, and neither is a.tar, in which it was tokenized"


def test_a_compressed_tar_is_used_once_it_is_decompressed_beside_itself(packed: Packed, tmp_path: Path) -> None:
    packed.tar()
    packed.locators = {
        image_id: Locator("a.tar.zst", locator.offset, locator.length) for image_id, locator in packed.locators.items()
    }
    tables = packed.tables(tmp_path / "tokens")
    pictures, problems = join([(0, packed.ids[5])], [str(packed.root)], {"codes": tables}, threads=1)
    assert problems == {}
    assert pictures.read(0) == packed.bytes[5]


def test_merged_and_filtered_sets_know_the_column_of_their_source() -> None:
    own = {"kind": "parquet", "location": "p", "settings": {"image_column": "picture"}}
    other = {"kind": "webdataset", "location": "w", "settings": {}}
    assert image_column("parquet", own["settings"], "u000003") == "picture"
    assert image_column("filter", {"source": own}, "u000003") == "picture"
    merged = {"sources": [other, {"kind": "filter", "location": "p", "settings": {"source": own}}]}
    assert image_column("merge", merged, "1.u000003") == "picture"
    assert image_column("merge", merged, "0.u000003") is None
    assert image_column("filter", {"source": {"kind": "merge", "settings": merged}}, "1.u000003") == "picture"


def test_pictures_in_a_bucket(packed: Packed, tmp_path: Path, s3: str) -> None:
    packed.tar()
    packed.parquet()
    tables = packed.tables(tmp_path / "tokens")
    bucket = Store.open(s3)
    for name in ("a.tar", "b.parquet"):
        bucket.write(name, (packed.root / name).read_bytes())
    bucket.write(packed.ids[2], packed.bytes[2])  # of its own beside the tar
    keys = [(0, image_id) for image_id in packed.ids]
    pictures, problems = join(keys, [s3], {"codes": tables}, threads=2)
    assert problems == {}
    assert [pictures.read(image) for image in range(len(keys))] == packed.bytes * 2
    assert pictures.where(0) == f"a.tar!000 in {s3}"
    assert int(pictures.container[2]) == -1
    _, problems = join(keys[:1], [f"{s3}/elsewhere"], {"codes": tables}, threads=2)
    assert str(problems[0]) == f"a.tar!000 is not in {s3}/elsewhere, and neither is a.tar, in which it was tokenized"


@pytest.mark.parametrize("inside", [False, True])
def test_a_bucket_gives_the_batches_that_a_disk_gives(
    packed: Packed, tmp_path: Path, tiny_model, monkeypatch: pytest.MonkeyPatch, s3: str, inside: bool
) -> None:
    monkeypatch.setenv("ASVR_CACHE", str(tmp_path / "cache"))
    packed.tar()
    tables = packed.tables(tmp_path / "tokens")
    tiny_set.save_records(tmp_path / "data.json", packed.ids)
    bucket = Store.open(s3)
    if inside:
        bucket.write("a.tar", (packed.root / "a.tar").read_bytes())
    else:
        for image_id, data in zip(packed.ids, packed.bytes, strict=True):
            bucket.write(image_id, data)
    config = tiny_model()
    encoder = ChatEncoder(load_tokenizer(config), config.image_token)
    batches = []
    for root in (str(packed.loose), s3):
        data = [{"path": str(tmp_path / "data.json"), "image_root": root}]
        phase = PhaseConfig.model_validate({"name": "instruct", "data": data, "manifests": ["m"]}).with_defaults()
        samples, report = load_samples(phase, encoder, TOKENS, {"codes": tables}, threads=2, seed=0)
        tables.open_values(samples.pictures.rows["codes"])
        assert (report.usable, report.images) == (PICTURES + 2, PICTURES)
        collator = Collator(
            samples, {"codes": tables}, ["codes"], tiny_set.GEOMETRY, tiny_set.GRID, encoder.image_token_id, 0
        )
        batches.append(collator(np.arange(len(samples))))
    disk, remote = batches
    for name in ("input_ids", "labels", "views", "target_mask", "view_keys", "view_position"):
        assert torch.equal(getattr(disk, name), getattr(remote, name))
    assert torch.equal(disk.targets["codes"], remote.targets["codes"])

    if inside:  # another file in its place, with other pictures at the same offsets
        bucket.write("a.tar", (packed.root / "a.tar").read_bytes().replace(b"IDAT", b"JDAT"))
    else:
        bucket.write(packed.ids[0], packed.bytes[0].replace(b"IDAT", b"JDAT"))
    with pytest.raises(
        InputError, match=f"image a.tar!000 in {s3}, of sample .*, is not the picture that was tokenized"
    ):
        collator(np.arange(1))
