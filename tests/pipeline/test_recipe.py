"""A recipe says what is wrong with it in one sentence that starts with where; a hostile one does nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from manifests.errors import RecipeError
from pipeline.marked_yaml import parse
from pipeline.recipe import load_recipe

RECIPE = """\
codebooks:
  vit:
    source: {kind: folder, path: images/}
    geometry: {mode: squash, size: 112}
    encoder: {path: org/name, layer: 8}
    output: codebook/
tokenize:
  vqa:
    source:    {kind: folder, path: images/}
    geometry:  {mode: pad, size: 224}
    tokenizer: {kind: fitted, path: codebook/}
    unit_size: 128
    output: tokens/
train:
  output: run/
  model: {language_model: org/lm, vision_tower: ./encoder, tokenizer: gpt2}
  phases:
    - {name: pretrain, data: [{path: d.json, image_root: images}], manifests: [vqa], lr: 1e-3}
    - name: instruct
      data: [{path: d.json, image_root: images}]
      manifests: [../elsewhere/tokens]
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return tmp_path / "recipe.yaml"


def refusal(recipe: Path, *overrides: str, part: str = "token_sets") -> str:
    with pytest.raises(RecipeError) as caught:
        getattr(load_recipe(recipe, overrides), part)()
    message = str(caught.value).replace(f"{recipe.parent}/", "")
    assert "\n" not in message
    return message


def test_relative_paths_are_relative_to_the_recipe(file: Path) -> None:
    folder = file.parent
    recipe = load_recipe(file)
    vqa = recipe.token_sets()["vqa"]
    assert (vqa.source.path, vqa.tokenizer.path, vqa.output) == (
        str(folder / "images"),
        folder / "codebook",
        str(folder / "tokens"),
    )
    train = recipe.train()
    assert train.output == str(folder / "run")
    assert train.model.vision_tower == str(folder / "encoder")
    assert train.phases[0].data[0].path == str(folder / "d.json")
    assert train.phases[0].lr == 1e-3


def test_hub_ids_stay_unless_such_a_folder_exists(file: Path) -> None:
    assert load_recipe(file).codebooks()["vit"].encoder.path == "org/name"
    assert load_recipe(file).train().model.tokenizer == "gpt2"
    (file.parent / "org" / "name").mkdir(parents=True)
    assert load_recipe(file).codebooks()["vit"].encoder.path == str(file.parent / "org/name")


def test_manifests_name_sets_or_folders(file: Path) -> None:
    phases = load_recipe(file).train().phases
    assert phases[0].manifests == (str(file.parent / "tokens"),)
    assert phases[1].manifests == (str(file.parent.parent / "elsewhere/tokens"),)
    assert refusal(file, "train.phases.0.manifests=[vqb]", part="train").endswith(
        "train.phases.0.manifests.0: there is neither a token set nor a folder 'vqb'; did you mean vqa?"
    )


def test_unknown_key_has_file_line_and_a_suggestion(file: Path) -> None:
    file.write_text(RECIPE.replace("unit_size", "unit_sise"))
    assert refusal(file) == "recipe.yaml:12: tokenize.vqa.unit_sise: unknown key; did you mean unit_size?"


@pytest.mark.parametrize(
    ("old", "new", "part", "message"),
    [
        (
            "unit_size: 128",
            "unit_size: many",
            "token_sets",
            "12: tokenize.vqa.unit_size: must be an integer, but is many",
        ),
        (
            "mode: pad",
            "mode: pda",
            "token_sets",
            "10: tokenize.vqa.geometry.mode: must be 'squash', 'pad', 'crop' or 'anyres', but is pda",
        ),
        ("    output: tokens/\n", "", "token_sets", "8: tokenize.vqa.output: required key is missing"),
        (
            "output: tokens/",
            "output: ''",
            "token_sets",
            "13: tokenize.vqa.output: a path cannot be empty or hold a NUL character",
        ),
        (
            "name: instruct",
            "nam: instruct",
            "train",
            "19: train.phases.1.nam: unknown key; did you mean name? (and 1 more problem)",
        ),
        ("    - name: instruct", "    - name: pretrain", "train", "14: train: phase names are folders of the run"),
        ("tokenize:", "tokenise:", "token_sets", "7: tokenise: unknown key; did you mean tokenize?"),
        (
            "{mode: pad, size",
            "{mode:pad, size",
            "token_sets",
            "10: tokenize.vqa.geometry.mode:pad: unknown key; write a space after the colon of mode:",
        ),
        ("lr: 1e-3", "lr: .inf", "train", "18: train.phases.0.lr: must be a number, but is .inf"),
    ],
)
def test_one_sentence_with_the_line(file: Path, old: str, new: str, part: str, message: str) -> None:
    file.write_text(RECIPE.replace(old, new, 1))
    assert refusal(file, part=part).startswith(f"recipe.yaml:{message}")


def test_the_kind_of_a_source_decides_its_keys(file: Path) -> None:
    source = "tokenize.vqa.source"
    assert (
        refusal(file, f"{source}.kind=tar")
        == f"--set {source}.kind=tar: tar is not one of 'folder', 'llava', 'webdataset', 'parquet'"
    )
    assert refusal(file, f"{source}.kind=llava").endswith(f"{source}.image_root: required key is missing")
    assert "image_root" not in refusal(file, f"{source}.pth=x")


def test_only_selects_and_names_what_there_is(file: Path) -> None:
    recipe = load_recipe(file, ["tokenize.other={output: elsewhere/}"])
    assert list(recipe.token_sets(["vqa"])) == ["vqa"], "the unfinished entry beside it is nobody's business"
    with pytest.raises(RecipeError, match=r"^--only vqq: .* did you mean vqa\?$"):
        recipe.token_sets(["vqq"])


def test_two_sets_cannot_share_an_output(file: Path) -> None:
    again = "tokenize.again={source: {kind: folder, path: x}, geometry: {mode: pad, size: 8}, tokenizer: {kind: fitted, path: x}, output: ./tokens}"
    assert "is the output of vqa too" in refusal(file, again)


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("train.phases.instruct.lr=1e-5", lambda train: train.phases[1].lr == 1e-5),
        ("train.phases.1.lr=0.5", lambda train: train.phases[1].lr == 0.5),
        ("train.deepspeed.zero_optimization.stage=2", lambda train: train.deepspeed["zero_optimization"]["stage"] == 2),
        ("train.phases.0.objective={kind: none}", lambda train: train.phases[0].objective.kind == "none"),
    ],
)
def test_set_reaches_everything(file: Path, override: str, value: object) -> None:
    assert callable(value)
    assert value(load_recipe(file, [override]).train())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("tokenize.vqa.unit_sise=3", "--set tokenize.vqa.unit_sise=3: unknown key; did you mean unit_size?"),
        ("tokenize.vqa.unit_size", "--set tokenize.vqa.unit_size: expected dotted.key=value"),
        ("=3", "--set =3: expected dotted.key=value"),
        ("tokenize..vqa=3", "--set tokenize..vqa=3: expected dotted.key=value"),
        (
            "tokenize.vqa.unit_size.x.y=3",
            "--set tokenize.vqa.unit_size.x.y=3: tokenize.vqa.unit_size is 128 and has no keys",
        ),
        (
            "train.phases.instrct.lr=3",
            "--set train.phases.instrct.lr=3: train.phases has 2 elements and none is instrct; did you mean",
        ),
        ("train.phases.7.lr=3", "--set train.phases.7.lr=3: train.phases has 2 elements and none is 7"),
        ("tokenize.vqa.unit_size=[1", "--set tokenize.vqa.unit_size=[1: not valid YAML"),
        (
            "tokenize.vqa.tokenizer.path=s3://bucket/x",
            "--set tokenize.vqa.tokenizer.path=s3://bucket/x: s3://bucket/x is not on a local disk",
        ),
        ("tokenize.vqa.unit_size=" + "9" * 10_000, "--set tokenize.vqa.unit_size=9999"),
    ],
)
def test_a_wrong_set_names_the_flag(file: Path, override: str, message: str) -> None:
    found = refusal(file, override)
    assert found.startswith(message)
    assert len(found) < 400


def test_yaml_is_the_core_schema() -> None:
    text = "{a: 1e-3, b: no, c: 010, d: 0x10, e: 2024-01-01, f: ~, g: true, h: 12:30, i: -.5, j: .nan}"
    assert parse(text, "x").value == {
        "a": 1e-3, "b": "no", "c": 10, "d": 16, "e": "2024-01-01", "f": None, "g": True, "h": "12:30", "i": -0.5, "j": ".nan",
    }  # fmt: skip


def test_anchors_merges_and_their_lines() -> None:
    marked = parse("base: &b\n  x: 1\n  y: 2\nuse:\n  <<: *b\n  y: 3\nagain: *b\n", "r")
    assert marked.value == {"base": {"x": 1, "y": 2}, "use": {"x": 1, "y": 3}, "again": {"x": 1, "y": 2}}
    assert (marked.mark(("use", "y")), marked.mark(("use", "x")), marked.mark(("use", "nothing"))) == (
        "r:6",
        "r:2",
        "r:4",
    )


LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", "x:3: the key 'a' is given twice"),
        ("a: {b: 1, b: 2}", "x:1: the key 'b' is given twice"),
        ("a: !!python/object/apply:os.system [id]", "x:1: the tag"),
        ("a: !!set {b}", "x:1: the tag"),
        ("a: !!bool 3", "x:1: '3' cannot be read"),
        ("a: " + "9" * 5000, "x:1: '9999"),
        ("a: 1e999", "x:1: '1e999' cannot be read"),
        ("\n[a]: 1", "x:2: a key must be text"),
        ("a: [1", "x:1: not valid YAML"),
        ("a: b: c", "x:1: not valid YAML"),
        ("a: *b", "x:1: not valid YAML"),
        ("a\n---\nb", "x:2: not valid YAML"),
        ("a: \x07", "x:1: the character U+0007 is not allowed"),
        ("[" * 5000, "x:1: not valid YAML: values are nested deeper than 40 levels"),
        ("a: &a {b: *a}", "x:1: its aliases make more than"),
        ("<<: 3", "x:1: '<<' takes plain mappings"),
        (LAUGHS, "x:6: its aliases make more than 50000 values"),
        ("a: 1\n" * 100_000, "x: longer than 256 KiB"),
    ],
)
def test_bad_yaml_is_one_sentence(text: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse(text, "x")
    assert str(caught.value).startswith(message)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("text", "remedy"),
    [
        ("a: 1\nb:2\n\n\nc: 3", "write `key: value`, with a space after the colon"),
        ("a:\n\tb: 1", "indent with spaces, not tabs"),
    ],
)
def test_a_usual_slip_in_yaml_is_named_with_its_remedy(text: str, remedy: str) -> None:
    with pytest.raises(RecipeError, match=rf"^x:2: not valid YAML: .*; {remedy}$"):
        parse(text, "x")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"- a\n", "1: a recipe is a mapping"),
        (b"tokenize:\n  a: \xff\n", "2: not UTF-8 text (byte 0xff)"),
        (b"a: 1\n" * 100_000, "is longer than 256 KiB"),
    ],
)
def test_bad_files(file: Path, content: bytes, message: str) -> None:
    file.write_bytes(content)
    assert message in refusal(file)


def test_missing_file_folder_and_device(tmp_path: Path) -> None:
    assert "there is no such recipe file" in refusal(tmp_path / "nothing.yaml")
    assert "is a folder; give the recipe file itself" in refusal(tmp_path)
    assert "not a regular file" in refusal(Path("/dev/zero"))
    assert "cannot be read" in refusal(Path("a" * 5000))


def test_a_section_that_is_not_there(file: Path) -> None:
    file.write_text("train: {}\n")
    assert refusal(file) == "recipe.yaml has no tokenize: section, so there is nothing to do"
    file.write_text("tokenize: []\n")
    assert refusal(file) == "recipe.yaml:1: tokenize: must be a mapping of names to settings"
    assert refusal(file, part="train") == "recipe.yaml has no train: section, so there is nothing to train"


def test_a_tokenizer_s_files_are_paths_or_hub_references(file: Path) -> None:
    (file.parent / "tok").mkdir()
    (file.parent / "tok" / "tok.pt").touch()
    keys = (
        "{kind: dualtoken, config: hf://org/name@abc/config.json, checkpoint: tok/tok.pt, encoder_config: org/siglip}"
    )
    tokenizer = load_recipe(file, [f"tokenize.vqa.tokenizer={keys}"]).token_sets()["vqa"].tokenizer
    assert tokenizer.model_dump() == {
        "kind": "dualtoken",
        "config": "hf://org/name@abc/config.json",
        "checkpoint": str(file.parent / "tok" / "tok.pt"),
        "encoder_config": "org/siglip",
        "branch": "semantic",
    }
    assert "'fitted', 'dualtoken'" in refusal(file, "tokenize.vqa.tokenizer.kind=clip")
