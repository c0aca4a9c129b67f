"""The `webdataset` source: the pictures in tar files, each tar in its own order.

An image_id is `TAR!KEY`: the tar's path below the source root, and the sample's key, which is the member's path up to
the first dot of its name. `TAR!KEY.SUFFIX` it is for a picture with a suffix of several parts (`a.left.png`), and for
the second and further pictures of a key in the order of the tar. So an id depends on nothing that comes after it.
"""

from __future__ import annotations

from functools import partial

import pyarrow as pa

from manifests.errors import InputError
from manifests.images import ImageSource
from manifests.parallel import ordered_map
from manifests.records import BadRecord
from manifests.schema import SourceIdentity
from manifests.storage import FileStat, Store
from tokenize_stage.config import WebdatasetSource
from tokenize_stage.retry import with_retries
from tokenize_stage.sources.inventory import Container, Inventory, KnownContainers, joined
from tokenize_stage.sources.listing import AT_ONCE, find_files
from tokenize_stage.sources.tar_index import index_tar

TAR_SUFFIXES = (".tar", ".tar.zst")


def webdataset_inventory(config: WebdatasetSource, known: KnownContainers | None = None) -> Inventory:
    """Every picture of every tar; a tar that `known` has as it is now is not read.

    A truncated or damaged tar gives the samples before the damage and one error. Raises `InputError` when there is no
    tar or no picture in any, `StorageError` when the storage keeps failing.
    """
    errors: list[BadRecord] = []
    store, files = find_files(config.path, TAR_SUFFIXES, "source.path", errors)
    index = partial(_index, store, config.carry, known)
    tables: list[pa.Table] = []
    containers: list[Container] = []
    for table, container in ordered_map(index, files, threads=AT_ONCE):
        tables.append(table)
        containers.append(container)
        errors += [BadRecord(-1, message) for message in container.errors]
    table = joined(tables)
    if not table.num_rows:
        raise InputError(
            f"no tar below {store.location} has a picture"
            + (f" ({errors[0].message}, and {len(errors) - 1} more errors)" if errors else "")
            + ": correct source.path"
        )
    identity = SourceIdentity(kind="webdataset", location=store.location, settings={"carry": list(config.carry)})
    source = ImageSource(store.location, carry=config.carry)
    return Inventory(table, errors, source, identity, tuple(containers))


def _index(
    store: Store, carry: tuple[str, ...], known: KnownContainers | None, found: tuple[str, FileStat | None]
) -> tuple[pa.Table, Container]:
    file, stat = found
    if stat is None:
        stat = FileStat(0, 0)
        table, errors = joined([]), [f"{store.where(file)} is no file"]
    elif remembered := known.rows(file, *stat) if known else None:
        return remembered
    else:
        index = with_retries(lambda: index_tar(store, file, stat, carry), f"reading {store.where(file)}")
        table, errors = index.table(file, stat.mtime_ns), index.errors
    return table, Container(file, stat.size, stat.mtime_ns, table.num_rows, tuple(errors))
