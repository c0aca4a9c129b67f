"""Where images come from. A source is one function: its configuration in, an inventory out."""

from __future__ import annotations

from tokenize_stage.config import FolderSource, SourceConfig
from tokenize_stage.sources.folder import folder_inventory
from tokenize_stage.sources.inventory import INVENTORY_SCHEMA, Inventory
from tokenize_stage.sources.llava import llava_inventory

__all__ = ["INVENTORY_SCHEMA", "Inventory", "take_inventory"]


def take_inventory(config: SourceConfig) -> Inventory:
    """The images of a source, each once, in source order.

    Raises `InputError` when the source is absent or empty, `StorageError` when its storage keeps failing.
    """
    if isinstance(config, FolderSource):
        return folder_inventory(config)
    return llava_inventory(config)
