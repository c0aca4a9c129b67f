from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import get_args

from tokenize_stage.config import TokenizerConfig
from tokenize_stage.families import CONTINUOUS, PUBLISHED

ROOT = Path(__file__).parents[2]


def kinds() -> set[str]:
    """What a recipe may say as `tokenizer.kind`."""
    union = get_args(TokenizerConfig)[0]
    return {model.model_fields["kind"].default for model in get_args(union)}


def test_every_kind_has_its_two_modules_and_a_row() -> None:
    assert {row.kind for row in PUBLISHED} == kinds()
    for kind in kinds():
        assert find_spec(f"tokenize_stage.identities.{kind}")
        assert find_spec(f"tokenize_stage.tokenizers.{kind}")


def test_rows_are_complete_and_agree_with_themselves() -> None:
    assert len({(row.kind, row.model) for row in PUBLISHED}) == len(PUBLISHED)
    for row in PUBLISHED:
        assert row.origin
        assert row.licence
        if row.kind in CONTINUOUS:
            assert row.depth is row.codebook_size is row.residual is None
            continue
        if row.kind == "fitted":
            continue
        assert row.view_size is not None
        assert row.grid is not None
        assert row.view_size // row.grid[0] in (8, 14, 16)
        assert row.positions == row.grid[0] * row.grid[1]
        assert (row.residual is None) == (row.depth == 1)


def asvr(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "pipeline", *arguments], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return done.stdout


def test_the_table_for_people() -> None:
    lines = asvr("tokenizers").splitlines()
    assert lines[0].split() == [
        "kind", "model", "codes", "say", "view", "grid", "P", "D", "K", "code", "dim", "depths", "licence", "origin"
    ]  # fmt: skip
    assert len(lines) == len(PUBLISHED) + 1
    (vila_u,) = (line for line in lines if line.startswith("vila_u"))
    (vae,) = (line for line in lines if line.startswith("vae"))
    assert " features " in vae  # under `depths`: there are none
    assert vila_u.split()[3:11] == ["semantic", "256", "16x16", "256", "4", "16,384", "1,024", "residual"]


def test_one_json_object_for_programs() -> None:
    rows = json.loads(asvr("tokenizers", "--json"))["tokenizers"]
    assert len(rows) == len(PUBLISHED)
    unitok = next(row for row in rows if row["kind"] == "unitok")
    assert unitok["residual"] is False
    assert unitok["positions"] == 256
    assert unitok["grid"] == [16, 16]


SCRIPT = """
import sys
from pipeline.cli import run
assert run(["tokenizers"]) == 0
print(sorted({"torch", "transformers", "ray", "deepspeed"} & set(sys.modules)))
"""


def test_the_command_imports_no_torch() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "[]"
