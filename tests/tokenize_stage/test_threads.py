"""Threads that nothing can interrupt: closing waits for them a moment, and says nothing of those that go on."""

from __future__ import annotations

import threading
import time

from tokenize_stage.threads import STOP_SECONDS, DaemonThreads, still_working


def test_closing_does_not_wait_for_ever() -> None:
    hold, begun = threading.Event(), threading.Semaphore(0)

    def work() -> bool:
        begun.release()
        return hold.wait()

    threads = DaemonThreads(2, "work")
    futures = [threads.submit(work) for _ in range(3)]
    for _ in range(2):
        begun.acquire()
    began = time.monotonic()
    threads.close()
    assert STOP_SECONDS <= time.monotonic() - began < 2 * STOP_SECONDS
    assert still_working()
    assert futures[2].cancelled()
    hold.set()
    assert [future.result(5) for future in futures[:2]] == [True, True]
    deadline = time.monotonic() + 5
    while still_working():
        assert time.monotonic() < deadline
        time.sleep(0.01)
