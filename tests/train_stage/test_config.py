from __future__ import annotations

import subprocess
import sys

import pytest
from pydantic import ValidationError

from train_stage.config import CodesObjective, NoneObjective, PhaseConfig, TrainConfig

DATA = [{"path": "data.json", "image_root": "images"}]
MODEL = {"language_model": "lm", "vision_tower": "tower"}


def phase(**changes) -> dict:
    return {"name": "instruct", "data": DATA, "manifests": ["tokens"], **changes}


def config(*phases: dict, **changes) -> TrainConfig:
    return TrainConfig.model_validate({"output": "run", "model": MODEL, "phases": list(phases) or [phase()], **changes})


def test_defaults_follow_the_name_of_the_phase() -> None:
    made = config(phase(name="pretrain"), phase(), phase(name="plain-llava", objective={"kind": "none"}))
    first, second, third = (made.phase(name) for name in ("pretrain", "instruct", "plain-llava"))
    assert (first.trainable, first.template, first.lr, first.batch_size) == (
        ("projector", "visual_head"), "plain", 1e-3, 256,
    )  # fmt: skip
    assert second.trainable == ("projector", "visual_head", "language_model")
    assert (second.template, second.lr, second.batch_size) == ("vicuna_v1", 2e-5, 128)
    assert third.trainable == ("projector", "language_model")
    assert isinstance(second.objective, CodesObjective)
    assert isinstance(third.objective, NoneObjective)


def test_what_is_given_is_kept() -> None:
    given = phase(name="pretrain", trainable=["projector"], template="vicuna_v1", lr=0.5, batch_size=3)
    made = config(given).phase("pretrain")
    assert (made.trainable, made.template, made.lr, made.batch_size) == (("projector",), "vicuna_v1", 0.5, 3)


def test_json_gives_the_same_configuration_back() -> None:
    made = config(phase(geometry={"mode": "pad", "size": 28}), deepspeed={"zero_optimization": {"stage": 2}})
    assert TrainConfig.model_validate_json(made.model_dump_json()) == made


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"deepspeed": {"train_batch_size": 4}}, "deepspeed.train_batch_size is derived from the phase's batch_size"),
        ({"deepspeed": {"optimizer": {}}}, "deepspeed.optimizer is derived from"),
        ({"deepspeed": {"bf16": {"enabled": True}}}, "deepspeed.bf16 is derived from precision"),
        ({"deepspeed": {"zero_optimization": {"stage": 0}}}, "stage is 1, 2 or 3"),
        ({"deepspeed": {"csv_monitor": True}}, "deepspeed.csv_monitor is a mapping of settings, not True"),
        ({"deepspeed": {"zero_optimization": 3}}, "deepspeed.zero_optimization is a mapping of settings, not 3"),
        (
            {"deepspeed": {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}},
            "offload_param is {device: cpu} or not there",
        ),
        (
            {"deepspeed": {"zero_optimization": {"offload_optimizer": True}}},
            "offload_optimizer is {device: cpu} or not",
        ),
        ({"deepspeed": {"aio": {}}}, "is for offloading to NVMe disks, which this trainer does not support"),
        ({"deepspeed": {"zero_optimization": {"overlap_comm": True}}}, "overlap_comm is for stages 2 and 3"),
        (
            {"deepspeed": {"zero_optimization": {"stage": 3, "stage3_module_granularity_threshold": 1}}},
            "is settled here",
        ),
        (
            {"deepspeed": {"zero_optimization": {"stage": 3}}, "compile_layers": True},
            "compile_layers is for layers that",
        ),
        ({"deepspeed": {"activation_checkpointing": {}}}, "is derived from recompute_activations; remove it"),
        ({"deepspeed": {"curriculum_learning": {}}}, "changes the order of the samples, which this trainer does not"),
        ({"deepspeed": {"zero_optimisation": {}}}, "no setting that DeepSpeed reads: did you mean zero_optimization"),
        ({"deepspeed": {"ranks": 2}}, "no setting that DeepSpeed reads: there are comet"),
        ({"phases": [phase(name="pretrain", part_lr={"language_model": 1})]}, "does not train its language_model"),
        ({"phases": [phase(), phase()]}, "must differ"),
        ({"phases": [phase(manifests=[])]}, "predicts codes but names no manifests"),
        ({"phases": [phase(manifests=[], objective={"kind": "none"})]}, "must give its geometry"),
        (
            {
                "phases": [
                    phase(
                        objective={"kind": "none"},
                        manifests=[],
                        geometry={"mode": "anyres", "size": 28, "grid_pinpoints": [[28, 28]]},
                    )
                ]
            },
            "phase instruct has geometry anyres, .* names no manifests, which know the sizes: give manifests",
        ),
        ({"phases": [phase(objective={"kind": "none"}, trainable=["visual_head"])]}, "no visual_head to train"),
        ({"phases": [phase(objective={"kind": "codes", "head": {"width": 10, "heads": 3}})]}, "not a multiple"),
        ({"phases": [phase(objective={"kind": "codes", "head": {"kind": "parallel", "ffn": 3}})]}, "head has no ffn"),
        (
            {"phases": [phase(objective={"kind": "codes", "head": {"kind": "other"}})]},
            "kind is depth_transformer or parallel",
        ),
        ({"phases": [phase(objective=[{"kind": "codes"}, {"kind": "codes"}])]}, "several objectives named codes"),
        ({"phases": [phase(objective=[{"kind": "codes", "name": "text"}])]}, "give it another name"),
        ({"phases": [phase(objective=[{"kind": "none"}])]}, "does not match any of the expected tags"),
        ({"phases": [phase(objective=[])]}, "at least 1 item"),
        ({"phases": [phase(objective={"kind": "align"})]}, "give one of manifests and tower_layer"),
        (
            {"phases": [phase(objective={"kind": "denoise", "manifests": ["v"], "width": 6, "heads": 2})]},
            "multiple of 4",
        ),
        ({"phases": [phase(name="export")]}, "a phase cannot be called export, a name that something else in the run"),
        ({"phases": [phase(name="../up")]}, "String should match pattern"),
        ({"epoch": 1}, "Extra inputs are not permitted"),
    ],
)
def test_a_wrong_value_is_named(changes: dict, sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        config(**changes)


def test_reading_a_configuration_needs_no_torch() -> None:
    code = (
        "import sys, train_stage.config, train_stage.checkpoint, train_stage.__main__;"
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'deepspeed', 'ray')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_phase_alone_is_complete() -> None:
    assert PhaseConfig.model_validate(phase()).with_defaults().micro_batch_tokens == 4 * 2048


def test_terms_come_alone_or_in_a_list() -> None:
    assert PhaseConfig.model_validate(phase(objective={"kind": "none"})).terms == ()
    assert [term.name for term in PhaseConfig.model_validate(phase()).terms] == ["codes"]
    objective = [
        {"kind": "codes", "head": {"kind": "parallel"}},
        {"kind": "codes", "name": "appearance", "manifests": ["other"], "weight": 0.5},
        {"kind": "align", "tower_layer": -1},
    ]
    several = PhaseConfig.model_validate(phase(objective=objective))
    assert several.all_manifests == {"manifests": ("tokens",), "codes": ("tokens",), "appearance": ("other",)}
    assert PhaseConfig.model_validate_json(several.model_dump_json()) == several
