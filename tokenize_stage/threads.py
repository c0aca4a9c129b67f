"""Threads for work that nothing can interrupt, such as a batch that takes a CPU minutes."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

STOP_SECONDS = 2.0
"""How long a stopping job waits for such work. Nothing of it would be kept."""

T = TypeVar("T")


class _Thread(threading.Thread):
    pass


def still_working() -> bool:
    """Whether a thread of a pool is alive. An interpreter that exits then is aborted by the C++ under that thread."""
    return any(isinstance(thread, _Thread) for thread in threading.enumerate())


class DaemonThreads:
    """A pool whose threads do not keep the process alive, as those of `concurrent.futures` do."""

    def __init__(self, count: int, name: str) -> None:
        self._work: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        self._threads = [_Thread(target=self._run, name=name, daemon=True) for _ in range(count)]
        for thread in self._threads:
            thread.start()

    def submit(self, call: Callable[[], T]) -> Future[T]:
        """Call it as soon as a thread is free."""
        future: Future[T] = Future()
        self._work.put((future, call))
        return future

    def close(self) -> None:
        """Take no more work, drop what has not begun, and wait `STOP_SECONDS` for the rest."""
        with contextlib.suppress(Empty):  # as soon as there is nothing left, whoever took the last of it
            while True:
                if item := self._work.get_nowait():
                    item[0].cancel()
        for _ in self._threads:
            self._work.put(None)
        deadline = time.monotonic() + STOP_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _run(self) -> None:
        while item := self._work.get():
            future, call = item
            if not future.set_running_or_notify_cancel():
                continue
            try:
                result = call()
            except BaseException as error:  # noqa: BLE001 - whatever it is belongs to whoever waits for it
                future.set_exception(error)
            else:
                future.set_result(result)
