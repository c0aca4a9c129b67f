"""Tensors out of untrusted checkpoint files, strictly: nothing is executed, nothing is missing, nothing is ignored unseen.

Every way in which a file can be wrong is an `InputError` of one sentence.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from manifests.errors import InputError
from tokenize_stage.encoder_files import weight_files
from tokenize_stage.layout import check_layout, shown

State = dict[str, torch.Tensor]

_ZIP_START = b"PK\x03\x04"
_DAMAGED = (
    RuntimeError,
    EOFError,
    OSError,
    ValueError,
    KeyError,
    IndexError,
    TypeError,
    AttributeError,
    AssertionError,
)
"""What torch's unpickler raises on a damaged archive, depending on where the damage is."""


def read_pickle(file: Path) -> Any:
    """What `torch.save` wrote to `file` (torch 1.6 or newer), tensors mapped into memory, read when they are used.

    `InputError` if it is cut off, damaged, of another format, or holds anything beside tensors and plain values.
    """
    try:
        with file.open("rb") as stream:
            start = stream.read(len(_ZIP_START))
        whole = zipfile.is_zipfile(file)
    except OSError as error:
        raise InputError(f"the checkpoint {file} cannot be read ({error.strerror}): check the path") from error
    except zipfile.BadZipFile as error:
        raise InputError(f"the checkpoint {file} is damaged: download it again") from error
    if start == _ZIP_START and not whole:
        raise InputError(f"the checkpoint {file} is cut off: download it again")
    if not whole:
        raise InputError(f"{file} is not a checkpoint that torch.save wrote: check which file it is")
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"the checkpoint {file} holds more than tensors and plain values, or is damaged: "
            "nothing in it is run, so save its tensors alone or download it again"
        ) from error
    except _DAMAGED as error:
        raise InputError(f"the checkpoint {file} is damaged: download it again") from error


def tensors_at(container: Any, path: Sequence[str], *, where: str) -> State:
    """The mapping of names to tensors under `path` of what `read_pickle` returned. `InputError` if it is not there."""
    value = container
    for depth, key in enumerate(path):
        if not isinstance(value, Mapping) or key not in value:
            name = ".".join(path[:depth]) or "the file"
            keys = f"keys {shown(map(str, value))}" if isinstance(value, Mapping) else f"a {type(value).__name__}"
            raise InputError(f"{where} has no {key!r} where its tensors should stand ({name} holds {keys}): "
                             "check which checkpoint it is")  # fmt: skip
        value = value[key]
    if not isinstance(value, Mapping) or not value:
        raise InputError(f"{where} holds no tensors under {'.'.join(path)!r}: check which checkpoint it is")
    others = [str(key) for key, item in value.items() if not isinstance(key, str) or not isinstance(item, torch.Tensor)]
    if others:
        raise InputError(
            f"{where} holds {len(others)} values that are not tensors ({shown(others)}): check which checkpoint it is"
        )
    return dict(value)


def read_safetensors(folder: Path) -> State:
    """The tensors of a model folder: `model.safetensors`, or the files that its index names."""
    return read_tensor_files([folder / name for name in weight_files(folder) if name.endswith(".safetensors")])


def read_tensor_files(files: Sequence[Path]) -> State:
    """The tensors of safetensors files, mapped into memory; `InputError` if one is damaged or two hold the same."""
    state: State = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                part = {key: tensors.get_tensor(key) for key in tensors.keys()}  # noqa: SIM118 - not a mapping
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            raise InputError(f"{file} is cut off or not a safetensors file: download it again") from error
        if twice := sorted(part.keys() & state.keys()):
            raise InputError(f"{file.parent} holds {len(twice)} tensors twice ({shown(twice)}): download it again")
        state |= part
    return state


def take(
    state: Mapping[str, torch.Tensor],
    needed: Mapping[str, Sequence[int]],
    ignorable: Mapping[str, str],
    *,
    where: str,
) -> State:
    """The needed tensors, float32, by their names in the checkpoint; the rest must be ignorable.

    `needed`: key -> shape. `ignorable`: name of a group -> regular expression, see `layout.check_layout`.
    What is stored in half precision is widened, which is exact. Raises `InputError`, listing keys, for a
    tensor that is missing, of another shape, unknown, not floating point, or not finite.
    """
    check_shapes(state, needed, ignorable, where=where)
    # Copies: a mapped tensor would end the process if somebody shortened the file while it is in use.
    taken = {
        key: state[key].detach().to(torch.float32, copy=True, memory_format=torch.contiguous_format) for key in needed
    }
    bad = [key for key, tensor in taken.items() if not bool(torch.isfinite(tensor).all())]
    if bad:
        raise InputError(f"{where} holds NaN or infinity in {len(bad)} tensors ({shown(bad)}): download it again")
    return taken


def check_shapes(
    state: Mapping[str, torch.Tensor],
    needed: Mapping[str, Sequence[int]],
    ignorable: Mapping[str, str],
    *,
    where: str,
) -> None:
    """`take` without reading a value: names, shapes and types alone. Fast enough to do before a job is planned."""
    check_layout({key: tuple(tensor.shape) for key, tensor in state.items()}, needed, ignorable, where=where)
    types = [f"{key} is {state[key].dtype}" for key in needed if not state[key].dtype.is_floating_point]
    if types:
        raise InputError(f"{where} holds {len(types)} tensors that are not floating point ({shown(types)})"
                         ": check which checkpoint it is")  # fmt: skip


def shapes_of(module: torch.nn.Module, prefix: str) -> dict[str, tuple[int, ...]]:
    """What `module` needs: its parameters and persistent buffers, as they are called in the checkpoint."""
    return {prefix + name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def fill(module: torch.nn.Module, taken: Mapping[str, torch.Tensor], prefix: str) -> None:
    """Give `module` (which may be on the meta device) its tensors, those of `taken` below `prefix`."""
    own = {name: taken[prefix + name] for name in module.state_dict()}
    module.load_state_dict(own, strict=True, assign=True)
    module.requires_grad_(False).eval()
