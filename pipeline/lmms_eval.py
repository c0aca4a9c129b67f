"""The hand-over of an export to lmms-eval: the paper's 14 benchmarks by lmms-eval's own names, and the command that runs them.

lmms-eval is a program of its own, with dependencies of its own; nothing here imports it. Names, options and the class that reads
an export were checked against lmms-eval 0.7.3 (docs/evaluation.md says how).
"""

from __future__ import annotations

import shlex
from pathlib import Path

from manifests.errors import InputError

VERSION = "0.7.3"

TASKS = {
    "TextVQA": "textvqa_val",
    "DocVQA": "docvqa_val",
    "OCRBench": "ocrbench",
    "ChartQA": "chartqa",
    "MMBench-EN dev": "mmbench_en_dev",
    "MME": "mme",
    "SEED-Image": "seedbench",
    "GQA": "gqa",
    "MMMU val": "mmmu_val",
    "AI2D": "ai2d",
    "RealWorldQA": "realworldqa",
    "MMVP": "mmvp",
    "HallusionBench": "hallusion_bench_image",
    "POPE": "pope",
}
"""The benchmarks of arXiv 2506.09040, section 4.1, and what lmms-eval calls them."""


def command(export: Path, results: Path, *, processes: int = 1) -> str:
    """The shell command that evaluates `export` on all of `TASKS` and leaves results and samples in `results`.

    Raises InputError when `export` is no folder of a model, or has a name that lmms-eval's list of arguments cannot hold.
    """
    export = export.resolve()
    if not (export / "preprocessor_config.json").is_file():
        raise InputError(f"{export} is no exported model: asvr export RUN writes one")
    if any(character in str(export) for character in ",=\"'{}[]"):
        raise InputError(
            f"lmms-eval cannot read a path with one of ,=\"'{{}}[] in it: export to another place than {export}"
        )
    several = processes > 1
    # One process gets its device by name: with none, the class hands transformers an empty device map, which it refuses.
    model = f"pretrained={export}" if several else f"pretrained={export},device_map=auto"
    launcher = ["accelerate", "launch", f"--num_processes={processes}"] if several else ["python"]
    words = [
        *launcher,
        "-m",
        "lmms_eval",
        "--model",
        "llava_hf",
        "--model_args",
        model,
        "--tasks",
        ",".join(TASKS.values()),
    ]
    words += ["--batch_size", "1", "--log_samples", "--output_path", str(results.resolve())]
    return shlex.join(words)
