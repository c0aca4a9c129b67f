"""What a phase asks of the image positions beside the text loss: a list of terms, each with its weight. Torch-free.

`kind` decides the keys, and the module `train_stage.objectives.KIND` that computes the term. A new kind is that module
and one class of the union `Term` below.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, NonNegativeFloat, PositiveInt, Tag, model_validator

from manifests.paths import ManifestRef
from train_stage.strict import Strict


def _check_heads(what: str, width: int, heads: int) -> None:
    if width % heads:
        raise ValueError(f"{what} width {width} is not a multiple of its {heads} heads")


class HeadConfig(Strict):
    """Shape of the depth transformer, the published visual head; the defaults are those of the ASVR release."""

    kind: Literal["depth_transformer"] = "depth_transformer"
    width: PositiveInt = 2048
    layers: PositiveInt = 3
    heads: PositiveInt = 16
    ffn: PositiveInt = 4096
    shared_feed_forward: bool = Field(
        default=False, description="one feed-forward network for all depths, where the published head has one for each"
    )

    @model_validator(mode="after")
    def _heads_divide_width(self) -> Self:
        _check_heads("head", self.width, self.heads)
        return self


class ParallelHeadConfig(Strict):
    """One classifier per depth on the hidden state itself: no depth is told the codes of the depths before it."""

    kind: Literal["parallel"]
    width: PositiveInt | None = Field(
        default=None, description="hidden width of a two-layer network per depth; left out: one linear layer per depth"
    )

    @model_validator(mode="before")
    @classmethod
    def _nothing_of_the_other_kind(cls, value: Any) -> Any:
        for key in ("layers", "heads", "ffn", "shared_feed_forward"):
            if isinstance(value, dict) and key in value:
                raise ValueError(
                    f"a parallel head has no {key}, because its depths do not see each other: remove {key}, or set "
                    "head.kind to depth_transformer"
                )
        return value


def _head_kind(value: Any) -> str:
    kind = value.get("kind", "depth_transformer") if isinstance(value, dict) else getattr(value, "kind", "")
    return str(kind)


Head = Annotated[
    Annotated[HeadConfig, Tag("depth_transformer")] | Annotated[ParallelHeadConfig, Tag("parallel")],
    Discriminator(
        _head_kind,
        custom_error_type="value_error",
        custom_error_context={"error": "its kind is depth_transformer or parallel"},
    ),
]

TermName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]


class TermConfig(Strict):
    """What all kinds of terms have: the step's loss is text loss + sum of weight * term.

    The name stands in metrics and in checkpoints, where a later phase finds the weights of the term of that name.
    """

    name: TermName
    weight: NonNegativeFloat = 1.0


class CodesObjective(TermConfig):
    """ASVR: predict the codes of the manifests at the image positions."""

    kind: Literal["codes"] = "codes"
    name: TermName = "codes"
    manifests: tuple[ManifestRef, ...] = Field(default=(), description="of one tokenizer; default: the phase's")
    shift: Literal["none", "next"] = Field(
        default="none",
        description="a cell's codes are predicted from its own token (`none`, as published) or the one before (`next`)",
    )
    head: Head = HeadConfig()


class DenoiseObjective(TermConfig):
    """ROSS: a small diffusion transformer, told the hidden states, takes noise from the manifests' features."""

    kind: Literal["denoise"]
    name: TermName = "denoise"
    manifests: tuple[ManifestRef, ...] = Field(
        min_length=1, description="of kind features: VAE latents or an encoder's"
    )
    width: PositiveInt = 1024
    layers: PositiveInt = 3
    heads: PositiveInt = 16
    repeats: PositiveInt = Field(default=4, description="noise levels drawn for a view in each step")
    latents: Literal["sample", "mean"] = Field(
        default="sample", description="of a VAE's posterior: drawn anew in every step, as ROSS does, or its mean"
    )

    @model_validator(mode="after")
    def _shape(self) -> Self:
        _check_heads("denoise", self.width, self.heads)
        if self.width % 4:
            raise ValueError(f"denoise width {self.width} is not a multiple of 4, which its table of positions needs")
        return self


class AlignObjective(TermConfig):
    """Cosine distance between projected hidden states and frozen features of the same positions."""

    kind: Literal["align"]
    name: TermName = "align"
    manifests: tuple[ManifestRef, ...] = Field(default=(), description="of kind features, on the tower's grid")
    tower_layer: int | None = Field(
        default=None, description="instead of manifests: which of the frozen tower's hidden_states"
    )
    language_layer: int | None = Field(
        default=None,
        description="which of the language model's hidden_states is aligned; left out: the last one, after its norm",
    )
    width: PositiveInt = Field(default=2048, description="hidden width of the two-layer projection")

    @model_validator(mode="after")
    def _one_target(self) -> Self:
        if bool(self.manifests) == (self.tower_layer is not None):
            raise ValueError(
                "objective align takes its features either from manifests or from the tower: give one of manifests "
                "and tower_layer"
            )
        return self


class NoneObjective(Strict):
    """LLaVA-1.5: the text loss alone."""

    kind: Literal["none"] = "none"


Term = Annotated[CodesObjective | DenoiseObjective | AlignObjective, Field(discriminator="kind")]

Single = Annotated[
    CodesObjective | DenoiseObjective | AlignObjective | NoneObjective,
    Field(discriminator="kind"),
]


def _how_many(value: Any) -> str:
    return "several" if isinstance(value, list | tuple) else "one"


Objective = Annotated[
    Annotated[Single, Tag("one")] | Annotated[Annotated[tuple[Term, ...], Field(min_length=1)], Tag("several")],
    Discriminator(_how_many),
]
"""One term, a list of them, or `none`."""


def terms_of(objective: Single | tuple[Term, ...]) -> tuple[Term, ...]:
    """The terms of an objective; none of them for `none`."""
    if isinstance(objective, NoneObjective):
        return ()
    return objective if isinstance(objective, tuple) else (objective,)
