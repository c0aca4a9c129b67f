"""What DeepSpeed needs of its process: an environment, its communication op, and that it keeps quiet."""

from __future__ import annotations

import contextlib
import fcntl
import io
import logging
import os
import shutil
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

from manifests.atomic import make_folder, storage_errors
from manifests.errors import EnvironmentProblem
from train_stage.ranks import has_gpu


def prepare_environment() -> None:
    """Settings that DeepSpeed reads when it is imported. Call before anything else of this file.

    On a machine without a GPU DeepSpeed compiles a communication op, once per `TORCH_EXTENSIONS_DIR`; without the
    tools for that it is an EnvironmentProblem. A virtual environment keeps its own copy and uses its own ninja: two
    environments that share a copy, or two versions of ninja, compile it over and over again.
    """
    # DeepSpeed 0.19 calls collectives by names that torch 2.13 announces to drop.
    warnings.filterwarnings("ignore", message="`torch.distributed.", category=FutureWarning)
    if has_gpu():
        return
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix) / "torch_extensions"))
    beside_python = str(Path(sys.executable).parent)
    if shutil.which("ninja", path=beside_python):
        os.environ["PATH"] = f"{beside_python}{os.pathsep}{os.environ.get('PATH', '')}"
    for program, package in (("ninja", "ninja"), (os.environ.get("CXX", "g++"), "g++")):
        if shutil.which(program) is None:
            raise EnvironmentProblem(
                f"{program} is not on PATH, and without a GPU DeepSpeed compiles its communication op with it: "
                f"install {package} (e.g. apt-get install {'ninja-build' if package == 'ninja' else package})"
            )


def load_communication_op() -> None:
    """Load DeepSpeed's CPU communication op, compiled first if it has to be; nothing to do where there is a GPU.

    torch guards the compilation with a lock file that a killed process leaves behind, and on which everybody after it
    would wait for ever. Here a lock of the kernel stands before it: who holds that one knows the file to be a leftover.
    """
    if has_gpu():
        return
    with quiet():
        from deepspeed.accelerator import get_accelerator
    builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
    folder = Path(os.environ["TORCH_EXTENSIONS_DIR"])
    with storage_errors("write", folder):
        make_folder(folder)
        with (folder / ".asvr-lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            (folder / builder.name / "lock").unlink(missing_ok=True)
            with quiet():
                builder.load(verbose=False)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep DeepSpeed's notices off the console; its warnings of its own log level `error` still come through."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
