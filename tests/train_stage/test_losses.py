"""Chunked losses equal the plain ones, values and gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from train_stage.batch import IGNORE
from train_stage.losses import LossSums, TermSums, text_loss, text_targets

VOCABULARY = 13


def hidden_and_labels() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    labels = torch.randint(0, VOCABULARY, (3, 9))
    labels[:, :4] = IGNORE
    labels[1, 6:] = IGNORE
    return torch.randn(3, 9, 8, requires_grad=True), labels


@pytest.mark.parametrize("chunk", [1, 4, 1000])
def test_text_loss_equals_the_plain_form(chunk: int) -> None:
    hidden, labels = hidden_and_labels()
    layer = nn.Linear(8, VOCABULARY, bias=False)
    loss, count = text_loss(hidden, labels, layer, chunk=chunk)
    loss.backward()
    got = (loss.detach(), hidden.grad.clone(), layer.weight.grad.clone())
    hidden.grad, layer.weight.grad = None, None

    logits = layer(hidden)[:, :-1].flatten(0, 1)
    plain = F.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=IGNORE, reduction="sum")
    plain.backward()
    assert count == int((labels[:, 1:] != IGNORE).sum())
    for a, b in zip(got, (plain.detach(), hidden.grad, layer.weight.grad), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_the_output_layer_runs_on_supervised_positions_only_and_chunk_by_chunk() -> None:
    hidden, labels = hidden_and_labels()
    layer = nn.Linear(8, VOCABULARY, bias=False)
    rows: list[int] = []
    layer.register_forward_hook(lambda _module, inputs, _output: rows.append(len(inputs[0])))
    loss, count = text_loss(hidden, labels, layer, chunk=4)
    assert sum(rows) == count
    assert max(rows) == 4
    forward = len(rows)
    loss.backward()
    assert len(rows) == 2 * forward  # made again in the backward pass, so not kept


def test_nothing_supervised_is_zero_with_zero_gradients() -> None:
    hidden, labels = hidden_and_labels()
    layer = nn.Linear(8, VOCABULARY, bias=False)
    loss, count = text_loss(hidden, torch.full_like(labels, IGNORE), layer)
    loss.backward()
    assert (loss.item(), count) == (0.0, 0)
    assert layer.weight.grad is not None
    assert not layer.weight.grad.any()


def test_targets_never_cross_rows_and_the_first_token_is_no_target() -> None:
    labels = torch.tensor([[5, IGNORE, 6], [7, 8, IGNORE]])
    index, targets, count = text_targets(labels)
    assert index.tolist() == [1, 3]
    assert targets.tolist() == [6, 8]
    assert count == 2


def test_total_is_normalised_by_the_step_not_by_the_micro_batch() -> None:
    sums = LossSums(torch.tensor(6.0), 2, {"codes": TermSums(torch.tensor([4.0, 8.0]), 4, torch.tensor([0, 0]))})
    assert sums.total(text_tokens=3, targets={"codes": 6}, weights={"codes": 0.5}).item() == pytest.approx(2 + 0.5 * 1)
    no_visual = LossSums(torch.tensor(6.0), 2, {})
    assert no_visual.total(text_tokens=3, targets={}, weights={}).item() == 2.0
