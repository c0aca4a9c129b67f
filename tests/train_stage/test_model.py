"""The training forward pass: equal to the released ASVR code and to Hugging Face's LLaVA, whatever the batch holds."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, SiglipVisionConfig, SiglipVisionModel

from manifests.errors import InputError
from train_stage import config as configs
from train_stage.batch import IGNORE, Batch, count_text_targets, dummy_view
from train_stage.model import AsvrModel, assemble, build_model, load_trainable, set_trainable
from train_stage.objectives import CodesObjective
from train_stage.tower import PixelNorm

if TYPE_CHECKING:
    from .conftest import AsvrGolden

VIEW, POSITIONS, DEPTH, SIZE = 28, 16, 3, 11
OBJECTIVE = configs.CodesObjective(head=configs.HeadConfig(width=16, layers=1, heads=2, ffn=16))
MakeConfig = Callable[..., configs.ModelConfig]


def codebooks() -> list[np.ndarray]:
    return [np.random.default_rng(d).normal(size=(SIZE, 6)).astype(np.float32) for d in range(DEPTH)]


def tiny(config: configs.ModelConfig, *, seed: int = 0, objective: object = OBJECTIVE) -> AsvrModel:
    return build_model(config, objective, codebooks(), torch.float32, seed=seed)


def image_batch(model: AsvrModel, seed: int = 0) -> Batch:
    """Two rows with an image each, the second padded on the right by three tokens."""
    generator = torch.Generator().manual_seed(seed)
    length = POSITIONS + 9
    ids = torch.randint(3, 60, (2, length), generator=generator)
    ids[0, 2 : 2 + POSITIONS] = ids[1, 1 : 1 + POSITIONS] = model.llava.config.image_token_id
    mask = torch.ones_like(ids)
    mask[1, -3:] = 0
    labels = ids.clone()
    labels[:, : POSITIONS + 4] = IGNORE
    labels[mask == 0] = IGNORE
    cells = torch.arange(POSITIONS)
    return Batch(
        input_ids=ids,
        attention_mask=mask,
        labels=labels,
        views=torch.randint(0, 256, (2, VIEW, VIEW, 3), dtype=torch.uint8, generator=generator),
        view_position=torch.stack([2 + cells, length + 1 + cells]),
        codes=torch.randint(0, SIZE, (2, POSITIONS, DEPTH), generator=generator),
        codes_mask=torch.ones(2, POSITIONS, dtype=torch.bool),
        sample_ids=["a", "b"],
    )


def text_batch(supervised: bool = True) -> Batch:
    views, position, mask = dummy_view(VIEW, POSITIONS)
    ids = torch.arange(3, 13)[None]
    labels = ids.clone() if supervised else torch.full_like(ids, IGNORE)
    return Batch(ids, torch.ones_like(ids), labels, views, position, None, mask, ["t"])


def golden_model(golden: AsvrGolden) -> AsvrModel:
    llama = LlamaForCausalLM(LlamaConfig(**golden.numbers["llama_config"]))
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 24}
    tower = SiglipVisionModel(SiglipVisionConfig(**sizes, image_size=56, patch_size=14))
    tower.load_state_dict({k.removeprefix("vision_model."): v for k, v in golden.tower.items()})
    llava = assemble(llama, tower, image_token_id=1, vision_feature_layer=-2)
    hidden_size = golden.numbers["llama_config"]["hidden_size"]
    objective = CodesObjective(configs.CodesObjective(head=golden.head), hidden_size, golden.codebooks)
    model = AsvrModel(llava, objective, PixelNorm((0.5,) * 3, (0.5,) * 3))
    set_trainable(model, {"projector", "visual_head", "language_model"})
    load_trainable(model, golden.trainable())
    return model


def golden_batch(golden: AsvrGolden) -> Batch:
    """The release's batch with its image marker (-200) replaced by 16 image tokens."""
    tensors = golden.tensors
    rows: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
    for name, image_value in (("input_ids", 1), ("attention_mask", 1), ("labels", IGNORE)):
        for row, ids in zip(tensors[name].tolist(), tensors["input_ids"].tolist(), strict=True):
            at = ids.index(golden.numbers["image_token_index"])
            rows[name].append([*row[:at], *[image_value] * POSITIONS, *row[at + 1 :]])
    made = {name: torch.tensor(value) for name, value in rows.items()}
    first = torch.tensor([[3], [made["input_ids"].shape[1] + 3]])
    return Batch(
        **made,
        views=((tensors["images"] * 0.5 + 0.5) * 255).round().to(torch.uint8).permute(0, 2, 3, 1),
        view_position=first + torch.arange(POSITIONS),
        codes=tensors["semantic_codes"].long(),
        codes_mask=torch.ones(2, POSITIONS, dtype=torch.bool),
        sample_ids=["0", "1"],
    )


def test_losses_logits_and_gradients_equal_the_released_code(asvr_golden: AsvrGolden) -> None:
    model, batch = golden_model(asvr_golden), golden_batch(asvr_golden)
    sums = model(batch)
    numbers = asvr_golden.numbers
    assert sums.text_loss_sum.item() / sums.text_tokens == pytest.approx(numbers["loss_text"], abs=1e-4)
    visual = sums.visual_loss_sum_D.mean().item() / sums.visual_positions
    assert visual == pytest.approx(numbers["loss_vision"], abs=1e-4)

    loss = sums.total(sums.text_tokens, sums.visual_positions, visual_weight=1.0)
    assert loss.item() == pytest.approx(numbers["loss"], abs=1e-4)
    loss.backward()
    gradients = {name: p.grad.norm().item() for name, p in model.named_parameters() if p.grad is not None}
    expected = {asvr_golden.rename(name): norm for name, norm in numbers["grad_norms"].items()}
    assert gradients.keys() == expected.keys()
    assert gradients == pytest.approx(expected, rel=1e-4, abs=1e-6)

    with torch.no_grad():
        logits = model.llava.lm_head(model.hidden_states(batch))
    kept = batch.attention_mask.bool()
    torch.testing.assert_close(logits[kept], asvr_golden.tensors["text_logits"][kept], rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["siglip", "clip", "dinov2", "vit"])
def test_hidden_states_equal_hugging_face(tiny_model: MakeConfig, kind: str) -> None:
    model = tiny(tiny_model(kind)).eval()
    batch = image_batch(model)
    with torch.no_grad():
        ours = model.llava.lm_head(model.hidden_states(batch))
        theirs = model.llava(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            pixel_values=model.pixel_norm(batch.views),
        ).logits
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_text_loss_equals_hugging_face(tiny_model: MakeConfig) -> None:
    model = tiny(tiny_model())
    batch = image_batch(model)
    sums = model(batch)
    theirs = model.llava(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        pixel_values=model.pixel_norm(batch.views),
        labels=batch.labels,
    ).loss
    assert sums.text_tokens == count_text_targets(batch)
    assert (sums.text_loss_sum / sums.text_tokens).item() == pytest.approx(theirs.item(), abs=1e-6)


def test_the_first_visual_loss_is_ln_k(tiny_model: MakeConfig) -> None:
    model = tiny(tiny_model())
    sums = model(image_batch(model))
    assert sums.visual_loss_sum_D.mean().item() / sums.visual_positions == pytest.approx(math.log(SIZE), abs=0.1)


@pytest.mark.parametrize("supervised", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_every_trainable_parameter_has_a_gradient_without_images(
    tiny_model: MakeConfig, tied: bool, supervised: bool
) -> None:
    model = tiny(tiny_model(tied=tied))
    set_trainable(model, {"projector", "visual_head", "language_model"})
    sums = model(text_batch(supervised))
    sums.total(1, 1, 1.0).backward()
    lacking = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not lacking
    unused = [*model.llava.model.multi_modal_projector.parameters(), *model.objective.parameters()]
    assert not any(p.grad.any() for p in unused)
    assert sums.visual_positions == 0
    assert sums.visual_loss_sum_D.tolist() == [0.0] * DEPTH


def test_gradients_of_a_batch_are_the_sum_of_its_parts(tiny_model: MakeConfig) -> None:
    model = tiny(tiny_model())
    set_trainable(model, {"projector", "visual_head"})
    gradients = []
    for batches in ([image_batch(model)], [image_batch(model), text_batch()]):
        model.zero_grad()
        for batch in batches:
            model(batch).total(7, 32, 1.0).backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    # The text-only micro-batch reaches neither projector nor head.
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


def test_a_dummy_view_touches_no_token(tiny_model: MakeConfig) -> None:
    model = tiny(tiny_model()).eval()
    batch = text_batch()
    with torch.no_grad():
        plain = model.llava.model.language_model(input_ids=batch.input_ids).last_hidden_state
        torch.testing.assert_close(model.hidden_states(batch), plain, rtol=0, atol=0)


def test_parts_train_as_asked_and_the_tower_never(tiny_model: MakeConfig, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny(tiny_model())
    with caplog.at_level(logging.INFO, "train_stage.model"):
        set_trainable(model, {"projector", "visual_head"})
    lines = [record.getMessage() for record in caplog.records]
    assert [line.split(",")[0].split()[-1] for line in lines] == ["frozen", "trains", "trains", "frozen"]
    model(image_batch(model)).total(1, 1, 1.0).backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == {
        name for name, _ in model.named_parameters() if name.startswith("objective.") or "projector" in name
    }
    assert not model.train().vision_tower.training


def test_fresh_weights_follow_the_seed_alone(tiny_model: MakeConfig) -> None:
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    first = tiny(tiny_model()).state_dict()
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(2)
    second, third = tiny(tiny_model()).state_dict(), tiny(tiny_model(), seed=1).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(
        first["objective.visual_head.projector.0.weight"], third["objective.visual_head.projector.0.weight"]
    )


@pytest.mark.parametrize("tied", [True, False])
def test_the_vocabulary_grows_for_the_image_token(tiny_model: MakeConfig, tied: bool) -> None:
    config = tiny_model(tied=tied)
    old = LlamaForCausalLM.from_pretrained(config.language_model)
    model = tiny(config)
    rows, before = model.llava.lm_head.weight, old.lm_head.weight
    assert len(before) < len(rows) == model.llava.config.text_config.vocab_size
    assert len(rows) % 64 == 0
    assert model.llava.config.image_token_id >= len(before)
    torch.testing.assert_close(rows[: len(before)], before)
    torch.testing.assert_close(rows[-1], before.mean(dim=0))
    assert (model.llava.lm_head.weight is model.llava.get_input_embeddings().weight) == tied


def test_bfloat16_is_for_parameters_and_losses_stay_float32(tiny_model: MakeConfig) -> None:
    model = build_model(tiny_model(), OBJECTIVE, codebooks(), torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    # Rotary frequencies and codebook vectors; rounded ones would differ from those of the reloaded export.
    assert {b.dtype for b in model.buffers() if b.is_floating_point()} == {torch.float32}
    set_trainable(model, {"projector", "visual_head", "language_model"})
    sums = model(image_batch(model))
    sums.total(1, 1, 1.0).backward()
    assert sums.text_loss_sum.dtype == sums.visual_loss_sum_D.dtype == torch.float32
    assert sums.visual_loss_sum_D.mean().item() / sums.visual_positions == pytest.approx(math.log(SIZE), abs=0.1)


class TestLoadTrainable:
    """Weights of an earlier phase."""

    def test_round_trip(self, tiny_model: MakeConfig) -> None:
        trained, fresh = tiny(tiny_model(), seed=5), tiny(tiny_model())
        set_trainable(trained, {"projector", "visual_head"})
        state = {name: p.detach().clone() for name, p in trained.named_parameters() if p.requires_grad}
        load_trainable(fresh, state)
        own = dict(fresh.named_parameters())
        assert state
        assert all(torch.equal(own[name], tensor) for name, tensor in state.items())

    def test_head_of_another_shape(self, tiny_model: MakeConfig) -> None:
        model = tiny(tiny_model())
        with pytest.raises(InputError, match="use manifests of the same codebook"):
            load_trainable(model, {"objective.visual_head.code_proj.weight": torch.zeros(16, 7)})

    def test_incomplete_part(self, tiny_model: MakeConfig) -> None:
        model = tiny(tiny_model())
        name = "llava.model.multi_modal_projector.linear_1.weight"
        with pytest.raises(InputError, match="only some weights of the projector"):
            load_trainable(model, {name: dict(model.named_parameters())[name].detach()})

    def test_unknown_name(self, tiny_model: MakeConfig) -> None:
        with pytest.raises(InputError, match=r"holds llava\.nothing"):
            load_trainable(tiny(tiny_model()), {"llava.nothing": torch.zeros(1)})

    def test_the_head_is_left_aside_by_a_phase_without_one(self, tiny_model: MakeConfig) -> None:
        model = tiny(tiny_model(), objective=configs.NoneObjective())
        load_trainable(model, {"objective.visual_head.code_proj.weight": torch.zeros(16, 6)})


def test_a_folder_without_a_model_is_one_sentence(tiny_model: MakeConfig, tmp_path: object) -> None:
    config = tiny_model().model_copy(update={"language_model": str(tmp_path), "tokenizer": tiny_model().language_model})
    with pytest.raises(InputError, match="no language model can be read"):
        build_model(config, OBJECTIVE, codebooks(), torch.float32)
