"""How many codes a bfloat16 encoder, or a bfloat16 search, changes on real images: the noise floor, depth by depth.

    python -m benchmarks.noise_floor                   the codebook and the images that `make demo` leaves in demo_run
    python -m benchmarks.noise_floor --codebook FOLDER --images FOLDER --count 100

The reference is the float32 encoder with the exact search. "of all": codes that changed. "of those with equal
codes before": of the positions whose earlier codes are all the same, those that change here for the first time.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from benchmarks.features import extract_features, load_encoder
from benchmarks.machine import describe
from benchmarks.plain_search import PlainSearch
from tokenize_stage.codebook_folder import encoder_path, read_codebooks, read_description
from tokenize_stage.search import ResidualSearch

DEMO = Path("demo_run")


def shares(codes_ND: torch.Tensor, reference_ND: torch.Tensor) -> list[tuple[float, float]]:
    """For each depth the share of codes that changed, and of those whose earlier codes are equal."""
    changed_ND = codes_ND != reference_ND
    intact_N = torch.ones(len(codes_ND), dtype=torch.bool, device=codes_ND.device)
    found: list[tuple[float, float]] = []
    for changed_N in changed_ND.unbind(1):
        first = int((changed_N & intact_N).sum()) / max(int(intact_N.sum()), 1)
        found.append((float(changed_N.float().mean()), first))
        intact_N &= ~changed_N
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--codebook", type=Path, default=DEMO / "codebook")
    parser.add_argument("--images", type=Path, default=DEMO / "data/images")
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    device = torch.device("cuda" if options.device != "cpu" and torch.cuda.is_available() else "cpu")
    torch.set_num_threads(options.threads)
    description = read_description(options.codebook)
    books = read_codebooks(options.codebook, description)
    print(describe(device), flush=True)
    path = encoder_path(options.codebook, description.encoder)
    full, half = (
        extract_features(
            load_encoder(path, description.encoder.layer, description.geometry, device, dtype),
            options.images, description.geometry, options.count,
        ).to(device)
        for dtype in ("float32", "bfloat16")
    )  # fmt: skip
    exact = ResidualSearch(books, device)
    reference_ND = exact(full)
    columns = {
        "bfloat16 encoder": shares(exact(half), reference_ND),
        "bfloat16 distances": shares(PlainSearch(books, device, torch.bfloat16)(full), reference_ND),
        "float32 distances": shares(PlainSearch(books, device, torch.float32)(full), reference_ND),
    }
    relative = float((half - full).norm() / (full - full.mean(0)).norm())
    print(
        f"\n{len(full):,} positions of {options.count} images below {options.images}, K {len(books[0]):,}, width "
        f"{full.shape[1]}; the bfloat16 encoder's features are off by {relative:.2%} of their spread\n\n"
        f"| depth | {' | '.join(f'{name}: of all | of those with equal codes before' for name in columns)} |\n"
        f"|{'---|' * (1 + 2 * len(columns))}"
    )
    for depth in range(len(books)):
        cells = " | ".join(f"{whole[depth][0]:.2%} | {whole[depth][1]:.2%}" for whole in columns.values())
        print(f"| {depth} | {cells} |")


if __name__ == "__main__":
    main()
