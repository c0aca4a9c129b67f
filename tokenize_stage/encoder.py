"""A frozen Hugging Face vision encoder, run up to the hidden state that is wanted and no further.

Shape legend: B views, S edge of a view, T tokens, P positions (T without class and register tokens), n width.
"""

from __future__ import annotations

import contextlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError
from torch import nn

from manifests.errors import EnvironmentProblem, InputError
from tokenize_stage.config import ComputeDtype, Device
from tokenize_stage.encoder_files import Normalisation, weight_files
from tokenize_stage.pixels import Normaliser

_SHOWN_KEYS = 6
_PREFIX_TOKENS = 2
"""At most this many tokens besides the registers come before the positions: class, and DeiT's distillation token."""

_IGNORED_TENSORS = re.compile(
    r"(^|\.)(text_model|text_projection|visual_projection|language_model|logit_scale|logit_bias|"
    r"classifier|cls_classifier|distillation_classifier|lm_head|decoder|position_ids|mask_token)(\.|$)"
)
"""Groups a checkpoint may hold, or lack, beside the vision encoder: text tower, projections and heads of other tasks,
a stored arange, and the token that stands for masked patches, of which there are none here."""


class VisionEncoder:
    """Features of `hidden_states[layer]`, as `transformers` numbers them: 0 = embeddings, i = output of block i.

    Always the raw output of the block. `transformers` agrees for every encoder with its own vision implementation
    (Dinov2, SigLIP, CLIP, ViT in 5.23); a model that ties its last hidden state to `last_hidden_state` returns
    the output of the final norm at the last index only, where this class does not.
    """

    def __init__(
        self,
        folder: Path,
        *,
        layer: int,
        view_size: int,
        normalisation: Normalisation,
        dtype: ComputeDtype = "float32",
        device: Device = "auto",
    ) -> None:
        """Load strictly: a tensor that the wanted layer needs and the folder lacks is an `InputError` listing it.

        `layer` counts from the end if negative. Only safetensors weights of local files are read, and no code.
        """
        self.device = resolve_device(device)
        self.view_size = view_size
        self._dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]
        model, absent, surplus = _load_model(folder, self._dtype)
        model.requires_grad_(False).eval()
        blocks = _blocks(model, folder)
        self.layer = resolve_layer(layer, len(blocks), folder)
        stack = _stop_before(model, blocks, self.layer)
        self._model = model.to(self.device)
        self._arguments = _position_arguments(model, view_size, folder)
        self._normalise = Normaliser(view_size, normalisation.mean, normalisation.std, self.device)

        entered: set[str] = set()
        hidden_1Tn = self._probe(folder, entered)
        _check_tensors(folder, model, entered, f"{stack}.", absent, surplus)
        self.grid = _grid(model, view_size)
        self.positions = self.grid[0] * self.grid[1]
        self.width = int(hidden_1Tn.shape[-1])
        self._prefix = _prefix_tokens(folder, model, hidden_1Tn, self.positions)

    def features(self, views_BSSC: torch.Tensor) -> torch.Tensor:
        """uint8 (B, S, S, 3) RGB on any device -> float32 (B, P, n) on the encoder's; P row-major over `grid`."""
        return self._hidden(views_BSSC)[:, self._prefix :].float()

    @torch.inference_mode()
    def _hidden(self, views_BSSC: torch.Tensor) -> torch.Tensor:
        pixels_BCSS = self._normalise(views_BSSC).to(self._dtype)
        try:
            with full_precision(self.device):
                self._model(pixels_BCSS, **self._arguments)
        except _Reached as reached:
            return reached.hidden_BTn
        raise InputError(
            f"{type(self._model).__name__} does not run its blocks one after the other: choose another vision encoder"
        )

    def _probe(self, folder: Path, entered: set[str]) -> torch.Tensor:
        """One black view through the model, noting the modules that run: what they hold is what must be loaded."""
        handles = [
            module.register_forward_pre_hook(lambda *_, name=name: entered.add(name))
            for name, module in self._model.named_modules()
        ]
        view = torch.zeros(1, self.view_size, self.view_size, 3, dtype=torch.uint8)
        try:
            return self._hidden(view)
        except torch.OutOfMemoryError:  # a RuntimeError, but not the encoder's fault
            raise
        except (RuntimeError, ValueError) as error:
            raise InputError(
                f"the encoder {folder} cannot take views of {self.view_size} pixels ({error}): "
                "set geometry.size to the size it was trained on"
            ) from error
        finally:
            for handle in handles:
                handle.remove()


def resolve_device(device: Device) -> torch.device:
    """`auto` is CUDA when there is a GPU. `EnvironmentProblem` if CUDA is asked for and absent."""
    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise EnvironmentProblem("device is cuda, but torch sees no GPU on this machine: set device to auto or cpu")
    return torch.device("cuda" if available and device != "cpu" else "cpu")


def resolve_layer(layer: int, blocks: int, folder: Path) -> int:
    """An index into the `blocks` + 1 hidden states, counted from 0."""
    if not -blocks - 1 <= layer <= blocks:
        raise InputError(
            f"layer {layer} does not exist: the encoder {folder} has hidden states 0 to {blocks} "
            f"(or {-blocks - 1} to -1)"
        )
    return layer % (blocks + 1)


class _Reached(Exception):
    """Carries the hidden state out of the model's forward; the rest of the forward never runs."""

    def __init__(self, hidden_BTn: torch.Tensor) -> None:
        super().__init__()
        self.hidden_BTn = hidden_BTn


class _Stop(nn.Module):
    """Stands where the first unwanted block stood."""

    def forward(self, hidden_BTn: torch.Tensor, *_: Any, **__: Any) -> NoReturn:
        raise _Reached(hidden_BTn)


def _load_model(folder: Path, dtype: torch.dtype) -> tuple[nn.Module, set[str], set[str]]:
    """The vision model of a folder, the names of its tensors that were not loaded, and the folder's unused tensors."""
    from transformers import AutoModel

    weight_files(folder)
    config = vision_config(folder)
    try:
        with _quiet():
            model, info = AutoModel.from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                local_files_only=True,
                use_safetensors=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"the encoder {folder} cannot be loaded ({_first_line(error)}): check the folder") from error
    mismatched = {str(entry[0]) for entry in info["mismatched_keys"]}
    return model, {*info["missing_keys"], *mismatched}, set(info["unexpected_keys"])


def vision_config(folder: Path) -> Any:
    """The configuration of the vision model in a folder; of a two-tower folder (CLIPModel, SiglipModel) the vision
    tower's, whose text tower stays on disk.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, RecursionError, StrictDataclassError) as error:
        raise InputError(
            f"{folder / 'config.json'} is not the configuration of a model transformers knows ({_first_line(error)}): "
            "check the folder"
        ) from error
    return getattr(config, "vision_config", config)


def _blocks(model: nn.Module, folder: Path) -> nn.ModuleList:
    count = getattr(model.config, "num_hidden_layers", None)
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == count]
    if len(lists) != 1:
        raise InputError(
            f"the encoder {folder} ({type(model).__name__}) has no single stack of blocks: "
            "choose a plain vision transformer such as Dinov2, SigLIP, CLIP or ViT"
        )
    return lists[0]


def _stop_before(model: nn.Module, blocks: nn.ModuleList, layer: int) -> str:
    """Drop the blocks from `layer` on; what would be the input of the first of them leaves the model instead.

    Returns the name of the stack.
    """
    name = next(name for name, module in model.named_modules() if module is blocks)
    model.set_submodule(name, nn.ModuleList([*blocks[:layer], _Stop()]))
    return name


def _position_arguments(model: nn.Module, view_size: int, folder: Path) -> dict[str, bool]:
    """Ask for interpolated position embeddings where the model must be asked; Dinov2 does it unasked."""
    parameters = inspect.signature(model.forward).parameters
    required = [
        name for name, parameter in parameters.items()
        if parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    ]  # fmt: skip
    if set(required) - {"pixel_values"}:
        raise InputError(
            f"the encoder {folder} ({type(model).__name__}) needs {', '.join(required)}: "
            "choose one that takes square views alone"
        )
    own_size = getattr(model.config, "image_size", None)
    resized = own_size not in (view_size, [view_size] * 2, (view_size, view_size))
    return {"interpolate_pos_encoding": True} if resized and "interpolate_pos_encoding" in parameters else {}


def _grid(model: Any, view_size: int) -> tuple[int, int]:
    patch = model.config.patch_size
    rows, columns = patch if isinstance(patch, list | tuple) else (patch, patch)
    return view_size // rows, view_size // columns


def _prefix_tokens(folder: Path, model: nn.Module, hidden_1Tn: torch.Tensor, positions: int) -> int:
    registers = getattr(model.config, "num_register_tokens", 0)
    prefix = hidden_1Tn.shape[1] - positions if hidden_1Tn.ndim == 3 else -1
    if positions == 0 or not 0 <= prefix - (registers if prefix else 0) <= _PREFIX_TOKENS:
        raise InputError(
            f"the encoder {folder} makes hidden states of shape {tuple(hidden_1Tn.shape)}, not {positions} positions: "
            "choose a plain vision transformer such as Dinov2, SigLIP, CLIP or ViT"
        )
    return prefix


def _check_tensors(
    folder: Path, model: nn.Module, entered: set[str], stack: str, absent: set[str], surplus: set[str]
) -> None:
    """Every tensor of a module that runs must have been loaded; every tensor not used must be in a named group.

    A kept block (below `stack`) may read its children's tensors without running them, so all of them count.
    """
    state = {*dict(model.named_parameters()), *dict(model.named_buffers())}
    needed = {name for name in state if name.startswith(stack) or name.rpartition(".")[0] in entered}
    missing = sorted(name for name in needed & absent if not _IGNORED_TENSORS.search(name))
    if missing:
        raise InputError(
            f"the encoder {folder} lacks, or has in another shape, {len(missing)} of the {len(needed)} tensors needed "
            f"({_shown(missing)}): restore its weights"
        )
    unknown = sorted(name for name in surplus if not _IGNORED_TENSORS.search(name))
    if unknown:
        raise InputError(
            f"the encoder {folder} holds {len(unknown)} tensors that {type(model).__name__} has no place for "
            f"({_shown(unknown)}): its config.json and weights do not belong together"
        )


def _shown(names: list[str]) -> str:
    more = f", and {len(names) - _SHOWN_KEYS} more" if len(names) > _SHOWN_KEYS else ""
    return ", ".join(names[:_SHOWN_KEYS]) + more


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0].rstrip(".")


@contextlib.contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """cuDNN would run the patch embedding in TF32, and could choose another algorithm in each process."""
    if device.type != "cuda":
        yield
        return
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        yield


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the loading bar and the load report of transformers: what it reports is checked here."""
    from transformers.utils import logging

    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()
