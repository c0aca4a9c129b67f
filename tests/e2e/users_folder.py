"""A user's folder for the end-to-end tests: pictures, conversations, tiny models, a recipe; and the command to run in it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import yaml
from PIL import Image
from tiny_models import save_language_model, save_tower

PICTURES = 12
RECIPE = {
    "codebooks": {
        "tiny": {
            "source": {"kind": "folder", "path": "images"},
            "geometry": {"mode": "pad", "size": 28},
            "encoder": {"path": "tower", "layer": 2},
            "depth": 3,
            "size": 8,
            "images": 10,
            "iterations": 5,
            "output": "codebook",
        }
    },
    "tokenize": {
        "pictures": {
            "source": {"kind": "llava", "path": "talks.json", "image_root": "images"},
            "geometry": {"mode": "pad", "size": 28},
            "tokenizer": {"kind": "fitted", "path": "codebook"},
            "engine": "local",
            "unit_size": 5,
            "batch_size": 4,
            "output": "tokens",
        }
    },
    "train": {
        "output": "run",
        "precision": "float32",
        "model": {"language_model": "llama", "vision_tower": "tower", "vision_feature_layer": 2},
        "eval": {"data": [{"path": "talks.json", "image_root": "images"}]},
        "save_every": 2,
        "log_every": 1,
        "phases": [
            {
                "name": name,
                "data": [{"path": "talks.json", "image_root": "images"}],
                "manifests": ["pictures"],
                "objective": {"kind": "codes", "head": {"width": 16, "layers": 1, "heads": 2, "ffn": 24}},
                "batch_size": 4,
                "lr": 1e-3,
            }
            for name in ("pretrain", "instruct")
        ],
    },
}


BEFORE_THE_SECOND_GUIDE = [
    "fit-codebook recipe.yaml --only tiny",
    "tokenize recipe.yaml --only pictures",
    "train recipe.yaml --launcher torchrun --nproc 2 --dry-run",
    "train recipe.yaml --launcher torchrun --nproc 2 --nodes 2 --rendezvous first:29500 --dry-run",
    "train recipe.yaml --launcher deepspeed --nproc 2 --hostfile hosts --dry-run",
    "train recipe.yaml --launcher slurm --nproc 8 --nodes 2 --dry-run",
]
"""What launchers would start is only said while there is something to train."""


def asvr(*arguments: str, cwd: Path, code: int = 0) -> str:
    """Run the command and return what it printed; its exit code must be `code`."""
    result = subprocess.run(
        [sys.executable, "-m", "pipeline", *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=300,
        check=False,
    )
    assert result.returncode == code, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    return result.stdout if code == 0 else result.stderr


def make_folder(folder: Path) -> Path:
    """Everything a user has before the first command."""
    (folder / "images").mkdir()
    rng = np.random.default_rng(0)
    talks = []
    for number in range(PICTURES):
        pixels = rng.integers(0, 256, (30 + number, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{number}.png")
        turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": f"Picture {number}."}]
        talks.append({"id": str(number), "image": f"{number}.png", "conversations": turns})
    (folder / "talks.json").write_text(json.dumps(talks))
    save_tower("dinov2", folder / "tower")
    save_language_model(folder / "llama", tied=False)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE, sort_keys=False))
    return folder
