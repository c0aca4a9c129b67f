"""The `folder` source: every picture below a folder, in the order of its path."""

from __future__ import annotations

import os

from manifests.errors import InputError
from manifests.images import ImageSource
from manifests.records import BadRecord
from manifests.schema import SourceIdentity
from manifests.storage import Store
from tokenize_stage.config import FolderSource
from tokenize_stage.sources.inventory import Inventory, build_table, identity_of
from tokenize_stage.sources.listing import names_below

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


def folder_inventory(config: FolderSource) -> Inventory:
    """All files with a picture's suffix (in any case) below `config.path`, sorted by path.

    Hidden files and folders (leading dot) are left out, linked folders are source errors. Raises `InputError` when
    there is no folder or no picture.
    """
    store = Store.open(config.path)
    if store.is_local and not os.path.isdir(store.location):  # noqa: PTH112
        raise InputError(f"the image folder {store.location} does not exist: correct source.path")
    errors: list[BadRecord] = []
    listed = sorted(names_below(store, SUFFIXES, errors))
    if not listed:
        wrong = f" ({errors[0].message})" if errors else ""
        raise InputError(f"no picture ({' '.join(SUFFIXES)}) lies below {store.location}{wrong}: correct source.path")
    prefix = f"{store.location}{os.sep}"
    rows = ((name, *(stat or identity_of(prefix + name)), row) for row, (name, stat) in enumerate(listed))
    identity = SourceIdentity(kind="folder", location=store.location)
    return Inventory(build_table(rows), errors, ImageSource(store.location), identity)
