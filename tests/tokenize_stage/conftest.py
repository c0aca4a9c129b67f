"""Fixtures of the tokenize stage's tests: one tiny tokenizer and one Ray session for all of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from made_jobs import make_pictures, make_tokenizer


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What a test remembers of files is its own."""
    monkeypatch.setenv("ASVR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def codebook(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A codebook folder with a random codebook on a random two-layer Dinov2."""
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Twenty small pictures: two full units and a part of one."""
    return make_pictures(tmp_path / "pictures", 20)


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """One local Ray with two CPUs for the whole test session: starting it takes about ten seconds."""
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100 << 20)
    yield
    ray.shutdown()
