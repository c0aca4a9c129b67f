"""A token set with its settings resolved: tokenizer identified, geometry decided, fingerprint known, output opened."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args

from manifests.fingerprint import fingerprint
from manifests.images import ImageSource
from manifests.paths import Location
from manifests.schema import Geometry, Producer
from manifests.storage import Store
from tokenize_stage.config import StageModel, TokenSetConfig
from tokenize_stage.decoding import usable_cores
from tokenize_stage.identity import Identity, fingerprint_keys, identify
from tokenize_stage.order import WorkOrder
from tokenize_stage.sizes import images_of_a_unit

Model = TypeVar("Model", bound=StageModel)


@dataclass(frozen=True)
class Job:
    """What the driver works on. `config` has absolute locations."""

    config: TokenSetConfig
    identity: Identity
    geometry: Geometry
    keys: dict[str, Any]
    store: Store

    @property
    def spec(self) -> Producer:
        return self.identity.spec

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.keys)

    @property
    def unit_size(self) -> int:
        return images_of_a_unit(self.config.unit_size, self.spec, self.geometry)

    def work_order(self, images: ImageSource) -> WorkOrder:
        """What the workers are told, with the place that the images are read from."""
        config = self.config
        return WorkOrder(
            output=self.store.location,
            images=images,
            geometry=self.geometry,
            tokenizer=config.tokenizer,
            spec=self.spec,
            fingerprint=self.fingerprint,
            dtype=config.compute_dtype,
            device=config.device,
            batch_size=config.batch_size,
            torch_threads=config.torch_threads or usable_cores(),
            decode_threads=config.decode_threads,
            max_pixels=config.max_pixels,
        )


def resolve(config: TokenSetConfig) -> Job:
    """Look at the tokenizer's files, but load nothing. Raises `InputError` where one is not what it should be."""
    tokenizer = _anchored(config.tokenizer)
    identity = identify(tokenizer, config.geometry.resolve())
    geometry = config.geometry.resolve(identity.spec.settings["image_mean"])
    keys = fingerprint_keys(identity.spec, geometry, config.compute_dtype)
    if carry := getattr(config.source, "carry", ()):  # changes no code, but the columns of the shards
        keys["carry"] = list(carry)
    store = Store.open(config.output)
    settled = {
        "tokenizer": tokenizer,
        "source": _anchored(config.source),
        "output": store.location,
    }
    return Job(config.model_copy(update=settled), identity, geometry, keys, store)


def _anchored(model: Model) -> Model:
    """A copy with its local paths absolute, because workers on a cluster have another current folder."""
    fields = type(model).model_fields
    located: dict[str, Any] = {
        name: type(value)(Path(value).absolute())
        for name, value in model
        if isinstance(value, str | Path)
        and (_is_location(fields[name].annotation) or any(map(_is_location, fields[name].metadata)))
        and Path(value).exists()
    }
    located |= {name: _anchored(value) for name, value in model if isinstance(value, StageModel)}
    return model.model_copy(update=located)


def _is_location(annotation: Any) -> bool:
    if isinstance(annotation, Location) or annotation is Path:
        return True
    return any(_is_location(part) for part in get_args(annotation))
