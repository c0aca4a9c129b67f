"""The codebook file beside a manifest: the vectors that a visual head needs, one tensor for each depth."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load, save

from manifests.errors import VerificationFailed

Codebooks = list[npt.NDArray[np.float32]]


def encode_codebooks(codebooks: Sequence[npt.NDArray[np.float32]]) -> bytes:
    """safetensors bytes of tensors `depth_0` .. `depth_{D-1}`, float32 (K, code_dim); deterministic."""
    return bytes(save({f"depth_{d}": np.ascontiguousarray(book, np.float32) for d, book in enumerate(codebooks)}))


def decode_codebooks(data: bytes, codebook_sizes: Sequence[int], code_dim: int, name: str) -> Codebooks:
    """The D codebooks, float32 (K, code_dim), of safetensors bytes; anything else is `VerificationFailed`."""
    try:
        tensors = load(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise VerificationFailed(f"the codebook {name} is damaged ({error}): run the tokenize stage again") from error
    wanted = {f"depth_{d}": (size, code_dim) for d, size in enumerate(codebook_sizes)}
    found = {key: tensor.shape for key, tensor in tensors.items() if tensor.dtype == np.float32}
    if found != wanted or len(tensors) != len(wanted):
        raise VerificationFailed(f"the codebook {name} holds tensors {found}, but its manifest says {wanted}")
    books = [tensors[key] for key in wanted]
    if not all(np.isfinite(book).all() for book in books):
        raise VerificationFailed(f"the codebook {name} holds values that are not finite: fit it again")
    return books
