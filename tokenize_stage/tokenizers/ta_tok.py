"""The `ta_tok` tokenizer: SigLIP2 features, projected, and the nearest row of one table (SimVQ): one code a position.

Source: the public code of csuhan/Tar at 47da8e1. With h = `hidden_states[-2]` (averaged over squares of
`pool_scale` x `pool_scale` positions; what is left over at the right and bottom is dropped):
`z = in_linear(tanh(encode_task_layer(h)))`, and the table is `T = embedding_proj(embedding)`, float64 rounded to float32.

**The code**, if the file's arguments say `l2_normalized`: the row of largest cosine, as `cosine_search` defines it
(z and the rows of T brought to length one in float64 and rounded to float32, products in float64, ties to the lower
id). If not: the row of smallest squared distance, as `search.oracle` with one depth defines it. A code is always the
best one: a file whose arguments say `stochastic` makes the public code draw codes at random, unless it is told not to.
The codebook that a visual head is given is the table that is searched.

**Views.** The public code resizes whatever it is given to its own size, bilinearly, with antialiasing or not as the
version of torchvision has it. Here `geometry` has made views of exactly that size (Pillow bicubic), so that nothing is
resized twice; a picture of another size can therefore have other codes here than there.
Shape legend: B views, S edge of a view, P positions, n width of the encoder, m width of the table, K its rows.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from manifests.codebook import Codebooks
from manifests.errors import InputError
from manifests.schema import TokenizerSpec
from tokenize_stage.checkpoints import State, check_shapes, read_pickle, take, tensors_at
from tokenize_stage.config import ComputeDtype, Device, TaTokTokenizer
from tokenize_stage.cosine_search import CosineSearch, unit_codebook
from tokenize_stage.encoder import full_precision, resolve_device
from tokenize_stage.identities.ta_tok import TaTokArguments, TaTokFiles, locate, read_arguments
from tokenize_stage.pixels import Normaliser
from tokenize_stage.search import ResidualSearch
from tokenize_stage.siglip import SiglipTower

_TOWER = "encoder."
_TASK = "encode_task_layer.0."
_PROJECTION = "bottleneck.in_linear."
_EMBEDDING = "bottleneck.regularizer.embedding.weight"
_TABLE = "bottleneck.regularizer.embedding_proj."
_SHIFT, _SCALE = "scale_layer.shift", "scale_layer.scale"


class TaTokEncoder:
    """What enters the quantiser, step by step. The tower computes in `dtype`, the two small projections in float32."""

    def __init__(
        self,
        files: TaTokFiles,
        arguments: TaTokArguments,
        taken: State,
        *,
        dtype: ComputeDtype,
        device: torch.device,
    ) -> None:
        """`taken`: checked float32 tensors, under the names they have in the checkpoint."""
        self.device = device
        self._layer, self._pool_scale, self._grid = arguments.layers, arguments.pool_scale, files.siglip.grid
        self._tower = SiglipTower(files.siglip, arguments.layers)
        self._tower.load(taken, _TOWER, dtype=getattr(torch, dtype), device=device)
        mean, std = _channels(taken[_SHIFT]), _channels(taken[_SCALE])
        self._normalise = Normaliser(files.siglip.image_size, mean, std, device)
        names = [_TASK + "weight", _TASK + "bias", _PROJECTION + "weight", _PROJECTION + "bias"]
        self._task_nn, self._task_n, self._projection_mn, self._projection_m = (
            taken[name].to(device) for name in names
        )

    def features(self, views_BSSC: torch.Tensor) -> torch.Tensor:
        """uint8 (B, S, S, 3) on any device -> float32 (B, P, m) on `device`, P row-major over the (pooled) grid."""
        return self.project(self.task_features(self.pool(self.hidden(self._normalise(views_BSSC)))))

    @torch.inference_mode()
    def hidden(self, pixels_BCSS: torch.Tensor) -> torch.Tensor:
        """float32 (B, 3, S, S), normalised -> float32 (B, P, n) over the whole grid."""
        with full_precision(self.device):
            return self._tower.hidden_states(pixels_BCSS.to(self.device), [self._layer])[self._layer].float()

    @torch.inference_mode()
    def pool(self, hidden_BPn: torch.Tensor) -> torch.Tensor:
        """The mean of each square of positions: float32 (B, P, n), P falls by `pool_scale` squared."""
        if self._pool_scale == 1:
            return hidden_BPn
        squares_BnRC = F.avg_pool2d(hidden_BPn.transpose(1, 2).unflatten(2, self._grid), self._pool_scale)
        return squares_BnRC.flatten(2).transpose(1, 2)

    @torch.inference_mode()
    def task_features(self, hidden_BPn: torch.Tensor) -> torch.Tensor:
        """tanh(encode_task_layer): float32 (B, P, n)."""
        return F.linear(hidden_BPn, self._task_nn, self._task_n).tanh_()

    @torch.inference_mode()
    def project(self, task_BPn: torch.Tensor) -> torch.Tensor:
        """in_linear: float32 (B, P, m), not of length one."""
        return F.linear(task_BPn, self._projection_mn, self._projection_m)


class TaTok:
    """One code a position. See `tokenizers.base.Tokenizer`."""

    def __init__(
        self, spec: TokenizerSpec, encoder: TaTokEncoder, table_Km: npt.NDArray[np.float32], *, normalised: bool
    ) -> None:
        self._spec = spec
        self._table_Km = table_Km
        self.encoder = encoder
        search = CosineSearch if normalised else ResidualSearch
        self._search = search([table_Km], encoder.device)

    @property
    def spec(self) -> TokenizerSpec:
        return self._spec

    @property
    def fallbacks(self) -> int:
        return self._search.fallback_rows if isinstance(self._search, ResidualSearch) else 0

    def encode(self, views_BSSC: torch.Tensor) -> torch.Tensor:
        """uint8 (B, S, S, 3) -> int32 (B, P, 1) on the encoder's device."""
        return self.quantise(self.encoder.features(views_BSSC))

    def quantise(self, features_BPm: torch.Tensor) -> torch.Tensor:
        """float32 (B, P, m) -> int32 (B, P, 1)."""
        return self._search(features_BPm.flatten(0, 1)).unflatten(0, features_BPm.shape[:2])

    def codebooks(self) -> Codebooks:
        return [self._table_Km]


def load(config: TaTokTokenizer, spec: TokenizerSpec, *, dtype: ComputeDtype, device: Device) -> TaTok:
    """The tokenizer of a TA-Tok file. `InputError`, listing keys, if a tensor is missing, unknown or not finite."""
    files = locate(config)
    arguments, state = _open(files)
    taken = take(state, _needed(files, arguments), _ignorable(files, arguments), where=files.where)
    encoder = TaTokEncoder(files, arguments, taken, dtype=dtype, device=resolve_device(device))
    return TaTok(spec, encoder, _table(taken, arguments), normalised=arguments.normalised)


def check(files: TaTokFiles) -> tuple[TaTokArguments, list[float], list[float]]:
    """The file's arguments, and the mean and std of its pixels; `InputError` unless it holds what they speak of."""
    arguments, state = _open(files)
    check_shapes(state, _needed(files, arguments), _ignorable(files, arguments), where=files.where)
    scales = take({name: state[name] for name in (_SHIFT, _SCALE)}, _scales(), {}, where=files.where)
    if not bool((scales[_SCALE] > 0).all()):
        raise InputError(f"{files.where} has a {_SCALE} that is not positive: download it again")
    return arguments, _channels(scales[_SHIFT]), _channels(scales[_SCALE])


def read_codebooks(files: TaTokFiles) -> Codebooks:
    """One float32 array (K, m): the table that is searched."""
    arguments, state = _open(files)
    needed = _table_shapes(arguments)
    taken = take({name: state[name] for name in needed if name in state}, needed, {}, where=files.where)
    return [_table(taken, arguments)]


def _open(files: TaTokFiles) -> tuple[TaTokArguments, State]:
    content = read_pickle(files.checkpoint.path)
    state = tensors_at(content, ["model", "sd"], where=files.where)
    return read_arguments(files, content["model"].get("args")), state


def _table(taken: State, arguments: TaTokArguments) -> npt.NDArray[np.float32]:
    """embedding_proj(embedding), its rows of length one if `normalised`; on the CPU whatever the encoder runs on."""
    weight_mm, bias_m = taken[_TABLE + "weight"].double(), taken[_TABLE + "bias"].double()
    table_Km = F.linear(taken[_EMBEDDING].double(), weight_mm, bias_m).float()
    if arguments.normalised:
        return unit_codebook(table_Km)
    plain: npt.NDArray[np.float32] = table_Km.numpy()
    return plain


def _needed(files: TaTokFiles, arguments: TaTokArguments) -> dict[str, tuple[int, ...]]:
    width, code_dim = files.siglip.width, arguments.code_dim
    return {
        **SiglipTower(files.siglip, arguments.layers).needed(_TOWER),
        **_scales(),
        _TASK + "weight": (width, width),
        _TASK + "bias": (width,),
        _PROJECTION + "weight": (code_dim, width),
        _PROJECTION + "bias": (code_dim,),
        **_table_shapes(arguments),
    }


def _scales() -> dict[str, tuple[int, ...]]:
    return {_SHIFT: (1, 3, 1, 1), _SCALE: (1, 3, 1, 1)}


def _table_shapes(arguments: TaTokArguments) -> dict[str, tuple[int, ...]]:
    code_dim = arguments.code_dim
    return {
        _EMBEDDING: (arguments.codes, code_dim),
        _TABLE + "weight": (code_dim, code_dim),
        _TABLE + "bias": (code_dim,),
    }


def _ignorable(files: TaTokFiles, arguments: TaTokArguments) -> dict[str, str]:
    later = "|".join(map(str, range(arguments.layers, files.siglip.layers))) or "-"
    return {
        "later layers": rf"encoder\.encoder\.layers\.({later})\..+",
        "pooling head": r"encoder\.(post_layernorm|head)\..+",
        "feature decoder": r"(decoder|decode_task_layer|bottleneck\.out_linear)\..+",
        "teacher": r"teacher.*",
        "sampling temperature": r"bottleneck\.regularizer\.stochastic_temperature_inv",
    }


def _channels(scale_1C11: torch.Tensor) -> list[float]:
    return [float(channel) for channel in scale_1C11.flatten()]
