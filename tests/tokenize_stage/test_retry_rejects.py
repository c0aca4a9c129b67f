"""asvr retry, and what the other verbs on a folder mean for the next job."""

from __future__ import annotations

import io
from pathlib import Path

import pyarrow as pa
import pytest
from made_jobs import content, job_config, picture
from PIL import Image

from manifests import images
from manifests.commits import list_commits
from manifests.errors import BudgetExceeded, InputError, RecipeError
from manifests.filter import Choice, filter_set
from manifests.forget import forget_images
from manifests.garbage import collect_garbage
from manifests.merge import merge_sets
from manifests.reader import open_manifest
from manifests.rebuild import rebuild
from manifests.rejects import Reject, RejectReason
from manifests.storage import Store
from manifests.verify import verify
from tokenize_stage.job import run_job
from tokenize_stage.retry_rejects import retry_rejects


def large(edge: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (edge, edge), (10, 20, 30)).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture
def spoiled(pictures: Path, codebook: Path, tmp_path: Path) -> Store:
    """A set of twenty-one images: one is too large, one no image, the others ok."""
    (pictures / "huge.png").write_bytes(large(80))
    (pictures / "000002.png").write_bytes(b"no image at all")
    run_job(job_config(pictures, codebook, tmp_path / "out", max_pixels=5000, max_reject_rate=0.5))
    return Store.open(tmp_path / "out")


def reasons(store: Store) -> dict[str, str]:
    return {row["image_id"]: row["reason"] for row in open_manifest(store.location).rejects().to_pylist()}


def test_a_larger_limit_recovers_what_was_too_large(spoiled):
    assert reasons(spoiled) == {"huge.png": "too_many_pixels", "000002.png": "not_an_image"}
    before = open_manifest(spoiled.location)
    ids = before.index()["image_id"].to_pylist()
    codes = [values.tobytes() for values in before.read_codes(ids)]
    report = retry_rejects(spoiled, overrides=["max_pixels=10000"])
    assert report.tried == {"not_an_image": 1, "too_many_pixels": 1}
    assert report.recovered == 1
    assert report.result.encoded == 2
    assert reasons(spoiled) == {"000002.png": "not_an_image"}
    assert verify(spoiled.location).problems == []
    after = open_manifest(spoiled.location)
    assert [values.tobytes() for values in after.read_codes(ids)] == codes
    assert after.read_codes(["huge.png"])[0].shape == (1, 4, 2)


def test_only_the_asked_reasons_are_tried(spoiled):
    report = retry_rejects(spoiled, ["not_an_image"])
    assert (report.tried, report.recovered, report.result.encoded) == ({"not_an_image": 1}, 0, 1)
    again = retry_rejects(spoiled, ["missing"])
    assert (again.tried, again.result) == ({}, None)


def test_a_retried_set_is_that_of_a_job_that_had_read_everything(spoiled, pictures, codebook, tmp_path):
    retry_rejects(spoiled, overrides=["max_pixels=10000"])
    run_job(job_config(pictures, codebook, tmp_path / "whole", max_reject_rate=0.5))
    mine, other = content(tmp_path / "out"), content(tmp_path / "whole")
    assert mine["index"] == other["index"]
    assert mine["bytes"] == other["bytes"]


def test_refusals(spoiled, tmp_path):
    with pytest.raises(RecipeError, match="'broken' is no reason of a reject: choose from corrupt, "):
        retry_rejects(spoiled, ["broken"])
    for override in ("output=x", "max_pixels", "geometry.size=3", "=1"):
        with pytest.raises(RecipeError, match="is not possible in a retry: write KEY=VALUE"):
            retry_rejects(spoiled, overrides=[override])
    for override in ("max_pixels=many", "max_pixels=-1", "max_pixels=[", "device=tpu"):
        with pytest.raises(RecipeError, match="--set"):
            retry_rejects(spoiled, overrides=[override])
    with pytest.raises(InputError, match=r"has no job\.json"):
        retry_rejects(Store.open(tmp_path / "nowhere"))


def test_a_job_that_its_rejects_have_stopped_goes_on(pictures, codebook, tmp_path, monkeypatch):
    """A share is away while the first unit is read, which is committed with eight rejects; then it is back."""
    store = Store.open(tmp_path / "out")
    config = job_config(pictures, codebook, tmp_path / "out", max_reject_rate=0.1)
    read = images.UnitReader.read

    def away(reader, row):
        raise Reject(RejectReason.MISSING, "there is no file")

    monkeypatch.setattr(images.UnitReader, "read", away)
    with pytest.raises(BudgetExceeded, match="asvr retry reads them again"):
        run_job(config)
    assert list_commits(store) == ["u000000"]
    monkeypatch.setattr(images.UnitReader, "read", read)
    with pytest.raises(BudgetExceeded):
        run_job(config)
    report = retry_rejects(store)
    assert (report.tried, report.recovered, report.result.encoded) == ({"missing": 8}, 8, 20)
    run_job(job_config(pictures, codebook, tmp_path / "clean"))
    assert content(tmp_path / "out") == content(tmp_path / "clean")


def test_rejects_that_no_manifest_has_yet_are_tried_as_well(pictures, codebook, tmp_path):
    store = Store.open(tmp_path / "out")
    config = job_config(pictures, codebook, tmp_path / "out", max_reject_rate=0.1, max_pixels=5000)
    run_job(config)
    for number in range(8):
        (pictures / f"huge{number}.png").write_bytes(large(80))
    with pytest.raises(BudgetExceeded):
        run_job(config)
    report = retry_rejects(store, overrides=["max_pixels=10000"])
    assert (report.tried, report.recovered) == ({"too_many_pixels": 8}, 8)


def test_a_forgotten_image_does_not_come_back(spoiled, pictures, codebook, tmp_path):
    config = job_config(pictures, codebook, tmp_path / "out", max_pixels=5000, max_reject_rate=0.5)
    forget_images(spoiled, ["000001.jpg", "huge.png"], purge=True)
    after = content(tmp_path / "out")
    assert run_job(config).encoded == 0
    assert content(tmp_path / "out") == after
    (pictures / "new.png").write_bytes(picture(7))
    result = run_job(config)
    assert result.encoded == 1
    assert verify(tmp_path / "out").problems == []
    named = {*open_manifest(tmp_path / "out").index()["image_id"].to_pylist(), *reasons(spoiled)}
    assert len(named) == 20
    assert not {"000001.jpg", "huge.png"} & named
    assert retry_rejects(spoiled, overrides=["max_pixels=10000"]).recovered == 0


def test_a_rebuilt_set_needs_no_encoding(spoiled, pictures, codebook, tmp_path):
    for path in [*(tmp_path / "out/commits").iterdir(), tmp_path / "out/manifest.json"]:
        path.unlink()
    rebuild(spoiled)
    result = run_job(job_config(pictures, codebook, tmp_path / "out", max_pixels=5000, max_reject_rate=0.5))
    assert result.encoded == 0
    assert verify(tmp_path / "out").problems == []


def test_garbage_of_jobs_is_collected(spoiled, pictures, codebook, tmp_path):
    (pictures / "000001.jpg").write_bytes(picture(50, ".jpg"))
    config = job_config(pictures, codebook, tmp_path / "out", max_pixels=5000, max_reject_rate=0.5)
    assert run_job(config).encoded == 1
    report = collect_garbage(spoiled, older_than=-1, keep_snapshots=1)
    assert sorted(orphan.path.partition("-")[0].partition("/")[0] for orphan in report.removed) == ["index", "shards", "snapshots"]  # fmt: skip
    assert verify(tmp_path / "out").problems == []
    assert run_job(config).encoded == 0


def test_merged_and_filtered_sets_are_no_outputs_of_a_job(spoiled, pictures, codebook, tmp_path):
    filter_set(spoiled.location, Choice(exclude=pa.array(["000001.jpg"])), Store.open(tmp_path / "f"))
    filter_set(spoiled.location, Choice(ids=pa.array(["000001.jpg"])), Store.open(tmp_path / "g"))
    merge_sets([tmp_path / "f", tmp_path / "g"], Store.open(tmp_path / "m"))
    for name in "fm":
        with pytest.raises(InputError, match="was made by asvr manifest"):
            run_job(job_config(pictures, codebook, tmp_path / name, max_pixels=5000, max_reject_rate=0.5))
        assert verify(tmp_path / name).problems == []
