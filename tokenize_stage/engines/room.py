"""How many workers of what size a Ray cluster has room for. Pure; knows nothing of Ray but how it names resources."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from manifests.errors import EnvironmentProblem
from tokenize_stage.config import Device, RayConfig

GIB = 1 << 30

Nodes = Sequence[Mapping[str, float]]
"""The resources of each live node: `CPU`, `GPU`, `memory` in bytes."""


@dataclass(frozen=True)
class WorkerSize:
    """What a worker reserves; `memory` in bytes. `decode_cores`: cores that its Ray tasks need beside all workers."""

    cpus: float
    gpus: float
    memory: int = 0
    decode_cores: int = 0

    def __str__(self) -> str:
        memory = f", {self.memory / GIB:g} GiB of memory" if self.memory else ""
        decode = f" and {self.decode_cores} core to decode" if self.decode_cores else ""
        return f"{self.cpus:g} CPUs, {self.gpus:g} GPUs{memory}{decode}"


def worker_size(config: RayConfig, nodes: Nodes) -> WorkerSize:
    """The size of a worker; a GPU each, unless told otherwise, where the cluster has any."""
    gpus = config.gpus_per_worker
    if gpus is None:
        gpus = min(1.0, sum(node.get("GPU", 0) for node in nodes))
    memory = math.ceil((config.memory_per_worker or 0) * GIB)
    return WorkerSize(config.cpus_per_worker, gpus, memory, 1 if config.decode == "cluster" else 0)


def worker_device(asked: Device, gpus: float) -> Device:
    """The device of a worker that reserves `gpus` of them, for which the job asks `asked`.

    Without a GPU of its own `auto` is the CPU: Ray leaves such a worker every GPU of its node to see, and all of them
    would compute on the first one, beside those that reserved it.
    """
    return "cpu" if asked == "auto" and not gpus else asked


def room_for(size: WorkerSize, nodes: Nodes) -> int:
    """Workers for which there is room on all nodes together: where they need that, so few that a core is left to decode
    wherever Ray puts them.
    """
    room = sum(_on_node(size, node) for node in nodes)
    if not size.decode_cores or _has_cores_to_spare(size, nodes):
        return room
    return min(room, max(0, sum(_to_fill(size, node) for node in nodes) - 1))


def workers_wanted(config: RayConfig, size: WorkerSize, nodes: Nodes, units: int) -> int:
    """How many workers there should be now, at most one a unit; 0 where no node has room for any.

    A number that the configuration gives may be larger than what there is room for: Ray keeps the others waiting for
    a node, which is how it asks an autoscaler for one. Only where workers share their cores with decode tasks it may
    not, unless some node always has cores left, since the others would take the last one of these.
    """
    room = room_for(size, nodes)
    if room == 0:
        return 0
    if config.num_workers is None:
        by_node = sum(1 for node in nodes if _on_node(size, node))
        return min(room, units) if size.gpus else min(room, by_node, units)
    waits = not size.decode_cores or _has_cores_to_spare(size, nodes)
    return min(config.num_workers if waits else min(config.num_workers, room), units)


def no_room(size: WorkerSize, nodes: Nodes) -> EnvironmentProblem:
    """The error of a cluster on which nothing can run: Ray itself would wait for ever."""
    found = "; ".join(_describe(node, size) for node in nodes) or "none"
    return EnvironmentProblem(
        f"no node of the Ray cluster has room for a worker with {size} (nodes: {found}): "
        "ask for less in ray (cpus_per_worker, gpus_per_worker, memory_per_worker), add a node, "
        "or set ray.wait_for_nodes where an autoscaler adds it"
    )


def _describe(node: Mapping[str, float], size: WorkerSize) -> str:
    memory = f", {node.get('memory', 0) / GIB:.1f} GiB" if size.memory else ""
    return f"{node.get('CPU', 0):g} CPUs, {node.get('GPU', 0):g} GPUs{memory}"


def _on_node(size: WorkerSize, node: Mapping[str, float]) -> int:
    by_resource = [math.floor(node.get("CPU", 0) / size.cpus)]
    if size.gpus:
        by_resource.append(math.floor(node.get("GPU", 0) / size.gpus))
    if size.memory:
        by_resource.append(math.floor(node.get("memory", 0) / size.memory))
    return min(by_resource)


def _to_fill(size: WorkerSize, node: Mapping[str, float]) -> int:
    """How many workers leave a node no core to decode."""
    return max(0, math.floor((node.get("CPU", 0) - size.decode_cores) / size.cpus) + 1)


def _has_cores_to_spare(size: WorkerSize, nodes: Nodes) -> bool:
    """Whether on some node GPUs or memory are used up before its cores are."""
    return any(_on_node(size, node) < _to_fill(size, node) for node in nodes)
