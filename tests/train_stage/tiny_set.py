"""A small data set on disk: pictures, conversations about them, and a manifest with codes for the pictures."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from manifests.commits import (
    CommitRecord,
    ManifestHeader,
    MemberColumns,
    UnitMember,
    assemble_manifest,
    encode_usage,
    write_commit,
)
from manifests.fingerprint import fingerprint
from manifests.geometry import make_views
from manifests.schema import Geometry, Numerics, ShardEntry, SourceIdentity, TokenizerSpec
from manifests.shards import Locator, ShardData, encode_shard, shard_name
from manifests.storage import Store

VIEW = 28
GRID = (4, 4)
SIZES = (12, 12)
CODE_DIM = 8
GEOMETRY = Geometry(mode="pad", size=VIEW, background=(127, 127, 127))

WORDS = ("red", "green", "blue", "circle", "square", "triangle", "yes", "no")


def save_pictures(root: Path, count: int, seed: int = 0) -> list[str]:
    """`count` PNGs of several shapes below `root`; their image ids."""
    rng = np.random.default_rng(seed)
    root.mkdir(parents=True, exist_ok=True)
    ids = []
    for number in range(count):
        height, width = 20 + 6 * (number % 4), 44 - 6 * (number % 3)
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        image_id = f"p{number:03}.png"
        Image.fromarray(pixels).save(root / image_id)
        ids.append(image_id)
    return ids


def save_manifest(
    folder: Path,
    root: Path,
    ids: list[str],
    *,
    geometry: Geometry = GEOMETRY,
    grid: tuple[int, int] = GRID,
    unit_size: int = 5,
    seed: int = 1,
) -> np.ndarray:
    """A manifest in `folder` with random codes for the pictures of `root`; the codes, int64 (N, P, D)."""
    spec = TokenizerSpec(
        kind="fitted",
        origin="tiny",
        weights_sha256={"codebook": "0" * 64},
        view_size=geometry.size,
        grid=grid,
        codebook_sizes=SIZES,
        code_dim=CODE_DIM,
    )
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, min(SIZES), (len(ids), grid[0] * grid[1], len(SIZES)))
    keys: dict[str, Any] = {"tokenizer": spec.model_dump(mode="json"), "geometry": geometry.model_dump(mode="json")}
    mark = fingerprint(keys)
    store = Store.open(folder)
    records = []
    for start in range(0, len(ids), unit_size):
        record = _commit(
            store, mark, f"u{start // unit_size:06}", root, ids[start:], codes[start:], geometry, unit_size
        )
        records.append(record)
    header = ManifestHeader(
        fingerprint_keys=keys,
        tokenizer=spec,
        geometry=geometry,
        codebooks=[rng.standard_normal((size, CODE_DIM)).astype(np.float32) for size in SIZES],
        source=SourceIdentity(kind="folder", location=str(root)),
        source_errors=0,
        command=["test"],
        versions={},
    )
    assemble_manifest(store, header, records)
    return codes


def _commit(
    store: Store, mark: str, unit: str, root: Path, ids: list[str], codes: np.ndarray, geometry: Geometry, size: int
) -> CommitRecord:
    ids, codes = ids[:size], codes[:size]
    paths = [root / image_id for image_id in ids]
    pictures = [np.asarray(Image.open(path).convert("RGB")) for path in paths]
    data = encode_shard(
        ShardData(
            image_ids=ids,
            sha256=[hashlib.sha256(path.read_bytes()).hexdigest() for path in paths],
            widths=[picture.shape[1] for picture in pictures],
            heights=[picture.shape[0] for picture in pictures],
            view_boxes=[make_views(picture, geometry)[1] for picture in pictures],
            locators=[Locator(image_id, 0, path.stat().st_size) for image_id, path in zip(ids, paths, strict=True)],
            codes=codes.reshape(len(ids), -1),
        ),
        fingerprint=mark,
        unit=unit,
        code_dtype=np.uint16,
    )
    sha256 = hashlib.sha256(data).hexdigest()
    name = shard_name(unit, sha256)
    store.write(name, data)
    flat = codes.reshape(-1, len(SIZES))
    record = CommitRecord(
        fingerprint=mark,
        unit=unit,
        shard=ShardEntry(path=name, bytes=len(data), sha256=sha256, unit=unit, rows=len(ids)),
        members=MemberColumns.of(
            UnitMember(image_id, path.stat().st_size, path.stat().st_mtime_ns, row)
            for row, (image_id, path) in enumerate(zip(ids, paths, strict=True))
        ),
        rejects=[],
        usage=encode_usage([np.bincount(flat[:, depth], minlength=SIZES[depth]) for depth in range(len(SIZES))]),
        views=len(ids),
        codes=codes.size,
        numerics=Numerics(device="cpu", torch="none", dtype="float32", batch_size=1),
        seconds=0.0,
    )
    write_commit(store, record)
    return record


def save_records(path: Path, ids: list[str], *, text_only: int = 2, seed: int = 2) -> list[dict[str, Any]]:
    """LLaVA records: a conversation of one to three questions for each picture, and some without a picture."""
    rng = np.random.default_rng(seed)
    records: list[dict[str, Any]] = []
    for number in range(len(ids) + text_only):
        turns = []
        for turn in range(1 + number % 3):
            words = " ".join(rng.choice(WORDS, 2 + number % 4))
            question = f"what is {words}?"
            if turn == 0 and number < len(ids):
                question = f"<image>\n{question}"
            turns += [{"from": "human", "value": question}, {"from": "gpt", "value": str(rng.choice(WORDS))}]
        record: dict[str, Any] = {"id": f"r{number}", "conversations": turns}
        if number < len(ids):
            record["image"] = ids[number]
        records.append(record)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(records))
    return records


def save_captions(path: Path, ids: list[str], *, seed: int = 3) -> None:
    """LLaVA pretraining records: one caption for each picture."""
    rng = np.random.default_rng(seed)
    records = [
        {
            "id": image_id,
            "image": image_id,
            "conversations": [
                {"from": "human", "value": "describe it\n<image>"},
                {"from": "gpt", "value": " ".join(rng.choice(WORDS, 2 + number % 3))},
            ],
        }
        for number, image_id in enumerate(ids)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(records))
