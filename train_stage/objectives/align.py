"""Alignment: the projected hidden state of an image position points where a frozen encoder's feature of it points.

VIRAL (arXiv 2509.07979) aligns a middle layer with DINOv2; PRe (arXiv 2603.20808) with the tower's own features.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from manifests.errors import InputError
from manifests.schema import FeaturesSpec
from train_stage import objective_config as config
from train_stage.batch import Batch, chosen_positions
from train_stage.flops import Forward, linear_elements
from train_stage.losses import CHUNK, TermSums, sum_over_chunks
from train_stage.objectives.base import NOTHING, Objective, Surroundings, Target


def build(settings: config.AlignObjective, target: Target | None, around: Surroundings) -> AlignObjective:
    """The term of a phase; InputError unless the features have the tower's grid."""
    if target is None:
        return AlignObjective(settings, around.hidden_size, around.tower_width)
    spec = target.spec
    if not isinstance(spec, FeaturesSpec):
        raise InputError(f"{target.where} holds codes, not features: give objective {settings.name} a set of features")
    if spec.grid != around.grid:
        raise InputError(
            f"{target.where} has {spec.grid[0]}x{spec.grid[1]} positions a view and the vision tower makes "
            f"{around.grid[0]}x{around.grid[1]}: align needs features on the tower's grid"
        )
    return AlignObjective(settings, around.hidden_size, spec.width)


class AlignObjective(Objective):
    """1 - cos(projection(hidden state), feature), summed over positions."""

    def __init__(
        self, settings: config.AlignObjective, hidden_size: int, feature_width: int, *, chunk: int = CHUNK
    ) -> None:
        super().__init__()
        self.settings = settings
        self.weight = settings.weight
        self.language_layer, self.tower_layer = settings.language_layer, settings.tower_layer
        self.chunk = chunk
        self.feature_width = feature_width
        self.projection = nn.Sequential(
            nn.Linear(hidden_size, settings.width), nn.GELU(), nn.Linear(settings.width, feature_width)
        )

    @override
    def forward(self, hidden_BLH: Tensor, batch: Batch, tower: Mapping[int, Tensor] = NOTHING) -> TermSums:
        index, cells, weight_N = chosen_positions(batch)
        features = batch.targets.get(self.settings.name) if self.tower_layer is None else tower[self.tower_layer]
        if features is None:  # a micro-batch without images, which scores nothing
            features = hidden_BLH.new_zeros(*batch.view_position.shape, self.feature_width)
        hidden_NH = hidden_BLH.flatten(0, 1).index_select(0, index)
        feature_NC = features.flatten(0, 1).index_select(0, cells)
        (loss,) = sum_over_chunks(self._score, self.chunk, hidden_NH, feature_NC, weight_N)
        return TermSums(loss[None], self.count_targets(batch), torch.zeros(0, dtype=torch.int64, device=loss.device))

    @override
    def count_targets(self, batch: Batch) -> int:
        return int(batch.target_mask.sum())

    @override
    def flops_per_target(self) -> Forward:
        return Forward(weights=2.0 * linear_elements(self.projection))

    @override
    def facts(self) -> dict[str, Any]:
        return {**self.settings.model_dump(mode="json", exclude={"manifests"}), "feature_width": self.feature_width}

    def _score(self, hidden_NH: Tensor, feature_NC: Tensor, weight_N: Tensor) -> tuple[Tensor]:
        cosine_N = F.cosine_similarity(self.projection(hidden_NH).float(), feature_NC.float(), dim=-1)
        return ((weight_N * (1 - cosine_N)).sum(),)
