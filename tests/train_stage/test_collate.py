from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny_set
import torch
from PIL import Image

from manifests.errors import InputError
from manifests.geometry import content_mask, make_views
from manifests.reader import open_manifest
from train_stage.batch import IGNORE, NO_TOKEN, count_text_targets
from train_stage.chat import ChatEncoder
from train_stage.collate import Collator, is_fill
from train_stage.config import PhaseConfig
from train_stage.image_tokens import ImageTokens
from train_stage.samples import load_samples
from train_stage.tables import Tables
from train_stage.tokenizer import load_tokenizer

PICTURES, TEXT_ONLY = 5, 2
POSITIONS = 16


@pytest.fixture
def collator(tmp_path: Path, tiny_model, monkeypatch: pytest.MonkeyPatch) -> Collator:
    monkeypatch.setenv("ASVR_CACHE", str(tmp_path / "cache"))
    ids = tiny_set.save_pictures(tmp_path / "images", PICTURES)
    tiny_set.save_manifest(tmp_path / "tokens", tmp_path / "images", ids)
    tiny_set.save_records(tmp_path / "data.json", ids, text_only=TEXT_ONLY)
    config = tiny_model()
    encoder = ChatEncoder(load_tokenizer(config), config.image_token)
    data = [{"path": str(tmp_path / "data.json"), "image_root": str(tmp_path / "images")}]
    phase = PhaseConfig.model_validate({"name": "instruct", "data": data, "manifests": ["m"]}).with_defaults()
    codes = Tables([open_manifest(tmp_path / "tokens")])
    tables = {"codes": codes}
    samples, _ = load_samples(phase, encoder, ImageTokens(tiny_set.GEOMETRY, tiny_set.GRID), tables, threads=1, seed=0)
    codes.open_values(samples.pictures.rows["codes"])
    return Collator(
        samples, tables, ["codes"], tiny_set.GEOMETRY, tiny_set.GRID, encoder.image_token_id, pad_token_id=0
    )


def test_images_are_expanded_and_joined_with_their_codes(collator: Collator, tmp_path: Path) -> None:
    chosen = np.array([3, PICTURES, 0])  # the middle one has no picture
    batch = collator(chosen)
    lengths = collator.samples.lengths[chosen]
    assert batch.input_ids.shape == batch.labels.shape == (1, lengths.sum())
    starts = np.concatenate([[0], np.cumsum(lengths)])
    assert batch.position_ids[0].tolist() == [place for length in lengths for place in range(length)]
    assert batch.sample_ids == [collator.samples.names[i] for i in chosen]
    assert batch.targets["codes"].shape == (2, POSITIONS, len(tiny_set.SIZES))
    flat = batch.input_ids.flatten()
    for view, image in enumerate([3, 0]):
        assert (flat[batch.view_position[view]] == collator.image_token_id).all()
        assert batch.view_position[view].diff().tolist() == [1] * (POSITIONS - 1)
        sample = [0, 2][view]
        assert starts[sample] <= batch.view_position[view, 0] < starts[sample + 1]
        picture = np.asarray(Image.open(tmp_path / "images" / f"p{image:03}.png"))
        views, boxes = make_views(picture, tiny_set.GEOMETRY)
        assert np.array_equal(batch.views[view].numpy(), views[0])
        mask = content_mask(boxes, tiny_set.GRID, picture.shape[1], picture.shape[0])
        assert batch.target_mask[view].tolist() == mask.tolist()
        assert np.array_equal(
            batch.targets["codes"][view].numpy(),
            collator.tables["codes"].values(collator.samples.pictures.rows["codes"], image)[0],
        )
    assert not batch.target_mask.all(), "letterbox bars are not scored"
    assert int((flat == collator.image_token_id).sum()) == 2 * POSITIONS


def test_labels_are_the_ids_of_supervised_tokens(collator: Collator) -> None:
    batch = collator(np.array([0, 4]))
    scored = batch.labels != IGNORE
    assert (batch.labels[scored] == batch.input_ids[scored]).all()
    lengths = collator.samples.lengths[[0, 4]].tolist()
    for own, index in zip(scored[0].split(lengths), [0, 4], strict=True):
        assert int(own.sum()) == int(collator.samples.tokens_of(index)[1].sum())


def test_the_first_token_of_a_sample_is_no_target_of_the_sample_before_it(collator: Collator) -> None:
    collator.samples.supervised[:] = True
    batch = collator(np.array([PICTURES, 1, PICTURES + 1]))
    assert ((batch.labels == IGNORE) == (batch.position_ids == 0)).all()
    assert count_text_targets(batch) == int((collator.samples.lengths[[PICTURES, 1, PICTURES + 1]] - 1).sum())


def test_text_alone_gets_the_dummy_view(collator: Collator) -> None:
    batch = collator(np.array([PICTURES, PICTURES + 1]))
    assert batch.views.shape == (1, tiny_set.VIEW, tiny_set.VIEW, 3)
    assert (batch.view_position == NO_TOKEN).all()
    assert not batch.target_mask.any()
    assert not is_fill(batch)


def test_no_samples_make_a_micro_batch_that_nothing_scores(collator: Collator) -> None:
    batch = collator(np.empty(0, dtype=np.int64))
    assert is_fill(batch)
    assert (batch.labels == IGNORE).all()
    assert not batch.target_mask.any()


def test_the_same_samples_give_the_same_batch(collator: Collator) -> None:
    first, second = collator(np.array([2, 5])), collator(np.array([2, 5]))
    for name in ("input_ids", "labels", "views", "target_mask", "view_keys", "view_position"):
        assert torch.equal(getattr(first, name), getattr(second, name))
    assert torch.equal(first.targets["codes"], second.targets["codes"])


def test_another_picture_of_the_same_size_is_noticed(collator: Collator, tmp_path: Path) -> None:
    path = tmp_path / "images" / "p001.png"
    data = bytearray(path.read_bytes())
    data[-20] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"p001\.png in .*, of sample data\.json:1 \(r1\), is not the picture"):
        collator(np.array([1]))


def test_a_picture_that_is_gone_is_named(collator: Collator, tmp_path: Path) -> None:
    (tmp_path / "images" / "p001.png").unlink()
    with pytest.raises(InputError, match=r"p001\.png .*, of sample data\.json:1 \(r1\), cannot be used"):
        collator(np.array([1]))
