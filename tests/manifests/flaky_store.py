"""A store whose k-th change fails, as if the machine had died there: what stands after it is what a kill leaves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from manifests.errors import StorageError
from manifests.local_store import LocalStore


class DyingStore(LocalStore):
    """Every change from number `last` on is refused."""

    def __init__(self, root: Path, last: int) -> None:
        super().__init__(root)
        self.left = last

    def write(self, rel: str, data: bytes | memoryview) -> None:
        self._live()
        super().write(rel, data)

    def delete(self, rel: str) -> None:
        self._live()
        super().delete(rel)

    def _live(self) -> None:
        if self.left == 0:
            raise StorageError("the machine died here")
        self.left -= 1


def die_everywhere(prepare: Callable[[int], Path], act: Callable[[LocalStore], object]) -> list[Path]:
    """Run `act` on folders from `prepare`, dying before change 0, 1, 2, ...; the folders, the last one finished."""
    folders = []
    for last in range(1000):
        folders.append(prepare(last))
        try:
            act(DyingStore(folders[-1], last))
        except StorageError:
            continue
        return folders
    raise AssertionError("it never ends")
