"""Files that a recipe names by path or by hub id, found on this machine or fetched. Imports no torch.

`owner/name` is the newest revision of a hub model, `hf://owner/name@COMMIT` a pinned one, and
`hf://owner/name[@COMMIT]/FILE` one of its files or folders. A pinned revision that was fetched once needs no network.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from manifests.errors import InputError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_URL = re.compile(rf"hf://(?P<model>{_HUB_ID.pattern})(@(?P<revision>[\w.-]+))?(/(?P<file>.+))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Located:
    """A local file or folder; `revision` is the commit it is pinned to if it came from the hub."""

    path: Path
    revision: str | None


@dataclass(frozen=True)
class HubReference:
    """What a hub id says."""

    model: str
    revision: str | None
    file: str | None


def locate_file(reference: str, *, name: str | None = None) -> Located:
    """The file that `reference` names; in a folder or hub model named without a file, the one called `name`.

    Raises `InputError` if there is none, or the reference leaves the file open and so does the family.
    """
    path = Path(reference)
    if path.is_file():
        return Located(path, None)
    if path.is_dir():
        if name is None:
            raise InputError(f"{reference} is a folder: name the file in it")
        if not (path / name).is_file():
            raise InputError(f"the folder {reference} has no {name}: check the path")
        return Located(path / name, None)
    hub = parse_reference(reference)
    if hub is None:
        raise InputError(f"there is no file {reference}: check the path, or give hf://owner/name/FILE")
    file = hub.file or name
    if file is None:
        raise InputError(
            f"there is no file {reference} here, and as a hub model it leaves the file open: "
            f"check the path, or give hf://{hub.model}/FILE"
        )
    return _fetch(hub, lambda local: _file(hub, file, local))


def locate_folder(reference: str, patterns: Sequence[str]) -> Located:
    """The folder that `reference` names; of a hub model, or of a folder in it, only the files that match `patterns`.

    `hf://owner/name[@COMMIT]/FOLDER` is a folder in a hub model.
    """
    path = Path(reference)
    if path.is_dir():
        return Located(path, None)
    hub = parse_reference(reference)
    if hub is None:
        raise InputError(f"there is no folder {reference}: check the path, or give a hub id such as owner/name")
    below = f"{hub.file.rstrip('/')}/" if hub.file else ""
    found = _fetch(hub, lambda local: _folder(hub, [below + pattern for pattern in patterns], local))
    if not (found.path / below).is_dir():
        raise InputError(f"there is no folder {reference}, or nothing of use in it: check the name")
    return Located(found.path / below, found.revision)


def parse_reference(reference: str) -> HubReference | None:
    """What `reference` says if it has the form of a hub id, else None."""
    if _HUB_ID.fullmatch(reference):
        return HubReference(reference, None, None)
    url = _HUB_URL.fullmatch(reference)
    if url is None or ".." in (url["file"] or "").split("/"):
        return None
    return HubReference(url["model"], url["revision"], url["file"])


def _fetch(hub: HubReference, get: Callable[[bool], Path]) -> Located:
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        # What is cached needs no network: a pinned revision can never be another one.
        path = get(bool(hub.revision))
    except LocalEntryNotFoundError:
        try:
            path = get(False)
        except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
            raise _not_found(hub) from error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise _not_found(hub) from error
    commit = next((part for part in path.parts[::-1] if _COMMIT.fullmatch(part)), hub.revision)
    return Located(path, commit)


def _file(hub: HubReference, file: str, local: bool) -> Path:
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(hub.model, file, revision=hub.revision, local_files_only=local))


def _folder(hub: HubReference, patterns: Sequence[str], local: bool) -> Path:
    from huggingface_hub import snapshot_download

    return Path(
        snapshot_download(hub.model, revision=hub.revision, allow_patterns=list(patterns), local_files_only=local)
    )


def _not_found(hub: HubReference) -> InputError:
    file = f"/{hub.file}" if hub.file else ""
    at = f" at revision {hub.revision}" if hub.revision else ""
    return InputError(
        f"nothing called {hub.model}{file} here, and the hub model{at} cannot be fetched: "
        "check the name and the network, or give a local path"
    )
