"""`asvr init` finds out what the data are, and what it writes is a recipe; the schema describes every recipe there is."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import jsonschema
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from manifests.errors import InputError
from pipeline.marked_yaml import parse
from pipeline.recipe import load_recipe
from pipeline.recipe_schema import recipe_schema
from pipeline.starter import write_recipe

PUBLISHED = Path(__file__).parents[2] / "pipeline"
MODELS = {"encoder": "google/siglip-so400m-patch14-384", "language_model": "lmsys/vicuna-7b-v1.5"}


def picture() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (200, 30, 30)).save(buffer, "JPEG")
    return buffer.getvalue()


def record(image: str) -> dict[str, Any]:
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Red."}]
    return {"id": "0", "image": image, "conversations": turns}


def made(tmp_path: Path, data: Path) -> dict[str, Any]:
    """The token set's source in the recipe that is written for `data`, after the recipe was checked."""
    file = tmp_path / "recipe.yaml"
    found = write_recipe(str(data), file, **MODELS)
    recipe = load_recipe(file)
    (config,) = recipe.token_sets().values()
    assert recipe.codebooks()["own"].source == config.source
    if found.records:
        assert [phase.name for phase in recipe.train().phases] == ["pretrain", "instruct"]
    jsonschema.Draft202012Validator(recipe_schema()).validate(parse(file.read_text(), "").value)
    return {key: value for key, value in config.source.model_dump().items() if value not in (None, ())}


def test_records_with_their_pictures(tmp_path: Path) -> None:
    data = tmp_path / 'da"ta'
    (data / "pictures" / "a").mkdir(parents=True)
    (data / "pictures" / "a" / "1.jpg").write_bytes(picture())
    (data / "train.json").write_text(json.dumps([record("a/1.jpg")]))
    (data / "package.json").write_text('{"name": "no records"}')
    expected = {"kind": "llava", "path": str(data / "train.json"), "image_root": str(data / "pictures")}
    assert made(tmp_path, data) == expected
    (tmp_path / "recipe.yaml").unlink()
    assert made(tmp_path, data / "train.json") == expected


def test_tars(tmp_path: Path) -> None:
    data = tmp_path / "shards"
    data.mkdir()
    with tarfile.open(data / "0.tar", "w") as tar:
        member = tarfile.TarInfo("1.jpg")
        member.size = len(picture())
        tar.addfile(member, io.BytesIO(picture()))
    assert made(tmp_path, data) == {"kind": "webdataset", "path": str(data)}


def test_a_hugging_face_table(tmp_path: Path) -> None:
    data = tmp_path / "table"
    data.mkdir()
    column = pa.array([{"bytes": picture(), "path": "1.jpg"}])
    pq.write_table(pa.table({"caption": ["red"], "img": column}), data / "train-0.parquet")
    assert made(tmp_path, data) == {"kind": "parquet", "path": str(data), "image_column": "img"}


def test_pictures_in_folders(tmp_path: Path) -> None:
    data = tmp_path / "photos"
    (data / "deep" / "er").mkdir(parents=True)
    (data / "deep" / "er" / "1.JPG").write_bytes(picture())
    (data / "notes.txt").write_text("x")
    assert made(tmp_path, data) == {"kind": "folder", "path": str(data)}


@pytest.mark.parametrize(("images", "vectors"), [(3, 256), (600, 1024), (10_000, 16_384)])
def test_the_codebook_fits_the_number_of_images(tmp_path: Path, images: int, vectors: int) -> None:
    (tmp_path / "1.jpg").write_bytes(picture())
    data = tmp_path / "data.json"
    data.write_text(json.dumps([record("1.jpg"), *(record(f"{n}.jpg") for n in range(1, images + 1))]))
    write_recipe(str(data), tmp_path / "recipe.yaml", **MODELS)
    assert load_recipe(tmp_path / "recipe.yaml").codebooks()["own"].size == vectors


def test_longer_conversations_get_a_template_that_takes_them(tmp_path: Path) -> None:
    (tmp_path / "1.jpg").write_bytes(picture())
    long = record("1.jpg")
    long["conversations"] = long["conversations"] * 2
    data = tmp_path / "data.json"
    for records, template in (([record("1.jpg")], None), ([record("1.jpg"), long], "vicuna_v1")):
        data.write_text(json.dumps(records))
        write_recipe(str(data), tmp_path / f"{template}.yaml", **MODELS)
        assert load_recipe(tmp_path / f"{template}.yaml").train().phases[0].template == template


def test_models_in_folders_are_found_from_the_recipe_and_say_their_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("größe").mkdir()
    (tmp_path / "größe" / "config.json").write_text('{"vision_config": {"image_size": 112}}')
    Path("1.jpg").write_bytes(picture())
    output = tmp_path / "elsewhere" / "recipe.yaml"
    write_recipe(".", output, encoder="größe", language_model="no/folder")
    codebook = load_recipe(output).codebooks()["own"]
    assert codebook.geometry.size == 112
    assert codebook.encoder.path == str(tmp_path / "größe")
    assert 'language_model: "no/folder"' in output.read_text()


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ([], "holds no LLaVA records"),
        (["notes.txt"], "holds no LLaVA records"),
        (["a.json", "b.jsonl"], "holds 2 files of records"),
        (["broken.parquet"], "is not a table that can be read"),
    ],
)
def test_what_is_refused(tmp_path: Path, names: list[str], said: str) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for name in names:
        text = json.dumps(record("1.jpg"))
        (data / name).write_text(f"[{text}]" if name.endswith(".json") else text)
    with pytest.raises(InputError, match=said):
        write_recipe(str(data), tmp_path / "recipe.yaml", **MODELS)
    assert not (tmp_path / "recipe.yaml").exists()


def test_a_damaged_file_of_records_is_named_as_that(tmp_path: Path) -> None:
    data = tmp_path / "data.json"
    data.write_text('[{"id": "1", "image": "1.jpg", "conversations": [')
    with pytest.raises(InputError, match="line 1, column"):
        write_recipe(str(data), tmp_path / "recipe.yaml", **MODELS)


def test_pictures_that_are_not_found_are_said_to_be(tmp_path: Path) -> None:
    data = tmp_path / "data.json"
    data.write_text(json.dumps([record("/gone.jpg"), record("1.jpg")]))
    missing = write_recipe(str(data), tmp_path / "a.yaml", **MODELS)
    assert missing.why.endswith(f"whose pictures were not found: correct image_root (now {tmp_path})")
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "1.jpg").write_bytes(picture())
    assert write_recipe(str(data), tmp_path / "b.yaml", **MODELS).source["image_root"] == str(tmp_path / "pictures")


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "1.jpg").write_bytes(picture())
    (tmp_path / "recipe.yaml").write_text("mine")
    with pytest.raises(InputError, match="is there already"):
        write_recipe(str(tmp_path), tmp_path / "recipe.yaml", **MODELS)
    assert (tmp_path / "recipe.yaml").read_text() == "mine"


def test_the_published_schema_is_that_of_the_models() -> None:
    """Regenerate it with: asvr schema > pipeline/recipe.schema.json"""
    assert json.loads((PUBLISHED / "recipe.schema.json").read_text()) == recipe_schema()
    jsonschema.Draft202012Validator.check_schema(recipe_schema())


@pytest.mark.parametrize(
    "file", [*sorted(PUBLISHED.glob("recipes/*.yaml")), PUBLISHED / "demo" / "recipe.yaml"], ids=lambda f: f.name
)
def test_the_schema_takes_every_shipped_recipe_and_no_typo(file: Path) -> None:
    validator = jsonschema.Draft202012Validator(recipe_schema())
    value = parse(numbers(file.read_text()), "").value
    validator.validate(value)
    for section in ("tokenize", "codebooks"):
        for entry in value.get(section, {}).values():
            assert not validator.is_valid({section: {"x": {**entry, "outputt": 1}}})


def numbers(text: str) -> str:
    """YAML 1.2, which editors read, takes 1e-3 for a number; YAML 1.1 wants 1.0e-3."""
    return text.replace(": 1e-", ": 1.0e-").replace(": 2e-", ": 2.0e-").replace(": 5e-", ": 5.0e-")


def test_an_encoder_with_a_damaged_configuration_is_not_guessed_at(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "config.json").write_text('{"image_size": ')
    with pytest.raises(
        InputError, match=r"config.json is no configuration of an encoder .*: repair it, or give another"
    ):
        write_recipe(str(tmp_path), tmp_path / "r.yaml", encoder=str(tmp_path), language_model="some/model")
