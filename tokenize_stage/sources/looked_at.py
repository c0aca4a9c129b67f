"""What can be looked at quickly to see whether a source is still the one that was listed."""

from __future__ import annotations

from typing import Any

from manifests.storage import Store
from tokenize_stage.config import LlavaSource, ParquetSource, SourceConfig, WebdatasetSource
from tokenize_stage.sources.listing import find_files
from tokenize_stage.sources.parquet import TABLE_SUFFIXES
from tokenize_stage.sources.webdataset import TAR_SUFFIXES


def looked_at(config: SourceConfig) -> Any:
    """A JSON value that changes with the source as far as can be told without looking at its images.

    The records of `llava` by size and time; every container by path, size and time; nothing for a folder, of which
    only its listing tells.
    """
    if isinstance(config, WebdatasetSource | ParquetSource):
        suffixes = TAR_SUFFIXES if isinstance(config, WebdatasetSource) else TABLE_SUFFIXES
        _, files = find_files(config.path, suffixes, "source.path", [])
        return [[name, *(stat or ())] for name, stat in files]
    if isinstance(config, LlavaSource):
        folder, _, name = config.path.rpartition("/")
        found = Store.open(folder or "/").stat(name)
        return None if found is None else [found.size, found.mtime_ns]
    return None
