"""What an output folder holds when a job comes to it: whose it is, what is committed, whether it is complete.

`job.json` names the settings that a folder belongs to from the start of its first job, before a manifest does.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from pydantic import ValidationError

from manifests.commits import CommitRecord, list_commits, read_commit
from manifests.documents import first_problem
from manifests.errors import FingerprintMismatch, InputError, VerificationFailed
from manifests.fingerprint import check_same
from manifests.hashes import file_sha256
from manifests.reader import OpenManifest, open_manifest, read_manifest, size_problem
from manifests.schema import MANIFEST_NAME, Frozen, Manifest, Sha256
from manifests.storage import Store
from tokenize_stage.sources import Inventory
from tokenize_stage.units import same_images

JOB_NAME = "job.json"
SOURCE_ERRORS_NAME = "source_errors.jsonl"

_log = logging.getLogger(__name__)


class JobFile(Frozen):
    """Written at the start of a job, so that the next one can name the keys that differ and show the whole count."""

    fingerprint: Sha256
    fingerprint_keys: dict[str, Any]
    images: int
    units: int
    source_errors: int


def write_job_file(store: Store, job: JobFile) -> None:
    """Write it, unless it says so already."""
    data = job.model_dump_json(indent=2).encode() + b"\n"
    if not store.exists(JOB_NAME) or store.read(JOB_NAME) != data:
        store.write(JOB_NAME, data)


def write_source_errors(store: Store, inventory: Inventory) -> None:
    """List the records and folders of the source that named no usable image, one JSON object a line; none, no file."""
    if not inventory.errors:
        store.delete(SOURCE_ERRORS_NAME)
        return
    lines = (json.dumps({"source_row": error.row, "message": error.message}) + "\n" for error in inventory.errors)
    store.write(SOURCE_ERRORS_NAME, "".join(lines).encode())


def refuse_other_settings(store: Store, keys: dict[str, Any]) -> None:
    """Raise `FingerprintMismatch`, naming the keys, if the folder belongs to a job with another fingerprint.

    The job file decides; the manifest, which a `--replace` in progress leaves as it was, only where there is none.
    """
    if store.exists(JOB_NAME):
        try:
            existing = JobFile.model_validate_json(store.read(JOB_NAME)).fingerprint_keys
        except ValidationError as error:
            raise VerificationFailed(
                f"{store.path(JOB_NAME)} is damaged ({first_problem(error)}): delete it and run again"
            ) from error
    elif store.exists(MANIFEST_NAME):
        existing = read_manifest(store.location)[1].fingerprint_keys
    else:
        return
    check_same(existing, keys, where=store.location)


@dataclass(frozen=True)
class Folder:
    """The units that stand, by name, and the names of those whose records have to go."""

    units: dict[str, CommitRecord]
    stale: list[str]


def read_folder(store: Store, fingerprint: str, *, replace: bool) -> Folder:
    """The committed units of this fingerprint whose shards are in place.

    Records of another fingerprint are stale where the folder is ours (a replacement that was interrupted) or may be
    replaced, else a `FingerprintMismatch`. A unit whose shard is gone is stale too: it is tokenized again.
    """
    folder = Folder({}, [])
    ours = replace or store.exists(JOB_NAME)
    for record in read_records(store):
        shard = record.shard
        if record.fingerprint != fingerprint:
            if not ours:
                raise FingerprintMismatch(
                    f"{store.location} holds units of another fingerprint ({record.fingerprint[:16]}), and nothing in it "
                    "says with which settings they were made: choose another output folder, or use --replace"
                )
            folder.stale.append(record.unit)
        elif shard and not (store.exists(shard.path) and store.size(shard.path) == shard.bytes):
            _log.warning("%s is gone or was cut short: unit %s is tokenized again", shard.path, record.unit)
            folder.stale.append(record.unit)
        else:
            folder.units[record.unit] = record
    return folder


def read_records(store: Store) -> Iterator[CommitRecord]:
    """The commit records, one at a time, in unit order."""
    for unit in list_commits(store):
        yield read_commit(store, unit)


def complete_manifest(store: Store, fingerprint: str, inventory: Inventory, max_reject_rate: float) -> Manifest | None:
    """The manifest, if it is whole, has this fingerprint and holds exactly the inventory; else None: there is work.

    A manifest with more rejects than allowed now (it was made with a larger budget) is not complete either: planning
    ends in the budget's error.
    """
    try:
        opened = open_manifest(store.location)
        if opened.manifest.fingerprint != fingerprint or not _has_codebook(opened):
            return None
        known = [_identities(opened.index()), _identities(opened.rejects())]
    except InputError:
        return None  # no manifest yet
    except VerificationFailed as error:
        _log.warning("%s", error)
        return None
    totals = opened.manifest.totals
    if totals.source_errors != len(inventory.errors) or totals.rejected > max_reject_rate * totals.images + 1e-9:
        return None
    return opened.manifest if same_images(inventory.table, pa.concat_tables(known)) else None


def _has_codebook(opened: OpenManifest) -> bool:
    """Whether a codebook that should be there is, and whole; its hash is remembered, so that a rerun reads no gigabyte."""
    entry = opened.manifest.codebook
    if entry is None:  # a set of features
        return True
    if size_problem(opened.store, entry) is None and file_sha256(opened.store.path(entry.path)) == entry.sha256:
        return True
    _log.warning("%s is gone or damaged: it is written anew", opened.store.path(entry.path))
    return False


def _identities(table: pa.Table) -> pa.Table:
    columns = table.select(["image_id", "source_size", "source_mtime_ns"])
    return columns.rename_columns(["image_id", "size", "mtime_ns"])
