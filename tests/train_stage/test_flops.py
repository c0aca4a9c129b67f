"""The FLOPs we count by hand are those that torch counts while it runs."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from test_model import POSITIONS, VIEW, codebooks, image_batch
from tiny_models import target
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from manifests.schema import FeaturesSpec
from train_stage import config as configs
from train_stage.batch import count_pairs
from train_stage.build import build_model
from train_stage.cost import count_parts, flop_model
from train_stage.flops import Forward, Work, peak_flops, utilisation
from train_stage.model import AsvrModel
from train_stage.objectives.denoise import DenoiseObjective
from train_stage.parts import set_trainable
from train_stage.visual_head import VisualHead

HEAD = configs.HeadConfig(width=16, layers=2, heads=2, ffn=24)
TERMS: dict[str, tuple[configs.Term, ...]] = {
    "depth_transformer": (configs.CodesObjective(head=HEAD),),
    "shared": (configs.CodesObjective(head=HEAD.model_copy(update={"shared_feed_forward": True})),),
    "parallel": (configs.CodesObjective(head=configs.ParallelHeadConfig(kind="parallel", width=24)),),
    "align": (configs.AlignObjective(kind="align", tower_layer=-1, width=24),),
    "none": (),
}
ALL = {"projector", "visual_head", "language_model"}
GRID = (4, 4)
SPEC = FeaturesSpec(
    kind="features", origin="tiny", weights_sha256={}, view_size=VIEW, grid=GRID, width=6, dtype="float32", settings={}
)
CASES = [
    *((kind, ALL) for kind in TERMS),
    ("depth_transformer", {"projector", "visual_head"}),
    ("none", {"projector"}),
    ("none", {"language_model"}),
]


def counted(model: AsvrModel) -> tuple[float, Work]:
    """FLOPs of a step by torch's counter, and what the step went through."""
    batch = image_batch(model)
    counter = FlopCounterMode(display=False)
    # The kernel that torch would take on a CPU is not one that its counter knows.
    with counter, sdpa_kernel(SDPBackend.MATH):
        sums = model(batch)
        counts = {name: term.targets for name, term in sums.terms.items()}
        sums.total(sums.text_tokens, counts, dict.fromkeys(counts, 1.0)).backward()
    work = Work(batch.input_ids.numel(), count_pairs(batch), sums.text_tokens, len(batch.views), counts)
    return float(counter.get_total_flops()), work


@pytest.mark.parametrize(("terms", "parts"), CASES)
def test_a_step_takes_the_flops_that_torch_counts(
    tiny_model: Callable[..., configs.ModelConfig], terms: str, parts: set[str]
) -> None:
    model = build_model(
        tiny_model(), TERMS[terms], {"codes": target(codebooks())}, torch.float32, view_size=VIEW, seed=0
    )
    set_trainable(model, parts)
    found, work = counted(model)
    assert flop_model(model, VIEW)(work) == found


@pytest.mark.parametrize("kind", ["clip", "dinov2", "vit"])
def test_other_towers(tiny_model: Callable[..., configs.ModelConfig], kind: str) -> None:
    model = build_model(tiny_model(kind), (), {}, torch.float32, view_size=VIEW, seed=0)
    set_trainable(model, {"projector", "language_model"})
    found, work = counted(model)
    assert flop_model(model, VIEW)(work) == found


def test_a_tower_that_is_not_run_takes_nothing(tiny_model: Callable[..., configs.ModelConfig]) -> None:
    model = build_model(tiny_model(), (), {}, torch.float32, view_size=VIEW)
    ran = flop_model(model, VIEW)
    model.reads_features = True
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):
        model._computed(image_batch(model), -2)
    assert 2 * (ran.view - flop_model(model, VIEW).view) == counter.get_total_flops()


def test_the_denoiser(tiny_model: Callable[..., configs.ModelConfig]) -> None:
    """One image whose cells all count, at three noise levels."""
    term = DenoiseObjective(
        configs.DenoiseObjective(kind="denoise", manifests=("x",), width=16, layers=2, heads=2, repeats=3),
        32,
        GRID,
        SPEC,
    )
    hidden = torch.randn(1, POSITIONS, 32, requires_grad=True)
    t, noise = torch.tensor([[3, 40, 900]]), torch.randn(1, 3, POSITIONS, 6)
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):
        term.score(hidden, torch.randn(1, POSITIONS, 6), torch.ones(1, POSITIONS), t, noise).backward()
    assert term.flops_per_target().step(trains=True) * POSITIONS == counter.get_total_flops()


def test_the_published_head_costs_what_its_paper_says(tiny_model: Callable[..., configs.ModelConfig]) -> None:
    """H 4096, D 8, K 16,384: 1.1 GMAC a position, 0.74 billion parameters."""
    with torch.device("meta"):
        head = VisualHead(4096, configs.HeadConfig(), [np.zeros((16384, 4), np.float32)] * 8)
    flops = head.forward_flops()
    assert (flops.weights + flops.first + flops.pairs) / 2 == pytest.approx(1.1e9, rel=0.05)


def test_a_part_that_is_frozen_and_below_nothing_costs_its_forward_pass_alone() -> None:
    forward = Forward(weights=10, first=1, pairs=5)
    assert forward.step(trains=True) == 30 + 2 + 15
    assert forward.step(trains=False, below=True) == 20 + 1 + 15
    assert forward.step(trains=False, below=False) == 10 + 1 + 5
    assert (forward + forward * 2) == Forward(30, 3, 15)


def test_parts_are_counted_once(tiny_model: Callable[..., configs.ModelConfig]) -> None:
    model = build_model(
        tiny_model(tied=True), TERMS["shared"], {"codes": target(codebooks())}, torch.float32, view_size=VIEW
    )
    set_trainable(model, {"projector", "visual_head"})
    parts = {part.name: part for part in count_parts(model)}
    assert list(parts) == ["vision_tower", "projector", "visual_head", "language_model"]
    assert sum(part.parameters for part in parts.values()) == sum(p.numel() for p in model.parameters())
    assert sum(part.trained for part in parts.values()) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert parts["language_model"].trained == 0


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA A10G", None),
        ("NVIDIA A1000", None),
        ("Some other device", None),
    ],
)
def test_peaks_are_known_or_absent(name: str, peak: float | None) -> None:
    assert peak_flops(name) == peak


def test_utilisation_is_absent_rather_than_invented() -> None:
    assert utilisation(400e12, 1.0, 2, 1000e12) == pytest.approx(0.2)
    assert utilisation(400e12, 1.0, 2, None) is None
