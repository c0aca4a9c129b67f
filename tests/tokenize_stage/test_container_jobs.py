"""Whole jobs on tars, Parquet files and buckets: every image has an outcome, and only what changed is encoded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from made_containers import Place, hf_images, parquet_of, samples, tar_of, zst
from made_jobs import VIEW, content, make_pictures, picture

from manifests.errors import FingerprintMismatch, InputError
from manifests.images import read_image
from manifests.reader import open_manifest
from manifests.storage import Store
from manifests.verify import verify
from tokenize_stage.announce import plan_lines
from tokenize_stage.config import TokenSetConfig
from tokenize_stage.job import JobResult, preview_job, run_job
from tokenize_stage.planned import Planned


def config_of(source: dict[str, Any], codebook: Path, output: Path, **changes: Any) -> TokenSetConfig:
    values: dict[str, Any] = {
        "source": source, "geometry": {"mode": "pad", "size": VIEW}, "tokenizer": {"kind": "fitted", "path": codebook},
        "output": output, "unit_size": 8, "batch_size": 4, "torch_threads": 1, "decode_threads": 2, "device": "cpu",
        "max_reject_rate": 1.0,
    }  # fmt: skip
    return TokenSetConfig.model_validate({**values, **changes})


def shards_of(output: Path) -> pa.Table:
    return pa.concat_tables([pq.read_table(output / shard.path) for shard in open_manifest(output).shards])


def totals(result: JobResult) -> tuple[int, int, int, int]:
    counts = result.manifest.totals
    assert counts.ok + counts.rejected == counts.images
    return counts.images, counts.ok, counts.rejected, counts.source_errors


def check_locators(output: Path, root: str, column: str | None = None) -> None:
    """Each image read by its locator alone is the one that was tokenized."""
    import hashlib

    store = Store.open(root)
    for row in shards_of(output).to_pylist():
        data = read_image(store, row["file"], row["image_id"], row["offset"], row["length"], column=column)
        assert hashlib.sha256(data).hexdigest() == row["sha256"]
        assert len(data) == row["length"]


@pytest.mark.parametrize("pack", [bytes, zst])
def test_a_job_on_tars(place: Place, codebook: Path, tmp_path: Path, pack: Any) -> None:
    suffix = ".tar" if pack is bytes else ".tar.zst"
    for number in range(3):
        place.put(f"t{number}{suffix}", pack(tar_of(samples(10, first=10 * number))))
    members = {**samples(3, first=40), "zz.jpg": b"no picture", "zzz.png": b""}
    end = sum(512 + -(-len(data) // 512) * 512 for data in members.values())
    place.put(f"t3{suffix}", pack(tar_of(members)[:end]))  # without its end mark
    config = config_of({"kind": "webdataset", "path": place.location, "carry": ["txt"]}, codebook, tmp_path / "out")
    assert totals(run_job(config)) == (35, 33, 2, 1)
    opened = open_manifest(tmp_path / "out")
    shards = shards_of(tmp_path / "out")
    assert shards["txt"].to_pylist() == [f"caption {int(name[-6:])}" for name in shards["image_id"].to_pylist()]
    assert opened.rejects()["reason"].to_pylist() == ["not_an_image", "empty"]
    check_locators(tmp_path / "out", place.location)
    assert run_job(config).plan is None


def test_only_tars_that_changed_are_encoded(tmp_path: Path, codebook: Path) -> None:
    place = Place(str(tmp_path / "source"))
    for number in range(4):
        place.put(f"t{number}.tar", tar_of(samples(8, first=8 * number)))
    config = config_of({"kind": "webdataset", "path": place.location}, codebook, tmp_path / "out")
    assert run_job(config).encoded == 32
    before = {row["image_id"]: row for row in shards_of(tmp_path / "out").to_pylist()}

    place.put("t1.tar", tar_of({**samples(7, first=8), **samples(1, first=99)}))  # one sample goes, one comes
    place.put("a-new-one.tar", tar_of(samples(3, first=200)))
    place.store.delete("t2.tar")
    result = run_job(config)
    assert (result.encoded, result.copied) == (8 + 3, 0)
    assert totals(result) == (27, 27, 0, 0)
    after = {row["image_id"]: row for row in shards_of(tmp_path / "out").to_pylist()}
    for number in range(8):
        assert after[f"t0.tar!{number:06d}"] == before[f"t0.tar!{number:06d}"]
    assert not any(name.startswith("t2") for name in after)
    check_locators(tmp_path / "out", place.location)
    assert run_job(config).plan is None


def test_a_job_on_parquet(place: Place, codebook: Path, tmp_path: Path) -> None:
    for number in range(2):
        pictures = [picture(10 * number + row) for row in range(10)]
        table = pa.table({"image": hf_images([*pictures, None]), "label": range(11), "text": ["x"] * 11})
        place.put(f"train-{number}.parquet", parquet_of(table, rows=4))
    place.put("train-2.parquet", b"PAR1 cut")
    source = {"kind": "parquet", "path": f"{place.location}/train-*.parquet", "carry": ["label"]}
    config = config_of(source, codebook, tmp_path / "out")
    assert totals(run_job(config)) == (22, 20, 2, 1)
    shards = shards_of(tmp_path / "out")
    assert shards["label"].to_pylist() == [int(name.rpartition("!")[2]) for name in shards["image_id"].to_pylist()]
    check_locators(tmp_path / "out", place.location, "image")
    assert run_job(config).plan is None


def test_only_the_parquet_file_that_changed_is_encoded(tmp_path: Path, codebook: Path) -> None:
    place = Place(str(tmp_path / "source"))
    for number in range(3):
        place.put(f"{number}.parquet", parquet_of({"img": [picture(10 * number + row) for row in range(8)]}))
    config = config_of({"kind": "parquet", "path": place.location, "image_column": "img"}, codebook, tmp_path / "out")
    assert run_job(config).encoded == 24
    place.put("1.parquet", parquet_of({"img": [picture(100 + row) for row in range(9)]}))
    result = run_job(config)
    assert (result.encoded, totals(result)) == (9, (25, 25, 0, 0))


def test_the_same_pictures_give_the_same_codes_wherever_they_lie(tmp_path: Path, place: Place, codebook: Path) -> None:
    loose = make_pictures(tmp_path / "loose", 12)
    names = sorted(str(path.relative_to(loose)) for path in loose.rglob("*.*"))
    place.put("all.tar", tar_of({name: (loose / name).read_bytes() for name in names}))
    place.put("all.parquet", parquet_of({"image": [(loose / name).read_bytes() for name in names]}))
    bucket = Place(f"{place.location}/loose")
    for name in names:
        bucket.put(name, (loose / name).read_bytes())
    found = []
    for source in (
        {"kind": "folder", "path": loose},
        {"kind": "folder", "path": bucket.location},
        {"kind": "webdataset", "path": f"{place.location}/all.tar"},
        {"kind": "parquet", "path": f"{place.location}/all.parquet"},
        {"kind": "parquet", "path": f"{place.location}/all.parquet", "image_column": "image"},
    ):
        output = tmp_path / f"out{len(found)}"
        run_job(config_of(source, codebook, output))
        table = shards_of(output)
        found.append(dict(zip(table["sha256"].to_pylist(), table["codes"].to_pylist(), strict=True)))
    assert all(codes == found[0] for codes in found)
    assert content(tmp_path / "out3")["bytes"] == content(tmp_path / "out4")["bytes"]


def test_llava_records_and_pictures_in_a_bucket(place: Place, codebook: Path, tmp_path: Path) -> None:
    place.put("images/a.png", picture(1))
    place.put("images/b/c.jpg", picture(2, ".jpg"))
    records = b'[{"id": 1, "image": "a.png"}, {"id": 2, "image": ["b/c.jpg", "a.png", "gone.png", "../x.png"]}, 7]'
    place.put("data.json.zst", zst(records))
    source = {"kind": "llava", "path": f"{place.location}/data.json.zst", "image_root": f"{place.location}/images"}
    config = config_of(source, codebook, tmp_path / "out")
    assert totals(run_job(config)) == (4, 2, 2, 1)
    assert open_manifest(tmp_path / "out").rejects()["reason"].to_pylist() == ["missing", "outside_root"]
    check_locators(tmp_path / "out", f"{place.location}/images")


def test_other_carried_columns_are_another_set(tmp_path: Path, codebook: Path) -> None:
    place = Place(str(tmp_path / "source"))
    place.put("t.tar", tar_of(samples(3)))
    source = {"kind": "webdataset", "path": place.location}
    run_job(config_of(source, codebook, tmp_path / "out"))
    other = config_of({**source, "carry": ["txt"]}, codebook, tmp_path / "out")
    with pytest.raises(FingerprintMismatch, match="carry"):
        run_job(other)
    assert run_job(other, replace=True).encoded == 3
    assert shards_of(tmp_path / "out")["txt"].to_pylist() == ["caption 0", "caption 1", "caption 2"]


def test_a_job_in_ray_reads_containers_as_well(ray_cluster: object, codebook: Path, tmp_path: Path) -> None:
    place = Place(str(tmp_path / "source"))
    place.put("t.tar.zst", zst(tar_of(samples(20))))
    place.put("t.tar", tar_of(samples(20, first=20)))
    source = {"kind": "webdataset", "path": place.location, "carry": ["txt"]}
    here, there = (config_of(source, codebook, tmp_path / name) for name in ("here", "there"))
    run_job(here)
    run_job(there.model_copy(update={"engine": "ray"}))
    assert content(tmp_path / "here")["bytes"] == content(tmp_path / "there")["bytes"]


@pytest.mark.parametrize("more", [0, 3])
def test_rows_with_ids_of_their_own_are_followed_to_a_renamed_file(codebook: Path, tmp_path: Path, more: int) -> None:
    """As by a push to the hub, which renames all files of a data set when one is added; nothing old is encoded."""
    source, output = tmp_path / "data", tmp_path / "out"
    source.mkdir()

    def write(name: str, first: int, count: int) -> None:
        rows = range(first, first + count)
        images = [picture(row) for row in rows] if first else [b"no picture", *map(picture, rows[1:])]
        pq.write_table(pa.table({"image": images, "key": [f"k{row}" for row in rows]}), source / name)

    for number in range(2):
        write(f"{number}-of-2.parquet", 6 * number, 6)
    config = config_of({"kind": "parquet", "path": source, "id_column": "key"}, codebook, output)
    assert run_job(config).encoded == 12
    codes = shards_of(output).select(["image_id", "codes"])
    for number in range(2):
        (source / f"{number}-of-2.parquet").rename(source / f"{number}-of-3.parquet")
    if more:
        write("2-of-3.parquet", 12, more)
    found = preview_job(config)
    assert isinstance(found, Planned)
    assert (found.plan.moved.count, found.plan.encode, found.plan.unchanged) == (11, more, 1)
    assert "11 in another file than before, to be copied: k1, k2, k3, ..." in plan_lines(found)
    assert totals(result := run_job(config)) == (12 + more, 11 + more, 1, 0)
    assert result.encoded == more
    assert shards_of(output).select(["image_id", "codes"]).slice(0, 11).equals(codes)
    check_locators(output, str(source), "image")
    assert verify(output).problems == []
    assert run_job(config).plan is None
    assert run_job(config, refresh=True).encoded == 0


def test_damage_to_what_is_carried_makes_rejects_of_its_row_group(codebook: Path, tmp_path: Path) -> None:
    source, output = tmp_path / "data", tmp_path / "out"
    source.mkdir()
    captions = [f"{row}: {'a caption ' * row}" for row in range(12)]
    table = pa.table({"image": [picture(row) for row in range(12)], "caption": captions})
    for name in ("a.parquet", "b.parquet"):
        pq.write_table(table, source / name, row_group_size=4, use_dictionary=False)
    path = source / "a.parquet"
    chunk = pq.ParquetFile(path).metadata.row_group(1).column(1)
    data = bytearray(path.read_bytes())
    end = chunk.data_page_offset + chunk.total_compressed_size
    data[end - 40 : end] = bytes(40)
    path.write_bytes(data)
    config = config_of({"kind": "parquet", "path": source, "carry": ["caption"]}, codebook, output, unit_size=9)
    assert totals(run_job(config)) == (24, 20, 4, 0)
    rejects = open_manifest(output).rejects()
    assert rejects["image_id"].to_pylist() == [f"a.parquet!{row}" for row in range(4, 8)]
    assert rejects["reason"].unique().to_pylist() == ["unreadable"]
    assert rejects["message"][0].as_py().startswith(f"row 4 of {path} is damaged in caption (")
    shards = shards_of(output)
    assert shards["caption"].to_pylist() == [*captions[:4], *captions[8:], *captions]
    assert verify(output).problems == []
    assert run_job(config).plan is None

    whole = config_of({"kind": "parquet", "path": source}, codebook, tmp_path / "whole", unit_size=9)
    run_job(whole)
    every = dict(zip(*(shards_of(tmp_path / "whole")[name].to_pylist() for name in ("image_id", "codes")), strict=True))
    assert shards["codes"].to_pylist() == [every[name] for name in shards["image_id"].to_pylist()]


@pytest.mark.parametrize("path", ["", "/**/*.parquet", "/*/*-*.parquet", "/{a,to}*/*/*.parquet"])
def test_an_output_that_the_source_would_search_is_refused(codebook: Path, tmp_path: Path, path: str) -> None:
    """Else the first run would end well, and every other one in an error about its own index."""
    (tmp_path / "data/a").mkdir(parents=True)
    pq.write_table(pa.table({"image": [picture(1)]}), tmp_path / "data/a/0-1.parquet")
    source = {"kind": "parquet", "path": f"{tmp_path}/data{path}"}
    with pytest.raises(InputError, match="searches for Parquet files, and the next run would"):
        run_job(config_of(source, codebook, tmp_path / "data/tokens"))
    assert not (tmp_path / "data/tokens").exists()


@pytest.mark.parametrize("path", ["/*.parquet", "/a", "/a/*.parquet", "/0-1.parquet", "/*/0-*.parquet"])
def test_an_output_beside_what_is_searched_is_fine(codebook: Path, tmp_path: Path, path: str) -> None:
    (tmp_path / "data/a").mkdir(parents=True)
    for name in ("a/0-1.parquet", "0-1.parquet"):
        pq.write_table(pa.table({"image": [picture(1)]}), tmp_path / "data" / name)
    config = config_of({"kind": "parquet", "path": f"{tmp_path}/data{path}"}, codebook, tmp_path / "data/tokens")
    assert run_job(config).encoded == 1
    assert run_job(config).plan is None
