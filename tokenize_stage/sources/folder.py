"""The `folder` source: every picture below a folder, in the order of its path."""

from __future__ import annotations

import os
from collections.abc import Iterator

from manifests.errors import InputError
from manifests.records import BadRecord
from manifests.schema import SourceIdentity
from tokenize_stage.config import FolderSource
from tokenize_stage.retry import with_retries
from tokenize_stage.sources.inventory import Inventory, build_table, identity_of, is_text

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


def folder_inventory(config: FolderSource) -> Inventory:
    """All files with a picture's suffix (in any case) below `config.path`, sorted by path.

    Hidden files and folders (leading dot) are left out. A linked folder is not entered: it is a source error,
    since what lies behind it may be outside the root. Raises `InputError` when there is no folder or no picture.
    """
    root = config.path
    if not root.is_dir():
        raise InputError(f"the image folder {root} does not exist: correct source.path")
    errors: list[BadRecord] = []
    names = sorted(_picture_names(str(root), errors))
    if not names:
        raise InputError(f"no picture ({' '.join(SUFFIXES)}) lies below {root}: correct source.path")
    prefix = f"{root}{os.sep}"
    rows = ((name, *identity_of(prefix + name), row) for row, name in enumerate(names))
    return Inventory(build_table(rows), errors, root, SourceIdentity(kind="folder", location=str(root)))


def _picture_names(root: str, errors: list[BadRecord]) -> Iterator[str]:
    waiting = [""]
    while waiting:
        below = waiting.pop()
        for entry in _entries(f"{root}{os.sep}{below}"):
            name = f"{below}{entry.name}"
            if entry.name.startswith("."):
                continue
            if entry.is_dir(follow_symlinks=False):
                waiting.append(f"{name}/")
            elif entry.is_symlink() and os.path.isdir(entry.path):  # noqa: PTH112 - False, not an error, for a loop
                errors.append(BadRecord(-1, f"{os.fsencode(name)!r} is a linked folder, which is not followed"))
            elif not entry.name.lower().endswith(SUFFIXES):
                continue
            elif is_text(name):
                yield name
            else:
                errors.append(BadRecord(-1, f"{os.fsencode(name)!r} is not UTF-8, so it cannot be an image_id"))


def _entries(folder: str) -> list[os.DirEntry[str]]:
    def scan() -> list[os.DirEntry[str]]:
        with os.scandir(folder) as entries:
            return list(entries)

    return with_retries(scan, f"listing {folder}")
