"""An export is a plain Hugging Face LLaVA that says and sees what the model in training does."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_models import target
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration

from manifests.errors import InputError
from manifests.geometry import background_from_mean, make_views
from manifests.schema import Geometry
from train_stage import config as configs
from train_stage import export
from train_stage.batch import IGNORE, Batch
from train_stage.build import build_model
from train_stage.export import HEAD_FILE, export_llava
from train_stage.model import AsvrModel
from train_stage.tokenizer import load_tokenizer

VIEW, POSITIONS = 28, 16
KEYS = json.loads((Path(__file__).parents[1] / "data" / "llava_keys.json").read_text())
TEMPLATE = (
    "{% for m in messages %}USER: {% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image>\n{% else %}{{ c['text'] }}{% endif %}{% endfor %} ASSISTANT:{% endfor %}"
)
HEAD = configs.HeadConfig(width=16, layers=1, heads=2, ffn=16)
MakeConfig = Callable[..., configs.ModelConfig]


def exported(
    config: configs.ModelConfig, output: Path, geometry: Geometry | None = None, *, dtype: torch.dtype = torch.float32
) -> AsvrModel:
    codebooks = [np.ones((11, 6), dtype=np.float32)] * 2
    terms = (configs.CodesObjective(head=HEAD),)
    model = build_model(config, terms, {"codes": target(codebooks)}, dtype, view_size=VIEW).eval()
    geometry = geometry or Geometry(mode="squash", size=VIEW)
    export_llava(model, load_tokenizer(config), geometry, output, chat_template=TEMPLATE)
    return model


def picture(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def expected_keys(kind: str, *, tied: bool) -> set[str]:
    keys = set()
    for part, layers in (("language_model", 2), ("projector", 0), (kind, 4)):
        keys |= set(KEYS[part]["once"])
        keys |= {name.format(n=n) for name in KEYS[part]["per_layer"] for n in range(layers)}
    return keys - ({"language_model.lm_head.weight"} if tied else set())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["siglip", "clip", "dinov2"])
def test_weights_have_their_published_names(tiny_model: MakeConfig, tmp_path: Path, kind: str, tied: bool) -> None:
    exported(tiny_model(kind, tied=tied), tmp_path / "out")
    assert set(load_file(tmp_path / "out" / "model.safetensors")) == expected_keys(kind, tied=tied)
    assert len({path.stat().st_mode for path in (tmp_path / "out").iterdir()}) == 1, "readable as any new file"


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["siglip", "clip", "dinov2", "vit"])
def test_the_export_computes_what_training_computes(
    tiny_model: MakeConfig, tmp_path: Path, kind: str, tied: bool
) -> None:
    geometry = Geometry(mode="squash", size=VIEW)
    model = exported(tiny_model(kind, tied=tied), tmp_path / "out", geometry)
    loaded, info = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert isinstance(loaded, LlavaForConditionalGeneration)
    assert not any(info[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.config.image_seq_length == POSITIONS
    assert loaded.dtype == torch.float32

    processor = AutoProcessor.from_pretrained(tmp_path / "out", backend="pil")
    source = picture(40, 31)
    turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it?"}]}
    text = processor.apply_chat_template([turn], add_generation_prompt=True)
    inputs = processor(images=source, text=text, return_tensors="pt")
    ids = inputs["input_ids"]
    assert (ids == model.llava.config.image_token_id).sum() == POSITIONS
    with torch.no_grad():
        theirs = loaded(**inputs).logits
        views, _ = make_views(np.asarray(source), geometry)
        batch = Batch(
            input_ids=ids,
            position_ids=torch.arange(ids.shape[1])[None],
            labels=torch.full_like(ids, IGNORE),
            views=torch.from_numpy(views),
            view_position=(ids[0] == model.llava.config.image_token_id).nonzero().T,
            target_mask=torch.zeros(1, POSITIONS, dtype=torch.bool),
            sample_ids=["a"],
        )
        ours = model.llava.lm_head(model.hidden_states(batch))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("mode", ["squash", "pad", "crop"])
@pytest.mark.parametrize("kind", ["siglip", "clip"])
def test_the_processor_makes_the_pixels_of_training(
    tiny_model: MakeConfig, tmp_path: Path, kind: str, mode: str
) -> None:
    mean = (0.5, 0.5, 0.5) if kind == "siglip" else (0.485, 0.456, 0.406)
    geometry = Geometry(mode=mode, size=VIEW, background=background_from_mean(mean))
    model = exported(tiny_model(kind), tmp_path / "out", geometry)
    processor = AutoProcessor.from_pretrained(tmp_path / "out", backend="pil")
    for width, height in ((40, 31), (31, 40), (97, 20), (20, 97), (28, 28), (9, 11)):
        source = picture(width, height)
        views, _ = make_views(np.asarray(source), geometry)
        theirs = processor.image_processor(source, return_tensors="pt")["pixel_values"]
        # uint8 pixels are equal to the last bit; the normalised ones but for the order of two multiplications.
        back = theirs * torch.tensor(model.pixel_norm.std).view(3, 1, 1) + torch.tensor(mean).view(3, 1, 1)
        assert torch.equal((back * 255).round().to(torch.uint8)[0].permute(1, 2, 0), torch.from_numpy(views[0]))
        torch.testing.assert_close(theirs, model.pixel_norm(torch.from_numpy(views)), rtol=0, atol=1e-6)


def test_a_background_the_processor_cannot_have_is_a_warning(
    tiny_model: MakeConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    exported(tiny_model("clip"), tmp_path / "out", Geometry(mode="pad", size=VIEW, background=(1, 2, 3)))
    assert "(123, 116, 103)" in caplog.text


def test_the_head_is_a_file_of_its_own(tiny_model: MakeConfig, tmp_path: Path) -> None:
    model = exported(tiny_model(), tmp_path / "out")
    with safe_open(tmp_path / "out" / HEAD_FILE, "pt") as file:
        metadata, names = file.metadata(), set(file.keys())
    assert names == set(model.objectives.state_dict())
    facts = json.loads(metadata["objectives"])["codes"]
    assert configs.HeadConfig.model_validate(facts["head"]) == HEAD
    assert facts["codebook_sizes"] == [11, 11]


def test_configuration_files_are_those_older_readers_expect(tiny_model: MakeConfig, tmp_path: Path) -> None:
    exported(tiny_model("clip"), tmp_path / "out", dtype=torch.bfloat16)
    read = {path.name: json.loads(path.read_text()) for path in (tmp_path / "out").glob("*.json")}
    assert read["config.json"]["model_type"] == "llava"
    assert read["config.json"]["dtype"] == "bfloat16"
    assert read["config.json"]["architectures"] == ["LlavaForConditionalGeneration"]
    processor = read["processor_config.json"]
    assert "image_processor" not in processor
    assert {name: processor[name] for name in ("patch_size", "num_additional_image_tokens", "image_token")} == {
        "patch_size": 7,
        "num_additional_image_tokens": 1,
        "image_token": "<image>",
    }
    assert processor["vision_feature_select_strategy"] == "default"
    assert read["preprocessor_config.json"]["image_processor_type"] == "LlavaImageProcessor"
    assert read["preprocessor_config.json"]["size"] == {"height": VIEW, "width": VIEW}
    assert (read["generation_config.json"]["eos_token_id"], read["generation_config.json"]["do_sample"]) == (2, False)
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == TEMPLATE


def test_an_answer_ends_with_any_of_the_stop_tokens(tiny_model: MakeConfig, tmp_path: Path) -> None:
    """What plain generation from the folder says goes as far as the first of them."""

    def said() -> list[int]:
        loaded = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out")
        return loaded.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=6)[0, 3:].tolist()

    model = exported(tiny_model(), tmp_path / "out")
    torch.manual_seed(0)
    for parameter in model.llava.model.language_model.parameters():  # or it says one thing again and again
        torch.nn.init.normal_(parameter, std=0.5)
    geometry, tokenizer = Geometry(mode="squash", size=VIEW), load_tokenizer(tiny_model())

    def again(*stop_tokens: int) -> None:
        export_llava(model, tokenizer, geometry, tmp_path / "out", chat_template=TEMPLATE, stop_tokens=stop_tokens)

    again()
    whole = said()
    stop = next(token for token in whole if token != whole[0])
    again(tokenizer.eos_token_id, stop)
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert written["eos_token_id"] == [tokenizer.eos_token_id, stop]
    assert said() == whole[: whole.index(stop) + 1]
    assert len(said()) < len(whole)


def test_large_models_are_split_into_shards(
    tiny_model: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "SHARD_SIZE", "50KB")
    model = exported(tiny_model(), tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    loaded = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out")
    own = dict(model.llava.named_parameters())
    assert all(torch.equal(own[name], parameter) for name, parameter in loaded.named_parameters())


def test_an_export_is_replaced_and_other_folders_are_not(tiny_model: MakeConfig, tmp_path: Path) -> None:
    exported(tiny_model(), tmp_path / "out")
    exported(tiny_model("clip"), tmp_path / "out")
    assert not (tmp_path / "out.tmp").exists()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("precious")
    (tmp_path / "other" / "config.json").write_text('{"model_type": "llava"}')  # somebody else's model
    with pytest.raises(InputError, match="something else than an export of ours"):
        exported(tiny_model(), tmp_path / "other")
    assert (tmp_path / "other" / "thesis.txt").read_text() == "precious"


def test_a_process_that_cannot_import_this_project_sees_and_says_the_same(
    tiny_model: MakeConfig, tmp_path: Path
) -> None:
    """From the image file to the answer, with transformers alone: same pixels, same logits."""
    geometry = Geometry(mode="pad", size=VIEW)
    model = exported(tiny_model(), tmp_path / "out", geometry)
    picture(40, 31).save(tmp_path / "picture.png")
    code = f"""
import sys
sys.modules |= dict.fromkeys(["manifests", "train_stage", "tokenize_stage", "pipeline", "deepspeed", "ray"])
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText, AutoProcessor
model = AutoModelForImageTextToText.from_pretrained({str(tmp_path / "out")!r}).eval()
processor = AutoProcessor.from_pretrained({str(tmp_path / "out")!r}, backend="pil")
inputs = processor(images=Image.open({str(tmp_path / "picture.png")!r}), text="USER: <image>\\nwhat? ASSISTANT:",
                   return_tensors="pt")
with torch.no_grad():
    logits = model(**inputs).logits
out = model.generate(**inputs, max_new_tokens=3)
assert out.shape[1] > inputs["input_ids"].shape[1]
save_file({{"ids": inputs["input_ids"], "pixels": inputs["pixel_values"], "logits": logits}}, {str(tmp_path / "said")!r})
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said = load_file(tmp_path / "said")
    views, _ = make_views(np.asarray(picture(40, 31)), geometry)
    torch.testing.assert_close(said["pixels"], model.pixel_norm(torch.from_numpy(views)), rtol=0, atol=1e-6)
    ids = said["ids"]
    batch = Batch(
        input_ids=ids,
        position_ids=torch.arange(ids.shape[1])[None],
        labels=torch.full_like(ids, IGNORE),
        views=torch.from_numpy(views),
        view_position=(ids[0] == model.llava.config.image_token_id).nonzero().T,
        target_mask=torch.zeros(1, POSITIONS, dtype=torch.bool),
        sample_ids=["a"],
    )
    with torch.no_grad():
        ours = model.llava.lm_head(model.hidden_states(batch))
    torch.testing.assert_close(ours, said["logits"], rtol=0, atol=1e-5)
