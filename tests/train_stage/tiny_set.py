"""A small data set on disk: pictures, conversations about them, and a manifest with codes for the pictures."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
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
from manifests.schema import FeatureDtype, FeaturesSpec, Geometry, Numerics, ShardEntry, SourceIdentity, TokenizerSpec
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
    code_seed: int | None = None,
    locators: Mapping[str, Locator] | None = None,
    encode: Callable[[np.ndarray], np.ndarray] | None = None,
    sizes: tuple[int, ...] = SIZES,
) -> np.ndarray:
    """A manifest in `folder` with random codes for the pictures of `root`; the codes, int64 (N, P, D).

    Sets of one `seed` have one codebook; `code_seed` gives the codes of one a seed of their own. Every view of a picture
    has the same ones; unless `encode` makes codes (V, P, D) of its views (V, S, S, 3). `locators` say, by image id, where
    the pictures lie that are no files of their own.
    """
    spec = TokenizerSpec(
        kind="fitted",
        origin="tiny",
        weights_sha256={"codebook": "0" * 64},
        view_size=geometry.size,
        grid=grid,
        codebook_sizes=sizes,
        code_dim=CODE_DIM,
    )
    rng = np.random.default_rng(seed)
    chosen = rng if code_seed is None else np.random.default_rng(code_seed)
    codes = chosen.integers(0, min(sizes), (len(ids), grid[0] * grid[1], len(sizes)))
    keys: dict[str, Any] = {"tokenizer": spec.model_dump(mode="json"), "geometry": geometry.model_dump(mode="json")}
    mark = fingerprint(keys)
    store = Store.open(folder)
    records = []
    for start in range(0, len(ids), unit_size):
        record = _commit(
            store,
            mark,
            f"u{start // unit_size:06}",
            root,
            ids[start:],
            codes[start:],
            geometry,
            unit_size,
            locators=locators,
            encode=encode,
            sizes=sizes,
        )
        records.append(record)
    header = ManifestHeader(
        fingerprint_keys=keys,
        tokenizer=spec,
        geometry=geometry,
        codebooks=[rng.standard_normal((size, CODE_DIM)).astype(np.float32) for size in sizes],
        source=SourceIdentity(kind="folder", location=str(root)),
        source_errors=0,
        command=["test"],
        versions={},
    )
    assemble_manifest(store, header, records)
    return codes


def save_features(
    folder: Path, root: Path, ids: list[str], spec: FeaturesSpec, values: np.ndarray, *, geometry: Geometry = GEOMETRY
) -> None:
    """A manifest in `folder` with the features (N, P, W) of the pictures of `root`, as `spec` stores them."""
    keys: dict[str, Any] = {"tokenizer": spec.model_dump(mode="json"), "geometry": geometry.model_dump(mode="json")}
    store = Store.open(folder)
    mark = fingerprint(keys)
    record = _commit(store, mark, "u000000", root, ids, values, geometry, len(ids), feature_dtype=spec.dtype)
    header = ManifestHeader(
        fingerprint_keys=keys,
        tokenizer=spec,
        geometry=geometry,
        codebooks=[],
        source=SourceIdentity(kind="folder", location=str(root)),
        source_errors=0,
        command=["test"],
        versions={},
    )
    assemble_manifest(store, header, [record])


def _commit(
    store: Store,
    mark: str,
    unit: str,
    root: Path,
    ids: list[str],
    codes: np.ndarray,
    geometry: Geometry,
    size: int,
    *,
    feature_dtype: FeatureDtype | None = None,
    locators: Mapping[str, Locator] | None = None,
    encode: Callable[[np.ndarray], np.ndarray] | None = None,
    sizes: tuple[int, ...] = SIZES,
) -> CommitRecord:
    ids, codes = ids[:size], codes[:size]
    paths = [root / image_id for image_id in ids]
    pictures = [np.asarray(Image.open(path).convert("RGB")) for path in paths]
    views = [make_views(picture, geometry) for picture in pictures]
    boxes = [own for _, own in views]
    rows = (
        [encode(own).reshape(-1) for own, _ in views]
        if encode
        else [np.tile(own.reshape(-1), len(box)) for own, box in zip(codes, boxes, strict=True)]
    )
    data = encode_shard(
        ShardData(
            image_ids=ids,
            sha256=[hashlib.sha256(path.read_bytes()).hexdigest() for path in paths],
            widths=[picture.shape[1] for picture in pictures],
            heights=[picture.shape[0] for picture in pictures],
            view_boxes=boxes,
            locators=[
                (locators or {}).get(image_id) or Locator(image_id, 0, path.stat().st_size)
                for image_id, path in zip(ids, paths, strict=True)
            ],
            codes=rows,
        ),
        fingerprint=mark,
        unit=unit,
        code_dtype=np.uint16,
        feature_dtype=feature_dtype,
    )
    sha256 = hashlib.sha256(data).hexdigest()
    name = shard_name(unit, sha256)
    store.write(name, data)
    depths = [] if feature_dtype else list(zip(np.concatenate(rows).reshape(-1, len(sizes)).T, sizes, strict=True))
    record = CommitRecord(
        fingerprint=mark,
        unit=unit,
        shard=ShardEntry(path=name, bytes=len(data), sha256=sha256, unit=unit, rows=len(ids)),
        members=MemberColumns.of(
            UnitMember(image_id, path.stat().st_size, path.stat().st_mtime_ns, row)
            for row, (image_id, path) in enumerate(zip(ids, paths, strict=True))
        ),
        rejects=[],
        usage=encode_usage([np.bincount(own, minlength=size) for own, size in depths]),
        views=sum(map(len, boxes)),
        codes=0 if feature_dtype else sum(map(len, rows)),
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
