"""`asvr push`: a finished token set as a data set on the Hugging Face Hub.

What the manifest names goes up, nothing else; shards first, the manifest and the card in the last commit, so whoever
reads the repository sees a whole set at every moment. Shards are named by their content: what is there already is
not sent again, and a push that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils.tqdm import disable_progress_bars

from manifests.errors import FingerprintMismatch, InputError, StorageError
from manifests.fingerprint import differing_keys
from manifests.reader import OpenManifest, open_manifest
from manifests.remote_errors import client_errors
from manifests.schema import MANIFEST_NAME, FileEntry
from pipeline.data_card import CARD_NAME, data_card

log = logging.getLogger(__name__)

COMMIT_FILES = 64
COMMIT_BYTES = 1 << 30
"""A commit ends at the first of these, so that an interruption costs little; a set that is not on a disk is held in memory so far."""

_REPO_TYPE = "dataset"


def push(location: str, repo: str, *, private: bool, licence: str | None, replace: bool) -> str:
    """Publish the token set at `location` as the data set `repo` (OWNER/NAME); its `hf://` URL.

    licence: of the codes, as the Hub's identifiers have it; `None` says `other`.
    replace: whether a set of another fingerprint in that repository gives way.

    Raises FingerprintMismatch without `replace`, InputError for a name that none can have, and StorageError when the
    Hub refuses or is out of reach.
    """
    opened = open_manifest(location)
    disable_progress_bars()  # the log says how far it is
    api, url = HfApi(), f"hf://datasets/{repo}"
    try:
        with client_errors("publish", url, lambda: False):
            _publish(api, opened, repo, private=private, licence=licence, replace=replace)
    except StorageError as error:
        if isinstance(error.__cause__, HFValidationError):
            raise InputError(f"{repo!r} is not the name of a repository: give OWNER/NAME") from error
        raise
    return url


def _publish(api: HfApi, opened: OpenManifest, repo: str, *, private: bool, licence: str | None, replace: bool) -> None:
    api.create_repo(repo, repo_type=_REPO_TYPE, private=private, exist_ok=True)
    there = _there(api, repo)
    if MANIFEST_NAME in there and not replace:
        _check_same(opened, f"hf://datasets/{repo}")
    entries = list(_entries(opened))
    wanted = [entry for entry in entries if there.get(entry.path) not in (entry.sha256, str(entry.bytes))]
    log.info("%d of %d files are to be sent to %s", len(wanted), len(entries), repo)
    batches = list(_batches(wanted))
    for number, batch in enumerate(batches, 1):
        operations = [_addition(opened, entry) for entry in batch]
        _commit(api, repo, operations, f"Files of the token set, {number} of {len(batches)}")
        log.info("%d of %d commits are made", number, len(batches))
    last = [
        CommitOperationAdd(CARD_NAME, data_card(opened, repo, licence).encode()),
        CommitOperationAdd(MANIFEST_NAME, opened.store.read(MANIFEST_NAME)),
    ]
    _commit(api, repo, last, f"Token set {opened.digest[:16]}")


def _entries(opened: OpenManifest) -> Iterator[FileEntry]:
    """Every file that the manifest names."""
    manifest = opened.manifest
    yield from opened.shards
    yield from (entry for entry in (manifest.codebook, manifest.shards_file, manifest.index, manifest.rejects) if entry)


def _there(api: HfApi, repo: str) -> dict[str, str]:
    """The files of the repository, each with the sha256 of its content, or its size where the Hub knows no more.

    A small file is none of LFS, of which the Hub tells a git hash; its name holds its content's hash.
    """
    found: dict[str, str] = {}
    for entry in api.list_repo_tree(repo, repo_type=_REPO_TYPE, recursive=True):
        lfs: Any = getattr(entry, "lfs", None)
        if lfs is not None:
            found[entry.path] = lfs.sha256
        elif (size := getattr(entry, "size", None)) is not None:
            found[entry.path] = str(size)
    return found


def _check_same(opened: OpenManifest, url: str) -> None:
    other = open_manifest(url).manifest
    names = differing_keys(other.fingerprint_keys, opened.manifest.fingerprint_keys)
    if names:
        raise FingerprintMismatch(
            f"{url} holds codes made with other settings ({'; '.join(names[:4])}): push to another repository, or add --replace"
        )


def _batches(entries: Sequence[FileEntry]) -> Iterator[list[FileEntry]]:
    batch: list[FileEntry] = []
    size = 0
    for entry in entries:
        if batch and (len(batch) == COMMIT_FILES or size + entry.bytes > COMMIT_BYTES):
            yield batch
            batch, size = [], 0
        batch.append(entry)
        size += entry.bytes
    if batch:
        yield batch


def _addition(opened: OpenManifest, entry: FileEntry) -> CommitOperationAdd:
    if opened.store.is_local:
        return CommitOperationAdd(entry.path, opened.store.where(entry.path))
    return CommitOperationAdd(entry.path, opened.store.read(entry.path))


def _commit(api: HfApi, repo: str, operations: list[CommitOperationAdd], message: str) -> None:
    try:
        api.create_commit(repo, operations, commit_message=message, repo_type=_REPO_TYPE)
    except RuntimeError as error:  # the client's word for an upload that failed; the reason is its cause
        if isinstance(error.__cause__, Exception):
            raise error.__cause__ from None
        raise
