"""The `hf_vq` tokenizer: the encode path of the image VQ models that transformers ships, built by its own classes.

Formulas: `encode` of ChameleonVQVAE, Emu3VQVAE and JanusVQVAE, `get_image_features` and `get_image_tokens` of
GlmImageModel (transformers 5.23). Their codes are the argmin of a float32 distance |z|^2 + |c|^2 - 2 z.c over a
matrix of all positions and codes; here `search` decides, exactly and in bounded memory, so only codes tied
within that formula's rounding can differ. Janus is searched as transformers does, without the l2 normalisation that the
original LlamaGen code has; GLM-Image with it, so that its codebook is the table of unit vectors.

Shape legend: B views, S edge of a view, P positions, h edge of the grid, n width of a code vector, K vectors, T frames.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from manifests.codebook import Codebooks
from manifests.errors import InputError
from manifests.schema import TokenizerSpec
from tokenize_stage.checkpoints import State, check_shapes, read_tensor_files, take
from tokenize_stage.config import ComputeDtype, Device, HfVqTokenizer
from tokenize_stage.cosine_search import unit, unit_codebook
from tokenize_stage.encoder import full_precision, resolve_device
from tokenize_stage.identities.hf_vq import OWN_PART, Family, HfVqFiles, locate
from tokenize_stage.pixels import Normaliser
from tokenize_stage.tokenizers.residual import ResidualTokenizer

VIEW_SIZE = 512
"""Default for the families that take any: the least that their image processors make of a picture."""

_DROPPED = ("decoder", "post_quant_conv")
_TABLE = "quantize.embedding.weight"
_COUNTER = "num_batches_tracked"

_OTHER_PARTS: dict[Family, dict[str, str]] = {
    "chameleon": {"language model": r"(model\.)?(embed_tokens|layers|norm)\..+|lm_head\..+"},
    "emu3": {"language model": r"(model\.)?text_model\..+|lm_head\..+"},
    "janus": {
        "language model": r"(model\.)?language_model\..+|lm_head\..+",
        "understanding tower": r"(model\.)?(vision_model|aligner)\..+",
        "generation head": r"(model\.)?generation_(embeddings|aligner|head)\..+",
    },
    "glm_image": {"language model": r"(model\.)?language_model\..+|lm_head\..+"},
}
"""What a whole model holds beside the parts that make codes."""


Parts = dict[str, Any]
"""Modules by their names in the whole model: `vqmodel`, and `visual` in GLM-Image."""


class Layout(NamedTuple):
    """The tensors of a model's files, mapped into memory, and what is asked of them."""

    state: State
    needed: dict[str, tuple[int, ...]]
    ignorable: dict[str, str]
    prefixes: dict[str, str]
    """What stands before the names of a part's tensors: nothing, `vqmodel.` or, in newer files, `model.vqmodel.`."""


class Shape(NamedTuple):
    """What comes of a view."""

    view_size: int
    edge: int
    """Rows, and columns, of the grid."""
    codes: int
    code_dim: int


def load(config: HfVqTokenizer, spec: TokenizerSpec, *, dtype: ComputeDtype, device: Device) -> ResidualTokenizer:
    """The tokenizer of a VQ model. `InputError`, listing keys, if a tensor is missing, unknown or not finite."""
    files = locate(config)
    encoder = HfVqEncoder(files, spec.view_size, dtype=dtype, device=resolve_device(device))
    return ResidualTokenizer(spec, encoder, encoder.codebooks)


def read_shape(files: HfVqFiles) -> Shape:
    """Shape of the codes, once every tensor was seen to be there in the right shape; no value is read."""
    parts = _build(files)
    _layout(files, parts)
    stride = _stride(parts)
    size = files.view_size or _default_view_size(files, stride)
    if size % stride:
        raise InputError(
            f"{files.where} makes one position of {stride} x {stride} pixels, which {size} pixels are no multiple of: "
            f"set view_size to {max(size // stride, 1) * stride}"
        )
    codes, code_dim = parts["vqmodel"].quantize.embedding.weight.shape
    return Shape(size, size // stride, codes, code_dim)


def read_codebooks(files: HfVqFiles) -> Codebooks:
    """The one codebook (K, n) that is searched; no encoder is built."""
    layout = _layout(files, _build(files))
    key = layout.prefixes["vqmodel"] + _TABLE
    return [_codebook(files, take({key: layout.state[key]}, {key: layout.needed[key]}, {}, where=files.where)[key])]


class HfVqEncoder:
    """A VQ model up to what its quantiser searches for."""

    def __init__(self, files: HfVqFiles, view_size: int, *, dtype: ComputeDtype, device: torch.device) -> None:
        self.device = device
        self._dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]
        self._cosine = files.family == "glm_image"
        parts = _build(files)
        layout = _layout(files, parts)
        taken = take(layout.state, layout.needed, layout.ignorable, where=files.where)
        self.codebooks = [_codebook(files, taken[layout.prefixes["vqmodel"] + _TABLE])]
        for part, module in parts.items():
            _fill(module, taken, layout.prefixes[part])
            module.requires_grad_(False).eval().to(device=device, dtype=self._dtype)
        self._latents = _LATENTS[files.family](parts)
        self._normalise = Normaliser(view_size, files.pixels.mean, files.pixels.std, device)

    @torch.inference_mode()
    def features(self, views_BSSC: torch.Tensor) -> torch.Tensor:
        """uint8 (B, S, S, 3) on any device -> float32 (B, P, n) on `device`, P row-major over the grid."""
        pixels_BCSS = self._normalise(views_BSSC).to(self._dtype)
        with full_precision(self.device):
            latents_Bnhh = self._latents(pixels_BCSS)
        features_BPn = latents_Bnhh.flatten(2).transpose(1, 2).float()
        return unit(features_BPn) if self._cosine else features_BPn


Latents = Callable[[torch.Tensor], torch.Tensor]
"""Normalised pixels (B, 3, S, S) -> what is quantised (B, n, h, h)."""


def _convolutional(parts: Parts) -> Latents:
    vq = parts["vqmodel"]
    return lambda pixels_BCSS: vq.quant_conv(vq.encoder(pixels_BCSS))


def _emu3(parts: Parts) -> Latents:
    """An image is T equal frames; what happens before the frames meet is computed once, not T times."""
    vq = parts["vqmodel"]
    frames, down, residual = vq.config.temporal_downsample_factor, vq.encoder.time_conv, vq.encoder.time_res_stack
    vq.encoder.time_conv, vq.encoder.time_res_stack = nn.ModuleList(), nn.ModuleList()

    def latents(pixels_BCSS: torch.Tensor) -> torch.Tensor:
        frame_B1nhh = vq.encoder(pixels_BCSS[:, None])
        hidden_BnThh = frame_B1nhh.transpose(1, 2).repeat(1, 1, frames, 1, 1)
        for layer in down:
            hidden_BnThh = layer(hidden_BnThh)
            hidden_BnThh = hidden_BnThh * torch.sigmoid(hidden_BnThh)
        for layer in residual:
            hidden_BnThh = layer(hidden_BnThh)
        quantised_Bn1hh: torch.Tensor = vq.quant_conv(hidden_BnThh)
        return quantised_Bn1hh.squeeze(2)

    return latents


def _glm_image(parts: Parts) -> Latents:
    vq, visual = parts["vqmodel"], parts["visual"]
    patch = visual.config.patch_size

    def latents(pixels_BCSS: torch.Tensor) -> torch.Tensor:
        count, edge = len(pixels_BCSS), pixels_BCSS.shape[-1] // patch
        tiles = pixels_BCSS.unflatten(3, (edge, patch)).unflatten(2, (edge, patch))  # (B, C, h, p, h, p)
        patches = tiles.permute(0, 2, 4, 1, 3, 5).reshape(count * edge * edge, -1)
        grids_B3 = torch.tensor([[1, edge, edge]] * count, device=patches.device)
        hidden = visual(patches, grid_thw=grids_B3).last_hidden_state
        quantised: torch.Tensor = vq.quant_conv(hidden.view(count, edge, edge, -1).permute(0, 3, 1, 2).contiguous())
        return quantised

    return latents


_LATENTS: dict[Family, Callable[[Parts], Latents]] = {
    "chameleon": _convolutional,
    "emu3": _emu3,
    "janus": _convolutional,
    "glm_image": _glm_image,
}


def _build(files: HfVqFiles) -> Parts:
    """The model on the meta device, without the way back to pixels."""
    import transformers

    with _describing(files), torch.device("meta"):
        if files.family == "glm_image":
            config = transformers.GlmImageConfig.from_pretrained(files.folder.path, local_files_only=True)
            parts = {
                "vqmodel": transformers.GlmImageVQVAE(config.vq_config),
                "visual": transformers.GlmImageVisionModel(config.vision_config),
            }
        else:
            name = {"chameleon": "Chameleon", "emu3": "Emu3", "janus": "Janus"}[files.family]
            # Of a whole model's file, `from_pretrained` takes the section `vq_config` by itself.
            kind = getattr(transformers, f"{name}VQVAEConfig")
            vq_config = kind.from_pretrained(files.folder.path, local_files_only=True)
            parts = {"vqmodel": getattr(transformers, f"{name}VQVAE")(vq_config)}
    if files.family == "glm_image" and parts["visual"].config.spatial_merge_size != 1:
        raise InputError(
            f"{files.config} merges neighbouring positions (spatial_merge_size), whose codes would not stand row by row: "
            "give a model that merges none"
        )
    for child in _DROPPED:
        if hasattr(parts["vqmodel"], child):
            delattr(parts["vqmodel"], child)
    return parts


@contextlib.contextmanager
def _describing(files: HfVqFiles) -> Iterator[None]:
    """What a configuration that makes no sense raises, here or there in transformers, is the user's to hear."""
    from huggingface_hub.errors import StrictDataclassError

    try:
        yield
    except (
        OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, ArithmeticError, StrictDataclassError
    ) as error:  # fmt: skip
        reason = (str(error).strip() or type(error).__name__).split("\n", 1)[0].rstrip(".")
        raise InputError(f"{files.config} does not describe a VQ model ({reason}): restore it") from error


def _stride(parts: Parts) -> int:
    """Edge of the square of pixels that becomes one position."""
    if "visual" in parts:
        return int(parts["visual"].config.patch_size)
    return int(2 ** (len(parts["vqmodel"].config.channel_multiplier) - 1))


def _default_view_size(files: HfVqFiles, stride: int) -> int:
    import transformers

    with _describing(files):
        if files.family == "chameleon":
            return int(transformers.ChameleonVQVAEConfig.from_pretrained(files.folder.path).resolution)
        if files.family == "janus":
            # In a whole Janus the number of patches is that of its other tower; its configuration works it out.
            kind = transformers.JanusConfig if files.whole else transformers.JanusVQVAEConfig
            config = kind.from_pretrained(files.folder.path)
            return int((config.vq_config if files.whole else config).num_patches) * stride
    return VIEW_SIZE


def _codebook(files: HfVqFiles, table_Kn: torch.Tensor) -> npt.NDArray[np.float32]:
    """The vectors that are searched."""
    return unit_codebook(table_Kn) if files.family == "glm_image" else table_Kn.numpy()


def _layout(files: HfVqFiles, parts: Parts) -> Layout:
    """The tensors of the files, names, shapes and types checked."""
    state = read_tensor_files(files.weights)
    before = next((match["prefix"] for key in state if (match := OWN_PART.fullmatch(key))), "model.")
    prefixes = {part: f"{before}{part}." if files.whole else "" for part in parts}
    needed = {
        prefixes[part] + name: tuple(tensor.shape)
        for part, module in parts.items() for name, tensor in module.state_dict().items() if not name.endswith(_COUNTER)
    }  # fmt: skip
    vq = prefixes["vqmodel"].replace(".", r"\.")
    ignorable = {"pixel decoder": rf"{vq}({'|'.join(_DROPPED)})\..+", "batch counters": rf"{vq}.+\.{_COUNTER}"}
    if files.whole:
        ignorable |= _OTHER_PARTS[files.family]
    check_shapes(state, needed, ignorable, where=files.where)
    return Layout(state, needed, ignorable, prefixes)


def _fill(module: nn.Module, taken: State, prefix: str) -> None:
    """Give a module its tensors; how many batches a batch norm once saw is not used, and zero."""
    own = {
        name: torch.zeros((), dtype=torch.int64) if name.endswith(_COUNTER) else taken[prefix + name]
        for name in module.state_dict()
    }
    module.load_state_dict(own, strict=True, assign=True)
