"""What the hidden states at image positions are asked for, beside the text loss. One file per objective."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from train_stage import config
from train_stage.objectives.base import Objective
from train_stage.objectives.codes import CodesObjective
from train_stage.objectives.none import NoneObjective


def build_objective(
    objective: config.CodesObjective | config.NoneObjective,
    hidden_size: int,
    codebooks: Sequence[np.ndarray] | None,
    *,
    residual: bool = True,
) -> Objective:
    """The objective a phase asks for; `codebooks` (D float32 arrays (K_d, C)) only where it predicts codes."""
    if isinstance(objective, config.NoneObjective):
        return NoneObjective()
    if not codebooks:
        raise ValueError("objective codes needs the codebooks of its manifests")
    return CodesObjective(objective, hidden_size, codebooks, residual=residual)


__all__ = ["CodesObjective", "NoneObjective", "Objective", "build_objective"]
