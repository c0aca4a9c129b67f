"""`reference_parity`: what the published code does otherwise than this project, for comparisons. Torch-free.

The sources are the release of ASVR (arXiv 2506.09040) and LLaVA's trainer; each departure can be had by itself.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator, Field, PositiveInt

from train_stage.strict import Strict


class ReferenceParity(Strict):
    """The published behaviours that a phase takes over. One left out is as published."""

    padding_cells: bool = Field(default=True, description="score the codes of letterbox cells like any other")
    blank_image: str | None = Field(
        default="blank.png",
        description="id, in the manifests of every term of kind codes, of an image without content: each text-only sample is "
        "scored as that image with hidden states of zero. null: text-only samples are not scored",
    )
    micro_batch_size: PositiveInt | None = Field(
        default=16,
        description="average the means of so many samples each, in the order of the step, as a GPU's batches are averaged "
        "by LLaVA's trainer; they are one row, whatever micro_batch_tokens says. null: one mean over the step",
    )


def _from_switch(value: object) -> object:
    return {True: ReferenceParity(), False: None}[value] if isinstance(value, bool) else value


Parity = Annotated[ReferenceParity | None, BeforeValidator(_from_switch)]
"""`true` for all of it, `false` or nothing for none, or the keys of `ReferenceParity`."""
