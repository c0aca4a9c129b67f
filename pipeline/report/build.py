"""`asvr report`: gathers what a token set or a training run says of itself and writes the page beside it."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from manifests.errors import AsvrError, InputError
from manifests.reader import OpenManifest, open_manifest
from manifests.shards import code_dtype
from manifests.storage import Store, is_url
from pipeline.report.colours import code_colours
from pipeline.report.curves import comparison_charts, job_throughput, phase_charts
from pipeline.report.gallery import Card, choose_images, read_cards
from pipeline.report.meaning import draw_patches, find_meanings
from pipeline.report.page import (
    AnswerRow,
    AnswerSection,
    DepthRow,
    HeldOutSection,
    Page,
    PhaseSection,
    RunSection,
    SetSection,
    ShownMeaning,
    render,
    show_cards,
    webp_uri,
)
from pipeline.report.runs import Answer, Run, is_run, read_run

PAGE_NAME = "report.html"
MOST_IMAGES = 1000
REJECTS = 300
ANSWERS = 200

Progress = Callable[[int, int], None]


def write_report(
    target: str, *, images: int, other: str | None = None, to: Path | None = None, progress: Progress | None = None
) -> str:
    """Write the page of an output folder of the tokenize job, or of a training run; where it is.

    Args:
        images: how many images of each token set to show, MOST_IMAGES at most.
        other: a second run to put beside the first.
        to: the file to write; default: `report.html` in the folder itself.

    Raises: InputError where nothing to report on is; what the readers of manifests and stores raise.
    """
    folder = None if is_url(target) else Path(target)
    if folder is not None and is_run(folder):
        page = run_page(read_run(folder), read_run(Path(other)) if other else None, images, progress)
    elif other:
        raise InputError(f"{target} is no training run, and only runs can be put side by side: leave --with out")
    else:
        opened = open_manifest(target)
        page = set_page(opened, images, progress)
        target = opened.folder
    html = render(page).encode()
    store, name = (Store.open(to.parent), to.name) if to else (Store.open(target), PAGE_NAME)
    store.write(name, html)
    return store.where(name)


def set_page(opened: OpenManifest, images: int, progress: Progress | None = None) -> Page:
    """The page of a token set."""
    section, _ = _set_section(opened, "set1", images, (), progress)
    return Page(title=f"Token set {section.name}", made=_made(), sets=[section])


def run_page(run: Run, other: Run | None, images: int, progress: Progress | None = None) -> Page:
    """The page of a training run, with the token sets it learned from, and a second run beside it."""
    asked = _paired(run, other)
    sections: list[SetSection] = []
    notes: list[str] = []
    pictures: dict[str, NDArray[np.uint8]] = {}
    for location in run.token_sets:
        try:
            opened = open_manifest(location)
        except AsvrError as error:
            notes.append(f"The token set {location} is not shown: {error}")
            continue
        ids = {image: _image_id(opened, image) for (image, _, _), _ in asked[:ANSWERS]}
        section, cards = _set_section(opened, f"set{len(sections) + 1}", images, list(ids.values()), progress)
        sections.append(section)
        kept = {card.image_id: card.picture for card in cards if card.picture is not None}
        pictures |= {image: kept[name] for image, name in ids.items() if name in kept}
    both = [run, other] if other else [run]
    return Page(
        title=f"Run {run.name}" + (f" beside {other.name}" if other else ""),
        made=_made(),
        runs=[_run_section(one) for one in both],
        comparisons=comparison_charts(run, other) if other else [],
        held_out=_held_out_section(both),
        answers=_answer_section(both, asked, pictures),
        sets=sections,
        notes=notes,
    )


def _made() -> str:
    return f"Made {datetime.now(UTC):%Y-%m-%d %H:%M} UTC by asvr report"


def _run_section(run: Run) -> RunSection:
    phases = [PhaseSection(one.name, len(one.steps), one.finished, phase_charts(one)) for one in run.phases]
    return RunSection(run.name, str(run.folder), phases)


def _set_section(
    opened: OpenManifest, anchor: str, images: int, first: Sequence[str], progress: Progress | None
) -> tuple[SetSection, list[Card]]:
    manifest, spec = opened.manifest, opened.manifest.tokenizer
    chosen = choose_images(opened, min(images, MOST_IMAGES), first)
    cards = read_cards(opened, chosen, progress)
    width = code_dtype(spec.codebook_sizes).itemsize if spec else 0
    shown = show_cards(cards, width)
    decoding = meanings = None
    if spec:
        palettes = [base64.b64encode(code_colours(book).tobytes()).decode() for book in opened.codebooks()]
        decoding = {"grid": list(spec.grid), "palettes": palettes, "width": width}
        meanings = [_meanings(cards[: len(shown)], depth, size, spec.grid) for depth, size in enumerate(spec.codebook_sizes)]  # fmt: skip
    section = SetSection(
        name=opened.folder.rstrip("/").rpartition("/")[2],
        location=opened.folder,
        figures=_figures(opened),
        depths=[
            DepthRow(depth, size, use.used, use.perplexity)
            for depth, (size, use) in enumerate(
                zip(manifest.producer.codebook_sizes, manifest.usage or (), strict=True)
            )
        ],
        cards=shown,
        images=manifest.totals.ok,
        left_out=len(cards) - len(shown),
        meanings=meanings if meanings and any(meanings) else [],
        reasons=sorted(manifest.totals.rejected_by_reason.items(), key=lambda item: (-item[1], item[0])),
        rejects=_some_rejects(opened),
        rejected=manifest.rejects.rows,
        throughput=job_throughput(opened.store),
        decoding=decoding,
        anchor=anchor,
    )
    return section, cards


def _figures(opened: OpenManifest) -> list[tuple[str, str]]:
    manifest, producer = opened.manifest, opened.manifest.producer
    totals, (rows, columns) = manifest.totals, producer.grid
    each = f"{manifest.tokenizer.depth} codes" if manifest.tokenizer else f"{producer.values:,} numbers"
    return [
        ("images", f"{totals.images:,}"),
        ("ok", f"{totals.ok:,}"),
        ("rejected", f"{totals.rejected:,}"),
        ("shards", f"{len(opened.shards):,}"),
        ("bytes in shards", f"{sum(shard.bytes for shard in opened.shards):,}"),
        (f"positions of {each}", f"{rows} x {columns}"),
        ("views of pixels", f"{manifest.geometry.mode} {manifest.geometry.size}"),
        ("tokenizer", producer.kind),
        ("fingerprint", manifest.fingerprint[:12]),
    ]


def _meanings(cards: Sequence[Card], depth: int, size: int, grid: tuple[int, int]) -> list[ShownMeaning]:
    return [
        ShownMeaning(found, webp_uri(draw_patches(cards, found, grid)), [cards[n].image_id for n, _ in found.shown])
        for found in find_meanings(cards, depth, size)
    ]


def _some_rejects(opened: OpenManifest) -> list[tuple[str, str, str]]:
    """REJECTS at most, some of every reason."""
    columns = ["image_id", "reason", "message"]
    found: dict[str, list[tuple[str, str, str]]] = {}
    for batch in opened.iter_rejects(columns):
        for reason in pc.unique(batch["reason"]).to_pylist():
            mine = found.setdefault(reason, [])
            more = batch.filter(pc.equal(batch["reason"], reason)).slice(0, REJECTS - len(mine))
            mine += zip(*(more[name].to_pylist() for name in columns), strict=True)
    return [row for reason in sorted(found) for row in found[reason][: max(1, REJECTS // len(found))]]


Asked = tuple[tuple[str, str, str], list[Answer | None]]


def _paired(run: Run, other: Run | None) -> list[Asked]:
    """Every question (image, question, expected) that a run was asked, with the answers; those worth a look first."""
    runs = [run, other] if other else [run]
    found: dict[tuple[str, str, str], list[Answer | None]] = {}
    for number, one in enumerate(runs):
        for answer in one.answers:
            key = (answer.image, answer.question, answer.expected)
            found.setdefault(key, [None] * len(runs))[number] = answer

    def dullness(item: Asked) -> tuple[bool, bool]:
        right = {answer.correct for answer in item[1] if answer}
        return len(right) < 2, right == {True}

    return sorted(found.items(), key=dullness)


def _held_out_section(runs: Sequence[Run]) -> HeldOutSection | None:
    measured = list(dict.fromkeys(name for run in runs for name in run.held_out))
    rows = [(name, [run.held_out.get(name) for run in runs]) for name in measured]
    return HeldOutSection(_names(runs), rows) if rows else None


def _answer_section(
    runs: Sequence[Run], asked: Sequence[Asked], pictures: Mapping[str, NDArray[np.uint8]]
) -> AnswerSection | None:
    if not asked:
        return None
    small = {image: webp_uri(picture, edge=112) for image, picture in pictures.items()}
    rows = []
    for (image, question, expected), answers in asked[:ANSWERS]:
        said = [(one.answer, one.correct) if one else None for one in answers]
        rows.append(AnswerRow(image, small.get(image), question, expected, said))
    scores = [(sum(one.correct for one in run.answers), len(run.answers)) for run in runs]
    differing = sum(len({one.correct for one in answers if one}) > 1 for _, answers in asked)
    return AnswerSection(_names(runs), scores, rows, len(asked), differing)


def _names(runs: Sequence[Run]) -> list[str]:
    names = [run.name for run in runs]
    return names if len(set(names)) == len(names) else [f"{run.name} ({number})" for number, run in enumerate(runs, 1)]


def _image_id(opened: OpenManifest, image: str) -> str:
    """The id that an answer's image has in a set, where it may be named by its path."""
    source = opened.manifest.source
    root = str(source.settings.get("image_root") or source.location).rstrip("/")
    path = image if is_url(image) or "\0" in image else str(Path(image).absolute())
    return path.removeprefix(f"{root}/") if path.startswith(f"{root}/") else image
