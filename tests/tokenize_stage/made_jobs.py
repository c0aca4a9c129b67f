"""Real inputs of tokenize jobs, small: pictures, a random encoder with a random codebook, and drivers in processes."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from manifests.reader import open_manifest
from manifests.schema import Geometry
from manifests.storage import Store
from tokenize_stage.codebook_folder import (
    CodebookDescription,
    EncoderRecord,
    FitReport,
    write_codebooks,
    write_description,
)
from tokenize_stage.config import TokenSetConfig
from tokenize_stage.encoder_files import encoder_sha256

VIEW = 28  # two by two patches of 14
DEPTH, CODES, WIDTH = 2, 16, 16
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

ROOT = Path(__file__).resolve().parents[2]


def make_tokenizer(folder: Path, seed: int = 0) -> Path:
    """A codebook folder in the real format, beside the tiny random Dinov2 that it names."""
    import torch
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(seed)
    config = Dinov2Config(
        hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=2, image_size=VIEW, patch_size=14, mlp_ratio=2
    )
    encoder, codebook = folder / "encoder", folder / "codebook"
    Dinov2Model(config).save_pretrained(encoder)
    (encoder / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": MEAN, "image_std": STD, "rescale_factor": 1 / 255, "do_normalize": True})
    )
    rng = np.random.default_rng(seed)
    books = [rng.normal(scale=1.0 / (depth + 1), size=(CODES, WIDTH)).astype(np.float32) for depth in range(DEPTH)]
    codebook.mkdir()
    sha256 = write_codebooks(codebook, books)
    write_description(
        codebook,
        CodebookDescription(
            encoder=EncoderRecord(path="../encoder", layer=1, sha256=encoder_sha256(encoder)),
            image_mean=MEAN,
            image_std=STD,
            view_size=VIEW,
            grid=(2, 2),
            codebook_sizes=(CODES,) * DEPTH,
            code_dim=WIDTH,
            codebook_sha256=sha256,
            geometry=Geometry(mode="pad", size=VIEW),
            dtype="float32",
            seed=seed,
            report=FitReport(images=0, rejected=0, positions=0, sampled=0, seconds=0, depths=()),
        ),
    )
    return codebook


def picture(seed: int, suffix: str = ".png") -> bytes:
    """The bytes of a small picture with structure and noise; sizes differ."""
    rng = np.random.default_rng(seed)
    height, width = int(rng.integers(20, 60)), int(rng.integers(20, 60))
    ramp = np.linspace(0, 200, width)[None, :, None] * rng.random(3)
    pixels = np.clip(ramp + rng.normal(scale=25, size=(height, width, 3)) + 40, 0, 255).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(
        stream, "JPEG" if suffix == ".jpg" else "PNG", **({"quality": 90} if suffix == ".jpg" else {})
    )
    return stream.getvalue()


def make_pictures(folder: Path, count: int, first: int = 0) -> Path:
    """`count` pictures `000000.png`, `000001.jpg`, … in a folder and a folder below it."""
    (folder / "more").mkdir(parents=True, exist_ok=True)
    for number in range(first, first + count):
        suffix = ".jpg" if number % 2 else ".png"
        below = folder / "more" if number % 3 == 0 else folder
        (below / f"{number:06d}{suffix}").write_bytes(picture(number, suffix))
    return folder


def job_config(pictures: Path | str, codebook: Path, output: Path | str, **changes: Any) -> TokenSetConfig:
    """A small job: units of 8 images, batches of 4."""
    values: dict[str, Any] = {
        "source": {"kind": "folder", "path": pictures},
        "geometry": {"mode": "pad", "size": VIEW},
        "tokenizer": {"kind": "fitted", "path": codebook},
        "output": output,
        "unit_size": 8,
        "batch_size": 4,
        "torch_threads": 1,
        "decode_threads": 2,
        "device": "cpu",
    }
    return TokenSetConfig.model_validate({**values, **changes})


def content(output: Path | str) -> dict[str, Any]:
    """What must be equal between runs that did the same work: everything but the provenance."""
    opened = open_manifest(output)
    manifest = opened.manifest.model_dump(exclude={"provenance"})
    return {
        "manifest": manifest,
        "index": opened.index().to_pydict(),
        "rejects": opened.rejects().to_pydict(),
        "bytes": {shard.path: Store.open(output).read(shard.path) for shard in opened.shards},
    }


DRIVER = """
import sys
from tokenize_stage.config import TokenSetConfig
from tokenize_stage.job import run_job
from manifests.errors import AsvrError
config = TokenSetConfig.model_validate_json(sys.argv[1])
try:
    result = run_job(config)
except AsvrError as error:
    print(f"{type(error).__name__}: {error}", flush=True)
    sys.exit(error.exit_code)
print("encoded", result.encoded, flush=True)
"""


def start_driver(config: TokenSetConfig, **options: Any) -> subprocess.Popen[str]:
    """`run_job` in a process of its own; ends with the error's exit code."""
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, config.model_dump_json()],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, **options,
    )  # fmt: skip
