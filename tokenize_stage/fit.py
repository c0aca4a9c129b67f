"""`asvr fit-codebook`: images of a source become views, features, a bounded sample of them, and codebooks.

Memory: the sample (2 GiB at most: 1.4 million positions 384 wide, 466,000 at 1,152), the encoder, and a few
batches. Of a longer stream a uniform sample of its positions is kept, see `Reservoir`.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from manifests.anyres import most_views
from manifests.decode import decode
from manifests.errors import InputError
from manifests.geometry import content_mask, make_views
from manifests.images import ImageSource, UnitReader
from manifests.rejects import Reject
from manifests.schema import Geometry
from tokenize_stage.codebook_folder import (
    CodebookDescription,
    EncoderRecord,
    FitReport,
    encoder_reference,
    write_codebooks,
    write_description,
)
from tokenize_stage.decoding import MOST_DECODE_THREADS, usable_cores
from tokenize_stage.device_memory import enough_memory
from tokenize_stage.encoder_files import encoder_sha256, locate_encoder, normalisation
from tokenize_stage.fit_keys import fit_keys
from tokenize_stage.reservoir import Reservoir
from tokenize_stage.retry import with_retries
from tokenize_stage.sources import Inventory, take_inventory
from tokenize_stage.warm_start import read_start

if TYPE_CHECKING:
    from tokenize_stage.config import CodebookConfig
    from tokenize_stage.encoder import VisionEncoder

SAMPLE_BYTES = 2 << 30
"""Size of the feature sample a fit keeps in memory."""

_log = logging.getLogger(__name__)


class FitProgress(Protocol):
    """Called as the fit goes on: `phase` is `features` (in images), then `depth 1/D` .. `depth D/D` (in steps)."""

    def __call__(self, phase: str, done: int, total: int) -> None: ...


class ViewBatch(NamedTuple):
    """Views to learn from; `images` and `rejected` count what became of the images behind the batch."""

    views_BSSC: npt.NDArray[np.uint8]
    content_BP: npt.NDArray[np.bool_]
    """False for padding cells: their features would take codes that no loss ever looks at."""
    images: int
    rejected: int


@dataclass
class FeatureSample:
    """The features a codebook is fitted to, float32 (N, n), and the counts for the report."""

    features_Nn: npt.NDArray[np.float32]
    images: int
    rejected: int
    positions: int


def fit_codebook(config: CodebookConfig, progress: FitProgress | None = None) -> FitReport:
    """Fit the codebooks of `config` and write its output folder; `codebook.json` comes last.

    Raises `InputError` for an unusable source, encoder or sample, `StorageError` when a disk refuses,
    `EnvironmentProblem` when the device is out of memory.
    """
    from tokenize_stage.encoder import VisionEncoder
    from tokenize_stage.kmeans import fit_product, fit_residual

    began = time.monotonic()
    report_progress = progress or _no_progress
    files = locate_encoder(config.encoder.path)
    sha256 = encoder_sha256(files.folder)
    pixels = normalisation(files.folder)
    geometry = config.geometry.resolve(pixels.mean)
    inventory = take_inventory(config.source)
    with enough_memory(config.batch_size):
        encoder = VisionEncoder(
            files.folder,
            layer=config.encoder.layer,
            view_size=config.geometry.size,
            normalisation=pixels,
            dtype=config.encoder.dtype,
            device=config.device,
        )
    code_dim = chunk_width(config, encoder.width)
    start = read_start(config.start_from, config, code_dim, sha256) if config.start_from else None
    keys = fit_keys(config)
    sample_rows = sample_images(inventory, config.images, config.seed)
    _log.info(
        "fitting %d %s codebooks of %d vectors, %d wide, to the features of %d images, %d positions each, on %s",
        config.depth, config.method, config.size, code_dim, sample_rows.num_rows, encoder.positions, encoder.device,
    )  # fmt: skip
    views = read_views(config, geometry, inventory.images_at, sample_rows, encoder.grid)
    with closing(views) as batches, enough_memory(config.batch_size):
        sample = collect_features(
            encoder,
            batches,
            seed=config.seed,
            on_images=lambda done: report_progress("features", done, sample_rows.num_rows),
        )
    if not sample.images:
        raise InputError(
            f"none of the {sample_rows.num_rows} images sampled from {inventory.source.location} could be decoded"
        )
    learn = fit_product if config.method == "product" else fit_residual
    codebooks, depths = learn(
        sample.features_Nn,
        depth=config.depth,
        size=config.size,
        iterations=config.iterations,
        minibatch=config.minibatch,
        seed=config.seed,
        device=encoder.device,
        on_step=lambda depth, step: report_progress(f"depth {depth + 1}/{config.depth}", step, config.iterations),
        start=start.codebooks if start else None,
    )
    report = FitReport(
        images=sample.images,
        rejected=sample.rejected,
        positions=sample.positions,
        sampled=len(sample.features_Nn),
        seconds=round(time.monotonic() - began, 3),
        depths=tuple(depths),
    )
    output = config.output
    description = CodebookDescription(
        method=config.method,
        encoder=EncoderRecord(
            path=config.encoder.path if files.revision else encoder_reference(output, files.folder),
            revision=files.revision,
            layer=encoder.layer,
            sha256=sha256,
        ),
        image_mean=pixels.mean,
        image_std=pixels.std,
        view_size=config.geometry.size,
        grid=encoder.grid,
        codebook_sizes=(config.size,) * config.depth,
        code_dim=code_dim,
        codebook_sha256=write_codebooks(output, codebooks),
        started_from=start.sha256 if start else None,
        fit_keys=keys,
        geometry=geometry,
        dtype=config.encoder.dtype,
        seed=config.seed,
        report=report,
    )
    write_description(output, description)
    return report


def chunk_width(config: CodebookConfig, width: int) -> int:
    """Width of a codebook vector for features `width` wide. `InputError` if they are not cut into equal chunks."""
    if config.method == "residual":
        return width
    if width % config.depth:
        raise InputError(
            f"features {width} wide are not cut into {config.depth} equal chunks: set depth to a divisor of {width}"
        )
    return width // config.depth


def sample_images(inventory: Inventory, count: int, seed: int) -> pa.Table:
    """The inventory's rows of `count` images (all of them if there are fewer), drawn by `seed`, in source order."""
    if count >= inventory.images:
        return inventory.table
    return inventory.table.take(np.sort(np.random.default_rng(seed).choice(inventory.images, count, replace=False)))


def collect_features(
    encoder: VisionEncoder,
    batches: Iterable[ViewBatch],
    *,
    seed: int,
    sample_bytes: int = SAMPLE_BYTES,
    on_images: Callable[[int], None] | None = None,
) -> FeatureSample:
    """Encode batches and keep a uniform sample, of at most `sample_bytes`, of the positions with content."""
    import torch

    reservoir = Reservoir(max(1, sample_bytes // (4 * encoder.width)), encoder.width, seed)
    images = rejected = 0
    for batch in batches:
        if len(batch.views_BSSC):
            features_BPn = encoder.features(torch.from_numpy(batch.views_BSSC)).cpu().numpy()
            reservoir.add(features_BPn[batch.content_BP])
        images += batch.images
        rejected += batch.rejected
        if on_images:
            on_images(images + rejected)
    return FeatureSample(reservoir.sample(), images, rejected, reservoir.seen)


def read_views(
    config: CodebookConfig, geometry: Geometry, source: ImageSource, images: pa.Table, grid: tuple[int, int]
) -> Generator[ViewBatch]:
    """Batches of at most `config.batch_size` views, in order, decoded in threads two batches ahead of the caller."""
    per_batch = max(1, config.batch_size // most_views(geometry))
    threads = config.decode_threads or min(MOST_DECODE_THREADS, usable_cores())
    rows = range(images.num_rows)
    chunks = [rows[start : start + per_batch] for start in range(0, len(rows), per_batch)]
    ahead: deque[list[Future[_Seen | Reject]]] = deque()
    with UnitReader(source, images, rows) as reader, ThreadPoolExecutor(threads, thread_name_prefix="decode") as pool:
        try:
            for number, chunk in enumerate([*chunks, [], []]):
                ahead.append([pool.submit(_see, config.max_pixels, geometry, reader, row, grid) for row in chunk])
                if number >= 2:
                    yield _batch([future.result() for future in ahead.popleft()], geometry.size, grid)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _no_progress(phase: str, done: int, total: int) -> None:  # noqa: ARG001 - the shape of FitProgress
    return


class _Seen(NamedTuple):
    views_VSSC: npt.NDArray[np.uint8]
    content_VP: npt.NDArray[np.bool_]


def _see(max_pixels: int, geometry: Geometry, reader: UnitReader, row: int, grid: tuple[int, int]) -> _Seen | Reject:
    try:
        data = with_retries(lambda: reader.read(row), f"reading image {reader.name(row)}")
        image = decode(data, max_pixels=max_pixels)
        views, boxes = make_views(image, geometry)
    except Reject as reject:
        return reject
    height, width = image.shape[:2]
    return _Seen(views, content_mask(boxes, grid, width, height).reshape(len(views), -1))


def _batch(results: list[_Seen | Reject], size: int, grid: tuple[int, int]) -> ViewBatch:
    seen = [result for result in results if isinstance(result, _Seen)]
    positions = grid[0] * grid[1]
    return ViewBatch(
        np.concatenate([np.empty((0, size, size, 3), np.uint8), *(one.views_VSSC for one in seen)]),
        np.concatenate([np.empty((0, positions), np.bool_), *(one.content_VP for one in seen)]),
        images=len(seen),
        rejected=len(results) - len(seen),
    )
