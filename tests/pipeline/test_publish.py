"""`asvr push` against a server that speaks the Hub's protocol, through the real client; and reading back what is there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml
from hub_server import HubServer
from made_sets import make_set

REPO = "someone/codes"


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


def asvr(hub: HubServer, home: Path, *arguments: str | Path, code: int = 0, **environment: str) -> str:
    """Standard output, or the one line of error."""
    found = subprocess.run(
        [sys.executable, "-m", "pipeline", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | hub.environment | {"HF_HOME": str(home), "ASVR_CACHE": str(home)} | environment,
    )
    assert found.returncode == code, found.stderr
    return found.stderr.splitlines()[-1] if code else found.stdout


def names(folder: Path) -> set[str]:
    """The files that a set consists of."""
    kinds = ("shards/", "index-", "rejects-", "codebook-", "manifest.json")
    found = (str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    return {name for name in found if name.startswith(kinds)}


def test_a_set_goes_up_and_is_read_back_byte_for_byte(tmp_path: Path, hub: HubServer) -> None:
    made = make_set(tmp_path / "out")
    (tmp_path / "out" / "shards" / "orphan.parquet").write_bytes(b"of a killed worker")
    said = asvr(hub, tmp_path, "push", tmp_path / "out", "--to", REPO, "--license", "cc-by-4.0")
    assert said == f"published as hf://datasets/{REPO}\n"
    files = hub.repositories[f"datasets/{REPO}"]
    assert set(files) == names(tmp_path / "out") - {"shards/orphan.parquet"} | {"README.md"}
    assert all(files[name] == (tmp_path / "out" / name).read_bytes() for name in files if name != "README.md")
    assert hub.commits[-1] == (REPO, ["README.md", "manifest.json"])

    card = files["README.md"].decode()
    front = yaml.safe_load(card.split("---")[1])
    assert front["license"] == "cc-by-4.0"
    assert front["configs"][0]["data_files"][0]["path"] == "shards/*.parquet"
    assert made.fingerprint in card

    url = f"hf://datasets/{REPO}"
    assert "problems     0" in " ".join(asvr(hub, tmp_path, "verify", url).split("\n")).replace(
        "problems       0", "problems     0"
    )
    script = (
        "import sys\nfrom manifests.reader import open_manifest\n"
        "for where in sys.argv[1:]:\n"
        "    opened = open_manifest(where)\n"
        "    print([a.tolist() for a in opened.read_codes(opened.index()['image_id'].to_pylist()[:3])])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, url, tmp_path / "out"],
        capture_output=True, text=True, check=True, env=os.environ | hub.environment | {"HF_HOME": str(tmp_path)},
    )  # fmt: skip
    there, here = done.stdout.splitlines()
    assert there == here
    assert np.asarray(json.loads(there)[0]).ndim == 3


def test_an_interrupted_push_goes_on_and_nothing_is_sent_twice(tmp_path: Path, hub: HubServer) -> None:
    make_set(tmp_path / "out")
    hub.fail_after = 1
    error = asvr(hub, tmp_path, "push", tmp_path / "out", "--to", REPO, code=10)
    assert error.startswith(f"error: cannot publish hf://datasets/{REPO}: ")
    assert "manifest.json" not in hub.repositories[f"datasets/{REPO}"]  # a reader sees no set yet
    hub.fail_after, sent = None, hub.uploads
    asvr(hub, tmp_path, "push", tmp_path / "out", "--to", REPO)
    assert set(hub.repositories[f"datasets/{REPO}"]) == names(tmp_path / "out") | {"README.md"}
    commits, sent = len(hub.commits), hub.uploads
    asvr(hub, tmp_path, "push", tmp_path / "out", "--to", REPO)
    assert len(hub.commits) <= commits + 1  # at most the manifest and the card again
    assert hub.uploads == sent


def test_a_set_of_other_settings_is_refused(tmp_path: Path, hub: HubServer) -> None:
    make_set(tmp_path / "out")
    asvr(hub, tmp_path, "push", tmp_path / "out", "--to", REPO)
    files = hub.repositories[f"datasets/{REPO}"]
    theirs = json.loads(files["manifest.json"])
    theirs["fingerprint_keys"]["geometry"]["mode"] = "squash"
    files["manifest.json"] = json.dumps(theirs).encode()
    error = asvr(hub, tmp_path, "push", tmp_path / "out", "--to", REPO, code=5)
    assert "geometry" in error
    asvr(hub, tmp_path, "push", tmp_path / "out", "--to", REPO, "--replace")
    assert files["manifest.json"] == (tmp_path / "out" / "manifest.json").read_bytes()


@pytest.mark.parametrize(
    ("repo", "environment", "code", "said"),
    [
        (REPO, {"HF_TOKEN": "hf_wrong000000000000000000000000000"}, 10, "access is denied"),
        ("no/such/name", {}, 4, "is not the name of a repository"),
        (REPO, {"HF_TOKEN": "", "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1"}, 10, "access is denied"),
        (REPO, {"HF_ENDPOINT": "http://127.0.0.1:9"}, 10, "cannot be reached"),
    ],
)
def test_refusals_are_one_sentence(
    tmp_path: Path, hub: HubServer, repo: str, environment: dict[str, str], code: int, said: str
) -> None:
    make_set(tmp_path / "out")
    error = asvr(hub, tmp_path, "push", tmp_path / "out", "--to", repo, code=code, **environment)
    assert error.startswith("error: ")
    assert said in error
    assert hub.environment["HF_TOKEN"] not in error
