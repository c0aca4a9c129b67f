"""QLIP folders: what they may lack, and what is refused in one sentence."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import golden_files
import pytest
import torch
from golden_files import DATA, close, one_sentence, read_golden
from qlip_files import FIXTURE, ROPE, TOWER, complete, features, load_from
from safetensors.torch import load_file, save_file

from manifests.errors import InputError
from tokenize_stage.config import QlipTokenizer
from tokenize_stage.identity import describe
from tokenize_stage.tokenizers.qlip import binarise

cache = golden_files.cache
QUERY = f"{TOWER}encoder.layers.1.self_attn.q_proj.weight"
NARROW = f"{TOWER}quant_embed.c_proj.weight"

Tensors = dict[str, torch.Tensor]
Change = Callable[[Tensors], object]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return complete(tmp_path_factory.mktemp("model") / "qlip")


@pytest.fixture
def changed(tmp_path: Path) -> Callable[[Change], Path]:
    """A model folder whose tensors were changed."""

    def make(change: Change) -> Path:
        folder = complete(tmp_path / "qlip")
        tensors = load_file(FIXTURE / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")
        return folder

    return make


def drop(*patterns: str) -> Change:
    def change(tensors: Tensors) -> None:
        for name in [name for name in tensors if any(pattern in name for pattern in patterns)]:
            del tensors[name]

    return change


def only_first_layer_s_tables(tensors: Tensors) -> None:
    for name in [name for name in tensors if ".rope." in name and "vision_model.encoder.layers.0." not in name]:
        del tensors[name]


def half_precision_tables(tensors: Tensors) -> None:
    tensors.update({name: tensor.bfloat16() for name, tensor in tensors.items() if ".rope." in name})


@pytest.mark.parametrize(
    "change",
    [
        drop(".rope."),
        drop(".self_attn.rope."),
        only_first_layer_s_tables,
        drop("freqs_sin"),
        drop("text_model.", "text_projection"),
        drop("vision_decoder.", "quant_embed_post."),
        drop("post_layernorm", "visual_projection", "logit_scale"),
    ],
)
def test_what_the_codes_do_not_need_may_be_absent(changed: Callable[[Change], Path], change: Change) -> None:
    features_BPE = features(load_from(changed(change)))
    close(features_BPE, read_golden(FIXTURE)["features"], atol=5e-5)
    assert torch.equal(binarise(features_BPE), read_golden(FIXTURE)["bits"])


def test_tables_that_were_rounded_are_used_as_they_are(changed: Callable[[Change], Path]) -> None:
    shift = (features(load_from(changed(half_precision_tables))) - read_golden(FIXTURE)["features"]).abs().max()
    assert 1e-4 < shift < 0.1


def rename(old: str, new: str) -> Change:
    def change(tensors: Tensors) -> None:
        tensors[new] = tensors.pop(old)

    return change


def replace(name: str, value: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    def change(tensors: Tensors) -> None:
        tensors[name] = value(tensors[name].clone()).contiguous()

    return change


def poison(tensor: torch.Tensor) -> torch.Tensor:
    tensor[0, 0] = float("nan")
    return tensor


def add(name: str) -> Change:
    return lambda tensors: tensors.update({name: torch.zeros(64)})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (drop(QUERY), QUERY),
        (rename(QUERY, QUERY.replace("q_proj", "query")), QUERY),
        (drop("vision_model.encoder.layers.2."), "layers.2"),
        (drop(f"{TOWER}quant_embed."), "quant_embed.c_fc"),
        (drop("inner_attn_ln"), "inner_attn_ln"),
        (replace(NARROW, lambda weight: weight[:24]), NARROW),
        (replace(QUERY, poison), "NaN"),
        (replace(NARROW, poison), "NaN"),
        (replace(ROPE, poison), "NaN"),
        (replace(ROPE, lambda table: table.roll(1, 0)), "rotary"),
        (replace(ROPE, lambda table: table[:9]), "freqs_cos"),
        (add(f"{TOWER}encoder.layers.0.self_attn.k_proj.bias"), "k_proj.bias"),
        (add(f"{TOWER}encoder.layers.3.layer_norm1.weight"), "layers.3"),
        (lambda tensors: [tensors.update({f"model.{name}": tensors.pop(name)}) for name in list(tensors)], "lacks"),
    ],
)
def test_a_checkpoint_with_other_tensors_is_one_sentence(
    changed: Callable[[Change], Path], change: Change, says: str
) -> None:
    folder = changed(change)
    with pytest.raises(InputError) as caught:
        load_from(folder)
    one_sentence(caught.value, says, str(folder))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"num_hidden_layers": 2}, "layers.2"),
        ({"num_hidden_layers": 4}, "layers.3"),
        ({"hidden_size": 48}, "shape"),
        ({"num_attention_heads": 3}, "num_attention_heads"),
        ({"image_size": 72}, "image_size"),
        ({"patch_size": 32}, "shape"),
        ({"rope": False}, "rope"),
        ({"subln": False}, "subln"),
        ({"k_bias": True}, "k_bias"),
        ({"quantizer_embed_type": "linear"}, "quantizer_embed_type"),
        ({"quantizer": "vq"}, "bsq"),
        ({"quantizer_cfg": {"embed_dim": 24}}, "quant_embed.c_proj"),
        ({"quantizer_cfg": {}}, "embed_dim"),
        ({"layer_norm_eps": "small"}, "layer_norm_eps"),
    ],
)
def test_a_config_of_another_model_is_one_sentence(tmp_path: Path, changes: dict[str, object], says: str) -> None:
    folder = complete(tmp_path / "qlip")
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"].update(changes)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError) as caught:
        load_from(folder)
    one_sentence(caught.value, says, str(folder))


def test_a_model_of_24_bits_is_cut_into_groups_of_12(changed: Callable[[Change], Path]) -> None:
    def narrower(tensors: Tensors) -> None:
        for name in (NARROW, NARROW.replace("weight", "bias")):
            tensors[name] = tensors[name][:24].contiguous()

    folder = changed(narrower)
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"]["quantizer_cfg"].update(embed_dim=24, group_size=2)
    (folder / "config.json").write_text(json.dumps(config))
    spec = describe(QlipTokenizer(path=str(folder))).spec
    assert (spec.codebook_sizes, spec.settings["bits"], spec.settings["group_bits"]) == ((4096, 4096), 24, 12)


def test_groups_that_do_not_fit_are_one_sentence(folder: Path) -> None:
    with pytest.raises(InputError) as caught:
        load_from(folder, group_bits=5)
    one_sentence(caught.value, "group_bits 5", "28 bits", "1, 2, 4, 7, 14")


def test_a_truncated_file_is_one_sentence(tmp_path: Path) -> None:
    folder = complete(tmp_path / "qlip")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:300_000])
    with pytest.raises(InputError) as caught:
        load_from(folder)
    one_sentence(caught.value, str(file))


def test_a_folder_of_something_else_is_one_sentence(tmp_path: Path) -> None:
    for other in (DATA / "vilau", tmp_path, tmp_path / "nothing"):
        with pytest.raises(InputError) as caught:
            load_from(other)
        one_sentence(caught.value, str(other))


def test_a_model_without_its_preprocessor_is_one_sentence() -> None:
    with pytest.raises(InputError) as caught:
        load_from(FIXTURE)
    one_sentence(caught.value, "preprocessor_config.json")
