"""The `vila_u` tokenizer: `hidden_states[-2]` of VILA-U's own SigLIP, quantised residually against one shared codebook.

Source: the public code of mit-han-lab/vila-u at 096623c. The code of depth d is the vector nearest (L2) to what the
depths before d left over; the last row of a stored codebook is padding and never a code. The towers of the
public model run in half precision; here the encoder runs in `dtype` and the search is always exact.
Shape legend: B views, S edge of a view, P positions, n width, D depths, K vectors of a codebook.
"""

from __future__ import annotations

import torch

from manifests.codebook import Codebooks
from manifests.errors import InputError
from manifests.schema import TokenizerSpec
from tokenize_stage.checkpoints import State, check_shapes, read_safetensors, take
from tokenize_stage.config import ComputeDtype, Device, VilaUTokenizer
from tokenize_stage.encoder import full_precision, resolve_device
from tokenize_stage.identities.vila_u import VilaUFiles, locate
from tokenize_stage.layout import shown
from tokenize_stage.pixels import Normaliser
from tokenize_stage.siglip import SiglipTower, unused_groups
from tokenize_stage.siglip_config import MEAN, STD
from tokenize_stage.tokenizers.residual import ResidualTokenizer

_TOWER = "rqvaesiglip.siglip_model.vision_model."
_IGNORED = {
    "pixel decoder": r"rqvaesiglip\.(post_quant_conv|decoder)\..+",
    "depth head": r"rqtransformer\..+",
    "EMA buffers": r"rqvaesiglip\.quantizer\.codebooks\.\d+\.(cluster_size_ema|embed_ema)",
    "contrastive scale": r"rqvaesiglip\.logit_(scale|bias)",
}


class VilaUEncoder:
    """What enters the quantiser."""

    def __init__(self, files: VilaUFiles, taken: State, *, dtype: ComputeDtype, device: torch.device) -> None:
        """`taken`: checked float32 tensors, under the names they have in the checkpoint."""
        self.device = device
        self._tower = SiglipTower(files.siglip, files.layers)
        self._tower.load(taken, _TOWER, dtype=getattr(torch, dtype), device=device)
        self._layers = files.layers
        self._normalise = Normaliser(files.siglip.image_size, MEAN, STD, device)

    def features(self, views_BSSC: torch.Tensor) -> torch.Tensor:
        """uint8 (B, S, S, 3) on any device -> float32 (B, P, n) on `device`, P row-major over the grid."""
        return self.hidden(self._normalise(views_BSSC))

    @torch.inference_mode()
    def hidden(self, pixels_BCSS: torch.Tensor) -> torch.Tensor:
        """float32 (B, 3, S, S) in [-1, 1] -> float32 (B, P, n), the output of the last layer but one."""
        with full_precision(self.device):
            return self._tower.hidden_states(pixels_BCSS.to(self.device), [self._layers])[self._layers].float()


def load(config: VilaUTokenizer, spec: TokenizerSpec, *, dtype: ComputeDtype, device: Device) -> ResidualTokenizer:
    """The tokenizer of a VILA-U tower. `InputError`, listing keys, if a tensor is missing, unknown or not finite."""
    files = locate(config)
    state = read_safetensors(files.folder.path)
    taken = take(state, _needed(files, state), _ignorable(files), where=files.where)
    encoder = VilaUEncoder(files, taken, dtype=dtype, device=resolve_device(device))
    return ResidualTokenizer(spec, encoder, _codebooks(files, {name: taken[name] for name in _books(files, state)}))


def check(files: VilaUFiles) -> None:
    """Raise `InputError` unless the tower holds the tensors that its configuration speaks of; reads no values."""
    state = read_safetensors(files.folder.path)
    check_shapes(state, _needed(files, state), _ignorable(files), where=files.where)


def read_codebooks(files: VilaUFiles) -> Codebooks:
    """D float32 arrays (K, n) without their padding row; the same array for every depth if they share one."""
    state = read_safetensors(files.folder.path)
    books = _books(files, state)
    stored = {name: state[name] for name in books if name in state}
    return _codebooks(files, take(stored, books, {}, where=files.where))


def _codebooks(files: VilaUFiles, stored: State) -> Codebooks:
    books = list(stored.values())
    if files.shared:
        others = [name for name, book in stored.items() if not torch.equal(book, books[0])]
        if others:
            raise InputError(
                f"{files.where} is configured to have one shared codebook, but {shown(others)} is another than "
                f"that of depth 0: give the configuration that it was trained with"
            )
        books = books[:1] * files.depth
    return [book[:-1].numpy() for book in books]


def _needed(files: VilaUFiles, state: State) -> dict[str, tuple[int, ...]]:
    return SiglipTower(files.siglip, files.layers).needed(_TOWER) | _books(files, state)


def _books(files: VilaUFiles, state: State) -> dict[str, tuple[int, ...]]:
    """The codebooks that must be there: a shared one is kept once, or repeated for every depth."""
    names = [f"rqvaesiglip.quantizer.codebooks.{depth}.weight" for depth in range(files.depth)]
    once = files.shared and not any(name in state for name in names[1:])
    return dict.fromkeys(names[:1] if once else names, (files.codes + 1, files.siglip.width))


def _ignorable(files: VilaUFiles) -> dict[str, str]:
    return unused_groups(files.siglip, files.layers, r"rqvaesiglip\.siglip_model\.") | _IGNORED
