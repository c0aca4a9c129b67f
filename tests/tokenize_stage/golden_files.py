"""What the tests of the tokenizer families share: their golden files, and how an error must read."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

DATA = Path(__file__).parents[1] / "data"


def read_golden(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors that `golden.json` of a fixture describes."""
    return load_file(folder / "golden.safetensors")


def close(found: torch.Tensor, golden: torch.Tensor, *, atol: float) -> None:
    torch.testing.assert_close(found, golden, atol=atol, rtol=0)


def one_sentence(error: Exception, *says: str) -> None:
    """A message of one line that names what is wrong and says what to do after the colon."""
    message = str(error)
    assert "\n" not in message
    assert ": " in message
    assert not message.endswith(".")
    for part in says:
        assert part in message


def run_python(code: str) -> None:
    """Run `code` in a fresh interpreter, whose imports are its own."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
