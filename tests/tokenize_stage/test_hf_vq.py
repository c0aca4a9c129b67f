from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_vq_models as tiny
import torch
from safetensors.torch import load_file, save_file

from manifests.errors import InputError
from manifests.schema import Geometry
from tokenize_stage.config import HfVqTokenizer
from tokenize_stage.identity import describe, identify
from tokenize_stage.tokenizers import load
from tokenize_stage.tokenizers.base import Tokenizer

SIZE = 24
EDGE = SIZE // tiny.STRIDE
ROOT = Path(__file__).parents[2]
WEIGHTS = "model.safetensors"
CASES = [(family, whole) for family in tiny.FAMILIES for whole in (False, True) if whole or family != "glm_image"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, bool], tuple[Path, Any]]:
    """The folder and the model of a case, made once."""
    made: dict[tuple[str, bool], tuple[Path, Any]] = {}

    def folder(family: str, whole: bool) -> tuple[Path, Any]:
        if (family, whole) not in made:
            model = (tiny.build_whole if whole else tiny.build_alone)(family)
            made[family, whole] = tiny.save(model, tmp_path_factory.mktemp(family)), model
        return made[family, whole]

    return folder


Folders = Callable[[str, bool], tuple[Path, Any]]


def configured(folder: Path, **changes: Any) -> HfVqTokenizer:
    return HfVqTokenizer.model_validate({"path": str(folder), "view_size": SIZE, **changes})


def load_from(folder: Path, **changes: Any) -> Tokenizer:
    config = configured(folder, **changes)
    return load(config, describe(config).spec, dtype="float32", device="cpu")


def views(count: int = 3, size: int = SIZE) -> torch.Tensor:
    return torch.randint(0, 256, (count, size, size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("family", "whole"), CASES)
def test_codes_are_those_of_transformers_own_encode(folders: Folders, family: str, whole: bool) -> None:
    folder, model = folders(family, whole)
    tokenizer = load_from(folder)
    codes = tokenizer.encode(views())
    assert codes.dtype == torch.int32
    assert codes.shape == (3, EDGE * EDGE, 1)
    vq = model if not whole or family == "glm_image" else model.model.vqmodel
    wanted = tiny.codes_of_transformers(family, vq, views())
    assert len(set(wanted.flatten().tolist())) > 10
    assert torch.equal(codes[..., 0].long(), wanted)
    assert tokenizer.fallbacks == 0


@pytest.mark.parametrize(("family", "whole"), CASES)
def test_the_spec_and_the_codebook_that_is_searched(folders: Folders, family: str, whole: bool) -> None:
    folder, model = folders(family, whole)
    config = configured(folder)
    identity = identify(config, Geometry(mode="squash", size=SIZE))
    spec = identity.spec
    assert (spec.grid, spec.codebook_sizes, spec.code_dim) == ((EDGE, EDGE), (tiny.CODES,), 6)
    assert spec.settings["image_mean"] == pytest.approx(tiny.MEAN)
    assert spec.settings["image_std"] == pytest.approx(tiny.STD)
    assert set(spec.weights_sha256) == {"config", WEIGHTS}
    table = (model.model.vqmodel if whole else model).quantize.embedding.weight.detach()
    if family == "glm_image":
        table = torch.nn.functional.normalize(table, dim=-1)
    for books in (identity.codebooks(), load_from(folder).codebooks()):
        (book,) = books
        np.testing.assert_allclose(book, table.numpy(), rtol=1e-6, atol=1e-7)


def test_default_view_sizes_are_the_models_own(folders: Folders) -> None:
    """Chameleon's resolution; Janus's patches, which a whole Janus has from its other tower; 512 where any size goes."""
    found = {
        case: describe(configured(folders(*case)[0], view_size=None)).spec.view_size for case in CASES
    }  # fmt: skip
    assert found == {
        ("chameleon", False): 16, ("chameleon", True): 16, ("emu3", False): 512, ("emu3", True): 512,
        ("janus", False): 20, ("janus", True): 24, ("glm_image", True): 512,
    }  # fmt: skip


def test_another_view_size_is_another_grid(folders: Folders) -> None:
    folder, model = folders("glm_image", True)
    codes = load_from(folder, view_size=16).encode(views(2, 16))
    assert torch.equal(codes[..., 0].long(), tiny.codes_of_transformers("glm_image", model, views(2, 16)))


def test_bfloat16_changes_the_encoder_and_not_the_codebook(folders: Folders) -> None:
    for family in tiny.FAMILIES:
        config = configured(folders(family, True)[0])
        low = load(config, describe(config).spec, dtype="bfloat16", device="cpu")
        full = load(config, describe(config).spec, dtype="float32", device="cpu")
        assert np.array_equal(low.codebooks()[0], full.codebooks()[0])
        assert (low.encode(views()) == full.encode(views())).float().mean() > 0.5


def test_chameleon_s_default_normalisation_is_its_image_processor_s(folders: Folders, tmp_path: Path) -> None:
    from transformers import ChameleonImageProcessorPil

    folder = shutil.copytree(folders("chameleon", True)[0], tmp_path / "chameleon")
    (folder / "preprocessor_config.json").unlink()
    settings = describe(configured(folder)).spec.settings
    view = views(1)[0].numpy()
    processor = ChameleonImageProcessorPil(do_resize=False, do_center_crop=False)
    wanted = processor(view, return_tensors="np")["pixel_values"][0]
    found = (view / 255 - settings["image_mean"]) / settings["image_std"]
    np.testing.assert_allclose(found.transpose(2, 0, 1), wanted, atol=1e-6)


def test_without_a_preprocessor_the_recipe_has_to_name_one(folders: Folders, tmp_path: Path) -> None:
    folder = shutil.copytree(folders("emu3", False)[0], tmp_path / "emu3")
    preprocessor = shutil.move(folder / "preprocessor_config.json", tmp_path)
    assert "set preprocessor to a file" in refusal(folder)
    named = configured(folder, preprocessor=str(preprocessor))
    assert describe(named).spec.settings["image_std"] == pytest.approx(tiny.STD)


def test_of_a_whole_model_only_the_files_with_the_vq_model_are_opened(folders: Folders, tmp_path: Path) -> None:
    whole, model = folders("chameleon", True)
    folder = tiny.save(model, tmp_path / "sharded", max_shard_size="40KB")
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    own = {file for key, file in index.items() if ".vqmodel." in key}
    others = set(index.values()) - own
    assert others
    for file in others:
        (folder / file).write_bytes(b"of no use here")
    assert set(describe(configured(folder)).spec.weights_sha256) == {"config", *own}
    assert torch.equal(load_from(folder).encode(views()), load_from(whole).encode(views()))
    (folder / sorted(own)[0]).unlink()
    assert "has no model-" in refusal(folder)


def test_the_way_back_to_pixels_may_be_missing(folders: Folders, tmp_path: Path) -> None:
    folder = shutil.copytree(folders("janus", False)[0], tmp_path / "janus")
    state = load_file(folder / WEIGHTS)
    kept = {key: tensor for key, tensor in state.items() if not key.startswith(("decoder.", "post_quant_conv."))}
    assert len(kept) < len(state)
    save_file(kept, folder / WEIGHTS)
    assert torch.equal(load_from(folder).encode(views()), load_from(folders("janus", False)[0]).encode(views()))


def refusal(folder: Path, **changes: Any) -> str:
    """The one sentence with which a folder is refused before any job is planned."""
    with pytest.raises(InputError) as error:
        describe(configured(folder, **changes))
    assert "\n" not in str(error.value)
    return str(error.value)


def rename(state: dict[str, torch.Tensor], old: str, new: str) -> dict[str, torch.Tensor]:
    return {key.replace(old, new): tensor for key, tensor in state.items()}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda state: {key: tensor for key, tensor in state.items() if "quant_conv" not in key}, "lacks 2 of the"),
        (lambda state: rename(state, "encoder.mid", "encoder.middle"), "lacks .* and holds .* unknown"),
        (lambda state: {**state, "quantize.ema": torch.zeros(1)}, "neither needed .* ignored: pixel decoder"),
        (lambda state: {**state, "quantize.embedding.weight": torch.zeros(41, 6)}, r"\(41, 6\), not \(40, 6\)"),
    ],
)
def test_tensors_that_are_missing_unknown_or_of_another_shape(
    folders: Folders, tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], reason: str
) -> None:
    folder = shutil.copytree(folders("janus", False)[0], tmp_path / "janus")
    save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS)
    with pytest.raises(InputError, match=reason):
        describe(configured(folder))
    assert refusal(folder)


def test_values_that_are_not_finite_and_files_that_are_cut_off(folders: Folders, tmp_path: Path) -> None:
    folder = shutil.copytree(folders("chameleon", False)[0], tmp_path / "chameleon")
    state = load_file(folder / WEIGHTS)
    state["encoder.conv_in.weight"][0, 0, 0, 0] = torch.nan
    save_file(state, folder / WEIGHTS)
    with pytest.raises(InputError, match=r"NaN or infinity in 1 tensors \(encoder.conv_in.weight\)"):
        load_from(folder)
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100])
    assert "cut off" in refusal(folder)


def test_models_of_another_kind(folders: Folders, tmp_path: Path) -> None:
    part = tiny.save(tiny.build_alone("glm_image"), tmp_path / "part")
    assert "give the folder that holds both" in refusal(part)
    merging = tiny.save(tiny.build_whole("glm_image", spatial_merge_size=2), tmp_path / "merging")
    assert "merges neighbouring positions" in refusal(merging)
    other = shutil.copytree(folders("janus", False)[0], tmp_path / "other")
    values = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**values, "model_type": "llama"}))
    assert "is of a llama" in refusal(other)
    (other / "config.json").write_text(json.dumps({**values, "channel_multiplier": "many"}))
    assert "does not describe a VQ model" in refusal(other)
    values["channel_multiplier"] = [1, 1, 2]
    (other / "config.json").write_text(json.dumps({**values, "num_patches": "many"}))
    assert "does not describe a VQ model" in refusal(other, view_size=None)
    assert "set view_size to 24" in refusal(folders("janus", False)[0], view_size=26)
    with pytest.raises(InputError, match="takes views of 24 pixels, not 16"):
        identify(configured(folders("janus", False)[0]), Geometry(mode="squash", size=16))


SCRIPT = """
import sys
from tokenize_stage.config import HfVqTokenizer
from tokenize_stage.identity import describe
print(describe(HfVqTokenizer(path=sys.argv[1], view_size=24)).spec.grid)
print(sorted({"torch", "transformers"} & set(sys.modules)))
"""


def test_a_rerun_imports_no_torch(folders: Folders) -> None:
    folder = folders("janus", True)[0]
    describe(configured(folder))
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder)], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.splitlines() == ["(6, 6)", "[]"]


def test_a_folder_of_a_pinned_hub_model_needs_no_network_and_no_other_weights(folders: Folders, tmp_path: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = tmp_path / "hub" / "models--owner--name" / "snapshots" / commit
    folder = tiny.save(folders("glm_image", True)[1], snapshot / "encoder", max_shard_size="8KB")
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    own = {file for key, file in index.items() if ".vqmodel." in key or ".visual." in key}
    for file in set(index.values()) - own:
        (folder / file).unlink()
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, f"hf://owner/name@{commit}/encoder"],
        capture_output=True, text=True, check=True, cwd=ROOT, env=environment,
    )  # fmt: skip
    assert done.stdout.splitlines()[0] == "(6, 6)"
