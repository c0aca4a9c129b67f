"""What the tests of QLIP share: its golden folder made complete, and what a tokenizer makes of its pixels."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from golden_files import DATA, load_described, read_golden
from made_jobs import MEAN, STD

from tokenize_stage.config import QlipTokenizer
from tokenize_stage.tokenizers.qlip import Qlip

FIXTURE = DATA / "qlip"
TOWER = "vision_model."
ROPE = f"{TOWER}rope.freqs_cos"


def complete(folder: Path) -> Path:
    """A copy of the fixture with the preprocessor's file, which every published model has beside its weights."""
    shutil.copytree(FIXTURE, folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": MEAN, "image_std": STD}))
    return folder


def load_from(folder: Path, **choices: int) -> Qlip:
    config = QlipTokenizer(path=str(folder), **choices)
    tokenizer = load_described(config)
    assert isinstance(tokenizer, Qlip)
    return tokenizer


def features(tokenizer: Qlip) -> torch.Tensor:
    """Of the fixture's pixels."""
    return tokenizer.encoder.project(tokenizer.encoder.hidden(read_golden(FIXTURE)["pixel_values"]))
