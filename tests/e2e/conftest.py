"""One folder for all tests here that look at what a whole way left behind."""

from __future__ import annotations

from pathlib import Path

import pytest
from pages import guide
from users_folder import BEFORE_THE_SECOND_GUIDE, asvr, make_folder


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which somebody has followed the guide for training engineers."""
    folder = make_folder(tmp_path_factory.mktemp("user"))
    (folder / "hosts").write_text("first slots=2\nsecond slots=2\n")
    for arguments in [*map(str.split, BEFORE_THE_SECOND_GUIDE), *guide("training-engineer.md")]:
        printed = asvr(*arguments, cwd=folder)
        if "--launcher" in arguments:
            assert f"pipeline train {folder / 'recipe.yaml'}" in printed
    return folder
