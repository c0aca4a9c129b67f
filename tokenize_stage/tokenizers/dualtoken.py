"""DualToken (arXiv 2503.14324): one SigLIP, residual codebooks on features of a late layer and of an early one.

Two generations of checkpoints exist, with other names and another path to the quantiser; `identities.dualtoken` tells
them apart. Nearest vector by squared Euclidean distance, nothing normalised, D rounds on the residual in both.

Shape legend: B views, S edge of a view, P positions, n width of SigLIP, m width of a code vector, D depths, K vectors.
"""

from __future__ import annotations

import math
import re

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn import functional as F

from manifests.errors import InputError
from manifests.schema import TokenizerSpec
from tokenize_stage.checkpoints import State, check_shapes, fill, read_pickle, shapes_of, take, tensors_at
from tokenize_stage.config import ComputeDtype, Device, DualTokenTokenizer
from tokenize_stage.encoder import full_precision, resolve_device
from tokenize_stage.identities.dualtoken import NORM_GROUPS, Branch, DualTokenFiles, find
from tokenize_stage.layout import shown
from tokenize_stage.pixels import Normaliser
from tokenize_stage.siglip import SiglipTower, unused_groups
from tokenize_stage.siglip_config import MEAN, STD
from tokenize_stage.tokenizers.attention_projection import AttentionProjection
from tokenize_stage.tokenizers.residual import ResidualTokenizer

TOWER = "siglip_model.vision_model."

_UNUSED = {
    1: r"(decoder|post_quant_conv|postquant_visual)\..+",
    2: r"(decoder|post_quant_conv|postquant_pix|postquant_sem)\..+",
}
"""The way from codes back to pixels (and, in the second generation, to SigLIP's pooling head)."""

_BRANCHES = {
    1: ("quantizer_semantic", "quantizer", "prequant_visual"),
    2: ("quantizer_sem", "quantizer_pix", "prequant_sem", "prequant_pix", "prequant_shortcut"),
}


def load(config: DualTokenTokenizer, spec: TokenizerSpec, *, dtype: ComputeDtype, device: Device) -> ResidualTokenizer:
    """The tokenizer of one branch. `InputError`, listing keys, unless the checkpoint holds exactly what it should."""
    files = find(config)
    encoder = DualTokenEncoder(files, dtype=dtype, device=resolve_device(device))
    return ResidualTokenizer(spec, encoder, encoder.codebooks)


def check_checkpoint(files: DualTokenFiles) -> None:
    """The generation, and the name, shape and type of every tensor; no value is read."""
    _check(files, _read(files), _Modules(files))


def read_codebooks(files: DualTokenFiles) -> list[npt.NDArray[np.float32]]:
    """The D codebooks (K, m) alone, without the padding row; no encoder is built."""
    branch = files.branch
    state = _read(files)
    own = {key: tensor for key, tensor in state.items() if key.startswith(f"{branch.quantizer}.")}
    where = _where(files)
    taken = take(own, _codebook_shapes(branch, state), _ema(branch), where=where)
    return _codebooks(branch, taken, where)


class DualTokenEncoder:
    """SigLIP up to the branch's layer, and the branch's projection: the features that are quantised."""

    def __init__(self, files: DualTokenFiles, *, dtype: ComputeDtype, device: torch.device) -> None:
        self.device = device
        self._branch = files.branch
        self._dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]
        self._modules = _Modules(files)
        state, where = _read(files), _where(files)
        _check(files, state, self._modules)
        needed = _needed(files, state, self._modules)
        taken = take(state, needed, _ignorable(files), where=where)
        del state
        self._modules.tower.load(taken, TOWER, dtype=self._dtype, device=device)
        for prefix, module in self._modules.projections.items():
            fill(module, taken, f"{prefix}.")
            module.to(device=device, dtype=self._dtype)
        self.codebooks = _codebooks(files.branch, taken, where)
        self._normalise = Normaliser(files.siglip.image_size, MEAN, STD, device)

    @torch.inference_mode()
    def features(self, views_BSSC: torch.Tensor) -> torch.Tensor:
        """uint8 (B, S, S, 3) -> float32 (B, P, m)."""
        branch, modules = self._branch, self._modules
        pixels_BCSS = self._normalise(views_BSSC).to(self._dtype)
        wanted = {branch.layer, *((branch.shortcut[1],) if branch.shortcut else ())}
        with full_precision(self.device):
            hidden = modules.tower.hidden_states(pixels_BCSS, wanted)
            features_BPm = hidden[branch.layer]
            if branch.projection:
                features_BPm = modules.projections[branch.projection](features_BPm)
            if branch.shortcut:
                prefix, layer, weight = branch.shortcut
                features_BPm = features_BPm + weight * modules.projections[prefix](hidden[layer])
        return features_BPm.float()


class ConvolutionProjection(nn.Module):
    """What the first generation puts appearance features through: a residual block of a 1x1 and a 3x3 convolution."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(NORM_GROUPS, width, eps=1e-6)
        self.conv1 = nn.Conv2d(width, out, 1)
        self.norm2 = nn.GroupNorm(NORM_GROUPS, out, eps=1e-6)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        if width != out:
            self.nin_shortcut = nn.Conv2d(width, out, 1)

    def forward(self, x_BPn: torch.Tensor) -> torch.Tensor:
        """(B, P, n) -> (B, P, m); P is a square grid, row-major."""
        side = math.isqrt(x_BPn.shape[1])
        x_BnHW = x_BPn.transpose(1, 2).unflatten(2, (side, side)).contiguous()
        inner = self.conv1(F.silu(self.norm1(x_BnHW)))
        inner = self.conv2(F.silu(self.norm2(inner)))
        straight = self.nin_shortcut(x_BnHW) if hasattr(self, "nin_shortcut") else x_BnHW
        mapped: torch.Tensor = straight + inner
        return mapped.flatten(2).transpose(1, 2)


class _Modules:
    """The architecture of a branch on the meta device: what there must be tensors for."""

    def __init__(self, files: DualTokenFiles) -> None:
        branch, width = files.branch, files.siglip.width
        kind = ConvolutionProjection if branch.generation == 1 else AttentionProjection
        prefixes = [branch.projection, branch.shortcut[0] if branch.shortcut else None]
        self.tower = SiglipTower(files.siglip, branch.blocks)
        with torch.device("meta"):
            self.projections = {prefix: kind(width, branch.code_dim) for prefix in prefixes if prefix}


def _where(files: DualTokenFiles) -> str:
    return f"the DualToken checkpoint {files.checkpoint}"


def _read(files: DualTokenFiles) -> State:
    return tensors_at(read_pickle(files.checkpoint), ["state_dict"], where=_where(files))


def _check(files: DualTokenFiles, state: State, modules: _Modules) -> None:
    generation = _generation(state, _where(files))
    if generation != files.branch.generation:
        raise InputError(
            f"{_where(files)} is of generation {generation}, but its configuration {files.config} is of generation "
            f"{files.branch.generation}: give the configuration that belongs to the checkpoint"
        )
    check_shapes(state, _needed(files, state, modules), _ignorable(files), where=_where(files))


def _generation(state: State, where: str) -> int:
    """1 or 2, told by the names of the quantisers."""
    parts = {key.split(".", 1)[0] for key in state}
    if "quantizer_sem" in parts:
        return 2
    if "quantizer_pixel" in parts or "prequant_semantic" in parts:
        marks = sorted(parts & {"quantizer_pixel", "prequant_semantic"})
        raise InputError(
            f"{where} is of a generation that is not supported (it holds {', '.join(marks)}): "
            "use the one that ASVR used (quantizer_semantic and quantizer) or the newest (quantizer_sem)"
        )
    if "quantizer_semantic" in parts:
        return 1
    raise InputError(
        f"{where} holds no semantic quantiser (it has {shown(sorted(parts))}): check which checkpoint it is"
    )


def _needed(files: DualTokenFiles, state: State, modules: _Modules) -> dict[str, tuple[int, ...]]:
    needed = modules.tower.needed(TOWER) | _codebook_shapes(files.branch, state)
    for prefix, module in modules.projections.items():
        needed |= shapes_of(module, f"{prefix}.")
    return needed


def _codebook_shapes(branch: Branch, state: State) -> dict[str, tuple[int, ...]]:
    """K + 1 rows each, the last one for padding. A shared codebook may be stored once or once for each depth."""
    keys = [f"{branch.quantizer}.codebooks.{depth}.weight" for depth in range(len(branch.sizes))]
    if branch.shared and not any(key in state for key in keys[1:]):
        keys = keys[:1]
    return {key: (size + 1, branch.code_dim) for key, size in zip(keys, branch.sizes, strict=False)}


def _codebooks(branch: Branch, taken: State, where: str) -> list[npt.NDArray[np.float32]]:
    keys = [key for key in taken if key.startswith(f"{branch.quantizer}.codebooks.")]
    books = [taken[key][:-1].contiguous().numpy() for key in keys]
    if not branch.shared:
        return books
    if any(not np.array_equal(book, books[0]) for book in books[1:]):
        raise InputError(
            f"{where} holds different codebooks in {branch.quantizer}, but its configuration says that they are shared: "
            "give the configuration that belongs to the checkpoint"
        )
    return [books[0]] * len(branch.sizes)


def _ignorable(files: DualTokenFiles) -> dict[str, str]:
    branch = files.branch
    own = {branch.quantizer, branch.projection, branch.shortcut[0] if branch.shortcut else None}
    others = "|".join(re.escape(name) for name in _BRANCHES[branch.generation] if name not in own)
    return unused_groups(files.siglip, branch.blocks, r"siglip_model\.") | {
        "pixel decoder": _UNUSED[branch.generation],
        "other branch": rf"({others})\..+",
        **_ema(branch),
    }


def _ema(branch: Branch) -> dict[str, str]:
    depths = "|".join(map(str, range(len(branch.sizes))))
    return {"EMA buffers": rf"{branch.quantizer}\.codebooks\.({depths})\.(cluster_size_ema|embed_ema)"}
