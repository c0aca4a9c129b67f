"""Tiny models that stand in for the real ones: real classes, real files, random weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTModel,
)

from manifests.schema import TokenizerSpec
from train_stage.objectives import Target

VIEW = 28
"""Pixels of a view: patches of 7 make a grid of 4 x 4 positions."""

TOWERS = ("siglip", "clip", "dinov2", "vit")

_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "image_size": VIEW,
    "patch_size": 7,
}


def save_tower(kind: str, folder: Path, *, blocks: int = 4) -> None:
    """A random vision tower, with its normalisation beside it."""
    torch.manual_seed(1)
    sizes = _SIZES | {"num_hidden_layers": blocks}
    if kind == "siglip":
        tower = SiglipVisionModel(SiglipVisionConfig(**sizes))
    elif kind == "clip":
        tower = CLIPVisionModel(CLIPVisionConfig(**sizes))
    elif kind == "dinov2":
        tower = Dinov2Model(Dinov2Config(**{**sizes, "image_size": 42}))
    else:
        tower = ViTModel(ViTConfig(**sizes))
    for parameter in tower.parameters():  # the usual small start would hide a mistake in rounding
        torch.nn.init.normal_(parameter, std=0.1)
    tower.save_pretrained(folder)
    mean, std = ([0.5] * 3, [0.5] * 3) if kind == "siglip" else ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    CLIPImageProcessorPil(image_mean=mean, image_std=std).save_pretrained(folder)


def save_language_model(folder: Path, tied: bool, *, layers: int = 2) -> None:
    """A random Llama and a tokenizer whose tokens are characters."""
    letters = sorted(set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 .,:?'\n"))
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    words = {token: i for i, token in enumerate([*special.values(), *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=[], unk_token=special["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    torch.manual_seed(2)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def target(codebooks: list[np.ndarray], *, grid: tuple[int, int] = (4, 4), residual: bool = True) -> Target:
    """What a manifest with these codebooks says of its codes."""
    spec = TokenizerSpec(
        kind="fitted",
        origin="tiny",
        weights_sha256={},
        view_size=VIEW,
        grid=grid,
        codebook_sizes=tuple(len(book) for book in codebooks),
        code_dim=codebooks[0].shape[1],
        residual=residual,
    )
    return Target(spec, codebooks)
