"""The page itself: one HTML file that needs nothing else, made from a template that escapes all it is given.

Captions, file names, answers and messages were written by others. Every text goes through `console.plain`, which
writes control characters and what reorders text as escapes and shortens 10 kB names, and then through Jinja's
escaping. The page's own style and script are the only ones that its Content-Security-Policy lets a browser use,
and the policy lets it load nothing.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files

import jinja2
import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from pipeline.console import plain
from pipeline.report.chart import HEIGHT, WIDTH, Chart, number_text
from pipeline.report.curves import Throughput
from pipeline.report.gallery import Card, encoded
from pipeline.report.meaning import Meaning

LONGEST_TEXT = 300
"""Characters shown of a text from outside."""

GALLERY_BYTES = 32 << 20
"""What the gallery may add to a page. Images beyond that are left out, and the page says how many."""


@dataclass(frozen=True)
class ShownCard:
    """A card with its picture as a data URI and its codes in base64, as the page's script reads them."""

    card: Card
    picture: Markup | None
    codes: Markup | None


@dataclass(frozen=True)
class ShownMeaning:
    """A code with its strip of patches."""

    meaning: Meaning
    strip: Markup
    names: list[str]


@dataclass(frozen=True)
class DepthRow:
    """The use of a depth's codebook."""

    depth: int
    size: int
    used: int
    perplexity: float

    @property
    def dead(self) -> int:
        return self.size - self.used


@dataclass(frozen=True)
class SetSection:
    """What a page shows of a token set. `decoding` is what the script needs to draw code maps; None for features."""

    name: str
    location: str
    figures: list[tuple[str, str]]
    depths: list[DepthRow]
    cards: list[ShownCard]
    images: int
    left_out: int
    meanings: list[list[ShownMeaning]]
    reasons: list[tuple[str, int]]
    rejects: list[tuple[str, str, str]]
    rejected: int
    throughput: Throughput | None
    decoding: dict[str, object] | None
    anchor: str = "set"


@dataclass(frozen=True)
class PhaseSection:
    """A phase's curves."""

    name: str
    steps: int
    finished: bool
    charts: list[Chart]


@dataclass(frozen=True)
class RunSection:
    """What a page shows of a training run."""

    name: str
    location: str
    phases: list[PhaseSection]


@dataclass(frozen=True)
class AnswerRow:
    """A question, with what one or two runs said to it: (answer, correct) or None where a run was not asked."""

    image: str
    picture: Markup | None
    question: str
    expected: str
    said: list[tuple[str, bool] | None]

    @property
    def differs(self) -> bool:
        """Whether one run is right and the other is not."""
        return len({given[1] for given in self.said if given}) > 1


@dataclass(frozen=True)
class AnswerSection:
    """Answers of one run, or of two side by side. `scores`: correct and asked of each."""

    names: list[str]
    scores: list[tuple[int, int]]
    rows: list[AnswerRow]
    asked: int
    differing: int


@dataclass(frozen=True)
class HeldOutSection:
    """What `asvr eval` measured: a name and a value for each run, None where it has none."""

    names: list[str]
    rows: list[tuple[str, list[float | None]]]


@dataclass(frozen=True)
class Page:
    """Everything on a page."""

    title: str
    made: str
    runs: list[RunSection] = field(default_factory=list)
    comparisons: list[tuple[str, list[Chart]]] = field(default_factory=list)
    held_out: HeldOutSection | None = None
    answers: AnswerSection | None = None
    sets: list[SetSection] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def render(page: Page) -> str:
    """The page as HTML."""
    folder = files("pipeline.report")
    style, script = (folder.joinpath(name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    environment = jinja2.Environment(
        autoescape=True,
        finalize=_shown,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=jinja2.FunctionLoader(lambda name: folder.joinpath(name).read_text(encoding="utf-8")),
    )
    environment.filters["number"] = number_text
    return environment.get_template("page.html").render(
        page=page,
        style=Markup(style),  # noqa: S704 - these two are files of this package
        script=Markup(script),  # noqa: S704
        style_hash=_csp_hash(style),
        script_hash=_csp_hash(script),
        width=WIDTH,
        height=HEIGHT,
    )


def _shown(value: object) -> object:
    """What any expression of the template becomes before it is escaped."""
    return plain(value, LONGEST_TEXT) if isinstance(value, str) and not isinstance(value, Markup) else value


def _csp_hash(text: str) -> Markup:
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return Markup(f"'sha256-{digest}'")  # noqa: S704 - base64 of a hash


def webp_uri(picture: NDArray[np.uint8], edge: int = 10_000) -> Markup:
    """A picture as a data URI."""
    data = base64.b64encode(encoded(picture, edge)).decode()
    return Markup(f"data:image/webp;base64,{data}")  # noqa: S704 - base64


def code_text(codes_PD: NDArray[np.unsignedinteger], width: int) -> Markup:
    """Codes in base64: little-endian, `width` bytes each, row-major over position and depth."""
    return Markup(base64.b64encode(codes_PD.astype(f"<u{width}").tobytes()).decode())  # noqa: S704 - base64


def show_cards(cards: Sequence[Card], code_bytes: int) -> list[ShownCard]:
    """As many of the cards, from the first on, as fit into GALLERY_BYTES."""
    shown, left = [], GALLERY_BYTES
    for card in cards:
        picture = None if card.picture is None else webp_uri(card.picture)
        codes = None if card.codes_PD is None else code_text(card.codes_PD, code_bytes)
        left -= len(picture or "") + len(codes or "") + 2000
        if left < 0:
            break
        shown.append(ShownCard(card, picture, codes))
    return shown
