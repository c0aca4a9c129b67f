"""What the visual loss scores: shift, masks, micro-batches without images."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from train_stage import config
from train_stage.batch import IGNORE, NO_TOKEN, Batch, count_visual_targets, dummy_view
from train_stage.model import States
from train_stage.objectives.align import AlignObjective
from train_stage.objectives.codes import CodesObjective, select_targets

DEPTH, SIZE, HIDDEN = 3, 11, 8
HEAD = config.HeadConfig(width=16, layers=1, heads=2, ffn=16)


def objective(
    shift: str = "none", chunk: int = 1000, head: config.HeadConfig | config.ParallelHeadConfig = HEAD
) -> CodesObjective:
    torch.manual_seed(0)
    codebooks = [np.random.default_rng(d).normal(size=(SIZE, 4)).astype(np.float32) for d in range(DEPTH)]
    settings = config.CodesObjective(shift=shift, head=head)
    return CodesObjective(settings, HIDDEN, codebooks, chunk=chunk)


def two_views() -> Batch:
    """Two rows of 6 tokens; a view of 4 positions in each, the second one cut after 2, with one padding cell."""
    generator = torch.Generator().manual_seed(1)
    return Batch(
        input_ids=torch.zeros(2, 6, dtype=torch.long),
        position_ids=torch.arange(6).expand(2, 6),
        labels=torch.full((2, 6), IGNORE),
        views=torch.zeros(2, 4, 4, 3, dtype=torch.uint8),
        view_position=torch.tensor([[1, 2, 3, 4], [10, 11, NO_TOKEN, NO_TOKEN]]),
        targets={"codes": torch.randint(0, SIZE, (2, 4, DEPTH), generator=generator)},
        target_mask=torch.tensor([[False, True, True, True], [True, True, False, False]]),
        sample_ids=["a", "b"],
    )


def without_images() -> Batch:
    views, position, mask = dummy_view(4, 4)
    ids = torch.zeros(1, 6, dtype=torch.long)
    return Batch(ids, torch.arange(6)[None], torch.full_like(ids, IGNORE), views, position, mask, ["t"])


@pytest.mark.parametrize(
    ("shift", "expected"),
    [
        ("none", [(2, 0, 1), (3, 0, 2), (4, 0, 3), (10, 1, 0), (11, 1, 1)]),
        ("next", [(1, 0, 1), (2, 0, 2), (3, 0, 3), (10, 1, 1)]),
    ],
)
def test_which_hidden_state_is_scored_against_which_cell(shift: str, expected: list[tuple[int, int, int]]) -> None:
    batch = two_views()
    index, targets, count = select_targets(batch.view_position, batch.target_mask, batch.targets["codes"], DEPTH, shift)
    assert index.tolist() == [token for token, _, _ in expected]
    assert targets.tolist() == [batch.targets["codes"][view, cell].tolist() for _, view, cell in expected]
    assert count == len(expected) == count_visual_targets(batch, shift) == objective(shift).count_targets(batch)


@pytest.mark.parametrize("shift", ["none", "next"])
@pytest.mark.parametrize("chunk", [2, 1000])
def test_sums_equal_the_plain_form_with_gradients(shift: str, chunk: int) -> None:
    batch, module = two_views(), objective(shift, chunk)
    torch.manual_seed(3)
    hidden = torch.randn(2, 6, HIDDEN, requires_grad=True)
    loss_D, count, correct_D = module(hidden, batch)
    loss_D.sum().backward()
    gradients = [hidden.grad.clone(), *(p.grad.clone() for p in module.parameters())]
    hidden.grad = None
    module.zero_grad()

    index, codes, _ = select_targets(batch.view_position, batch.target_mask, batch.targets["codes"], DEPTH, shift)
    logits = module.visual_head(hidden.flatten(0, 1)[index], codes)
    plain = torch.stack([F.cross_entropy(x, codes[:, d], reduction="sum") for d, x in enumerate(logits)])
    plain.sum().backward()
    torch.testing.assert_close(loss_D, plain)
    assert correct_D.tolist() == [int((x.argmax(-1) == codes[:, d]).sum()) for d, x in enumerate(logits)]
    assert count == len(index)
    for a, b in zip(gradients, [hidden.grad, *(p.grad for p in module.parameters())], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_without_images_every_parameter_has_a_zero_gradient() -> None:
    module = objective()
    loss_D, count, correct_D = module(torch.randn(1, 6, HIDDEN), without_images())
    loss_D.sum().backward()
    assert (loss_D.tolist(), count, correct_D.tolist()) == ([0.0] * DEPTH, 0, [0] * DEPTH)
    assert all(p.grad is not None and not p.grad.any() for p in module.parameters())


HEADS = {
    "published": HEAD,
    "shared": config.HeadConfig(width=16, layers=2, heads=2, ffn=16, shared_feed_forward=True),
    "linear": config.ParallelHeadConfig(kind="parallel"),
    "parallel": config.ParallelHeadConfig(kind="parallel", width=16),
}


@pytest.mark.parametrize("head", HEADS)
def test_the_visual_loss_starts_at_ln_k_and_every_depth_learns(head: str) -> None:
    module = objective(head=HEADS[head])
    torch.manual_seed(0)
    many = 400
    codes = torch.randint(0, SIZE, (1, many, DEPTH))
    hidden = torch.randn(1, many, HIDDEN, requires_grad=True)
    sums = module.score(hidden, torch.arange(many)[None], codes, torch.ones(1, many, dtype=torch.bool))
    assert (sums.loss_sum_D / many).tolist() == pytest.approx([math.log(SIZE)] * DEPTH, rel=0.04)
    for depth in range(DEPTH):
        (gradient,) = torch.autograd.grad(sums.loss_sum_D[depth], hidden, retain_graph=True)
        assert gradient.any(), depth
    sums.loss_sum_D.sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in module.parameters())


def test_parallel_depths_do_not_see_each_other() -> None:
    head = objective(head=HEADS["parallel"]).visual_head
    hidden = torch.randn(2, HIDDEN)
    one, other = head(hidden, torch.zeros(2, DEPTH).long()), head(hidden, torch.ones(2, DEPTH).long())
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def align(**changes: object) -> AlignObjective:
    torch.manual_seed(0)
    settings = {"kind": "align", "manifests": ["m"], "width": 16} | changes
    return AlignObjective(config.AlignObjective.model_validate(settings), HIDDEN, 5, chunk=2)


def test_alignment_is_one_minus_the_cosine_of_the_cells_that_count() -> None:
    module, batch = align(), two_views()
    features, hidden = torch.randn(2, 4, 5), torch.randn(2, 6, HIDDEN, requires_grad=True)
    sums = module(hidden, replace(batch, targets={"align": features}))
    pairs = [(2, 0, 1), (3, 0, 2), (4, 0, 3), (10, 1, 0), (11, 1, 1)]
    projected = module.projection(hidden.flatten(0, 1))
    plain = sum(1 - F.cosine_similarity(projected[token], features[view, cell], dim=0) for token, view, cell in pairs)
    torch.testing.assert_close(sums.loss_sum_D, plain[None])
    assert (sums.targets, sums.correct_D.numel()) == (5, 0)
    sums.loss_sum_D.sum().backward()
    assert [int(row.any()) for row in hidden.grad.flatten(0, 1)] == [0, 0, 1, 1, 1, 0, 0, 0, 0, 0, 1, 1]


def test_alignment_looks_at_the_layers_it_names() -> None:
    module = align(manifests=(), tower_layer=3, language_layer=1)
    hidden, features = torch.randn(2, 6, HIDDEN), torch.randn(2, 4, 5)
    states = States(torch.full_like(hidden, torch.nan), {1: hidden}, {3: features})
    sums = module(states.of(module), two_views(), states.tower)
    assert sums.loss_sum_D.isfinite().all()


def test_alignment_without_images_has_zero_gradients() -> None:
    module = align()
    sums = module(torch.randn(1, 6, HIDDEN), without_images())
    sums.loss_sum_D.sum().backward()
    assert (sums.loss_sum_D.item(), sums.targets) == (0.0, 0)
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in module.parameters())
