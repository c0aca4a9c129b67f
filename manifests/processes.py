"""Which process of which host somebody is, so that the death of one can be told without asking another machine's clock."""

from __future__ import annotations

import os
from pathlib import Path


def this_process() -> str:
    """A name that no other process has or will have: the host's boot, its namespace, its number, its start."""
    return _name(os.getpid()) or ""


def is_dead(name: str) -> bool:
    """Whether the process called `name` is one of this very host and gone. False when that cannot be told."""
    boot, namespace, pid, _ = (*name.split(" "), "", "", "", "")[:4]
    mine = this_process().split(" ")
    return bool(name) and pid.isdecimal() and [boot, namespace] == mine[:2] and _name(int(pid)) != name


def _name(pid: int) -> str | None:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = str(Path("/proc/self/ns/pid").readlink())
        # The name of the program, in parentheses, may hold anything; the state is the first field after it.
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else f"{boot} {namespace} {pid} {fields[18]}"
