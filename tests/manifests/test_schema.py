import json
from pathlib import Path

import jsonschema
import pytest
from made_sets import make_set
from pydantic import ValidationError

import manifests.schema
from manifests.schema import MANIFEST_NAME, FileEntry, Manifest, Totals, published_schema

PUBLISHED = Path(manifests.schema.__file__).with_name("manifest.schema.json")


def test_the_published_schema_is_that_of_the_model():
    assert PUBLISHED.read_text() == published_schema(), "run: python -m manifests.schema"


def test_a_written_manifest_follows_the_published_schema(tmp_path):
    make_set(tmp_path)
    schema = json.loads(PUBLISHED.read_text())
    document = json.loads((tmp_path / MANIFEST_NAME).read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(document, schema)
    document["shards"][0]["sha256"] = "short"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(document, schema)


@pytest.mark.parametrize("path", ["", "/etc/passwd", "../x", "a/../../x", "a\\..\\x", "a\0b"])
def test_a_path_in_a_manifest_stays_inside_its_folder(path):
    with pytest.raises(ValidationError):
        FileEntry(path=path, bytes=1, sha256="0" * 64)


def test_totals_add_up():
    with pytest.raises(ValidationError, match=r"ok 2 \+ rejected 2 is not images 5"):
        Totals(images=5, ok=2, rejected=2, source_errors=0, views=2, codes=2)


def test_an_unknown_key_is_an_error(tmp_path):
    document = make_set(tmp_path).model_dump(mode="json")
    with pytest.raises(ValidationError, match="Extra inputs"):
        Manifest.model_validate({**document, "shardz": []})
