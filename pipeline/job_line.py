"""How a tokenize job's progress reads: on its own progress line, and in `asvr status` from another terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.progress import ProgressLine, duration

if TYPE_CHECKING:
    from manifests.live import JobProgress
    from manifests.report import StatusReport


def show_job(line: ProgressLine, now: JobProgress) -> None:
    """Update a line, with `partial(show_job, line)` as the job's listener."""
    line.update(now.done, now.total, now.rejected, rate=now.rate, notes=worker_notes(now))


def worker_notes(now: JobProgress) -> list[str]:
    """'8 workers at 120.0/s (slowest 96.1)' and '12% waiting', as far as they are known."""
    notes = []
    if now.workers > 1:
        notes.append(f"{now.workers} workers")
        if now.by_worker:
            mean, slowest = sum(now.by_worker.values()) / len(now.by_worker), min(now.by_worker.values())
            notes[0] += f" at {mean:,.1f}/s (slowest {slowest:,.1f})"
    if now.by_worker:
        notes.append(f"{100 * now.wait_share:.0f}% waiting")
    return notes


def live_rows(report: StatusReport) -> list[tuple[str, object]]:
    """Who holds the lease and what that job says of itself, or what one that stopped had committed."""
    rows: list[tuple[str, object]] = [("owner", report.owner)] if report.owner else []
    now = report.progress
    if now is None or report.progress_age is None:
        return rows
    share = f" ({100 * now.done // now.total}%)" if now.total else ""
    committed = "" if report.owner else " committed"
    parts = [f"{now.done:,}/{now.total:,} images{share}{committed}", f"{now.units_done:,}/{now.units_total:,} units"]
    if now.rate:
        parts.append(f"{now.rate:,.1f} images/s")
    parts += [*worker_notes(now), f"{now.rejected:,} rejected"]
    if now.eta is not None:
        parts.append(f"ETA {duration(now.eta)}")
    heard = "" if report.owner else "the job stopped, last heard of "
    rows.append(("progress", f"{', '.join(parts)}; {heard}{duration(report.progress_age)} ago"))
    return rows
