"""Finding files: below a folder, by a pattern, or one by one; on a disk or in an object store."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import product, takewhile

from manifests.errors import InputError
from manifests.parallel import ordered_map
from manifests.records import BadRecord
from manifests.storage import FileStat, Store, is_url
from tokenize_stage.retry import with_retries
from tokenize_stage.sources.inventory import ABSENT, identity_of, is_text

AT_ONCE = 16
"""Requests to an object store, or containers being read, at a time."""

MOST_PATTERNS = 1_000_000

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_GLOB = frozenset("*?[")


def names_below(
    store: Store, suffixes: Sequence[str], errors: list[BadRecord], *, prefix: str = "", deep: bool = True
) -> Iterator[tuple[str, FileStat | None]]:
    """All files of a store whose name ends in one of `suffixes`, in any case, and what is known of them, in any order.

    Hidden files and folders (leading dot) are left out. On a disk a linked folder is not entered: it is a source error,
    since what lies behind it may be outside the root; and what a file is like is not looked at (None). In an object
    store one whose key is no path (`a//b.jpg`) is a source error. `prefix` and `deep=False` (nothing in folders below)
    save listing what is not asked for.
    """
    if store.is_local:
        names = _local_names(store.location, tuple(suffixes), errors, deep=deep)
        yield from ((name, None) for name in names if name.startswith(prefix))
        return
    pathless: list[str] = []
    for name, stat in store.walk(prefix, pathless):
        hidden = any(part.startswith(".") for part in name.split("/"))
        if name.lower().endswith(tuple(suffixes)) and not hidden and (deep or "/" not in name):
            yield name, stat
    errors += [
        BadRecord(-1, f"{url} is no path, having an empty, . or .. part: copy the object to another key")
        for url in sorted(pathless)
        if url.lower().endswith(tuple(suffixes))
    ]


def find_files(
    locations: str | Sequence[str], suffixes: Sequence[str], key: str, errors: list[BadRecord]
) -> tuple[Store, list[tuple[str, FileStat | None]]]:
    """The files that folders, files, or brace and glob patterns name, and the folder that their paths are relative to.

    That is the folder given, the one before the first wildcard, or the one that a file is in; of several the folder that
    all of them share. So it does not depend on what there is.
    In the order of `locations`, those of a folder or pattern sorted. None is what is known of a link that leads nowhere.
    Raises `InputError`, naming the configuration key, when a location is absent or names nothing.
    """
    found: dict[str, FileStat | None] = {}
    roots: set[str] = set()
    for location in [locations] if isinstance(locations, str) else locations:
        known = len(errors)
        here = dict(_of_location(location, suffixes, key, errors, roots))
        if not here:
            wrong = f" ({errors[-1].message})" if len(errors) > known else ""
            raise InputError(f"there is no file ({' '.join(suffixes)}) at {location}{wrong}: correct {key}")
        for name, stat in here.items():
            found.setdefault(name, stat)
    root = _common_folder(roots, key)
    below = len(root.rstrip("/")) + 1
    return Store.open(root), [(name[below:], stat) for name, stat in found.items()]


def would_find(locations: str | Sequence[str], name: str, key: str) -> bool:
    """Whether a search at some locations (see `find_files`) would come upon a file of this full name and suffix."""
    for location in [locations] if isinstance(locations, str) else locations:
        is_local = not is_url(location)
        patterns = [location] if is_local and os.path.exists(location) else expand_braces(location, key)  # noqa: PTH110
        for pattern in patterns:
            is_glob = _GLOB & set(pattern) and not (is_local and os.path.exists(pattern))  # noqa: PTH110
            root, below = _split(pattern) if is_glob else (pattern, "**/*")
            start = f"{Store.open(root).location.rstrip('/')}/"
            if name.startswith(start) and glob_regex(below).fullmatch(name[len(start) :]):
                return True
    return False


def stats_of(store: Store, names: Sequence[str]) -> list[FileStat | None]:
    """What is known of each file; None where no regular file is."""
    if store.is_local:
        return [_local_stat(f"{store.location}/{name}") for name in names]
    return list(ordered_map(store.stat, names, threads=AT_ONCE))


def _local_stat(path: str) -> FileStat | None:
    size, mtime_ns = identity_of(path)
    return None if size == ABSENT or not os.path.isfile(path) else FileStat(size, mtime_ns)  # noqa: PTH113


def _of_location(
    location: str, suffixes: Sequence[str], key: str, errors: list[BadRecord], roots: set[str]
) -> Iterator[tuple[str, FileStat | None]]:
    """The full locations of the files that one location names, sorted; the folders it speaks of go to `roots`."""
    is_local = not is_url(location)
    patterns = [location] if is_local and os.path.exists(location) else expand_braces(location, key)  # noqa: PTH110
    files: dict[str, list[str]] = {}
    for pattern in patterns:
        if is_local and os.path.isdir(pattern):  # noqa: PTH112
            store = Store.open(pattern)
            roots.add(store.location)
            yield from _listed(store, suffixes, errors)
        elif _GLOB & set(pattern) and not (is_local and os.path.exists(pattern)):  # noqa: PTH110
            root, below = _split(pattern)
            prefix = re.split(r"[*?\[]", below, maxsplit=1)[0]
            matches = glob_regex(below).fullmatch
            store = Store.open(root)
            roots.add(store.location)
            listed = _listed(store, suffixes, errors, prefix=prefix, deep="/" in below)
            start = len(store.location.rstrip("/")) + 1
            yield from ((name, stat) for name, stat in listed if matches(name[start:]))
        elif pattern.lower().endswith(tuple(suffixes)):
            folder, _, name = pattern.rpartition("/")
            files.setdefault(folder or ("/" if pattern.startswith("/") else "."), []).append(name)
        elif is_local:
            raise InputError(f"{pattern} is neither a folder nor a file ({' '.join(suffixes)}): correct {key}")
        else:
            store = Store.open(pattern)
            roots.add(store.location)
            yield from _listed(store, suffixes, errors)
    for folder, names in files.items():
        store = Store.open(folder)
        roots.add(store.location)
        for name, stat in zip(names, stats_of(store, names), strict=True):
            if stat is None:
                raise InputError(f"{store.location}/{name} does not exist: correct {key}")
            yield f"{store.location.rstrip('/')}/{name}", stat


def _listed(
    store: Store, suffixes: Sequence[str], errors: list[BadRecord], *, prefix: str = "", deep: bool = True
) -> Iterator[tuple[str, FileStat | None]]:
    """The full locations of the files below a store, sorted, and what is known of each."""
    listed = sorted(names_below(store, suffixes, errors, prefix=prefix, deep=deep))
    names = [name for name, _ in listed]
    stats = stats_of(store, names) if store.is_local else [stat for _, stat in listed]
    return ((f"{store.location.rstrip('/')}/{name}", stat) for name, stat in zip(names, stats, strict=True))


def _common_folder(folders: Iterable[str], key: str) -> str:
    parts = [folder.rstrip("/").split("/") for folder in folders]
    common = [step[0] for step in takewhile(lambda step: len(set(step)) == 1, zip(*parts, strict=False))]
    url = ":" in parts[0][0]
    if (url and len(common) < 3) or not common:  # scheme, nothing, bucket
        raise InputError(f"{key} names files on different disks or buckets: make a set of each")
    return "/".join(common) or "/"


def expand_braces(text: str, key: str) -> list[str]:
    """`a-{000..012}.tar` and `{x,y}.tar` written out, numbers as wide as they are given; other text as it is."""
    parts: list[list[str]] = []
    at = 0
    for found in _BRACES.finditer(text):
        parts += [[text[at : found.start()]], _alternatives(found[1])]
        at = found.end()
    parts.append([text[at:]])
    count = 1
    for part in parts:
        count *= len(part)
    if count > MOST_PATTERNS:
        raise InputError(f"{text} stands for {count} names: correct {key}")
    return ["".join(chosen) for chosen in product(*parts)]


def _alternatives(inner: str) -> list[str]:
    numbers = _RANGE.fullmatch(inner)
    if not numbers:
        return inner.split(",") if "," in inner else [f"{{{inner}}}"]
    first, last = numbers.groups()
    width = len(first) if first.startswith("0") or len(first) == len(last) else 0
    if abs(int(last) - int(first)) >= MOST_PATTERNS:
        return [""] * (MOST_PATTERNS + 1)  # refused by the caller, which can name the text
    step = 1 if int(last) >= int(first) else -1
    return [f"{number:0{width}d}" for number in range(int(first), int(last) + step, step)]


def glob_regex(pattern: str) -> re.Pattern[str]:
    """What relative paths match a pattern: `*` and `?` stay inside a folder, `**/` is any number of folders."""
    return re.compile("".join(_as_regex(pattern)), re.DOTALL)


def _as_regex(pattern: str) -> Iterator[str]:
    at = 0
    while at < len(pattern):
        if pattern.startswith("**/", at):
            yield "(?:[^/]*/)*"
            at += 3
        elif pattern[at] == "*":
            yield "[^/]*"
            at += 1
        elif pattern[at] == "?":
            yield "[^/]"
            at += 1
        elif pattern[at] == "[" and (end := pattern.find("]", at + 2)) > 0:
            inner = pattern[at + 1 : end].replace("\\", "\\\\")
            yield f"[{'^' + inner[1:] if inner[0] == '!' else inner}]"
            at = end + 1
        else:
            yield re.escape(pattern[at])
            at += 1


def _split(pattern: str) -> tuple[str, str]:
    """The folder before the first wildcard, and the rest."""
    first = min(pattern.index(character) for character in _GLOB if character in pattern)
    root, _, _ = pattern[:first].rpartition("/")
    below = pattern[len(root) + 1 :] if root or pattern.startswith("/") else pattern
    return (root or ("/" if pattern.startswith("/") else ".")), below


def _local_names(root: str, suffixes: tuple[str, ...], errors: list[BadRecord], *, deep: bool) -> Iterator[str]:
    waiting = [""]
    while waiting:
        below = waiting.pop()
        for entry in _entries(f"{root}{os.sep}{below}"):
            name = f"{below}{entry.name}"
            if entry.name.startswith("."):
                continue
            if entry.is_dir(follow_symlinks=False):
                waiting += [f"{name}/"] if deep else []
            elif deep and entry.is_symlink() and os.path.isdir(entry.path):  # noqa: PTH112 - False, not an error, for a loop
                errors.append(BadRecord(-1, f"{os.fsencode(name)!r} is a linked folder, which is not followed"))
            elif not entry.name.lower().endswith(suffixes):
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
