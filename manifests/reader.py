"""Read a token set through its manifest. Nothing here lists a folder: what no manifest names does not exist.

A manifest may come from anywhere: its paths stay inside its folder, and what is read into memory is bounded
by sizes that are checked first.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import zstandard
from pydantic import TypeAdapter, ValidationError

from manifests.codebook import decode_codebooks
from manifests.documents import decompress, first_problem
from manifests.entries import check_entry, read_entry, shard_problems
from manifests.errors import InputError, VerificationFailed
from manifests.id_index import IdIndex
from manifests.schema import (
    MANIFEST_NAME,
    FeaturesSpec,
    FileEntry,
    Kind,
    Manifest,
    ShardEntry,
    TokenizerSpec,
)
from manifests.shard_reader import UNREADABLE, damaged, open_shard, read_parquet, read_shard
from manifests.shards import INDEX_SCHEMA, REJECTS_SCHEMA, list_values, shard_schema, value_column
from manifests.storage import Store, is_url
from manifests.table_reader import iter_rows
from manifests.versions import MANIFEST_UPGRADES, parsed

_LARGEST_MANIFEST = 256 << 20
_LARGEST_LISTING = 1 << 30
_SHARD_LIST = TypeAdapter(list[ShardEntry])


@dataclass(frozen=True)
class OpenManifest:
    """A manifest whose shards were all there, with the right sizes, when it was opened.

    `digest` is the sha256 of the manifest's bytes; `shards` is the list of shards wherever it was kept.
    """

    manifest: Manifest
    store: Store
    digest: str
    shards: tuple[ShardEntry, ...]

    @property
    def folder(self) -> str:
        """Where the set is: an absolute path or a URL."""
        return self.store.location

    @property
    def tokenizer(self) -> TokenizerSpec:
        """What made the codes; `InputError` if this is a set of features."""
        if self.manifest.tokenizer is None:
            raise InputError(f"{self.folder} holds features, not codes: give a token set whose tokenizer makes codes")
        return self.manifest.tokenizer

    @property
    def codebook(self) -> FileEntry:
        """The file of the codebooks; `InputError` if this is a set of features."""
        if self.manifest.codebook is None:
            raise InputError(f"{self.folder} holds features, which have no codebook: give a token set with codes")
        return self.manifest.codebook

    @property
    def features(self) -> FeaturesSpec:
        """What made the features; `InputError` if this is a set of codes."""
        if self.manifest.features is None:
            raise InputError(
                f"{self.folder} holds codes, not features: give a token set whose tokenizer is of kind features or vae"
            )
        return self.manifest.features

    def codebooks(self) -> list[npt.NDArray[np.float32]]:
        """The D codebooks, float32 (K, code_dim); `VerificationFailed` when they are not those of the manifest."""
        spec, entry = self.tokenizer, self.codebook
        # 64 KiB hold the header of a safetensors file with any believable depth.
        data = read_entry(self.store, entry, limit=4 * spec.code_dim * sum(spec.codebook_sizes) + (64 << 10))
        return decode_codebooks(data, spec.codebook_sizes, spec.code_dim, self.store.where(entry.path))

    def index(self) -> pa.Table:
        """One row per ok image, in shard order, with the columns of `INDEX_SCHEMA`. Kept once read."""
        return self._index

    def rejects(self) -> pa.Table:
        """One row per rejected image, with the columns of `REJECTS_SCHEMA`."""
        table = self._table(self.manifest.rejects)
        if not table.schema.equals(REJECTS_SCHEMA):
            raise self._no_rejects()
        return table

    def read_codes(self, image_ids: Sequence[str]) -> list[npt.NDArray[np.unsignedinteger[Any]]]:
        """The codes (V, P, D) of some images, in the order asked; `InputError` names an image the set lacks.

        The first call reads the whole index and keeps it. Ask for many at a time: a shard's row group is decoded once for
        all the images in it. A set of features is an `InputError`.
        """
        _ = self.tokenizer
        return self._read(image_ids, "codes")

    def read_features(self, image_ids: Sequence[str]) -> list[npt.NDArray[np.floating[Any]]]:
        """The features (V, P, n) of some images, in the order asked, as `read_codes` does.

        float32 or float16 as the set holds them; bfloat16, which numpy lacks, as the float32 of the same value (the
        upper 16 of its bits are what is stored). A set of codes is an `InputError`.
        """
        column = value_column(self.features)
        return [column.widened(stored) for stored in self._read(image_ids, "features")]

    def _read(self, image_ids: Sequence[str], kind: Kind) -> list[npt.NDArray[Any]]:
        at = self._places.find(pa.chunked_array([image_ids], pa.string()))
        absent = np.flatnonzero(at < 0)
        if len(absent):
            raise InputError(
                f"{self.folder} has no {kind} of {image_ids[absent[0]]!r} ({len(absent)} such images): "
                "tokenize the images first, or see its rejects"
            )
        return self._stored_at(self._index["shard"].to_numpy()[at], self._index["row"].to_numpy()[at])

    def values_at(self, ordinals: npt.NDArray[np.int32], rows: npt.NDArray[np.int32]) -> list[npt.NDArray[Any]]:
        """The codes (V, P, D) or features (V, P, n) of rows of shards, as the index names both, in the order asked.

        They are what `read_codes` or `read_features` gives for the images of these rows; the index is not looked at.
        """
        column = value_column(self.manifest.producer)
        return [column.widened(stored) for stored in self._stored_at(ordinals, rows)]

    def _stored_at(self, ordinals: npt.NDArray[np.int32], rows: npt.NDArray[np.int32]) -> list[npt.NDArray[Any]]:
        found: list[Any] = [None] * len(rows)
        for ordinal in np.unique(ordinals):
            mine = np.flatnonzero(ordinals == ordinal)
            for place, values in zip(mine, self._rows_of_shard(self.shards[ordinal], rows[mine]), strict=True):
                found[place] = values
        return found

    def iter_index(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """Some columns of the index, in batches and in its order, without holding it.

        Its sha256 is checked before the first batch, once for all such readings, so the first of them reads it twice.
        """
        self.check_index()
        batches = iter_rows(self.store, self.manifest.index.path, columns)
        return self._of_known_shards(batches) if "shard" in columns else batches

    def iter_rejects(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """Some columns of the rejects, in batches and in their order, without holding them; their sha256 is checked first."""
        if not self._file_has(self.manifest.rejects, REJECTS_SCHEMA):
            raise self._no_rejects()
        return iter_rows(self.store, self.manifest.rejects.path, columns)

    def check_index(self) -> None:
        """`VerificationFailed` unless the index is the file that the manifest names; it is read by pieces."""
        _ = self._index_is_whole

    def iter_shards(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """The shards' rows, shard by shard in the manifest's order; all columns, or some."""
        for shard in self.shards:
            yield read_shard(self.store, shard.path, columns)

    @cached_property
    def _index(self) -> pa.Table:
        table = self._table(self.manifest.index).combine_chunks()
        if not table.schema.equals(INDEX_SCHEMA):
            raise self._no_index()
        self._check_ordinals(table["shard"].to_numpy())
        return table

    @cached_property
    def _places(self) -> IdIndex:
        return IdIndex(self._index["image_id"])

    @cached_property
    def _index_is_whole(self) -> bool:
        if not self._file_has(self.manifest.index, INDEX_SCHEMA):
            raise self._no_index()
        return True

    def _file_has(self, entry: FileEntry, schema: pa.Schema) -> bool:
        """Whether a file, whose sha256 is checked, has these columns."""
        check_entry(self.store, entry)
        with open_shard(self.store, entry.path) as file:
            return bool(file.schema_arrow.equals(schema))

    def _of_known_shards(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            self._check_ordinals(batch["shard"].to_numpy())
            yield batch

    def _check_ordinals(self, ordinals: npt.NDArray[np.int32]) -> None:
        if ordinals.size and not 0 <= ordinals.min() <= ordinals.max() < len(self.shards):
            raise self._no_index()

    def _no_index(self) -> VerificationFailed:
        return VerificationFailed(
            f"{self.store.where(self.manifest.index.path)} is not an index of the manifest's shards: "
            "run the tokenize stage again to write it anew"
        )

    def _no_rejects(self) -> VerificationFailed:
        return VerificationFailed(
            f"{self.store.where(self.manifest.rejects.path)} does not have the columns of a rejects file: "
            "run the tokenize stage again to write it anew"
        )

    def _table(self, entry: FileEntry) -> pa.Table:
        data = read_entry(self.store, entry, limit=entry.bytes)
        return read_parquet(pa.py_buffer(data), self.store.where(entry.path))

    def _rows_of_shard(self, shard: ShardEntry, rows: npt.NDArray[np.int32]) -> Iterator[npt.NDArray[Any]]:
        """The codes or features of some rows, in the order asked; only their row groups are decoded."""
        spec = self.manifest.producer
        column = value_column(spec)
        path = self.store.where(shard.path)
        with open_shard(self.store, shard.path) as file:
            sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
            starts = np.concatenate([[0], np.cumsum(sizes)])
            if starts[-1] != shard.rows or rows.max() >= shard.rows or rows.min() < 0:
                raise VerificationFailed(f"{path} has other rows than its manifest says: run asvr verify on its folder")
            groups = np.searchsorted(starts, rows, side="right") - 1
            needed, ranks = np.unique(groups, return_inverse=True)
            try:
                table = file.read_row_groups(needed.tolist(), columns=[column.kind])
            except UNREADABLE as error:
                raise self.store.fault(shard.path, error) or damaged(path, error) from error
        wanted = shard_schema(column).field(column.kind)
        if table.schema.names != [column.kind] or not table.schema.field(column.kind).equals(wanted):
            raise damaged(path, ValueError(f"it does not have the column {wanted}"))
        values, offsets = list_values(table[column.kind])
        # Where each group that was read starts in the table, so that a row of the shard becomes a row of the table.
        bases = np.concatenate([[0], np.cumsum(np.asarray(sizes)[needed])])
        for row in bases[ranks] + rows - starts[groups]:
            mine = values[offsets[row] : offsets[row + 1]]
            if not mine.size or mine.size % (spec.positions * spec.values):
                raise VerificationFailed(
                    f"{path} has a row of {mine.size} {column.kind}: run asvr verify on its folder"
                )
            yield mine.reshape(-1, spec.positions, spec.values).copy()  # a view would keep the whole table alive


def open_manifest(path: str | Path) -> OpenManifest:
    """Open an output folder, its `manifest.json`, or one of its `snapshots/`; the shards' sizes are checked.

    Raises `InputError` where no manifest is, and `VerificationFailed` for one that is damaged or names shards
    that are missing or have another size.
    """
    opened = load_manifest(path)
    for problem in shard_problems(opened.store, opened.shards):
        raise VerificationFailed(f"{problem.message}: run asvr verify on {opened.folder} to see all that is damaged")
    return opened


def load_manifest(path: str | Path) -> OpenManifest:
    """Open a manifest as `open_manifest` does, without a look at its shards."""
    store, manifest, data = read_manifest(path)
    shards = manifest.shards if manifest.shards_file is None else read_shard_list(store, manifest.shards_file)
    return OpenManifest(manifest, store, hashlib.sha256(data).hexdigest(), tuple(shards))


def locate_manifest(location: str | Path) -> tuple[Store, str]:
    """The folder, and the path in it, of the manifest that `location` names: a folder, its manifest or a snapshot.

    Nothing need be there. What ends in .json is a manifest, unless it is a local folder.
    """
    text = str(location).rstrip("/")
    parent, _, name = text.rpartition("/")
    if not name.endswith(".json") or (not is_url(text) and Path(text).is_dir()):
        return Store.open(text), MANIFEST_NAME
    above, _, last = parent.rpartition("/")
    if last == "snapshots":
        return Store.open(above or "."), f"snapshots/{name}"
    return Store.open(parent or ("/" if text.startswith("/") else ".")), name


def read_manifest(path: str | Path) -> tuple[Store, Manifest, bytes]:
    """The folder, the manifest and its bytes; errors as of `open_manifest`."""
    store, name = locate_manifest(path)
    place = store.where(name)
    size = store.size_if_there(name)
    if size is None:
        raise InputError(f"there is no manifest at {place}: give the output folder of a finished tokenize job")
    if size > _LARGEST_MANIFEST:
        raise VerificationFailed(f"{place} has {size} bytes, which is no manifest: restore it from a backup")
    data = store.read(name)
    try:
        manifest = parsed(Manifest, data, MANIFEST_UPGRADES, place)
    except ValidationError as error:
        raise VerificationFailed(
            f"{place} is not a manifest ({first_problem(error)}): restore it, or run the tokenize stage again"
        ) from error
    return store, manifest, data


def read_shard_list(store: Store, entry: FileEntry) -> list[ShardEntry]:
    """The shards of a manifest that keeps its list in a side file."""
    data = read_entry(store, entry, limit=_LARGEST_MANIFEST)
    try:
        return _SHARD_LIST.validate_json(decompress(data, limit=_LARGEST_LISTING))
    except (zstandard.ZstdError, ValidationError) as error:
        raise VerificationFailed(
            f"{store.where(entry.path)} is not a list of shards ({first_problem(error)}): "
            "run the tokenize stage again to write it anew"
        ) from error
