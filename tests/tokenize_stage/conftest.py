"""Fixtures of the tokenize stage's tests: one tiny tokenizer and one Ray session for all of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from made_containers import Place
from made_jobs import make_pictures, make_tokenizer

if TYPE_CHECKING:
    from ray.cluster_utils import Cluster


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
def ray_cluster() -> Iterator[Cluster]:
    """One Ray with a head of two CPUs for the whole test session, to which tests add nodes: it starts in ten seconds."""
    import ray
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 2, "include_dashboard": False, "object_store_memory": 100 << 20}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    ray.init(address=cluster.address, log_to_driver=False)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture(params=["disk", "memory", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    """A folder for sources: on this disk, in an object store behind fsspec, and in one behind Arrow's own client."""
    if request.param == "disk":
        yield Place(str(tmp_path / "source"))
        return
    place = Place(request.getfixturevalue("s3") if request.param == "s3" else f"memory://{tmp_path.name}")
    yield place
    for name in place.store.list():
        place.store.delete(name)
