"""How long planning takes, and how much memory, at ten million images: python -m benchmarks.plan

Each case runs in a process of its own on a folder with a remembered inventory and real commit records; the shards are
empty files, since a plan looks at their sizes only. Target: under 60 s and 2 GB on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from manifests.commits import CommitRecord, MemberColumns, write_commit
from manifests.images import ImageSource
from manifests.schema import Numerics, ShardEntry, SourceIdentity
from manifests.storage import Store
from tokenize_stage.config import FolderSource
from tokenize_stage.inventory_cache import Listing, list_source
from tokenize_stage.output_folder import Folder
from tokenize_stage.sources.inventory import FILE_TYPE, INVENTORY_SCHEMA, Inventory
from tokenize_stage.units import Plan, plan_units, same_images, unit_name

CASES = {
    "new": "nothing committed",
    "same": "all committed, all unchanged",
    "mixed": "1 % changed, 1 % new, 1 % removed, all over the place",
    "shuffled": "all committed, the source in another order",
    "index": "a finished set compared with its index",
}
UNIT = 4096
MARK = "0" * 64
SOURCE = FolderSource(path=Path("/images"))

Rows = npt.NDArray[np.int64]


def main() -> None:
    """Make the folders, run each case, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=10_000_000)
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(measure(arguments.case, arguments.folder)))
        return
    print(f"date      {datetime.now(UTC):%Y-%m-%d %H:%M} UTC")
    print(
        f"machine   {platform.processor() or platform.machine()}, {len(os.sched_getaffinity(0))} cores usable, ", end=""
    )
    print(f"load {os.getloadavg()[0]:.1f} before the start")
    print(f"versions  Python {platform.python_version()}, pyarrow {pa.__version__}, numpy {np.__version__}")
    print(f"images    {arguments.images:,} in units of {UNIT:,}")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        make(folder, arguments.images)
        print(f"inventory {(folder / 'same' / 'inventory.parquet').stat().st_size / 1e6:,.0f} MB on disk")
        print(f"{'seconds':>8} {'peak GB':>8} {'units':>8} {'to encode':>11}  case")
        for case, what in CASES.items():
            command = [sys.executable, "-m", "benchmarks.plan", "--case", case, "--folder", str(folder)]
            found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            print("{seconds:8.1f} {gigabytes:8.2f} {units:8,} {encode:11,}".format(**found), f" {what}", flush=True)


def measure(case: str, folder: Path) -> dict[str, float]:
    """Plan one case in this process, which has done nothing else."""
    began = time.perf_counter()
    store = Store.open(folder / case)
    listing = list_source(store, SOURCE, refresh=False)
    units = encode = 0
    if case == "index":
        file = pq.ParquetFile(folder / "index.parquet")
        batches = (pa.Table.from_batches([batch]) for batch in file.iter_batches(1 << 16))
        if not same_images(listing.inventory.table, batches):
            raise SystemExit("the index is not the inventory")
    else:
        plan = _plan(store, listing)
        units, encode = sum(1 for _ in plan.units), plan.encode  # every unit is cut out once
    return {
        "seconds": time.perf_counter() - began,
        "gigabytes": peak_bytes() / 1e9,
        "units": units,
        "encode": encode,
    }


def peak_bytes() -> int:
    """The most memory this program ever held. `getrusage` would count that of the process that started it."""
    text = Path("/proc/self/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) << 10 for line in text.splitlines() if line.startswith("VmHWM:"))


def _plan(store: Store, listing: Listing) -> Plan:
    committed = Folder(store, MARK, replace=False).units()
    return plan_units(listing.inventory.table, committed, UNIT)


def make(folder: Path, images: int) -> None:
    """A folder for each case; those with commit records share them."""
    rng = np.random.default_rng(0)
    base = inventory(np.arange(images) * 2)
    _remember(folder / "same", base)
    _commit(folder / "same", base)
    for case in ("mixed", "shuffled", "index", "new"):
        (folder / case).mkdir()
        if case in ("mixed", "shuffled"):
            for part in ("commits", "shards"):
                (folder / case / part).symlink_to(folder / "same" / part)
    changed = rng.random(images) < 0.01
    mtimes = pc.add(base["mtime_ns"], pa.array(changed.astype(np.int64)))
    kept = base.set_column(2, INVENTORY_SCHEMA.field("mtime_ns"), mtimes).filter(pa.array(rng.random(images) >= 0.01))
    new = inventory(np.sort(rng.choice(images, images // 100, replace=False)) * 2 + 1)
    # In the order of their names, as a folder lists them: the numbers in the ids decide it.
    places = np.concatenate([_numbers(kept), _numbers(new)])
    _remember(folder / "mixed", pa.concat_tables([kept, new]).take(np.argsort(places)))
    _remember(folder / "shuffled", base.take(rng.permutation(images)))
    _remember(folder / "new", base)
    _remember(folder / "index", base)
    rejected = rng.random(images) < 0.001  # as in a real set, rejects stand in a file of their own, after the index
    rows = pa.concat_tables([base.filter(pa.array(~rejected)), base.filter(pa.array(rejected))])
    pq.write_table(rows.select(["image_id", "size", "mtime_ns"]), folder / "index.parquet", row_group_size=1 << 20)


def inventory(numbers: Rows) -> pa.Table:
    """Images with these numbers: ids of 43 letters as folders of photos have them, sizes and times of their own."""
    text = pc.utf8_lpad(pc.cast(pa.array(numbers), pa.string()), width=9, padding="0")
    hashed = pc.utf8_lpad(pc.cast(pa.array(numbers * 2654435761 % 10**10), pa.string()), width=10, padding="0")
    folders = pc.utf8_lpad(pc.cast(pa.array(numbers // 10_000), pa.string()), width=5, padding="0")
    ids = pc.binary_join_element_wise("train/part-", folders, "/", text, "_", hashed, ".jpg", "")
    count = len(numbers)
    return pa.Table.from_arrays(
        [
            ids,
            pa.array(20_000 + numbers % 300_007),
            pa.array(1_700_000_000_000_000_000 + numbers * 1_000_003),
            pa.array(np.arange(count)),
            pa.nulls(count, FILE_TYPE),
            pa.array(np.zeros(count, np.int64)),
        ],
        schema=INVENTORY_SCHEMA,
    )


def _numbers(table: pa.Table) -> Rows:
    """The numbers that the images were made from."""
    found: Rows = ((table["mtime_ns"].to_numpy() - 1_700_000_000_000_000_000) // 1_000_003).astype(np.int64)
    return found


def _remember(folder: Path, table: pa.Table) -> None:
    taken = Inventory(table, [], ImageSource("/images"), SourceIdentity(kind="folder", location="/images"))
    Listing(Store.open(folder), SOURCE, "2026-01-01T00:00:00", taken, None, None).remember()


def _commit(folder: Path, table: pa.Table) -> None:
    store = Store.open(folder)
    (folder / "shards").mkdir(parents=True)
    for number, start in enumerate(range(0, table.num_rows, UNIT)):
        members, unit = MemberColumns.of_table(table.slice(start, UNIT)), unit_name(number)
        shard = ShardEntry(
            path=f"shards/{unit}-{MARK[:16]}.parquet", bytes=0, sha256=MARK, unit=unit, rows=len(members)
        )
        (folder / shard.path).touch()
        record = CommitRecord(
            fingerprint=MARK,
            unit=unit,
            shard=shard,
            members=members,
            rejects=[],
            usage="",
            views=len(members),
            codes=0,
            numerics=Numerics(device="none", torch="none", dtype="float32", batch_size=1),
            seconds=0,
        )
        write_commit(store, record)


if __name__ == "__main__":
    main()
