"""What an older asvr wrote stays readable; what a newer one wrote is refused in one sentence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import zstandard
from pydantic import BaseModel, ConfigDict, ValidationError

from manifests.commits import list_commits, read_commit
from manifests.documents import compress
from manifests.errors import VerificationFailed
from manifests.forget import forget_images
from manifests.reader import open_manifest
from manifests.schema import MANIFEST_NAME
from manifests.storage import Store
from manifests.verify import verify
from manifests.versions import parsed

FIRST = Path(__file__).resolve().parents[1] / "data/schema_v1/codes"
"""Written by the first asvr. It is never written again."""


def test_a_set_of_version_1_reads_forever():
    assert verify(FIRST).problems == []
    opened = open_manifest(FIRST)
    assert (opened.manifest.totals.ok, opened.manifest.totals.rejected) == (6, 3)
    codes = opened.read_codes(["1/3.jpg", "0/0.jpg"])
    assert codes[0].shape == (1, 6, 2)
    assert codes[1].flatten().tolist() == [13, 17, 10, 29, 8, 8, 4, 26, 4, 21, 0, 0]
    assert [book.shape for book in opened.codebooks()] == [(16, 4), (32, 4)]
    records = [read_commit(Store.open(FIRST), unit) for unit in list_commits(Store.open(FIRST))]
    assert [len(record.members) for record in records] == [4, 4, 1]
    assert records[0].rejects[0].reason == "corrupt"


def test_and_can_be_worked_on(tmp_path):
    shutil.copytree(FIRST, tmp_path / "set")
    forget_images(Store.open(tmp_path / "set"), ["0/0.jpg"])
    assert verify(tmp_path / "set").problems == []


def test_a_newer_manifest_and_a_newer_record_ask_for_a_newer_asvr(tmp_path):
    shutil.copytree(FIRST, tmp_path / "set")
    place = tmp_path / "set" / MANIFEST_NAME
    document = json.loads(place.read_text())
    place.write_text(json.dumps({**document, "schema_version": 99, "more": 1}))
    with pytest.raises(
        VerificationFailed, match=r"manifest.json has schema version 99, this asvr reads up to 1: update asvr$"
    ):
        open_manifest(tmp_path / "set")
    assert [problem.code for problem in verify(tmp_path / "set").problems] == ["manifest_invalid"]
    record = tmp_path / "set/commits/u000000.json.zst"
    text = json.loads(zstandard.ZstdDecompressor().decompress(record.read_bytes()))
    record.write_bytes(compress(json.dumps({**text, "schema_version": 99}).encode()))
    with pytest.raises(VerificationFailed, match=r"u000000.json.zst has schema version 99, .*: update asvr"):
        read_commit(Store.open(tmp_path / "set"), "u000000")


class Present(BaseModel):
    model_config = ConfigDict(extra="forbid")
    schema_version: int
    name: str


class Third(Present):
    """A document as version 3 would have it."""

    size: int


UPGRADES = {
    1: lambda old: {"schema_version": 1, "label": old["title"]},
    2: lambda old: {"schema_version": 2, "name": old["label"], "size": 0},
}


def test_older_documents_are_brought_up_step_by_step():
    now = b'{"schema_version": 3, "name": "a", "size": 5}'
    assert parsed(Third, now, UPGRADES, "here", newest=3).size == 5
    old = parsed(Third, b'{"schema_version": 1, "title": "a"}', UPGRADES, "here", newest=3)
    assert old == Third(schema_version=3, name="a", size=0)
    assert parsed(Third, b'{"schema_version": 2, "label": "b"}', UPGRADES, "here", newest=3).name == "b"


@pytest.mark.parametrize(
    "data", [b"", b"[]", b"null", b'{"schema_version": "1"}', b'{"schema_version": 3}', b"[" * 99_999]
)
def test_what_is_no_document_is_said_by_its_model(data):
    with pytest.raises(ValidationError):
        parsed(Third, data, UPGRADES, "here", newest=3)


def test_a_version_that_nobody_can_upgrade_is_invalid():
    with pytest.raises(ValidationError):
        parsed(Third, b'{"schema_version": 0, "x": 1}', UPGRADES, "here", newest=3)
