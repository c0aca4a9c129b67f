"""`reference_parity`: the published losses, worked out by hand from the model's own hidden states."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_run
import tiny_set
import torch
import torch.nn.functional as F
from pydantic import ValidationError

from manifests.errors import InputError
from train_stage.batch import IGNORE
from train_stage.config import PhaseConfig, TrainConfig
from train_stage.engine import Engine
from train_stage.loader import collect_steps
from train_stage.loop import train_step
from train_stage.losses import LossSums, TermSums
from train_stage.packing import FixedRows
from train_stage.parity import ReferenceParity
from train_stage.prepare import Prepared, prepare
from train_stage.ranks import Ranks

BLANK = "p004.png"
"""Which of the tiny pictures plays the blank one: only its codes are asked for."""


@pytest.fixture
def config(tmp_path: Path, tiny_model: Any, monkeypatch: pytest.MonkeyPatch) -> TrainConfig:
    monkeypatch.setenv("ASVR_CACHE", str(tmp_path / "cache"))
    made = tiny_run.make_config(tmp_path, tiny_model(), pictures=6)
    return made.model_copy(update={"phases": made.phases[1:]})


def prepared_with(config: TrainConfig, parity: Any, **changes: Any) -> Prepared:
    values = config.model_dump(mode="json")
    values["phases"][0] |= {"reference_parity": parity, "batch_size": 9, **changes}
    own = TrainConfig.model_validate(values)
    return prepare(own, own.phase("instruct"))


def first_step(prepared: Prepared, config: TrainConfig, ranks: Ranks) -> float:
    steps = collect_steps(prepared.plan, prepared.packing, prepared.collator, first_step=1, rank=0, world=1, workers=1)
    engine = Engine(prepared.model, config, config.phase("instruct"), ranks)
    average = isinstance(prepared.packing, FixedRows)
    metrics = train_step(engine, next(steps), prepared.model.terms, 1e-3, 0, 0, average_micro_batches=average)
    steps.close()
    engine.close()
    return metrics.loss


def published(prepared: Prepared, samples: list[int], *, padding: bool, blank: str | None) -> tuple[list[float], ...]:
    """Per token and per position (mean over depths) the cross-entropies of some samples, one sample at a time."""
    model, collator = prepared.model, prepared.collator
    head = model.terms["codes"].visual_head
    text: list[float] = []
    visual: list[float] = []
    for sample in samples:
        batch = collator(np.array([sample]))
        hidden = model.hidden_states(batch)[0]
        labels = batch.labels[0, 1:]
        each = F.cross_entropy(model.llava.lm_head(hidden)[:-1], labels, ignore_index=IGNORE, reduction="none")
        text += each[labels != IGNORE].tolist()
        if batch.has_images:
            states, codes = hidden[batch.view_position[0]], batch.targets["codes"][0]
            scored = torch.ones(16, dtype=torch.bool) if padding else batch.target_mask[0]
        elif blank:
            table = collator.tables["codes"]
            codes = torch.from_numpy(table.values(table.find([blank]), 0)[0].astype(np.int64))
            states, scored = torch.zeros(16, hidden.shape[1]), torch.ones(16, dtype=torch.bool)
        else:
            continue
        losses = [F.cross_entropy(own, codes[:, d], reduction="none") for d, own in enumerate(head(states, codes))]
        visual += torch.stack(losses).mean(dim=0)[scored].tolist()
    return text, visual


@pytest.mark.parametrize(
    "parity",
    [
        {"blank_image": BLANK, "micro_batch_size": 4},
        {"blank_image": BLANK, "micro_batch_size": 4, "padding_cells": False},
        {"blank_image": None, "micro_batch_size": None},
        {"blank_image": BLANK, "micro_batch_size": None, "padding_cells": False},
        {"blank_image": None, "micro_batch_size": 2, "padding_cells": False},
    ],
)
def test_losses_are_the_published_ones(config: TrainConfig, ranks: Ranks, parity: dict[str, Any]) -> None:
    prepared = prepared_with(config, parity)
    size, chosen = parity["micro_batch_size"], prepared.plan.step_samples(1).tolist()
    assert len(chosen) == 9
    groups = [chosen[start : start + size] for start in range(0, 9, size)] if size else [chosen]
    with torch.no_grad():
        found = [
            published(prepared, group, padding=parity.get("padding_cells", True), blank=parity["blank_image"])
            for group in groups
        ]
    by_hand = np.mean([np.mean(text) + (np.mean(visual) if visual else 0.0) for text, visual in found])
    assert first_step(prepared, config, ranks) == pytest.approx(by_hand, abs=2e-6)


def test_every_habit_changes_the_loss(config: TrainConfig, ranks: Ranks) -> None:
    none = {"padding_cells": False, "blank_image": None, "micro_batch_size": None}
    ours = first_step(prepared_with(config, False), config, ranks)
    assert first_step(prepared_with(config, none), config, ranks) == pytest.approx(ours, abs=1e-6)
    for habit in ({"padding_cells": True}, {"blank_image": BLANK}, {"micro_batch_size": 2}):
        assert abs(first_step(prepared_with(config, none | habit), config, ranks) - ours) > 1e-5, habit


def test_means_of_micro_batches_are_averaged() -> None:
    """Text: (6/2 + 1/1 + 0)/3 = 4/3, and visual: (8/4 + 0 + 3/1)/3 = 5/3; by targets it would be 7/3 and 11/5."""
    parts = [(6.0, 2, 8.0, 4), (1.0, 1, 0.0, 0), (0.0, 0, 3.0, 1)]
    weights, targets = {"codes": 0.5}, {"codes": 5}
    total = 0.0
    for text, tokens, visual, positions in parts:
        term = TermSums(torch.tensor([visual, visual]), positions, torch.tensor([0, 0]))
        own = LossSums(torch.tensor(text), tokens, {"codes": term})
        total += own.as_means(3, targets, 3).total(3, targets, weights).item()
    assert total == pytest.approx(4 / 3 + 0.5 * 5 / 3)


def test_fixed_rows_are_dealt_out_in_the_order_of_the_step() -> None:
    hands = [FixedRows(2).rows(np.array([5, 3, 8, 1, 9]), rank, 2) for rank in range(2)]
    assert [[row.tolist() for row in hand] for hand in hands] == [[[5, 3], [9]], [[8, 1], []]]


def test_a_blank_image_that_was_not_tokenized_is_one_sentence(config: TrainConfig) -> None:
    with pytest.raises(InputError, match=r"scores 3 text-only samples .* has no blank\.png: tokenize a picture of one"):
        prepared_with(config, True)


def test_without_text_only_samples_no_blank_image_is_asked_for(config: TrainConfig, tmp_path: Path) -> None:
    ids = sorted(path.name for path in (tmp_path / "images").iterdir())
    tiny_set.save_records(tmp_path / "talks.json", ids, text_only=0)
    assert prepared_with(config, True).packing == FixedRows(16)


def test_the_switch() -> None:
    phase = {"name": "a", "data": [{"path": "/d", "image_root": "/i"}], "manifests": ["/m"]}
    for value, parity in ((True, ReferenceParity()), (False, None), (None, None), ({}, ReferenceParity())):
        made = PhaseConfig.model_validate(phase | {"reference_parity": value})
        assert made.reference_parity == parity
        assert PhaseConfig.model_validate_json(made.model_dump_json()) == made
    with pytest.raises(ValidationError, match="micro_batch"):
        PhaseConfig.model_validate(phase | {"reference_parity": {"micro_batch": 2}})
