"""The `unitok` tokenizer: ViTamin features, narrowed and cut into chunks, each with a codebook of its own.

Source: the paper (Ma et al., "UniTok", 2025) and the layout of FoundationVision/UniTok at bb8012e. Code d is the row of
codebook d with the largest cosine to chunk d; the codebooks are independent, so nothing is left over for a next one.
They are handed out with rows of length one: those are searched, and side by side they are what a position stands for.
The public preprocessing is `crop`. Shape legend: B views, S edge of a view, P positions, n width of the encoder,
m width of a feature, D codebooks, K rows of a codebook.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from manifests.codebook import Codebooks
from manifests.errors import InputError
from manifests.schema import TokenizerSpec
from tokenize_stage.checkpoints import State, check_shapes, fill, read_pickle, shapes_of, take, tensors_at
from tokenize_stage.config import ComputeDtype, Device, UniTokTokenizer, ViTaminConfig
from tokenize_stage.cosine_search import CosineSearch, unit_codebook
from tokenize_stage.encoder import full_precision, resolve_device
from tokenize_stage.hub import locate_file
from tokenize_stage.identities.unitok import FILE, MEAN, STD, UniTokShape, read_args
from tokenize_stage.pixels import Normaliser
from tokenize_stage.tokenizers.attention_projection import AttentionProjection
from tokenize_stage.tokenizers.vitamin import ViTamin

_IGNORED = {
    "pixel decoder": r"(decoder|post_quant_proj)\..+",
    "text tower": r"text_encoder\..+|logit_scale",
    "contrastive head": r"(fc_norm|projection)\.(weight|bias)",
    "usage counters": r"quantizer\.codebooks\.\d+\.vocab_usage",
}


@dataclass(frozen=True)
class Checkpoint:
    """An open file whose names and shapes have been checked; values are read when they are asked for."""

    file: Path
    shape: UniTokShape
    state: State

    @property
    def where(self) -> str:
        """The file, for messages."""
        return f"the UniTok checkpoint {self.file}"

    def check(self) -> None:
        """Raise `InputError` unless it holds the tensors that its `args` speak of."""
        check_shapes(self.state, shapes_of(_architecture(self.shape), "") | self._books, _IGNORED, where=self.where)

    def model(self) -> State:
        """The float32 tensors of encoder and projection."""
        needed = shapes_of(_architecture(self.shape), "")
        return take({name: self.state[name] for name in needed}, needed, {}, where=self.where)

    def codebooks(self) -> Codebooks:
        """D float32 arrays (K, m / D) with rows of length one."""
        stored = take({name: self.state[name] for name in self._books}, self._books, {}, where=self.where)
        untrained = [name for name, book in stored.items() if not bool(book.any(1).all())]
        if untrained:
            raise InputError(
                f"{self.where} has a row of zeros, which has no direction, in {untrained[0]}: download it again"
            )
        return [unit_codebook(book) for book in stored.values()]

    @property
    def _books(self) -> dict[str, tuple[int, ...]]:
        names = [f"quantizer.codebooks.{d}.codebook.weight" for d in range(self.shape.codebooks)]
        return dict.fromkeys(names, (self.shape.codes, self.shape.code_dim))


class Stages(NamedTuple):
    """What the parts of the model make of the pixels, float32."""

    patches_BPn: torch.Tensor
    """Output of the convolutions."""
    hidden_BPn: torch.Tensor
    """Output of the encoder."""
    features_BPm: torch.Tensor
    """Output of the projection: what is quantised."""


class _Model(nn.Module):
    """The part of a checkpoint that decides a code, but for the codebooks, under the checkpoint's names."""

    def __init__(self, shape: UniTokShape) -> None:
        super().__init__()
        self.encoder = ViTamin(shape.encoder)
        self.quant_proj = AttentionProjection(shape.encoder.widths[-1], shape.width)


class UniTokEncoder:
    """What enters the quantiser."""

    def __init__(self, checkpoint: Checkpoint, *, dtype: ComputeDtype, device: torch.device) -> None:
        self.device = device
        self._dtype: torch.dtype = getattr(torch, dtype)
        self._model = _architecture(checkpoint.shape)
        fill(self._model, checkpoint.model(), "")
        self._model.to(device=device, dtype=self._dtype)
        self._normalise = Normaliser(checkpoint.shape.view_size, MEAN, STD, device)

    def features(self, views_BSSC: torch.Tensor) -> torch.Tensor:
        """uint8 (B, S, S, 3) on any device -> float32 (B, P, m) on `device`, before quantisation."""
        return self.stages(self._normalise(views_BSSC)).features_BPm

    @torch.inference_mode()
    def stages(self, pixels_BCSS: torch.Tensor) -> Stages:
        """float32 (B, 3, S, S) in [-1, 1] -> what each part of the model makes of them."""
        with full_precision(self.device):
            patches_BPn = self._model.encoder.patches(pixels_BCSS.to(self._dtype))
            hidden_BPn = self._model.encoder.transform(patches_BPn)
            features_BPm = self._model.quant_proj(hidden_BPn)
        return Stages(patches_BPn.float(), hidden_BPn.float(), features_BPm.float())


class UniTok:
    """An encoder and D independent codebooks. See `tokenizers.base.Tokenizer`."""

    fallbacks = 0
    """Every row is decided among its candidates."""

    def __init__(self, spec: TokenizerSpec, encoder: UniTokEncoder, codebooks: Codebooks) -> None:
        """`codebooks`: rows of length one."""
        self._spec = spec
        self.encoder = encoder
        self._codebooks = codebooks
        self._search = CosineSearch(codebooks, encoder.device)

    @property
    def spec(self) -> TokenizerSpec:
        return self._spec

    def encode(self, views_BSSC: torch.Tensor) -> torch.Tensor:
        """uint8 (B, S, S, 3) -> int32 (B, P, D) on the encoder's device."""
        features_BPm = self.encoder.features(views_BSSC)
        return self._search(features_BPm.flatten(0, 1)).unflatten(0, features_BPm.shape[:2])

    def codebooks(self) -> Codebooks:
        return self._codebooks


def load(config: UniTokTokenizer, spec: TokenizerSpec, *, dtype: ComputeDtype, device: Device) -> UniTok:
    """The tokenizer of a UniTok file. `InputError`, listing keys, if a tensor is missing, unknown or not finite."""
    checkpoint = open_checkpoint(locate_file(config.checkpoint, name=FILE).path, config.encoder)
    encoder = UniTokEncoder(checkpoint, dtype=dtype, device=resolve_device(device))
    return UniTok(spec, encoder, checkpoint.codebooks())


def open_checkpoint(file: Path, encoder: ViTaminConfig | None) -> Checkpoint:
    """Read the names, shapes and `args` of a file, no values. `InputError` if it is not a whole UniTok checkpoint."""
    container = read_pickle(file)
    args = container.get("args") if isinstance(container, Mapping) else None
    if not isinstance(args, Mapping):
        raise InputError(f"{file} holds no args, so it is not a UniTok checkpoint: give {FILE}")
    state = tensors_at(container, ["trainer", "unitok"], where=f"the UniTok checkpoint {file}")
    checkpoint = Checkpoint(file, read_args(args, encoder, file), state)
    checkpoint.check()
    return checkpoint


def _architecture(shape: UniTokShape) -> _Model:
    with torch.device("meta"):
        return _Model(shape)
