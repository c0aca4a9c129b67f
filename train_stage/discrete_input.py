"""Codes instead of the tower's output as what the language model is shown of an image: set-up in training, and export.

The model is `AsvrModel` with another first layer of the projector; the tower is loaded, because it gives the grid, and never run.
"""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from manifests.errors import InputError
from manifests.schema import Geometry, TokenizerSpec
from train_stage import discrete_llava
from train_stage.discrete_llava import CodeEmbedding
from train_stage.model import AsvrModel, image_newline
from train_stage.objectives import Target
from train_stage.published_llava import causal_language_model
from train_stage.tensor_files import save_tensors, share

log = logging.getLogger(__name__)


def show_codes(model: AsvrModel, target: Target, grid: tuple[int, int], seed: int) -> None:
    """Let `model` see the codes of `target`'s manifests, through a projector that is fresh from `seed`.

    Raises InputError for features, another grid than the tower's, and several views an image.
    """
    spec = target.spec
    if not isinstance(spec, TokenizerSpec):
        raise InputError(f"{target.where} holds features, not codes: give input_codes a set of codes")
    if spec.grid != grid:
        raise InputError(
            f"{target.where} has {spec.grid[0]}x{spec.grid[1]} positions a view and the vision tower makes "
            f"{grid[0]}x{grid[1]}: use a tower with the tokenizer's grid"
        )
    if image_newline(model.llava) is not None:
        raise InputError(
            f"{target.where} has geometry anyres: a model that is shown codes takes one view an image, so use squash, pad or crop"
        )
    tensors = [torch.from_numpy(book.copy()) for book in target.codebooks]
    model.code_embedding = CodeEmbedding(tensors, residual=spec.residual)
    projector = model.llava.model.multi_modal_projector
    width, dtype = model.llava.config.text_config.hidden_size, projector.linear_1.weight.dtype
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        projector.linear_1 = nn.Linear(model.code_embedding.width, width).to(dtype)
        projector.linear_2 = nn.Linear(width, width).to(dtype)


def save_discrete(
    model: AsvrModel,
    tokenizer: PreTrainedTokenizerBase,
    geometry: Geometry,
    folder: Path,
    chat_template: str,
    generation: GenerationConfig,
) -> None:
    """Write the language model in its own Hugging Face form, and beside it what it is shown images with, and their loader."""
    embedding = model.code_embedding
    if embedding is None:
        raise ValueError("the model is shown the tower's output, not codes")
    language_model = causal_language_model(model.llava)
    language_model.generation_config = generation
    language_model.save_pretrained(folder)
    for path in folder.iterdir():
        share(path)
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(folder)
    projector = model.llava.model.multi_modal_projector
    tensors = {
        f"linear_{n}.{part}": getattr(getattr(projector, f"linear_{n}"), part)
        for n in (1, 2)
        for part in ("weight", "bias")
    }
    tensors |= {f"codebook_{d}": embedding.get_buffer(f"codebook_{d}") for d in range(embedding.depth)}
    own = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    save_tensors(own, folder / discrete_llava.WEIGHTS, {"format": "pt"})
    settings = {
        "image_token_id": model.llava.config.image_token_id,
        "codebook_sizes": [len(own[f"codebook_{d}"]) for d in range(embedding.depth)],
        "residual": embedding.residual,
        "geometry": geometry.model_dump(mode="json"),
    }
    text = json.dumps(settings, indent=2) + "\n"
    (folder / discrete_llava.SETTINGS).write_text(text, encoding="utf-8")
    shutil.copyfile(discrete_llava.__file__, folder / "discrete_llava.py")
    log.warning(
        "this model is shown codes, which no LLaVA of Transformers, vLLM or lmms-eval takes: load it with the "
        "discrete_llava.py in the export, and give it codes that the tokenize stage made"
    )
