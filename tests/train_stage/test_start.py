"""Where training starts from: a LLaVA that is there already, or the end of another run's phase."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from tiny_set import save_manifest, save_pictures

from manifests.errors import InputError
from manifests.schema import Geometry
from train_stage import checkpoint as checkpoints
from train_stage import config as configs
from train_stage.build import build_model
from train_stage.export import export_llava
from train_stage.model import AsvrModel
from train_stage.parts import NEWLINE_NAME
from train_stage.prepare import earlier_weights
from train_stage.tensor_files import save_tensors
from train_stage.tokenizer import load_tokenizer

VIEW = 28
PINPOINTS = ((28, 56), (56, 28))
SQUASH = Geometry(mode="squash", size=VIEW)
ANYRES = Geometry(mode="anyres", size=VIEW, background=(0, 0, 0), grid_pinpoints=PINPOINTS)
MakeConfig = Callable[..., configs.ModelConfig]


def build(model: configs.ModelConfig, geometry: Geometry = SQUASH, seed: int = 0) -> AsvrModel:
    return build_model(model, (), {}, torch.float32, view_size=VIEW, grid_pinpoints=geometry.grid_pinpoints, seed=seed)


def exported(output: Path, config: configs.ModelConfig, geometry: Geometry = SQUASH) -> AsvrModel:
    """A LLaVA in `output` that shares no weight with what the parts' own folders hold."""
    model = build(config, geometry, seed=5)
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter += 0.01 * (1 + number % 7)
    export_llava(model, load_tokenizer(config), geometry, output, chat_template="{{ messages }}")
    return model


class TestLlava:
    """`model.llava`."""

    @pytest.mark.parametrize("tied", [False, True])
    @pytest.mark.parametrize(("kind", "geometry"), [("siglip", SQUASH), ("clip", ANYRES), ("dinov2", SQUASH)])
    def test_every_weight_is_the_folder_s(
        self, tiny_model: MakeConfig, tmp_path: Path, kind: str, geometry: Geometry, tied: bool
    ) -> None:
        there = exported(tmp_path / "llava", tiny_model(kind, tied=tied), geometry)
        config = configs.ModelConfig(llava=str(tmp_path / "llava"))
        started = build(config, geometry)
        expected = dict(there.named_parameters())
        assert {name for name, _ in started.named_parameters()} == expected.keys()
        for name, parameter in started.named_parameters():
            assert torch.equal(parameter, expected[name]), name
        assert started.pixel_norm == there.pixel_norm
        assert (started.llava.lm_head.weight is started.llava.get_input_embeddings().weight) is tied
        # And on to the next export, file by file.
        export_llava(started, load_tokenizer(config), geometry, tmp_path / "again", chat_template="{{ messages }}")
        first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("llava", "again"))
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)

    def test_a_llava_becomes_a_llava_next_and_back(self, tiny_model: MakeConfig, tmp_path: Path) -> None:
        there = exported(tmp_path / "llava", tiny_model())
        started = dict(build(configs.ModelConfig(llava=str(tmp_path / "llava")), ANYRES).named_parameters())
        assert started.keys() - dict(there.named_parameters()).keys() == {NEWLINE_NAME}
        exported(tmp_path / "next", tiny_model(), ANYRES)
        one_view = build(configs.ModelConfig(llava=str(tmp_path / "next")))
        assert NEWLINE_NAME not in dict(one_view.named_parameters())

    def test_what_does_not_fit_is_one_sentence(self, tiny_model: MakeConfig, tmp_path: Path) -> None:
        place = tmp_path / "llava"
        exported(place, tiny_model("clip"))
        start = configs.ModelConfig(llava=str(place))
        with pytest.raises(InputError, match=r"reads layer -2 of its tower and model\.vision_feature_layer is -1"):
            build(start.model_copy(update={"vision_feature_layer": -1}))
        with pytest.raises(InputError, match=r"the tokenizer has .* for model\.image_token"):
            build(start.model_copy(update={"image_token": "?"}))
        language_model = tiny_model().language_model
        with pytest.raises(InputError, match=r"model\.llava is a llama in .*; give a llava or llava_next"):
            build(start.model_copy(update={"llava": language_model}))
        weights = load_file(place / "model.safetensors")
        del weights["multi_modal_projector.linear_2.bias"]
        save_file(weights, place / "model.safetensors", {"format": "pt"})
        with pytest.raises(InputError, match=r"lacks 1 weights, the first of them model\.multi_modal_projector"):
            build(start)
        settings = json.loads((place / "config.json").read_text())
        settings["vision_feature_select_strategy"] = "full"
        (place / "config.json").write_text(json.dumps(settings))
        save_file(weights | {"multi_modal_projector.linear_2.bias": torch.zeros(32)}, place / "model.safetensors")
        with pytest.raises(InputError, match="two-layer GELU projector of all patches"):
            build(start)

    def test_it_stands_for_language_model_and_tower(self) -> None:
        made = configs.ModelConfig.model_validate({"llava": "a/b"})
        assert (made.language_model, made.vision_tower) == ("a/b", "a/b")
        assert configs.ModelConfig.model_validate_json(made.model_dump_json()) == made
        with pytest.raises(ValidationError, match="model gives both llava and vision_tower"):
            configs.ModelConfig.model_validate({"llava": "a/b", "vision_tower": "c/d"})


class TestInitFrom:
    """`init_from: RUN/PHASE`."""

    @pytest.fixture
    def first(self, tiny_model: MakeConfig, tmp_path: Path) -> configs.TrainConfig:
        """A run whose only phase stands at its end."""
        ids = save_pictures(tmp_path / "images", 2)
        save_manifest(tmp_path / "tokens", tmp_path / "images", ids, geometry=SQUASH)
        (tmp_path / "data.json").write_text("[]")
        data = (configs.DataConfig(path=str(tmp_path / "data.json"), image_root=str(tmp_path / "images")),)
        phase = configs.PhaseConfig(
            name="pretrain", data=data, manifests=(str(tmp_path / "tokens"),), objective=configs.NoneObjective()
        )
        config = configs.TrainConfig(
            output=str(tmp_path / "first"), precision="float32", model=tiny_model(), phases=(phase,)
        )
        self.stop_at(config, 1, final=False)
        self.stop_at(config, 2, final=True)
        return config

    def stop_at(self, config: configs.TrainConfig, step: int, *, final: bool) -> None:
        model = build(config.model, seed=9)
        folder = config.phase_folder("pretrain")
        (folder / checkpoints.unfinished_name(step)).mkdir(parents=True)
        names = [name for name, _ in model.named_parameters() if "projector" in name]
        own = dict(model.named_parameters())
        weights = {name: own[name].detach() for name in names if name in own}
        save_tensors(weights, folder / checkpoints.unfinished_name(step) / checkpoints.WEIGHTS)
        settings = checkpoints.settings_of(config, "pretrain")
        checkpoints.commit(folder, step, final=final, world=1, settings=settings, config=config, keep_last=5)

    def test_the_first_phase_starts_with_the_weights_of_that_one(
        self, first: configs.TrainConfig, tmp_path: Path
    ) -> None:
        values = first.model_dump() | {
            "output": str(tmp_path / "second"),
            "init_from": str(tmp_path / "first/pretrain"),
        }
        second = configs.TrainConfig.model_validate(values)
        weights = earlier_weights(second, second.phase("pretrain"))
        expected = dict(build(first.model, seed=9).named_parameters())
        assert weights
        assert all(torch.equal(tensor, expected[name]) for name, tensor in weights.items())
        plain, started = (checkpoints.settings_of(config, "pretrain") for config in (first, second))
        assert plain["after"] is None
        assert started["after"] is not None, "what a run started from is one of its settings"
        assert {**plain, "after": 0} == {**started, "after": 0}

    def test_an_unfinished_phase_and_another_model_are_refused(
        self, first: configs.TrainConfig, tiny_model: MakeConfig, tmp_path: Path
    ) -> None:
        nowhere = first.model_copy(update={"init_from": str(tmp_path / "first")})
        with pytest.raises(InputError, match="where no phase has come to its end"):
            earlier_weights(nowhere, nowhere.phase("pretrain"))
        place = str(tmp_path / "first" / "pretrain")
        other = first.model_copy(update={"init_from": place, "model": tiny_model("clip")})
        with pytest.raises(InputError, match=re.escape(f"{place}, which was trained on another model (")):
            earlier_weights(other, other.phase("pretrain"))
