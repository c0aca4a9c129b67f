"""What a phase says of LoRA. Torch-free."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, PositiveInt, StringConstraints

from train_stage.strict import Strict


class LoraConfig(Strict):
    """Adapters on linear layers of the language model, whose own weights stay as they are; rank and alpha are LLaVA's."""

    rank: PositiveInt = 128
    alpha: PositiveInt = Field(default=256, description="an adapter's output is multiplied by alpha / rank")
    dropout: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="share of an adapter's inputs that is dropped, drawn for each micro-batch; LLaVA's is 0.05",
    )
    targets: tuple[Annotated[str, StringConstraints(min_length=1)], ...] | None = Field(
        default=None,
        min_length=1,
        description="names of linear layers, such as q_proj; default: all of the decoder's layers",
    )
