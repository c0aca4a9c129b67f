"""Who a tokenizer is, told without loading a model: its spec, and where its codebooks come from. Imports no torch.

What a family knows of its own files stands in `identities.KIND`; here is what is the same for all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any, cast

from manifests.codebook import Codebooks
from manifests.errors import InputError
from manifests.geometry import geometry_keys
from manifests.schema import SCHEMA_VERSION, Geometry, Producer
from tokenize_stage.config import ComputeDtype, TokenizerConfig


@dataclass(frozen=True)
class Identity:
    """A tokenizer's spec, and how to read its codebooks: D float32 arrays (K, code_dim), on the CPU.

    `codebooks` builds no encoder; it may import torch, and raises `InputError` if the tensors are not what the spec
    says; of features there are none. `spec.settings` holds at least `image_mean` and `image_std` of the three channels.
    """

    spec: Producer
    codebooks: Callable[[], Codebooks]


def identify(tokenizer: TokenizerConfig, geometry: Geometry) -> Identity:
    """`describe(tokenizer)`, and an `InputError` if `geometry` makes views of another size than it takes."""
    identity = describe(tokenizer)
    size = identity.spec.view_size
    if geometry.size != size:
        raise InputError(
            f"the tokenizer {identity.spec.origin} takes views of {size} pixels, not {geometry.size}: "
            f"set geometry.size to {size} or choose another tokenizer"
        )
    return identity


def describe(tokenizer: TokenizerConfig) -> Identity:
    """The identity of a configured tokenizer, every file hashed (or its remembered hash looked up).

    Raises `InputError` if a file is missing, damaged, or not what the family's files look like.
    """
    family = import_module(f"tokenize_stage.identities.{tokenizer.kind}")
    return cast("Identity", family.describe(tokenizer))


def fingerprint_keys(spec: Producer, geometry: Geometry, dtype: ComputeDtype) -> dict[str, Any]:
    """Everything meant to change a code, for `manifests.fingerprint.fingerprint`.

    Where the tokenizer's files lie is left out: moving or renaming a folder changes no code, its hashes are here.
    """
    return {
        "schema_version": SCHEMA_VERSION,
        "tokenizer": spec.model_dump(mode="json", exclude={"origin", "revision"}),
        "geometry": geometry_keys(geometry),
        "dtype": dtype,
    }
