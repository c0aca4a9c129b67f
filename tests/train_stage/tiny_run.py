"""A whole training run on tiny models: its configuration on disk, and the processes that train it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import tiny_models
import tiny_set

from train_stage.config import ModelConfig, TrainConfig

REPOSITORY = Path(__file__).resolve().parents[2]
HEAD = {"width": 16, "layers": 1, "heads": 2, "ffn": 24}
UNSTEADY = (
    "seconds", "data_wait", "time", "memory", "padding", "tokens_per_second", "views_per_second"
)  # fmt: skip
"""Metrics that no two runs share."""


def make_models(folder: Path) -> ModelConfig:
    """A SigLIP and a Llama, in folders."""
    tiny_models.save_tower("siglip", folder / "tower")
    tiny_models.save_language_model(folder / "llama", tied=False)
    return ModelConfig(language_model=str(folder / "llama"), vision_tower=str(folder / "tower"))


def make_config(folder: Path, model: ModelConfig, *, pictures: int = 14, **changes: Any) -> TrainConfig:
    """Two phases over 14 pictures: 3 steps of `pretrain`, then 6 of `instruct` that cross an epoch."""
    ids = tiny_set.save_pictures(folder / "images", pictures)
    tiny_set.save_manifest(folder / "tokens", folder / "images", ids)
    tiny_set.save_captions(folder / "captions.json", ids)
    tiny_set.save_records(folder / "talks.json", ids, text_only=3)
    shared = {"manifests": [str(folder / "tokens")], "batch_size": 5, "lr": 1e-3}

    shared |= {"objective": {"kind": "codes", "head": HEAD}}
    root = str(folder / "images")
    values = {
        "output": str(folder / "run"),
        "seed": 11,
        "precision": "float32",
        "model": model.model_dump(),
        "phases": [
            {
                **shared,
                "name": "pretrain",
                "data": [{"path": str(folder / "captions.json"), "image_root": root}],
                "max_length": 90,
                "micro_batch_tokens": 90,
            },
            {
                **shared,
                "name": "instruct",
                "data": [{"path": str(folder / "talks.json"), "image_root": root}],
                "epochs": 2,
                "max_steps": 6,
                "max_length": 500,
                "micro_batch_tokens": 500,
            },
        ],
        "save_every": 2,
        "log_every": 1,
        "workers": 2,
        "timeout_seconds": 60,
        **changes,
    }
    return TrainConfig.model_validate(values)


def start(config: TrainConfig, folder: Path, *, ranks: int = 1) -> subprocess.Popen[str]:
    """Start training as a user's launcher would."""
    path = folder / "config.json"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(config.model_dump_json())
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = [sys.executable, "-m", "train_stage"] if ranks == 1 else [*launcher, "-m", "train_stage"]
    return subprocess.Popen(
        [*command, str(path)],
        cwd=REPOSITORY,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def start_command(config: TrainConfig, folder: Path, *options: str) -> subprocess.Popen[str]:
    """Start `asvr train` on two ranks, which it starts and watches itself."""
    folder.mkdir(parents=True, exist_ok=True)
    recipe = folder / "recipe.yaml"
    recipe.write_text(json.dumps({"train": config.model_dump(mode="json")}))
    return subprocess.Popen(
        [sys.executable, "-m", "pipeline", "train", str(recipe), "--nproc", "2", *options],
        cwd=REPOSITORY,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def train(config: TrainConfig, folder: Path, *, ranks: int = 1) -> str:
    """Train to the end; what was said on stderr."""
    process = start(config, folder, ranks=ranks)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    return said


def steps(config: TrainConfig, phase: str) -> list[dict[str, Any]]:
    """The metrics of a phase, without what no two runs share; those of a term are called objectives.TERM.METRIC."""
    lines = (config.phase_folder(phase) / "metrics.jsonl").read_text().splitlines()
    return [_flat({k: v for k, v in json.loads(line).items() if k not in UNSTEADY}) for line in lines]


def _flat(values: dict[str, Any], before: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{before}{name}.") if isinstance(value, dict) else {before + name: value}
    return flat
