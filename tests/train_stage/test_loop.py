"""A step of the engine against one in plain torch, and what stops a step."""

from __future__ import annotations

import json
import math
import subprocess
from pathlib import Path
from typing import Any

import pytest
import tiny_run
import torch

from manifests.errors import EnvironmentProblem, InputError, RecipeError, StorageError, TrainingStopped
from train_stage import run as runs
from train_stage.batch import count_text_targets
from train_stage.config import TrainConfig
from train_stage.engine import BETAS, EPSILON, Engine, deepspeed_settings, make_universal, parameter_groups
from train_stage.loader import Collected, collect_steps
from train_stage.loop import Schedule, train_step
from train_stage.metrics import StepMetrics
from train_stage.prepare import Prepared, prepare
from train_stage.ranks import Ranks
from train_stage.stopping import Stopper


@pytest.fixture
def config(tmp_path: Path, tiny_model, monkeypatch: pytest.MonkeyPatch) -> TrainConfig:
    monkeypatch.setenv("ASVR_CACHE", str(tmp_path / "cache"))
    made = tiny_run.make_config(tmp_path, tiny_model())
    return made.model_copy(update={"phases": made.phases[1:]})


def collected_steps(prepared: Prepared, count: int) -> list[Collected]:
    steps = collect_steps(prepared.plan, prepared.packing, prepared.collator, first_step=1, rank=0, world=1, workers=2)
    return [collected for collected, _ in zip(steps, range(count), strict=False)]


def one_step(engine: Engine, prepared: Prepared, collected: Collected, rate: float = 1e-3) -> StepMetrics:
    return train_step(engine, collected, prepared.model.terms, rate, seed=0, epoch=0)


OFFLOAD = {"offload_optimizer": {"device": "cpu"}}


@pytest.mark.parametrize("more", [{}, OFFLOAD], ids=["", "offload"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_steps_equal_those_of_plain_torch(config: TrainConfig, ranks: Ranks, stage: int, more: dict) -> None:
    phase = config.phase("instruct").model_copy(update={"weight_decay": 0.1, "clip": 0.5})
    config = config.model_copy(update={"deepspeed": {"zero_optimization": {"stage": stage, **more}}})
    plain, under = prepare(config, phase), prepare(config, phase)
    engine = Engine(under.model, config, phase, ranks)
    optimizer = torch.optim.AdamW(parameter_groups(plain.model, phase), betas=BETAS, eps=EPSILON)
    for collected in collected_steps(plain, 3):
        assert len(collected.batches) > 1
        # The whole step as one sum over all its samples: nothing here knows of micro-batches.
        sums = [plain.model(batch) for batch in collected.batches]
        text_tokens = sum(count_text_targets(batch) for batch in collected.batches)
        positions = sum(own.terms["codes"].targets for own in sums)
        text = torch.stack([own.text_loss_sum for own in sums]).sum() / text_tokens
        visual = torch.stack([own.terms["codes"].loss_sum_D for own in sums]).sum(dim=0) / positions
        loss = text + visual.mean()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(plain.model.parameters(), 0.5)
        optimizer.step()

        metrics = one_step(engine, under, collected)
        assert metrics.loss == pytest.approx(loss.item(), rel=1e-6)
        assert metrics.text_loss == pytest.approx(text.item(), rel=1e-6)
        assert metrics.objectives["codes"].loss_depth == pytest.approx(visual.tolist(), rel=1e-6)
        assert metrics.grad_norm == pytest.approx(norm.item(), rel=1e-5)
        assert (metrics.text_tokens, metrics.objectives["codes"].targets) == (text_tokens, positions)
    names = {name for name, parameter in plain.model.named_parameters() if parameter.requires_grad}
    for name, found in engine.weights(names).items():
        wanted = dict(plain.model.named_parameters())[name]
        if not name.endswith("in_proj.bias"):  # attention does not feel its keys' bias; Adam blows up what is rounding
            torch.testing.assert_close(found, wanted.data, rtol=1e-5, atol=2e-6, msg=name)
    engine.close()


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_an_offloaded_optimizer_resumes_with_the_same_bits(
    config: TrainConfig, ranks: Ranks, tmp_path: Path, stage: int
) -> None:
    config = config.model_copy(update={"precision": "bfloat16"})
    zero = {"stage": stage, **OFFLOAD} | ({"offload_param": {"device": "cpu"}} if stage == 3 else {})
    config = config.model_copy(update={"deepspeed": {"zero_optimization": zero}})
    phase = config.phase("instruct")
    prepared = prepare(config, phase)
    steps = collected_steps(prepared, 4)
    engine = Engine(prepared.model, config, phase, ranks)
    for collected in steps[:2]:
        one_step(engine, prepared, collected)
    engine.save(tmp_path / "saved")
    undisturbed = [one_step(engine, prepared, collected).loss for collected in steps[2:]]
    weights = engine.weights(prepared.carried)
    engine.close()
    again = prepare(config, phase)
    engine = Engine(again.model, config, phase, ranks, written_by=1)
    engine.load(tmp_path / "saved")
    assert [one_step(engine, again, collected).loss for collected in steps[2:]] == undisturbed
    assert all(torch.equal(tensor, weights[name]) for name, tensor in engine.weights(again.carried).items())
    engine.close()


def test_recomputing_activations_changes_no_number(config: TrainConfig, ranks: Ranks) -> None:
    phase = config.phase("instruct")
    found = []
    for recompute in (False, True):
        own = config.model_copy(update={"recompute_activations": recompute})
        prepared = prepare(own, phase)
        calls: list[int] = []
        prepared.model.llava.model.language_model.layers[0].mlp.register_forward_pre_hook(
            lambda *_, own=calls: own.append(1)
        )
        engine = Engine(prepared.model, own, phase, ranks)
        steps = collected_steps(prepared, 2)
        found.append([one_step(engine, prepared, collected).loss for collected in steps])
        engine.close()
        assert len(calls) == (1 + recompute) * sum(len(collected.batches) for collected in steps)
    assert found[0] == found[1]


def test_compiled_layers_give_the_same_losses(config: TrainConfig, ranks: Ranks) -> None:
    phase = config.phase("instruct")
    found = []
    for compiled in (False, True):
        own = config.model_copy(update={"compile_layers": compiled, "recompute_activations": True})
        prepared = prepare(own, phase)
        layers = prepared.model.llava.model.language_model.layers
        assert all((layer._compiled_call_impl is not None) is compiled for layer in layers)
        engine = Engine(prepared.model, own, phase, ranks)
        steps = [one_step(engine, prepared, collected) for collected in collected_steps(prepared, 2)]
        found.append([value for step in steps for value in (step.loss, step.grad_norm)])
        engine.close()
    assert found[1] == pytest.approx(found[0], abs=1e-5)


def test_bfloat16_keeps_float32_masters(config: TrainConfig, ranks: Ranks) -> None:
    """Updates far below bfloat16's resolution add up in the masters and show after enough of them."""
    config = config.model_copy(update={"precision": "bfloat16"})
    phase = config.phase("instruct")
    prepared = prepare(config, phase)
    engine = Engine(prepared.model, config, phase, ranks)
    losses = [one_step(engine, prepared, collected_steps(prepared, 1)[0], rate=1e-5).loss for _ in range(4)]
    assert losses[-1] < losses[0]
    assert {parameter.dtype for parameter in engine.model.parameters()} == {torch.bfloat16}
    # Rotary frequencies and codebook vectors lose by rounding, and an export has them in float32.
    kept = {name: b.dtype for name, b in engine.model.named_buffers() if b.is_floating_point()}
    assert len(kept) >= 2
    assert set(kept.values()) == {torch.float32}
    assert deepspeed_settings(config, phase, 1)["data_types"] == {"grad_accum_dtype": "fp32"}
    engine.close()


@pytest.mark.parametrize("poison", ["loss", "gradient"])
def test_what_is_not_finite_stops_before_the_update(config: TrainConfig, ranks: Ranks, poison: str) -> None:
    phase = config.phase("instruct")
    prepared = prepare(config, phase)
    engine = Engine(prepared.model, config, phase, ranks)
    bias = prepared.model.llava.model.multi_modal_projector.linear_1.bias
    if poison == "loss":
        with torch.no_grad():
            prepared.model.llava.model.language_model.norm.weight[0] = math.nan
    else:
        bias.register_hook(lambda gradient: gradient * math.inf)
    before = [parameter.clone() for parameter in prepared.model.parameters()]
    names = [name for batch in collected_steps(prepared, 1)[0].batches for name in batch.sample_ids]
    with pytest.raises(TrainingStopped, match=r"at step 1 the (loss|gradient) is n.*nothing was updated") as stopped:
        one_step(engine, prepared, collected_steps(prepared, 1)[0])
    assert all(name in str(stopped.value) for name in names)
    for old, new in zip(before, prepared.model.parameters(), strict=True):
        assert torch.equal(old.nan_to_num(), new.nan_to_num())
    engine.close()


def test_a_picture_that_changed_stops_the_step_that_needs_it(config: TrainConfig, ranks: Ranks, tmp_path: Path) -> None:
    phase = config.phase("instruct")
    prepared = prepare(config, phase)
    engine = Engine(prepared.model, config, phase, ranks)
    for path in (tmp_path / "images").iterdir():
        path.write_bytes(b"gone")
    with pytest.raises(InputError, match=r"is not the picture that was tokenized"):
        one_step(engine, prepared, collected_steps(prepared, 1)[0])
    engine.close()


@pytest.mark.parametrize("place", ["train_step", "validate", "Engine"])
def test_a_full_gpu_is_one_sentence(
    config: TrainConfig, ranks: Ranks, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")

    monkeypatch.setattr(runs, place, full)
    held_out = {"data": [data.model_dump(mode="json") for data in config.phases[0].data], "every": 1}
    values = config.model_dump(mode="json")
    values["phases"][0]["validation"] = held_out
    config = TrainConfig.model_validate(values)
    with pytest.raises(EnvironmentProblem, match=r"GPU of rank 0 .* phase instruct with micro_batch_tokens 500: lower"):
        runs.run_phase(config, config.phase("instruct"), ranks, None, Stopper())


def test_a_full_disk_and_a_damaged_checkpoint_are_one_sentence(
    config: TrainConfig, ranks: Ranks, tmp_path: Path
) -> None:
    phase = config.phase("instruct")
    engine = Engine(prepare(config, phase).model, config, phase, ranks)
    engine.save(tmp_path / "fits")
    names = [path.name for path in (tmp_path / "fits" / "deepspeed").iterdir()]
    assert len(names) == 2
    for name in names:
        full = tmp_path / f"full {name}" / "deepspeed"
        full.mkdir(parents=True)
        (full / name).symlink_to("/dev/full")
        with pytest.raises(StorageError, match=f"^cannot write .*{name}: .*full"):
            engine.save(full.parent)
    engine.save(tmp_path / "fits again")
    engine.load(tmp_path / "fits again")
    for name in names:
        kept = (tmp_path / "fits" / "deepspeed" / name).read_bytes()
        for left in (b"", kept[:1000]):
            (tmp_path / "fits" / "deepspeed" / name).write_bytes(left)
            with pytest.raises(TrainingStopped, match="fits is damaged"):
                engine.load(tmp_path / "fits")
        (tmp_path / "fits" / "deepspeed" / name).write_bytes(kept)
    engine.close()


@pytest.mark.parametrize("shell", ["ulimit -f 2; exec", "kill -9 $$;"], ids=["full", "killed"])
def test_a_conversion_that_finds_no_room_leaves_nothing_and_does_not_blame_the_checkpoint(
    config: TrainConfig, ranks: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shell: str
) -> None:
    phase = config.phase("instruct")
    engine = Engine(prepare(config, phase).model, config, phase, ranks)
    engine.save(tmp_path / "step_2")
    engine.close()
    run = subprocess.run

    def confined(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        return run(["bash", "-c", f'{shell} "$@"', "bash", *command], **options)

    monkeypatch.setattr(subprocess, "run", confined)
    error = StorageError if "ulimit" in shell else TrainingStopped
    with pytest.raises(error) as stopped:
        make_universal(tmp_path / "step_2")
    assert "remove this checkpoint" not in str(stopped.value)
    assert [path.name for path in (tmp_path / "step_2").iterdir()] == ["deepspeed"]
    monkeypatch.setattr(subprocess, "run", run)
    make_universal(tmp_path / "step_2")
    assert (tmp_path / "step_2" / "universal").is_dir()


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"zero_optimization": {"stag": 1}}, r"DeepSpeed refuses stag "),
        ({"communication_data_type": "float16"}, r"gives communication_data_type: Invalid communication_data_type"),
        ({"zero_optimization": {"stage": 3, "mics_shard_size": 8}}, r"gives zero_optimization: MiCS .* been removed"),
    ],
    ids=["unknown", "value", "removed"],
)
def test_what_deepspeed_refuses_is_one_sentence(
    config: TrainConfig, ranks: Ranks, settings: dict, sentence: str
) -> None:
    config = config.model_copy(update={"deepspeed": settings})
    phase = config.phase("instruct")
    with pytest.raises(RecipeError, match=sentence):
        Engine(prepare(config, phase).model, config, phase, ranks)


def test_text_loss_alone_sees_the_samples_that_codes_sees(config: TrainConfig, ranks: Ranks, tmp_path: Path) -> None:
    """What the tokenize job rejected would stop a run in its middle, and the two would not be comparable."""
    records = json.loads((tmp_path / "talks.json").read_text())
    (tmp_path / "images" / "broken.png").write_bytes(b"no picture")
    (tmp_path / "talks.json").write_text(json.dumps([*records, {**records[0], "id": "b", "image": "broken.png"}]))
    values = config.model_dump(mode="json")
    values["phases"][0] |= {"max_bad_rate": 0.5}
    codes = TrainConfig.model_validate(values).phase("instruct")
    values["phases"][0] |= {"objective": {"kind": "none"}}
    none = TrainConfig.model_validate(values).phase("instruct")
    with_codes, without = prepare(config, codes), prepare(config, none)
    assert without.samples.names == with_codes.samples.names
    assert len(without.samples) == len(records)
    engine = Engine(without.model, config, none, ranks)
    metrics = one_step(engine, without, collected_steps(without, 1)[0])
    assert (metrics.visual_loss, metrics.objectives) == (None, {})
    engine.close()


def test_the_schedule_warms_up_and_falls_to_nothing() -> None:
    schedule = Schedule(peak=1.0, steps=100, warmup_ratio=0.03)
    assert [schedule(step) for step in (1, 2, 3, 4)] == pytest.approx([1 / 3, 2 / 3, 1.0, 1.0])
    rates = [schedule(step) for step in range(4, 101)]
    assert rates == sorted(rates, reverse=True)
    assert 0 < rates[-1] < 1e-3
    assert Schedule(peak=1.0, steps=2, warmup_ratio=0.0)(1) == 1.0
