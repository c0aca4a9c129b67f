"""Residual search: ours against the plain float32 and bfloat16 distance matrices, and each against the float64 oracle.

    python -m benchmarks.search                        the real shape on random inputs, and real features if there are
    python -m benchmarks.search --features FILE        real features from a .npy or .pt file of one array (..., n)
    python -m benchmarks.search --encoder FOLDER --layer 8 --view-size 112 --images FOLDER

Real features come, unless told otherwise, from the encoder and the images that `make demo` leaves in demo_run. Codebooks
for them are fitted here with `tokenize_stage.kmeans`. Runs are interleaved, each round with another one first; rates
are medians, and so is the ratio to (a), taken within each round because a shared machine's speed drifts. Codes that differ are counted on the first `--checked` positions, because the oracle is slow.
Candidates are counted for both passes whatever the device: on a CPU the float16 one is emulated, which counts the same.
Peak memory is what preparation and one search held beyond the features and the float32 codebooks given to them.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.features import extract_features, load_encoder, load_features
from benchmarks.machine import PeakMemory, describe, synchronise
from benchmarks.plain_search import PlainSearch
from manifests.schema import Geometry
from tokenize_stage.fast_pass import Float32Pass
from tokenize_stage.float16_pass import Float16Pass
from tokenize_stage.kmeans import fit_residual
from tokenize_stage.search import ResidualSearch, fast_pass, oracle

Books = list[npt.NDArray[np.float32]]
Search = Callable[[torch.Tensor], torch.Tensor]
DEMO = Path("demo_run")
_FITTED_TO = 100_000
_COUNTED = 512


class Case(NamedTuple):
    """One input of the comparison."""

    name: str
    features_Nn: torch.Tensor
    codebooks: Books


def random_case(positions: int, width: int, size: int, depth: int) -> Case:
    """Features N(0, 1); vectors 0.1 N(0, 1), near the length at which a residual code still helps at this width."""
    random = np.random.default_rng(0)
    features = random.standard_normal((positions, width), dtype=np.float32)
    books = [random.standard_normal((size, width), dtype=np.float32) * np.float32(0.1) for _ in range(depth)]
    return Case("random", torch.from_numpy(features), books)


def real_case(features_Nn: torch.Tensor, positions: int, size: int, depth: int, device: torch.device) -> Case:
    """The first positions of a shuffle are searched, codebooks are fitted to others."""
    order = torch.randperm(len(features_Nn), generator=torch.Generator().manual_seed(0))
    searched, fitted = features_Nn[order[:positions]], features_Nn[order[positions : positions + _FITTED_TO]]
    size = min(size, len(fitted) // 8)
    print(f"fitting {depth} codebooks of {size} vectors to {len(fitted):,} real features ...", flush=True)
    books, reports = fit_residual(
        fitted.numpy().copy(), depth=depth, size=size, iterations=25, minibatch=8192, seed=0, device=device
    )
    errors = ", ".join(f"{report.relative_error:.3f}" for report in reports)
    print(f"relative error by depth: {errors}", flush=True)
    return Case("real features", searched, books)


def compare(case: Case, device: torch.device, repeats: int, checked: int) -> None:
    """Print the table of one input."""
    (count, width), depth, size = case.features_Nn.shape, len(case.codebooks), len(case.codebooks[0])
    features_Nn = case.features_Nn.to(device)
    makers: dict[str, Callable[[], Search]] = {
        "ours": lambda: ResidualSearch(case.codebooks, device),
        "(a) float32": lambda: PlainSearch(case.codebooks, device, torch.float32),
        "(b) bfloat16": lambda: PlainSearch(case.codebooks, device, torch.bfloat16),
    }
    searches: dict[str, Search] = {}
    memory: dict[str, int] = {}
    for name, make in makers.items():
        with PeakMemory(device) as peak:
            searches[name] = make()
            searches[name](features_Nn)
        memory[name] = peak.bytes
    seconds: dict[str, list[float]] = {name: [] for name in makers}
    for turn in range(repeats):
        for name in rotated(list(searches), turn):
            synchronise(device)
            began = time.perf_counter()
            searches[name](features_Nn)
            synchronise(device)
            seconds[name].append(time.perf_counter() - began)
    right_ND = oracle(features_Nn[:checked], case.codebooks)
    rate = {name: count / statistics.median(taken) for name, taken in seconds.items()}
    ratio = {
        name: statistics.median(a / own for a, own in zip(seconds["(a) float32"], taken, strict=True))
        for name, taken in seconds.items()
    }
    one = torch.from_numpy(case.codebooks[0][:1]).to(device, torch.float64)
    print(
        f"\n### {case.name}: {count:,} positions, D {depth}, K {size:,}, width {width:,}, on {device.type} "
        f"({type(fast_pass(one)).__name__}), median of {repeats}\n\n"
        f"| search | positions/s | x (a) | peak memory | codes that differ from the oracle, of {right_ND.numel():,} |\n"
        "|---|---|---|---|---|"
    )
    for name, search in searches.items():
        wrong = int((search(features_Nn[:checked]) != right_ND).sum())
        print(
            f"| {name} | {rate[name]:,.0f} | {ratio[name]:.2f} | {memory[name] / 2**20:,.0f} MiB | "
            f"{wrong:,} ({wrong / right_ND.numel():.1%}) |"
        )
    ours = searches["ours"]
    assert isinstance(ours, ResidualSearch)  # noqa: S101 - by construction, for the type checker
    ours.reranked_rows = ours.fallback_rows = 0
    codes_ND = ours(features_Nn)
    print(
        f"\nOf ours {ours.reranked_rows / (count * depth):.2%} of the codes were decided in float64 among candidates, "
        f"{ours.fallback_rows} by the whole codebook.",
        flush=True,
    )
    count_candidates(case, device, codes_ND[:_COUNTED])


def rotated(names: list[str], turn: int) -> list[str]:
    """Another one first each time: what runs after the bfloat16 search finds other caches and another clock rate."""
    start = turn % len(names)
    return names[start:] + names[:start]


def count_candidates(case: Case, device: torch.device, codes_ND: torch.Tensor) -> None:
    """Print how many codes each pass leaves to float64, depth by depth, on positions with the given right codes."""
    print("\n| candidates inside the bound | " + " | ".join(f"depth {d}" for d in range(len(case.codebooks))) + " |")
    print("|---" * (1 + len(case.codebooks)) + "|")
    for make_pass in (Float32Pass, Float16Pass):
        residual_Nn = case.features_Nn[: len(codes_ND)].to(device, torch.float64)
        cells: list[str] = []
        for depth, book in enumerate(case.codebooks):
            vectors_Kn = torch.from_numpy(book).to(device, torch.float64)
            fast = make_pass(vectors_Kn)
            bracket = fast.bracket(residual_Nn, torch.empty(len(residual_Nn) * len(book), device=device))
            lowest_N, best_N = bracket.lower_NK.min(1)
            limit_N = lowest_N.double() + fast.reach(bracket, best_N)
            count_N = (bracket.lower_NK <= limit_N[:, None]).sum(1).double()
            cells.append(f"{count_N.mean():.2f}, {count_N.quantile(0.99):.0f}")
            residual_Nn = residual_Nn - vectors_Kn[codes_ND[:, depth].long()]
        print(f"| {make_pass.__name__}: mean, 99th percentile | " + " | ".join(cells) + " |", flush=True)


def real_features(options: argparse.Namespace, device: torch.device) -> torch.Tensor | None:
    """float32 (N, n), or None if neither a file nor an encoder with images is there."""
    if options.features:
        return load_features(options.features)
    if not (options.encoder.is_dir() and options.images.is_dir()):
        return None
    geometry = Geometry(mode="squash", size=options.view_size)
    encoder = load_encoder(str(options.encoder), options.layer, geometry, device)
    return extract_features(encoder, options.images, geometry, options.image_count)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--positions", type=int, help="default 729, one view; on a GPU 64 views")
    parser.add_argument("--width", type=int, default=1152)
    parser.add_argument("--size", type=int, default=16384, help="K of the random codebooks")
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--checked", type=int, help="positions compared with the oracle; default 32, on a GPU 729")
    parser.add_argument("--features", type=Path)
    parser.add_argument("--encoder", type=Path, default=DEMO / "models/encoder")
    parser.add_argument("--layer", type=int, default=8)
    parser.add_argument("--view-size", type=int, default=112)
    parser.add_argument("--images", type=Path, default=DEMO / "data/images")
    parser.add_argument("--image-count", type=int, default=1000)
    parser.add_argument("--real-size", type=int, default=4096, help="K of the codebooks fitted to real features")
    options = parser.parse_args()
    device = torch.device("cuda" if options.device != "cpu" and torch.cuda.is_available() else "cpu")
    torch.set_num_threads(options.threads)
    on_gpu = device.type == "cuda"
    positions = options.positions or (64 * 729 if on_gpu else 729)
    checked = options.checked or (729 if on_gpu else 32)
    print(describe(device), flush=True)
    compare(random_case(positions, options.width, options.size, options.depth), device, options.repeats, checked)
    features_Nn = real_features(options, device)
    if features_Nn is None:
        print("\nNo real features: give --features, or --encoder and --images, or run make demo first.")
    else:
        case = real_case(features_Nn, positions, options.real_size, options.depth, device)
        compare(case, device, options.repeats, checked)


if __name__ == "__main__":
    main()
