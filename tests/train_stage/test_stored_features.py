"""`vision_features`: losses are those of the tower run in every step, and other features are not believed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_run
import tiny_set
import torch

from manifests.errors import InputError
from manifests.schema import Geometry
from tokenize_stage.config import TokenSetConfig
from tokenize_stage.job import run_job
from train_stage import tower
from train_stage.config import TrainConfig
from train_stage.prepare import Prepared, prepare

VIEW = 28
ANYRES = Geometry(mode="anyres", size=VIEW, background=(0, 0, 0), grid_pinpoints=((28, 56), (56, 28), (56, 56)))


def tokenize(folder: Path, encoder: str, geometry: Geometry, *, layer: int = -2, dtype: str = "float32") -> str:
    """A set of features made by the tokenize stage."""
    output = folder / f"features_{Path(encoder).name}_{geometry.mode}_{layer}_{dtype}"
    config = {
        "source": {"kind": "folder", "path": str(folder / "images")},
        "geometry": geometry.model_dump(mode="json"),
        "tokenizer": {"kind": "features", "encoder": {"path": encoder, "layer": layer, "dtype": dtype}},
        "output": str(output),
        "device": "cpu",
    }
    run_job(TokenSetConfig.model_validate(config))
    return str(output)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_model: Any) -> tuple[Path, TrainConfig]:
    folder = tmp_path_factory.mktemp("stored")
    config = tiny_run.make_config(folder, tiny_model("clip"), pictures=6)
    ids = sorted(path.name for path in (folder / "images").iterdir())
    tiny_set.save_manifest(folder / "tiles", folder / "images", ids, geometry=ANYRES)
    return folder, config


def prepared(config: TrainConfig, phase: str = "instruct", **changes: Any) -> Prepared:
    values = config.model_dump(mode="json")
    values["phases"] = [own | changes for own in values["phases"] if own["name"] == phase]
    changed = TrainConfig.model_validate(values)
    return prepare(changed, changed.phase(phase))


@pytest.mark.parametrize("geometry", [tiny_set.GEOMETRY, ANYRES], ids=["pad", "anyres"])
def test_losses_are_those_of_the_tower(
    run: tuple[Path, TrainConfig], geometry: Geometry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ASVR_CACHE", str(tmp_path / "cache"))
    folder, config = run
    features = tokenize(folder, config.model.vision_tower, geometry)
    codes = str(folder / ("tiles" if geometry is ANYRES else "tokens"))
    computed = prepared(config, manifests=[codes])
    read = prepared(config, manifests=[codes], vision_features=[features])
    for parameter in read.model.vision_tower.parameters():
        parameter.data.fill_(math.nan)  # it is not run
    chosen = np.arange(len(read.samples))
    assert len(read.samples) == len(computed.samples)
    for part in (chosen, chosen[-2:], np.empty(0, dtype=np.int64)):  # some without pictures, and the fill
        ours, theirs = (own.model(own.collator(part)) for own in (read, computed))
        assert ours.text_tokens == theirs.text_tokens
        torch.testing.assert_close(ours.text_loss_sum, theirs.text_loss_sum, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(
            ours.terms["codes"].loss_sum_D, theirs.terms["codes"].loss_sum_D, rtol=1e-5, atol=1e-6
        )


def test_bfloat16_features_are_close_and_their_set_is_taken(
    run: tuple[Path, TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ASVR_CACHE", str(tmp_path / "cache"))
    folder, config = run
    features = tokenize(folder, config.model.vision_tower, tiny_set.GEOMETRY, dtype="bfloat16")
    read = prepared(config, vision_features=[features])
    chosen = np.arange(len(read.samples))
    batch = read.collator(chosen)
    stored = batch.targets["vision_features"]
    layer = read.model.llava.config.vision_feature_layer
    computed = tower.patch_features(read.model.vision_tower, read.model.pixel_norm(batch.views), [layer])[layer]
    assert stored.dtype == torch.bfloat16
    assert (stored.float() - computed).norm() / computed.norm() < 0.03


def test_features_of_another_layer_encoder_or_geometry_are_refused(
    run: tuple[Path, TrainConfig], tiny_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ASVR_CACHE", str(tmp_path / "cache"))
    folder, config = run
    own = config.model.vision_tower
    with pytest.raises(InputError, match="have layer 1 and the vision tower 3"):
        prepared(config, vision_features=[tokenize(folder, own, tiny_set.GEOMETRY, layer=1)])
    # The same form and normalisation, but other weights: only a look at the numbers tells.
    with pytest.raises(InputError, match=r"not what model\.vision_tower makes of the same pictures"):
        prepared(config, vision_features=[tokenize(folder, tiny_model("vit").vision_tower, tiny_set.GEOMETRY)])
    with pytest.raises(InputError, match="no set of an encoder's features"):
        prepared(config, vision_features=[str(folder / "tokens")])
    with pytest.raises(InputError, match="but its vision_features have"):
        prepared(config, vision_features=[tokenize(folder, own, ANYRES)])


def test_a_term_that_looks_into_the_tower_needs_it(run: tuple[Path, TrainConfig]) -> None:
    _, config = run
    with pytest.raises(ValueError, match="reads vision_features instead of running the tower, which objective align"):
        prepared(config, objective={"kind": "align", "tower_layer": -1}, vision_features=["x"])
