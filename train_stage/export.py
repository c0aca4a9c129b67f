"""A trained model as a plain Hugging Face LLaVA or LLaVA-NeXT folder, which nothing of this project is needed to load.

Weights have the names that published llava-hf files have (`language_model.model.*`, `vision_tower.vision_model.*`),
because older readers know no other. The visual head, which inference does without, is a file of its own.
"""

from __future__ import annotations

import copy
import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor
from transformers import (
    GenerationConfig,
    LlavaImageProcessorPil,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaProcessor,
    PreTrainedTokenizerBase,
)
from transformers.core_model_loading import revert_weight_conversion

from manifests.errors import InputError
from manifests.geometry import background_from_mean
from manifests.schema import Geometry
from train_stage import tower
from train_stage.discrete_input import save_discrete
from train_stage.export_marker import MADE_FROM, MARKER_FILE
from train_stage.model import AsvrModel
from train_stage.tensor_files import save_tensors, share, tensor_storage_errors

log = logging.getLogger(__name__)

HEAD_FILE = "visual_head.safetensors"
CARD_FILE = "README.md"
SHARD_SIZE = "5GB"


def export_llava(
    model: AsvrModel,
    tokenizer: PreTrainedTokenizerBase,
    geometry: Geometry,
    output: Path,
    *,
    chat_template: str,
    stop_tokens: Sequence[int] = (),
    made_from: Mapping[str, Any] | None = None,
    card: str | None = None,
) -> None:
    """Write `output`: config, weights, generation config, processor and, if there is one, the visual head.

    The folder appears whole or not at all; an earlier export of that name is replaced. It is read by
    `AutoModelForImageTextToText.from_pretrained(output)` and `AutoProcessor.from_pretrained(output, backend="pil")`.
    Transformers prefers torchvision's resizing where torchvision is installed; `backend="pil"` gives the pixels that
    training saw. A model that is shown codes has a form and a loader of its own, `discrete_llava`.

    Args:
        geometry: that of the last phase; the processor repeats it.
        chat_template: the Jinja source of the template the model was instructed with.
        stop_tokens: ids that end an answer of that template, see `ChatEncoder.stop_tokens`; the tokenizer's end token does
            always.
        made_from: `origin_of` the checkpoint, by which it is told later whether the export is still that of its run.
        card: the text of its README.md.

    Raises:
        InputError: `output` holds something else than an export.
        StorageError: the disk refuses; nothing is left behind then.
    """
    _refuse_other_folders(output)
    generation = generation_settings(tokenizer, stop_tokens)
    draft = output.with_name(f"{output.name}.tmp")
    shutil.rmtree(draft, ignore_errors=True)
    try:
        with tensor_storage_errors(draft):
            draft.mkdir(parents=True)
            if model.code_embedding is None:
                _save_llava(model, tokenizer, geometry, draft, chat_template)
                generation.save_pretrained(draft)
            else:
                save_discrete(model, tokenizer, geometry, draft, chat_template, generation)
            _save_marker(geometry, made_from, draft / MARKER_FILE)
            if card is not None:
                (draft / CARD_FILE).write_text(card, encoding="utf-8")
            if model.terms:
                _save_heads(model, draft / HEAD_FILE)
            if output.exists():
                shutil.rmtree(output)
            draft.replace(output)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    log.info("exported to %s", output)


def _save_llava(
    model: AsvrModel, tokenizer: PreTrainedTokenizerBase, geometry: Geometry, folder: Path, chat_template: str
) -> None:
    save_torch_state_dict(llava_weights(model), folder, max_shard_size=SHARD_SIZE)
    for path in folder.iterdir():
        share(path)
    _save_configs(model, tokenizer, geometry, folder)
    save_processor(make_processor(model, tokenizer, geometry, chat_template), folder)


def llava_weights(model: AsvrModel) -> dict[str, Tensor]:
    """The LLaVA weights under their published names; a tied output layer is left out, as published files do."""
    llava = model.llava
    state = llava.state_dict()
    if llava.lm_head.weight is llava.get_input_embeddings().weight:
        del state["lm_head.weight"]
    prefix = tower.layout_of(model.vision_tower.config).published_prefix
    renamed = {}
    for name, tensor in revert_weight_conversion(llava, state).items():
        part, _, rest = name.partition(".")
        renamed[f"{part}.{prefix}{rest}" if part == "vision_tower" else name] = tensor.detach().contiguous().cpu()
    return renamed


def make_processor(
    model: AsvrModel, tokenizer: PreTrainedTokenizerBase, geometry: Geometry, chat_template: str
) -> LlavaProcessor | LlavaNextProcessor:
    """The processor that turns pictures and prompts into what the model was trained on.

    Its pixels equal `manifests.geometry.make_views` on the RGB picture, with the tower's mean and standard deviation.
    What has no counterpart there is another background than the processors' own: int(255 * mean) for `pad`, black for
    `anyres`. That is logged as a warning, not refused, because the model is as good as it was.
    """
    vision = model.vision_tower.config
    several_views = geometry.mode == "anyres"
    _warn_of_background(geometry, model.pixel_norm.mean)
    square = {"height": geometry.size, "width": geometry.size}
    shared = {
        "do_resize": True,
        "size": {"shortest_edge": geometry.size} if geometry.mode in ("crop", "anyres") else square,
        "resample": 3,  # bicubic
        "do_center_crop": geometry.mode in ("crop", "anyres"),  # a view of anyres is as large as its crop
        "crop_size": square,
        "image_mean": list(model.pixel_norm.mean),
        "image_std": list(model.pixel_norm.std),
    }
    image_processor: LlavaImageProcessorPil | LlavaNextImageProcessorPil
    if several_views:
        pinpoints = [list(pinpoint) for pinpoint in geometry.grid_pinpoints]
        image_processor = LlavaNextImageProcessorPil(**shared, do_pad=True, image_grid_pinpoints=pinpoints)
    else:
        image_processor = LlavaImageProcessorPil(**shared, do_pad=geometry.mode == "pad")
    return (LlavaNextProcessor if several_views else LlavaProcessor)(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=vision.patch_size,
        vision_feature_select_strategy=tower.select_strategy(vision),
        num_additional_image_tokens=tower.layout_of(vision).class_tokens,
        image_token=tokenizer.convert_ids_to_tokens(model.llava.config.image_token_id),
        chat_template=chat_template,
    )


def _warn_of_background(geometry: Geometry, mean: Sequence[float]) -> None:
    own = {"pad": background_from_mean(mean), "anyres": (0, 0, 0)}.get(geometry.mode, geometry.background)
    if own != geometry.background:
        log.warning(
            "training padded pictures with %s, but the exported processor pads with %s, the only colour that its class "
            "knows; set geometry.background to that before the next run",
            geometry.background,
            own,
        )


def save_processor(processor: LlavaProcessor | LlavaNextProcessor, folder: Path) -> None:
    """Tokenizer, chat template, processor_config.json and preprocessor_config.json.

    Transformers 5 puts the image processor inside processor_config.json, where older readers do not look for it and
    stumble over it; published folders have it in a file of its own, which all of them read.
    """
    processor.save_pretrained(folder)
    path = folder / "processor_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings.pop("image_processor", None)
    path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    processor.image_processor.save_pretrained(folder)


def _save_configs(model: AsvrModel, tokenizer: PreTrainedTokenizerBase, geometry: Geometry, folder: Path) -> None:
    config = copy.deepcopy(model.llava.config)
    rows, columns = tower.tower_grid(model.vision_tower.config, geometry.size)
    config.architectures = [type(model.llava).__name__]
    config.dtype = model.llava.lm_head.weight.dtype
    config.image_seq_length = rows * columns
    config.pad_token_id = tokenizer.pad_token_id
    config.save_pretrained(folder)


def generation_settings(tokenizer: PreTrainedTokenizerBase, stop_tokens: Sequence[int]) -> GenerationConfig:
    """Greedy answers that end with the tokenizer's end token or one of `stop_tokens`."""
    ends = list(dict.fromkeys([tokenizer.eos_token_id, *stop_tokens]))
    return GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=ends if len(ends) > 1 else ends[0],
        pad_token_id=tokenizer.pad_token_id,
        do_sample=False,
    )


def _save_heads(model: AsvrModel, path: Path) -> None:
    """The weights of every term of the visual loss, named TERM.weight, and what they are as JSON in the metadata."""
    facts = json.dumps({name: term.facts() for name, term in model.terms.items()})
    with torch.no_grad():
        state = {name: tensor.contiguous().cpu() for name, tensor in model.objectives.state_dict().items()}
        save_tensors(state, path, {"format": "pt", "objectives": facts})


def _save_marker(geometry: Geometry, made_from: Mapping[str, Any] | None, path: Path) -> None:
    facts = {
        "asvr": version("asvr"),
        "geometry": geometry.model_dump(mode="json"),
        MADE_FROM: dict(made_from) if made_from else None,
    }
    path.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def _refuse_other_folders(output: Path) -> None:
    if not output.exists() or (output / MARKER_FILE).is_file():
        return
    if not output.is_dir() or any(output.iterdir()):
        raise InputError(f"{output} holds something else than an export of ours; name another output or remove it")
