"""A token set and two training runs to report on, whose names and texts were written by somebody with bad intentions."""

from __future__ import annotations

import hashlib
import io
import json
import math
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from made_sets import NUMERICS, histograms
from PIL import Image

from manifests.commits import (
    CommitRecord,
    ManifestHeader,
    MemberColumns,
    RejectRow,
    UnitMember,
    assemble_manifest,
    encode_usage,
    write_commit,
)
from manifests.fingerprint import fingerprint
from manifests.geometry import make_views
from manifests.schema import Geometry, Manifest, ShardEntry, SourceIdentity, TokenizerSpec
from manifests.shards import Locator, ShardData, encode_shard, shard_name
from manifests.storage import Store

GEOMETRY = Geometry(mode="pad", size=56)
GRID, SIZES, DIM = (8, 8), (64, 64, 32), 6
KEYS = {"geometry": GEOMETRY.model_dump(), "tokenizer": {"kind": "fitted"}}

HOSTILE = [
    "<script>window.hurt=1</script>",
    "\"><img src=x onerror='window.hurt=1'>",
    "' onmouseover='window.hurt=1' x='",
    "</style></title></textarea><script>window.hurt=1</script>",
    "{{ 7 * 7 }} {% raw %} ${7*7} </script><!--",
    "a\nb\r\nc\td\x00",
    "\x1b[2J\x1b[31mred\x1b]0;title\x07\x9b1m",
    "\u202egnp.exe\u2066 \u200b\ufeff",
    "javascript:window.hurt=1",
    "=cmd|' /C calc'!A0",
    "&lt;b&gt; &amp; \u2028\u2029",
    "x" * 10_240,
]
"""Texts that act on a page, a terminal, a template or a spreadsheet, wherever one of these takes them for its own."""


def harmless_name(text: str) -> str:
    """The text as a file can be called on Linux: still with everything that matters."""
    return text.replace("/", "\u2215").replace("\0", "").encode()[:200].decode(errors="ignore") + ".png"


def picture(number: int) -> np.ndarray:
    """A shape of one of four colours on a ramp: uint8 (H, W, 3)."""
    height, width = 90 + number % 3 * 20, 120 - number % 4 * 15
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([160 + x / width * 60, 170 + y / height * 50, 190 - x / width * 40], axis=-1)
    inside = (abs(y - height / 2) < 25) & (abs(x - width * (0.3 + 0.1 * (number % 5))) < 22)
    if number % 2:
        inside = (y - height / 2) ** 2 + (x - width * (0.3 + 0.1 * (number % 5))) ** 2 < 26**2
    pixels[inside] = [(200, 40, 40), (40, 90, 200), (40, 150, 70), (230, 180, 40)][number % 4]
    return pixels.astype(np.uint8)


def codes_of(pixels: np.ndarray) -> np.ndarray:
    """Codes (P, D) that follow the colours of the patches, so that a code means something."""
    view = make_views(pixels, GEOMETRY)[0][0].reshape(GRID[0], 7, GRID[1], 7, 3).mean(axis=(1, 3)).reshape(-1, 3)
    coarse = (view // 64).astype(int)
    fine = (view // 16).astype(int) % 4
    first = coarse @ (16, 4, 1)
    return np.stack([first, fine @ (16, 4, 1), (view.sum(axis=1) // 24).astype(int)], axis=1)


def save_set(folder: Path | str, root: Path, count: int = 12, *, names: list[str] | None = None) -> Manifest:
    """A set of `count` pictures of `root`, called `names` as far as these go, in units of 64; captions carried along.

    The last of the hostile names is too long for a file, so that it has codes and no picture. Every hostile text is
    also a reject's name and message. Two sessions of one worker stand in metrics.jsonl.
    """
    given = [*(names or []), *(f"shapes/{number:04}.png" for number in range(count))][:count]
    store = Store.open(folder)
    (root / "shapes").mkdir(parents=True, exist_ok=True)
    mark = fingerprint(KEYS)
    records = []
    for start in range(0, count, 64):
        ids = given[start : start + 64]
        records.append(_unit(store, root, f"u{start // 64:06}", ids, start, mark, rejects=HOSTILE if names else []))
    _job_metrics(store, [len(record.members) for record in records])
    return assemble_manifest(store, _header(root), records)


def _unit(
    store: Store, root: Path, unit: str, ids: list[str], first: int, mark: str, *, rejects: list[str]
) -> CommitRecord:
    pictures = [picture(first + number) for number in range(len(ids))]
    encoded = [_png(pixels) for pixels in pictures]
    for name, data in zip(ids, encoded, strict=True):
        if len(name.encode()) < 256:
            (root / name).write_bytes(data)
    codes = np.stack([codes_of(pixels) for pixels in pictures]).reshape(len(ids), -1)
    captions = [HOSTILE[(first + n) % len(HOSTILE)] if rejects else f"shape {n % 4} of set" for n in range(len(ids))]
    shard = ShardData(
        image_ids=ids,
        sha256=[hashlib.sha256(data).hexdigest() for data in encoded],
        widths=[pixels.shape[1] for pixels in pictures],
        heights=[pixels.shape[0] for pixels in pictures],
        view_boxes=[make_views(pixels, GEOMETRY)[1] for pixels in pictures],
        locators=[Locator(name, 0, len(data)) for name, data in zip(ids, encoded, strict=True)],
        codes=codes,
        extra=pa.table({"caption": pa.array(captions, pa.string())}),
    )
    data = encode_shard(shard, fingerprint=mark, unit=unit, code_dtype=np.dtype(np.uint16))
    digest = hashlib.sha256(data).hexdigest()
    entry = ShardEntry(path=shard_name(unit, digest), bytes=len(data), sha256=digest, unit=unit, rows=len(ids))
    store.write(entry.path, data)
    bad = rejects if not first else []
    members = [*ids, *(f"bad {text}" for text in bad)]
    record = CommitRecord(
        fingerprint=mark,
        unit=unit,
        shard=entry,
        members=MemberColumns.of(UnitMember(name, 100, 10**18, first + n) for n, name in enumerate(members)),
        rejects=[
            RejectRow(image_id=f"bad {text}", reason="corrupt" if n % 2 else "missing", message=text, source_row=n)
            for n, text in enumerate(bad)
        ],
        usage=encode_usage(histograms(codes, SIZES)),
        views=len(ids),
        codes=codes.size,
        numerics=NUMERICS,
        seconds=0.5,
    )
    write_commit(store, record)
    return record


def _header(root: Path) -> ManifestHeader:
    rng = np.random.default_rng(0)
    spec = TokenizerSpec(
        kind="fitted",
        origin="encoder",
        weights_sha256={"model.safetensors": "0" * 64},
        view_size=GEOMETRY.size,
        grid=GRID,
        codebook_sizes=SIZES,
        code_dim=DIM,
    )
    return ManifestHeader(
        fingerprint_keys=KEYS,
        tokenizer=spec,
        geometry=GEOMETRY,
        codebooks=[rng.standard_normal((size, DIM)).astype(np.float32) for size in SIZES],
        source=SourceIdentity(kind="folder", location=str(root)),
        source_errors=0,
        command=["asvr", "tokenize"],
        versions={},
    )


def _png(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def _job_metrics(store: Store, sizes: list[int]) -> None:
    """Twenty units of ten seconds, with a night between the tenth and the eleventh."""
    now = datetime(2026, 11, 1, 12, tzinfo=UTC)
    for number in range(20):
        now += timedelta(seconds=10) + timedelta(hours=8 if number == 10 else 0)
        line = {"time": now.isoformat(), "unit": f"u{number}", "images": 640 + 10 * number, "seconds": 10.0}
        line |= {"wait_share": 0.1, "worker": "local", "images_per_second": 64.0}
        store.append("metrics.jsonl", json.dumps(line).encode() + b"\n")


def save_run(folder: Path, token_set: Path, *, seed: int = 0, answers: list[dict[str, Any]] | None = None) -> Path:
    """A run of two phases, the second unfinished, with metrics as the trainer writes them."""
    rng = np.random.default_rng(seed)
    for order, (phase, steps) in enumerate((("pretrain", 400), ("instruct", 90))):
        lines = []
        for step in range(1, steps + 1):
            fall = math.exp(-step / 80)
            depths = [3.0 + depth * 0.4 + 2 * fall + rng.normal(0, 0.03) for depth in range(len(SIZES))]
            term = {"loss": float(np.mean(depths)), "loss_depth": depths, "targets": 640}
            term["accuracy_depth"] = [(0.6 - 0.15 * depth) * (1 - fall) for depth in range(len(SIZES))]
            text = 1.0 + 3 * fall + rng.normal(0, 0.05)
            line = {"step": step, "epoch": 0, "loss": text + term["loss"], "text_loss": text}
            line |= {"visual_loss": term["loss"], "objectives": {"codes": term}, "grad_norm": 1.0, "lr": 1e-3}
            line |= {"time": f"2026-11-0{1 + order}T12:00:00+00:00"}
            lines.append(json.dumps(line))
        (folder / phase).mkdir(parents=True)
        (folder / phase / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 9')  # killed while it wrote
        done = folder / phase / f"step_{steps}"
        done.mkdir()
        config = {"phases": [{"name": "pretrain", "manifests": [str(token_set)]}, {"name": "instruct"}]}
        (done / "COMPLETE.json").write_text(json.dumps({"final": not order, "config": config}))
    if answers is not None:
        (folder / "eval").mkdir()
        (folder / "eval" / "answers.jsonl").write_text("".join(json.dumps(one) + "\n" for one in answers))
    return folder
