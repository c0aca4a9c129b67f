"""`asvr train` and `asvr export`: hand a resolved configuration to the training stage, and its outcome back."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from manifests.errors import EXIT_CODES, AsvrError, EnvironmentProblem, RecipeError, TrainingStopped
from manifests.storage import Store
from pipeline.console import plain, write_line
from pipeline.extras import needs, require
from pipeline.ranks import RankError, run_ranks

if TYPE_CHECKING:
    from train_stage.config import TrainConfig

log = logging.getLogger(__name__)

CONFIG_NAME = "config.json"
"""The resolved configuration in the run's folder, which every rank reads."""


def train(config: TrainConfig, *, phase: str | None = None, ranks: int | None = None) -> int:
    """Run the phases of `config` that are not finished and return the exit code; with `phase`, none after that one.

    Starts `ranks` processes on this machine, by default one per GPU. Where a launcher (torchrun, deepspeed, Slurm with
    its variables exported) has already set RANK and WORLD_SIZE, this process is one of its ranks and trains itself.
    Raises RecipeError for an unknown phase, EnvironmentProblem when a package or a GPU is missing, LeaseHeld when the
    run is being trained already, StorageError when its folder cannot be written.
    """
    from train_stage.checkpoint import is_finished

    config = until_phase(config, phase)
    if is_finished(config):
        log.info("%s: every phase is finished; nothing to do", config.output)
        return 0
    require("train")
    environment = rank_environment(os.environ)
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return _train_here(config, environment)
    gpus = count_gpus(environment)
    count = ranks or max(gpus, 1)
    if gpus and count > gpus:
        raise EnvironmentProblem(f"--nproc {count} is more than the {gpus} GPU(s) of this machine; give at most {gpus}")
    if not gpus:
        environment.setdefault("DS_ACCELERATOR", "cpu")
    environment.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // count)))
    _check_resumable(config, count)
    path = write_config(config)
    try:
        run_ranks([sys.executable, "-m", "train_stage", str(path)], count, environment)
    except RankError as failure:
        return explain(failure, path.parent)
    names = ", ".join(each.name for each in config.phases)
    write_line(plain(f"{names}: trained in {config.output}; asvr export {config.output} writes the model"))
    return 0


def export(run: Path, output: Path | None = None) -> Path:
    """Write the newest checkpoint of the run in `run` as a plain Hugging Face folder, by default `run/export`.

    The run may have been moved since it was trained. Raises InputError when it has no configuration or checkpoint.
    """
    from train_stage.__main__ import read_config

    output = output or run / "export"
    config = read_config(run / CONFIG_NAME).model_copy(update={"output": str(run)})
    with needs("train"):
        from transformers.utils.logging import disable_progress_bar

        from train_stage.export import export_llava
        from train_stage.trained import load_trained

        disable_progress_bar()
        trained = load_trained(config)
        export_llava(
            trained.model,
            trained.tokenizer,
            trained.geometry,
            output,
            chat_template=trained.chat_template,
            codebook_sha256=trained.codebook_sha256,
        )
    state = "its last" if trained.final else "not its last: the run is unfinished"
    log.info("phase %s, step %d (%s)", trained.phase.name, trained.step, state)
    return output


def until_phase(config: TrainConfig, phase: str | None) -> TrainConfig:
    """`config` without the phases after `phase`, which changes nothing for those that stay."""
    if phase is None:
        return config
    names = [each.name for each in config.phases]
    if phase not in names:
        raise RecipeError(f"--phase {phase}: the recipe's phases are {', '.join(names)}")
    return config.model_copy(update={"phases": config.phases[: names.index(phase) + 1]})


def _check_resumable(config: TrainConfig, ranks: int) -> None:
    """Raise TrainingStopped, before anything is started or written, where a checkpoint was made by another configuration."""
    from train_stage.checkpoint import check_fits, newest, settings_of

    for phase in config.phases:
        checkpoint = newest(config.phase_folder(phase.name))
        if checkpoint is not None:
            check_fits(checkpoint, settings_of(config, phase.name), ranks)


def write_config(config: TrainConfig) -> Path:
    """Write OUTPUT/config.json, whole or not at all, and return its path; LeaseHeld while a run is using it."""
    store = Store.open(config.output)
    with store.lease("train"):
        store.write(CONFIG_NAME, (config.model_dump_json(indent=2) + "\n").encode())
    return store.path(CONFIG_NAME)


def rank_environment(inherited: os._Environ[str] | dict[str, str]) -> dict[str, str]:
    """The environment a rank needs so that DeepSpeed finds its compiled operations, and ninja to compile one."""
    environment = dict(inherited)
    scripts = str(Path(sys.executable).parent)
    environment["PATH"] = os.pathsep.join([scripts, *filter(None, [environment.get("PATH")])])
    environment.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix) / "torch_extensions"))
    environment.setdefault("PYTHONUNBUFFERED", "1")
    return environment


def count_gpus(environment: dict[str, str]) -> int:
    """How many CUDA devices torch sees. Torch is asked, in a child, only where a driver can be found at all."""
    driver = Path("/proc/driver/nvidia").exists() or Path("/dev/dxg").exists() or shutil.which("nvidia-smi")
    if not driver or environment.get("DS_ACCELERATOR", "cuda") != "cuda":
        return 0
    question = "import torch; print(torch.cuda.device_count())"
    answer = subprocess.run(
        [sys.executable, "-c", question], env=environment, capture_output=True, text=True, check=False
    )
    if answer.returncode:
        raise EnvironmentProblem(f"torch cannot count the GPUs: {plain(answer.stderr.strip()[-200:])}")
    return int(answer.stdout)


def _train_here(config: TrainConfig, environment: dict[str, str]) -> int:
    """Be the rank that a launcher made of this process. Ranks read a copy of their own: rank 0's is for people."""
    os.environ.update(environment)
    from train_stage.__main__ import main

    if os.environ["RANK"] == "0":
        with contextlib.suppress(AsvrError):  # the ranks find it again, and stop together
            _check_resumable(config, int(os.environ["WORLD_SIZE"]))
            write_config(config)
    with tempfile.TemporaryDirectory(prefix="asvr-") as folder:
        path = Path(folder) / CONFIG_NAME
        path.write_text(config.model_dump_json(), encoding="utf-8")
        return main([str(path)])


def explain(failure: RankError, run: Path) -> int:
    """The exit code for the rank that ended the run; what ended one that could not say so itself is said here."""
    if failure.code > 0:
        return failure.code if failure.code in EXIT_CODES else 1
    if -failure.code in (signal.SIGINT, signal.SIGTERM):
        return 128 - failure.code
    name = signal.Signals(-failure.code).name
    hint = " (the machine ran out of memory, or someone ended it)" if name == "SIGKILL" else ""
    raise TrainingStopped(f"rank {failure.rank} was ended by {name}{hint}; the same command resumes from {run}")
