"""A SigLIP vision tower with the tensors of somebody else's checkpoint, run no further than is wanted.

Shape legend: B views, S edge of a view, P positions, n width.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn

from manifests.errors import InputError
from tokenize_stage.checkpoints import State, fill, shapes_of
from tokenize_stage.siglip_config import SiglipConfig


class SiglipTower:
    """transformers' own SigLIP, cut after `layers` blocks; without final norm and pooling head."""

    def __init__(self, config: SiglipConfig, layers: int) -> None:
        """The architecture alone, on the meta device; `load` gives it its tensors."""
        from transformers import SiglipVisionConfig, SiglipVisionModel

        self._values = {**config.values, "num_hidden_layers": layers, "vision_use_head": False}
        try:
            settings = SiglipVisionConfig(**self._values)
            with torch.device("meta"):
                model = SiglipVisionModel(settings)
        except (StrictDataclassError, ValueError, TypeError, KeyError) as error:
            first = str(error).strip().split("\n", 1)[0].rstrip(".")
            raise InputError(f"{config.where} is not the configuration of a SigLIP ({first}): check it") from error
        self._trunk = nn.ModuleDict({"embeddings": model.embeddings, "encoder": model.encoder})

    def needed(self, prefix: str) -> dict[str, tuple[int, ...]]:
        """The tensors it needs, as they are called in a checkpoint where the tower stands below `prefix`."""
        return shapes_of(self._trunk, prefix)

    def load(self, taken: State, prefix: str, *, dtype: torch.dtype, device: torch.device) -> None:
        """Its tensors out of `taken`, which holds at least those that are `needed`."""
        fill(self._trunk, taken, prefix)
        embeddings: Any = self._trunk["embeddings"]
        # The one tensor that no checkpoint holds.
        embeddings.position_ids = torch.arange(embeddings.num_positions).expand(1, -1)
        self._trunk.to(device=device, dtype=dtype)

    def hidden_states(self, pixels_BCSS: torch.Tensor, wanted: Collection[int]) -> dict[int, torch.Tensor]:
        """(B, 3, S, S) -> {i: `hidden_states[i]` (B, P, n)}; 0 = embeddings, i = raw output of block i."""
        encoder: Any = self._trunk["encoder"]
        hidden_BPn: torch.Tensor = self._trunk["embeddings"](pixels_BCSS)
        found = {0: hidden_BPn}
        for number, block in enumerate(encoder.layers, start=1):
            hidden_BPn = block(hidden_BPn, None)
            found[number] = hidden_BPn
        return {index: found[index] for index in wanted}


def unused_groups(config: SiglipConfig, layers: int, model: str) -> dict[str, str]:
    """Ignorable groups of a checkpoint with a whole SigLIP below `model` ('siglip_model.'), cut after `layers`."""
    later = "|".join(map(str, range(layers, config.layers))) or "-"
    return {
        "text tower": rf"{model}text_model\..+|{model}logit_(scale|bias)",
        "later layers": rf"{model}vision_model\.encoder\.layers\.({later})\..+",
        "pooling head": rf"{model}vision_model\.(post_layernorm|head)\..+",
        "stored arange": rf"{model}vision_model\.embeddings\.position_ids",
    }
