"""LLaVA-NeXT in training: every code meets the feature of its own patch, whatever the shape of the picture."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tiny_run
import tiny_set
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextConfig
from transformers.models.llava_next.modeling_llava_next import LlavaNextModel

from manifests.anyres import NEWLINE, tiling
from manifests.errors import InputError
from manifests.reader import open_manifest
from manifests.schema import Geometry
from train_stage.batch import NO_TOKEN, Batch
from train_stage.chat import ChatEncoder
from train_stage.collate import Collator
from train_stage.config import PhaseConfig
from train_stage.image_tokens import ImageTokens, locate
from train_stage.library import VisualCodesLoss
from train_stage.objective_config import CodesObjective
from train_stage.objectives.codes import select_targets
from train_stage.samples import load_samples
from train_stage.tables import Tables
from train_stage.tokenizer import load_tokenizer

VIEW, GRID, CELL, POSITIONS = 28, (4, 4), 7, 16
PINPOINTS = tuple((rows * VIEW, columns * VIEW) for rows, columns in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3)))
ANYRES = Geometry(mode="anyres", size=VIEW, background=(0, 0, 0), grid_pinpoints=PINPOINTS)

SIZES = [
    (640, 480), (480, 640), (500, 375), (56, 56), (57, 55), (28, 28), (84, 28), (28, 84), (85, 29), (31, 90),
    (300, 100), (100, 300), (299, 101), (160, 90), (90, 160), (200, 30), (30, 200), (61, 57), (9, 11), (1, 40),
]  # fmt: skip


def coordinates(views: np.ndarray) -> np.ndarray:
    """(V, S, S, 3) -> (V, P, 2): red and green of each cell, which say where in the picture it is."""
    cells = views.astype(np.int64).reshape(len(views), GRID[0], CELL, GRID[1], CELL, 3).mean(axis=(2, 4))
    return np.rint(cells.reshape(len(views), POSITIONS, 3)[..., :2]).astype(np.int64)


def save_ramps(root: Path) -> list[str]:
    """Pictures of `SIZES` that tell where one is: red is x, green is y."""
    root.mkdir()
    for number, (width, height) in enumerate(SIZES):
        y, x = np.mgrid[:height, :width]
        red, green = (x * 255 // max(width - 1, 1), y * 255 // max(height - 1, 1))
        pixels = np.stack([red, green, np.full_like(x, 255)], axis=-1).astype(np.uint8)
        Image.fromarray(pixels).save(root / f"p{number:03}.png")
    return [f"p{number:03}.png" for number in range(len(SIZES))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("anyres")


@pytest.fixture(scope="module")
def collator(folder: Path, tiny_model) -> Collator:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ASVR_CACHE", str(folder / "cache"))
        ids = save_ramps(folder / "images")
        tiny_set.save_manifest(
            folder / "tokens", folder / "images", ids, geometry=ANYRES, encode=coordinates, sizes=(256, 256)
        )
        talk = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "yes"}]
        pair = [{"from": "human", "value": "<image> or <image>?"}, {"from": "gpt", "value": "no"}]
        records = [{"id": image_id, "image": image_id, "conversations": talk} for image_id in ids]
        records.append({"id": "two", "image": [ids[5], ids[0]], "conversations": pair})
        (folder / "data.json").write_text(json.dumps(records))
        model = tiny_model()
        encoder = ChatEncoder(load_tokenizer(model), model.image_token)
        data = [{"path": str(folder / "data.json"), "image_root": str(folder / "images")}]
        phase = PhaseConfig.model_validate({"name": "instruct", "data": data, "manifests": ["m"]}).with_defaults()
        tables = {"codes": Tables([open_manifest(folder / "tokens")])}
        samples, _ = load_samples(phase, encoder, ImageTokens(ANYRES, GRID), tables, threads=1, seed=0)
        tables["codes"].open_values(samples.pictures.rows["codes"])
        return Collator(samples, tables, ["codes"], ANYRES, GRID, encoder.image_token_id, pad_token_id=0)


@pytest.fixture(scope="module")
def llava_next() -> LlavaNextModel:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    tower = CLIPVisionConfig(**sizes, image_size=VIEW, patch_size=CELL)
    pinpoints = [list(pinpoint) for pinpoint in PINPOINTS]
    text = LlamaConfig(**sizes, vocab_size=8)
    return LlavaNextModel(LlavaNextConfig(vision_config=tower, text_config=text, image_grid_pinpoints=pinpoints))


def features_in_text(batch: Batch, features_VPC: torch.Tensor) -> torch.Tensor:
    """(B*L, C): features at their tokens, `NEWLINE` at newlines, 2 * NEWLINE where there is neither."""
    text = torch.full((batch.input_ids.numel(), features_VPC.shape[-1]), 2.0 * NEWLINE)
    there = batch.view_position != NO_TOKEN
    text[batch.view_position[there]] = features_VPC[there]
    text[batch.newline_position] = NEWLINE
    return text


@pytest.mark.parametrize("number", range(len(SIZES)))
def test_every_code_stands_at_its_own_feature(collator: Collator, llava_next: LlavaNextModel, number: int) -> None:
    """The picture's patches carry their coordinates, as pixels for the features and as codes in the shard."""
    batch = collator(np.array([number]))
    width, height = SIZES[number]
    features_VPC = torch.from_numpy(coordinates(batch.views.numpy())).float()
    newline = torch.full((2,), float(NEWLINE))
    [expected], _ = llava_next.pack_image_features([features_VPC], torch.tensor([[height, width]]), "default", newline)

    is_image = batch.input_ids.flatten() == collator.image_token_id
    text = features_in_text(batch, features_VPC)
    assert torch.equal(text[is_image], expected)
    assert (text[~is_image] == 2.0 * NEWLINE).all()
    assert collator.samples.lengths[number] == len(text)
    assert collator.samples.image_tokens[number] == len(expected)

    index, codes, count = select_targets(batch.view_position, batch.target_mask, batch.targets["codes"], 2, "none")
    assert torch.equal(codes.float(), text[index])
    assert count == len(set(index.tolist())) >= POSITIONS


def test_a_code_is_predicted_from_the_token_before_it(collator: Collator) -> None:
    batch = collator(np.array([len(SIZES)]))  # two pictures in one sample
    text = features_in_text(batch, torch.from_numpy(coordinates(batch.views.numpy())).float())
    index, codes, count = select_targets(
        batch.view_position, batch.target_mask, batch.targets["codes"], 2, "next", batch.base_view
    )
    assert torch.equal(codes.float(), text[index + 1])
    assert (batch.input_ids.flatten()[index] == collator.image_token_id).all()
    assert count == int(batch.target_mask.sum()) - 2, "nothing comes before the first cell of a picture"
    assert bool((text[index] == NEWLINE).all(dim=1).any()), "a newline predicts the row after it"


def test_pictures_in_one_sample_follow_each_other(collator: Collator, llava_next: LlavaNextModel) -> None:
    batch = collator(np.array([len(SIZES), 3]))
    views = coordinates(batch.views.numpy())
    packed = torch.cat([packed_by_transformers(llava_next, views, batch, which) for which in ((5, 0), (0, 1), (3, 2))])
    text = features_in_text(batch, torch.from_numpy(views).float())
    assert torch.equal(text[batch.input_ids.flatten() == collator.image_token_id], packed)
    assert int(batch.base_view.sum()) == 3


def packed_by_transformers(
    llava_next: LlavaNextModel, views: np.ndarray, batch: Batch, which: tuple[int, int]
) -> torch.Tensor:
    number, place = which
    starts = [*batch.base_view.nonzero().flatten().tolist(), len(views)]
    own = torch.from_numpy(views[starts[place] : starts[place + 1]]).float()
    size = torch.tensor([[SIZES[number][1], SIZES[number][0]]])
    [expected], _ = llava_next.pack_image_features([own], size, "default", torch.full((2,), float(NEWLINE)))
    return expected


def test_padding_cells_are_neither_tokens_twice_nor_targets(collator: Collator) -> None:
    batch = collator(np.array([15]))  # 200 x 30: mostly bars
    assert (batch.view_position == NO_TOKEN).any()
    assert not batch.target_mask[batch.view_position == NO_TOKEN].any()
    placed = torch.cat([batch.view_position[batch.view_position != NO_TOKEN], batch.newline_position])
    assert len(placed) == len(placed.unique()) == int((batch.input_ids == collator.image_token_id).sum())


def test_counts_are_the_lengths_of_the_orders() -> None:
    for geometry in (ANYRES, tiny_set.GEOMETRY):
        tokens = ImageTokens(geometry, GRID)
        sizes = np.array([*SIZES, SIZES[0]], dtype=np.int32)
        assert tokens.counts(sizes).tolist() == [len(tokens.order(*size)) for size in sizes.tolist()]


def test_one_view_has_its_cells_row_by_row() -> None:
    tokens = ImageTokens(tiny_set.GEOMETRY, GRID)
    cells, newlines = locate(tokens.order(9, 5), np.arange(7, 7 + POSITIONS), 1, POSITIONS)
    assert cells.tolist() == [list(range(7, 7 + POSITIONS))]
    assert newlines.size == 0


def test_rows_of_a_table_are_as_long_as_their_pictures_have_views(collator: Collator) -> None:
    tables = collator.tables["codes"]
    lengths = [len(tables.values(collator.samples.pictures.rows["codes"], image)) for image in range(len(SIZES))]
    assert lengths == [1 + tiles.rows * tiles.columns for tiles in (tiling(*size, ANYRES) for size in SIZES)]
    assert len(set(lengths)) > 2


@pytest.mark.parametrize("shift", ["none", "next"])
def test_in_other_training_loops_too_every_code_meets_its_own_feature(
    collator: Collator, llava_next: LlavaNextModel, folder: Path, monkeypatch: pytest.MonkeyPatch, shift: str
) -> None:
    """`VisualCodesLoss` against the cross-entropy of what Transformers puts at each token."""
    monkeypatch.setenv("ASVR_CACHE", str(folder / "cache"))
    settings = CodesObjective.model_validate({"head": tiny_run.HEAD, "shift": shift})
    loss = VisualCodesLoss([folder / "tokens"], 32, settings)
    batch = collator(np.array([len(SIZES), 3]))
    shown = (5, 0, 3)
    ids = [f"p{number:03}.png" for number in shown]
    views = coordinates(batch.views.numpy())
    torch.manual_seed(0)
    hidden_BLH = torch.randn(1, batch.input_ids.numel(), 32)

    packed = [packed_by_transformers(llava_next, views, batch, (number, place)) for place, number in enumerate(shown)]
    codes_ND = torch.cat(packed)
    is_first = torch.cat([torch.arange(len(own)) == 0 for own in packed])
    back = 1 if shift == "next" else 0
    scored = (codes_ND != NEWLINE).any(dim=1) & ~(is_first & bool(back))
    places = (batch.input_ids.flatten() == collator.image_token_id).nonzero().flatten()[scored]
    hidden_NH, codes_ND = hidden_BLH[0, places - back], codes_ND[scored].long()
    logits = loss.objective.visual_head(hidden_NH, codes_ND)
    expected = torch.stack([F.cross_entropy(own, codes_ND[:, d]) for d, own in enumerate(logits)]).mean()

    torch.testing.assert_close(loss(hidden_BLH, batch.view_position, ids), expected, rtol=1e-6, atol=0)
    assert not torch.isclose(loss(hidden_BLH, batch.view_position, ids[:1] + ids[:0:-1]), expected, rtol=1e-4)
    with pytest.raises(
        InputError, match=r"is \(3, 16\), but the 3 images have \(\d+, 16\) .* give every view of an image"
    ):
        loss(hidden_BLH, batch.view_position[batch.base_view], ids)
