"""The join of records, pictures and manifests, and what it leaves out."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tiny_set

from manifests.errors import BudgetExceeded, InputError
from manifests.reader import open_manifest
from train_stage.chat import BadSample, ChatEncoder, Encoded
from train_stage.config import PhaseConfig, ResolvedPhase
from train_stage.image_tokens import ImageTokens
from train_stage.samples import load_samples, truncate
from train_stage.tables import Tables
from train_stage.tokenizer import load_tokenizer

POSITIONS = 16
TOKENS = ImageTokens(tiny_set.GEOMETRY, tiny_set.GRID)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASVR_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def encoder(tiny_model) -> ChatEncoder:
    config = tiny_model()
    return ChatEncoder(load_tokenizer(config), config.image_token)


def phase_of(tmp_path: Path, **changes) -> ResolvedPhase:
    values = {
        "name": "instruct",
        "data": [{"path": str(tmp_path / "data.json"), "image_root": str(tmp_path / "images")}],
        "manifests": [str(tmp_path / "tokens")],
        "max_length": 400,
        **changes,
    }
    return PhaseConfig.model_validate(values).with_defaults()


def made(tmp_path: Path, pictures: int = 6) -> dict[str, Tables]:
    ids = tiny_set.save_pictures(tmp_path / "images", pictures)
    tiny_set.save_manifest(tmp_path / "tokens", tmp_path / "images", ids)
    tiny_set.save_records(tmp_path / "data.json", ids, text_only=2)
    return {"codes": Tables([open_manifest(tmp_path / "tokens")])}


def test_every_good_record_becomes_a_sample(tmp_path: Path, encoder: ChatEncoder) -> None:
    codes = made(tmp_path)
    samples, report = load_samples(phase_of(tmp_path), encoder, TOKENS, codes, threads=2, seed=0)
    assert (report.records, report.usable, report.images, report.text_only) == (8, 8, 6, 2)
    assert report.lines() == ["8 records: 8 usable (2 of them text only), 6 images"]
    assert samples.names[1] == "data.json:1 (r1)"
    assert samples.pictures.rows["codes"].row.tolist() == [0, 1, 2, 3, 4, 5]
    for index in range(len(samples)):
        ids, supervised = samples.tokens_of(index)
        images = samples.images_of(index)
        assert int((ids == encoder.image_token_id).sum()) == len(images) == (index < 6)
        assert samples.lengths[index] == len(ids) + (POSITIONS - 1) * len(images)
        assert supervised.any()


def test_what_cannot_be_used_is_named_and_counted(tmp_path: Path, encoder: ChatEncoder) -> None:
    codes = made(tmp_path)
    records = json.loads((tmp_path / "data.json").read_text())
    good = records[0]["conversations"]
    tiny_set.save_pictures(tmp_path / "images" / "new", 1)
    (tmp_path / "images" / "p001.png").unlink()
    (tmp_path / "images" / "p002.png").write_bytes(b"another picture")
    long = [{"from": "human", "value": "a" * 500 + "?"}, {"from": "gpt", "value": "yes"}]
    late = [*long, {"from": "human", "value": "<image>\nand?"}, {"from": "gpt", "value": "no"}]
    records += [
        {"id": "never", "image": "new/p000.png", "conversations": good},
        {"id": "escape", "image": "../secret.png", "conversations": good},
        {"id": "unpaired", "conversations": good[:1]},
        {"id": "unmarked", "image": "p000.png", "conversations": long},
        {"id": "silent", "conversations": long},
        {"id": "cut", "image": "p000.png", "conversations": late},
        {"id": "shape", "conversations": 3},
    ]
    (tmp_path / "data.json").write_text(json.dumps(records))
    samples, report = load_samples(phase_of(tmp_path, max_bad_rate=0.7), encoder, TOKENS, codes, threads=2, seed=0)
    assert dict(report.bad) == {
        "record": 1,
        "outside_root": 1,
        "conversation": 1,
        "image_count": 1,
        "missing_image": 1,
        "changed_image": 1,
        "missing_codes": 1,
        "not_supervised": 1,
        "cut_image": 1,
    }
    assert report.records == report.usable + sum(report.bad.values()) == 15
    assert report.examples["missing_codes"] == "data.json:8 (never): no codes for image new/p000.png"
    assert "p001.png is not in" in report.examples["missing_image"]
    assert len(samples) == report.usable

    with pytest.raises(BudgetExceeded, match=r"9 of 15 samples of phase instruct cannot be used, .* max_bad_rate 0\.1"):
        load_samples(phase_of(tmp_path, max_bad_rate=0.1), encoder, TOKENS, codes, threads=2, seed=0)


def test_without_codes_the_pictures_alone_decide(tmp_path: Path, encoder: ChatEncoder) -> None:
    made(tmp_path)
    samples, _ = load_samples(phase_of(tmp_path, objective={"kind": "none"}), encoder, TOKENS, {}, threads=2, seed=0)
    assert len(samples) == 8
    assert samples.pictures.rows == {}


def test_several_pictures_in_one_sample(tmp_path: Path, encoder: ChatEncoder) -> None:
    codes = made(tmp_path)
    talk = [{"from": "human", "value": "<image> or <image>?"}, {"from": "gpt", "value": "yes"}]
    (tmp_path / "data.json").write_text(
        json.dumps([{"id": "two", "image": ["p003.png", "p001.png"], "conversations": talk}])
    )
    samples, _ = load_samples(phase_of(tmp_path), encoder, TOKENS, codes, threads=2, seed=0)
    assert [samples.pictures.ids[image] for image in samples.images_of(0)] == ["p003.png", "p001.png"]
    assert samples.pictures.rows["codes"].row[samples.images_of(0)].tolist() == [3, 1]


def test_no_records_at_all(tmp_path: Path, encoder: ChatEncoder) -> None:
    codes = made(tmp_path)
    (tmp_path / "data.json").write_text("[]")
    with pytest.raises(InputError, match="hold no records"):
        load_samples(phase_of(tmp_path), encoder, TOKENS, codes, threads=2, seed=0)


IMAGE_ID = 99


def encoded(ids: list[int], supervised: list[int]) -> Encoded:
    return Encoded(np.array(ids, dtype=np.int32), np.array(supervised, dtype=np.bool_))


@pytest.mark.parametrize(("max_length", "kept", "length"), [(100, 4, 7), (7, 4, 7), (6, 3, 6)])
def test_truncation_counts_expanded_images(max_length: int, kept: int, length: int) -> None:
    made_shorter, found = truncate(encoded([1, IMAGE_ID, 3, 4], [0, 0, 1, 1]), IMAGE_ID, np.array([4]), max_length)
    assert (len(made_shorter.ids), found) == (kept, length)


@pytest.mark.parametrize(
    ("ids", "supervised", "images", "max_length", "reason"),
    [
        ([1, IMAGE_ID, 3, 4], [0, 0, 1, 1], 1, 4, "cut_image"),
        ([1, 2, 3, IMAGE_ID], [0, 1, 1, 0], 1, 3, "cut_image"),
        ([1, 2, 3, 4], [0, 0, 0, 1], 0, 3, "not_supervised"),
        ([1, 2, 3, 4], [1, 0, 0, 0], 0, 9, "not_supervised"),  # nothing comes before the first token
        ([1, IMAGE_ID, 3, 4], [0, 0, 1, 1], 0, 9, "image_count"),
    ],
)
def test_what_truncation_refuses(ids: list, supervised: list, images: int, max_length: int, reason: str) -> None:
    with pytest.raises(BadSample) as refused:
        truncate(encoded(ids, supervised), IMAGE_ID, np.full(images, 4), max_length)
    assert refused.value.reason == reason


def test_ratios_repeat_a_file_or_take_a_fixed_part_of_it(tmp_path: Path, encoder: ChatEncoder) -> None:
    codes = made(tmp_path)
    tiny_set.save_records(tmp_path / "more.json", ["p000.png", "p001.png"], text_only=0)
    root = str(tmp_path / "images")
    data = [
        {"path": str(tmp_path / "data.json"), "image_root": root, "ratio": 0.5},
        {"path": str(tmp_path / "more.json"), "image_root": root, "ratio": 2},
    ]
    drawn = []
    for seed in (0, 0, 1):
        samples, report = load_samples(phase_of(tmp_path, data=data), encoder, TOKENS, codes, threads=2, seed=seed)
        assert report.lines()[0].endswith("the ratios make 8 samples an epoch of them")
        names = [name.split()[0] for name in samples.names]
        assert names[4:] == ["more.json:0", "more.json:1"] * 2
        assert len(set(names[:4])) == 4
        assert len(samples.token_start) == 9
        drawn.append(names[:4])
    assert drawn[0] == drawn[1] != drawn[2]


def test_ratios_that_leave_nothing_are_an_error(tmp_path: Path, encoder: ChatEncoder) -> None:
    codes = made(tmp_path)
    data = [{"path": str(tmp_path / "data.json"), "image_root": str(tmp_path / "images"), "ratio": 0.01}]
    with pytest.raises(InputError, match="leave no sample"):
        load_samples(phase_of(tmp_path, data=data), encoder, TOKENS, codes, threads=2, seed=0)
