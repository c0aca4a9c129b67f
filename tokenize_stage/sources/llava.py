"""The `llava` source: the pictures that LLaVA records refer to, each once, in order of first appearance."""

from __future__ import annotations

import os

from manifests.errors import InputError
from manifests.records import BadRecord, image_id_of, read_records
from manifests.rejects import Reject
from manifests.schema import SourceIdentity
from tokenize_stage.config import LlavaSource
from tokenize_stage.sources.inventory import Inventory, build_table, identity_of, is_text


def llava_inventory(config: LlavaSource) -> Inventory:
    """Each distinct image of `config.path`, with the row of the record that names it first.

    Malformed records are source errors. A reference that can never be an image id (it leaves the root) keeps its
    own text as id and becomes a reject when it is read, so that it is counted. Raises `InputError` when a path is
    absent or no record has an image.
    """
    if not config.image_root.is_dir():
        raise InputError(f"the image folder {config.image_root} does not exist: correct source.image_root")
    first_row: dict[str, int] = {}
    errors: list[BadRecord] = []
    for record in read_records(config.path):
        if isinstance(record, BadRecord):
            errors.append(record)
            continue
        for reference in record.images:
            image_id = _id_or_reference(reference)
            if is_text(image_id):
                first_row.setdefault(image_id, record.row)
            else:
                errors.append(BadRecord(record.row, f"the image reference {image_id!r} is not text that can be stored"))
    if not first_row:
        raise InputError(f"no record of {config.path} has an image ({len(errors)} malformed): correct source.path")
    prefix = f"{config.image_root}{os.sep}"
    rows = ((image_id, *identity_of(prefix + image_id), row) for image_id, row in first_row.items())
    identity = SourceIdentity(kind="llava", location=str(config.path), settings={"image_root": str(config.image_root)})
    return Inventory(build_table(rows), errors, config.image_root, identity)


def _id_or_reference(reference: str) -> str:
    try:
        return image_id_of(reference)
    except Reject:
        return reference
