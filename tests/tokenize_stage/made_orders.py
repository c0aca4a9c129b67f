"""Work orders and units for tests of the worker, on the tiny tokenizer of `made_jobs`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from made_jobs import job_config

from manifests.fingerprint import fingerprint
from manifests.images import ImageSource
from tokenize_stage.identity import fingerprint_keys, identify
from tokenize_stage.order import WorkOrder
from tokenize_stage.outcomes import UnitDone
from tokenize_stage.sources import take_inventory
from tokenize_stage.units import Unit, plan_units
from tokenize_stage.worker import Worker


def order_of(root: Path, codebook: Path, output: Path, **changes: Any) -> WorkOrder:
    """What a worker is told; batches of 4. `geometry` is a `GeometryConfig`."""
    config = job_config(root, codebook, output)
    geometry = changes.pop("geometry", config.geometry).resolve()
    spec = identify(config.tokenizer, geometry).spec
    values: dict[str, Any] = {
        "output": str(output),
        "images": ImageSource(str(root)),
        "geometry": geometry,
        "tokenizer": config.tokenizer,
        "spec": spec,
        "fingerprint": fingerprint(fingerprint_keys(spec, geometry, "float32")),
        "dtype": "float32",
        "device": "cpu",
        "batch_size": 4,
        "torch_threads": 1,
        "decode_threads": 2,
        "max_pixels": config.max_pixels,
    }
    return WorkOrder(**{**values, **changes})


def units_of(root: Path, codebook: Path, size: int = 100) -> list[Unit]:
    """The units of a folder."""
    return list(plan_units(take_inventory(job_config(root, codebook, root).source).table, [], size).units)


def tokenize(order: WorkOrder, unit: Unit) -> UnitDone:
    """A unit through a worker of its own."""
    worker = Worker(order)
    try:
        outcome = worker.tokenize(unit)
    finally:
        worker.close()
    assert isinstance(outcome, UnitDone)
    return outcome
