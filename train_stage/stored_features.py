"""The tower's output from a `features` set instead of from the tower, which is frozen: what is checked before it is believed.

Shapes: V views, P positions of a view, C width of the tower.
"""

from __future__ import annotations

import torch
from torch import Tensor

from manifests.errors import InputError
from manifests.schema import FeaturesSpec, Producer
from train_stage import tower
from train_stage.model import AsvrModel

LARGEST_DISTANCE = {"float32": 0.01, "float16": 0.02, "bfloat16": 0.1}
"""Of stored features from computed ones, relative to their norm. On small random towers of the four kinds bfloat16 is off by
0.005 and another tower by 1 or more; the layer, which can be closer, stands in the spec."""


def check_spec(spec: Producer, model: AsvrModel, grid: tuple[int, int], where: str) -> None:
    """InputError unless a set holds what `model`'s tower gives its projector: layer, grid, width, normalisation."""
    if not isinstance(spec, FeaturesSpec) or spec.kind != "features":
        raise InputError(
            f"{where} is no set of an encoder's features: vision_features needs one made with tokenizer.kind features"
        )
    config, norm = model.vision_tower.config, model.pixel_norm
    layer = tower.resolve_layer(model.llava.config.vision_feature_layer, config.num_hidden_layers)
    wanted = {"layer": layer, "image_mean": list(norm.mean), "image_std": list(norm.std)}
    found = {name: spec.settings.get(name) for name in wanted}
    for name, own, stored in (
        ("positions a view", grid, spec.grid),
        ("numbers a position", config.hidden_size, spec.width),
        *((name, wanted[name], found[name]) for name in wanted),
    ):
        if own != stored:
            raise InputError(
                f"the features in {where} have {name} {stored} and the vision tower {own}: tokenize with the encoder "
                "and layer that model.vision_tower and model.vision_feature_layer name"
            )


@torch.no_grad()
def check_values(views: Tensor, stored_VPC: Tensor, spec: FeaturesSpec, model: AsvrModel, where: str) -> None:
    """InputError unless the tower makes of some views (V, S, S, 3) what is stored of them, up to rounding."""
    layer = model.llava.config.vision_feature_layer
    computed = tower.patch_features(model.vision_tower, model.pixel_norm(views), [layer])[layer].float()
    distance = float((computed - stored_VPC.float()).norm() / computed.norm())
    # The tower may compute in bfloat16 where the set was made in float32, and the other way round.
    coarsest = max(LARGEST_DISTANCE[spec.dtype], LARGEST_DISTANCE[str(model.vision_tower.dtype).removeprefix("torch.")])
    if not distance < coarsest:
        raise InputError(
            f"the features in {where} are not what model.vision_tower makes of the same pictures (relative distance "
            f"{distance:.2g}): they come from another encoder, so tokenize with this one or leave out vision_features"
        )
