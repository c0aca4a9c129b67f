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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from manifests.atomic import storage_errors
from manifests.errors import EXIT_CODES, AsvrError, EnvironmentProblem, RankLost, RecipeError, TrainingStopped
from manifests.local_store import LocalStore
from pipeline.console import plain, write_line
from pipeline.extras import needs, require
from pipeline.launchers import Launcher, find_program
from pipeline.ranks import RankError, run_program, run_ranks
from train_stage.config import CONFIG_NAME, TrainConfig, config_bytes

log = logging.getLogger(__name__)

HERE = Launcher()


@dataclass(frozen=True)
class Limits:
    """Where this call ends although there is more to do: after so many steps, or so many minutes after its start."""

    max_steps: int | None = None
    minutes: float | None = None

    def options(self) -> list[str]:
        """The same, as options of `asvr train` and of `python -m train_stage`."""
        steps = [] if self.max_steps is None else ["--max-steps", str(self.max_steps)]
        return [*steps, *([] if self.minutes is None else ["--time-limit", str(self.minutes)])]


UNLIMITED = Limits()


def train(
    config: TrainConfig,
    *,
    phase: str | None = None,
    launcher: Launcher = HERE,
    asvr: Sequence[str] = (),
    limits: Limits = UNLIMITED,
    dry_run: bool = False,
) -> int:
    """Run the phases of `config` that are not finished and return the exit code; with `phase`, none after that one.

    A run that one of the `limits` ends is saved. The ranks are started by `launcher`; `asvr` are the arguments, with
    the same limits, of the command by which another program starts one. Where a launcher has already set RANK and
    WORLD_SIZE, this process is one of its ranks and trains itself. With `dry_run` the command is printed, and nothing
    is started or written.
    Raises RecipeError for an unknown phase, EnvironmentProblem when a package, program or GPU is missing, LeaseHeld when
    the run is being trained already, StorageError when its folder cannot be written.
    """
    from train_stage.__main__ import WATCHED
    from train_stage.checkpoint import is_finished

    config = until_phase(config, phase)
    if is_finished(config):
        log.info("%s: every phase is finished; nothing to do", config.output)
        return 0
    require("train")
    environment = rank_environment(os.environ)
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return _train_here(config, environment, limits)
    gpus = count_gpus(environment)
    if launcher.program != "slurm":  # whose nodes are others than this one
        if not gpus:
            environment.setdefault("DS_ACCELERATOR", "cpu")
        share = len(os.sched_getaffinity(0)) // launcher.ranks_here(gpus)
        environment.setdefault("OMP_NUM_THREADS", str(max(1, share)))
    if dry_run:
        for line in launcher.lines(asvr, gpus=gpus, environment=environment):
            write_line(plain(line))
        return 0
    _check_resumable(config)
    if launcher.program == "local":
        write_config(config)
        try:
            with _own_copy(config) as path:
                command = [sys.executable, "-m", "train_stage", str(path), *limits.options()]
                run_ranks(command, launcher.ranks_here(gpus), environment | {WATCHED: "1"})
        except RankError as failure:
            return explain(failure, Path(config.output))
    else:
        program, *rest = launcher.command(asvr, gpus=gpus, environment=environment)
        code = run_program([find_program(program, environment), *rest], environment)
        if code:
            return _explain_program(program, code, config)
    if not is_finished(config):
        write_line(plain(f"{config.output}: stopped after --max-steps {limits.max_steps}; the same command goes on"))
        return 0
    names = ", ".join(each.name for each in config.phases)
    write_line(plain(f"{names}: trained in {config.output}; asvr export {config.output} writes the model"))
    return 0


def arguments(
    recipe: Path, overrides: Sequence[str] = (), phase: str | None = None, limits: Limits = UNLIMITED
) -> list[str]:
    """The arguments by which another program starts `asvr train` as a rank, in whatever folder."""
    given = [part for override in overrides for part in ("--set", override)]
    return ["train", str(recipe.absolute()), *given, *(["--phase", phase] if phase else []), *limits.options()]


def _explain_program(program: str, code: int, config: TrainConfig) -> int:
    """The exit code for a launcher that failed. Some hand on that of a rank, which has said why; torchrun says 1 always."""
    if code < 0:
        return explain(RankError(0, code), Path(config.output))
    if code != 1 and code in EXIT_CODES:
        return code
    raise TrainingStopped(
        f"{program} ended with exit code {code}, and what its ranks said stands above; the same command resumes from "
        f"{config.output}"
    )


def export(run: Path, output: Path | None = None, *, config: TrainConfig | None = None) -> Path:
    """Write the newest checkpoint of the run in `run` as a plain Hugging Face folder, by default `run/export`.

    The run may have been moved since it was trained; `config` is by default what it was trained with last. Raises
    InputError when it has no configuration or checkpoint.
    """
    from train_stage.__main__ import read_config

    output = output or run / "export"
    config = (config or read_config(run / CONFIG_NAME)).model_copy(update={"output": str(run)})
    with needs("train"):
        from transformers.utils.logging import disable_progress_bar

        from pipeline.model_card import write_card
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
            stop_tokens=trained.stop_tokens,
            made_from=trained.origin,
            card=write_card(config, trained.phase.name, trained.step),
        )
    state = "its last" if trained.final else "not its last: the run is unfinished"
    log.info("phase %s, step %d (%s)", trained.phase.name, trained.step, state)
    return output


def until_phase(config: TrainConfig, phase: str | None) -> TrainConfig:
    """`config` without the phases after `phase`, which changes nothing for those that stay.

    And without an evaluation on what the last phase is validated on, if the last one that stays has no such data.
    """
    if phase is None:
        return config
    names = [each.name for each in config.phases]
    if phase not in names:
        raise RecipeError(f"--phase {phase}: the recipe's phases are {', '.join(names)}")
    phases = config.phases[: names.index(phase) + 1]
    has_data = config.eval is not None and (config.eval.data or phases[-1].validation)
    return config.model_copy(update={"phases": phases, "eval": config.eval if has_data else None})


def _check_resumable(config: TrainConfig) -> None:
    """Raise TrainingStopped, before anything is started or written, where a checkpoint was made by another configuration."""
    from train_stage.checkpoint import check_fits, newest, settings_of

    for phase in config.phases:
        checkpoint = newest(config.phase_folder(phase.name))
        if checkpoint is not None:
            check_fits(checkpoint, settings_of(config, phase.name))


def write_config(config: TrainConfig) -> Path:
    """Write OUTPUT/config.json, whole or not at all, and return its path; LeaseHeld while a run is using it."""
    store = LocalStore(Path(config.output))
    with store.lease("train"):
        store.write(CONFIG_NAME, config_bytes(config))
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


def _train_here(config: TrainConfig, environment: dict[str, str], limits: Limits) -> int:
    """Be the rank that a launcher made of this process."""
    os.environ.update(environment)
    from train_stage.__main__ import main

    if os.environ["RANK"] == "0":
        with contextlib.suppress(AsvrError):  # the ranks find it again, and stop together
            _check_resumable(config)
            write_config(config)
    with _own_copy(config) as path:
        return main([str(path), *limits.options()])


@contextlib.contextmanager
def _own_copy(config: TrainConfig) -> Iterator[Path]:
    """A file for ranks to read: that in the run's folder may be another call's until the run has its lease."""
    with contextlib.ExitStack() as stack:
        with storage_errors("write", "the folder for temporary files (TMPDIR)"):
            path = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="asvr-")), CONFIG_NAME)
            path.write_bytes(config_bytes(config))
        yield path


def explain(failure: RankError, run: Path) -> int:
    """The exit code for the rank that ended the run; RankLost, said here, for one that could not say so itself."""
    resume = f"the same command resumes from {run}"
    if failure.code is None:
        raise RankLost(
            f"rank {failure.rank} did not answer the others for longer than timeout_seconds and was ended: see whether its "
            f"GPU, network and disks work; {resume}"
        )
    if failure.code == RankLost.exit_code:
        raise RankLost(f"the ranks waited for each other for longer than timeout_seconds; {resume}")
    if failure.code > 0:
        return failure.code if failure.code in EXIT_CODES else 1
    if -failure.code in (signal.SIGINT, signal.SIGTERM):
        return 128 - failure.code
    name = signal.Signals(-failure.code).name
    hint = " (the machine ran out of memory, or someone ended it)" if name == "SIGKILL" else ""
    raise RankLost(f"rank {failure.rank} was ended by {name}{hint}; {resume}")
