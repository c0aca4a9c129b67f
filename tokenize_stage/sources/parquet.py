"""The `parquet` source: pictures in, or named by, the rows of Parquet files; also Arrow files that `datasets` saved.

No picture is read here, so the size of one is not known: a row's identity is the size and time of its file. A file that
changed is tokenized anew, and no other one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import pyarrow as pa
import pyarrow.types as pt

from manifests.errors import InputError
from manifests.id_index import IdIndex
from manifests.images import ImageSource
from manifests.parallel import ordered_map
from manifests.records import BadRecord
from manifests.schema import SourceIdentity
from manifests.storage import FileStat, Store
from manifests.table_files import TableFile, open_table
from tokenize_stage.config import ParquetSource
from tokenize_stage.retry import with_retries
from tokenize_stage.sources.inventory import Container, Inventory, KnownContainers, container_rows, is_text, joined
from tokenize_stage.sources.listing import AT_ONCE, find_files
from tokenize_stage.sources.references import open_root, referenced

TABLE_SUFFIXES = (".parquet", ".arrow")

_CACHE_PREFIX = "cache-"  # what `datasets` computed from a data set lies beside it


class _Found(NamedTuple):
    """A file with its rows, or the references of a column of paths."""

    container: Container
    table: pa.Table
    references: list[tuple[str | None, int]]


def parquet_inventory(config: ParquetSource, known: KnownContainers | None = None) -> Inventory:
    """Every row of every file, or each picture that a column of paths names once.

    A file that does not open is a source error. Raises `InputError` when there is no file or row, when a column is
    absent or of a wrong type, and for an id that is empty or occurs twice; `StorageError` when the storage keeps failing.
    """
    errors: list[BadRecord] = []
    store, files = find_files(config.path, TABLE_SUFFIXES, "source.path", errors)
    files = [(file, stat) for file, stat in files if not _is_cache(file)]
    found: list[_Found] = []
    for one in ordered_map(partial(_look, store, config, known), files, threads=AT_ONCE):
        found.append(one)
        errors += [BadRecord(-1, message) for message in one.container.errors]
    _same_columns(store, config, found)
    settings = config.model_dump(mode="json", exclude={"kind", "path", "image_root"})
    if config.image_root is not None:
        root = open_root(config.image_root, "source.image_root")
        table = referenced(_rows(found, errors), root, errors)
        settings["image_root"] = root.location
        inventory = Inventory(table, errors, ImageSource(root.location), _identity(store, settings))
    else:
        table = joined([one.table for one in found])
        source = ImageSource(store.location, config.image_column, config.carry)
        containers = tuple(one.container for one in found)
        inventory = Inventory(table, errors, source, _identity(store, settings), containers)
    if not inventory.images:
        raise InputError(
            f"no file below {store.location} has a row with an image (first {files[0][0]}; {len(errors)} errors"
            f"{': ' + errors[0].message if errors else ''}): correct source.path"
        )
    if config.id_column is not None and (twice := IdIndex(table["image_id"]).duplicate()) is not None:
        raise InputError(
            f"the id {twice!r} occurs twice in {config.id_column!r} of {store.location}: make the ids unique"
        )
    return inventory


def _identity(store: Store, settings: dict[str, object]) -> SourceIdentity:
    return SourceIdentity(kind="parquet", location=store.location, settings=settings)


def _is_cache(file: str) -> bool:
    name = file.rpartition("/")[2]
    return name.startswith(_CACHE_PREFIX) and name.endswith(".arrow")


def _look(
    store: Store, config: ParquetSource, known: KnownContainers | None, file: tuple[str, FileStat | None]
) -> _Found:
    name, stat = file
    if stat is None:
        return _broken(name, FileStat(0, 0), f"{store.where(name)} is no file")
    if config.image_root is None and (remembered := known.rows(name, *stat) if known else None):
        rows, container = remembered
        return _Found(container, rows, [])
    return with_retries(lambda: _read(store, config, name, stat), f"reading {store.where(name)}")


def _read(store: Store, config: ParquetSource, name: str, stat: FileStat) -> _Found:
    try:
        table = open_table(store, name)
    except (pa.ArrowException, OSError) as error:
        return _broken(name, stat, _damage(store, name, error))
    try:
        _check(store, config, name, table.schema)
        if config.image_root is not None:
            cells = table.read([config.image_column])[config.image_column].to_pylist()
            return _Found(Container(name, *stat, 0), joined([]), list(zip(cells, range(len(cells)), strict=True)))
        ids = _ids(store, config, name, table)
        carried = tuple(str(table.schema.field(column).type) for column in config.carry)
    except (pa.ArrowException, OSError) as error:
        return _broken(name, stat, _damage(store, name, error))
    finally:
        table.close()
    rows = container_rows(
        name, ids, size=stat.size, mtime_ns=stat.mtime_ns, source_row=range(len(ids)), offset=range(len(ids))
    )
    return _Found(Container(name, *stat, len(ids), carried=carried), rows, [])


def _broken(name: str, stat: FileStat, message: str) -> _Found:
    return _Found(Container(name, *stat, 0, (message,)), joined([]), [])


def _damage(store: Store, name: str, error: Exception) -> str:
    """What is wrong with a file; raises when it is the storage that failed."""
    if fault := store.fault(name, error):
        raise fault from error
    if isinstance(error, OSError) and error.errno is not None:  # the disk's; damage has no number
        raise error
    return f"{store.where(name)} is no readable {name.rpartition('.')[2]} file ({' '.join(str(error).split())[:200]})"


def _ids(store: Store, config: ParquetSource, name: str, table: TableFile) -> list[str]:
    if config.id_column is None:
        return [f"{name}!{row}" for row in range(table.rows)]
    values = table.read([config.id_column])[config.id_column].to_pylist()
    ids = ["" if value is None else str(value) for value in values]
    for row, image_id in enumerate(ids):
        if image_id in ("", name) or "\0" in image_id or not is_text(image_id):
            where = f"row {row} of {store.where(name)}"
            raise InputError(
                f"{where} has no usable id in {config.id_column!r} ({image_id!r}): fill it in or leave out id_column"
            )
    return ids


def _check(store: Store, config: ParquetSource, name: str, schema: pa.Schema) -> None:
    """Raise `InputError` unless the file has the columns of the configuration, with types that can be used."""
    where = store.where(name)
    for key, column in (("image_column", config.image_column), ("id_column", config.id_column)):
        if column is not None and schema.get_field_index(column) < 0:
            raise InputError(
                f"{where} has no column {column!r}, it has {', '.join(schema.names)}: correct source.{key}"
            )
    for column in config.carry:
        if schema.get_field_index(column) < 0:
            raise InputError(
                f"{where} has no column {column!r}, it has {', '.join(schema.names)}: correct source.carry"
            )
    if config.id_column is not None:
        kind = schema.field(config.id_column).type
        if not (_is_text(kind) or pt.is_integer(kind)):
            raise InputError(
                f"{config.id_column!r} of {where} is {kind}, not text or an integer: correct source.id_column"
            )
    kind = schema.field(config.image_column).type
    if config.image_root is None and not _holds_images(kind):
        hint = (
            "give source.image_root, which the paths are relative to"
            if _is_text(kind)
            else "correct source.image_column"
        )
        raise InputError(f"{config.image_column!r} of {where} is {kind}, which holds no image bytes: {hint}")
    if config.image_root is not None and not _is_text(kind):
        raise InputError(
            f"{config.image_column!r} of {where} is {kind}, which holds no paths: leave out source.image_root"
        )
    if config.image_root is not None and (config.carry or config.id_column):
        key = "carry" if config.carry else "id_column"
        raise InputError(
            f"source.{key} needs a column with image bytes, and {config.image_column!r} has paths: leave it out"
        )


def _is_text(kind: pa.DataType) -> bool:
    return pt.is_string(kind) or pt.is_large_string(kind) or pt.is_string_view(kind)


def _is_bytes(kind: pa.DataType) -> bool:
    return pt.is_binary(kind) or pt.is_large_binary(kind) or pt.is_binary_view(kind)


def _holds_images(kind: pa.DataType) -> bool:
    if pt.is_struct(kind):
        at = kind.get_field_index("bytes")
        return at >= 0 and _is_bytes(kind.field(at).type)
    return _is_bytes(kind)


def _same_columns(store: Store, config: ParquetSource, found: Sequence[_Found]) -> None:
    """Raise `InputError` if a carried column has not the same type in all files."""
    files = [one.container for one in found if one.container.carried]
    for file in files[1:]:
        for name, kind, first in zip(config.carry, file.carried, files[0].carried, strict=True):
            if kind != first:
                raise InputError(
                    f"{name!r} is {kind} in {store.where(file.file)} and {first} in {store.where(files[0].file)}: "
                    "write them with one schema, or leave it out of source.carry"
                )


def _rows(found: Sequence[_Found], errors: list[BadRecord]) -> Iterator[tuple[str, int]]:
    """The references of all files, rows counted through; an empty cell is a source error."""
    start = 0
    for one in found:
        for reference, row in one.references:
            if reference:
                yield reference, start + row
            else:
                errors.append(BadRecord(start + row, f"row {row} of {one.container.file} has no path"))
        start += len(one.references)
