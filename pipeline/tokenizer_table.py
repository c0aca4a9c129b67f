"""`asvr tokenizers`: the table of `tokenize_stage.families`. Imports no torch."""

from __future__ import annotations

from pipeline import console
from tokenize_stage.families import CONTINUOUS, PUBLISHED

_DEPTHS = {True: "residual", False: "independent", None: "one"}
_HEADER = ("kind", "model", "codes say", "view", "grid", "P", "D", "K", "code dim", "depths", "licence", "origin")


def show_tokenizers(*, as_json: bool) -> None:
    """Print every row, for a program or for a person."""
    if as_json:
        console.write_json({"tokenizers": [row.as_dict() for row in PUBLISHED]})
        return
    rows = [
        (
            row.kind,
            row.model,
            row.target,
            _shown(row.view_size),
            f"{row.grid[0]}x{row.grid[1]}" if row.grid else "-",
            _shown(row.positions),
            _shown(row.depth),
            _shown(row.codebook_size),
            _shown(row.code_dim),
            "features" if row.kind in CONTINUOUS else _DEPTHS[row.residual],
            row.licence,
            row.origin,
        )
        for row in PUBLISHED
    ]
    console.write_table(rows, _HEADER)


def _shown(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"
