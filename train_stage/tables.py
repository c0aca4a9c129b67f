"""Codes or features of the images of a run, from the flat copies of its manifests' values on the node's own disk.

A shard gives one random row in 4 ms, a copy in microseconds. Of the indexes nothing is kept: who asks for images gets
what the run needs of them (`Rows`), so memory follows the run's pictures and not the size of the sets.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from manifests.errors import InputError
from manifests.fingerprint import differing_keys
from manifests.reader import OpenManifest
from manifests.schema import Geometry, Producer
from train_stage.lookup import NO_ROW, Rows, find_rows, shard_views
from train_stage.node_copy import NodeCopy


def check_agreement(manifests: Sequence[OpenManifest]) -> None:
    """InputError, naming what differs, unless all manifests have one fingerprint: one tokenizer, one geometry."""
    first = manifests[0]
    for other in manifests[1:]:
        names = differing_keys(first.manifest.fingerprint_keys, other.manifest.fingerprint_keys)
        if names:
            raise InputError(
                f"the manifests in {first.folder} and {other.folder} were made with different settings "
                f"({'; '.join(names[:4])}): the manifests of a phase must agree in tokenizer and geometry"
            )


class Tables:
    """The codes or features of some manifests of a phase, which share one fingerprint.

    Raises InputError when the manifests disagree.
    """

    def __init__(self, manifests: Sequence[OpenManifest]) -> None:
        self.manifests = list(manifests)
        self.spec: Producer = manifests[0].manifest.producer
        check_agreement(manifests)
        self._ends = list(accumulate(sum(shard.rows for shard in manifest.shards) for manifest in manifests))
        self._copies: list[NodeCopy] = []

    def find(self, image_ids: Sequence[str]) -> Rows:
        """Where images stand, NO_ROW for those that no manifest has. Reads the indexes: ask for all at once.

        Errors as of `find_rows`.
        """
        return find_rows(self.manifests, image_ids)

    def open_values(self, rows: Rows) -> None:
        """Copy to the node what these rows need and is not there yet, and map it: before the first `values` of them.

        Errors as of `NodeCopy.open`.
        """
        if not self._copies:
            self._copies = [NodeCopy(manifest, shard_views(manifest)) for manifest in self.manifests]
        table = np.searchsorted(self._ends, rows.row, side="right")
        for number, copy in enumerate(self._copies):
            copy.open(rows.first_view[(rows.row != NO_ROW) & (table == number)])

    @property
    def geometry(self) -> Geometry:
        """How the pictures became views."""
        return self.manifests[0].manifest.geometry

    @property
    def where(self) -> str:
        """The manifests, for messages."""
        return " and ".join(manifest.folder for manifest in self.manifests)

    def values(self, rows: Rows, image: int) -> NDArray[Any]:
        """Codes (V, P, D) or features (V, P, W) of one of the images of `rows`, as stored."""
        copy = self._copies[bisect_right(self._ends, rows.row[image])]
        values = copy.values(int(rows.first_view[image]), int(rows.views[image]))
        return values.reshape(-1, self.spec.positions, self.spec.values)

    def codebooks(self) -> list[NDArray[np.float32]]:
        """D arrays float32 (K_d, C)."""
        return self.manifests[0].codebooks()

    def why_missing(self, image_id: str) -> str:
        """The reject of an image as the end of a sentence; empty if it was never tokenized."""
        for manifest in self.manifests:
            rejects = manifest.rejects()
            for reason, message in _rejects_of(rejects, image_id):
                return f", it was rejected as {reason} ({message})"
        return ""


def _rejects_of(rejects: pa.Table, image_id: str) -> list[tuple[str, str]]:
    chosen = rejects.filter(pc.equal(rejects["image_id"], image_id))
    return list(zip(chosen["reason"].to_pylist(), chosen["message"].to_pylist(), strict=True))
