"""How long it takes to make the manifest of a set from its commit records, and how much memory.

    python -m benchmarks.manifest [--images 204800 614400]

For each number of images a set of one random code an image is written; its manifest is made in a process of its own.
The last column is the memory beyond that process's imports; what a code costs does not matter, because they are not read.
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
import pyarrow as pa

from benchmarks.plan import UNIT, inventory, peak_bytes
from manifests.commits import ManifestHeader, assemble_manifest, read_commits, write_commit
from manifests.fingerprint import fingerprint
from manifests.schema import Geometry, SourceIdentity, TokenizerSpec
from manifests.storage import Store

SPEC = TokenizerSpec(
    kind="random", origin="random", weights_sha256={}, view_size=14, grid=(1, 1), codebook_sizes=(16384,), code_dim=1
)
HEADER = ManifestHeader(
    fingerprint_keys={"tokenizer": "random codes"},
    tokenizer=SPEC,
    geometry=Geometry(mode="squash", size=14),
    codebooks=[np.zeros((16384, 1), np.float32)],
    source=SourceIdentity(kind="folder", location="nowhere"),
    source_errors=0,
    command=["benchmarks.manifest"],
    versions={},
)


def main() -> None:
    """Make each set, measure, print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--images", type=int, nargs="+", default=[204_800, 614_400])
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.folder:
        print(json.dumps(measure(options.folder)))
        return
    print(f"date      {datetime.now(UTC):%Y-%m-%d %H:%M} UTC")
    print(f"machine   {platform.machine()}, {len(os.sched_getaffinity(0))} cores usable, load {os.getloadavg()[0]:.1f}")
    print(f"versions  Python {platform.python_version()}, pyarrow {pa.__version__}, numpy {np.__version__}")
    print(f"{'images':>12} {'seconds':>8} {'peak MB':>8} {'of it beyond the imports':>25}")
    for images in options.images:
        with tempfile.TemporaryDirectory() as place:
            write(Path(place), images)
            command = [sys.executable, "-m", "benchmarks.manifest", "--folder", place]
            found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        print("{images:12,} {seconds:8.1f} {peak:8.0f} {beyond:25.0f}".format(images=images, **found), flush=True)


def measure(folder: Path) -> dict[str, float]:
    """Make the manifest in this process, which has done nothing else."""
    before, began = peak_bytes(), time.perf_counter()
    store = Store.open(folder)
    assemble_manifest(store, HEADER, read_commits(store))
    peak = peak_bytes()
    return {"seconds": time.perf_counter() - began, "peak": peak / 1e6, "beyond": (peak - before) / 1e6}


def write(folder: Path, images: int) -> None:
    """Shards and commit records."""
    from benchmarks.shards import unit  # not at the top: it imports torch, which the measured process does without

    store, mark, rng = Store.open(folder), fingerprint(HEADER.fingerprint_keys), np.random.default_rng(0)
    for number, start in enumerate(range(0, images, UNIT)):
        ids = inventory(np.arange(start, min(start + UNIT, images)))["image_id"].to_pylist()
        codes = rng.integers(SPEC.codebook_sizes[0], size=(len(ids), 1), dtype=np.int32)
        write_commit(store, unit(store, mark, f"u{number:06d}", ids, codes, SPEC))


if __name__ == "__main__":
    main()
