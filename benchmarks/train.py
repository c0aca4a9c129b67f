"""A training step of this project against LLaVA's and against the reference way to train ASVR, on the same samples and weights.

    python -m benchmarks.train                   the shapes of LLaVA-1.5 with SigLIP, in widths and depths for a CPU
    python -m benchmarks.train --shape 7b        at full size, for a GPU

(a) LLaVA: text loss alone. (b) this project: codes tokenized before, samples packed, logits in chunks. (c) the reference
way: the tokenizer in the loop, padded micro-batches, all logits at once. All with the same engine, optimizer and
precision; each in a process of its own. The losses of the first step are compared: (b) and (c) do the same work.

On a CPU the three take turns, step by step, and times are compared within a turn: a machine whose speed comes and goes
is then as fast for all. Their memory is that of further processes, in which freed tensors go back to the kernel at once:
otherwise what counts is a heap in pieces. A GPU has no room for three at once, and torch counts its tensors: there one
follows the other, and time and memory are those of the same steps.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any, Self, cast

import torch

from benchmarks.machine import describe
from benchmarks.train_runs import SHAPES, Shape, save_samples

NAMES = {
    "text": "(a) LLaVA, text alone",
    "asvr": "(b) this project",
    "reference": "(c) the reference way",
}
TIME_TARGET, MEMORY_TARGET = 1.15, 1.05
Settings = dict[str, Any]
Result = dict[str, Any]

MEMORY_STEPS = 2
LIVE_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "32768", "MALLOC_MMAP_MAX_": "1000000"}
"""The environment in which glibc keeps no tensor that was freed, and in which there is nothing to be timed."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shape", choices=sorted(SHAPES), default="cpu")
    parser.add_argument("--batch-size", type=int, default=8, help="samples a step")
    parser.add_argument("--padded", type=int, default=4, help="samples of a padded micro-batch of (c)")
    parser.add_argument(
        "--row-tokens", type=int, default=4096, help="most tokens of a packed micro-batch of (a) and (b)"
    )
    parser.add_argument("--steps", type=int, default=6, help="steps that are timed, after one that is not")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="write the results there too")
    options = parser.parse_args()
    cuda = options.device != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    torch.set_num_threads(options.threads)
    head, shape = describe(device), SHAPES[options.shape]
    print(head, flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        samples = Path(scratch) / "samples.pt"
        save_samples(samples, shape, options.batch_size * (options.steps + 1), device)
        settings = {
            "shape": options.shape, "samples": str(samples), "batch_size": options.batch_size, "padded": options.padded,
            "row_tokens": options.row_tokens, "threads": options.threads, "steps": options.steps,
        }  # fmt: skip
        results = on_cpu(settings) if device.type == "cpu" else on_gpu(settings)
    report(shape, results)
    if options.json:
        options.json.write_text(json.dumps({"head": head.splitlines(), "results": results}, indent=2) + "\n")


def on_gpu(settings: Settings) -> dict[str, Result]:
    """What each contestant finds, one after the other."""
    results: dict[str, Result] = {}
    for name in NAMES:
        results |= take_turns([name], settings, {})
    return results


def on_cpu(settings: Settings) -> dict[str, Result]:
    """What the contestants find side by side, and the memory of each in a process that nobody times."""
    cpu = {"DS_ACCELERATOR": "cpu"}
    results = take_turns(list(NAMES), settings, cpu)
    fewer = settings | {"steps": min(MEMORY_STEPS, settings["steps"])}
    for name, found in results.items():
        found["memory"] = take_turns([name], fewer, cpu | LIVE_MEMORY)[name]["memory"]
    return results


def take_turns(names: list[str], settings: Settings, environment: dict[str, str]) -> dict[str, Result]:
    """What contestants find that are there at the same time, with another one first in every turn."""
    with ExitStack() as stack:
        own = {name: stack.enter_context(Contestant(name, settings, environment)) for name in names}
        for turn in range(settings["steps"] + 1):
            first = turn % len(names)
            seconds = {name: own[name].tell("step") for name in names[first:] + names[:first]}
            if len(names) > 1:
                print(f"turn {turn}: {', '.join(f'{NAMES[name]} {seconds[name]:.2f} s' for name in names)}", flush=True)
        return {name: own[name].tell("end") for name in names}


class Contestant:
    """A process that takes a step when it is told to."""

    def __init__(self, name: str, settings: Settings, environment: dict[str, str]) -> None:
        self._name, self._log = name, Path(settings["samples"]).with_name(f"{name}.log")
        command = [sys.executable, "-m", "benchmarks.train_runs", json.dumps(settings | {"name": name})]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, bufsize=1,
                env=os.environ | environment,
            )  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()  # of no effect on one that has answered to "end"
        self._process.communicate()

    def tell(self, word: str) -> Any:
        """Its answer to "step", the seconds that took, or to "end", what it found."""
        try:
            cast("IO[str]", self._process.stdin).write(f"{word}\n")
            answer = cast("IO[str]", self._process.stdout).readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            raise SystemExit(f"{NAMES[self._name]} failed:\n{self._log.read_text(errors='replace')[-4000:]}")
        return json.loads(answer)


def ratio(over: Iterable[float], under: Iterable[float]) -> float:
    """The median over the steps of what one took to what the other took for the same step."""
    return statistics.median(mine / other for mine, other in zip(over, under, strict=True))


def report(shape: Shape, results: dict[str, Result]) -> None:
    """Print the table, and how far from the targets (b) is."""
    text, asvr, reference = (results[name] for name in NAMES)
    print(
        f"\n{shape.describe()}; {asvr['samples']} samples, {asvr['tokens']:,} tokens and {asvr['views']} views a step "
        f"on average, {asvr['dtype']}\n\n"
        "| contestant | s/step | to (a) | peak memory | to (a) | padding | TFLOP a step | MFU |\n|---|---|---|---|---|---|---|---|"
    )
    for name, own in results.items():
        mfu = f"{own['mfu']:.1%}" if own["mfu"] is not None else "-"
        print(
            f"| {NAMES[name]} | {statistics.median(own['seconds']):.2f} | {ratio(own['seconds'], text['seconds']):.2f} | "
            f"{own['memory'] / 2**20:,.0f} MiB | {own['memory'] / text['memory']:.2f} | {own['padding']:.1%} | "
            f"{own['flops'] / 1e12:.3f} | {mfu} |"
        )
    share = asvr["head_flops"] / text["flops"]
    time = ratio(asvr["seconds"], text["seconds"]) - share
    memory = (asvr["memory"] - asvr["head_bytes"]) / text["memory"]
    print(
        f"\nThe head's own FLOPs are {share:.1%} of (a)'s; its parameters, gradients, optimizer state and codebook vectors "
        f"take {asvr['head_bytes'] / 2**20:,.0f} MiB ({asvr['head_parameters']:,} parameters).\n"
        f"Time of (b) beyond the head's own FLOPs: {time:.3f} x (a), target {TIME_TARGET}: {_verdict(time <= TIME_TARGET)}.\n"
        f"Memory of (b) beyond the head's own: {memory:.3f} x (a), target {MEMORY_TARGET}: "
        f"{_verdict(memory <= MEMORY_TARGET)}.\n"
        f"(b) against (c): {ratio(reference['seconds'], asvr['seconds']):.2f} x faster, "
        f"{reference['memory'] / asvr['memory']:.2f} x less memory.\n"
        f"Losses of the first step: text {text['text_loss']:.5f}, {asvr['text_loss']:.5f}, {reference['text_loss']:.5f}; "
        f"codes {asvr['visual_loss']:.5f}, {reference['visual_loss']:.5f}."
    )


def _verdict(met: bool) -> str:
    return "met" if met else "NOT met"


if __name__ == "__main__":
    main()
