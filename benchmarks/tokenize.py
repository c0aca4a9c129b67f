"""The tokenize job against the usual ways to write it, and against what the hardware allows, on the same pictures.

    python -m benchmarks.tokenize --seconds 120                generated photographs, a random ViT-S/14
    python -m benchmarks.tokenize --engine ray --images 4000
    python -m benchmarks.tokenize --source demo_run/data/images --codebook demo_run/codebook --view-size 112

(a) a plain loop: decode a batch in threads, encode it, next; (b) the obvious Ray Data script: read_images, map_batches,
write_parquet; (c) decoding alone; (d) encoding of resident batches alone. The limit is min(c, d) where the encoder has a
GPU, and 1/(1/c + 1/d) where both share the cores. Same pictures, encoder, thread counts and batch for all; each in a
process of its own, without its first batch (models, libraries, Ray). (c) and (d) are measured before and after the others.
Memory is the worker's peak, for the whole set and for a quarter of it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import describe
from benchmarks.pictures import make_pictures
from benchmarks.tokenize_runs import Run
from tokenize_stage.config import CodebookConfig, TokenSetConfig
from tokenize_stage.decoding import usable_cores
from tokenize_stage.fit import fit_codebook

NAMES = {
    "job": "this job",
    "plain": "(a) plain loop",
    "ray_script": "(b) Ray Data script",
    "decode_limit": "(c) decoding alone",
    "encode_limit": "(d) encoding alone",
}
LEAST_IMAGES = 512
Result = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--images", type=int, help="pictures; default: as many as take the job about --seconds")
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--engine", choices=["local", "ray"], default="local")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument(
        "--threads", type=int, default=usable_cores(), help="of decoding, of arithmetic, and cores that may be used"
    )
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--unit-size", type=int, default=512)
    parser.add_argument("--mode", choices=["squash", "pad", "crop"], default="pad")
    parser.add_argument("--view-size", type=int, default=224)
    parser.add_argument("--width", type=int, default=384, help="of the random encoder; 384 is a ViT-S")
    parser.add_argument("--layer", type=int, default=8, help="layers of it that run")
    parser.add_argument("--size", type=int, default=1024, help="K of the codebooks fitted to it")
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--source", type=Path, help="folder of pictures to use instead of generated ones")
    parser.add_argument("--codebook", type=Path, help="folder of asvr fit-codebook, instead of the random encoder")
    parser.add_argument("--work", type=Path, help="where pictures and outputs go; default: a temporary folder")
    parser.add_argument("--without-ray-script", action="store_true")
    parser.add_argument("--json", type=Path, help="write the results there too")
    options = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])  # the contestants inherit it
    with tempfile.TemporaryDirectory() as scratch:
        compare(options, options.work or Path(scratch))


def compare(options: argparse.Namespace, work: Path) -> None:
    """Make what is missing, run everybody, print the table."""
    device = torch.device("cuda" if options.device != "cpu" and torch.cuda.is_available() else "cpu")
    torch.set_num_threads(options.threads)
    head = describe(device)
    print(head, flush=True)
    few = options.source or make_pictures(work / "few", min(options.images or LEAST_IMAGES, LEAST_IMAGES))
    codebook = options.codebook or random_codebook(options, few, work / "tokenizer")

    def measure(name: str, pictures: Path) -> Result:
        with tempfile.TemporaryDirectory(dir=work) as place:
            run = Run(config=config(options, pictures, codebook, Path(place) / "out"), seconds=options.seconds / 4)
            return measured(name, run)

    limits = [{name: measure(name, few) for name in ("decode_limit", "encode_limit")}]
    count = options.images or max(LEAST_IMAGES, int(allowed(limits, device) * options.seconds))
    whole = options.source or make_pictures(work / "all", count)
    results = {
        name: measure(name, whole) for name in ("job", "plain", *([] if options.without_ray_script else ["ray_script"]))
    }
    quarter = measure("job", make_pictures(work / "quarter", max(1, count // 4))) if not options.source else None
    limits.append({name: measure(name, few) for name in ("decode_limit", "encode_limit")})
    for name in ("decode_limit", "encode_limit"):
        results[name] = {
            "images": sum(one[name]["images"] for one in limits),
            "seconds": sum(one[name]["seconds"] for one in limits),
        }
    report(options, results, quarter, allowed(limits, device), device)
    if options.json:
        content = {"head": head.splitlines(), "results": results, "quarter": quarter, "limit": allowed(limits, device)}
        options.json.write_text(json.dumps(content, indent=2) + "\n")


def config(options: argparse.Namespace, pictures: Path, codebook: Path, output: Path) -> TokenSetConfig:
    """The job; the other contestants take what they need of it."""
    return TokenSetConfig.model_validate(
        {
            "source": {"kind": "folder", "path": str(pictures.absolute())},
            "geometry": {"mode": options.mode, "size": options.view_size},
            "tokenizer": {"kind": "fitted", "path": codebook.absolute()},
            "output": output.absolute(),
            "engine": options.engine,
            "ray": {"address": "local", "num_workers": 1},
            "unit_size": options.unit_size,
            "batch_size": options.batch_size,
            "torch_threads": options.threads,
            "decode_threads": options.threads,
            "device": options.device,
        }
    )


def measured(name: str, run: Run) -> Result:
    """What a contestant prints, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.tokenize_runs", name, run.model_dump_json()]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{NAMES[name]} failed:\n{done.stderr[-4000:]}")
    result: Result = json.loads(done.stdout.splitlines()[-1])
    return result


def rate(result: Result) -> float:
    """Images a second."""
    return float(result["images"]) / max(float(result["seconds"]), 1e-9)


def allowed(limits: list[dict[str, Result]], device: torch.device) -> float:
    """Images a second that the hardware allows."""
    decoding, encoding = (
        statistics.mean(rate(one[name]) for one in limits) for name in ("decode_limit", "encode_limit")
    )
    return min(decoding, encoding) if device.type == "cuda" else 1 / (1 / decoding + 1 / encoding)


def report(
    options: argparse.Namespace, results: dict[str, Result], quarter: Result | None, limit: float, device: torch.device
) -> None:
    """Print the table."""
    job = results["job"]
    rule = "min(c, d)" if device.type == "cuda" else "1/(1/c + 1/d)"
    print(
        f"\n{job['all']:,} pictures, {options.mode} to {options.view_size}, batches of {options.batch_size}, units of "
        f"{options.unit_size}, {options.threads} threads, engine {options.engine}, on {device.type}; the hardware allows "
        f"{limit:.2f} images/s = {rule}\n\n"
        "| contestant | images/s | of what the hardware allows | seconds | peak memory of the worker |\n|---|---|---|---|---|"
    )
    for name, result in results.items():
        peak = f"{result['peak'] / 2**20:,.0f} MiB" if result.get("peak") else "-"
        print(f"| {NAMES[name]} | {rate(result):.2f} | {rate(result) / limit:.1%} | {result['seconds']:.1f} | {peak} |")
    if quarter:
        print(
            f"\nThe job's worker peaked at {quarter['peak'] / 2**20:,.0f} MiB on {quarter['all']:,} pictures and at "
            f"{job['peak'] / 2**20:,.0f} MiB on {job['all']:,}."
        )
    counts = {NAMES[name]: (result["all"], result["codes"]) for name, result in results.items() if "codes" in result}
    print("Images and codes written: " + ", ".join(f"{name} {n:,} and {c:,}" for name, (n, c) in counts.items()) + ".")
    same = results["job"]["digest"] == results["plain"]["digest"]
    print(f"The codes of this job and of (a) are {'the same' if same else 'NOT the same'}.")
    if len(set(counts.values())) > 1:
        raise SystemExit("the contestants did not do the same work")


def random_codebook(options: argparse.Namespace, pictures: Path, folder: Path) -> Path:
    """A ViT-S/14 in the manner of DINOv2 with random weights, and codebooks fitted to some of its features."""
    if (folder / "codebook").exists():
        return folder / "codebook"
    from transformers import BitImageProcessorPil, Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    heads = max(1, options.width // 64)
    model = Dinov2Model(
        Dinov2Config(
            hidden_size=options.width, num_hidden_layers=options.layer + 1, num_attention_heads=heads,
            image_size=options.view_size, patch_size=14,
        )
    )  # fmt: skip
    model.save_pretrained(folder / "encoder")
    BitImageProcessorPil(image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225]).save_pretrained(
        folder / "encoder"
    )
    fit_codebook(
        CodebookConfig.model_validate(
            {
                "source": {"kind": "folder", "path": str(pictures.absolute())},
                "geometry": {"mode": options.mode, "size": options.view_size},
                "encoder": {"path": str(folder / "encoder"), "layer": options.layer},
                "output": folder / "codebook",
                "depth": options.depth,
                "size": options.size,
                "images": 64,
                "iterations": 10,
                "minibatch": 4096,
                "device": options.device,
            }
        )
    )
    return folder / "codebook"


if __name__ == "__main__":
    main()
