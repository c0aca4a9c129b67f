"""Whether a token set is what its source asks for, so that a job has nothing to do."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from manifests.entries import size_problem
from manifests.errors import InputError, VerificationFailed
from manifests.hashes import file_sha256
from manifests.parallel import ordered_map
from manifests.reader import OpenManifest, open_manifest
from manifests.schema import MANIFEST_NAME, FileEntry, Manifest
from manifests.shard_reader import UNREADABLE, damaged, read_shard
from manifests.storage import Store
from tokenize_stage.inventory_cache import Listing
from tokenize_stage.output_folder import FILE_COLUMNS, Completed, read_job_file
from tokenize_stage.source_config import has_own_ids
from tokenize_stage.units import same_files, same_images

_BATCH_ROWS = 1 << 16
_THREADS = 8  # shards read at once

_log = logging.getLogger(__name__)


def complete_manifest(store: Store, fingerprint: str, listing: Listing, max_reject_rate: float) -> Manifest | None:
    """The manifest, if it is whole, has this fingerprint and holds exactly the inventory; else None: there is work.

    Of a source whose ids do not say in which file an image is, it also has to say that rightly.
    A manifest with more rejects than allowed now (it was made with a larger budget) is not complete either: planning
    ends in the budget's error. Nor is a set whose job file does not say how it was made: the next run will write that.
    """
    try:
        job = read_job_file(store)
        if job.config is None:
            return None
        opened = open_manifest(store.location)
        if opened.manifest.fingerprint != fingerprint or not all(_is_whole(store, one) for one in _side_files(opened)):
            return None
        totals = opened.manifest.totals
        if totals.source_errors != listing.source_errors or totals.rejected > max_reject_rate * totals.images + 1e-9:
            return None
        if listing.remembered and job.completed == Completed(inventory=listing.taken_at, manifest=opened.digest):
            return opened.manifest
        inventory = listing.inventory.table
        if not same_images(inventory, _identities(store, opened.manifest)):
            return None
        if has_own_ids(listing.config) and not same_files(inventory, _files(opened)):
            return None
    except InputError:
        return None  # no manifest yet
    except VerificationFailed as error:
        _log.warning("%s", error)
        return None
    return opened.manifest


def completed_with(store: Store, listing: Listing) -> Completed | None:
    """What the job file is to remember of a set that has just become complete."""
    if not listing.is_kept:
        return None
    return Completed(inventory=listing.taken_at, manifest=hashlib.sha256(store.read(MANIFEST_NAME)).hexdigest())


def is_completed_with(store: Store, listing: Listing) -> bool:
    """Whether the job file remembers just that, and the listing is the one that is kept."""
    return bool(listing.remembered) and read_job_file(store).completed == completed_with(store, listing)


def _side_files(opened: OpenManifest) -> Iterator[FileEntry]:
    manifest = opened.manifest
    yield manifest.index
    yield manifest.rejects
    if manifest.codebook:
        yield manifest.codebook


def _is_whole(store: Store, entry: FileEntry) -> bool:
    """Whether a content-named file is there and undamaged. On a disk its hash is remembered, so that a rerun reads no
    gigabyte; object stores see to that themselves.
    """
    if size_problem(store, entry) is None and (
        not store.is_local or file_sha256(Path(store.where(entry.path))) == entry.sha256
    ):
        return True
    _log.warning("%s is gone or damaged: it is written anew", store.where(entry.path))
    return False


def _files(opened: OpenManifest) -> Iterator[pa.Table]:
    """image_id and file of all rows, a shard at a time."""
    read = partial(read_shard, opened.store, columns=FILE_COLUMNS)
    return ordered_map(read, (shard.path for shard in opened.shards), threads=_THREADS)


def _identities(store: Store, manifest: Manifest) -> Iterator[pa.Table]:
    """image_id, size and mtime_ns of all images that the manifest holds, some rows at a time."""
    columns = ["image_id", "source_size", "source_mtime_ns"]
    for path in (manifest.index.path, manifest.rejects.path):
        try:
            with store.open_input(path) as file:
                for batch in pq.ParquetFile(file).iter_batches(_BATCH_ROWS, columns=columns):
                    yield pa.Table.from_batches([batch]).rename_columns(["image_id", "size", "mtime_ns"])
        except UNREADABLE as error:
            raise store.fault(path, error) or damaged(store.where(path), error) from error
