"""Threads that nothing can interrupt: closing waits for them a moment, and says nothing of those that go on."""

from __future__ import annotations

import sys
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


def test_closing_while_the_last_work_is_being_taken() -> None:
    """The threads take work as fast as the closing drops it: whoever comes second finds nothing, and goes on."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(300):
            threads = DaemonThreads(4, "work")
            for _ in range(50):
                threads.submit(int)
            closing = threading.Thread(target=threads.close, daemon=True)
            closing.start()
            closing.join(10)
            assert not closing.is_alive()
    finally:
        sys.setswitchinterval(interval)
