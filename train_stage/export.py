"""A trained model as a plain Hugging Face LLaVA folder, which nothing of this project is needed to load.

Weights have the names that published llava-hf files have (`language_model.model.*`, `vision_tower.vision_model.*`),
because older readers know no other. The visual head, which inference does without, is a file of its own.
"""

from __future__ import annotations

import copy
import json
import logging
import shutil
from importlib.metadata import version
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor
from transformers import GenerationConfig, LlavaImageProcessorPil, LlavaProcessor, PreTrainedTokenizerBase
from transformers.core_model_loading import revert_weight_conversion

from manifests.errors import InputError
from manifests.geometry import background_from_mean
from manifests.schema import Geometry
from train_stage import tower
from train_stage.model import AsvrModel
from train_stage.objectives import CodesObjective
from train_stage.tensor_files import save_tensors, share, tensor_storage_errors

log = logging.getLogger(__name__)

HEAD_FILE = "visual_head.safetensors"
MARKER_FILE = "asvr_export.json"
"""What an export came from; and the sign that a folder is an export, which a later one may replace."""
SHARD_SIZE = "5GB"


def export_llava(
    model: AsvrModel,
    tokenizer: PreTrainedTokenizerBase,
    geometry: Geometry,
    output: Path,
    *,
    chat_template: str,
    codebook_sha256: str | None = None,
) -> None:
    """Write `output`: config, weights, generation config, processor and, if there is one, the visual head.

    The folder appears whole or not at all; an earlier export of that name is replaced. It is read by
    `AutoModelForImageTextToText.from_pretrained(output)` and `AutoProcessor.from_pretrained(output, backend="pil")`.
    Transformers prefers torchvision's resizing where torchvision is installed; `backend="pil"` gives the pixels that
    training saw.

    Args:
        geometry: that of the last phase; the processor repeats it.
        chat_template: the Jinja source of the template the model was instructed with.
        codebook_sha256: sha256 of the manifest's codebook file, kept with the visual head that needs it.

    Raises:
        InputError: `output` holds something else than an export.
        StorageError: the disk refuses; nothing is left behind then.
    """
    _refuse_other_folders(output)
    draft = output.with_name(f"{output.name}.tmp")
    shutil.rmtree(draft, ignore_errors=True)
    try:
        with tensor_storage_errors(draft):
            draft.mkdir(parents=True)
            save_torch_state_dict(llava_weights(model), draft, max_shard_size=SHARD_SIZE)
            for path in draft.iterdir():
                share(path)
            _save_configs(model, tokenizer, geometry, draft)
            save_processor(make_processor(model, tokenizer, geometry, chat_template), draft)
            _save_marker(geometry, codebook_sha256, draft / MARKER_FILE)
            if isinstance(model.objective, CodesObjective):
                _save_head(model.objective, codebook_sha256, draft / HEAD_FILE)
            if output.exists():
                shutil.rmtree(output)
            draft.replace(output)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    log.info("exported to %s", output)


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
) -> LlavaProcessor:
    """The processor that turns pictures and prompts into what the model was trained on.

    Its pixels equal `manifests.geometry.make_views` on the RGB picture, with the tower's mean and standard deviation.
    One case has no counterpart there: `pad` with another background than int(255 * mean), which LLaVA's processor
    always uses. That is logged as a warning, not refused, because the model is as good as it was.
    """
    vision = model.vision_tower.config
    size: dict[str, int] = {"height": geometry.size, "width": geometry.size}
    if geometry.mode == "crop":
        size = {"shortest_edge": geometry.size}
    mean = model.pixel_norm.mean
    if geometry.mode == "pad" and background_from_mean(mean) != geometry.background:
        log.warning(
            "training padded pictures with %s, but the exported processor pads with %s, the only colour that LLaVA's "
            "image processor knows; set geometry.background to that before the next run",
            geometry.background,
            background_from_mean(mean),
        )
    image_processor = LlavaImageProcessorPil(
        do_pad=geometry.mode == "pad",
        do_resize=True,
        size=size,
        resample=3,  # bicubic
        do_center_crop=geometry.mode == "crop",
        crop_size={"height": geometry.size, "width": geometry.size},
        image_mean=list(mean),
        image_std=list(model.pixel_norm.std),
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=vision.patch_size,
        vision_feature_select_strategy=tower.select_strategy(vision),
        num_additional_image_tokens=tower.layout_of(vision).class_tokens,
        image_token=tokenizer.convert_ids_to_tokens(model.llava.config.image_token_id),
        chat_template=chat_template,
    )


def save_processor(processor: LlavaProcessor, folder: Path) -> None:
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
    config.architectures = ["LlavaForConditionalGeneration"]
    config.dtype = model.llava.lm_head.weight.dtype
    config.image_seq_length = rows * columns
    config.pad_token_id = tokenizer.pad_token_id
    config.save_pretrained(folder)
    GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=False,
    ).save_pretrained(folder)


def _save_head(objective: CodesObjective, codebook_sha256: str | None, path: Path) -> None:
    head = objective.visual_head
    metadata = {
        "format": "pt",
        "head": objective.settings.head.model_dump_json(),
        "shift": objective.shift,
        "residual": json.dumps(head.residual),
        "codebook_sizes": json.dumps([classifier.out_features for classifier in head.classifiers]),
    }
    if codebook_sha256 is not None:
        metadata["codebook_sha256"] = codebook_sha256
    with torch.no_grad():
        save_tensors({name: t.contiguous().cpu() for name, t in head.state_dict().items()}, path, metadata)


def _save_marker(geometry: Geometry, codebook_sha256: str | None, path: Path) -> None:
    facts = {
        "asvr": version("asvr"),
        "geometry": geometry.model_dump(mode="json"),
        "codebook_sha256": codebook_sha256,
    }
    path.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def _refuse_other_folders(output: Path) -> None:
    if not output.exists() or (output / MARKER_FILE).is_file():
        return
    if not output.is_dir() or any(output.iterdir()):
        raise InputError(f"{output} holds something else than an export of ours; name another output or remove it")
