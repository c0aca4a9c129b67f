"""A device whose memory is full ends the command in one sentence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from manifests.errors import EnvironmentProblem


@contextmanager
def enough_memory(views: int) -> Iterator[None]:
    """For loading a model and running it on `views` views at once: what torch says of a full device becomes an
    `EnvironmentProblem`.
    """
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise EnvironmentProblem(
            f"the device has too little memory for the tokenizer and a batch of {views} views: "
            "lower batch_size, or use a GPU with more memory"
        ) from error
