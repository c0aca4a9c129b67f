"""References to files: on this machine, in the hub's cache, or nowhere. Nothing here reaches a network."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from made_jobs import ROOT

from manifests.errors import InputError
from tokenize_stage.hub import HubReference, locate_file, locate_folder, parse_reference

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("owner/name", HubReference("owner/name", None, None)),
        ("hf://owner/na.me-1", HubReference("owner/na.me-1", None, None)),
        (f"hf://owner/name@{COMMIT}", HubReference("owner/name", COMMIT, None)),
        (f"hf://owner/name@{COMMIT}/a/b.pt", HubReference("owner/name", COMMIT, "a/b.pt")),
        ("hf://owner/name/b.pt", HubReference("owner/name", None, "b.pt")),
        ("/data/x.pt", None),
        ("name", None),
        ("owner/name/x.pt", None),
        ("hf://owner", None),
        ("hf://owner/name/../x.pt", None),
        ("https://owner/name", None),
    ],
)
def test_the_forms_of_a_hub_reference(text: str, wanted: HubReference | None) -> None:
    assert parse_reference(text) == wanted


def test_local_files_and_folders(tmp_path: Path) -> None:
    (tmp_path / "config.json").touch()
    assert locate_file(str(tmp_path / "config.json")).path == tmp_path / "config.json"
    assert locate_file(str(tmp_path), name="config.json").path == tmp_path / "config.json"
    assert locate_folder(str(tmp_path), ["*"]).path == tmp_path


@pytest.mark.parametrize(
    ("reference", "name", "match"),
    [
        ("{}", None, "name the file in it"),
        ("{}", "x.pt", "has no x.pt"),
        ("{}/x.pt", None, "there is no file"),
        ("tok/x.pt", None, "leaves the file open"),
        ("hf://owner/name", None, "give hf://owner/name/FILE"),
    ],
)
def test_a_reference_that_names_no_file_is_refused(
    tmp_path: Path, reference: str, name: str | None, match: str
) -> None:
    with pytest.raises(InputError, match=match) as error:
        locate_file(reference.format(tmp_path), name=name)
    assert "\n" not in str(error.value)


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    for reference in (str(tmp_path / "absent"), "hf://owner/../name"):
        with pytest.raises(InputError, match="there is no folder"):
            locate_folder(reference, ["*"])


SCRIPT = """
import sys
from manifests.errors import InputError
from tokenize_stage.hub import locate_file, locate_folder
for reference in sys.argv[1:]:
    try:
        found = locate_file(reference, name="tok.pt")
        print(found.path.read_text(), found.revision)
    except InputError as error:
        print(error)
print(sorted({"torch", "transformers"} & set(sys.modules)))
"""


def test_a_pinned_revision_comes_from_the_cache_without_a_network(tmp_path: Path) -> None:
    snapshot = tmp_path / "hub" / "models--owner--name" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot / "tok.pt").write_text("weights")
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    references = [
        f"hf://owner/name@{COMMIT}",
        f"hf://owner/name@{COMMIT}/tok.pt",
        "owner/other",
        "hf://owner/name@main/x",
    ]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *references],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    lines = done.stdout.splitlines()
    assert lines[:2] == [f"weights {COMMIT}"] * 2
    assert "the hub model cannot be fetched" in lines[2]
    assert "at revision main cannot be fetched" in lines[3]
    assert lines[4:] == ["[]"]
