from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from made_jobs import CODES, DEPTH, VIEW, WIDTH, make_tokenizer

from manifests.errors import InputError
from manifests.schema import Geometry
from tokenize_stage.config import FittedTokenizer
from tokenize_stage.encoder import VisionEncoder
from tokenize_stage.encoder_files import normalisation
from tokenize_stage.identity import identify
from tokenize_stage.search import oracle
from tokenize_stage.tokenizers import load
from tokenize_stage.tokenizers.base import Tokenizer

PAD = Geometry(mode="pad", size=VIEW)


def load_from(folder: Path) -> Tokenizer:
    config = FittedTokenizer(path=folder)
    return load(config, identify(config, PAD).spec, dtype="float32", device="cpu")


def random_views(count: int) -> torch.Tensor:
    return torch.randint(0, 256, (count, VIEW, VIEW, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_codes_are_the_oracle_on_the_encoder_s_features(codebook: Path) -> None:
    tokenizer, views = load_from(codebook), random_views(6)
    codes = tokenizer.encode(views)
    assert codes.dtype == torch.int32
    assert codes.shape == (6, 4, DEPTH)
    encoder_folder = codebook.parent / "encoder"
    encoder = VisionEncoder(
        encoder_folder, layer=1, view_size=VIEW, normalisation=normalisation(encoder_folder), device="cpu"
    )
    features = encoder.features(views).flatten(0, 1)
    assert torch.equal(codes.flatten(0, 1), oracle(features, tokenizer.codebooks()))
    assert tokenizer.fallbacks == 0
    assert tokenizer.spec == identify(FittedTokenizer(path=codebook), PAD).spec


def test_codebooks_are_float32_of_the_spec_s_shape(codebook: Path) -> None:
    tokenizer = load_from(codebook)
    assert [(book.shape, book.dtype) for book in tokenizer.codebooks()] == [((CODES, WIDTH), np.float32)] * DEPTH


def test_the_same_batch_gives_the_same_codes(codebook: Path) -> None:
    views = random_views(5)
    assert torch.equal(load_from(codebook).encode(views), load_from(codebook).encode(views))


def test_files_that_changed_after_planning_are_refused(codebook: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(codebook.parent, tmp_path / "a") / codebook.name
    config = FittedTokenizer(path=folder)
    planned = identify(config, PAD).spec
    shutil.rmtree(folder.parent)
    make_tokenizer(folder.parent, seed=1)
    with pytest.raises(InputError, match="changed while the job ran"):
        load(config, planned, dtype="float32", device="cpu")
