"""A whole recipe that runs in seconds: pictures, records, models of a few thousand weights, a codebook, a set, two phases, an evaluation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image
from tiny_models import save_language_model, save_tower

PICTURES = 6
HEAD = {"width": 16, "layers": 1, "heads": 2, "ffn": 24}


def recipe() -> dict[str, Any]:
    """The recipe as YAML holds it; `instruct` reads records of its own, and the tower is not the tokenizer's encoder."""
    geometry = {"mode": "pad", "size": 28}
    return {
        "codebooks": {
            "tiny": {
                "source": {"kind": "folder", "path": "images"},
                "geometry": geometry,
                "encoder": {"path": "encoder", "layer": 2},
                "depth": 2,
                "size": 4,
                "iterations": 3,
                "output": "codebook",
            }
        },
        "tokenize": {
            "vqa": {
                "source": {"kind": "folder", "path": "images"},
                "geometry": geometry,
                "tokenizer": {"kind": "fitted", "path": "codebook"},
                "unit_size": 4,
                "batch_size": 4,
                "output": "tokens",
            }
        },
        "train": {
            "output": "run",
            "precision": "float32",
            "eval": {"data": [{"path": "held_out.json", "image_root": "images"}]},
            "model": {"language_model": "llama", "vision_tower": "tower", "vision_feature_layer": 2},
            "phases": [
                {
                    "name": name,
                    "data": [{"path": f"{name}.json", "image_root": "images"}],
                    "manifests": ["vqa"],
                    "objective": {"kind": "codes", "head": HEAD},
                    "batch_size": PICTURES,
                }
                for name in ("pretrain", "instruct")
            ],
        },
    }


def make_folder(folder: Path) -> Path:
    """Everything the recipe names, and the recipe; its path."""
    (folder / "images").mkdir(parents=True)
    rng = np.random.default_rng(0)
    records = []
    for number in range(PICTURES):
        save_picture(folder / "images" / f"{number}.png", int(rng.integers(1000)))
        turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": f"Picture {number}."}]
        records.append({"id": str(number), "image": f"{number}.png", "conversations": turns})
    for name in ("pretrain", "instruct", "held_out"):
        (folder / f"{name}.json").write_text(json.dumps(records))
    save_tower("dinov2", folder / "encoder")
    save_tower("siglip", folder / "tower")
    save_language_model(folder / "llama", tied=False)
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe(), sort_keys=False))
    return file


def save_picture(path: Path, seed: int) -> None:
    """A picture of noise; those of one seed are the same."""
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(path)
