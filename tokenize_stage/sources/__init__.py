"""Where images come from. A source is one function: its configuration in, an inventory out."""

from __future__ import annotations

from tokenize_stage.config import FolderSource, LlavaSource, SourceConfig, WebdatasetSource
from tokenize_stage.sources.folder import folder_inventory
from tokenize_stage.sources.inventory import INVENTORY_SCHEMA, Inventory, KnownContainers
from tokenize_stage.sources.llava import llava_inventory
from tokenize_stage.sources.parquet import parquet_inventory
from tokenize_stage.sources.webdataset import webdataset_inventory

__all__ = ["INVENTORY_SCHEMA", "Inventory", "KnownContainers", "take_inventory"]


def take_inventory(config: SourceConfig, known: KnownContainers | None = None) -> Inventory:
    """The images of a source, each once, in source order. Tars and Parquet files that `known` knows are not read.

    Raises `InputError` when the source is absent or empty, `StorageError` when its storage keeps failing.
    """
    if isinstance(config, FolderSource):
        return folder_inventory(config)
    if isinstance(config, LlavaSource):
        return llava_inventory(config)
    if isinstance(config, WebdatasetSource):
        return webdataset_inventory(config, known)
    return parquet_inventory(config, known)
