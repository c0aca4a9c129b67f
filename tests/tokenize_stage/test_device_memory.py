"""A GPU that is full ends every command that encodes in one sentence, and what was committed stays.

No test machine has a GPU to fill: a real encoder raises what torch raises there, for batches above a size.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from made_jobs import VIEW, job_config
from made_orders import order_of, units_of
from torch.nn.modules.module import register_module_forward_pre_hook

from manifests.errors import AsvrError, EnvironmentProblem
from manifests.storage import Store
from tokenize_stage.config import CodebookConfig
from tokenize_stage.fit import fit_codebook
from tokenize_stage.job import run_job
from tokenize_stage.outcomes import UnitDone, UnitFailed
from tokenize_stage.recompute import recompute
from tokenize_stage.units import Unit

SENTENCE = re.compile(
    r"the device has too little memory for the tokenizer and a batch of 4 views: "
    r"lower batch_size, or use a GPU with more memory"
)


@contextmanager
def room_for(views: int) -> Iterator[None]:
    """Inside it a model cannot be run on more views at once. Loading a tokenizer runs it on one."""

    def refuse(module: torch.nn.Module, arguments: tuple[Any, ...]) -> None:
        if isinstance(module, torch.nn.Conv2d) and len(arguments[0]) > views:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee the documentation")

    handle = register_module_forward_pre_hook(refuse)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def one_sentence() -> Iterator[None]:
    with pytest.raises(EnvironmentProblem) as caught:
        yield
    assert SENTENCE.fullmatch(str(caught.value))
    assert caught.value.exit_code == 9


@pytest.mark.parametrize("views", [0, 1])
def test_a_job_here(pictures: Path, codebook: Path, tmp_path: Path, views: int) -> None:
    config = job_config(pictures, codebook, tmp_path / "out")
    with room_for(views), one_sentence():
        run_job(config)
    assert run_job(config).encoded == 20


@pytest.mark.usefixtures("ray_cluster")
def test_a_worker_of_ray(pictures: Path, codebook: Path, tmp_path: Path) -> None:
    import ray

    from tokenize_stage.engines.ray_actor import UnitActor

    class FullActor(UnitActor):
        def tokenize(self, unit: Unit) -> UnitDone | UnitFailed | AsvrError:
            with room_for(1):
                return super().tokenize(unit)

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # which Ray's workers cannot import
    actor = ray.remote(FullActor).remote(order_of(pictures, codebook, tmp_path / "out"), "local")
    [unit] = units_of(pictures, codebook)
    assert ray.get(actor.start.remote()) is None
    answer = ray.get(actor.tokenize.remote(unit))
    ray.kill(actor)
    assert isinstance(answer, EnvironmentProblem)  # which the pool raises
    assert SENTENCE.fullmatch(str(answer))


@pytest.mark.parametrize("views", [0, 1])
def test_recomputing_and_fitting(pictures: Path, codebook: Path, tmp_path: Path, views: int) -> None:
    run_job(job_config(pictures, codebook, tmp_path / "out"))
    with room_for(views), one_sentence():
        recompute(Store.open(tmp_path / "out"), 10)
    fit = {
        "source": {"kind": "folder", "path": pictures},
        "geometry": {"mode": "pad", "size": VIEW},
        "encoder": {"path": str(codebook.parent / "encoder"), "layer": 1},
        "output": tmp_path / "fitted",
        "depth": 2, "size": 16, "iterations": 2, "minibatch": 20, "batch_size": 4, "device": "cpu",
    }  # fmt: skip
    with room_for(views), one_sentence():
        fit_codebook(CodebookConfig.model_validate(fit))
    assert not (tmp_path / "fitted").exists()
