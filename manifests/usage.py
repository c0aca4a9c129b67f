"""How often each code of a codebook occurs: counted by unit, summed into the manifest."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import zstandard

from manifests.documents import decompress
from manifests.schema import DepthUsage


def encode_usage(counts: Sequence[npt.NDArray[np.integer[Any]]]) -> str:
    """Histograms of D codebooks, (K_d,) each, as one text: base64 of zstd of little-endian uint32, depth by depth.

    Features have no codebooks, and no text either.
    """
    if not counts:
        return ""
    flat = np.concatenate([np.asarray(count).reshape(-1) for count in counts])
    if flat.min() < 0 or flat.max() >= 1 << 32:
        raise ValueError("a code count does not fit 32 bits: make unit_size smaller")
    return base64.b64encode(zstandard.ZstdCompressor().compress(flat.astype("<u4").tobytes())).decode("ascii")


def decode_usage(text: str, codebook_sizes: Sequence[int]) -> list[npt.NDArray[np.uint32]]:
    """The D histograms, uint32 (K_d,), of `encode_usage`; `ValueError` when they are not of these sizes."""
    if not codebook_sizes:
        if text:
            raise ValueError("it counts codes, but the set is one of features")
        return []
    total = sum(codebook_sizes)
    try:
        data = decompress(base64.b64decode(text, validate=True), limit=4 * total)
    except (zstandard.ZstdError, binascii.Error) as error:
        raise ValueError(f"the code usage does not decode: {error}") from error
    if len(data) != 4 * total:
        raise ValueError(f"the code usage counts {len(data) // 4} codes, the codebooks have {total}")
    return np.split(np.frombuffer(data, "<u4"), np.cumsum(codebook_sizes)[:-1])


def depth_usage(counts: npt.NDArray[np.integer[Any]]) -> DepthUsage:
    """Codes used and exp(entropy) of one depth's histogram (K,); rounded, so that no CPU's last bit shows."""
    used = counts[counts > 0]
    shares = used / max(int(used.sum()), 1)
    perplexity = float(np.exp(-(shares * np.log(shares)).sum())) if len(used) else 0.0
    return DepthUsage(used=len(used), perplexity=round(min(perplexity, len(counts)), 4))
