"""The samples of a phase: records, tokenized and joined with the manifests once at the start.

Everything a step needs later stands in flat arrays; what cannot be trained on is counted, named and left out here,
so a run never trips over it a day later. The same files give the same samples on every rank.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from manifests.decode import Reject
from manifests.errors import BudgetExceeded, InputError
from manifests.records import BadRecord, Record, image_id_of, read_records
from train_stage.chat import BadSample, ChatEncoder, Encoded, pieces
from train_stage.codes import NO_ROW, CodeTables
from train_stage.config import DataConfig, ResolvedPhase

CHUNK = 4096
"""Records per call of the tokenizer."""


@dataclass(frozen=True)
class Pictures:
    """The M distinct images of a phase."""

    roots: list[Path]
    root: NDArray[np.int32]
    ids: list[str]
    code_row: NDArray[np.int64]


@dataclass(frozen=True)
class Samples:
    """N samples, concatenated: sample i has tokens `token_start[i] .. token_start[i+1]`, images likewise.

    ids int32 holds one image token per image; `lengths` int64 (N,) counts tokens with every image expanded to its
    positions, after truncation to max_length.
    """

    names: list[str]
    ids: NDArray[np.int32]
    supervised: NDArray[np.bool_]
    token_start: NDArray[np.int64]
    images: NDArray[np.int64]
    image_start: NDArray[np.int64]
    lengths: NDArray[np.int64]
    pictures: Pictures

    def __len__(self) -> int:
        return len(self.names)

    def tokens_of(self, index: int) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """Ids and supervision of one sample, images not expanded."""
        span = slice(self.token_start[index], self.token_start[index + 1])
        return self.ids[span], self.supervised[span]

    def images_of(self, index: int) -> NDArray[np.int64]:
        """Indices into `pictures` of one sample's images, in the order of their tokens."""
        return self.images[self.image_start[index] : self.image_start[index + 1]]


@dataclass
class JoinReport:
    """What became of the records: `records == usable + sum(bad.values())`, one example kept for each reason."""

    records: int = 0
    usable: int = 0
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
    image_keys: list[tuple[int, str]]
    encoded: Encoded


def load_samples(
    phase: ResolvedPhase, encoder: ChatEncoder, positions: int, codes: CodeTables | None, threads: int
) -> tuple[Samples, JoinReport]:
    """Read, tokenize and join the data of a phase; `positions` is the number of tokens an image becomes.

    With `codes` every image must have a row there and still have the size it had when it was tokenized. Raises
    BudgetExceeded or InputError (see `JoinReport.check`) and InputError for an unreadable file.
    """
    report = JoinReport()
    roots = list(dict.fromkeys(str(data.image_root) for data in phase.data))
    candidates = list(_candidates(phase, encoder, roots, report))
    keys = list(dict.fromkeys(key for candidate in candidates for key in candidate.image_keys))
    rows, problems = _join(keys, roots, codes, threads)
    number = {key: index for index, key in enumerate(keys)}

    names: list[str] = []
    tokens: list[Encoded] = []
    images: list[list[int]] = []
    lengths: list[int] = []
    for candidate in candidates:
        own = [number[key] for key in candidate.image_keys]
        try:
            for image in own:
                if image in problems:
                    raise problems[image]
            encoded, length = truncate(candidate.encoded, encoder.image_token_id, len(own), positions, phase.max_length)
        except BadSample as bad:
            report.refuse(candidate.name, bad.reason, str(bad))
            continue
        names.append(candidate.name)
        tokens.append(encoded)
        images.append(own)
        lengths.append(length)
    report.usable = len(names)
    report.text_only = sum(not own for own in images)
    report.images = len({image for own in images for image in own})
    report.check(phase.name, phase.max_bad_rate)
    pictures = Pictures(
        roots=[Path(root) for root in roots],
        root=np.array([root for root, _ in keys], dtype=np.int32),
        ids=[image_id for _, image_id in keys],
        code_row=rows,
    )
    samples = Samples(
        names=names,
        ids=np.concatenate([encoded.ids for encoded in tokens]),
        supervised=np.concatenate([encoded.supervised for encoded in tokens]),
        token_start=_starts(len(encoded.ids) for encoded in tokens),
        images=np.array([image for own in images for image in own], dtype=np.int64),
        image_start=_starts(len(own) for own in images),
        lengths=np.array(lengths, dtype=np.int64),
        pictures=pictures,
    )
    return samples, report


def truncate(
    encoded: Encoded, image_token_id: int, images: int, positions: int, max_length: int
) -> tuple[Encoded, int]:
    """Cut the end off what is longer than `max_length` tokens, images expanded; the length after that comes with it.

    Raises BadSample: `cut_image` if the cut meets or removes an image, `not_supervised` if no token is left to
    predict, `image_count` if the text spells the image token out.
    """
    is_image = encoded.ids == image_token_id
    if int(is_image.sum()) != images:
        raise BadSample("image_count", f"the text holds {int(is_image.sum())} image tokens for {images} images")
    ends = np.cumsum(np.where(is_image, positions, 1))
    keep = int(np.searchsorted(ends, max_length, side="right"))
    if is_image[keep:].any():
        raise BadSample("cut_image", f"max_length {max_length} cuts an image off ({int(ends[-1])} tokens in all)")
    if not encoded.supervised[1:keep].any():
        raise BadSample("not_supervised", "no token is supervised" + (" after truncation" if keep < len(ends) else ""))
    return Encoded(encoded.ids[:keep], encoded.supervised[:keep]), int(ends[keep - 1])


def _candidates(
    phase: ResolvedPhase, encoder: ChatEncoder, roots: list[str], report: JoinReport
) -> Iterator[_Candidate]:
    for data in phase.data:
        root = roots.index(str(data.image_root))
        for chunk in _chunks(read_records(data.path), CHUNK):
            accepted = []
            for record in chunk:
                report.records += 1
                name = _name(data, record)
                try:
                    if isinstance(record, BadRecord):
                        raise BadSample("record", record.message)
                    conversation = pieces(phase.template, record.conversations, len(record.images))
                    accepted.append((name, _image_keys(root, record), conversation))
                except BadSample as bad:
                    report.refuse(name, bad.reason, str(bad))
            encoded = encoder.encode([conversation for _, _, conversation in accepted])
            for (name, image_keys, _), tokens in zip(accepted, encoded, strict=True):
                yield _Candidate(name, image_keys, tokens)


def _chunks(records: Iterable[Record | BadRecord], size: int) -> Iterator[list[Record | BadRecord]]:
    iterator = iter(records)
    while chunk := list(islice(iterator, size)):
        yield chunk


def _name(data: DataConfig, record: Record | BadRecord) -> str:
    """How messages call a sample: file and row, then the record's own id."""
    place = f"{Path(data.path).name}:{record.row}"
    return place if isinstance(record, BadRecord) else f"{place} ({record.id})"


def _image_keys(root: int, record: Record) -> list[tuple[int, str]]:
    """(root, image id) of each of a record's images; a reference that is no path inside the root is BadSample."""
    try:
        return [(root, image_id_of(reference)) for reference in record.images]
    except Reject as reject:
        raise BadSample(str(reject.reason), reject.message) from None


def _join(
    keys: list[tuple[int, str]], roots: list[str], codes: CodeTables | None, threads: int
) -> tuple[NDArray[np.int64], dict[int, BadSample]]:
    """Code row of every image (NO_ROW where none is read) and the images that cannot be used, by their index."""
    ids = [image_id for _, image_id in keys]
    rows = codes.find(ids) if codes is not None else np.full(len(keys), NO_ROW, dtype=np.int64)
    with ThreadPoolExecutor(threads) as pool:
        sizes = list(pool.map(lambda key: _size(Path(roots[key[0]], key[1])), keys, chunksize=256))
    problems: dict[int, BadSample] = {}
    for index, ((root, image_id), row, size) in enumerate(zip(keys, rows.tolist(), sizes, strict=True)):
        if codes is not None and row == NO_ROW:
            problems[index] = BadSample("missing_codes", f"no codes for image {image_id}{codes.why_missing(image_id)}")
        elif size is None:
            problems[index] = BadSample("missing_image", f"{image_id} is not in {roots[root]}")
        elif codes is not None and size != codes.source_size[row]:
            problems[index] = BadSample(
                "changed_image", f"{image_id} has {size} bytes but had {codes.source_size[row]} when it was tokenized"
            )
    return rows, problems


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


def _starts(lengths: Iterable[int]) -> NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(np.fromiter(lengths, dtype=np.int64))]).astype(np.int64)
