"""LoRA: adapters train, the rest of the language model does not, and what leaves training knows nothing of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_run
import torch
from pydantic import ValidationError

from manifests.errors import RecipeError
from train_stage.batch import Batch
from train_stage.build import build_model
from train_stage.config import LoraConfig, ModelConfig, TrainConfig
from train_stage.cost import count_parts
from train_stage.engine import Engine, parameter_groups
from train_stage.export import export_llava
from train_stage.loader import Collected, collect_steps
from train_stage.loop import train_step
from train_stage.lora import stored_parameters
from train_stage.model import AsvrModel
from train_stage.parts import load_trainable, part_parameters
from train_stage.prepare import Prepared, open_inputs, prepare, target_of
from train_stage.ranks import Ranks
from train_stage.shapes import meta_model
from train_stage.tokenizer import load_tokenizer

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LORA = {"rank": 4, "alpha": 8, "dropout": 0.1}


def with_lora(config: TrainConfig, **changes) -> TrainConfig:
    values = config.model_dump(mode="json")
    values["phases"][-1]["lora"] = LORA | changes
    return TrainConfig.model_validate(values)


@pytest.fixture
def config(tmp_path: Path, tiny_model, monkeypatch: pytest.MonkeyPatch) -> TrainConfig:
    monkeypatch.setenv("ASVR_CACHE", str(tmp_path / "cache"))
    made = tiny_run.make_config(tmp_path, tiny_model())
    return with_lora(made.model_copy(update={"phases": made.phases[1:]}))


def first_steps(prepared: Prepared, count: int) -> list[Collected]:
    steps = collect_steps(prepared.plan, prepared.packing, prepared.collator, first_step=1, rank=0, world=1, workers=2)
    return [collected for collected, _ in zip(steps, range(count), strict=False)]


def train(engine: Engine, prepared: Prepared, steps: list[Collected]) -> list[float]:
    return [train_step(engine, step, prepared.model.terms, 0.01, seed=0, epoch=0).loss for step in steps]


def logits(model: AsvrModel, batch: Batch) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        found = model.llava.lm_head(model.hidden_states(batch))
    model.train()
    return found


def test_only_adapters_of_the_language_model_train_and_each_in_every_micro_batch(config: TrainConfig) -> None:
    prepared = prepare(config, config.phase("instruct"))
    model = prepared.model
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    of_language = {name for name in trained if "language_model" in name}
    assert not {name for name in trained if "lm_head" in name or "embed_tokens" in name}
    layers = model.llava.config.text_config.num_hidden_layers
    assert len(of_language) == 2 * layers * len(LINEARS)
    assert all(".lora_" in name for name in of_language)
    others = {"llava.model.multi_modal_projector", "objectives.codes"}
    assert {name for name in others if any(one.startswith(name) for one in trained)} == others
    text_only = next(i for i in range(len(prepared.samples)) if not len(prepared.samples.images_of(i)))
    for index in (0, text_only):
        model.zero_grad(set_to_none=True)
        model(prepared.collator(torch.tensor([index]).numpy())).total(1, {"codes": 1}, {"codes": 1.0}).backward()
        assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]


def test_at_the_start_it_is_the_model_without_adapters(config: TrainConfig) -> None:
    prepared = prepare(config, config.phase("instruct"))
    plain = open_inputs(config, config.phase("instruct")).model
    batch = prepared.collator(torch.arange(3).numpy())
    assert torch.equal(logits(prepared.model, batch), logits(plain, batch))
    stored = dict(stored_parameters(prepared.model))
    own = dict(plain.named_parameters())
    assert stored.keys() == own.keys()
    assert all(torch.equal(value.value(), own[name]) for name, value in stored.items())


def test_every_rank_draws_the_same_adapters_and_the_caller_keeps_its_random_numbers(config: TrainConfig) -> None:
    torch.manual_seed(1)
    first = dict(prepare(config, config.phase("instruct")).model.named_parameters())
    after = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(after, torch.rand(1))
    second = prepare(config, config.phase("instruct")).model
    assert all(torch.equal(first[name], p) for name, p in second.named_parameters())
    assert any(p.any() for name, p in second.named_parameters() if ".lora_A." in name)


def test_the_projector_and_the_adapters_have_rates_of_their_own(config: TrainConfig) -> None:
    values = config.model_dump(mode="json")
    values["phases"][-1] |= {"lr": 2e-4, "part_lr": {"projector": 2e-5}}
    phase = TrainConfig.model_validate(values).phase("instruct")
    model = prepare(config, phase).model
    rates = {id(p): group["lr"] for group in parameter_groups(model, phase) for p in group["params"]}
    adapters = [p for p in part_parameters(model)["language_model"] if p.requires_grad]
    assert {rates[id(p)] for p in adapters} == {2e-4}
    assert {rates[id(p)] for p in part_parameters(model)["projector"]} == {2e-5}


@pytest.mark.parametrize("stage", [1, 3])
def test_what_the_engine_hands_out_computes_what_training_computes_and_resumes_exactly(
    config: TrainConfig, ranks: Ranks, tmp_path: Path, stage: int
) -> None:
    config = config.model_copy(update={"deepspeed": {"zero_optimization": {"stage": stage}}})
    phase = config.phase("instruct")
    prepared = prepare(config, phase)
    base = {name: p.detach().clone() for name, p in prepared.model.named_parameters()}
    steps = first_steps(prepared, 4)
    engine = Engine(prepared.model, config, phase, ranks)
    train(engine, prepared, steps[:2])
    engine.save(tmp_path / "saved")
    undisturbed = train(engine, prepared, steps[2:])
    weights = engine.weights(prepared.carried)

    # The names are those of a model without adapters, and together they are the whole language model.
    fresh = open_inputs(config, phase).model
    names = {name for name, _ in fresh.named_parameters()}
    assert {name for name in names if "vision_tower" not in name} == weights.keys()
    load_trainable(fresh, weights)
    moved = [
        name for name in weights if "language_model" in name and not torch.equal(weights[name], base_of(base, name))
    ]
    assert {name.split(".")[-2] for name in moved} == set(LINEARS)
    if stage == 1:
        batch = steps[0].batches[0]
        here, there = logits(prepared.model, batch), logits(fresh, batch)
        assert not torch.equal(here, logits(open_inputs(config, phase).model, batch)), "it has learned something"
        torch.testing.assert_close(here, there, rtol=0, atol=1e-5)
        tokenizer, geometry = load_tokenizer(config.model), prepared.collator.geometry
        export_llava(fresh, tokenizer, geometry, tmp_path / "export", chat_template="{{ messages }}")
        exported = ModelConfig(llava=str(tmp_path / "export"))
        read = build_model(exported, (), {}, torch.float32, view_size=geometry.size)
        torch.testing.assert_close(here, logits(read, batch), rtol=0, atol=1e-5)
    engine.close()

    again = prepare(config, phase)
    engine = Engine(again.model, config, phase, ranks, written_by=1)
    engine.load(tmp_path / "saved")
    assert train(engine, again, steps[2:]) == undisturbed
    resumed = engine.weights(again.carried)
    assert all(torch.equal(resumed[name], weights[name]) for name in weights)
    engine.close()


def base_of(base: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    layer, _, last = name.rpartition(".")
    return base[name] if name in base else base[f"{layer}.base_layer.{last}"]


def test_bfloat16_adds_in_float32(config: TrainConfig) -> None:
    config = config.model_copy(update={"precision": "bfloat16"})
    model = prepare(config, config.phase("instruct")).model
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.1)
    name, stored = next((name, one) for name, one in stored_parameters(model) if one.adapter)
    first, second = (matrix.double() for matrix in stored.adapter)
    exact = stored.parameter.double() + LORA["alpha"] / LORA["rank"] * second @ first
    assert stored.value().dtype == torch.bfloat16
    torch.testing.assert_close(stored.value().double(), exact.bfloat16().double(), rtol=2**-7, atol=0, msg=name)


def test_the_check_before_a_run_counts_the_same_parameters(config: TrainConfig) -> None:
    phase = config.phase("instruct")
    inputs = open_inputs(config, phase)
    targets = {"codes": target_of(inputs.tables["codes"])}
    on_meta = count_parts(meta_model(config.model, phase, targets, inputs.geometry))
    language = next(part for part in on_meta if part.name == "language_model")
    real = count_parts(prepare(config, phase).model)
    assert language.trained == next(part.trained for part in real if part.name == "language_model") > 0
    assert language.trained < language.parameters / 2


def test_targets_are_chosen_by_name(config: TrainConfig) -> None:
    phase = with_lora(config, targets=["q_proj", "v_proj"]).phase("instruct")
    model = prepare(config, phase).model
    adapted = {name.split(".")[-2] for name, one in stored_parameters(model) if one.adapter}
    assert adapted == {"q_proj", "v_proj"}
    wrong = with_lora(config, targets=["q_proj", "c_attn"]).phase("instruct")
    with pytest.raises(RecipeError, match=r"^lora\.targets has c_attn, but .* are called q_proj, .*, down_proj$"):
        prepare(config, wrong)


def test_a_phase_that_leaves_the_language_model_alone_has_no_lora(config: TrainConfig) -> None:
    values = config.model_dump(mode="json")
    values["phases"][-1]["trainable"] = ["projector"]
    with pytest.raises(ValidationError, match=r"phase instruct has lora, .* but does not train that part: add it to"):
        TrainConfig.model_validate(values)
    with pytest.raises(ValidationError, match="targets"):
        LoraConfig.model_validate({"targets": []})
