"""The visual head computes what the released ASVR code computes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from train_stage.config import HeadConfig
from train_stage.visual_head import VisualHead

if TYPE_CHECKING:
    from .conftest import AsvrGolden

TINY = HeadConfig(width=16, layers=2, heads=2, ffn=24)


def random_codebooks(depth: int, size: int = 10, dim: int = 6) -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.normal(size=(size, dim)).astype(np.float32) for _ in range(depth)]


def test_logits_and_losses_equal_the_release(asvr_golden: AsvrGolden) -> None:
    head = asvr_golden.visual_head()
    hidden = asvr_golden.tensors["head_hidden"].flatten(0, 1)
    codes = asvr_golden.tensors["semantic_codes"].flatten(0, 1).long()
    logits = head(hidden, codes)
    expected = asvr_golden.tensors["head_logits"].flatten(0, 1)
    torch.testing.assert_close(torch.stack(logits, dim=1), expected, rtol=0, atol=1e-5)
    losses = [F.cross_entropy(logits_NK, codes[:, d]).item() for d, logits_NK in enumerate(logits)]
    assert losses == pytest.approx(asvr_golden.numbers["head_ce_per_depth"], abs=1e-5)


@pytest.mark.parametrize("residual", [True, False])
def test_a_depth_sees_only_the_codes_before_it(residual: bool) -> None:
    torch.manual_seed(0)
    head = VisualHead(8, TINY, random_codebooks(4), residual=residual)
    hidden, codes = torch.randn(1, 8), torch.tensor([[1, 2, 3, 4]])
    before = head(hidden, codes)
    for changed in range(4):
        other = codes.clone()
        other[0, changed] = 9
        differs = [not torch.equal(a, b) for a, b in zip(before, head(hidden, other), strict=True)]
        assert differs == [depth > changed for depth in range(4)]


def test_context_is_the_sum_of_residual_codebooks_and_the_last_vector_of_independent_ones() -> None:
    codebooks = random_codebooks(3)
    codes = torch.tensor([[4, 7, 0]])
    first, second = torch.from_numpy(codebooks[0][4]), torch.from_numpy(codebooks[1][7])
    residual = VisualHead(8, TINY, codebooks)._context(codes)
    torch.testing.assert_close(residual[0], torch.stack([first, first + second]))
    independent = VisualHead(8, TINY, codebooks, residual=False)._context(codes)
    torch.testing.assert_close(independent[0], torch.stack([first, second]))


def test_codebooks_may_differ_in_size_and_stay_out_of_checkpoints() -> None:
    codebooks = [book[: 5 + d] for d, book in enumerate(random_codebooks(3))]
    head = VisualHead(8, TINY, codebooks)
    assert [tuple(x.shape) for x in head(torch.randn(2, 8), torch.zeros(2, 3, dtype=torch.long))] == [
        (2, 5),
        (2, 6),
        (2, 7),
    ]
    assert not [name for name in head.state_dict() if "codebook" in name]
    assert {name for name, _ in head.named_buffers()} == {"codebook_0", "codebook_1"}
    assert not any(buffer.requires_grad for buffer in head.buffers())


def test_one_depth_needs_no_context() -> None:
    head = VisualHead(8, TINY, random_codebooks(1))
    (logits,) = head(torch.randn(2, 8), torch.zeros(2, 1, dtype=torch.long))
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in head.parameters())


def test_every_parameter_gets_a_gradient() -> None:
    torch.manual_seed(0)
    head = VisualHead(8, TINY, random_codebooks(3))
    codes = torch.randint(0, 10, (5, 3))
    sum(F.cross_entropy(x, codes[:, d]) for d, x in enumerate(head(torch.randn(5, 8), codes))).backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in head.parameters())
