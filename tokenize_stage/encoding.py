"""The encoder of a worker: its tokenizer, loaded for the first batch, and the one thread that runs it."""

from __future__ import annotations

import os
import threading
import time
from concurrent.futures import Future
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from manifests.schema import Numerics
from tokenize_stage.device_memory import enough_memory
from tokenize_stage.order import WorkOrder
from tokenize_stage.threads import DaemonThreads

if TYPE_CHECKING:
    from tokenize_stage.tokenizers.base import Tokenizer


class Encoded(NamedTuple):
    """Values of a batch as they are stored (bfloat16 as uint16 bits) or int32 codes, (B, L) on the host.

    `began`: when, by `time.monotonic`; `idle`: the seconds that the encoder had stood still, None for its first batch.
    """

    values_BL: npt.NDArray[Any]
    began: float
    idle: float | None


class Encoder:
    """Encodes batches, one at a time. A unit holds `turn` while it hands in its batches.

    All arithmetic runs in one thread, whichever thread hands in: a second one would have CPU threads of its own.
    """

    def __init__(self, order: WorkOrder) -> None:
        self.turn = threading.Lock()
        self._order = order
        self._thread = DaemonThreads(1, "encode")
        self._tokenizer: Tokenizer | None = None
        self._ended: float | None = None

    def begin(self, views_BSS3: npt.NDArray[np.uint8]) -> Future[Encoded]:
        """Begin a batch, which must not be written to until it is done.

        Its errors are `EnvironmentProblem` when the device is out of memory and what loading a tokenizer raises.
        """
        return self._thread.submit(lambda: self._encode(views_BSS3))

    def close(self) -> None:
        """Drop what has not begun, and wait a little for the batch that is being encoded."""
        self._thread.close()

    def numerics(self) -> Numerics:
        """What the arithmetic ran on."""
        order = self._order
        return Numerics(
            device=device_name(order), torch=version("torch"), dtype=order.dtype, batch_size=order.batch_size
        )

    def peak_memory(self) -> int:
        """The most bytes held on the device so far, 0 on a CPU."""
        if self._tokenizer is None:
            return 0
        import torch

        return torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else 0

    def _encode(self, views_BSS3: npt.NDArray[np.uint8]) -> Encoded:
        import torch

        began = time.monotonic()
        idle = None if self._ended is None else began - self._ended
        with enough_memory(self._order.batch_size):
            if self._tokenizer is None:
                self._tokenizer = self._load_tokenizer()
            values = self._tokenizer.encode(torch.from_numpy(views_BSS3))
            if values.dtype == torch.bfloat16:
                values = values.view(torch.uint16)
            values_BL: npt.NDArray[Any] = values.cpu().numpy().reshape(len(views_BSS3), -1)
        self._ended = time.monotonic()
        return Encoded(values_BL, began, idle)

    def _load_tokenizer(self) -> Tokenizer:
        import torch

        from tokenize_stage.tokenizers import load

        order = self._order
        torch.set_num_threads(order.torch_threads)  # the same in every worker, so that sums are split the same way
        return load(order.tokenizer, order.spec, dtype=order.dtype, device=order.device)


def device_name(order: WorkOrder) -> str:
    """The device of a worker as the numerics record names it."""
    import torch

    if order.device == "cuda" or (order.device == "auto" and torch.cuda.is_available()):
        return torch.cuda.get_device_name()
    return f"{os.uname().machine} cpu, {order.torch_threads} threads"
