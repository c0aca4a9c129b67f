"""How many images a machine can decode: the limit of a tokenize job whose encoder is faster than its cores.

    python -m benchmarks.decode --images FOLDER --size 384 --mode pad --threads 1 2

Where the time of an image goes, measured in one thread; then what a worker's decoder gives with several. A GPU that
encodes N images a second needs N / (images/s of one core) cores beside it, or `ray.decode: cluster`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from benchmarks.machine import describe
from manifests.decode import DEFAULT_MAX_PIXELS, decode
from manifests.geometry import make_views
from manifests.images import UnitReader
from manifests.schema import TokenizerSpec
from tokenize_stage.config import FittedTokenizer, FolderSource, GeometryConfig
from tokenize_stage.decoding import ThreadDecoder
from tokenize_stage.order import WorkOrder
from tokenize_stage.sources import take_inventory
from tokenize_stage.table_rows import take_rows

T = TypeVar("T")
R = TypeVar("R")


def timed(call: Callable[[T], R], items: Sequence[T]) -> tuple[float, list[R]]:
    """Seconds an item, the best of three rounds, and the results."""
    best = float("inf")
    for _ in range(3):
        began = time.perf_counter()
        results = [call(item) for item in items]
        best = min(best, (time.perf_counter() - began) / len(items))
    return best, results


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--images", type=Path, default=Path("demo_run/data/images"))
    parser.add_argument("--count", type=int, default=512)
    parser.add_argument("--size", type=int, default=384)
    parser.add_argument("--mode", choices=["squash", "pad", "crop", "anyres"], default="pad")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    options = parser.parse_args()
    inventory = take_inventory(FolderSource(path=options.images))
    members = take_rows(inventory.table, np.arange(min(options.count, inventory.images), dtype=np.int64))
    geometry = GeometryConfig(mode=options.mode, size=options.size).resolve()
    print(describe(torch.device("cpu")), flush=True)

    few = range(min(64, members.num_rows))
    with UnitReader(inventory.images_at, members, few) as reader:
        reading, files = timed(reader.read, few)
    decoding, images = timed(decode, files)
    viewing, views = timed(lambda image: make_views(image, geometry)[0], images)
    pixels = np.mean([image.shape[0] * image.shape[1] for image in images]) / 1e6
    print(
        f"\n{members.num_rows} images below {options.images}, {pixels:.2f} megapixels and "
        f"{np.mean([len(data) for data in files]) / 1e3:.0f} kB on average, {options.mode} to {options.size}, "
        f"{np.mean([len(one) for one in views]):.1f} views an image\n\n"
        f"| microseconds an image, one thread | |\n|---|---|\n| read | {reading * 1e6:.0f} |\n"
        f"| decode | {decoding * 1e6:.0f} |\n| views | {viewing * 1e6:.0f} |\n\n"
        "| threads | images/s | CPU microseconds an image |\n|---|---|---|"
    )
    for threads in options.threads:
        order = WorkOrder(
            output="",
            images=inventory.images_at,
            geometry=geometry,
            tokenizer=FittedTokenizer(path=Path()),
            spec=TokenizerSpec(
                kind="none", origin="", weights_sha256={}, view_size=options.size, grid=(1, 1), codebook_sizes=(2,),
                code_dim=1,
            ),
            fingerprint="",
            dtype="float32",
            device="cpu",
            batch_size=options.batch_size,
            torch_threads=1,
            decode_threads=threads,
            max_pixels=DEFAULT_MAX_PIXELS,
        )  # fmt: skip
        decoder = ThreadDecoder(order)
        began, cpu = time.perf_counter(), time.process_time()
        done = sum(len(group.outcomes) for group in decoder.decode(members))
        seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
        decoder.close()
        print(f"| {threads} | {done / seconds:.0f} | {cpu / done * 1e6:.0f} |", flush=True)


if __name__ == "__main__":
    main()
