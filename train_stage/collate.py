"""A micro-batch from sample numbers: images expanded to their positions, decoded to views and joined with their codes.

Runs in threads of the rank: reading, hashing and decoding a picture release the interpreter's lock.
"""

from __future__ import annotations

import hashlib
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from manifests.decode import DEFAULT_MAX_PIXELS, Reject, decode
from manifests.errors import InputError
from manifests.geometry import content_mask, make_views
from manifests.refs import read_image
from manifests.schema import Geometry
from train_stage.batch import IGNORE, Batch, dummy_view
from train_stage.codes import CodeTables
from train_stage.plan import Indices
from train_stage.samples import Samples

FILL = "(fill)"
"""Name of the sample that fills a micro-batch without samples."""


def is_fill(batch: Batch) -> bool:
    """Whether a micro-batch stands for no samples at all."""
    return batch.sample_ids == [FILL]


@dataclass(frozen=True)
class Picture:
    """Views uint8 (V, S, S, 3) of an image, mask (V, P) of the cells with content, codes (V, P, D) or None."""

    views: NDArray[np.uint8]
    mask: NDArray[np.bool_]
    codes: NDArray[np.integer[Any]] | None


@dataclass(frozen=True)
class Collator:
    """Makes the micro-batches of a phase; calling it is a pure function of the sample numbers.

    `codes` is None when the phase names no manifests.
    """

    samples: Samples
    codes: CodeTables | None
    geometry: Geometry
    grid: tuple[int, int]
    image_token_id: int
    pad_token_id: int

    @property
    def positions(self) -> int:
        """Tokens that an image becomes: one view of rows x columns cells."""
        return self.grid[0] * self.grid[1]

    def __call__(self, indices: Indices) -> Batch:
        """The micro-batch of these samples; without samples, one that no loss scores.

        Raises InputError, naming sample and image, when a picture cannot be read or is not the one tokenized.
        """
        rows = [self._expand(int(index)) for index in indices] or [self._fill()]
        length = max(len(ids) for ids, _ in rows)
        ids = np.full((len(rows), length), self.pad_token_id, dtype=np.int64)
        labels = np.full((len(rows), length), IGNORE, dtype=np.int64)
        attention = np.zeros((len(rows), length), dtype=np.int64)
        for row, (own_ids, own_labels) in enumerate(rows):
            ids[row, : len(own_ids)] = own_ids
            labels[row, : len(own_ids)] = own_labels
            attention[row, : len(own_ids)] = 1
        pictures = [
            self._picture(int(index), int(image)) for index in indices for image in self.samples.images_of(index)
        ]
        views, view_position, mask, codes = self._views(ids, attention, pictures)
        return Batch(
            input_ids=torch.from_numpy(ids),
            attention_mask=torch.from_numpy(attention),
            labels=torch.from_numpy(labels),
            views=views,
            view_position=view_position,
            codes=codes,
            codes_mask=mask,
            sample_ids=[self.samples.names[index] for index in indices] or [FILL],
        )

    def _expand(self, index: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Ids and labels of a sample, each image token repeated for every position."""
        ids, supervised = self.samples.tokens_of(index)
        repeats = np.where(ids == self.image_token_id, self.positions, 1)
        labels = np.where(supervised, ids, IGNORE)
        return np.repeat(ids, repeats).astype(np.int64), np.repeat(labels, repeats).astype(np.int64)

    def _fill(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        return np.array([self.pad_token_id] * 2, dtype=np.int64), np.array([IGNORE] * 2, dtype=np.int64)

    def _views(
        self, ids: NDArray[np.int64], attention: NDArray[np.int64], pictures: list[Picture]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """views, view_position, codes_mask and codes of a micro-batch; the dummy where there is no picture."""
        if not pictures:
            return *dummy_view(self.geometry.size, self.positions), None
        places = np.flatnonzero((ids == self.image_token_id) & (attention == 1)).reshape(-1, self.positions)
        codes = None
        if self.codes is not None:
            stored = [picture.codes for picture in pictures if picture.codes is not None]
            codes = torch.from_numpy(np.concatenate(stored).astype(np.int64))
        return (
            torch.from_numpy(np.concatenate([picture.views for picture in pictures])),
            torch.from_numpy(places),
            torch.from_numpy(np.concatenate([picture.mask for picture in pictures])),
            codes,
        )

    def _picture(self, index: int, image: int) -> Picture:
        pictures = self.samples.pictures
        root, image_id = pictures.roots[pictures.root[image]], pictures.ids[image]
        row = int(pictures.code_row[image])
        try:
            data = read_image(root, image_id)
            if self.codes is not None and hashlib.sha256(data).hexdigest() != self.codes.sha256[row].as_py():
                raise InputError(
                    f"image {image_id} in {root}, of sample {self.samples.names[index]}, is not the picture that was "
                    "tokenized: restore it or tokenize it again"
                )
            # What was tokenized was let through then, however large it is.
            pixels = decode(data, max_pixels=sys.maxsize if self.codes is not None else DEFAULT_MAX_PIXELS)
        except Reject as reject:
            raise InputError(
                f"image {image_id} in {root}, of sample {self.samples.names[index]}, cannot be used ({reject}): "
                "restore it or remove the sample"
            ) from reject
        views, boxes = make_views(pixels, self.geometry)
        mask = content_mask(boxes, self.grid, pixels.shape[1], pixels.shape[0]).reshape(len(views), -1)
        return Picture(views, mask, None if self.codes is None else self.codes.codes(row))
