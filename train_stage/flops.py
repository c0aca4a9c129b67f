"""How many floating-point operations a step needs: what model FLOPs utilisation, estimates and benchmarks divide by.

One convention everywhere (PaLM's, arXiv 2204.02311 appendix B, and torch's `FlopCounterMode`): a multiplication and an
addition are 2 FLOPs; only matrix products count, no norms, activations or look-ups; attention counts all pairs of tokens
of a sample, though a causal kernel may skip half of them; nothing that is computed a second time to save memory counts.

    forward of a weight of N elements      2 N a row
    its backward pass                      2 N for the gradient of its input, if anything below trains,
                                           2 N for its own, if it trains itself: 6 N, 4 N (frozen on the way down) or 2 N
    attention of a layer of width A        4 A for each pair of tokens of a sample, and twice that in the backward pass
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn


@dataclass(frozen=True)
class Forward:
    """FLOPs of a forward pass, by what their backward pass takes.

    weights   products of a weight with an input that carries a gradient
    first     products of a weight with an input that carries none: features of the frozen tower, codebook vectors
    pairs     products of two activations: attention
    """

    weights: float = 0.0
    first: float = 0.0
    pairs: float = 0.0

    def __add__(self, other: Forward) -> Forward:
        return Forward(self.weights + other.weights, self.first + other.first, self.pairs + other.pairs)

    def __mul__(self, times: float) -> Forward:
        return Forward(self.weights * times, self.first * times, self.pairs * times)

    def step(self, *, trains: bool, below: bool = True) -> float:
        """FLOPs of forward and backward pass. `below`: something trains whose gradient comes through here."""
        flows = trains or below
        return self.weights * (1 + flows + trains) + self.first * (1 + trains) + self.pairs * (3 if flows else 1)


@dataclass(frozen=True)
class Work:
    """What a step went through, over all ranks; what fills up rows and ranks is left out.

    pairs: sum over samples of tokens squared. targets: by name, what each term of the visual loss scored.
    """

    tokens: int
    pairs: int
    text_tokens: int
    views: int
    targets: Mapping[str, int] = field(default_factory=dict)

    def __add__(self, other: Work) -> Work:
        names = {**self.targets, **other.targets}
        targets = {name: self.targets.get(name, 0) + other.targets.get(name, 0) for name in names}
        return Work(
            self.tokens + other.tokens,
            self.pairs + other.pairs,
            self.text_tokens + other.text_tokens,
            self.views + other.views,
            targets,
        )


@dataclass(frozen=True)
class FlopModel:
    """FLOPs of forward and backward pass of a phase, linear in a step's `Work`."""

    token: float
    pair: float
    text_token: float
    view: float
    target: Mapping[str, float]

    def visual_head(self, work: Work) -> float:
        """The share of the visual loss: what training on text alone does not compute."""
        return sum(flops * work.targets[name] for name, flops in self.target.items())

    def __call__(self, work: Work) -> float:
        """FLOPs of a step."""
        return (
            self.token * work.tokens
            + self.pair * work.pairs
            + self.text_token * work.text_tokens
            + self.view * work.views
            + self.visual_head(work)
        )


def linear_elements(module: nn.Module) -> int:
    """Elements of the weights of the linear layers in `module`; each takes 2 FLOPs a row."""
    layers = (layer for layer in module.modules() if isinstance(layer, nn.Linear))
    return sum(layer.in_features * layer.out_features for layer in layers)


PEAK_BFLOAT16: Mapping[str, float] = {
    "GB200": 2.5e15,
    "B200": 2.25e15,
    "H200": 989e12,
    "GH200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "A800": 312e12,
    "H800": 989e12,
    "L40S": 362e12,
    "A10": 125e12,
    "L4": 121e12,
}
"""Dense bfloat16 FLOP/s by a part of the name that CUDA gives a device, from NVIDIA's data sheets, the longer names
before their own beginnings. A device that is not here has no utilisation."""


def peak_flops(device_name: str) -> float | None:
    """Dense bfloat16 FLOP/s of a GPU by its CUDA name, None if it is not in the table.

    >>> peak_flops("NVIDIA H100 80GB HBM3") == 989e12, peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    (True, True)
    """
    words = f" {device_name.replace('-', ' ')} "
    return next((peak for name, peak in PEAK_BFLOAT16.items() if f" {name} " in words), None)


def utilisation(flops: float, seconds: float, devices: int, peak: float | None) -> float | None:
    """Model FLOPs utilisation: FLOPs / (seconds * devices * peak FLOP/s of one); None where the peak is not known."""
    return None if peak is None or seconds <= 0 else flops / (seconds * devices * peak)
