"""Tests marked `gpu` are collected only on a machine with a CUDA device; `s3` is a bucket on a server of our own."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
from hypothesis import settings
from s3_server import S3Server

from pipeline.console import PACKAGES

# The suite tries the same few examples every time; `make soak` looks for new ones with --hypothesis-profile random.
settings.register_profile("random", deadline=None, max_examples=500)
settings.register_profile("fixed", deadline=None, max_examples=25, derandomize=True)
settings.load_profile("fixed")


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """One S3-compatible server for the whole session. A test that stops or starves it starts another."""
    with S3Server() as server:
        yield server


@pytest.fixture
def s3(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of a folder in an empty bucket, with the environment in which this process and its children find it."""
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    return f"s3://{s3_server.bucket()}/below"


@pytest.fixture(autouse=True)
def _loggers_as_they_come() -> None:
    """Every test starts with loggers as Python makes them: Ray and our own commands set those of their process."""
    logging.getLogger().setLevel(logging.WARNING)
    for package in PACKAGES:
        logger = logging.getLogger(package)
        logger.setLevel(logging.NOTSET)
        logger.propagate = True
        logger.handlers.clear()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch  # here, so that a session without such tests does not load it

    if torch.cuda.is_available():
        return
    config.hook.pytest_deselected(items=marked)
    items[:] = [item for item in items if item not in marked]
