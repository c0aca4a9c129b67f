"""DualToken files that are damaged, foreign, or do not belong together: each is refused in one sentence."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from made_dualtoken import (
    CODES,
    DATA,
    GOLDEN,
    WIDTH,
    State,
    edit_config,
    edit_state,
    job,
    loaded,
    make_second_generation,
    one_sentence,
    tokenizer,
    views,
)

from manifests.errors import InputError
from tokenize_stage.identity import describe
from tokenize_stage.job import run_job


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The golden tokenizer in a folder that a test may change."""
    return shutil.copytree(DATA, tmp_path / "tokenizer")


@pytest.fixture
def second(folder: Path) -> Path:
    """The same with a checkpoint of the second generation."""
    make_second_generation(folder)
    return folder


def test_a_checkpoint_of_the_other_generation_is_refused(second: Path, tmp_path: Path) -> None:
    newer, older = str(second / "dualtoken_tiny.pt"), str(DATA / "dualtoken_tiny.pt")
    with pytest.raises(InputError, match=r"is of generation 2, but its configuration .* is of generation 1") as error:
        describe(tokenizer(checkpoint=newer))
    one_sentence(str(error.value))
    with pytest.raises(InputError, match=r"is of generation 1, but its configuration .* is of generation 2") as error:
        describe(tokenizer(second, checkpoint=older))
    one_sentence(str(error.value))


@pytest.mark.parametrize("extra", ["quantizer_pixel.codebooks.0.weight", "prequant_semantic.conv1.weight"])
def test_generations_nobody_published_weights_of_are_refused(folder: Path, extra: str) -> None:
    edit_state(folder, lambda state: state.update({extra: torch.ones(1)}))
    with pytest.raises(InputError, match=f"not supported .*{extra.split('.')[0]}") as error:
        describe(tokenizer(folder))
    one_sentence(str(error.value))


def put(key: str, value: torch.Tensor | None) -> Callable[[State], Any]:
    def change(state: State) -> None:
        state.pop(key, None)
        if value is not None:
            state[key] = value

    return change


def rename(state: State) -> None:
    key = "siglip_model.vision_model.encoder.layers.3.mlp.fc1.weight"
    state[key.replace("fc1", "linear1")] = state.pop(key)


def prefix(state: State) -> None:
    for key in list(state):
        state[f"module.{key}"] = state.pop(key)


BOOK = "quantizer_semantic.codebooks.2.weight"

BAD_STATES: dict[str, tuple[Callable[[State], Any], str]] = {
    "renamed key": (rename, r"lacks 1 of .*layers\.3\.mlp\.fc1\.weight\), and holds 1 .*layers\.3\.mlp\.linear1\.weight"),
    "missing codebook": (put(BOOK, None), r"lacks 1 of the \d+ tensors needed \(quantizer_semantic\.codebooks\.2\.weight\)"),
    "deeper than configured": (put("quantizer_semantic.codebooks.8.weight", torch.ones(1)), r"codebooks\.8\.weight; ignored: text tower"),
    "without padding row": (put(BOOK, torch.ones(CODES, WIDTH)), r"is \(64, 32\), not \(65, 32\)"),
    "integers": (put(BOOK, torch.ones(CODES + 1, WIDTH, dtype=torch.int32)), "not floating point"),
    "unknown tensor": (put("surprise", torch.ones(1)), r"\(surprise; ignored"),
    "prefixed": (prefix, "holds no semantic quantiser .*module"),
    "no quantiser": (lambda state: [state.pop(key) for key in list(state) if key.startswith("quant")], "no semantic quantiser"),
    "layer beyond the encoder": (
        put("siglip_model.vision_model.encoder.layers.24.mlp.fc1.weight", torch.ones(1)), r"layers\.24"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_STATES)
def test_a_checkpoint_with_wrong_tensors_is_refused_before_a_job_is_planned(
    folder: Path, tmp_path: Path, name: str
) -> None:
    change, match = BAD_STATES[name]
    edit_state(folder, change)
    with pytest.raises(InputError, match=match) as error:
        run_job(job(folder, tmp_path / "out"))
    one_sentence(str(error.value))
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match=match):  # an error is not remembered as an answer
        describe(tokenizer(folder))


@pytest.mark.parametrize("key", [BOOK, "siglip_model.vision_model.encoder.layers.5.mlp.fc1.bias"])
def test_a_checkpoint_with_nan_is_refused(folder: Path, tmp_path: Path, key: str) -> None:
    edit_state(folder, lambda state: state[key].view(-1)[3:4].fill_(float("nan")))
    with pytest.raises(InputError, match=rf"NaN or infinity in 1 tensors \({re.escape(key)}\)") as error:
        run_job(job(folder, tmp_path / "out"))
    one_sentence(str(error.value))


def test_nan_in_what_is_not_used_does_no_harm(folder: Path) -> None:
    edit_state(folder, lambda state: state["decoder.conv_in.bias"].fill_(float("nan")))
    assert torch.equal(loaded(tokenizer(folder)).encode(views()), GOLDEN["semantic_codes"].int())


def test_a_truncated_checkpoint_is_refused(folder: Path) -> None:
    file = folder / "dualtoken_tiny.pt"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(InputError, match="is cut off") as error:
        describe(tokenizer(folder))
    one_sentence(str(error.value))


BAD_CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "wrong depth": (
        {"code_shape": [4, 4, 4]},
        r"codebooks\.4\.weight, .*neither needed|neither needed .*codebooks\.4\.weight",
    ),
    "deeper": ({"code_shape": [4, 4, 9]}, r"lacks 1 .*codebooks\.8\.weight"),
    "other K": ({"n_embed": 128}, r"is \(65, 32\), not \(129, 32\)"),
    "other width": ({"embed_dim": 16, "latent_shape": [4, 4, 16]}, "embed_dim is 16, but the features .* are 32 wide"),
    "other grid": ({"code_shape": [3, 3, 8], "latent_shape": [3, 3, 32]}, r"grid of \(3, 3\) .* makes \(4, 4\)"),
    "latent shape": ({"latent_shape": [8, 8, 32]}, "latent_shape is"),
    "no depth": ({"code_shape": None}, "code_shape is missing"),
    "list of K": ({"n_embed": [64] * 7}, "n_embed is .*8 positive integers"),
    "K is text": ({"n_embed": "64"}, "n_embed is '64'"),
    "between generations": ({"vq_semantic": {}}, "between DualToken's two generations"),
    "no encoder": ({"pretrained_model": None}, "names no pretrained_model: set encoder_config"),
    "encoder elsewhere": (
        {"pretrained_model": "$PATH/siglip"},
        r"names the encoder \$PATH/siglip, which cannot be found",
    ),
}


@pytest.mark.parametrize("name", BAD_CONFIGS)
def test_a_wrong_configuration_is_refused(folder: Path, name: str) -> None:
    changes, match = BAD_CONFIGS[name]
    edit_config(folder, **changes)
    with pytest.raises(InputError, match=match) as error:
        describe(tokenizer(folder))
    one_sentence(str(error.value))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"num_attention_heads": 5}, "num_attention_heads is .5., not a divisor of the width"),
        ({"hidden_act": "nothing"}, "is not the configuration of a SigLIP"),
        ({"num_hidden_layers": 12}, r"layers\.23|neither needed"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is '0'"),
        ({"image_size": [56, 56]}, "image_size is"),
        ({"hidden_size": 64}, "embed_dim is 32, but the features"),
        ({"intermediate_size": 48}, "another shape"),
    ],
)
def test_a_wrong_encoder_configuration_is_refused(folder: Path, changes: dict[str, Any], match: str) -> None:
    file = folder / "siglip-tiny" / "config.json"
    config = json.loads(file.read_text())
    config["vision_config"].update(changes)
    file.write_text(json.dumps(config))
    with pytest.raises(InputError, match=match) as error:
        describe(tokenizer(folder))
    one_sentence(str(error.value))


def test_the_encoder_configuration_may_be_named_in_the_recipe(folder: Path) -> None:
    shutil.move(folder / "siglip-tiny", folder / "elsewhere")
    for reference in (folder / "elsewhere", folder / "elsewhere" / "config.json"):
        spec = describe(tokenizer(folder, encoder_config=str(reference))).spec
        assert spec.weights_sha256 == describe(tokenizer()).spec.weights_sha256
    other = folder / "clip.json"
    other.write_text(json.dumps({"model_type": "clip", "vision_config": {}}))
    with pytest.raises(InputError, match="configuration of a clip model"):
        describe(tokenizer(folder, encoder_config=str(other)))
