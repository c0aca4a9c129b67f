"""The contestants of `benchmarks.train`, one a process: `python -m benchmarks.train_runs SETTINGS`.

It answers every line "step" on its input by the seconds that a step took, and "end" by its result, as lines of JSON.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, SiglipVisionConfig, SiglipVisionModel

from benchmarks.machine import PeakMemory, held_memory
from benchmarks.plain_search import PlainSearch
from train_stage import tower
from train_stage.batch import IGNORE, Batch, count_pairs, count_text_targets, dummy_view
from train_stage.build import assemble
from train_stage.config import CodesObjective, HeadConfig, TrainConfig
from train_stage.cost import flop_model
from train_stage.deepspeed_process import prepare_environment
from train_stage.engine import Engine
from train_stage.flops import Work, utilisation
from train_stage.loader import Collected
from train_stage.loop import train_step
from train_stage.losses import LossSums, TermSums
from train_stage.memory import estimate
from train_stage.metrics import Meter, StepMetrics
from train_stage.model import AsvrModel
from train_stage.objectives.codes import CodesObjective as CodesTerm
from train_stage.packing import pack
from train_stage.parts import set_trainable
from train_stage.ranks import join_ranks, leave_ranks

IMAGE, SEED = 3, 0
LAYER = -2


@dataclass(frozen=True)
class Shape:
    """Sizes of language model, tower, head and codes."""

    hidden: int
    ffn: int
    layers: int
    heads: int
    vocabulary: int
    tower_width: int
    tower_ffn: int
    tower_layers: int
    tower_heads: int
    view_size: int
    patch: int
    head: HeadConfig
    depth: int
    codes: int
    text: tuple[int, int]
    """Fewest and most tokens of text in a sample."""

    @property
    def positions(self) -> int:
        return (self.view_size // self.patch) ** 2

    def describe(self) -> str:
        return (
            f"Llama {self.layers} x {self.hidden}, vocabulary {self.vocabulary:,}; SigLIP {self.tower_layers} x "
            f"{self.tower_width}, {self.positions} positions; head {self.head.layers} x {self.head.width}, "
            f"{self.depth} x {self.codes:,} codes"
        )


SHAPES = {
    # Positions, vocabulary, depths and head layers are those of the release; widths are smaller, about in proportion.
    "cpu": Shape(512, 1376, 8, 8, 32000, 288, 1076, 9, 4, 378, 14,
                 HeadConfig(width=128, layers=3, heads=4, ffn=256), 8, 2048, (40, 400)),
    "7b": Shape(4096, 11008, 32, 32, 32000, 1152, 4304, 27, 16, 378, 14, HeadConfig(), 8, 16384, (40, 400)),
    "tiny": Shape(32, 48, 2, 4, 96, 32, 48, 3, 4, 28, 7,
                  HeadConfig(width=16, layers=1, heads=2, ffn=24), 3, 16, (5, 20)),
}  # fmt: skip


def encoder(shape: Shape, seed: int) -> SiglipVisionModel:
    """A random SigLIP tower."""
    torch.manual_seed(seed)
    return SiglipVisionModel(
        SiglipVisionConfig(
            hidden_size=shape.tower_width, intermediate_size=shape.tower_ffn, num_hidden_layers=shape.tower_layers,
            num_attention_heads=shape.tower_heads, image_size=shape.view_size, patch_size=shape.patch,
        )
    ).eval()  # fmt: skip


def codebooks(shape: Shape) -> list[np.ndarray]:
    """D arrays float32 (K, C), as wide as the tokenizer's features and about as long."""
    rng = np.random.default_rng(SEED)
    return [rng.standard_normal((shape.codes, shape.tower_width)).astype(np.float32) / 2**d for d in range(shape.depth)]


class LoopTokenizer:
    """The tokenizer as the reference has it in its training loop: an encoder of its own, and a plain residual search."""

    def __init__(self, shape: Shape, device: torch.device, dtype: torch.dtype) -> None:
        self._encoder = encoder(shape, SEED + 1).to(device, dtype)
        self._search = PlainSearch(codebooks(shape), device, torch.float32)
        self._depth = shape.depth

    @torch.no_grad()
    def __call__(self, views: Tensor, norm: tower.PixelNorm) -> Tensor:
        """int64 (V, P, D) for uint8 views (V, S, S, 3)."""
        features = tower.patch_features(self._encoder, norm(views), [LAYER])[LAYER]
        codes = self._search(features.flatten(0, 1).float())
        return codes.long().view(len(views), -1, self._depth)


NORM = tower.PixelNorm((0.5,) * 3, (0.5,) * 3)


def save_samples(path: Path, shape: Shape, count: int, device: torch.device) -> None:
    """Random samples, one of eight without a picture, and their codes, tokenized here once and for all."""
    rng = np.random.default_rng(SEED)
    tokenizer = LoopTokenizer(shape, device, _dtype(device))
    samples = []
    for number in range(count):
        length = int(rng.integers(*shape.text))
        ids, labels = rng.integers(IMAGE + 1, shape.vocabulary, length), np.full(length, IGNORE)
        labels[length // 2 :] = ids[length // 2 :]
        sample: dict[str, Tensor] = {"ids": torch.from_numpy(ids), "labels": torch.from_numpy(labels)}
        if number % 8 != 7:
            size = (1, shape.view_size, shape.view_size, 3)
            sample["view"] = torch.from_numpy(rng.integers(0, 256, size, dtype=np.uint8))
            sample["codes"] = tokenizer(sample["view"].to(device), NORM).cpu()
        samples.append(sample)
    torch.save(samples, path)


def micro_batch(samples: Sequence[dict[str, Tensor]], shape: Shape, *, packed: bool) -> Batch:
    """One micro-batch: packed end to end in one row, or a row a sample, padded on the right."""
    rows = [_expanded(sample, shape) for sample in samples]
    width = sum(len(ids) for ids, _ in rows) if packed else max(len(ids) for ids, _ in rows)
    ids = torch.zeros(1 if packed else len(rows), width, dtype=torch.int64)
    labels, places = torch.full_like(ids, IGNORE), torch.arange(width).repeat(len(ids), 1)
    start, view_position = 0, []
    for number, (sample, (own_ids, own_labels)) in enumerate(zip(samples, rows, strict=True)):
        at = slice(start, start + len(own_ids))
        flat = ids[0 if packed else number], labels[0 if packed else number]
        flat[0][at], flat[1][at] = own_ids, own_labels
        if packed:
            places[0][at] = torch.arange(len(own_ids))
        if "view" in sample:
            first = start if packed else number * width
            view_position.append(first + 1 + torch.arange(shape.positions))
        start = start + len(own_ids) if packed else 0
    with_view = [sample for sample in samples if "view" in sample]
    views, position, mask = dummy_view(shape.view_size, shape.positions)
    if with_view:
        views, position = torch.cat([sample["view"] for sample in with_view]), torch.stack(view_position)
        mask = torch.ones_like(position, dtype=torch.bool)
    return Batch(
        input_ids=ids,
        position_ids=places,
        labels=labels,
        views=views,
        view_position=position,
        target_mask=mask,
        sample_ids=[str(number) for number in range(len(samples))],
        targets={"codes": torch.cat([sample["codes"] for sample in with_view])} if with_view else {},
    )


def _expanded(sample: dict[str, Tensor], shape: Shape) -> tuple[Tensor, Tensor]:
    ids, labels = sample["ids"], sample["labels"]
    if "view" not in sample:
        return ids, labels
    image = torch.full((shape.positions,), IMAGE)
    return (
        torch.cat([ids[:1], image, ids[1:]]),
        torch.cat([labels[:1], torch.full_like(image, IGNORE), labels[1:]]),
    )


class ReferenceModel(AsvrModel):
    """The same model, trained as the release does: codes made here and now, and every logit alive at once."""

    tokenizer: LoopTokenizer

    def forward(self, batch: Batch) -> LossSums:
        states = self.states(batch)
        logits = self.llava.lm_head(states.hidden_BLH).float()
        text = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten(), reduction="sum")
        text_tokens = int((batch.labels[:, 1:] != IGNORE).sum())
        term = cast("CodesTerm", self.objectives["codes"])
        codes_ND = self.tokenizer(batch.views, self.pixel_norm).flatten(0, 1)
        seen_N = batch.target_mask.flatten()
        hidden_NH = states.hidden_BLH.flatten(0, 1)[batch.view_position.flatten().clamp(min=0)]
        losses, correct = [], []
        for d, own in enumerate(term.visual_head(hidden_NH, codes_ND)):
            each = F.cross_entropy(own.float(), codes_ND[:, d], reduction="none")
            losses.append((each * seen_N).sum())
            correct.append(((own.argmax(-1) == codes_ND[:, d]) & seen_N).sum())
        sums = TermSums(torch.stack(losses), int(seen_N.sum()), torch.stack(correct))
        return LossSums(text, text_tokens, {"codes": sums})


def build(name: str, shape: Shape, device: torch.device) -> AsvrModel:
    """The contestant's model, all of it training but the tower; weights depend on nothing but the shape."""
    torch.manual_seed(SEED)
    language_model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=shape.vocabulary, hidden_size=shape.hidden, intermediate_size=shape.ffn,
            num_hidden_layers=shape.layers, num_attention_heads=shape.heads, max_position_embeddings=4096,
        )
    )  # fmt: skip
    llava = assemble(language_model, encoder(shape, SEED), image_token_id=IMAGE, vision_feature_layer=LAYER)
    terms = (
        {} if name == "text" else {"codes": CodesTerm(CodesObjective(head=shape.head), shape.hidden, codebooks(shape))}
    )
    model = (ReferenceModel if name == "reference" else AsvrModel)(llava, torch.nn.ModuleDict(terms), NORM)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(_dtype(device))
    set_trainable(model, {"projector", "language_model", *(["visual_head"] if terms else [])})
    if isinstance(model, ReferenceModel):
        model.tokenizer = LoopTokenizer(shape, device, _dtype(device))
    return model


def run(settings: dict[str, Any], answer: Callable[[Any], None]) -> None:
    """Train a step to warm up and the others by the clock, each when it is asked for."""
    torch.set_num_threads(settings["threads"])
    name, shape = settings["name"], SHAPES[settings["shape"]]
    size = settings["batch_size"]
    samples = torch.load(settings["samples"], weights_only=True)[: size * (1 + settings["steps"])]
    prepare_environment()
    ranks = join_ranks(600)
    before = held_memory(ranks.device)
    model, dtype = build(name, shape, ranks.device), _dtype(ranks.device)
    flops = flop_model(model, shape.view_size)
    config = _config("bfloat16" if dtype == torch.bfloat16 else "float32")
    engine = Engine(model, config, config.phase("instruct"), ranks)
    steps = [samples[start : start + size] for start in range(0, len(samples), size)]
    done: list[StepMetrics] = []
    with PeakMemory(ranks.device) as peak:
        held = held_memory(ranks.device)
        for number, step in enumerate(steps):
            _expect("step")
            collected = Collected(number + 1, _micro_batches(step, shape, settings), None, 0.0)
            done.append(train_step(engine, collected, terms=model.terms, learning_rate=1e-5, seed=SEED, epoch=0))
            answer(done[-1].seconds)
    _expect("end")
    leave_ranks()

    work = [_work(step, shape) for step in steps[1:]]
    slots = sum(batch.input_ids.numel() for step in steps[1:] for batch in _micro_batches(step, shape, settings))
    tokens, seconds = sum(own.tokens for own in work), [own.seconds for own in done[1:]]
    needed, device = statistics.mean(map(flops, work)), ranks.device
    parameters = sum(p.numel() for p in model.objectives.parameters())
    vectors = sum(b.numel() * b.element_size() for b in model.objectives.buffers())
    own = estimate(parameters, parameters, bytes_each=dtype.itemsize, stage=1)
    result = {
        "samples": size,
        "tokens": tokens // len(work),
        "views": sum(own.views for own in work) // len(work),
        "padding": 1 - tokens / slots,
        "seconds": seconds,
        "memory": peak.bytes + held - before,
        "dtype": config.precision,
        "flops": needed,
        "head_flops": statistics.mean(map(flops.visual_head, work)),
        "mfu": utilisation(needed, statistics.median(seconds), 1, Meter.of(flops, 1, device, config.precision).peak),
        "head_parameters": parameters,
        "head_bytes": own.total + vectors,
        "text_loss": done[0].text_loss,
        "visual_loss": done[0].visual_loss,
    }
    answer(result)


def _expect(word: str) -> None:
    if (line := sys.stdin.readline().strip()) != word:
        raise SystemExit(f"expected {word!r}, got {line!r}")


def _micro_batches(step: list[dict[str, Tensor]], shape: Shape, settings: dict[str, Any]) -> list[Batch]:
    if settings["name"] == "reference":
        size = settings["padded"]
        cuts = [step[start : start + size] for start in range(0, len(step), size)]
    else:
        lengths = np.array([len(_expanded(sample, shape)[0]) for sample in step], dtype=np.int64)
        cuts = [[step[place] for place in row.tolist()] for row in pack(lengths, settings["row_tokens"])]
    return [micro_batch(own, shape, packed=settings["name"] != "reference") for own in cuts]


def _work(step: list[dict[str, Tensor]], shape: Shape) -> Work:
    """What the samples of a step need, however they are cut into micro-batches."""
    batch = micro_batch(step, shape, packed=True)
    views = len(batch.views) if batch.has_images else 0
    targets = {"codes": int(batch.target_mask.sum())}
    return Work(batch.input_ids.numel(), count_pairs(batch), count_text_targets(batch), views, targets)


def _dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def _config(precision: str) -> TrainConfig:
    """What the engine reads of a configuration; data and model come from elsewhere here."""
    phase = {
        "name": "instruct", "data": [{"path": "/none", "image_root": "/none"}], "manifests": ["/none"],
        "objective": {"kind": "codes"},
    }  # fmt: skip
    model = {"language_model": "/none", "vision_tower": "/none"}
    return TrainConfig.model_validate({"output": "/none", "precision": precision, "model": model, "phases": [phase]})


if __name__ == "__main__":
    with os.fdopen(os.dup(1), "w", buffering=1) as answers:
        os.dup2(2, 1)  # what libraries print is no answer
        run(json.loads(sys.argv[1]), lambda found: print(json.dumps(found), file=answers))
