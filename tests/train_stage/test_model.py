"""The training forward pass: equal to the released ASVR code and to Hugging Face's LLaVA, whatever the batch holds."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from tiny_models import target
from transformers import LlamaConfig, LlamaForCausalLM, SiglipVisionConfig, SiglipVisionModel

from manifests.errors import InputError
from train_stage import config as configs
from train_stage.batch import IGNORE, Batch, count_text_targets, dummy_view
from train_stage.build import assemble, build_model
from train_stage.model import AsvrModel
from train_stage.objectives.codes import CodesObjective
from train_stage.parts import load_trainable, set_trainable
from train_stage.tower import PixelNorm

if TYPE_CHECKING:
    from .conftest import AsvrGolden

VIEW, POSITIONS, DEPTH, SIZE = 28, 16, 3, 11
OBJECTIVE = configs.CodesObjective(head=configs.HeadConfig(width=16, layers=1, heads=2, ffn=16))
MakeConfig = Callable[..., configs.ModelConfig]


def codebooks() -> list[np.ndarray]:
    return [np.random.default_rng(d).normal(size=(SIZE, 6)).astype(np.float32) for d in range(DEPTH)]


def tiny(config: configs.ModelConfig, *, seed: int = 0, terms: tuple = (OBJECTIVE,)) -> AsvrModel:
    return build_model(config, terms, {"codes": target(codebooks())}, torch.float32, view_size=VIEW, seed=seed)


def image_batch(model: AsvrModel, seed: int = 0) -> Batch:
    """Two samples with an image each, end to end, the second three tokens shorter."""
    generator = torch.Generator().manual_seed(seed)
    length = POSITIONS + 9
    ids = torch.randint(3, 60, (1, 2 * length - 3), generator=generator)
    cells = torch.arange(POSITIONS)
    view_position = torch.stack([2 + cells, length + 1 + cells])
    ids[0, view_position] = model.llava.config.image_token_id
    labels = ids.clone()
    labels[:, : POSITIONS + 4] = labels[:, length : length + POSITIONS + 4] = IGNORE
    return Batch(
        input_ids=ids,
        position_ids=torch.cat([torch.arange(length), torch.arange(length - 3)])[None],
        labels=labels,
        views=torch.randint(0, 256, (2, VIEW, VIEW, 3), dtype=torch.uint8, generator=generator),
        view_position=view_position,
        targets={"codes": torch.randint(0, SIZE, (2, POSITIONS, DEPTH), generator=generator)},
        target_mask=torch.ones(2, POSITIONS, dtype=torch.bool),
        sample_ids=["a", "b"],
    )


def text_batch(supervised: bool = True) -> Batch:
    views, position, mask = dummy_view(VIEW, POSITIONS)
    ids = torch.arange(3, 13)[None]
    labels = ids.clone() if supervised else torch.full_like(ids, IGNORE)
    return Batch(ids, torch.arange(10)[None], labels, views, position, mask, ["t"])


def golden_model(golden: AsvrGolden) -> AsvrModel:
    llama = LlamaForCausalLM(LlamaConfig(**golden.numbers["llama_config"]))
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 24}
    tower = SiglipVisionModel(SiglipVisionConfig(**sizes, image_size=56, patch_size=14))
    tower.load_state_dict({k.removeprefix("vision_model."): v for k, v in golden.tower.items()})
    llava = assemble(llama, tower, image_token_id=1, vision_feature_layer=-2)
    hidden_size = golden.numbers["llama_config"]["hidden_size"]
    objective = CodesObjective(configs.CodesObjective(head=golden.head), hidden_size, golden.codebooks)
    model = AsvrModel(llava, torch.nn.ModuleDict({"codes": objective}), PixelNorm((0.5,) * 3, (0.5,) * 3))
    set_trainable(model, {"projector", "visual_head", "language_model"})
    load_trainable(model, golden.trainable())
    return model


def golden_batch(golden: AsvrGolden) -> Batch:
    """The release's batch, its image marker (-200) replaced by 16 image tokens, and its two padded rows packed into one."""
    tensors = golden.tensors
    packed: dict[str, list[int]] = {"input_ids": [], "position_ids": [], "labels": []}
    first = []
    for row, mask in enumerate(tensors["attention_mask"].bool()):
        ids, labels = (tensors[name][row][mask].tolist() for name in ("input_ids", "labels"))
        at = ids.index(golden.numbers["image_token_index"])
        first.append(len(packed["input_ids"]) + at)
        ids, labels = (
            [*values[:at], *[filler] * POSITIONS, *values[at + 1 :]] for values, filler in ((ids, 1), (labels, IGNORE))
        )
        for name, values in (("input_ids", ids), ("position_ids", range(len(ids))), ("labels", labels)):
            packed[name] += values
    return Batch(
        **{name: torch.tensor([values]) for name, values in packed.items()},
        views=((tensors["images"] * 0.5 + 0.5) * 255).round().to(torch.uint8).permute(0, 2, 3, 1),
        view_position=torch.tensor(first)[:, None] + torch.arange(POSITIONS),
        targets={"codes": tensors["semantic_codes"].long()},
        target_mask=torch.ones(2, POSITIONS, dtype=torch.bool),
        sample_ids=["0", "1"],
    )


def test_losses_logits_and_gradients_equal_the_released_code(asvr_golden: AsvrGolden) -> None:
    model, batch = golden_model(asvr_golden), golden_batch(asvr_golden)
    sums = model(batch)
    numbers = asvr_golden.numbers
    assert sums.text_loss_sum.item() / sums.text_tokens == pytest.approx(numbers["loss_text"], abs=1e-4)
    visual = sums.terms["codes"].loss_sum_D.mean().item() / sums.terms["codes"].targets
    assert visual == pytest.approx(numbers["loss_vision"], abs=1e-4)

    loss = sums.total(sums.text_tokens, {"codes": sums.terms["codes"].targets}, {"codes": 1.0})
    assert loss.item() == pytest.approx(numbers["loss"], abs=1e-4)
    loss.backward()
    gradients = {name: p.grad.norm().item() for name, p in model.named_parameters() if p.grad is not None}
    expected = {asvr_golden.rename(name): norm for name, norm in numbers["grad_norms"].items()}
    assert gradients.keys() == expected.keys()
    assert gradients == pytest.approx(expected, rel=1e-4, abs=1e-6)

    with torch.no_grad():
        logits = model.llava.lm_head(model.hidden_states(batch))[0]
    # The release pads on the right, after the 15 tokens more that an image is than its marker.
    lengths = (asvr_golden.tensors["attention_mask"].sum(dim=1) + POSITIONS - 1).tolist()
    for own, theirs in zip(logits.split(lengths), asvr_golden.tensors["text_logits"], strict=True):
        torch.testing.assert_close(own, theirs[: len(own)], rtol=0, atol=1e-4)


def separate(batch: Batch) -> list[Batch]:
    """The samples of a row of samples with one image each, every one a batch of its own."""
    lengths = torch.diff(
        torch.cat([(batch.position_ids[0] == 0).nonzero()[:, 0], torch.tensor([batch.labels.numel()])])
    )
    starts = [0, *lengths.cumsum(0).tolist()]
    return [
        Batch(
            *(getattr(batch, name)[:, start : start + length] for name in ("input_ids", "position_ids", "labels")),
            batch.views[view : view + 1],
            batch.view_position[view : view + 1] - start,
            batch.target_mask[view : view + 1],
            batch.sample_ids[view : view + 1],
            {"codes": batch.targets["codes"][view : view + 1]},
        )
        for view, (start, length) in enumerate(zip(starts, lengths.tolist(), strict=False))
    ]


def test_packed_samples_equal_separate_ones(tiny_model: MakeConfig) -> None:
    """Hidden states, losses and gradients, with images; so no sample sees another."""
    model = tiny(tiny_model())
    set_trainable(model, {"projector", "visual_head", "language_model"})
    batch = image_batch(model)
    found = []
    for batches in ([batch], separate(batch)):
        model.zero_grad()
        sums = [model(own) for own in batches]
        for own in sums:
            own.total(11, {"codes": 32}, {"codes": 1.0}).backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        hidden = torch.cat([model.hidden_states(own).detach() for own in batches], dim=1)
        text = torch.stack([own.text_loss_sum.detach() for own in sums]).sum() / sum(own.text_tokens for own in sums)
        visual = torch.stack([own.terms["codes"].loss_sum_D.detach() for own in sums]).sum(dim=0) / 32
        found.append((hidden, text, visual, gradients))
    assert len(separate(batch)) == 2
    for packed, alone in zip(*found, strict=True):
        torch.testing.assert_close(packed, alone, rtol=0, atol=1e-6)


def test_labels_that_follow_another_sample_are_no_targets_of_it(tiny_model: MakeConfig) -> None:
    model = tiny(tiny_model())
    batch = image_batch(model)
    assert count_text_targets(batch) == sum(count_text_targets(own) for own in separate(batch)) > 0


@pytest.mark.parametrize("kind", ["siglip", "clip", "dinov2", "vit"])
def test_hidden_states_equal_hugging_face(tiny_model: MakeConfig, kind: str) -> None:
    model = tiny(tiny_model(kind)).eval()
    batch = image_batch(model)
    with torch.no_grad():
        ours = model.llava.lm_head(model.hidden_states(batch))
        theirs = model.llava(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            pixel_values=model.pixel_norm(batch.views),
            use_cache=False,
        ).logits
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_text_loss_equals_hugging_face(tiny_model: MakeConfig) -> None:
    model = tiny(tiny_model())
    batch = image_batch(model)
    sums = model(batch)
    theirs = model.llava(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        pixel_values=model.pixel_norm(batch.views),
        use_cache=False,
        labels=batch.labels,
    ).loss
    assert sums.text_tokens == count_text_targets(batch)
    assert (sums.text_loss_sum / sums.text_tokens).item() == pytest.approx(theirs.item(), abs=1e-6)


def test_the_first_visual_loss_is_ln_k(tiny_model: MakeConfig) -> None:
    model = tiny(tiny_model())
    sums = model(image_batch(model))
    assert sums.terms["codes"].loss_sum_D.mean().item() / sums.terms["codes"].targets == pytest.approx(
        math.log(SIZE), abs=0.1
    )


@pytest.mark.parametrize("supervised", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_every_trainable_parameter_has_a_gradient_without_images(
    tiny_model: MakeConfig, tied: bool, supervised: bool
) -> None:
    model = tiny(tiny_model(tied=tied))
    set_trainable(model, {"projector", "visual_head", "language_model"})
    sums = model(text_batch(supervised))
    sums.total(1, {"codes": 1}, {"codes": 1.0}).backward()
    lacking = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not lacking
    unused = [*model.llava.model.multi_modal_projector.parameters(), *model.objectives.parameters()]
    assert not any(p.grad.any() for p in unused)
    assert sums.terms["codes"].targets == 0
    assert sums.terms["codes"].loss_sum_D.tolist() == [0.0] * DEPTH


def test_gradients_of_a_batch_are_the_sum_of_its_parts(tiny_model: MakeConfig) -> None:
    model = tiny(tiny_model())
    set_trainable(model, {"projector", "visual_head"})
    gradients = []
    for batches in ([image_batch(model)], [image_batch(model), text_batch()]):
        model.zero_grad()
        for batch in batches:
            model(batch).total(7, {"codes": 32}, {"codes": 1.0}).backward()
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
    with caplog.at_level(logging.INFO, "train_stage.parts"):
        set_trainable(model, {"projector", "visual_head"})
    lines = [record.getMessage() for record in caplog.records]
    assert [line.split(",")[0].split()[-1] for line in lines] == ["frozen", "trains", "trains", "frozen"]
    model(image_batch(model)).total(1, {"codes": 1}, {"codes": 1.0}).backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == {
        name for name, _ in model.named_parameters() if name.startswith("objectives.") or "projector" in name
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
        first["objectives.codes.visual_head.projector.0.weight"],
        third["objectives.codes.visual_head.projector.0.weight"],
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
    model = build_model(tiny_model(), (OBJECTIVE,), {"codes": target(codebooks())}, torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    # Rotary frequencies and codebook vectors; rounded ones would differ from those of the reloaded export.
    assert {b.dtype for b in model.buffers() if b.is_floating_point()} == {torch.float32}
    set_trainable(model, {"projector", "visual_head", "language_model"})
    sums = model(image_batch(model))
    sums.total(1, {"codes": 1}, {"codes": 1.0}).backward()
    assert sums.text_loss_sum.dtype == sums.terms["codes"].loss_sum_D.dtype == torch.float32
    assert sums.terms["codes"].loss_sum_D.mean().item() / sums.terms["codes"].targets == pytest.approx(
        math.log(SIZE), abs=0.1
    )


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
            load_trainable(model, {"objectives.codes.visual_head.code_proj.weight": torch.zeros(16, 7)})

    def test_incomplete_part(self, tiny_model: MakeConfig) -> None:
        model = tiny(tiny_model())
        name = "llava.model.multi_modal_projector.linear_1.weight"
        with pytest.raises(InputError, match="only some weights of the projector"):
            load_trainable(model, {name: dict(model.named_parameters())[name].detach()})

    def test_unknown_name(self, tiny_model: MakeConfig) -> None:
        with pytest.raises(InputError, match=r"holds llava\.nothing"):
            load_trainable(tiny(tiny_model()), {"llava.nothing": torch.zeros(1)})

    def test_the_head_is_left_aside_by_a_phase_without_one(self, tiny_model: MakeConfig) -> None:
        model = tiny(tiny_model(), terms=())
        load_trainable(model, {"objectives.codes.visual_head.code_proj.weight": torch.zeros(16, 6)})


def test_a_folder_without_a_model_is_one_sentence(tiny_model: MakeConfig, tmp_path: object) -> None:
    config = tiny_model().model_copy(update={"language_model": str(tmp_path), "tokenizer": tiny_model().language_model})
    with pytest.raises(InputError, match="no language model can be read"):
        tiny(config)
