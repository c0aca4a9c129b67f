"""merge and filter: new sets from finished ones, whole or refused, and nothing encoded."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from flaky_store import die_everywhere
from hypothesis import given
from hypothesis import strategies as st
from made_sets import KEYS, assemble, commit_unit, header, make_set, spec
from set_content import held, one_set
from test_features import make_features

from manifests.commits import list_commits, read_commit
from manifests.derived import refuse_derived
from manifests.errors import FingerprintMismatch, InputError, RecipeError, VerificationFailed
from manifests.filter import Choice, filter_set
from manifests.fingerprint import fingerprint
from manifests.forget import forget_images
from manifests.id_files import read_ids
from manifests.merge import merge_sets
from manifests.reader import open_manifest
from manifests.schema import SourceIdentity
from manifests.storage import Store
from manifests.verify import verify


def locators(folder: Path) -> dict[str, tuple]:
    columns = ["image_id", "file", "offset", "length"]
    return {row.pop("image_id"): tuple(row.values()) for table in open_manifest(folder).iter_shards(columns) for row in table.to_pylist()}  # fmt: skip


def test_a_merged_set_holds_what_its_parts_held(tmp_path):
    make_set(tmp_path / "a")
    one_set(tmp_path / "b", {"u000000": ["x.jpg", "y.jpg", "z.jpg"], "u000001": ["w.jpg"]}, {"y.jpg"}, source_errors=2)
    report = merge_sets([tmp_path / "a", tmp_path / "b"], Store.open(tmp_path / "m"))
    assert report.duplicates == 0
    assert verify(tmp_path / "m").problems == []
    assert held(tmp_path / "m") == held(tmp_path / "a") | held(tmp_path / "b")
    assert locators(tmp_path / "m") == locators(tmp_path / "a") | locators(tmp_path / "b")
    manifest = open_manifest(tmp_path / "m").manifest
    assert manifest.totals.source_errors == 2
    assert manifest.source.kind == "merge"
    assert [source["location"] for source in manifest.source.settings["sources"]] == ["images", "images"]
    assert list_commits(Store.open(tmp_path / "m"))[-2:] == ["1.u000000", "1.u000001"]


def test_shards_are_linked_on_one_disk(tmp_path):
    make_set(tmp_path / "a")
    one_set(tmp_path / "b", {"u000000": ["x.jpg"]})
    merge_sets([tmp_path / "a", tmp_path / "b"], Store.open(tmp_path / "m"))
    for shard in open_manifest(tmp_path / "m").shards:
        assert (tmp_path / "m" / shard.path).stat().st_nlink == 2


def test_a_merged_set_can_be_merged_and_filtered_again(tmp_path):
    for name in "abc":
        one_set(tmp_path / name, {"u000000": [f"{name}.jpg", f"{name}2.jpg"]})
    merge_sets([tmp_path / "a", tmp_path / "b"], Store.open(tmp_path / "ab"))
    merge_sets([tmp_path / "ab", tmp_path / "c"], Store.open(tmp_path / "abc"))
    assert list_commits(Store.open(tmp_path / "abc")) == ["1.u000000", "0.0.u000000", "0.1.u000000"]
    filter_set(tmp_path / "abc", Choice(exclude=pa.array(["b.jpg"])), Store.open(tmp_path / "f"))
    assert verify(tmp_path / "abc").problems == verify(tmp_path / "f").problems == []
    assert set(held(tmp_path / "f")) == {"a.jpg", "a2.jpg", "b2.jpg", "c.jpg", "c2.jpg"}


def test_an_image_of_several_sets_is_kept_once(tmp_path):
    one_set(tmp_path / "a", {"u000000": ["1.jpg", "2.jpg", "3.jpg"]}, {"3.jpg"})
    one_set(tmp_path / "b", {"u000000": ["1.jpg", "2.jpg", "4.jpg"]}, {"2.jpg"})
    one_set(tmp_path / "c", {"u000000": ["1.jpg", "3.jpg"]})
    report = merge_sets([tmp_path / name for name in "abc"], Store.open(tmp_path / "m"))
    assert verify(tmp_path / "m").problems == []
    assert report.duplicates == 4  # 1.jpg twice, and the rejects 2.jpg and 3.jpg that another set could read
    assert held(tmp_path / "m") == held(tmp_path / "b") | held(tmp_path / "a") | {
        "3.jpg": held(tmp_path / "c")["3.jpg"]
    }


def test_sets_that_disagree_about_an_image_are_refused(tmp_path):
    one_set(tmp_path / "a", {"u000000": ["1.jpg", "2.jpg"]})
    one_set(tmp_path / "b", {"u000000": ["2.jpg"]}, seed=7)
    with pytest.raises(InputError, match=r"hold different codes of '2.jpg': filter it out"):
        merge_sets([tmp_path / "a", tmp_path / "b"], Store.open(tmp_path / "m"))
    assert not (tmp_path / "m").exists()


def test_other_fingerprints_are_refused_by_key(tmp_path):
    one_set(tmp_path / "a", {"u000000": ["1.jpg"]})
    keys = {**KEYS, "geometry": {"mode": "squash", "size": 28}}
    store = Store.open(tmp_path / "b")
    commit_unit(store, "u000000", ["2.jpg"], mark=fingerprint(keys))
    assemble(store, fingerprint_keys=keys)
    with pytest.raises(FingerprintMismatch, match=r'geometry.mode: "pad" -> "squash"'):
        merge_sets([tmp_path / "a", tmp_path / "b"], Store.open(tmp_path / "m"))


def test_unfinished_sets_and_folders_in_use_are_refused(tmp_path):
    make_set(tmp_path / "a")
    one_set(tmp_path / "b", {"u000000": ["x.jpg"]})
    into = Store.open(tmp_path / "m")
    with pytest.raises(InputError, match="at least two"):
        merge_sets([tmp_path / "a"], into)
    with pytest.raises(InputError, match="given twice"):
        merge_sets([tmp_path / "a", tmp_path / "a"], into)
    with pytest.raises(InputError, match="also the output"):
        merge_sets([tmp_path / "a", tmp_path / "b"], Store.open(tmp_path / "b"))
    commit_unit(Store.open(tmp_path / "b"), "u000001", ["y.jpg"])
    with pytest.raises(InputError, match="is not finished"):
        merge_sets([tmp_path / "a", tmp_path / "b"], into)
    (tmp_path / "b/commits/u000001.json.zst").unlink()
    (tmp_path / "b/commits/u000000.json.zst").unlink()
    with pytest.raises(InputError, match="--rebuild"):
        merge_sets([tmp_path / "a", tmp_path / "b"], into)
    (tmp_path / "m").mkdir()
    (tmp_path / "m/notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"is not empty \(it has notes.txt\)"):
        filter_set(tmp_path / "a", Choice(), into)


def test_a_damaged_shard_is_not_copied(tmp_path):
    make_set(tmp_path / "a")
    shard = open_manifest(tmp_path / "a").shards[0]
    whole = (tmp_path / "a" / shard.path).read_bytes()
    (tmp_path / "a" / shard.path).write_bytes(whole[:100] + bytes([whole[100] ^ 1]) + whole[101:])
    with pytest.raises(VerificationFailed, match="sha256 differs"):
        filter_set(tmp_path / "a", Choice(exclude=pa.array(["0/0.jpg"])), Store.open(tmp_path / "f"))
    (tmp_path / "a" / shard.path).write_bytes(whole[:-1])
    with pytest.raises(VerificationFailed):
        filter_set(tmp_path / "a", Choice(), Store.open(tmp_path / "g"))


def test_a_derived_set_is_no_output_of_a_job(tmp_path):
    make_set(tmp_path / "a")
    refuse_derived(Store.open(tmp_path / "a"))
    filter_set(tmp_path / "a", Choice(), Store.open(tmp_path / "f"))
    with pytest.raises(InputError, match="made by asvr manifest filter"):
        refuse_derived(Store.open(tmp_path / "f"))
    with pytest.raises(InputError, match="holds another derived set"):
        filter_set(tmp_path / "a", Choice(condition="width > 11"), Store.open(tmp_path / "f"))


def test_the_same_command_again_does_not_bring_back_what_was_forgotten(tmp_path):
    make_set(tmp_path / "a")
    one_set(tmp_path / "b", {"u000000": ["x.jpg", "y.jpg"]}, {"y.jpg"})
    commands = {
        "m": lambda store: merge_sets([tmp_path / "a", tmp_path / "b"], store),
        "f": lambda store: filter_set(tmp_path / "a", Choice(exclude=pa.array(["0/0.jpg"])), store),
    }
    for name, command in commands.items():
        store = Store.open(tmp_path / name)
        command(store)
        forget_images(store, ["0/1.jpg", *(f"1/{i}.jpg" for i in range(5)), "y.jpg"], purge=True)
        before = held(tmp_path / name), list_commits(store)
        command(store)
        assert (held(tmp_path / name), list_commits(store)) == before
        assert "y.jpg" not in open_manifest(tmp_path / name).rejects()["image_id"].to_pylist()
        assert verify(tmp_path / name).problems == []


def test_the_same_command_again_changes_nothing(tmp_path):
    make_set(tmp_path / "a")
    choice = Choice(exclude=pa.array(["0/0.jpg"]))
    first = filter_set(tmp_path / "a", choice, Store.open(tmp_path / "f"))
    before = {path: path.read_bytes() for path in (tmp_path / "f").rglob("*") if path.is_file()}
    assert filter_set(tmp_path / "a", choice, Store.open(tmp_path / "f")) == first
    assert before == {path: path.read_bytes() for path in (tmp_path / "f").rglob("*") if path.is_file()}


def test_sets_of_features(tmp_path):
    make_features(tmp_path / "a", "bfloat16")
    filter_set(tmp_path / "a", Choice(exclude=pa.array(["0/1.jpg"])), Store.open(tmp_path / "f"))
    filter_set(tmp_path / "a", Choice(ids=pa.array(["0/1.jpg", "1/0.jpg"])), Store.open(tmp_path / "g"))
    merge_sets([tmp_path / "f", tmp_path / "g"], Store.open(tmp_path / "m"))
    for name in "fgm":
        assert verify(tmp_path / name).problems == []
    assert held(tmp_path / "m") == held(tmp_path / "a")


def test_merge_and_filter_may_die_anywhere(tmp_path):
    make_set(tmp_path / "a", units=2)
    one_set(tmp_path / "b", {"u000000": ["x.jpg", "0/0.jpg"]}, {"0/0.jpg"})
    acts = {
        "merge": lambda store: merge_sets([tmp_path / "a", tmp_path / "b"], store),
        "filter": lambda store: filter_set(tmp_path / "a", Choice(exclude=pa.array(["0/2.jpg", "1/1.jpg"])), store),
    }
    for name, act in acts.items():
        folders = die_everywhere(lambda last, name=name: tmp_path / f"{name}{last}", act)
        assert len(folders) > 9
        for folder in folders:
            if (folder / "manifest.json").exists():
                assert verify(folder).problems == []
            act(Store.open(folder))
            assert verify(folder).problems == []
            assert held(folder) == held(folders[-1])


@given(data=st.data())
def test_any_choice_keeps_its_images_and_their_codes(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("set")
    names = [f"{i}.jpg" for i in range(12)]
    rejected = data.draw(st.sets(st.sampled_from(names)))
    cuts = sorted(data.draw(st.sets(st.integers(1, 11), max_size=3)))
    units = {f"u{i:06d}": names[a:b] for i, (a, b) in enumerate(zip([0, *cuts], [*cuts, 12], strict=True))}
    one_set(folder / "a", units, rejected)
    kept = data.draw(st.sets(st.sampled_from(names), min_size=1))
    report = filter_set(folder / "a", Choice(ids=pa.array([*kept, "absent"])), Store.open(folder / "f"))
    assert report.absent == 1
    assert verify(folder / "f").problems == []
    assert held(folder / "f") == {name: value for name, value in held(folder / "a").items() if name in kept}
    totals = report.manifest.totals
    assert (totals.images, totals.rejected) == (len(kept), len(kept & rejected))
    rest = set(names) - kept
    if rest:
        filter_set(folder / "a", Choice(exclude=pa.array(sorted(kept))), Store.open(folder / "g"))
        merge_sets([folder / "f", folder / "g"], Store.open(folder / "m"))
        assert verify(folder / "m").problems == []
        assert held(folder / "m") == held(folder / "a")


CONDITIONS = {
    "width >= 11 and height >= 30": {"0/2.jpg", "0/3.jpg", "0/4.jpg"},
    "width == 10 or not width < 13": {"0/0.jpg", "0/4.jpg"},
    "10 < width <= 12": {"0/2.jpg", "0/3.jpg"},
    "width * height < 331": {"0/0.jpg", "0/2.jpg"},
    "width / height > 0.4": {"0/4.jpg"},
    "image_id in ('0/0.jpg', '0/4.jpg', 'x')": {"0/0.jpg", "0/4.jpg"},
    "width not in [10, 11, 12]": {"0/4.jpg"},
    "startswith(image_id, '0/') and width - 12 > -1": {"0/3.jpg", "0/4.jpg"},
    "(width != 10)": {"0/2.jpg", "0/3.jpg", "0/4.jpg"},
}


@pytest.mark.parametrize("text", CONDITIONS)
def test_conditions(tmp_path, text):
    make_set(tmp_path / "a", units=1)
    filter_set(tmp_path / "a", Choice(condition=text), Store.open(tmp_path / "f"))
    assert set(held(tmp_path / "f")) == CONDITIONS[text]


@pytest.mark.parametrize(
    "text",
    [
        "", "width", "1", "width >", "widht > 3", "width > 'a'", "__import__('os').system('x')", "width.real > 1",
        "[width for width in (1,)]", "lambda: width", "width if width else width", "startswith(image_id, width)",
        "width and height", "not width", "width > True", "width in width", "1 < 2", "width > 1 " + "and width > 1 " * 99,
        "(" * 300 + "width" + ")" * 300, "not " * 240 + "width > 1 and (", "width > 9**999", "width > 1e999 ; 2",
        "width > 99999999999999999999999999", "width\x00 > 1",
    ],
)  # fmt: skip
def test_what_is_no_condition_is_one_sentence(tmp_path, text):
    make_set(tmp_path / "a", units=1)
    with pytest.raises((RecipeError, InputError), match=r"is not a condition on an image \(|no image of"):
        filter_set(tmp_path / "a", Choice(condition=text), Store.open(tmp_path / "f"))
    assert not (tmp_path / "f").exists()


def test_an_empty_choice_is_refused(tmp_path):
    make_set(tmp_path / "a")
    with pytest.raises(InputError, match=r"no image of .* is left"):
        filter_set(tmp_path / "a", Choice(condition="width > 1000"), Store.open(tmp_path / "f"))


def test_files_of_ids(tmp_path):
    ids = ["a b.jpg", "ü.jpg", "c\td.jpg"]
    (tmp_path / "ids.txt").write_text("a b.jpg\r\nü.jpg\n\nc\td.jpg")
    (tmp_path / "ids.jsonl").write_text('"a b.jpg"\n{"image_id": "ü.jpg", "x": 1}\n\n{"image_id": "c\\td.jpg"}\n')
    pq.write_table(pa.table({"image_id": ids, "n": [1, 2, 3]}), tmp_path / "ids.parquet")
    for name in ("ids.txt", "ids.jsonl", "ids.parquet"):
        assert read_ids(tmp_path / name).to_pylist() == ids


@pytest.mark.parametrize(
    ("name", "data", "what"),
    [
        ("absent.txt", None, "does not exist"),
        ("bad.txt", b"\xff\xfe", "cannot be read"),
        ("bad.jsonl", b'"a"\n{"id": "b"}\n', "line 2 of .* holds no image_id"),
        ("bad2.jsonl", b'"a"\n{"image_id": 3}\n', "line 2"),
        ("bad.parquet", b"PAR1", "cannot be read"),
    ],
)
def test_bad_files_of_ids(tmp_path, name, data, what):
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=what):
        read_ids(tmp_path / name)


def test_a_parquet_file_without_image_ids_says_what_it_has(tmp_path):
    pq.write_table(pa.table({"id": ["a"], "n": [1]}), tmp_path / "ids.parquet")
    with pytest.raises(InputError, match=r"ids.parquet has no column 'image_id', it has id, n: name the column"):
        read_ids(tmp_path / "ids.parquet")


def test_a_cut_shard_is_the_shard_that_a_job_would_have_written(tmp_path):
    """The same rows encode to the same bytes however they came together."""
    make_set(tmp_path / "a", units=1)
    filter_set(tmp_path / "a", Choice(exclude=pa.array(["0/1.jpg"])), Store.open(tmp_path / "f"))
    assert open_manifest(tmp_path / "a").shards == open_manifest(tmp_path / "f").shards
    cut = read_commit(Store.open(tmp_path / "f"), "u000000")
    assert cut.rejects == []
    assert cut.members.image_id == ["0/0.jpg", "0/2.jpg", "0/3.jpg", "0/4.jpg"]


def test_the_description_names_no_secret_and_no_list_of_ids(tmp_path):
    make_set(tmp_path / "a")
    filter_set(tmp_path / "a", Choice(exclude=pa.array(["0/0.jpg"])), Store.open(tmp_path / "f"))
    text = (tmp_path / "f/derived.json").read_text()
    assert "0/0.jpg" not in text
    assert json.loads(text)["input"]["location"] == str(tmp_path / "a")


def test_header_is_that_of_the_parts(tmp_path):
    other = SourceIdentity(kind="folder", location="elsewhere")
    one_set(tmp_path / "a", {"u000000": ["1.jpg"]})
    one_set(tmp_path / "b", {"u000000": ["2.jpg"]}, source=other)
    manifest = merge_sets([tmp_path / "a", tmp_path / "b"], Store.open(tmp_path / "m")).manifest
    assert manifest.source.location.startswith("several")
    assert manifest.tokenizer == spec()
    assert manifest.fingerprint_keys == KEYS
    for mine, given_ in zip(open_manifest(tmp_path / "m").codebooks(), header().codebooks, strict=True):
        assert np.array_equal(mine, given_)
