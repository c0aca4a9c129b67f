"""Images that were purged from a token set, so that the next tokenize run does not bring them back.

`OUTPUT/forgotten.txt` holds one sha256, in hex, of each forgotten image_id: a name may itself be personal data. (Whoever
can guess a name can still check whether it is there.)
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable

import numpy as np
import pyarrow as pa

from manifests.errors import VerificationFailed
from manifests.storage import Store

FORGOTTEN_NAME = "forgotten.txt"

_LINE = re.compile(r"[0-9a-f]{64}")


def forgotten_digests(store: Store) -> frozenset[str]:
    """The sha256 of every forgotten image_id. A damaged list is `VerificationFailed`: it must not be ignored."""
    if not store.exists(FORGOTTEN_NAME):
        return frozenset()
    lines = store.read(FORGOTTEN_NAME).decode("ascii", errors="replace").split()
    bad = next((line for line in lines if not _LINE.fullmatch(line)), None)
    if bad is not None:
        raise VerificationFailed(
            f"{store.where(FORGOTTEN_NAME)} is damaged ({bad[:70]!r} is no sha256): restore it from a backup, or delete it "
            "and forget the images again"
        )
    return frozenset(lines)


def remember_forgotten(store: Store, image_ids: Iterable[str]) -> None:
    """Add images to the list. Hold the lease."""
    known = forgotten_digests(store)
    wanted = known | {name_digest(name) for name in image_ids}
    if wanted != known:
        store.write(FORGOTTEN_NAME, "".join(f"{line}\n" for line in sorted(wanted)).encode())


def name_digest(image_id: str) -> str:
    """What is remembered of a forgotten image_id."""
    return hashlib.sha256(image_id.encode()).hexdigest()


def without_forgotten(store: Store, table: pa.Table) -> pa.Table:
    """The rows of a table with a column `image_id` that were not forgotten; the very table where nothing was."""
    digests = forgotten_digests(store)
    if not digests:
        return table
    ids = (name for chunk in table["image_id"].chunks for name in chunk.to_pylist())
    keep = np.fromiter((name_digest(name) not in digests for name in ids), bool, table.num_rows)
    return table if keep.all() else table.filter(pa.array(keep))
