"""Where a rank computes."""

from __future__ import annotations

import pytest
import torch

from train_stage.ranks import has_gpu


@pytest.mark.parametrize(
    ("accelerator", "there", "used"),
    [(None, True, True), ("cuda", True, True), ("cpu", True, False), (None, False, False)],
)
def test_gpus_are_used_unless_deepspeed_is_told_not_to(
    accelerator: str | None, there: bool, used: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    if accelerator is not None:
        monkeypatch.setenv("DS_ACCELERATOR", accelerator)
    assert has_gpu() is used
