"""Tensors on disk, where torch and safetensors have errors and file modes of their own."""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from manifests.atomic import storage_errors
from manifests.errors import TrainingStopped

_TORCH_FILES = ("inline_container", "iostream", "PytorchStreamReader")
"""What a RuntimeError of torch speaks of when a file could not be written or read."""


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file; StorageError when the disk refuses."""
    with tensor_storage_errors(path):
        save_file(dict(tensors), path, metadata=metadata)
        share(path)


def share(path: Path) -> None:
    """Give a file the mode that any new file has: safetensors makes its own readable for their owner alone."""
    mask = os.umask(0o077)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


@contextmanager
def tensor_storage_errors(path: Path) -> Iterator[None]:
    """`storage_errors("write", path)`, also for what torch and safetensors make of a disk that refuses."""
    with storage_errors("write", path):
        try:
            yield
        except SafetensorError as error:
            number = re.search(r"os error (\d+)", str(error))
            if number is None:
                raise
            raise OSError(int(number[1]), os.strerror(int(number[1]))) from error
        except RuntimeError as error:
            if not any(place in str(error) for place in _TORCH_FILES):
                raise
            raise OSError("torch could not write it to the end, as when a disk is full") from error


def load_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint's safetensors file; TrainingStopped when it is damaged."""
    with damage_named(path.parent):
        return load_file(path)


@contextmanager
def damage_named(checkpoint: Path) -> Iterator[None]:
    """Raise TrainingStopped for what torch and safetensors say when a file of `checkpoint` is cut, changed or gone."""
    try:
        yield
    except (SafetensorError, EOFError, pickle.UnpicklingError, FileNotFoundError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(place in str(error) for place in _TORCH_FILES):
            raise
        raise TrainingStopped(
            f"the checkpoint {checkpoint} is damaged ({str(error).splitlines()[0]}): remove it, and the run goes on "
            "from before it"
        ) from error
