"""A token set whose pictures and output are in a bucket, from the first job to the trainer's table."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_jobs import job_config, make_pictures, make_tokenizer, picture

from manifests.errors import LeaseHeld
from manifests.reader import open_manifest
from manifests.storage import LEASE_FILES, Store
from manifests.verify import status, verify
from tokenize_stage.job import run_job
from train_stage.tables import Tables

IMAGES = 20


@pytest.fixture(scope="module")
def codebook(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASVR_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def pictures(tmp_path: Path, s3: str) -> Store:
    """The same pictures on this disk, in `tmp_path/pictures`, and in the bucket."""
    folder, store = make_pictures(tmp_path / "pictures", IMAGES), Store.open(f"{s3}/pictures")
    for path in folder.rglob("*"):
        if path.is_file():
            store.write(path.relative_to(folder).as_posix(), path.read_bytes())
    return store


def test_a_set_in_a_bucket_is_the_set_on_a_disk(tmp_path: Path, s3: str, pictures: Store, codebook: Path) -> None:
    config = job_config(pictures.location, codebook, f"{s3}/out")
    assert run_job(config).encoded == IMAGES
    local = run_job(job_config(tmp_path / "pictures", codebook, tmp_path / "out"))
    opened, on_disk = open_manifest(f"{s3}/out"), open_manifest(tmp_path / "out")
    assert [shard.sha256 for shard in opened.shards] == [shard.sha256 for shard in on_disk.shards]
    assert opened.manifest.totals == local.manifest.totals
    names = opened.index()["image_id"].to_pylist()
    assert all(np.array_equal(a, b) for a, b in zip(opened.read_codes(names), on_disk.read_codes(names), strict=True))

    assert verify(f"{s3}/out").problems == []
    assert verify(f"{s3}/out/manifest.json", deep=False).problems == []
    report = status(f"{s3}/out")
    assert (report.state, report.ok, report.problems) == ("complete", local.manifest.totals.ok, [])

    tables = Tables([opened])
    rows = tables.find(names)
    tables.open_values(rows)
    expected = on_disk.read_codes(names)
    assert all(np.array_equal(tables.values(rows, image), codes) for image, codes in enumerate(expected))


def test_a_rerun_does_nothing_and_soon_and_a_changed_picture_is_all_that_is_encoded(
    s3: str, pictures: Store, codebook: Path
) -> None:
    config, store = job_config(pictures.location, codebook, f"{s3}/out"), Store.open(f"{s3}/out")
    run_job(config)
    before = dict(store.walk())
    began = time.monotonic()
    assert run_job(config).plan is None
    assert time.monotonic() - began < 2
    assert dict(store.walk()) == before

    gone, changed, *_ = pictures.list()
    pictures.delete(gone)
    pictures.write(changed, picture(99, Path(changed).suffix))
    pictures.write("new.png", picture(100, ".png"))
    assert run_job(config).encoded == 2
    assert verify(f"{s3}/out").problems == []
    names = open_manifest(f"{s3}/out").index()["image_id"].to_pylist()
    assert gone not in names
    assert {changed, "new.png"} <= set(names)


def test_a_shard_that_goes_missing_is_found_and_made_again(s3: str, pictures: Store, codebook: Path) -> None:
    config, store = job_config(pictures.location, codebook, f"{s3}/out"), Store.open(f"{s3}/out")
    run_job(config)
    whole = {path: store.read(path) for path in store.list("shards/")}
    lost, spoilt, *_ = whole
    store.delete(lost)
    store.write(spoilt, whole[spoilt][:-1] + b"?")
    assert {problem.code for problem in verify(f"{s3}/out").problems} == {"shard_missing", "shard_sha256"}
    assert [problem.code for problem in status(f"{s3}/out").problems] == ["shard_missing"]
    store.delete(spoilt)
    run_job(config)
    assert {path: store.read(path) for path in store.list("shards/")} == whole
    assert verify(f"{s3}/out").problems == []


RECIPE = """
tokenize:
  vqa:
    source: {{kind: folder, path: {source}}}
    geometry: {{mode: pad, size: 28}}
    tokenizer: {{kind: fitted, path: {codebook}}}
    output: {output}
    unit_size: 1
    max_reject_rate: 0.5
    device: cpu
    batch_size: 1
"""


def command(*arguments: str, **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "pipeline", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def test_a_killed_driver_is_followed_at_once_and_nothing_is_lost(
    tmp_path: Path, s3: str, pictures: Store, codebook: Path
) -> None:
    recipe, out = tmp_path / "recipe.yaml", f"{s3}/out"
    recipe.write_text(RECIPE.format(source=pictures.location, codebook=codebook, output=out))
    store = Store.open(out)
    killed = command("tokenize", str(recipe))
    while len(store.list("commits/")) < 3:
        assert killed.poll() is None, killed.communicate()
        time.sleep(0.01)
    with pytest.raises(LeaseHeld), store.lease("tokenize"):
        pass
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    kept = dict(store.walk("commits/"))
    assert status(out).state == "interrupted"

    for _ in range(2):
        began = time.monotonic()
        done = command("tokenize", str(recipe))
        said, errors = done.communicate()
        assert done.returncode == 0, errors
    assert "nothing to do" in said
    assert time.monotonic() - began < 5
    assert kept.items() <= dict(store.walk("commits/")).items()
    assert verify(out).problems == []
    assert set(store.list(".")) <= LEASE_FILES


def test_a_bucket_that_is_not_there_ends_the_command_in_one_sentence(
    tmp_path: Path, s3: str, codebook: Path, pictures: Store
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(source=pictures.location, codebook=codebook, output="s3://no-such-bucket-here/out"))
    done = command("tokenize", str(recipe), env=os.environ | {"AWS_SECRET_ACCESS_KEY": "wJalrXUtn"})
    said, errors = done.communicate()
    assert done.returncode == 10
    assert errors.splitlines()[-1].startswith("error: cannot read s3://no-such-bucket-here/out/")
    assert "the bucket does not exist" in errors
    assert "Traceback" not in errors
    assert "wJalrXUtn" not in said + errors
