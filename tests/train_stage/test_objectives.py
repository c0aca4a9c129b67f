"""What the visual loss scores: shift, masks, micro-batches without images."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from train_stage import config
from train_stage.batch import IGNORE, NO_TOKEN, Batch, count_visual_targets, dummy_view
from train_stage.objectives import CodesObjective, NoneObjective, build_objective
from train_stage.objectives.codes import select_targets

DEPTH, SIZE, HIDDEN = 3, 11, 8
HEAD = config.HeadConfig(width=16, layers=1, heads=2, ffn=16)


def objective(shift: str = "none", chunk: int = 1000) -> CodesObjective:
    torch.manual_seed(0)
    codebooks = [np.random.default_rng(d).normal(size=(SIZE, 4)).astype(np.float32) for d in range(DEPTH)]
    settings = config.CodesObjective(shift=shift, head=HEAD)
    return CodesObjective(settings, HIDDEN, codebooks, chunk=chunk)


def two_views() -> Batch:
    """Two rows of 6 tokens; a view of 4 positions in each, the second one cut after 2, with one padding cell."""
    generator = torch.Generator().manual_seed(1)
    return Batch(
        input_ids=torch.zeros(2, 6, dtype=torch.long),
        attention_mask=torch.ones(2, 6, dtype=torch.long),
        labels=torch.full((2, 6), IGNORE),
        views=torch.zeros(2, 4, 4, 3, dtype=torch.uint8),
        view_position=torch.tensor([[1, 2, 3, 4], [10, 11, NO_TOKEN, NO_TOKEN]]),
        codes=torch.randint(0, SIZE, (2, 4, DEPTH), generator=generator),
        codes_mask=torch.tensor([[False, True, True, True], [True, True, False, False]]),
        sample_ids=["a", "b"],
    )


def without_images() -> Batch:
    views, position, mask = dummy_view(4, 4)
    ids = torch.zeros(1, 6, dtype=torch.long)
    return Batch(ids, torch.ones_like(ids), torch.full_like(ids, IGNORE), views, position, None, mask, ["t"])


@pytest.mark.parametrize(
    ("shift", "expected"),
    [
        ("none", [(2, 0, 1), (3, 0, 2), (4, 0, 3), (10, 1, 0), (11, 1, 1)]),
        ("next", [(1, 0, 1), (2, 0, 2), (3, 0, 3), (10, 1, 1)]),
    ],
)
def test_which_hidden_state_is_scored_against_which_cell(shift: str, expected: list[tuple[int, int, int]]) -> None:
    batch = two_views()
    index, targets, count = select_targets(batch, DEPTH, shift)
    assert index.tolist() == [token for token, _, _ in expected]
    assert targets.tolist() == [batch.codes[view, cell].tolist() for _, view, cell in expected]
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

    index, codes, _ = select_targets(batch, DEPTH, shift)
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


def test_the_first_visual_loss_is_ln_k() -> None:
    batch = two_views()
    loss_D, count, _ = objective()(torch.randn(2, 6, HIDDEN), batch)
    assert (loss_D / count).tolist() == pytest.approx([math.log(SIZE)] * DEPTH, abs=0.25)
    assert (loss_D.sum() / count / DEPTH).item() == pytest.approx(math.log(SIZE), abs=0.1)


def test_objective_none_has_no_parameters_and_no_depths() -> None:
    module = build_objective(config.NoneObjective(), HIDDEN, None)
    assert isinstance(module, NoneObjective)
    assert not list(module.parameters())
    loss_D, count, _ = module(torch.randn(2, 6, HIDDEN), two_views())
    assert (loss_D.numel(), count, module.count_targets(two_views())) == (0, 0, 0)
