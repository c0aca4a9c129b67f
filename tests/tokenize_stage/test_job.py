"""The job: what is missing is done, what is there stays, and every way to end is clean."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from bad_inputs import make_bad_inputs
from made_jobs import DRIVER, ROOT, content, job_config, make_pictures, make_tokenizer, start_driver

from manifests.commits import commit_path, list_commits, read_commit
from manifests.errors import BudgetExceeded, FingerprintMismatch, InputError, LeaseHeld, StorageError
from manifests.reader import open_manifest
from manifests.storage import Store
from manifests.verify import status, verify
from tokenize_stage.job import run_job
from tokenize_stage.progress import JobProgress


def commits(output: Path) -> list[str]:
    return list_commits(Store.open(output))


def metrics(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def test_a_job_from_folder_to_manifest(pictures: Path, codebook: Path, tmp_path: Path) -> None:
    config = job_config(pictures, codebook, tmp_path / "out")
    seen: list[JobProgress] = []
    result = run_job(config, progress=seen.append)
    assert result.encoded == 20
    assert [shard.rows for shard in result.manifest.shards] == [8, 8, 4]
    assert result.manifest.totals.model_dump(include={"images", "ok", "rejected"}) == {
        "images": 20,
        "ok": 20,
        "rejected": 0,
    }
    assert result.manifest.geometry.background == (123, 116, 103)  # int(255 * the encoder's mean)
    assert verify(tmp_path / "out").problems == []
    done = [state.done for state in seen]
    assert done[0] == 0
    assert done[-1] == 20
    assert done == sorted(done)
    assert (seen[-1].units_done, seen[-1].units_total, seen[-1].eta) == (3, 3, 0)
    lines = metrics(tmp_path / "out")
    assert [line["unit"] for line in lines] == ["u000000", "u000001", "u000002"]
    assert {"time", "images", "images_per_second", "wait_share", "rejected", "seconds"} <= set(lines[0])


def test_the_second_run_does_nothing_quickly_without_torch_or_ray(
    pictures: Path, codebook: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    run_job(job_config(pictures, codebook, output))
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    code = f"import time; began = time.perf_counter()\n{DRIVER}\n" + (
        "print(result.plan, result.encoded, {'torch', 'ray', 'transformers', 'deepspeed'} & set(sys.modules))\n"
        "print(time.perf_counter() - began)"
    )
    for engine in ("local", "ray"):
        config = job_config(pictures, codebook, output, engine=engine)
        done = subprocess.run(
            [sys.executable, "-c", code, config.model_dump_json()], capture_output=True, text=True, check=True, cwd=ROOT
        )
        lines = done.stdout.splitlines()
        assert lines[1] == "None 0 set()"
        assert float(lines[2]) < 3  # alone it takes a third of a second; other tests share the cores
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == before


def test_a_reject_may_speak_of_a_file_whose_name_is_no_text(pictures: Path, codebook: Path, tmp_path: Path) -> None:
    (pictures / "link.png").symlink_to(os.fsdecode(b"gone-\xff.png"))
    run_job(job_config(pictures, codebook, tmp_path / "out", max_reject_rate=1.0))
    (reject,) = open_manifest(tmp_path / "out").rejects().to_pylist()
    assert (reject["image_id"], reject["reason"]) == ("link.png", "missing")
    assert reject["message"].endswith("gone-\\udcff.png")


def test_unit_size_decides_shards_and_nothing_else(pictures: Path, codebook: Path, tmp_path: Path) -> None:
    run_job(job_config(pictures, codebook, tmp_path / "small", unit_size=4))
    run_job(job_config(pictures, codebook, tmp_path / "large", unit_size=100))
    small, large = open_manifest(tmp_path / "small"), open_manifest(tmp_path / "large")
    assert (len(small.shards), len(large.shards)) == (5, 1)
    assert small.manifest.fingerprint == large.manifest.fingerprint
    rows = [[row for table in opened.iter_shards() for row in table.to_pylist()] for opened in (small, large)]
    assert rows[0] == rows[1]
    assert run_job(job_config(pictures, codebook, tmp_path / "large", unit_size=4)).plan is None


def test_bad_inputs_end_as_rejects_or_source_errors(codebook: Path, tmp_path: Path) -> None:
    root = tmp_path / "bad"
    expected = {**make_bad_inputs(root), "absent.png": "missing", "../outside.png": "outside_root"}
    records: list[Any] = [{"id": name, "image": name, "conversations": []} for name in expected]
    records[1:1] = [{"id": 3, "image": {"no": "reference"}}, "text", records[0]]
    for record in records:
        if isinstance(record, dict):
            record["conversations"] = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "yes"}]
    path = tmp_path / "data.json"
    path.write_text(json.dumps(records))
    source = {"kind": "llava", "path": path, "image_root": root}
    config = job_config(root, codebook, tmp_path / "out", source=source, max_reject_rate=0.8)
    manifest = run_job(config).manifest
    rejects = open_manifest(tmp_path / "out").rejects().to_pydict()
    wrong = {name: reason for name, reason in expected.items() if reason}
    assert dict(zip(rejects["image_id"], rejects["reason"], strict=True)) == wrong
    assert manifest.totals.images == len(expected) == manifest.totals.ok + manifest.totals.rejected
    assert manifest.totals.source_errors == 2
    named = [json.loads(line) for line in (tmp_path / "out" / "source_errors.jsonl").read_text().splitlines()]
    assert [error["source_row"] for error in named] == [1, 2]
    assert verify(tmp_path / "out").problems == []
    assert run_job(config).plan is None  # rejects are not tried again by themselves


def test_the_budget_stops_early_and_a_larger_one_goes_on(pictures: Path, codebook: Path, tmp_path: Path) -> None:
    names = sorted(path.relative_to(pictures).as_posix() for path in pictures.rglob("*.*"))
    for name in names[9:12]:
        (pictures / name).write_bytes(b"<html>")
    (pictures / names[19]).write_bytes(b"")
    output = tmp_path / "out"
    with pytest.raises(
        BudgetExceeded, match=r"3 of 20 images are rejects \(not_an_image 3; for example: .*0\.1 allows"
    ):
        run_job(job_config(pictures, codebook, output, max_reject_rate=0.1))
    assert commits(output) == ["u000000", "u000001"]  # the third unit was not begun
    assert not (output / "manifest.json").exists()
    kept = {path: path.stat().st_mtime_ns for name in commits(output) for path in output.glob(f"shards/{name}-*")}

    with pytest.raises(BudgetExceeded, match="3 of 20"):
        run_job(job_config(pictures, codebook, output, max_reject_rate=0.1))
    assert commits(output) == ["u000000", "u000001"]

    result = run_job(job_config(pictures, codebook, output, max_reject_rate=0.2))
    assert (result.encoded, result.manifest.totals.rejected) == (4, 4)
    assert result.manifest.totals.rejected_by_reason == {"empty": 1, "not_an_image": 3}
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    with pytest.raises(BudgetExceeded):
        run_job(job_config(pictures, codebook, output, max_reject_rate=0.1))


def test_a_wrong_image_root_is_noticed_before_anything_is_read(codebook: Path, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "yes"}]
    path.write_text(
        "".join(json.dumps({"id": i, "image": f"{i}.png", "conversations": turns}) + "\n" for i in range(50))
    )
    source = {"kind": "llava", "path": path, "image_root": tmp_path}
    with pytest.raises(BudgetExceeded, match=r"50 of 50 .*missing 50; for example: \d+\.png: no such file below"):
        run_job(job_config(tmp_path, codebook, tmp_path / "out", source=source))
    assert commits(tmp_path / "out") == []


def test_a_set_of_rejects_only_is_a_set(codebook: Path, tmp_path: Path) -> None:
    root = tmp_path / "pictures"
    root.mkdir()
    for number in range(5):
        (root / f"{number}.png").write_bytes(b"no picture")
    manifest = run_job(job_config(root, codebook, tmp_path / "out", max_reject_rate=1.0)).manifest
    assert (manifest.shards, manifest.totals.ok, manifest.totals.rejected) == ([], 0, 5)
    assert verify(tmp_path / "out").problems == []


def test_repaired_rejects_are_encoded_and_nothing_else(pictures: Path, codebook: Path, tmp_path: Path) -> None:
    good = (pictures / "000004.png").read_bytes()
    (pictures / "000004.png").write_bytes(good[:50])
    config = job_config(pictures, codebook, tmp_path / "out", max_reject_rate=0.5)
    assert run_job(config).manifest.totals.rejected == 1
    (pictures / "000004.png").write_bytes(good)
    result = run_job(config.model_copy(update={"max_reject_rate": 0.0}))
    assert (result.encoded, result.copied, result.manifest.totals.rejected) == (1, 7, 0)
    run_job(job_config(pictures, codebook, tmp_path / "clean"))
    assert content(tmp_path / "out") == content(tmp_path / "clean")


def test_added_changed_and_removed_images(pictures: Path, codebook: Path, tmp_path: Path) -> None:
    config = job_config(pictures, codebook, tmp_path / "out")
    first = run_job(config).manifest
    make_pictures(pictures, 2, first=900)
    added = run_job(config)
    assert added.plan is not None
    assert (added.plan.new.count, added.encoded, added.copied) == (2, 2, 0)
    assert added.manifest.shards[:3] == first.shards

    (pictures / "000001.jpg").write_bytes((pictures / "000005.jpg").read_bytes())
    (pictures / "000002.png").unlink()
    changed = run_job(config)
    assert changed.plan is not None
    assert (changed.plan.changed.count, changed.plan.removed.count, changed.encoded) == (1, 1, 1)
    assert changed.manifest.totals.images == 21
    assert verify(tmp_path / "out").problems == []
    codes = open_manifest(tmp_path / "out").read_codes(["000001.jpg", "000005.jpg"])
    assert codes[0].tolist() == codes[1].tolist()
    assert run_job(config).plan is None


def test_removing_needs_no_tokenizer(pictures: Path, codebook: Path, tmp_path: Path) -> None:
    config = job_config(pictures, codebook, tmp_path / "out")
    run_job(config)
    (pictures / "000002.png").unlink()
    code = DRIVER + "print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code, config.model_dump_json()], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.splitlines() == ["encoded 0", "False"]
    assert open_manifest(tmp_path / "out").manifest.totals.images == 19


def test_an_edited_caption_tokenizes_nothing(pictures: Path, codebook: Path, tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    source = {"kind": "llava", "path": path, "image_root": pictures}
    config = job_config(pictures, codebook, tmp_path / "out", source=source)
    for answer in ("one", "another"):
        turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": answer}]
        path.write_text(json.dumps([{"id": answer, "image": "000001.jpg", "conversations": turns}]))
        result = run_job(config)
    assert result.plan is None


def test_a_lost_shard_is_made_again(pictures: Path, codebook: Path, tmp_path: Path) -> None:
    config = job_config(pictures, codebook, tmp_path / "out")
    run_job(config)
    before = content(tmp_path / "out")
    [shard] = (tmp_path / "out" / "shards").glob("u000001-*")
    shard.unlink()
    assert run_job(config).encoded == 8
    assert content(tmp_path / "out") == before


@pytest.mark.parametrize("damage", ["missing", "bytes"])
@pytest.mark.parametrize("name", ["codebook", "index", "rejects"])
def test_a_lost_or_damaged_side_file_is_written_again(
    pictures: Path, codebook: Path, tmp_path: Path, name: str, damage: str
) -> None:
    config = job_config(pictures, codebook, tmp_path / "out")
    file = tmp_path / "out" / getattr(run_job(config).manifest, name).path
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(bytes(file.stat().st_size))
    assert verify(tmp_path / "out").problems != []
    assert run_job(config).encoded == 0
    assert verify(tmp_path / "out").problems == []


def test_rejects_are_counted_once_while_the_job_runs(pictures: Path, codebook: Path, tmp_path: Path) -> None:
    (pictures / "nowhere.png").symlink_to("nothing.png")
    seen: list[JobProgress] = []
    run_job(job_config(pictures, codebook, tmp_path / "out", max_reject_rate=1.0), progress=seen.append)
    assert [seen[0].rejected, max(state.rejected for state in seen), seen[-1].rejected] == [0, 1, 1]


def test_another_fingerprint_is_refused_by_name_before_a_model_is_loaded(
    pictures: Path, codebook: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    run_job(job_config(pictures, codebook, output))
    other = make_tokenizer(tmp_path / "other", seed=1)
    with pytest.raises(FingerprintMismatch, match=r"weights_sha256.*--replace"):
        run_job(job_config(pictures, other, output))
    with pytest.raises(FingerprintMismatch, match=r"dtype: \"float32\" -> \"bfloat16\""):
        run_job(job_config(pictures, codebook, output, dtype="bfloat16"))
    config = job_config(pictures, codebook, output, geometry={"mode": "squash", "size": 28})
    code = DRIVER.replace("sys.exit(", "print({'torch', 'ray'} & set(sys.modules)); sys.exit(")
    done = subprocess.run(
        [sys.executable, "-c", code, config.model_dump_json()], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 5
    assert "geometry.mode" in done.stdout
    assert done.stdout.splitlines()[1] == "set()"


def test_an_unfinished_job_is_known_by_its_settings_too(pictures: Path, codebook: Path, tmp_path: Path) -> None:
    (pictures / "more" / "000000.png").write_bytes(b"")
    output = tmp_path / "out"
    with pytest.raises(BudgetExceeded):
        run_job(job_config(pictures, codebook, output, max_reject_rate=0.0))
    assert status(output).state == "interrupted"
    with pytest.raises(FingerprintMismatch, match="dtype"):
        run_job(job_config(pictures, codebook, output, max_reject_rate=0.5, dtype="bfloat16"))


def test_replace_keeps_the_old_manifest_until_the_new_one_is_whole(
    pictures: Path, codebook: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    old = run_job(job_config(pictures, codebook, output)).manifest
    squash = {"geometry": {"mode": "squash", "size": 28}}
    (pictures / "more" / "000018.png").write_bytes(b"broken")
    with pytest.raises(BudgetExceeded):
        run_job(job_config(pictures, codebook, output, **squash), replace=True)
    assert open_manifest(output).manifest == old
    new = run_job(job_config(pictures, codebook, output, max_reject_rate=0.5, **squash)).manifest  # goes on by itself
    assert new.fingerprint != old.fingerprint
    assert verify(output).problems == []
    for shard in old.shards:
        assert (output / shard.path).exists()  # left to gc: a run pinned to the old snapshot can still read it


def test_a_second_driver_is_refused(pictures: Path, codebook: Path, tmp_path: Path) -> None:
    config = job_config(pictures, codebook, tmp_path / "out")
    with Store.open(tmp_path / "out").lease("tokenize"):
        driver = start_driver(config)
        assert f"process {os.getpid()}" in driver.communicate()[0]
        assert driver.returncode == LeaseHeld.exit_code
    assert run_job(config).encoded == 20


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_with_one_sentence_and_keeps_what_is_committed(
    codebook: Path, tmp_path: Path, signum: signal.Signals
) -> None:
    output = tmp_path / "out"
    config = job_config(make_pictures(tmp_path / "p", 160), codebook, output, unit_size=2, batch_size=2)
    driver = start_driver(config)
    while len(list((output / "commits").glob("*.zst")) if output.exists() else []) < 5:
        assert driver.poll() is None
        time.sleep(0.002)
    driver.send_signal(signum)
    out, err = driver.communicate(timeout=60)
    assert driver.returncode == 128 + signum
    assert out.startswith("Interrupted: stopped by a signal with ")
    assert "Traceback" not in err
    kept = commits(output)
    assert len(kept) >= 5
    result = run_job(config)
    assert result.encoded == 160 - 2 * len(kept)
    assert result.manifest.totals.ok == 160


def test_storage_that_fails_stops_with_one_sentence_and_spoils_nothing(codebook: Path, tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "yes"}]
    path = tmp_path / "data.json"
    # Reading /proc/self/mem from its start is an I/O error; the other file reads well and is no picture.
    path.write_text(json.dumps([{"id": n, "image": n, "conversations": turns} for n in ("mem", "status")]))
    source = {"kind": "llava", "path": path, "image_root": "/proc/self"}
    config = job_config(tmp_path, codebook, tmp_path / "out", source=source, unit_size=1, max_reject_rate=1.0)
    with pytest.raises(StorageError, match=r"1 of 2 units could not be read \(first u000000: reading image mem .*kept"):
        run_job(config)
    store = Store.open(tmp_path / "out")
    assert list_commits(store) == ["u000001"]
    assert read_commit(store, "u000001").rejects[0].reason in {"not_an_image", "empty"}
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_an_output_that_cannot_be_written_is_one_sentence(pictures: Path, codebook: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="file"):
        run_job(job_config(pictures, codebook, tmp_path / "file" / "out"))


@pytest.mark.gpu
def test_on_a_gpu_resumed_runs_and_more_workers_give_the_same_bytes(
    pictures: Path, codebook: Path, tmp_path: Path
) -> None:
    clean = job_config(pictures, codebook, tmp_path / "clean", device="cuda")
    run_job(clean)
    resumed = clean.model_copy(update={"output": tmp_path / "resumed"})
    run_job(resumed)
    (tmp_path / "resumed" / commit_path("u000001")).unlink()
    assert run_job(resumed).encoded == 8
    assert content(tmp_path / "resumed") == content(tmp_path / "clean")
    ray = {"address": "local", "num_workers": 2, "gpus_per_worker": 0.5}
    run_job(job_config(pictures, codebook, tmp_path / "ray", device="cuda", engine="ray", ray=ray))
    assert content(tmp_path / "ray") == content(tmp_path / "clean")


def test_views_of_another_size_are_refused(pictures: Path, codebook: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"geometry\.size"):
        run_job(job_config(pictures, codebook, tmp_path / "out", geometry={"mode": "pad", "size": 56}))
