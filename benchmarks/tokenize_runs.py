"""The contestants of `benchmarks.tokenize`. Each runs in a process of its own and prints one line of JSON.

All read the same files with `manifests.decode` and `manifests.geometry` (the Ray script reads as `read_images` does), and
encode with the same tokenizer on batches of the same size. `Watch` leaves out the first batch: loading of models
and libraries, and starting Ray.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from pydantic import BaseModel

from manifests.decode import decode
from manifests.geometry import make_views
from manifests.live import JobProgress
from manifests.reader import open_manifest
from manifests.schema import Geometry
from manifests.shards import list_values
from tokenize_stage.config import FolderSource, TokenSetConfig
from tokenize_stage.identity import identify
from tokenize_stage.job import run_job
from tokenize_stage.progress import METRICS_NAME
from tokenize_stage.sources import take_inventory
from tokenize_stage.tokenizers import load
from tokenize_stage.tokenizers.base import Tokenizer

_TOGETHER = 16


class Run(BaseModel):
    """What a contestant is told: the job, and for how long to measure a limit."""

    config: TokenSetConfig
    seconds: float

    @property
    def images(self) -> Path:
        """The folder of the pictures."""
        assert isinstance(self.config.source, FolderSource)  # noqa: S101 - as benchmarks.tokenize makes it
        return Path(self.config.source.path)

    @property
    def output(self) -> Path:
        """The folder that a contestant writes."""
        return Path(self.config.output)

    @property
    def geometry(self) -> Geometry:
        """With its colour decided, as the job decides it."""
        return self.config.geometry.resolve(self._spec.settings["image_mean"])

    @property
    def threads(self) -> int:
        """Of decoding, and of the encoder's arithmetic."""
        return self.config.torch_threads or 1

    @property
    def _spec(self) -> Any:
        return identify(self.config.tokenizer, self.config.geometry.resolve()).spec

    def files(self) -> list[str]:
        """In the order of the job's source."""
        return [
            str(self.images / image_id) for image_id in take_inventory(self.config.source).table["image_id"].to_pylist()
        ]

    def load(self) -> Tokenizer:
        """The tokenizer, with the job's number of threads."""
        torch.set_num_threads(self.threads)
        return load(self.config.tokenizer, self._spec, dtype=self.config.compute_dtype, device=self.config.device)


class Watch:
    """Counts images from the end of the first batch to the last count."""

    def __init__(self, first: int) -> None:
        self._first = first
        self._marks: list[tuple[float, int]] = []

    def at(self, done: int) -> None:
        """So many images are done now."""
        if done >= self._first:
            self._marks = [*self._marks[:1], (time.monotonic(), done)]

    def finished(self) -> None:
        """The last image's results are written now."""
        self.at(self._marks[-1][1])

    def result(self) -> dict[str, float]:
        """`images` and `seconds` after the first batch."""
        (began, before), (ended, done) = self._marks[0], self._marks[-1]
        return {"images": done - before, "seconds": ended - began, "all": done}


def job(run: Run) -> dict[str, Any]:
    """This project's job. The clock stops when the last unit is committed."""
    watch, peaks = Watch(run.config.batch_size), dict[str, int]()

    def listen(state: JobProgress) -> None:
        watch.at(state.done)
        peaks.update(_peaks(Path(run.output) / METRICS_NAME))

    result = run_job(run.config, progress=listen)
    shards = open_manifest(run.output).iter_shards(["codes"])
    codes = np.concatenate([list_values(shard["codes"])[0] for shard in shards])
    peak = max(peaks.values(), default=0)
    return {**watch.result(), "peak": peak, "codes": result.manifest.totals.codes, "digest": _digest(codes)}


def plain(run: Run) -> dict[str, Any]:
    """(a): decode a batch in threads, encode it, next; one Parquet file at the end."""
    tokenizer, geometry, watch = run.load(), run.geometry, Watch(run.config.batch_size)
    codes: list[npt.NDArray[Any]] = []
    files = run.files()
    done = 0
    with ThreadPoolExecutor(run.threads) as pool:
        for batch in _batches(files, run.config.batch_size):
            views = np.stack(list(pool.map(lambda file: _view(file, geometry), batch)))
            padded = np.zeros((run.config.batch_size, *views.shape[1:]), np.uint8)
            padded[: len(views)] = views
            codes.append(tokenizer.encode(torch.from_numpy(padded)).cpu().numpy()[: len(views)])
            done += len(views)
            watch.at(done)
    all_codes = np.concatenate(codes).astype(np.uint16)
    _write(run.output, files, all_codes)
    watch.finished()
    return {**watch.result(), "peak": _peak("self"), "codes": all_codes.size, "digest": _digest(all_codes)}


def ray_script(run: Run) -> dict[str, Any]:
    """(b): `read_images`, `map_batches`, `write_parquet`."""
    import ray
    import ray.data

    ray.init(address="local", log_to_driver=False, include_dashboard=False, logging_level="ERROR")
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    marks = Path(run.output) / "marks"
    marks.parent.mkdir(parents=True)
    (
        ray.data.read_images(str(run.images), include_paths=True, mode="RGB")
        .map_batches(
            RayEncoder,
            fn_constructor_args=(run.model_dump_json(), str(marks)),
            batch_size=run.config.batch_size,
            compute=ray.data.ActorPoolStrategy(size=1),
            num_gpus=1 if _on_gpu(run) else 0,
            num_cpus=1,
        )
        .write_parquet(str(Path(run.output) / "parquet"))
    )
    ended = time.monotonic()
    lines = [json.loads(line) for line in marks.read_text().splitlines()]
    first, all_images = lines[0], sum(line["images"] for line in lines)
    written = pq.read_table(Path(run.output) / "parquet", columns=["codes"])
    ray.shutdown()
    return {
        "images": all_images - first["images"],
        "seconds": ended - first["time"],
        "all": written.num_rows,
        "peak": lines[-1]["peak"],
        "codes": sum(line["codes"] for line in lines),
    }


class RayEncoder:
    """The class that such a script gives to `map_batches`."""

    def __init__(self, run: str, marks: str) -> None:
        self._run = Run.model_validate_json(run)
        self._tokenizer, self._geometry, self._marks = self._run.load(), self._run.geometry, Path(marks)

    def __call__(self, batch: dict[str, npt.NDArray[Any]]) -> dict[str, Any]:
        images = [np.ascontiguousarray(image) for image in batch["image"]]
        views = np.concatenate([make_views(image, self._geometry)[0] for image in images])
        codes = self._tokenizer.encode(torch.from_numpy(views)).cpu().numpy().astype(np.uint16)
        mark = {"time": time.monotonic(), "images": len(views), "codes": codes.size, "peak": _peak("self")}
        with self._marks.open("a") as file:
            file.write(json.dumps(mark) + "\n")
        return {"path": batch["path"], "codes": list(codes.reshape(len(codes), -1))}


def decode_limit(run: Run) -> dict[str, Any]:
    """(c): read, hash, decode and view in threads, for `seconds`; nothing is encoded."""
    geometry, watch = run.geometry, Watch(_TOGETHER)

    def several(files: Sequence[str]) -> int:
        return len([_view(file, geometry) for file in files])

    done, began = 0, time.monotonic()
    with ThreadPoolExecutor(run.threads) as pool:
        groups = list(_batches(run.files(), _TOGETHER))
        while time.monotonic() - began < run.seconds:
            for count in pool.map(several, groups[: 4 * run.threads]):
                done += count
                watch.at(done)
            groups = groups[4 * run.threads :] + groups[: 4 * run.threads]
    return watch.result()


def encode_limit(run: Run) -> dict[str, Any]:
    """(d): the first batches again and again, for `seconds`; nothing is read."""
    tokenizer, geometry, size = run.load(), run.geometry, run.config.batch_size
    views = np.stack([_view(file, geometry) for file in itertools.islice(itertools.cycle(run.files()), 4 * size)])
    batches = [torch.from_numpy(views[start : start + size]) for start in range(0, len(views), size)]
    if _on_gpu(run):
        batches = [batch.cuda() for batch in batches]
    watch, done, began = Watch(size), 0, time.monotonic()
    for batch in itertools.cycle(batches):
        tokenizer.encode(batch).cpu()
        done += size
        watch.at(done)
        if time.monotonic() - began > run.seconds and done > size:
            return watch.result()
    raise AssertionError


def _view(file: str, geometry: Geometry) -> npt.NDArray[np.uint8]:
    data = Path(file).read_bytes()
    hashlib.sha256(data).digest()  # a job that can be verified does this too
    view: npt.NDArray[np.uint8] = make_views(decode(data), geometry)[0][0]
    return view


def _batches(files: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    for start in range(0, len(files), size):
        yield files[start : start + size]


def _write(folder: Path, files: Sequence[str], codes: npt.NDArray[Any]) -> None:
    folder.mkdir(parents=True)
    flat = pa.array(list(codes.reshape(len(codes), -1)))
    pq.write_table(pa.table({"path": list(files), "codes": flat}), folder / "codes.parquet", compression="zstd")


def _digest(codes: npt.NDArray[np.uint16]) -> str:
    return hashlib.sha256(np.ascontiguousarray(codes).data).hexdigest()


def _on_gpu(run: Run) -> bool:
    return run.config.device != "cpu" and torch.cuda.is_available()


def _peaks(metrics: Path) -> dict[str, int]:
    """Peak memory by worker, for those that finished a unit and are still alive."""
    if not metrics.exists():
        return {}
    workers = {json.loads(line)["worker"] for line in metrics.read_text().splitlines()}
    pids = {worker: worker.rpartition(":")[2] for worker in workers}
    return {worker: _peak(pid) for worker, pid in pids.items() if Path(f"/proc/{pid}/status").exists()}


def _peak(pid: str) -> int:
    """Most bytes that a process ever held, by the kernel's count."""
    text = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    return next((int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("VmHWM:")), 0)


CONTESTANTS = {
    "job": job,
    "plain": plain,
    "ray_script": ray_script,
    "decode_limit": decode_limit,
    "encode_limit": encode_limit,
}


if __name__ == "__main__":
    # What a job or Ray prints must not mix with the one line that is read.
    out, sys.stdout = sys.stdout, sys.stderr
    print(json.dumps(CONTESTANTS[sys.argv[1]](Run.model_validate_json(sys.argv[2]))), file=out)
