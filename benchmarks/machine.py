"""What a measurement was made with, and how much memory a piece of work took."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from datetime import UTC, datetime
from pathlib import Path

import torch


def describe(device: torch.device) -> str:
    """Machine, versions, command, date and load: the head of every table."""
    lines = [
        f"date      {datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        f"machine   {_cpu_name()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads used, "
        f"load {os.getloadavg()[0]:.1f} before the start",
        f"versions  Python {platform.python_version()}, torch {torch.__version__}",
        f"command   {' '.join(['python', '-m', _module(), *sys.argv[1:]])}",
    ]
    if device.type == "cuda":
        lines.insert(2, f"GPU       {torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}")
    return "\n".join(lines)


class PeakMemory:
    """`with PeakMemory(device) as peak: ...; peak.bytes`: the most that was held beyond what was there before.

    On a CPU by the kernel's count of resident pages (Linux), on a GPU by torch's of allocated bytes.
    """

    def __init__(self, device: torch.device) -> None:
        self.bytes = 0
        self._device = device

    def __enter__(self) -> PeakMemory:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before = torch.cuda.memory_allocated(self._device)
        else:
            ctypes.CDLL(None).malloc_trim(0)  # else freed memory that is reused would not show
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak starts anew
            self._before = _status("VmRSS")
        return self

    def __exit__(self, *_: object) -> None:
        peak = torch.cuda.max_memory_allocated(self._device) if self._device.type == "cuda" else _status("VmHWM")
        self.bytes = peak - self._before


def held_memory(device: torch.device) -> int:
    """Bytes that are held now: allocated by torch on a GPU, resident on a CPU."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else _status("VmRSS")


def synchronise(device: torch.device) -> None:
    """Wait for a GPU's queue."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _status(field: str) -> int:
    text = Path("/proc/self/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith(f"{field}:"))


def _cpu_name() -> str:
    text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    names = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _module() -> str:
    return f"benchmarks.{Path(sys.argv[0]).stem}"
