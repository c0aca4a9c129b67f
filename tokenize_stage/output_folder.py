"""What an output folder holds when a job comes to it: whose it is, and what is committed.

`job.json` names the settings that a folder belongs to from the start of its first job, before a manifest does.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
from pydantic import ValidationError

from manifests.commits import CommitRecord, read_commits
from manifests.documents import first_problem
from manifests.errors import FingerprintMismatch, InputError, VerificationFailed
from manifests.fingerprint import check_same
from manifests.parallel import ordered_map
from manifests.reader import read_manifest
from manifests.schema import MANIFEST_NAME, Frozen, Sha256
from manifests.shard_reader import read_shard
from manifests.storage import Store
from tokenize_stage.config import ParquetSource, SourceConfig, TokenSetConfig
from tokenize_stage.sources import Inventory
from tokenize_stage.sources.listing import would_find
from tokenize_stage.units import Committed

JOB_NAME = "job.json"
SOURCE_ERRORS_NAME = "source_errors.jsonl"

FILE_COLUMNS = ["image_id", "file"]
"""What a shard says of where its images are."""

_THREADS = 8  # shards read at once

_log = logging.getLogger(__name__)


class Completed(Frozen):
    """Which remembered inventory, by the time it was taken, a manifest holds exactly, so that no row is compared again."""

    inventory: str
    manifest: Sha256


class JobFile(Frozen):
    """Written at the start of a job, so that the next one can name the keys that differ and show the whole count.

    `config` is the `TokenSetConfig` of the last job that had work to do, as JSON with absolute locations, so that the
    folder alone is enough to go on from; None in a folder of an earlier version of asvr. See `read_config`.
    """

    fingerprint: Sha256
    config: dict[str, Any] | None = None
    fingerprint_keys: dict[str, Any]
    images: int
    units: int
    source_errors: int
    completed: Completed | None = None


def write_job_file(store: Store, job: JobFile) -> None:
    """Write it, unless it says so already."""
    data = job.model_dump_json(indent=2).encode() + b"\n"
    if not store.exists(JOB_NAME) or store.read(JOB_NAME) != data:
        store.write(JOB_NAME, data)


def read_job_file(store: Store) -> JobFile:
    """The job file of an output folder; `InputError` where there is none, `VerificationFailed` for a damaged one."""
    if not store.exists(JOB_NAME):
        raise InputError(f"{store.location} has no {JOB_NAME}: give the output folder of a tokenize job")
    try:
        return JobFile.model_validate_json(store.read(JOB_NAME))
    except ValidationError as error:
        raise VerificationFailed(
            f"{store.location}/{JOB_NAME} is damaged ({first_problem(error)}): delete it and run asvr tokenize again"
        ) from error


def read_config(store: Store) -> TokenSetConfig:
    """The configuration of the last job in an output folder, with the folder itself as `output`; errors as above.

    A folder that was moved keeps working: what the file says of `output` is not believed.
    """
    settings = read_job_file(store).config
    if settings is None:
        raise InputError(
            f"{store.location}/{JOB_NAME} does not say how the set was made: run asvr tokenize RECIPE on it"
        )
    try:
        return TokenSetConfig.model_validate({**settings, "output": store.location})
    except ValidationError as error:
        raise InputError(
            f"{store.location}/{JOB_NAME} is of another version of asvr ({first_problem(error)}): "
            "run asvr tokenize RECIPE on the folder"
        ) from error


def write_source_errors(store: Store, inventory: Inventory) -> None:
    """List the records and folders of the source that named no usable image, one JSON object a line; none, no file."""
    if not inventory.errors:
        store.delete(SOURCE_ERRORS_NAME)
        return
    lines = (json.dumps({"source_row": error.row, "message": error.message}) + "\n" for error in inventory.errors)
    store.write(SOURCE_ERRORS_NAME, "".join(lines).encode())


def refuse_other_settings(store: Store, keys: dict[str, Any]) -> None:
    """Raise `FingerprintMismatch`, naming the keys, if the folder belongs to a job with another fingerprint."""
    existing = existing_keys(store)
    if existing is not None:
        check_same(existing, keys, where=store.location)


def refuse_output_in_source(store: Store, source: SourceConfig) -> None:
    """Raise `InputError` where the next run would take the tables of the output for the source's."""
    if not isinstance(source, ParquetSource):
        return
    for own in ("index-0.parquet", "shards/u000000-0.parquet"):
        if would_find(source.path, store.where(own), "source.path"):
            raise InputError(
                f"the output {store.location} lies where source.path searches for Parquet files, and the next run would "
                "read its own: choose an output beside the source, or a narrower source.path"
            )


def existing_keys(store: Store) -> dict[str, Any] | None:
    """The fingerprint keys of the job that a folder belongs to, or None where it belongs to none.

    The job file decides; the manifest, which a `--replace` in progress leaves as it was, only where there is none.
    """
    if store.exists(JOB_NAME):
        return read_job_file(store).fingerprint_keys
    if store.exists(MANIFEST_NAME):
        return read_manifest(store.location)[1].fingerprint_keys
    return None


class Folder:
    """The committed units of a folder, gone through once for the plan, and what else has to be known of them.

    After `units()` is exhausted: `stale` names the units whose records have to go, `rejects` has the reasons of the
    others' rejects by unit, `example` one of these rejects in words.
    """

    def __init__(
        self,
        store: Store,
        fingerprint: str,
        *,
        replace: bool,
        retry: frozenset[str] = frozenset(),
        own_ids: bool = False,
    ) -> None:
        """`own_ids`: those of the source do not say in which file an image is, so the shards are asked."""
        self.stale: list[str] = []
        self.rejects: dict[str, Counter[str]] = {}
        self.example = ""
        self._store, self._fingerprint, self._retry, self._own_ids = store, fingerprint, retry, own_ids
        self._ours = replace or store.exists(JOB_NAME)

    def units(self) -> Iterator[Committed]:
        """The committed units of this fingerprint whose shards are in place, one at a time: their ids fill no memory.

        Records of another fingerprint are stale where the folder is ours (a replacement that was interrupted) or may
        be replaced, else a `FingerprintMismatch`. A unit whose shard is gone is stale too: it is tokenized again.
        """
        shards = {path: found.size for path, found in self._store.walk("shards/")}

        def files_of(record: CommitRecord) -> pa.Table | None:
            one = record.shard
            if one is None or record.fingerprint != self._fingerprint or shards.get(one.path) != one.bytes:
                return None
            return read_shard(self._store, one.path, FILE_COLUMNS)

        def with_files(record: CommitRecord) -> tuple[CommitRecord, pa.Table | None]:
            return record, files_of(record) if self._own_ids else None

        records = read_commits(self._store)
        pairs = ordered_map(with_files, records, threads=_THREADS) if self._own_ids else map(with_files, records)
        for record, files in pairs:
            shard = record.shard
            if record.fingerprint != self._fingerprint:
                self._refuse_foreign(record)
                self.stale.append(record.unit)
            elif shard and shards.get(shard.path) != shard.bytes:
                _log.warning("%s is gone or was cut short: unit %s is tokenized again", shard.path, record.unit)
                self.stale.append(record.unit)
            else:
                self.rejects[record.unit] = Counter(row.reason for row in record.rejects)
                if record.rejects and not self.example:
                    self.example = f"{record.rejects[0].image_id}: {record.rejects[0].message}"
                again = frozenset(row.image_id for row in record.rejects if row.reason in self._retry)
                yield Committed(record.unit, record.members.table(), again, files)

    def _refuse_foreign(self, record: CommitRecord) -> None:
        if not self._ours:
            raise FingerprintMismatch(
                f"{self._store.location} holds units of another fingerprint ({record.fingerprint[:16]}), and nothing in it "
                "says with which settings they were made: choose another output folder, or use --replace"
            )
