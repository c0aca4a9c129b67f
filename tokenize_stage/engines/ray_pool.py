"""The driver's side of `engine: ray`: which actor works on which unit, and what happens when one is lost.

Every actor has a unit in hand and the next one with it. A lost actor's units go back to the front of the queue, and a new
actor takes its place wherever there is room. Nothing large passes the object store: a unit names images, an outcome is
a commit record.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import ray
from ray.exceptions import (
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RuntimeEnvSetupError,
    WorkerCrashedError,
)

from manifests.errors import AsvrError, EnvironmentProblem
from tokenize_stage.config import RayConfig
from tokenize_stage.engines.in_flight import Counts, OnRunning, Running
from tokenize_stage.engines.ray import first_line
from tokenize_stage.engines.ray_actor import UnitActor
from tokenize_stage.engines.room import WorkerSize, no_room, room_for, worker_device, worker_size, workers_wanted
from tokenize_stage.order import WorkOrder
from tokenize_stage.outcomes import UnitDone, UnitFailed
from tokenize_stage.units import Unit
from tokenize_stage.worker import UNITS_AT_ONCE

UNIT_RETRIES = 3
"""How often a unit is begun again because its worker died; a unit that kills every worker must end the job."""

TELL_SECONDS = 1.0
LOOK_SECONDS = 5.0
"""How often the driver asks the cluster for its nodes."""

CROWDED_SECONDS = 15.0
"""How long workers may hold every core that decode tasks need: as long as Ray takes to notice that more of them are gone."""

PATIENCE_SECONDS = 30.0
"""How often it says that no worker has started, because others use the cluster."""

_LOST = (RayActorError, ObjectLostError, OutOfMemoryError, WorkerCrashedError)
"""What Ray raises for a call whose process or node is gone."""

_log = logging.getLogger(__name__)

Outcome = UnitDone | UnitFailed


@dataclass
class Member:
    """An actor of the pool and the calls it owes an answer."""

    actor: Any
    starting: Any  # until it has started
    units: dict[Any, Unit] = field(default_factory=dict)
    asked: Any = None  # how far it is
    counts: dict[str, Counts] = field(default_factory=dict)

    @property
    def calls(self) -> list[Any]:
        return [call for call in (self.starting, self.asked, *self.units) if call is not None]


class Queue:
    """The units nobody works on: those given back first, then the others, each made only when it is asked for."""

    def __init__(self, units: Sequence[Unit]) -> None:
        self._untouched, self._left = iter(units), len(units)
        self._returned: deque[Unit] = deque()

    def __len__(self) -> int:
        return self._left + len(self._returned)

    def pop(self) -> Unit:
        if self._returned:
            return self._returned.popleft()
        self._left -= 1
        return next(self._untouched)

    def give_back(self, unit: Unit) -> None:
        self._returned.appendleft(unit)


class WorkerPool:
    """Actors at work on the units of a job."""

    def __init__(self, order: WorkOrder, config: RayConfig, units: Sequence[Unit]) -> None:
        self._order, self._config = order, config
        self._waiting = Queue(units)
        self._members: list[Member] = []
        self._attempts: Counter[str] = Counter()
        self._failed_starts = 0
        self._size: WorkerSize | None = None
        self._shared_order: Any = None  # in Ray, once it is known what a worker reserves
        self._looked = self._told = self._patient = float("-inf")
        self._roomless_since: float | None = None
        self._crowded_since: float | None = None

    def outcomes(self, on_running: OnRunning) -> Generator[Outcome, None, None]:
        """The outcomes of the units as they come. Raises what `run_on_ray` says."""
        while len(self._waiting) or any(member.units for member in self._members):
            self._grow()
            self._hand_out()
            yield from self._answers()
            self._tell(on_running)

    def close(self) -> None:
        """Stop the actors, whatever they are doing."""
        for member in self._members if ray.is_initialized() else ():  # else `ray.kill` would start a Ray of its own
            ray.kill(member.actor)
        self._members.clear()

    def _grow(self) -> None:
        """Start the actors for which there is room now."""
        now = time.monotonic()
        if now - self._looked < LOOK_SECONDS:
            return
        self._looked = now
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        if self._size is None:
            self._size = worker_size(self._config, nodes)
            device = worker_device(self._order.device, self._size.gpus)
            self._shared_order = ray.put(replace(self._order, device=device))
        undone = len(self._waiting) + sum(len(member.units) for member in self._members)
        wanted = workers_wanted(self._config, self._size, nodes, undone)
        started = any(member.starting is None for member in self._members)
        self._have_patience(now, roomless=wanted == 0 and not started, started=started, nodes=nodes)
        missing = wanted - len(self._members)
        for member in [member for member in self._members if member.starting is not None][: max(0, -missing)]:
            self._remove(member)  # the node it waits for was lost
        if missing > 0:
            _log.info("%d Ray workers with %s each", wanted, self._size)
            self._members += [self._new_member(self._size) for _ in range(missing)]
        if self._size.decode_cores:
            self._leave_cores(now, room_for(self._size, nodes))

    def _leave_cores(self, now: float, room: int) -> None:
        """Stop workers where a node was lost and they hold every core of the others: decode tasks would wait for ever."""
        crowd = [member for member in self._members if member.starting is None][room:]
        self._crowded_since = (self._crowded_since or now) if crowd else None
        if self._crowded_since is None or now - self._crowded_since < CROWDED_SECONDS:
            return
        _log.warning("%d Ray workers are stopped: with a node lost no core was left to decode", len(crowd))
        for member in crowd:
            self._remove(member)
            for unit in reversed(member.units.values()):
                self._waiting.give_back(unit)

    def _have_patience(self, now: float, *, roomless: bool, started: bool, nodes: list[Any]) -> None:
        """Give up, or say what the job is waiting for."""
        assert self._size is not None  # noqa: S101 - for the type checker
        if not roomless:
            self._roomless_since = None
        elif self._roomless_since is None:
            self._roomless_since = now
        if roomless and now - (self._roomless_since or now) >= self._config.wait_for_nodes:
            raise no_room(self._size, nodes)
        if started:
            self._patient = now
        elif self._patient == float("-inf"):
            self._patient = now - (PATIENCE_SECONDS if roomless else 0)
        if not started and now - self._patient >= PATIENCE_SECONDS:
            self._patient = now
            free = ray.available_resources()
            _log.warning(
                "waiting for room for a Ray worker with %s: %d nodes, %g CPUs and %g GPUs are free",
                self._size, len(nodes), free.get("CPU", 0), free.get("GPU", 0),
            )  # fmt: skip

    def _new_member(self, size: WorkerSize) -> Member:
        actor = (
            ray.remote(UnitActor)
            .options(
                num_cpus=size.cpus,
                num_gpus=size.gpus,
                memory=size.memory or None,
                max_restarts=0,
                max_task_retries=0,
                max_concurrency=UNITS_AT_ONCE + 1,
            )
            .remote(self._shared_order, self._config.decode)
        )
        return Member(actor, actor.start.remote())

    def _hand_out(self) -> None:
        """Give every started actor a unit, and a second one where that leaves one for each actor that has none."""
        ready = [member for member in self._members if member.starting is None]
        for level in range(UNITS_AT_ONCE):
            without = sum(1 for member in self._members if not member.units) if level else 0
            for member in ready:
                if len(member.units) == level and len(self._waiting) > without:
                    unit = self._waiting.pop()
                    member.units[member.actor.tokenize.remote(unit)] = unit

    def _answers(self) -> Generator[Outcome, None, None]:
        """Wait a moment for the actors, and take what they have."""
        calls = {call: member for member in self._members for call in member.calls}
        if not calls:
            time.sleep(TELL_SECONDS)
            return
        answered, _ = ray.wait(list(calls), num_returns=1, timeout=TELL_SECONDS)
        for call in answered:
            member = calls[call]
            if member in self._members:  # else it was lost a moment ago
                yield from self._take(member, call)

    def _take(self, member: Member, call: Any) -> Generator[Outcome, None, None]:
        try:
            answer = ray.get(call)
        except _LOST as error:
            self._lose(member, error)
            return
        except RuntimeEnvSetupError as error:
            raise EnvironmentProblem(
                f"Ray cannot set up a worker ({first_line(error)}): correct the job's runtime_env"
            ) from error
        if isinstance(answer, AsvrError):
            raise answer
        if call == member.starting:
            member.starting = None
            self._failed_starts = 0
        elif call == member.asked:
            member.asked, member.counts = None, answer
        else:
            unit = member.units.pop(call)
            member.counts.pop(unit.name, None)
            yield answer

    def _lose(self, member: Member, error: Exception) -> None:
        """The actor is gone: its units are begun again, unless one of them was too often."""
        self._remove(member)
        if member.starting is not None:
            self._failed_starts += 1
            if self._failed_starts > UNIT_RETRIES or "creation task" in str(error):
                raise EnvironmentProblem(
                    f"no Ray worker can start ({_last_line(error)}): install the same asvr on every node of the "
                    "cluster, or give ray job submit its folder as --working-dir"
                ) from error
        for unit in reversed(member.units.values()):
            self._attempts[unit.name] += 1
            if self._attempts[unit.name] > UNIT_RETRIES:
                raise EnvironmentProblem(
                    f"a Ray worker died {UNIT_RETRIES + 1} times on unit {unit.name} ({first_line(error)}): "
                    "give it more memory or a smaller batch_size, and look into the logs of Ray"
                ) from error
            self._waiting.give_back(unit)
        names = ", ".join(unit.name for unit in member.units.values()) or "none"
        _log.warning("a Ray worker was lost (%s); units begun again: %s", first_line(error), names)

    def _remove(self, member: Member) -> None:
        self._members.remove(member)
        ray.kill(member.actor)
        self._looked = float("-inf")  # look for room for another at once

    def _tell(self, on_running: OnRunning) -> None:
        now = time.monotonic()
        if now - self._told < TELL_SECONDS:
            return
        self._told = now
        started = [member for member in self._members if member.starting is None]
        for member in started:
            if member.asked is None and member.units:
                member.asked = member.actor.counts.remote()
        on_running(Running(len(started), {name: at for member in started for name, at in member.counts.items()}))


def _last_line(error: Exception) -> str:
    """Where a traceback has the reason."""
    return (str(error).strip() or type(error).__name__).splitlines()[-1].strip()[:200]
