"""A micro-batch from sample numbers: images expanded to their positions, decoded to views and joined with their codes and features.

Runs in threads of the rank: reading, hashing and decoding a picture release the interpreter's lock.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from manifests.decode import DEFAULT_MAX_PIXELS, Reject, decode
from manifests.errors import InputError
from manifests.geometry import content_mask, make_views
from manifests.schema import FeaturesSpec, Geometry, Producer
from train_stage.batch import IGNORE, NO_TOKEN, Batch, dummy_view
from train_stage.config import INPUT_CODES
from train_stage.image_tokens import ImageTokens, locate
from train_stage.lookup import NO_ROW
from train_stage.parity import ReferenceParity
from train_stage.plan import Indices
from train_stage.samples import Samples
from train_stage.tables import Tables

FILL = "(fill)"
"""Name of the sample that stands in a micro-batch without samples."""


def is_fill(batch: Batch) -> bool:
    """Whether a micro-batch stands for no samples at all."""
    return batch.sample_ids == [FILL]


@dataclass(frozen=True)
class Picture:
    """Views uint8 (V, S, S, 3) of an image, mask (V, P) of the cells with content, targets by term, a key for each view.

    `order` int64 has the cell that each of its tokens is, see `ImageTokens.order`.
    """

    views: NDArray[np.uint8]
    mask: NDArray[np.bool_]
    targets: dict[str, torch.Tensor]
    keys: list[int]
    order: NDArray[np.int64]


@dataclass(frozen=True)
class Document:
    """One sample: its name, ids and labels int64 (L,) with every image expanded to its positions, and its pictures."""

    name: str
    ids: NDArray[np.int64]
    labels: NDArray[np.int64]
    pictures: list[Picture]


@dataclass(frozen=True)
class Collator:
    """Makes the micro-batches of a phase; calling it is a pure function of the sample numbers.

    `tables` holds every group of manifests that an image must be in; `terms` names those whose values are targets.
    `parity` is what the phase takes over of the published behaviour.
    """

    samples: Samples
    tables: Mapping[str, Tables]
    terms: Sequence[str]
    geometry: Geometry
    grid: tuple[int, int]
    image_token_id: int
    pad_token_id: int
    parity: ReferenceParity | None = None

    @property
    def image_tokens(self) -> ImageTokens:
        """How an image becomes tokens."""
        return ImageTokens(self.geometry, self.grid)

    def __call__(self, indices: Indices) -> Batch:
        """The micro-batch of these samples; without samples, one that no loss scores.

        Raises InputError, naming sample and image, when a picture cannot be read or is not the one tokenized.
        """
        return self.join([self.document(int(index)) for index in indices])

    def document(self, index: int) -> Document:
        """One sample by itself; what takes the time, so that threads can share it. Raises as `__call__`."""
        ids, labels = self._expand(index)
        pictures = [self._picture(index, int(image)) for image in self.samples.images_of(index)]
        return Document(self.samples.names[index], ids, labels, pictures)

    def join(self, documents: Sequence[Document]) -> Batch:
        """One row of samples, end to end; without samples, a row that no loss scores."""
        documents = documents or [self._fill()]
        ids = np.concatenate([own.ids for own in documents])
        pictures = [picture for own in documents for picture in own.pictures]
        views, view_position, mask, newlines = self._views(ids, pictures)
        return Batch(
            input_ids=torch.from_numpy(ids)[None],
            position_ids=torch.cat([torch.arange(len(own.ids)) for own in documents])[None],
            labels=torch.from_numpy(np.concatenate([own.labels for own in documents]))[None],
            views=views,
            view_position=view_position,
            target_mask=mask,
            base_view=torch.tensor([view == 0 for own in pictures for view in range(len(own.views))] or [True]),
            newline_position=newlines,
            sample_ids=[own.name for own in documents],
            targets={name: torch.cat([own.targets[name] for own in pictures]) for name in self.terms if pictures},
            view_keys=torch.tensor([key for own in pictures for key in own.keys] or [0]),
            blanks=sum(not own.pictures and own.name != FILL for own in documents) if self.blank_codes else 0,
            blank_codes=self.blank_codes,
        )

    @cached_property
    def blank_codes(self) -> dict[str, torch.Tensor]:
        """By term the codes of the blank image, where text-only samples are scored. InputError if a manifest lacks it."""
        blank = self.parity.blank_image if self.parity else None
        if blank is None or not self.samples.text_only:
            return {}
        found = {}
        for name in self.terms:
            table = self.tables[name]
            if name == INPUT_CODES or isinstance(table.spec, FeaturesSpec):
                continue
            rows = table.find([blank])
            if rows.row[0] == NO_ROW:
                raise InputError(
                    f"reference_parity scores {self.samples.text_only} text-only samples against the codes of a blank image, "
                    f"and {table.where} has no {blank}: tokenize a picture of one mid-grey (127) under that id, name another "
                    "as reference_parity.blank_image, or set that to null"
                )
            table.open_values(rows)
            found[name] = as_tensor(table.values(rows, 0)[0], table.spec)
        return found

    def _expand(self, index: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Ids and labels of a sample, each image token repeated for every position."""
        ids, supervised = self.samples.tokens_of(index)
        repeats = np.ones(len(ids), dtype=np.int64)
        repeats[ids == self.image_token_id] = self.samples.image_tokens[self.samples.images_of(index)]
        labels = np.where(supervised, ids, IGNORE)
        labels[0] = IGNORE
        return np.repeat(ids, repeats).astype(np.int64), np.repeat(labels, repeats).astype(np.int64)

    def _fill(self) -> Document:
        return Document(FILL, np.full(2, self.pad_token_id, dtype=np.int64), np.full(2, IGNORE, dtype=np.int64), [])

    def _views(
        self, ids: NDArray[np.int64], pictures: list[Picture]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """views, view_position, target_mask and newline_position of a micro-batch; the dummy where there is no picture."""
        if not pictures:
            return *dummy_view(self.geometry.size, self.image_tokens.positions), torch.empty(0, dtype=torch.int64)
        places = np.flatnonzero(ids == self.image_token_id)
        ends = np.cumsum([len(picture.order) for picture in pictures])
        located = [
            locate(picture.order, own, *picture.mask.shape)
            for picture, own in zip(pictures, np.split(places, ends[:-1]), strict=True)
        ]
        view_position = np.concatenate([cells for cells, _ in located])
        mask = view_position != NO_TOKEN
        if self.parity is None or not self.parity.padding_cells:
            mask &= np.concatenate([picture.mask for picture in pictures])
        return (
            torch.from_numpy(np.concatenate([picture.views for picture in pictures])),
            torch.from_numpy(view_position),
            torch.from_numpy(mask),
            torch.from_numpy(np.concatenate([newlines for _, newlines in located])),
        )

    def _picture(self, index: int, image: int) -> Picture:
        pictures = self.samples.pictures
        rows = pictures.rows
        try:
            data = pictures.read(image)
            wanted = {own.sha256[image].tobytes() for own in rows.values()}
            if wanted and {hashlib.sha256(data).digest()} != wanted:
                raise InputError(
                    f"image {pictures.where(image)}, of sample {self.samples.names[index]}, is not the picture that was "
                    "tokenized: restore it or tokenize it again"
                )
            # What was tokenized was let through then, however large it is.
            pixels = decode(data, max_pixels=sys.maxsize if rows else DEFAULT_MAX_PIXELS)
        except Reject as reject:
            raise InputError(
                f"image {pictures.where(image)}, of sample {self.samples.names[index]}, cannot be used ({reject}): "
                "restore it or remove the sample"
            ) from reject
        views, boxes = make_views(pixels, self.geometry)
        height, width = pixels.shape[:2]
        mask = content_mask(boxes, self.grid, width, height).reshape(len(views), -1)
        targets = {
            name: as_tensor(self.tables[name].values(rows[name], image), self.tables[name].spec) for name in self.terms
        }
        keys = [_key(self.samples.names[index], pictures.ids[image], view) for view in range(len(views))]
        return Picture(views, mask, targets, keys, self.image_tokens.order(width, height))


def as_tensor(stored: NDArray[Any], spec: Producer) -> torch.Tensor:
    """Values as stored in a tensor: codes as int64, features in their own dtype."""
    if not isinstance(spec, FeaturesSpec):
        return torch.from_numpy(stored.astype(np.int64))
    own = torch.from_numpy(stored.copy())  # the mapped file is read-only
    return own.view(torch.bfloat16) if spec.dtype == "bfloat16" else own


def _key(sample: str, image_id: str, view: int) -> int:
    """int64 that stands for a view of a sample, from which its random draws start."""
    hashed = hashlib.sha256(f"{sample} {image_id} {view}".encode()).digest()
    return int.from_bytes(hashed[:8], "little") >> 1
