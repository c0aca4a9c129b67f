"""Visual tokenizers: one protocol, one file per family. Imports torch only when one is loaded."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, cast

from manifests.errors import InputError
from tokenize_stage.identity import describe

if TYPE_CHECKING:
    from manifests.schema import Producer
    from tokenize_stage.config import ComputeDtype, Device, TokenizerConfig
    from tokenize_stage.tokenizers.base import Tokenizer


def load(config: TokenizerConfig, spec: Producer, *, dtype: ComputeDtype, device: Device = "auto") -> Tokenizer:
    """The tokenizer that `identify(config, ...)` described as `spec`, ready on `device`.

    `dtype` is the arithmetic of the encoder. Files that changed since they were identified are an `InputError`, and
    so is a tensor that is missing, of another shape, not finite, or not expected.
    """
    if describe(config).spec != spec:
        raise InputError(f"the files of the tokenizer {spec.origin} changed while the job ran: start the job again")
    family = import_module(f"tokenize_stage.tokenizers.{config.kind}")
    return cast("Tokenizer", family.load(config, spec, dtype=dtype, device=device))
