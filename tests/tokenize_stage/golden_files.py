"""What the tests of the tokenizer families share: their golden files, and how an error must read."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tokenize_stage.config import TokenizerConfig
from tokenize_stage.identity import describe
from tokenize_stage.tokenizers import load
from tokenize_stage.tokenizers.base import Tokenizer

DATA = Path(__file__).parents[1] / "data"


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What a family's tests remember of files is kept for all of them: `cache = golden_files.cache` in a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ASVR_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def load_described(config: TokenizerConfig) -> Tokenizer:
    """The tokenizer of a configuration, in float32 on the CPU."""
    return load(config, describe(config).spec, dtype="float32", device="cpu")


def random_views(count: int, size: int) -> torch.Tensor:
    """uint8 (count, size, size, 3), always the same."""
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, 256, (count, size, size, 3), dtype=torch.uint8, generator=generator)


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
