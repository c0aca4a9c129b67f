"""The verbs on a folder, through the command line: what they print, and their exit codes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from test_cli import asvr, error_of

from manifests.errors import RecipeError
from manifests.reader import open_manifest
from pipeline.manifest_verbs import seconds

FIRST = Path(__file__).resolve().parents[1] / "data/schema_v1/codes"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    shutil.copytree(FIRST, tmp_path / "out")
    return tmp_path / "out"


def test_forget_says_plainly_what_still_holds_the_image(out):
    printed = asvr("manifest", "forget", out, "0/0.jpg", "absent.jpg").stdout
    assert "1 images forgotten in 1 rewritten units" in printed
    assert "1 ids were not in the set" in printed
    assert "1 older snapshots still show them" in printed
    assert "not touched: the source, copies of the set" in printed
    (out.parent / "ids.txt").write_text("0/2.jpg\n1/1.jpg\n")
    printed = asvr("manifest", "forget", out, "--ids", out.parent / "ids.txt", "--purge").stdout
    assert "2 images forgotten in 2 rewritten units" in printed
    assert "are deleted" in printed
    assert "still show" not in printed
    asvr("verify", out)
    assert [path for path in out.rglob("*") if path.is_file() and b"0/0.jpg" in path.read_bytes()] == []
    error_of("manifest", "forget", out, code=4)


def test_gc_lists_what_goes(out):
    orphan = out / "index-0123456789abcdef.parquet"
    orphan.write_bytes(b"12345")
    assert "0 files, 0 bytes removed" in asvr("gc", out).stdout
    printed = asvr("gc", out, "--older-than", "0s", "--dry-run").stdout
    assert orphan.name in printed
    assert "1 files, 5 bytes would be removed" in printed
    assert orphan.exists()
    found = json.loads(asvr("gc", out, "--older-than", "0s", "--json").stdout)
    assert found["removed"] == [{"path": orphan.name, "bytes": 5}]
    assert found["young"] == []
    assert not orphan.exists()
    assert "is no age" in error_of("gc", out, "--older-than", "soon", code=3)
    assert "holds no token set" in error_of("gc", out.parent, code=4)


@pytest.mark.parametrize(("text", "expected"), [("90s", 90), ("1.5m", 90), ("24h", 86_400), (" 7 d ", 604_800)])
def test_ages(text, expected):
    assert seconds(text) == expected


@pytest.mark.parametrize("text", ["", "24", "h", "-1h", "1w", "1h30m"])
def test_what_is_no_age(text):
    with pytest.raises(RecipeError, match="is no age: write a number"):
        seconds(text)


def test_filter_and_merge(out, tmp_path):
    asvr("manifest", "filter", out, "-o", tmp_path / "a", "--where", "startswith(image_id, '0/')")
    (tmp_path / "ids.jsonl").write_text('"0/0.jpg"\n"0/2.jpg"\n"0/3.jpg"\n"x"\n')
    printed = asvr("manifest", "filter", out, "-o", tmp_path / "b", "--exclude-ids", tmp_path / "ids.jsonl").stdout
    assert "1 of the ids are not in" in printed
    printed = asvr("manifest", "merge", tmp_path / "a", tmp_path / "b", "--output", tmp_path / "m").stdout
    assert "9 images, 6 ok, 3 rejected" in printed
    asvr("verify", tmp_path / "m")
    assert open_manifest(tmp_path / "m").manifest.totals.ok == 6


def test_wrong_filters_and_merges_are_one_sentence(out, tmp_path):
    assert "nothing says what to keep" in error_of("manifest", "filter", out, "-o", tmp_path / "c", code=3)
    wrong = error_of("manifest", "filter", out, "-o", tmp_path / "c", "--where", "width = 3", code=3)
    assert "is not a condition on an image" in wrong
    assert "at least two token sets" in error_of("manifest", "merge", out, "--output", tmp_path / "d", code=4)


def test_verify_rebuilds(out):
    before = (out / "manifest.json").read_bytes()
    (out / "manifest.json").unlink()
    asvr("verify", out, code=8)
    printed = asvr("verify", out, "--rebuild").stdout
    assert "note: the manifest was rebuilt, and 0 commit records were written anew" in printed
    assert (out / "manifest.json").read_bytes() == before
    for path in [out / "manifest.json", *out.glob("commits/*"), *out.glob("snapshots/*")]:
        path.unlink()
    assert "or name a manifest of the same fingerprint with --like" in error_of("verify", out, "--rebuild", code=4)
    notes = json.loads(asvr("verify", out, "--rebuild", "--like", FIRST, "--json").stdout)["notes"]
    assert "lost: the rejects: the next job finds them again" in notes


def test_a_folder_that_does_not_say_how_it_was_made(out):
    assert "has no job.json" in error_of("retry", out, code=4)
    assert "has no job.json" in asvr("verify", out, "--recompute", code=4).stderr


def test_options_that_would_do_nothing_are_refused(out):
    for options in (["--sample", "3"], ["--seed", "3"], ["--like", str(FIRST)]):
        assert "add it" in asvr("verify", out, *options, code=2).stderr


def test_a_damaged_set_is_not_recomputed(out):
    (shard,) = out.glob("shards/u000000-*")
    shard.write_bytes(shard.read_bytes()[:-1])
    printed = asvr("verify", out, "--recompute", code=8).stdout
    assert "nothing was recomputed, because the set is damaged" in printed
