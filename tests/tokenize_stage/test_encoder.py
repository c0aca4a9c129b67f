from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import tiny_encoders
import torch
from safetensors.torch import load_file, save_file
from tiny_encoders import BLOCKS, FAMILIES, PATCH, SIZE, WIDTH

from manifests.errors import EnvironmentProblem, InputError
from tokenize_stage.encoder import VisionEncoder, resolve_device
from tokenize_stage.encoder_files import Normalisation, encoder_sha256, locate_encoder, normalisation, weight_files

PREFIX = {"dinov2": 1, "dinov2_registers": 5, "clip": 1, "clip_two_towers": 1, "vit": 1}


def encoder_of(folder: Path, **changes: Any) -> VisionEncoder:
    arguments: dict[str, Any] = {
        "layer": -2, "view_size": SIZE, "normalisation": normalisation(folder), "device": "cpu", **changes,
    }  # fmt: skip
    return VisionEncoder(folder, **arguments)


def random_views(count: int = 3, size: int = SIZE) -> torch.Tensor:
    return torch.randint(0, 256, (count, size, size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=FAMILIES)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any, Path]:
    model = tiny_encoders.build(request.param)
    return request.param, model, tiny_encoders.save(model, tmp_path_factory.mktemp(request.param))


def test_features_are_the_hidden_states_of_the_whole_model_at_every_layer(saved: tuple[str, Any, Path]) -> None:
    family, model, folder = saved
    views = random_views()
    states = tiny_encoders.all_hidden_states(model, views)
    assert len(states) == BLOCKS + 1
    for layer in range(-BLOCKS - 1, BLOCKS + 1):
        encoder = encoder_of(folder, layer=layer)
        assert encoder.layer == layer % (BLOCKS + 1)
        assert (encoder.grid, encoder.width) == ((SIZE // PATCH, SIZE // PATCH), WIDTH)
        torch.testing.assert_close(
            encoder.features(views), states[layer][:, PREFIX.get(family, 0) :], rtol=1e-5, atol=1e-6
        )


def test_blocks_above_the_layer_are_gone(saved: tuple[str, Any, Path]) -> None:
    _, _, folder = saved
    whole = sum(p.numel() for p in encoder_of(folder, layer=BLOCKS)._model.parameters())
    half = sum(p.numel() for p in encoder_of(folder, layer=BLOCKS // 2)._model.parameters())
    assert half < 0.75 * whole


def test_views_of_another_size_get_interpolated_positions(saved: tuple[str, Any, Path]) -> None:
    family, model, folder = saved
    views = random_views(size=6 * PATCH)
    encoder = encoder_of(folder, view_size=6 * PATCH)
    assert encoder.grid == (6, 6)
    expected = tiny_encoders.all_hidden_states(model, views)[-2][:, PREFIX.get(family, 0) :]
    torch.testing.assert_close(encoder.features(views), expected, rtol=1e-5, atol=1e-6)


def test_bfloat16_is_close_and_comes_back_as_float32(saved: tuple[str, Any, Path]) -> None:
    _, _, folder = saved
    exact, coarse = (encoder_of(folder, dtype=dtype).features(random_views()) for dtype in ("float32", "bfloat16"))
    assert coarse.dtype == torch.float32
    assert not torch.equal(exact, coarse)
    assert torch.nn.functional.cosine_similarity(exact, coarse, dim=-1).min() > 0.99


def test_a_view_has_the_same_features_whatever_its_neighbours(saved: tuple[str, Any, Path]) -> None:
    _, _, folder = saved
    encoder, views = encoder_of(folder), random_views(4)
    others = views.flip(0).clone()
    others[1] = views[1]
    torch.testing.assert_close(encoder.features(views)[1], encoder.features(others)[1], rtol=0, atol=0)


def test_a_tied_last_hidden_state_is_still_the_raw_output_of_the_last_block(tmp_path: Path) -> None:
    """transformers can be told to return the final norm's output as the last hidden state; we never do."""
    model = tiny_encoders.build("vit")
    folder = tiny_encoders.save(model, tmp_path)
    raw = tiny_encoders.all_hidden_states(model, random_views())[-1]
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_last_hidden_states": True}))
    model.config.tie_last_hidden_states = True
    tied = tiny_encoders.all_hidden_states(model, random_views())[-1]
    ours = encoder_of(folder, layer=-1).features(random_views())
    torch.testing.assert_close(ours, raw[:, 1:], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(ours, tied[:, 1:], atol=1e-2)


def test_a_classifier_checkpoint_is_an_encoder_too(tmp_path: Path) -> None:
    model = tiny_encoders.build("vit_classifier")
    folder = tiny_encoders.save(model, tmp_path)
    expected = tiny_encoders.all_hidden_states(model.vit, random_views())[-2]
    torch.testing.assert_close(encoder_of(folder).features(random_views()), expected[:, 1:], rtol=1e-5, atol=1e-6)


def edit_weights(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("family", ["dinov2", "siglip_two_towers", "clip"])
@pytest.mark.parametrize("pattern", ["patch_embedding", "position_embedding", r"layers?\.0\.(layer_)?norm1"])
def test_a_missing_tensor_that_matters_is_named(tmp_path: Path, family: str, pattern: str) -> None:
    folder = tiny_encoders.save(tiny_encoders.build(family), tmp_path)
    gone: list[str] = []

    def remove(tensors: dict[str, torch.Tensor]) -> None:
        gone.extend(name for name in tensors if re.search(pattern, name) and "text_model" not in name)
        for name in gone:
            del tensors[name]

    edit_weights(folder, remove)
    assert gone
    with pytest.raises(InputError, match="lacks") as error:
        encoder_of(folder)
    assert gone[0].removeprefix("vision_model.") in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_tensors_of_what_does_not_run_do_not_matter(tmp_path: Path) -> None:
    folder = tiny_encoders.save(tiny_encoders.build("siglip_two_towers"), tmp_path)
    views = random_views()
    before = encoder_of(folder, layer=2).features(views)

    def remove(tensors: dict[str, torch.Tensor]) -> None:
        for name in [
            n for n in tensors if any(part in n for part in ("text_model", "head.", "post_layernorm", "layers.3"))
        ]:
            del tensors[name]

    edit_weights(folder, remove)
    assert torch.equal(encoder_of(folder, layer=2).features(views), before)
    with pytest.raises(InputError, match=r"encoder\.layers\.3"):
        encoder_of(folder, layer=4)


def test_a_tensor_of_another_shape_is_named(tmp_path: Path) -> None:
    folder = tiny_encoders.save(tiny_encoders.build("dinov2"), tmp_path)
    edit_weights(folder, lambda tensors: tensors.update({"embeddings.cls_token": torch.zeros(1, 1, WIDTH + 1)}))
    with pytest.raises(InputError, match=r"embeddings\.cls_token"):
        encoder_of(folder)


def test_an_unknown_tensor_is_named(tmp_path: Path) -> None:
    folder = tiny_encoders.save(tiny_encoders.build("dinov2"), tmp_path)
    edit_weights(folder, lambda tensors: tensors.update({"encoder.layer.0.adapter.weight": torch.zeros(2)}))
    with pytest.raises(InputError, match=r"encoder\.layer\.0\.adapter\.weight"):
        encoder_of(folder)


def test_damaged_and_unsuitable_folders_are_one_sentence(tmp_path: Path) -> None:
    def folder(name: str) -> Path:
        return tiny_encoders.save(tiny_encoders.build("dinov2"), tmp_path / name)

    truncated = folder("truncated")
    (truncated / "model.safetensors").write_bytes((truncated / "model.safetensors").read_bytes()[:2000])
    no_weights = folder("no_weights")
    (no_weights / "model.safetensors").unlink()
    pickled = folder("pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    bad_json = folder("bad_json")
    (bad_json / "config.json").write_text("{")
    unknown = folder("unknown")
    (unknown / "config.json").write_text('{"model_type": "no_such_model"}')
    text = tmp_path / "text"
    import transformers

    transformers.BertModel(
        transformers.BertConfig(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=20
        )
    ).save_pretrained(text)
    (text / "preprocessor_config.json").write_text((unknown / "preprocessor_config.json").read_text())
    for bad in (truncated, no_weights, pickled, bad_json, unknown, text):
        with pytest.raises(InputError) as error:
            encoder_of(bad)
        assert str(bad) in str(error.value)
        assert "\n" not in str(error.value)


def test_layers_and_view_sizes_that_do_not_exist(tmp_path: Path) -> None:
    folder = tiny_encoders.save(tiny_encoders.build("dinov2"), tmp_path)
    for layer in (BLOCKS + 1, -BLOCKS - 2):
        with pytest.raises(InputError, match=f"layer {layer} does not exist"):
            encoder_of(folder, layer=layer)
    with pytest.raises(InputError, match="view"):
        encoder_of(folder, view_size=PATCH - 1)
    with pytest.raises(ValueError, match="uint8"):
        encoder_of(folder).features(torch.zeros(1, SIZE, SIZE, 3))


def test_cuda_is_used_when_there_is_a_gpu_and_else_refused_in_one_sentence() -> None:
    assert resolve_device("cpu").type == "cpu"
    if torch.cuda.is_available():
        assert resolve_device("auto").type == resolve_device("cuda").type == "cuda"
        return
    assert resolve_device("auto").type == "cpu"
    with pytest.raises(EnvironmentProblem, match="set device to auto or cpu"):
        resolve_device("cuda")


def test_sharded_weights_load_and_are_hashed_one_by_one(tmp_path: Path) -> None:
    model = tiny_encoders.build("vit")
    one = tiny_encoders.save(model, tmp_path / "one")
    many = tmp_path / "many"
    model.save_pretrained(many, max_shard_size="20KB")
    (many / "preprocessor_config.json").write_text((one / "preprocessor_config.json").read_text())
    names = weight_files(many)
    assert len(names) > 2
    assert set(encoder_sha256(many)) == {"config.json", "preprocessor_config.json", *names}
    assert torch.equal(encoder_of(many).features(random_views()), encoder_of(one).features(random_views()))
    (many / names[-1]).unlink()
    with pytest.raises(InputError, match=names[-1]):
        weight_files(many)
    (many / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../one/model.safetensors"}}')
    with pytest.raises(InputError, match="plain file names"):
        weight_files(many)


def test_normalisation_is_read_from_either_file_with_its_rescaling(tmp_path: Path) -> None:
    (tmp_path / "processor_config.json").write_text(
        json.dumps({"image_processor": {"image_mean": [0.5, 0.4, 0.3], "image_std": 0.5, "rescale_factor": 1 / 255}})
    )
    assert normalisation(tmp_path) == Normalisation((0.5, 0.4, 0.3), (0.5, 0.5, 0.5))
    plain = tmp_path / "preprocessor_config.json"
    plain.write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "rescale_factor": 1 / 127.5}))
    mean, std = normalisation(tmp_path).mean, normalisation(tmp_path).std
    assert mean == pytest.approx((0.25,) * 3)  # (2 x - 0.5) / 0.5 = (x - 0.25) / 0.25
    assert std == pytest.approx((0.25,) * 3)
    plain.write_text(json.dumps({"do_normalize": False}))
    assert normalisation(tmp_path) == Normalisation((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


@pytest.mark.parametrize(
    "settings",
    [
        "[]",
        "{",
        "{}",
        "[" * 10**5,
        '{"image_mean": [0.5, 0.5], "image_std": 1}',
        '{"image_mean": 0, "image_std": 0}',
        f'{{"image_mean": {10**400}, "image_std": 1}}',
    ],
)
def test_unusable_normalisation_is_one_sentence(tmp_path: Path, settings: str) -> None:
    (tmp_path / "preprocessor_config.json").write_text(settings)
    with pytest.raises(InputError, match=r"preprocessor_config\.json"):
        normalisation(tmp_path)


def test_a_path_that_is_neither_folder_nor_hub_id(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no encoder folder"):
        locate_encoder(str(tmp_path / "absent"))
    assert locate_encoder(str(tmp_path)).revision is None
