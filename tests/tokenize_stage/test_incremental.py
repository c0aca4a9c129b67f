"""What a run says before it starts, and that it then does just that: new, changed, removed and retried images, trials."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from made_jobs import content, job_config, make_pictures, picture

from manifests.commits import list_commits
from manifests.errors import InputError
from manifests.reader import open_manifest
from manifests.storage import Store
from manifests.verify import status, verify
from tokenize_stage.announce import plan_lines
from tokenize_stage.job import JobResult, preview_job, run_job, try_job
from tokenize_stage.output_folder import read_config
from tokenize_stage.planned import Planned
from tokenize_stage.recompute import recompute
from tokenize_stage.retry_rejects import retry_rejects


def test_insert_one_edit_one_delete_one_and_edit_a_caption_encodes_two(codebook: Path, tmp_path: Path) -> None:
    root = make_pictures(tmp_path / "p", 20)
    path = tmp_path / "data.json"

    def write(names: list[str], caption: str) -> None:
        turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": caption}]
        path.write_text(json.dumps([{"id": name, "image": name, "conversations": turns} for name in names]))

    names = sorted(found.relative_to(root).as_posix() for found in root.rglob("*.*"))
    write(names, "a caption")
    source = {"kind": "llava", "path": path, "image_root": root}
    config = job_config(root, codebook, tmp_path / "out", source=source)
    first = run_job(config).manifest

    write(names, "an edited caption")
    assert run_job(config).plan is None

    (root / "!first.png").write_bytes(picture(77))
    (root / names[4]).write_bytes(picture(78))
    (root / names[11]).unlink()
    write(["!first.png", *(name for name in names if name != names[11])], "edited once more")
    result = run_job(config)
    assert result.plan is not None
    assert (result.encoded, result.plan.encode, result.plan.unchanged) == (2, 2, 18)
    assert (result.plan.new.examples, result.plan.changed.examples) == (["!first.png"], [names[4]])
    assert result.plan.removed.examples == [names[11]]
    assert [shard.rows for shard in result.manifest.shards] == [8, 7, 4, 1]
    assert result.manifest.shards[2] == first.shards[2]
    assert verify(tmp_path / "out").problems == []
    clean = job_config(root, codebook, tmp_path / "clean", source=source)
    run_job(clean)
    ids = ["!first.png", *(name for name in names if name != names[11])]
    codes = [open_manifest(tmp_path / name).read_codes(ids) for name in ("out", "clean")]
    assert all((mine == theirs).all() for mine, theirs in zip(*codes, strict=True))


def test_a_unit_of_several_runs_names_what_each_computed_it_with(
    pictures: Path, codebook: Path, tmp_path: Path
) -> None:
    def batch_sizes(batch_size: int) -> list[int]:
        manifest = run_job(
            job_config(pictures, codebook, tmp_path / "out", unit_size=64, batch_size=batch_size)
        ).manifest
        assert len(manifest.shards) == 1
        return sorted(numerics.batch_size for numerics in manifest.provenance.numerics)

    assert batch_sizes(4) == [4]
    (pictures / "000002.png").write_bytes(picture(77))
    assert batch_sizes(2) == [2, 4]
    (pictures / "000001.jpg").unlink()
    assert batch_sizes(3) == [2, 4]


def test_a_trial_is_kept_and_leaves_no_trace_in_the_result(pictures: Path, codebook: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    config = job_config(pictures, codebook, output, max_reject_rate=0.2)
    (pictures / "000018.png").unlink(missing_ok=True)
    (pictures / "more" / "000018.png").write_bytes(b"<html>")
    trial = try_job(config, 9)
    assert trial is not None
    assert (trial.work.images, trial.left, trial.total) == (16, 4, 20)
    assert trial.rate > 0
    assert trial.work.rows + trial.work.rejects.total() == 16
    assert (len(list_commits(Store.open(output))), status(output).state) == (2, "interrupted")
    assert not (output / "manifest.json").exists()
    result = run_job(config)
    assert (result.encoded, status(output).state) == (4, "complete")
    assert try_job(config, 9) is None
    run_job(job_config(pictures, codebook, tmp_path / "clean", max_reject_rate=0.2))
    assert content(output) == content(tmp_path / "clean")


def test_a_preview_says_what_and_why_and_writes_nothing(pictures: Path, codebook: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    config = job_config(pictures, codebook, output)
    found = preview_job(config)
    assert isinstance(found, Planned)
    assert plan_lines(found) == [
        f"20 images in {pictures} (listed now), 0 source errors; 0 committed and unchanged",
        "20 new: 000001.jpg, 000002.png, 000004.png, ...",
        "20 images to encode; 3 units of up to 8 images to write, local engine, 4 positions x 2 codes a view, "
        "at most 0 rejects",
    ]
    assert not output.exists()
    run_job(config)
    again = preview_job(config)
    assert isinstance(again, JobResult)
    assert again.plan is None
    (pictures / "000001.jpg").write_bytes(picture(99, ".jpg"))
    (pictures / "000002.png").unlink()
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    found = preview_job(config)
    assert isinstance(found, Planned)
    assert plan_lines(found)[:3] == [
        f"19 images in {pictures} (listed now), 0 source errors; 18 committed and unchanged",
        "1 changed (another size or time), to be encoded again: 000001.jpg",
        "1 removed from the source, to be taken out: 000002.png",
    ]
    assert "1 images to encode; 1 units" in plan_lines(found)[3]
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == before


def test_retried_rejects_are_read_again_and_nothing_else(pictures: Path, codebook: Path, tmp_path: Path) -> None:
    huge = job_config(pictures, codebook, tmp_path / "out", max_pixels=1500, max_reject_rate=1.0)
    first = run_job(huge).manifest.totals
    assert 0 < first.rejected < 20
    enough = huge.model_copy(update={"max_pixels": 10_000})
    assert run_job(enough).plan is None
    result = run_job(enough, retry=frozenset({"too_many_pixels"}))
    assert result.plan is not None
    assert (result.encoded, result.plan.retried.count, result.manifest.totals.ok) == (
        first.rejected,
        first.rejected,
        20,
    )
    run_job(job_config(pictures, codebook, tmp_path / "clean", max_reject_rate=1.0))
    assert content(tmp_path / "out") == content(tmp_path / "clean")


def test_the_folder_says_how_it_was_made(pictures: Path, codebook: Path, tmp_path: Path) -> None:
    config = job_config(pictures, codebook, tmp_path / "out", unit_size=7)
    run_job(config)
    (tmp_path / "out").rename(tmp_path / "moved")
    found = read_config(Store.open(tmp_path / "moved"))
    assert (found.unit_size, str(found.output)) == (7, str(tmp_path / "moved"))
    assert str(found.source.path) == str(pictures)
    assert run_job(found).plan is None

    job = tmp_path / "moved" / "job.json"
    said = json.loads(job.read_text())
    job.write_text(json.dumps({name: value for name, value in said.items() if name != "config"}))  # an earlier version
    with pytest.raises(InputError, match="does not say how the set was made"):
        read_config(Store.open(tmp_path / "moved"))
    assert run_job(found).encoded == 0
    assert read_config(Store.open(tmp_path / "moved")).unit_size == 7


def test_a_source_that_was_moved_encodes_nothing_and_is_found_again(
    pictures: Path, codebook: Path, tmp_path: Path
) -> None:
    (pictures / "000001.jpg").write_bytes(b"no image")
    before = run_job(job_config(pictures, codebook, tmp_path / "out", max_reject_rate=0.1)).manifest
    moved = pictures.rename(tmp_path / "elsewhere")
    config = job_config(moved, codebook, tmp_path / "out", max_reject_rate=0.1)
    result = run_job(config)
    assert result.encoded == 0
    assert result.manifest.source.location == str(moved)
    assert result.manifest.shards == before.shards
    assert run_job(config).plan is None
    store = Store.open(tmp_path / "out")
    assert recompute(store, 5).compared == 5
    (moved / "000001.jpg").write_bytes(picture(1, ".jpg"))
    assert retry_rejects(store).recovered == 1
