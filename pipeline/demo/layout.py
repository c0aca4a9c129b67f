"""Where everything is in a demo's folder; `recipe.yaml` names the same places."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Layout:
    """The places below `folder`."""

    folder: Path

    @property
    def recipe(self) -> Path:
        return self.folder / "recipe.yaml"

    @property
    def script(self) -> Path:
        return self.folder / "ask.py"

    @property
    def data(self) -> Path:
        return self.folder / "data"

    @property
    def images(self) -> Path:
        return self.data / "images"

    @property
    def questions(self) -> Path:
        return self.data / "questions.json"

    @property
    def encoder(self) -> Path:
        return self.folder / "models" / "encoder"

    @property
    def language_model(self) -> Path:
        return self.folder / "models" / "language_model"

    @property
    def codebook(self) -> Path:
        return self.folder / "codebook"

    @property
    def tokens(self) -> Path:
        return self.folder / "tokens"

    @property
    def run(self) -> Path:
        return self.folder / "run"

    @property
    def export(self) -> Path:
        return self.run / "export"

    @property
    def answers(self) -> Path:
        return self.folder / "answers.json"

    @property
    def report(self) -> Path:
        return self.run / "report.html"

    @property
    def summary(self) -> Path:
        return self.folder / "summary.json"
