"""How long `asvr plan` takes, as a whole process, when everything is done: python -m benchmarks.plan_recipe

The recipe has a set of ten million images in files of their own, whose inventory is remembered, with a real manifest, index
and shard list (the shards themselves are empty files, of which only the size is looked at), two finished phases on tiny
models, and an export. Target: under 2 s.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from transformers import CLIPImageProcessorPil, Dinov2Config, Dinov2Model

from benchmarks.machine import describe
from benchmarks.plan import UNIT, inventory
from manifests.images import ImageSource
from manifests.schema import FileEntry, Manifest, Numerics, Provenance, ShardEntry, SourceIdentity, TableEntry, Totals
from manifests.shards import INDEX_SCHEMA, REJECTS_SCHEMA
from manifests.storage import Store
from pipeline.recipe import load_recipe
from tokenize_stage.completeness import completed_with
from tokenize_stage.config import TokenSetConfig
from tokenize_stage.inventory_cache import Listing, list_source
from tokenize_stage.output_folder import JobFile, write_job_file
from tokenize_stage.resolved import resolve
from tokenize_stage.sources import Inventory
from train_stage.checkpoint import MARKER, newest, settings_of
from train_stage.export_marker import MADE_FROM, MARKER_FILE, origin_of


def main() -> None:
    """Make the folder, plan it some times, print each time."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--images", type=int, default=10_000_000, help="more than a million, of which the listing is remembered"
    )
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument(
        "--folder", type=Path, help="where the recipe is, or is made and kept; default: made and removed"
    )
    arguments = parser.parse_args()
    print(describe(torch.device("cpu")))
    with tempfile.TemporaryDirectory() as place:
        folder = arguments.folder or Path(place)
        if not (folder / "recipe.yaml").exists():
            make(folder, arguments.images)
        command = [sys.executable, "-m", "pipeline", "plan", str(folder / "recipe.yaml")]
        subprocess.run(command, check=True, capture_output=True)  # hashes the index, once and for all
        walls, cores = [], []
        for _ in range(arguments.runs):
            began, spent = time.perf_counter(), _children()
            found = subprocess.run(command, check=True, capture_output=True, text=True)
            walls.append(time.perf_counter() - began)
            cores.append(_children() - spent)
        print(found.stdout)
        print(f"seconds   {_listed(walls)}")
        print(f"of a core {_listed(cores)}")


def _children() -> float:
    """Seconds of processor time that finished children have used."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _listed(seconds: list[float]) -> str:
    return f"{', '.join(f'{one:.2f}' for one in seconds)}; median {statistics.median(seconds):.2f}"


def make(folder: Path, images: int) -> None:
    """The recipe and everything that it asks for."""
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_ratio": 2}
    Dinov2Model(Dinov2Config(image_size=28, patch_size=14, **shape)).save_pretrained(folder / "tower")
    CLIPImageProcessorPil().save_pretrained(folder / "tower")
    (folder / "images").mkdir()
    (folder / "talks.json").write_text("[]")
    phase = {
        "data": [{"path": "talks.json", "image_root": "images"}],
        "manifests": ["vqa"],
        "objective": {"kind": "none"},
    }
    recipe = {
        "tokenize": {
            "vqa": {
                "source": {"kind": "folder", "path": "images"},
                "geometry": {"mode": "squash", "size": 28},
                "tokenizer": {"kind": "features", "encoder": {"path": "tower", "layer": 1}, "view_size": 28},
                "output": "tokens",
            }
        },
        "train": {
            "output": "run",
            "model": {"language_model": "tower", "vision_tower": "tower"},
            "phases": [{"name": name, **phase} for name in ("pretrain", "instruct")],
        },
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    loaded = load_recipe(folder / "recipe.yaml")
    finish_set(loaded.token_sets()["vqa"], images)
    train = loaded.train()
    for name in ("pretrain", "instruct"):
        step = train.phase_folder(name) / "step_1"
        step.mkdir(parents=True)
        marker = {"step": 1, "final": True, "world_size": 1, "versions": {}, "settings": settings_of(train, name)}
        (step / MARKER).write_text(json.dumps(marker))
    last = newest(train.phase_folder("instruct"))
    if last is None:
        raise SystemExit("the checkpoint that was just written is not there")
    export = Path(train.output) / "export"
    export.mkdir()
    (export / MARKER_FILE).write_text(json.dumps({MADE_FROM: origin_of(last, "instruct")}))


def finish_set(config: TokenSetConfig, images: int) -> None:
    """The output folder of a set as the job leaves it, apart from what is in the shards."""
    job = resolve(config)
    store, source = job.store, SourceIdentity(kind="folder", location=str(config.source.path))
    table = inventory(np.arange(images))
    taken = Inventory(table, [], ImageSource(source.location), source)
    Listing(store, config.source, "2026-01-01T00:00:00", taken, None, None).remember()
    numbers = np.arange(images)
    digests = np.random.default_rng(0).bytes(32 * images).hex()
    rows = pa.Table.from_arrays(
        [
            table["image_id"],
            pa.array([digests[64 * at : 64 * at + 64] for at in range(images)]),
            pa.array(np.full(images, 640, np.int32)),
            pa.array(np.full(images, 480, np.int32)),
            pa.array((numbers // UNIT).astype(np.int32)),
            pa.array((numbers % UNIT).astype(np.int32)),
            table["size"],
            table["mtime_ns"],
        ],
        schema=INDEX_SCHEMA,
    )
    shards = [_shard(store, number, min(UNIT, images - start)) for number, start in enumerate(range(0, images, UNIT))]
    manifest = Manifest(
        kind="features",
        features=job.spec,
        fingerprint=job.fingerprint,
        fingerprint_keys=job.keys,
        geometry=job.geometry,
        source=source,
        shards=shards,
        index=_table(store, "index", rows),
        rejects=_table(store, "rejects", REJECTS_SCHEMA.empty_table()),
        totals=Totals(images=images, ok=images, rejected=0, source_errors=0, views=images, codes=0),
        provenance=Provenance(
            created_at="2026-01-01T00:00:00",
            command=["benchmark"],
            versions={},
            numerics=[Numerics(device="none", torch="none", dtype="float32", batch_size=1)],
        ),
    )
    store.write("manifest.json", manifest.model_dump_json(indent=2).encode())
    listing = list_source(store, config.source, refresh=False)
    write_job_file(
        store,
        JobFile(
            fingerprint=job.fingerprint,
            config=job.config.model_dump(mode="json"),
            fingerprint_keys=job.keys,
            images=images,
            units=len(shards),
            source_errors=0,
            completed=completed_with(store, listing),
        ),
    )


def _shard(store: Store, number: int, rows: int) -> ShardEntry:
    digest = hashlib.sha256(str(number).encode()).hexdigest()
    path = f"shards/u{number:06}-{digest[:16]}.parquet"
    place = Path(store.where(path))
    place.parent.mkdir(parents=True, exist_ok=True)
    place.touch()
    return ShardEntry(path=path, bytes=0, sha256=digest, unit=f"u{number:06}", rows=rows)


def _table(store: Store, name: str, rows: pa.Table) -> TableEntry:
    sink = pa.BufferOutputStream()
    pq.write_table(rows, sink, compression="zstd", row_group_size=1 << 20)
    data = sink.getvalue().to_pybytes()
    digest = hashlib.sha256(data).hexdigest()
    entry = FileEntry(path=f"{name}-{digest[:16]}.parquet", bytes=len(data), sha256=digest)
    store.write(entry.path, data)
    return TableEntry(**entry.model_dump(), rows=rows.num_rows)


if __name__ == "__main__":
    main()
