"""The `llava` source: the pictures that LLaVA records refer to, each once, in order of first appearance."""

from __future__ import annotations

from collections.abc import Iterator

from manifests.errors import InputError
from manifests.images import ImageSource
from manifests.records import BadRecord, read_records
from manifests.schema import SourceIdentity
from tokenize_stage.config import LlavaSource
from tokenize_stage.sources.inventory import Inventory
from tokenize_stage.sources.references import open_root, referenced


def llava_inventory(config: LlavaSource) -> Inventory:
    """Each distinct image of `config.path`, with the row of the record that names it first.

    Malformed records are source errors. Raises `InputError` when a path is absent or no record has an image.
    """
    root = open_root(config.image_root, "source.image_root")
    errors: list[BadRecord] = []
    table = referenced(_references(config.path, errors), root, errors)
    if not table.num_rows:
        raise InputError(f"no record of {config.path} has an image ({len(errors)} malformed): correct source.path")
    identity = SourceIdentity(kind="llava", location=config.path, settings={"image_root": root.location})
    return Inventory(table, errors, ImageSource(root.location), identity)


def _references(path: str, errors: list[BadRecord]) -> Iterator[tuple[str, int]]:
    for record in read_records(path):
        if isinstance(record, BadRecord):
            errors.append(record)
        else:
            yield from ((image, record.row) for image in record.images)
