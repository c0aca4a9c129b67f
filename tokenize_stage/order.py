"""What a worker is told about its job."""

from __future__ import annotations

from dataclasses import dataclass

from manifests.images import ImageSource
from manifests.schema import Geometry, Producer
from tokenize_stage.config import ComputeDtype, Device, TokenizerConfig


@dataclass(frozen=True)
class WorkOrder:
    """All that a worker is told about its job; small and picklable, since it travels to other machines."""

    output: str
    images: ImageSource
    geometry: Geometry
    tokenizer: TokenizerConfig
    spec: Producer
    fingerprint: str
    dtype: ComputeDtype
    device: Device
    batch_size: int
    torch_threads: int
    decode_threads: int | None
    max_pixels: int
