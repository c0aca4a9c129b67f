"""What a training run pays to read its codes from a large set: finding its images, copying their shards, reading at random.

    python -m benchmarks.lookup [--images 500000 10000000] [--needed 100000]

For each number of images a set of one random code an image is written. A run that trains on `--needed` of them, the first
as they stand, is made in a process of its own: it finds them in the index, copies the shards they are in, and reads rows
of them at random. The last column is the memory of all that beyond the process's imports.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.machine import describe
from benchmarks.manifest import HEADER, write
from benchmarks.plan import inventory, peak_bytes
from manifests.commits import assemble_manifest, read_commits
from manifests.reader import open_manifest
from manifests.storage import Store
from train_stage.tables import Tables

READS = 100_000


def main() -> None:
    """Make each set, measure, print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--images", type=int, nargs="+", default=[500_000, 10_000_000])
    parser.add_argument("--needed", type=int, default=100_000, help="images that the run trains on")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.folder:
        print(json.dumps(measure(options.folder, options.needed)))
        return
    print(describe(torch.device("cpu")))
    print(f"\n{'images':>12} {'needed':>9} {'find s':>8} {'copy s':>8} {'random row us':>14} {'memory MB':>10}")
    for images in options.images:
        needed = min(options.needed, images)
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place) / "set"
            write(folder, images)
            store = Store.open(folder)
            assemble_manifest(store, HEADER, read_commits(store))
            command = [sys.executable, "-m", "benchmarks.lookup", "--folder", str(folder), "--needed", str(needed)]
            environment = os.environ | {"ASVR_CACHE": str(Path(place) / "cache")}
            done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
        found = json.loads(done.stdout)
        print(
            "{images:12,} {needed:9,} {find:8.1f} {copy:8.1f} {read:14.1f} {memory:10.0f}".format(
                images=images, needed=needed, **found
            ),
            flush=True,
        )


def measure(folder: Path, needed: int) -> dict[str, float]:
    """Find, copy and read in this process, which has done nothing else."""
    image_ids = inventory(np.arange(needed))["image_id"].to_pylist()
    before = peak_bytes()
    tables = Tables([open_manifest(folder)])
    began = time.perf_counter()
    rows = tables.find(image_ids)
    found = time.perf_counter()
    tables.open_values(rows)
    copied = time.perf_counter()
    chance = np.random.default_rng(0)
    for image in chance.integers(needed, size=READS).tolist():
        tables.values(rows, image)
    read = time.perf_counter() - copied
    assert (rows.row >= 0).all()  # noqa: S101 - else it measured something else
    return {
        "find": found - began,
        "copy": copied - found,
        "read": read / READS * 1e6,
        "memory": (peak_bytes() - before) / 1e6,
    }


if __name__ == "__main__":
    main()
