"""`engine: ray`: the units as rows of a Ray Data stream through a pool of worker actors. The only file with Ray in it.

The rows are materialised units, so no read task competes with the actors for cores, and a cluster just large enough
for one worker runs (Ray issue 44687 is about pipelines that read). Nothing large passes the object store: a row names
images, an outcome is a commit record.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import pickle
import signal
import threading
import warnings
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from manifests.errors import AsvrError, EnvironmentProblem
from tokenize_stage.config import RayConfig
from tokenize_stage.outcomes import UnitDone, UnitFailed
from tokenize_stage.units import Unit
from tokenize_stage.worker import Worker, WorkOrder

TASK_RETRIES = 3
"""How often a unit is begun again because its worker died; a unit that kills every worker must end the job."""

_QUIET = {
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",  # the job has its own progress line
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # silences a warning about workers without a GPU
    "RAY_DATA_LOG_LEVEL": "CRITICAL",
    "RAY_BACKEND_LOG_LEVEL": "fatal",  # what goes wrong comes as an exception too
}

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pool:
    """How many workers of what size."""

    workers: int
    cpus: float
    gpus: float


class UnitActor:
    """A worker as Ray Data calls it: a table with one pickled unit in, a table with one pickled outcome out.

    An error the user can repair travels as a value, so that it arrives as itself; a bug is raised here and
    stops the job.
    """

    def __init__(self, order: WorkOrder) -> None:
        self._worker = Worker(order)

    def __call__(self, rows: pa.Table) -> pa.Table:
        outcomes = []
        for pickled in rows["unit"].to_pylist():
            try:
                outcome: UnitDone | UnitFailed | AsvrError = self._worker.tokenize(pickle.loads(pickled))  # noqa: S301
            except AsvrError as error:
                outcome = error
            outcomes.append(pickle.dumps(outcome))
        return pa.table({"outcome": pa.array(outcomes, pa.binary())})


def run_on_ray(
    order: WorkOrder, units: Sequence[Unit], config: RayConfig
) -> Generator[UnitDone | UnitFailed, None, None]:
    """The outcomes of the units as they finish.

    Raises `EnvironmentProblem` when there is no Ray or cluster, or the cluster cannot hold one worker, and when
    workers keep dying on one unit. Ray is shut down afterwards if it was started here.
    """
    with _connected(config.address):
        import ray
        from ray.exceptions import NodeDiedError, OutOfMemoryError, RayActorError, WorkerCrashedError

        pool = plan_pool(config, [node["Resources"] for node in ray.nodes() if node["Alive"]], len(units))
        _log.info("%d Ray workers with %g CPUs and %g GPUs each", pool.workers, pool.cpus, pool.gpus)
        try:
            for table in _outcome_tables(order, units, pool):
                for pickled in table["outcome"].to_pylist():
                    outcome = pickle.loads(pickled)  # noqa: S301 - written by our own actor a moment ago
                    if isinstance(outcome, AsvrError):
                        raise outcome
                    yield outcome
        except (NodeDiedError, OutOfMemoryError, RayActorError, WorkerCrashedError) as error:
            raise EnvironmentProblem(
                f"a Ray worker died {TASK_RETRIES + 1} times on one unit ({_first_line(error)}): "
                "give it more memory or a smaller batch_size, and look into the logs of Ray"
            ) from error


def plan_pool(config: RayConfig, nodes: Sequence[Mapping[str, float]], units: int) -> Pool:
    """The actor pool for a cluster whose nodes have these resources (`CPU`, `GPU`); pure.

    Raises `EnvironmentProblem` when no node has room for a worker: Ray would wait for ever.
    """
    cpus = config.cpus_per_worker
    cluster_gpus = sum(node.get("GPU", 0) for node in nodes)
    gpus = config.gpus_per_worker if config.gpus_per_worker is not None else min(1.0, cluster_gpus)
    room = [_workers_on(node, cpus, gpus) for node in nodes]
    if not any(room):
        found = ", ".join(f"{node.get('CPU', 0):g} CPUs and {node.get('GPU', 0):g} GPUs" for node in nodes) or "none"
        raise EnvironmentProblem(
            f"no node of the Ray cluster has room for a worker with {cpus:g} CPUs and {gpus:g} GPUs "
            f"(nodes: {found}): lower ray.cpus_per_worker or ray.gpus_per_worker, or add a node"
        )
    default = sum(room) if gpus else sum(1 for workers in room if workers)
    workers = config.num_workers or default
    if workers > sum(room):
        _log.warning("the Ray cluster has room for %d of %d workers", sum(room), workers)
    return Pool(max(1, min(workers, sum(room), units)), cpus, gpus)


def _workers_on(node: Mapping[str, float], cpus: float, gpus: float) -> int:
    by_cpu = math.floor(node.get("CPU", 0) / cpus)
    return min(by_cpu, math.floor(node.get("GPU", 0) / gpus)) if gpus else by_cpu


def _outcome_tables(order: WorkOrder, units: Sequence[Unit], pool: Pool) -> Iterator[pa.Table]:
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    rows = ray.data.from_items([{"unit": pickle.dumps(unit)} for unit in units], override_num_blocks=len(units))
    with warnings.catch_warnings():
        # Deprecated since Ray 2.60, but the one way to bound the retries of a unit that kills its worker.
        warnings.filterwarnings("ignore", message="`ray_remote_args_fn` is deprecated")
        outcomes = rows.map_batches(
            UnitActor,
            fn_constructor_args=(order,),
            batch_size=1,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=pool.workers, initial_size=pool.workers),
            num_cpus=pool.cpus,
            num_gpus=pool.gpus,
            ray_remote_args_fn=_actor_options,
        )
    yield from outcomes.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)


def _actor_options() -> dict[str, Any]:
    return {"max_task_retries": TASK_RETRIES}


@contextlib.contextmanager
def _connected(address: str) -> Iterator[None]:
    """Ray connected for the time of the context: as it is, to the running cluster, or newly started."""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise EnvironmentProblem(f"engine: ray needs Ray ({error}): pip install 'asvr[tokenize]'") from error

    if ray.is_initialized():
        yield
        return
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "include_dashboard": False}
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        try:
            ray.init(address=address, **quiet)
        except ConnectionError as error:
            if address != "auto":
                raise EnvironmentProblem(
                    f"no Ray cluster answers at {address} ({_first_line(error)}): correct ray.address, or use local"
                ) from error
            ray.init(address="local", **quiet)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, on_sigterm)  # ray.init put its own handler there, which exits at once
        yield
    finally:
        ray.shutdown()


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
