"""Images that something else refers to by path: each once, in order of first appearance, with what is known of it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence

import pyarrow as pa

from manifests.errors import InputError
from manifests.id_index import IdIndex
from manifests.records import BadRecord, image_id_of
from manifests.rejects import Reject
from manifests.storage import FileStat, Store
from tokenize_stage.sources.inventory import ABSENT, CHUNK_ROWS, Identity, build_table, identity_of, is_text, text_array
from tokenize_stage.sources.listing import stats_of
from tokenize_stage.table_rows import numbers

_FEW = 1_000
"""Up to so many references in an object store are looked up one by one; for more its listing is read once."""


def open_root(location: str, key: str) -> Store:
    """The folder that references are relative to; `InputError`, naming the configuration key, if there is none."""
    store = Store.open(location)
    if store.is_local and not os.path.isdir(store.location):  # noqa: PTH112
        raise InputError(f"the image folder {store.location} does not exist: correct {key}")
    return store


def referenced(references: Iterable[tuple[str, int]], store: Store, errors: list[BadRecord]) -> pa.Table:
    """The table of the distinct images among (reference, row), each with the row that names it first.

    A reference that can never be an image id (it leaves the root) keeps its own text as id and becomes a reject when it
    is read, so that it is counted.
    """
    first_row: dict[str, int] = {}
    for reference, row in references:
        image_id = _id_or_reference(reference)
        if is_text(image_id):
            first_row.setdefault(image_id, row)
        else:
            errors.append(BadRecord(row, f"the image reference {image_id!r} is not text that can be stored"))
    identities = _identities(store, list(first_row))
    return build_table(
        (name, *identity, row) for (name, row), identity in zip(first_row.items(), identities, strict=True)
    )


def _id_or_reference(reference: str) -> str:
    try:
        return image_id_of(reference)
    except Reject:
        return reference


def _identities(store: Store, ids: Sequence[str]) -> Iterable[Identity]:
    if store.is_local:
        prefix = f"{store.location}{os.sep}"
        return (identity_of(prefix + image_id) for image_id in ids)
    if len(ids) > _FEW:
        return _looked_up(ids, store.walk())
    inside = [image_id for image_id in ids if _is_id(image_id)]
    known = dict(zip(inside, stats_of(store, inside), strict=True))
    return (known.get(image_id) or (ABSENT, 0) for image_id in ids)


def _looked_up(ids: Sequence[str], listing: Iterator[tuple[str, FileStat]]) -> Iterator[Identity]:
    """The listing joined to the ids by columns, since a dictionary of millions of files takes gigabytes.

    Both stay in chunks of `CHUNK_ROWS`: an Arrow string array, and the table that Arrow's own lookup makes of all chunks
    together, hold 2 GiB of text and no more.
    """
    listed = build_table((name, stat.size, stat.mtime_ns, 0) for name, stat in listing)
    index, sizes, times = IdIndex(listed["image_id"]), numbers(listed["size"]), numbers(listed["mtime_ns"])
    for start in range(0, len(ids), CHUNK_ROWS):
        for place in index.find(pa.chunked_array([text_array(ids[start : start + CHUNK_ROWS])])).tolist():
            yield (ABSENT, 0) if place < 0 else (int(sizes[place]), int(times[place]))


def _is_id(text: str) -> bool:
    try:
        return image_id_of(text) == text
    except Reject:
        return False
