"""The remembered inventory: OUTPUT/inventory.parquet, so that what was listed once is not listed again.

The rule. Records files, tars and Parquet files are looked at on every run, and only new and changed ones are read. Images
in files of their own are looked at on every run too, up to a million of them. Of more, the last listing is used until
`--refresh`, or until the records file changes; every run that does so says so, with the date.
"""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import cached_property
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError

from manifests.documents import first_problem
from manifests.errors import VerificationFailed
from manifests.forgotten import without_forgotten
from manifests.images import ImageSource
from manifests.records import BadRecord
from manifests.schema import Frozen, SourceIdentity
from manifests.shard_reader import UNREADABLE
from manifests.storage import Store
from tokenize_stage.config import SourceConfig
from tokenize_stage.sources import Inventory, take_inventory
from tokenize_stage.sources.inventory import Container
from tokenize_stage.sources.looked_at import looked_at

INVENTORY_NAME = "inventory.parquet"

ALWAYS_LISTED = 1_000_000
"""Images in files of their own up to which a source is listed on every run."""

_HEADER = b"asvr.inventory"
_ROW_GROUP_ROWS = 1 << 17

_log = logging.getLogger(__name__)


class Header(Frozen):
    """What the file says beside its rows: which source it is of, what that looked like, and what was wrong with it."""

    version: Literal[1] = 1
    taken_at: str
    images: int
    config: dict[str, Any]
    looked_at: Any
    errors: list[tuple[int, str]]
    root: str
    column: str | None
    carry: tuple[str, ...]
    source: SourceIdentity
    containers: list[Container]


@dataclass(frozen=True)
class Remembered:
    """An inventory of an earlier run. Its rows are read when they are asked for; a `KnownContainers`."""

    store: Store
    header: Header

    def inventory(self) -> Inventory:
        """The inventory as it was."""
        header = self.header
        return Inventory(
            table=self.table,
            errors=[BadRecord(row, message) for row, message in header.errors],
            images_at=ImageSource(header.root, header.column, header.carry),
            source=header.source,
            containers=tuple(header.containers),
        )

    def rows(self, file: str, size: int, mtime_ns: int) -> tuple[pa.Table, Container] | None:
        """See `KnownContainers`."""
        start, container = self._containers.get(file, (0, None))
        if container is None or (container.size, container.mtime_ns) != (size, mtime_ns):
            return None
        return self.table.slice(start, container.rows), container

    @cached_property
    def table(self) -> pa.Table:
        """The rows; `VerificationFailed` when they do not read."""
        try:
            with self.store.open_input(INVENTORY_NAME) as file:
                table = pq.ParquetFile(file, page_checksum_verification=True).read()
        except UNREADABLE as error:
            if fault := self.store.fault(INVENTORY_NAME, error):
                raise fault from error
            raise VerificationFailed(
                f"{self.store.where(INVENTORY_NAME)} is damaged ({first_problem(error)}): delete it and run again"
            ) from error
        return table.replace_schema_metadata(None)

    @cached_property
    def _containers(self) -> dict[str, tuple[int, Container]]:
        starts = np.cumsum([0, *(one.rows for one in self.header.containers)]).tolist()
        return {one.file: (start, one) for start, one in zip(starts, self.header.containers, strict=False)}


@dataclass(frozen=True)
class Listing:
    """The inventory a job goes by. `remembered`: it is that of an earlier run, of which no row was read so far.

    `taken_at` names it: a remembered one keeps the name it had.
    """

    store: Store
    config: SourceConfig
    taken_at: str
    taken: Inventory | None
    remembered: Remembered | None
    looked_at: Any

    @property
    def note(self) -> str:
        """That images were not looked at, where they were not."""
        if self.remembered is None or self.remembered.header.containers:
            return ""
        return f"inventory of {self.taken_at[:16].replace('T', ' ')} UTC, --refresh lists again"

    @cached_property
    def inventory(self) -> Inventory:
        """The images, without those that the set has to forget."""
        whole = self._whole
        return replace(whole, table=without_forgotten(self.store, whole.table))

    @property
    def source(self) -> SourceIdentity:
        return self.remembered.header.source if self.remembered else self._whole.source

    @property
    def source_errors(self) -> int:
        return len(self.remembered.header.errors) if self.remembered else len(self._whole.errors)

    @property
    def is_kept(self) -> bool:
        """Whether a later run has any use for it."""
        if self.remembered:
            return True
        whole = self._whole
        return bool(whole.containers) or whole.images > ALWAYS_LISTED

    def remember(self) -> None:
        """Keep it beside the output, if it is new and of use. Hold the lease."""
        if self.remembered:
            return
        if not self.is_kept:
            self.store.delete(INVENTORY_NAME)
            return
        whole = self._whole
        header = Header(
            taken_at=self.taken_at,
            images=whole.images,
            config=self.config.model_dump(mode="json"),
            looked_at=self.looked_at,
            errors=[(error.row, error.message) for error in whole.errors],
            source=whole.source,
            containers=list(whole.containers),
            **asdict(whole.images_at),
        )
        self.store.write(INVENTORY_NAME, _encode(whole.table, header))

    @cached_property
    def _whole(self) -> Inventory:
        if self.taken is not None:
            return self.taken
        assert self.remembered is not None  # noqa: S101 - one of the two is there
        return self.remembered.inventory()


def list_source(store: Store, config: SourceConfig, *, refresh: bool) -> Listing:
    """The inventory of a source: the remembered one where it may stand for the source, else a new one.

    With `refresh` nothing that is remembered is used. Raises what `take_inventory` raises.
    """
    known = None if refresh else _remembered(store, config)
    seen = looked_at(config)
    if known and known.header.looked_at == seen:
        return Listing(store, config, known.header.taken_at, None, known, seen)
    if known and known.header.containers:
        _ = known.table  # read once, before many threads ask for parts of it
    now = datetime.now(UTC).isoformat()
    return Listing(store, config, now, take_inventory(config, known), None, seen)


def _remembered(store: Store, config: SourceConfig) -> Remembered | None:
    """The remembered inventory if it is of this very source."""
    if not store.exists(INVENTORY_NAME):
        return None
    try:
        with store.open_input(INVENTORY_NAME) as file:
            metadata = pq.ParquetFile(file).metadata.metadata or {}
        header = Header.model_validate_json(metadata.get(_HEADER, b""))
    except (*UNREADABLE, ValidationError) as error:
        if fault := store.fault(INVENTORY_NAME, error):
            raise fault from error
        _log.warning(
            "%s is damaged (%s): the source is listed again", store.where(INVENTORY_NAME), first_problem(error)
        )
        return None
    return Remembered(store, header) if header.config == config.model_dump(mode="json") else None


def _encode(table: pa.Table, header: Header) -> memoryview:
    """Parquet: ids as what differs from the one before, so that ten million paths take some tens of megabytes."""
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(
        sink,
        table.schema,
        compression="zstd",
        compression_level=1,
        use_dictionary=["file"],
        column_encoding={"image_id": "DELTA_BYTE_ARRAY"},
        write_statistics=False,
        write_page_checksum=True,
    ) as writer:
        writer.add_key_value_metadata({_HEADER: header.model_dump_json().encode()})
        writer.write_table(table, row_group_size=_ROW_GROUP_ROWS)
    return memoryview(sink.getvalue())
