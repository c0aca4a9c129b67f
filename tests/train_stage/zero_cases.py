"""The same four steps under every ZeRO stage, number of ranks and accumulation: `python zero_cases.py FOLDER`.

A step is a list of samples that is cut into as many micro-batches as ranks and accumulation ask for. In step 2 the first
half is text only, so of two ranks one sees no picture; in step 3 nobody does.
"""

from __future__ import annotations

import gc
import hashlib
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from train_stage.config import TrainConfig
from train_stage.deepspeed_process import prepare_environment
from train_stage.engine import Engine
from train_stage.loader import Collected
from train_stage.loop import train_step
from train_stage.prepare import Prepared, prepare
from train_stage.ranks import Ranks, join_ranks, leave_ranks
from train_stage.tensor_files import save_tensors

PICTURES, TEXTS = 14, 8
STEPS = (
    (0, 1, 2, 3, 4, 5, 6, 14),
    (15, 16, 17, 18, 0, 7, 8, 9),
    (14, 15, 16, 17, 18, 19, 20, 21),
    (8, 9, 10, 11, 12, 13, 19, 20),
)
"""Samples of a step: below 14 with a picture, from 14 on without."""

SAVED_AFTER = 2
RATE = 1e-3


@dataclass(frozen=True)
class Case:
    stage: int
    accumulation: int

    @property
    def name(self) -> str:
        return f"zero{self.stage} x{self.accumulation}"


STAGES, ACCUMULATIONS = (1, 2, 3), (1, 2, 4)
CASES = [Case(stage, accumulation) for stage in STAGES for accumulation in ACCUMULATIONS]
ELASTIC = (2, 3)
"""Stages that also go on at the other number of ranks. Stage 1 is in tests/faults/test_train_kill.py."""

VARIANTS = [(name, stage) for name in ("lora", "anyres") for stage in (1, 3)]
"""Other phases that make the same steps: one with adapters, and one of a LLaVA-NeXT."""


def with_stage(config: TrainConfig, stage: int) -> TrainConfig:
    return config.model_copy(update={"deepspeed": {"zero_optimization": {"stage": stage}}})


class Run:
    """An engine of a stage and its samples."""

    def __init__(self, config: TrainConfig, stage: int, ranks: Ranks, *, written_by: int | None = None) -> None:
        self.ranks = ranks
        config = with_stage(config, stage)
        phase = config.phase("instruct")
        self.prepared = prepare(config, phase)
        self.engine = Engine(self.prepared.model, config, phase, ranks, written_by=written_by)

    def steps(self, first: int, last: int, accumulation: int, rate: float = RATE) -> list[dict[str, float]]:
        """The losses of these steps, one after the other."""
        losses = []
        for step in range(first, last + 1):
            collected = Collected(step, collate(self.prepared, share(step, accumulation, self.ranks)), None, 0.0)
            made = train_step(self.engine, collected, self.prepared.model.terms, rate, seed=0, epoch=0)
            losses.append({"text": made.text_loss, "visual": made.objectives["codes"].loss, "norm": made.grad_norm})
        return losses

    def weights_digest(self) -> str:
        weights = self.engine.weights(self.prepared.carried)
        return hashlib.sha256(b"".join(weights[name].numpy().tobytes() for name in sorted(weights))).hexdigest()


def share(step: int, accumulation: int, ranks: Ranks) -> list[np.ndarray]:
    """The micro-batches of this rank in a step."""
    cut = np.array_split(np.array(STEPS[step - 1]), ranks.world * accumulation)
    return cut[ranks.rank * accumulation : (ranks.rank + 1) * accumulation]


def collate(prepared: Prepared, micro_batches: list[np.ndarray]) -> list[Any]:
    return [prepared.collator(indices) for indices in micro_batches]


def run_cases(config: TrainConfig, ranks: Ranks, folder: Path) -> dict[str, Any]:
    """Every case to its end, those of a stage with one engine; and of each stage one that a new engine goes on with."""
    found: dict[str, Any] = {}
    for stage in STAGES:
        run = Run(config, stage, ranks)
        start, saved = folder / f"world{ranks.world} start{stage}", folder / f"world{ranks.world} zero{stage}"
        run.engine.save(start)
        for accumulation in ACCUMULATIONS:
            if accumulation > 1:
                run.engine.load(start)
            losses = run.steps(1, SAVED_AFTER, accumulation)
            if accumulation == 1:
                run.engine.save(saved)
            losses += run.steps(SAVED_AFTER + 1, len(STEPS), accumulation)
            found[Case(stage, accumulation).name] = {"losses": losses, "weights": run.weights_digest()}
        run.engine.close()
        found[f"zero{stage} resumed"] = go_on(config, stage, ranks, saved, written_by=ranks.world)
    return found


def go_on(config: TrainConfig, stage: int, ranks: Ranks, saved: Path, *, written_by: int) -> dict[str, Any]:
    """The steps after a checkpoint."""
    run = Run(config, stage, ranks, written_by=written_by)
    run.engine.load(saved)
    found = {"losses": run.steps(SAVED_AFTER + 1, len(STEPS), 1), "weights": run.weights_digest()}
    run.engine.close()
    return found


def run_variants(configs: Mapping[str, TrainConfig], ranks: Ranks, folder: Path) -> dict[str, Any]:
    """The losses of every variant; what it has trained is in `folder`."""
    found = {}
    for name, stage in VARIANTS:
        run = Run(configs[name], stage, ranks)
        found[f"{name} zero{stage}"] = {"losses": run.steps(1, len(STEPS), accumulation=2)}
        weights = run.engine.weights(run.prepared.carried)
        if ranks.rank == 0:
            save_tensors(weights, folder / f"world{ranks.world} {name} zero{stage}.safetensors")
        run.engine.close()
    return found


def run_in_bfloat16(config: TrainConfig, ranks: Ranks) -> dict[str, Any]:
    """The steps of every stage in two micro-batches, whatever the number of ranks; nothing is learned in between."""
    found = {}
    for stage in STAGES:
        run = Run(config.model_copy(update={"precision": "bfloat16"}), stage, ranks)
        found[f"bfloat16 zero{stage}"] = run.steps(1, len(STEPS), accumulation=2 // ranks.world, rate=0.0)
        run.engine.close()
    return found


def main(given: str) -> None:
    """One of two ranks, with the configurations that are in FOLDER; rank 0 writes FOLDER/two.json."""
    folder = Path(given)
    configs = {path.stem: TrainConfig.model_validate_json(path.read_bytes()) for path in folder.glob("*.json")}
    config = configs["whole"]
    prepare_environment()
    gc.freeze()  # ZeRO 3 collects garbage whenever it starts, which takes long among so many modules
    ranks = join_ranks(60)
    found = run_cases(config, ranks, folder) | run_variants(configs, ranks, folder) | run_in_bfloat16(config, ranks)
    for stage in ELASTIC:
        found[f"zero{stage} elastic"] = go_on(config, stage, ranks, folder / f"world1 zero{stage}", written_by=1)
    if ranks.rank == 0:
        (folder / "two.json").write_text(json.dumps(found))
    leave_ranks()


if __name__ == "__main__":
    main(*sys.argv[1:])
