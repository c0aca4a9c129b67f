"""Which packages each extra brings, and the one sentence for a missing one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

from manifests.errors import EnvironmentProblem

PACKAGES: dict[str, tuple[str, ...]] = {
    "tokenize": ("torch", "transformers", "safetensors", "huggingface_hub", "ray"),
    "train": ("torch", "transformers", "safetensors", "huggingface_hub", "tokenizers", "deepspeed"),
    "demo": ("torch", "transformers", "safetensors", "huggingface_hub", "ray", "tokenizers", "deepspeed", "onnx"),
}


def require(extra: str) -> None:
    """Raise EnvironmentProblem unless every package of `extra` is installed; imports none of them."""
    for package in PACKAGES[extra]:
        if find_spec(package) is None:
            raise _missing(package, extra)


@contextmanager
def needs(extra: str) -> Iterator[None]:
    """Turn the ImportError of a package that `extra` brings into the sentence; for work that may turn out to need none."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in PACKAGES[extra]:
            raise _missing(error.name or "", extra) from error
        raise


def _missing(package: str, extra: str) -> EnvironmentProblem:
    return EnvironmentProblem(f"the package {package} is not installed; run: pip install 'asvr[{extra}]'")
