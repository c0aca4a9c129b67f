"""A phase with anyres trains a LLaVA-NeXT: equal to Transformers' own, and exported as it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny_models import target
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaNextForConditionalGeneration

from manifests.errors import InputError
from manifests.geometry import make_views
from manifests.schema import Geometry
from train_stage import config as configs
from train_stage.batch import IGNORE, Batch, dummy_view
from train_stage.build import build_model
from train_stage.evaluate import Question, answer_questions, load_exported
from train_stage.export import export_llava, make_processor
from train_stage.image_tokens import ImageTokens, locate
from train_stage.model import AsvrModel
from train_stage.parts import NEWLINE_NAME, load_trainable, set_trainable
from train_stage.tokenizer import load_tokenizer

VIEW, GRID, POSITIONS = 28, (4, 4), 16
PINPOINTS = tuple((rows * VIEW, columns * VIEW) for rows, columns in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3)))
ANYRES = Geometry(mode="anyres", size=VIEW, background=(0, 0, 0), grid_pinpoints=PINPOINTS)
KEYS = json.loads((Path(__file__).parents[1] / "data" / "llava_keys.json").read_text())
TEMPLATE = (
    "{% for m in messages %}USER: {% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image>\n{% else %}{{ c['text'] }}{% endif %}{% endfor %} ASSISTANT:{% endfor %}"
)
TERMS = (configs.CodesObjective(head=configs.HeadConfig(width=16, layers=1, heads=2, ffn=16)),)
MakeConfig = Callable[..., configs.ModelConfig]


def build(config: configs.ModelConfig, **changes) -> AsvrModel:
    codebooks = [np.ones((11, 6), dtype=np.float32)] * 2
    settings = {"view_size": VIEW, "grid_pinpoints": PINPOINTS, **changes}
    return build_model(config, TERMS, {"codes": target(codebooks)}, torch.float32, **settings)


def export_to(output: Path, config: configs.ModelConfig) -> AsvrModel:
    model = build(config).eval()
    export_llava(model, load_tokenizer(config), ANYRES, output, chat_template=TEMPLATE)
    return model


def picture(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def batch_of(model: AsvrModel, ids: torch.Tensor, source: Image.Image) -> Batch:
    """One row with one picture; every cell with a token is a target."""
    views, _ = make_views(np.asarray(source), ANYRES)
    places = (ids.flatten() == model.llava.config.image_token_id).nonzero().flatten().numpy()
    cells, newlines = locate(ImageTokens(ANYRES, GRID).order(*source.size), places, len(views), POSITIONS)
    return Batch(
        input_ids=ids,
        position_ids=torch.arange(ids.shape[1])[None],
        labels=torch.full_like(ids, IGNORE),
        views=torch.from_numpy(views),
        view_position=torch.from_numpy(cells),
        target_mask=torch.from_numpy(cells >= 0),
        targets={"codes": torch.ones(len(views), POSITIONS, 2, dtype=torch.int64)},
        base_view=torch.arange(len(views)) == 0,
        newline_position=torch.from_numpy(newlines),
        sample_ids=["a"],
    )


@pytest.mark.parametrize("kind", ["siglip", "clip"])
def test_from_picture_to_logits_the_export_is_what_was_trained(
    tiny_model: MakeConfig, tmp_path: Path, kind: str
) -> None:
    model = export_to(tmp_path / "out", tiny_model(kind))
    loaded, info = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert isinstance(loaded, LlavaNextForConditionalGeneration)
    assert not any(info[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    processor = AutoProcessor.from_pretrained(tmp_path / "out", backend="pil")
    turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it?"}]}
    text = processor.apply_chat_template([turn], add_generation_prompt=True)
    for size in ((64, 48), (48, 64), (90, 30), (31, 90), (28, 28), (200, 30)):
        source = picture(*size)
        inputs = processor(images=source, text=text, return_tensors="pt")
        batch = batch_of(model, inputs["input_ids"], source)
        torch.testing.assert_close(inputs["pixel_values"][0], model.pixel_norm(batch.views), rtol=0, atol=1e-6)
        with torch.no_grad():
            theirs = loaded(**inputs).logits
            ours = model.llava.lm_head(model.hidden_states(batch))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["siglip", "clip"])
def test_files_are_those_of_published_models(tiny_model: MakeConfig, tmp_path: Path, kind: str) -> None:
    export_to(tmp_path / "out", tiny_model(kind))
    expected = set()
    for part, layers in (("language_model", 2), ("projector", 0), ("llava_next", 0), (kind, 4)):
        expected |= set(KEYS[part]["once"])
        expected |= {name.format(n=n) for name in KEYS[part]["per_layer"] for n in range(layers)}
    assert set(load_file(tmp_path / "out" / "model.safetensors")) == expected
    read = {path.name: json.loads(path.read_text()) for path in (tmp_path / "out").glob("*.json")}
    assert read["config.json"]["model_type"] == "llava_next"
    assert read["config.json"]["architectures"] == ["LlavaNextForConditionalGeneration"]
    assert read["config.json"]["image_grid_pinpoints"] == [list(pinpoint) for pinpoint in PINPOINTS]
    preprocessor = read["preprocessor_config.json"]
    assert preprocessor["image_processor_type"] == "LlavaNextImageProcessor"
    assert preprocessor["image_grid_pinpoints"] == [list(pinpoint) for pinpoint in PINPOINTS]
    assert (preprocessor["size"], preprocessor["crop_size"]) == ({"shortest_edge": 28}, {"height": 28, "width": 28})
    assert read["processor_config.json"]["processor_class"] == "LlavaNextProcessor"


def test_answers_are_those_of_the_model_in_training(tiny_model: MakeConfig, tmp_path: Path) -> None:
    config = tiny_model("clip")
    model = export_to(tmp_path / "out", config)
    processor = make_processor(model, load_tokenizer(config), ANYRES, TEMPLATE)
    questions = []
    for number, size in enumerate(((64, 48), (90, 30), (28, 28))):
        picture(*size).save(tmp_path / f"{number}.png")
        questions += [Question(tmp_path / f"{number}.png", text, "red") for text in ("what is it?", "where?")]
    ours = answer_questions(model.llava, processor, questions, max_new_tokens=4)
    assert ours == answer_questions(*load_exported(tmp_path / "out"), questions, max_new_tokens=4)


@pytest.mark.parametrize("with_image", [True, False])
def test_the_newline_trains_with_the_projector_in_every_micro_batch(tiny_model: MakeConfig, with_image: bool) -> None:
    model = build(tiny_model())
    set_trainable(model, {"projector", "visual_head"})
    if with_image:
        tokens = ImageTokens(ANYRES, GRID).count(64, 48)
        ids = torch.tensor([[5, *[model.llava.config.image_token_id] * tokens, 6, 7]])
        batch = batch_of(model, ids, picture(64, 48))
    else:
        ids = torch.arange(3, 13)[None]
        batch = Batch(ids, torch.arange(ids.shape[1])[None], ids, *dummy_view(VIEW, POSITIONS), ["t"])
    model(batch).total(1, {"codes": 1}, {"codes": 1.0}).backward()
    lacking = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not lacking
    assert bool(dict(model.named_parameters())[NEWLINE_NAME].grad.any()) is with_image


def test_a_phase_with_one_view_hands_its_weights_on_and_takes_none_back(tiny_model: MakeConfig) -> None:
    one_view, several = build(tiny_model(), grid_pinpoints=(), seed=3), build(tiny_model())
    state = {name: p.detach().clone() for name, p in one_view.named_parameters() if "multi_modal_projector" in name}
    load_trainable(several, state)
    own = dict(several.named_parameters())
    assert all(torch.equal(own[name], tensor) for name, tensor in state.items())
    with pytest.raises(InputError, match="goes before those with anyres, not after"):
        load_trainable(one_view, state | {NEWLINE_NAME: own[NEWLINE_NAME].detach()})


def test_views_have_the_size_that_the_tower_was_made_for(tiny_model: MakeConfig) -> None:
    """A DINOv2 resizes its positions, but Transformers' LLaVA-NeXT cuts its tiles by the tower's own size."""
    with pytest.raises(InputError, match=r"set geometry\.size to 42"):
        build(tiny_model("dinov2"))


def test_another_background_than_black_is_a_warning(tiny_model: MakeConfig, caplog: pytest.LogCaptureFixture) -> None:
    grey = ANYRES.model_copy(update={"background": (127, 127, 127)})
    make_processor(build(tiny_model()), load_tokenizer(tiny_model()), grey, TEMPLATE)
    assert "pads with (0, 0, 0)" in caplog.text
