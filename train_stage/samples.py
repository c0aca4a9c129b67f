"""The samples of a phase: records, tokenized and joined with the manifests once at the start.

Everything a step needs later stands in flat arrays; what cannot be trained on is counted, named and left out here,
so a run never trips over it a day later. The same files give the same samples on every rank.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from manifests.decode import Reject
from manifests.errors import BudgetExceeded, InputError
from manifests.records import BadRecord, Record, image_id_of, read_records
from train_stage.chat import BadSample, ChatEncoder, Encoded
from train_stage.config import DataConfig, ResolvedPhase
from train_stage.image_tokens import ImageTokens
from train_stage.lookup import NO_ROW
from train_stage.mixture import mix
from train_stage.pictures import ImageKey, Pictures, join
from train_stage.tables import Tables

CHUNK = 4096
"""Records per call of the tokenizer."""


@dataclass(frozen=True)
class Samples:
    """N samples, concatenated: sample i has tokens `token_start[i] .. token_start[i+1]`, images likewise.

    ids int32 holds one image token per image; `lengths` int64 (N,) counts tokens with every image expanded to its
    positions, after truncation to max_length. `image_tokens` int64 (M,) are the tokens that each picture becomes.
    """

    names: list[str]
    ids: NDArray[np.int32]
    supervised: NDArray[np.bool_]
    token_start: NDArray[np.int64]
    images: NDArray[np.int64]
    image_start: NDArray[np.int64]
    lengths: NDArray[np.int64]
    pictures: Pictures
    image_tokens: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.names)

    @property
    def text_only(self) -> int:
        """Samples without an image."""
        return int((np.diff(self.image_start) == 0).sum())

    def tokens_of(self, index: int) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """Ids and supervision of one sample, images not expanded."""
        span = slice(self.token_start[index], self.token_start[index + 1])
        return self.ids[span], self.supervised[span]

    def identity(self) -> dict[str, Any]:
        """How many samples there are, and a digest of their tokens and images in their order, wherever the files lie."""
        hashed = hashlib.sha256()
        for values in (self.ids, self.supervised, self.token_start, self.image_start, self.image_tokens[self.images]):
            hashed.update(np.ascontiguousarray(values).data)
        for image in self.images.tolist():
            hashed.update(f"{self.pictures.ids[image]}\0".encode(errors="surrogatepass"))
        return {"count": len(self), "digest": hashed.hexdigest()}

    def images_of(self, index: int) -> NDArray[np.int64]:
        """Indices into `pictures` of one sample's images, in the order of their tokens."""
        return self.images[self.image_start[index] : self.image_start[index + 1]]


@dataclass
class JoinReport:
    """What became of the records: `records == usable + sum(bad.values())`, one example kept for each reason."""

    records: int = 0
    usable: int = 0
    mixed: int = 0
    images: int = 0
    text_only: int = 0
    bad: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)

    def refuse(self, name: str, reason: str, message: str) -> None:
        self.bad[reason] += 1
        self.examples.setdefault(reason, f"{name}: {message}")

    def lines(self) -> list[str]:
        """For the log: the counts, then a line for each reason."""
        first = (
            f"{self.records} records: {self.usable} usable ({self.text_only} of them text only), {self.images} images"
        )
        if self.mixed != self.usable:
            first += f"; the ratios make {self.mixed} samples an epoch of them"
        return [
            first,
            *(f"left out {count} ({reason}), e.g. {self.examples[reason]}" for reason, count in self.bad.items()),
        ]

    def check(self, phase: str, max_bad_rate: float) -> None:
        """InputError if nothing is left, BudgetExceeded if more than `max_bad_rate` of the records were left out."""
        bad = sum(self.bad.values())
        if self.records == 0:
            raise InputError(f"the data of phase {phase} hold no records: check the paths under data")
        worst = "; ".join(
            f"{count} {reason}, e.g. {self.examples[reason]}" for reason, count in self.bad.most_common(3)
        )
        if bad > max_bad_rate * self.records:
            raise BudgetExceeded(
                f"{bad} of {self.records} samples of phase {phase} cannot be used, more than max_bad_rate "
                f"{max_bad_rate:g} allows ({worst}): repair the data or raise max_bad_rate"
            )
        if self.usable == 0:
            raise InputError(f"none of the {self.records} samples of phase {phase} can be used ({worst})")


@dataclass
class _Candidate:
    """A record on its way to becoming a sample."""

    name: str
    file: int
    image_keys: list[ImageKey]
    encoded: Encoded


def load_samples(
    phase: ResolvedPhase,
    encoder: ChatEncoder,
    image_tokens: ImageTokens,
    tables: Mapping[str, Tables],
    threads: int,
    seed: int,
) -> tuple[Samples, JoinReport]:
    """Read, tokenize and join the data of a phase; `image_tokens` says how many tokens an image becomes.

    `seed` decides which samples a fractional `ratio` takes. Every image must have a row in all of `tables`
    and, as a file of its own, the size it had when it was tokenized. Raises BudgetExceeded or InputError (see
    `JoinReport.check`), InputError for an unreadable file and StorageError for an image root out of reach.
    """
    report = JoinReport()
    roots = list(dict.fromkeys(data.image_root for data in phase.data))
    candidates = list(_candidates(phase, encoder, roots, report))
    keys = list(dict.fromkeys(key for candidate in candidates for key in candidate.image_keys))
    pictures, problems = join(keys, roots, tables, threads)
    number = {key: index for index, key in enumerate(keys)}
    counts = image_tokens.counts(picture_sizes(pictures, tables))

    names: list[str] = []
    tokens: list[Encoded] = []
    images: list[list[int]] = []
    lengths: list[int] = []
    of_file = [0] * len(phase.data)
    for candidate in candidates:
        own = [number[key] for key in candidate.image_keys]
        try:
            for image in own:
                if image in problems:
                    raise problems[image]
            encoded, length = truncate(candidate.encoded, encoder.image_token_id, counts[own], phase.max_length)
        except BadSample as bad:
            report.refuse(candidate.name, bad.reason, str(bad))
            continue
        names.append(candidate.name)
        tokens.append(encoded)
        images.append(own)
        lengths.append(length)
        of_file[candidate.file] += 1
    report.usable = len(names)
    report.text_only = sum(not own for own in images)
    report.images = len({image for own in images for image in own})
    report.check(phase.name, phase.max_bad_rate)
    mixed = mix(of_file, [data.ratio for data in phase.data], seed).tolist()
    if not mixed:
        raise InputError(f"the ratios of phase {phase.name} leave no sample: raise them, or give more data")
    names, tokens = [names[i] for i in mixed], [tokens[i] for i in mixed]
    images, lengths = [images[i] for i in mixed], [lengths[i] for i in mixed]
    report.mixed = len(names)
    samples = Samples(
        names=names,
        ids=np.concatenate([encoded.ids for encoded in tokens]),
        supervised=np.concatenate([encoded.supervised for encoded in tokens]),
        token_start=_starts(len(encoded.ids) for encoded in tokens),
        images=np.array([image for own in images for image in own], dtype=np.int64),
        image_start=_starts(len(own) for own in images),
        lengths=np.array(lengths, dtype=np.int64),
        pictures=pictures,
        image_tokens=counts,
    )
    return samples, report


def picture_sizes(pictures: Pictures, tables: Mapping[str, Tables]) -> NDArray[np.int32]:
    """Width and height of every picture, int32 (M, 2), where the tables have them; 1 x 1 elsewhere."""
    sizes = np.ones((len(pictures.ids), 2), dtype=np.int32)
    for name, own in tables.items():
        if own.geometry.mode == "anyres":
            rows = pictures.rows[name]
            sizes[rows.row != NO_ROW] = rows.picture_size[rows.row != NO_ROW]
    return sizes


def truncate(
    encoded: Encoded, image_token_id: int, image_tokens: NDArray[np.int64], max_length: int
) -> tuple[Encoded, int]:
    """Cut the end off what is longer than `max_length` tokens, images expanded; the length after that comes with it.

    `image_tokens` int64 (images,) are the tokens that each of its images becomes.

    Raises BadSample: `cut_image` if the cut meets or removes an image, `not_supervised` if no token is left to
    predict, `image_count` if the text spells the image token out.
    """
    is_image = encoded.ids == image_token_id
    images = len(image_tokens)
    if int(is_image.sum()) != images:
        raise BadSample("image_count", f"the text holds {int(is_image.sum())} image tokens for {images} images")
    tokens = np.ones(len(encoded.ids), dtype=np.int64)
    tokens[is_image] = image_tokens
    ends = np.cumsum(tokens)
    keep = int(np.searchsorted(ends, max_length, side="right"))
    if is_image[keep:].any():
        raise BadSample("cut_image", f"max_length {max_length} cuts an image off ({int(ends[-1])} tokens in all)")
    if not encoded.supervised[1:keep].any():
        raise BadSample("not_supervised", "no token is supervised" + (" after truncation" if keep < len(ends) else ""))
    return Encoded(encoded.ids[:keep], encoded.supervised[:keep]), int(ends[keep - 1])


def _candidates(
    phase: ResolvedPhase, encoder: ChatEncoder, roots: list[str], report: JoinReport
) -> Iterator[_Candidate]:
    for file, data in enumerate(phase.data):
        root = roots.index(data.image_root)
        for chunk in _chunks(read_records(data.path), CHUNK):
            accepted = []
            for record in chunk:
                report.records += 1
                name = _name(data, record)
                try:
                    if isinstance(record, BadRecord):
                        raise BadSample("record", record.message)
                    conversation = encoder.pieces(phase.template, record.conversations, len(record.images))
                    accepted.append((name, _image_keys(root, record), conversation))
                except BadSample as bad:
                    report.refuse(name, bad.reason, str(bad))
            encoded = encoder.encode([conversation for _, _, conversation in accepted])
            for (name, image_keys, _), tokens in zip(accepted, encoded, strict=True):
                yield _Candidate(name, file, image_keys, tokens)


def _chunks(records: Iterable[Record | BadRecord], size: int) -> Iterator[list[Record | BadRecord]]:
    iterator = iter(records)
    while chunk := list(islice(iterator, size)):
        yield chunk


def _name(data: DataConfig, record: Record | BadRecord) -> str:
    """How messages call a sample: file and row, then the record's own id."""
    place = f"{Path(data.path).name}:{record.row}"
    return place if isinstance(record, BadRecord) else f"{place} ({record.id})"


def _image_keys(root: int, record: Record) -> list[ImageKey]:
    """(root, image id) of each of a record's images; a reference that is no path inside the root is BadSample."""
    try:
        return [(root, image_id_of(reference)) for reference in record.images]
    except Reject as reject:
        raise BadSample(str(reject.reason), reject.message) from None


def _starts(lengths: Iterable[int]) -> NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(np.fromiter(lengths, dtype=np.int64))]).astype(np.int64)
