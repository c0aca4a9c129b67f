"""`engine: ray`: the job's connection to a Ray cluster. With `ray_pool` and `ray_actor` the only place that knows Ray.

The units are handed to a pool of plain actors by the driver itself rather than by Ray Data, whose pool (2.60) ends the
job with `ActorUnavailableError` when a node is lost; docs/design.md has the measurement.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import signal
import socket
import threading
from collections.abc import Generator, Iterator, Sequence
from typing import Any

from manifests.errors import EnvironmentProblem
from tokenize_stage.config import RayConfig
from tokenize_stage.engines.in_flight import OnRunning
from tokenize_stage.order import WorkOrder
from tokenize_stage.outcomes import UnitDone, UnitFailed
from tokenize_stage.units import Unit

_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # silences a warning about workers without a GPU
    "RAY_NUM_REDIS_GET_RETRIES": "5",  # attempts to connect, of which each may take 40 seconds; 20 are usual
}

_CLIENT = "ray://"

CLIENT_ATTEMPTS = 3
_DIED = "Initialization failure from server"

KNOCK_SECONDS = 10.0
"""How long a cluster may take to accept a connection."""


def run_on_ray(
    order: WorkOrder, units: Sequence[Unit], config: RayConfig, on_running: OnRunning
) -> Generator[UnitDone | UnitFailed, None, None]:
    """The outcomes of the units as they finish.

    Raises `EnvironmentProblem` when there is no Ray or cluster, the cluster cannot hold one worker or is lost, and
    when workers keep dying on one unit. Ray is shut down afterwards if it was started here.
    """
    with _connected(config.address):
        from tokenize_stage.engines.ray_pool import WorkerPool

        pool = WorkerPool(order, config, units)
        try:
            yield from pool.outcomes(on_running)
        except ConnectionError as error:  # of Ray Client
            raise EnvironmentProblem(
                f"the Ray cluster at {config.address} is lost ({first_line(error)}): what is committed is kept; run the "
                "same command again when the cluster is back"
            ) from error
        finally:
            pool.close()


@contextlib.contextmanager
def _connected(address: str) -> Iterator[None]:
    """Ray connected for the time of the context: as it is, to the running cluster, or newly started."""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    try:
        import ray
    except ImportError as error:
        raise EnvironmentProblem(f"engine: ray needs Ray ({error}): pip install 'asvr[tokenize]'") from error

    if ray.is_initialized():
        yield
        return
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        _connect(address)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, on_sigterm)  # ray.init put its own handler there, which exits at once
        yield
    finally:
        ray.shutdown()


def _connect(address: str) -> None:
    import ray
    from ray.exceptions import AuthenticationError

    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    where = os.environ.get("RAY_ADDRESS", "") if address == "auto" else address
    named = where not in ("", "auto", "local")
    try:
        if named:
            _knock(where)
        if where.startswith(_CLIENT):
            _need_client(where)
            _connect_client(where, quiet)
        else:
            ray.init(address=address, include_dashboard=False, **quiet)
    except (OSError, AuthenticationError) as error:  # ConnectionError is an OSError
        if not named:  # nobody named a cluster, and the one that ran here last is gone
            ray.init(address="local", include_dashboard=False, **quiet)
            return
        raise EnvironmentProblem(
            f"no Ray cluster lets us in at {where} ({first_line(error)}): correct "
            f"{'RAY_ADDRESS' if address == 'auto' else 'ray.address'}; if it asks for a token, set RAY_AUTH_MODE=token"
        ) from error
    except RuntimeError as error:
        if not str(error).startswith("Version mismatch"):
            raise
        raise EnvironmentProblem(
            f"the Ray cluster at {where or 'this machine'} is another version ({' '.join(str(error).split())}): "
            "install the same Ray and Python here and there"
        ) from error


def _connect_client(where: str, quiet: dict[str, Any]) -> None:
    """Ray's server forks a process for each client, which now and then dies at once (2 of 40, Ray 2.60): try again."""
    import ray

    for attempt in range(CLIENT_ATTEMPTS):
        try:
            ray.init(address=where, **quiet)
            break
        except ConnectionError as error:
            if _DIED not in str(error) or attempt + 1 == CLIENT_ATTEMPTS:
                raise


def _need_client(address: str) -> None:
    if importlib.util.find_spec("grpc") is None:
        raise EnvironmentProblem(
            f"ray.address {address} needs Ray Client: pip install 'ray[client]', or run the job on the cluster itself "
            "with ray job submit and ray.address: auto"
        )


def _knock(where: str) -> None:
    """Raise `OSError` if nobody listens at an address: Ray itself would try for ten minutes."""
    host, _, port = where.removeprefix(_CLIENT).rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=KNOCK_SECONDS).close()


def first_line(error: Exception) -> str:
    """The first line of an error's message, for a sentence; the last one where the first only announces it."""
    lines = (str(error).strip() or type(error).__name__).splitlines()
    return lines[-1 if lines[0].endswith(":") else 0].strip()[:200]
