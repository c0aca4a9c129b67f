"""The `qlip` tokenizer: binary spherical quantisation (BSQ) of a text-aligned tower's features, bits grouped into codes.

Source: the paper (Zhao et al., "QLIP", 2025) and the layout of NVlabs/QLIP at cf86fcc. A feature is scaled to length one
and each of its E numbers becomes a bit, 1 where it is above zero. The bits of a group make a code, the first bit the
most significant; sums are taken in integers (the public code sums 28 bits in float32, which loses the lowest).
Shape legend: B views, S edge of a view, P positions, n width, E bits of a position, D groups, g bits of a group.
"""

from __future__ import annotations

import re

import torch
import torch.nn.functional as F
from torch import nn

from manifests.codebook import Codebooks
from manifests.errors import InputError
from manifests.schema import TokenizerSpec
from tokenize_stage.checkpoints import State, check_shapes, fill, read_safetensors, shapes_of, take
from tokenize_stage.config import ComputeDtype, Device, QlipTokenizer
from tokenize_stage.encoder import full_precision, resolve_device
from tokenize_stage.encoder_files import Normalisation
from tokenize_stage.identities.qlip import EvaShape, QlipFiles, implicit_codebooks, locate
from tokenize_stage.pixels import Normaliser
from tokenize_stage.tokenizers.eva_vit import EvaViT, rope_tables

_TOWER = "vision_model."
_ROPE = re.compile(r"vision_model\.(encoder\.layers\.\d+\.self_attn\.)?rope\.freqs_(cos|sin)")
_ROPE_TOLERANCE = 2.0**-8
"""A table that went through bfloat16 is off by 2^-9 at most."""

_IGNORED = {
    "text tower": r"text_model\..+|text_projection\.weight|logit_scale",
    "contrastive head": r"vision_model\.post_layernorm\.(weight|bias)|visual_projection\.weight",
    "pixel decoder": r"vision_model\.quant_embed_post\..+|vision_decoder\..+",
}


class _Model(EvaViT):
    """The tower with the layers that narrow its features to one number per bit, which stand beside its own."""

    def __init__(self, shape: EvaShape, bits: int) -> None:
        super().__init__(shape)
        self.quant_embed = nn.ModuleDict(
            {"c_fc": nn.Linear(shape.width, shape.width), "c_proj": nn.Linear(shape.width, bits)}
        )

    def project(self, hidden_BPn: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.quant_embed["c_proj"](F.gelu(self.quant_embed["c_fc"](hidden_BPn)))
        return out


class QlipEncoder:
    """What enters the quantiser."""

    def __init__(
        self, files: QlipFiles, taken: State, pixels: Normalisation, *, dtype: ComputeDtype, device: torch.device
    ) -> None:
        """`taken`: checked float32 tensors, under the names they have in the checkpoint."""
        self.device = device
        self._dtype: torch.dtype = getattr(torch, dtype)
        self._model = _architecture(files)
        fill(self._model, taken, _TOWER)
        self._model.to(device=device, dtype=self._dtype)
        self._cos_Pd, self._sin_Pd = (table.to(device) for table in _rope(files, taken))
        self._normalise = Normaliser(files.shape.view_size, pixels.mean, pixels.std, device)

    def features(self, views_BSSC: torch.Tensor) -> torch.Tensor:
        """uint8 (B, S, S, 3) on any device -> float32 (B, P, E) on `device`, before quantisation."""
        return self.project(self.hidden(self._normalise(views_BSSC)))

    @torch.inference_mode()
    def hidden(self, pixels_BCSS: torch.Tensor) -> torch.Tensor:
        """float32 (B, 3, S, S), normalised -> float32 (B, P, n): the tower's output without the class token."""
        with full_precision(self.device):
            hidden_BPn: torch.Tensor = self._model(pixels_BCSS.to(self._dtype), self._cos_Pd, self._sin_Pd)
        return hidden_BPn.float()

    @torch.inference_mode()
    def project(self, hidden_BPn: torch.Tensor) -> torch.Tensor:
        """float32 (B, P, n) -> float32 (B, P, E): two linear layers with the exact GELU between them."""
        return self._model.project(hidden_BPn.to(self._dtype)).float()


class Qlip:
    """An encoder and the signs of what it makes. See `tokenizers.base.Tokenizer`."""

    fallbacks = 0
    """Nothing is searched."""

    def __init__(self, spec: TokenizerSpec, encoder: QlipEncoder, codebooks: Codebooks) -> None:
        self._spec = spec
        self.encoder = encoder
        self._codebooks = codebooks

    @property
    def spec(self) -> TokenizerSpec:
        return self._spec

    def encode(self, views_BSSC: torch.Tensor) -> torch.Tensor:
        """uint8 (B, S, S, 3) -> int32 (B, P, D) on the encoder's device."""
        bits_BPE = binarise(normalised(self.encoder.features(views_BSSC)))
        return group(bits_BPE, self._spec.code_dim)

    def codebooks(self) -> Codebooks:
        return self._codebooks


def normalised(features: torch.Tensor) -> torch.Tensor:
    """float32 (..., E) of length one. `InputError` on NaN or infinity."""
    if not bool(torch.isfinite(features).all()):
        raise InputError("the features hold NaN or infinity: check the tokenizer's weights and dtype")
    return F.normalize(features, dim=-1)


def binarise(features: torch.Tensor) -> torch.Tensor:
    """(..., E) -> int32 (..., E): 1 where a number is above zero; zero itself gives 0."""
    return (features > 0).int()


def group(bits: torch.Tensor, group_bits: int) -> torch.Tensor:
    """int32 (..., E) -> int32 (..., D) codes of g <= 30 bits each, the first bit the most significant."""
    place_g = 1 << torch.arange(group_bits - 1, -1, -1, dtype=torch.int32, device=bits.device)
    return (bits.unflatten(-1, (-1, group_bits)) * place_g).sum(-1, dtype=torch.int32)


def load(config: QlipTokenizer, spec: TokenizerSpec, *, dtype: ComputeDtype, device: Device) -> Qlip:
    """The tokenizer of a QLIP folder. `InputError`, listing keys, if a tensor is missing, unknown or not finite."""
    files = locate(config)
    state = read_safetensors(files.folder)
    taken = take(state, _needed(files, state), _IGNORED, where=files.where)
    pixels = Normalisation(tuple(spec.settings["image_mean"]), tuple(spec.settings["image_std"]))
    encoder = QlipEncoder(files, taken, pixels, dtype=dtype, device=resolve_device(device))
    return Qlip(spec, encoder, implicit_codebooks(files.bits, files.group_bits))


def check(files: QlipFiles) -> None:
    """Raise `InputError` unless the folder holds the tensors that its configuration speaks of; reads no values."""
    state = read_safetensors(files.folder)
    check_shapes(state, _needed(files, state), _IGNORED, where=files.where)


def _architecture(files: QlipFiles) -> _Model:
    with torch.device("meta"):
        return _Model(files.shape, files.bits)


def _needed(files: QlipFiles, state: State) -> dict[str, tuple[int, ...]]:
    table = (files.shape.grid**2, files.shape.head_width)
    tables = dict.fromkeys((name for name in state if _ROPE.fullmatch(name)), table)
    return shapes_of(_architecture(files), _TOWER) | tables


def _rope(files: QlipFiles, taken: State) -> tuple[torch.Tensor, torch.Tensor]:
    """The tables of the checkpoint, repeated for every layer or kept once; computed if it has none."""
    cos_Pd, sin_Pd = rope_tables(files.shape.grid, files.shape.head_width)
    return _stored(files, taken, "cos", cos_Pd), _stored(files, taken, "sin", sin_Pd)


def _stored(files: QlipFiles, taken: State, which: str, computed_Pd: torch.Tensor) -> torch.Tensor:
    stored = {name: tensor for name, tensor in taken.items() if _ROPE.fullmatch(name) and name.endswith(which)}
    table_Pd = next(iter(stored.values()), computed_Pd)
    for name, other_Pd in stored.items():
        if not torch.equal(other_Pd, table_Pd) or (other_Pd - computed_Pd).abs().max() > _ROPE_TOLERANCE:
            raise InputError(
                f"{files.where} holds a table of rotary positions ({name}) that is not the one of its grid: "
                "check that it is a QLIP model and download it again"
            )
    return table_Pd
