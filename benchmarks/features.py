"""Features of real images for the benchmarks: from a file, or from an encoder and a folder of images."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from manifests.decode import decode
from manifests.geometry import make_views
from manifests.refs import read_image
from manifests.schema import Geometry
from tokenize_stage.config import ComputeDtype, FolderSource
from tokenize_stage.encoder import VisionEncoder
from tokenize_stage.encoder_files import locate_encoder, normalisation
from tokenize_stage.sources import take_inventory

_BATCH = 16


def load_features(file: Path) -> torch.Tensor:
    """float32 (N, n) from a `.npy` or `.pt` file of one array (..., n)."""
    if not file.is_file():
        raise SystemExit(f"there is no features file {file}: name another, or give --encoder and --images")
    values = torch.from_numpy(np.load(file)) if file.suffix == ".npy" else torch.load(file, weights_only=True)
    return values.flatten(0, -2).float()


def load_encoder(
    path: str, layer: int, geometry: Geometry, device: torch.device, dtype: ComputeDtype = "float32"
) -> VisionEncoder:
    files = locate_encoder(path)
    return VisionEncoder(
        files.folder,
        layer=layer,
        view_size=geometry.size,
        normalisation=normalisation(files.folder),
        dtype=dtype,
        device="cuda" if device.type == "cuda" else "cpu",
    )


def read_views(folder: Path, geometry: Geometry, count: int, seed: int = 0) -> Iterator[npt.NDArray[np.uint8]]:
    """uint8 (B, S, S, 3): the views of `count` images below `folder`, drawn by `seed`."""
    inventory = take_inventory(FolderSource(path=folder))
    ids = np.array(inventory.table["image_id"].to_pylist())
    drawn = np.sort(np.random.default_rng(seed).choice(len(ids), min(count, len(ids)), replace=False))
    for start in range(0, len(drawn), _BATCH):
        views = [
            make_views(decode(read_image(inventory.root, ids[i])), geometry)[0] for i in drawn[start : start + _BATCH]
        ]
        yield np.concatenate(views)


def extract_features(encoder: VisionEncoder, folder: Path, geometry: Geometry, images: int) -> torch.Tensor:
    """float32 (N, n) on the CPU: every position of the views of `images` images."""
    batches = (torch.from_numpy(views) for views in read_views(folder, geometry, images))
    return torch.cat([encoder.features(views).flatten(0, 1).cpu() for views in batches])
