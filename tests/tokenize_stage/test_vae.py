"""`kind: vae`: the posterior that diffusers itself computes, from PNG files to shards of features."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_jobs import ROOT, content, job_config
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from tiny_vaes import LATENTS, SIZE, build, save

from manifests.decode import decode
from manifests.errors import InputError
from manifests.geometry import make_views
from manifests.reader import open_manifest
from manifests.schema import FeaturesSpec
from manifests.verify import verify
from tokenize_stage.config import TokenSetConfig, VaeTokenizer
from tokenize_stage.identities.vae import WEIGHTS
from tokenize_stage.identity import describe
from tokenize_stage.job import run_job
from tokenize_stage.tokenizers import load


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(build(), tmp_path_factory.mktemp("vae"))


def vae_job(pictures: Path, vae: Path, output: Path, **changes: Any) -> TokenSetConfig:
    return job_config(pictures, vae, output, tokenizer={"kind": "vae", "path": str(vae)}, **changes)


def posterior(model: Any, views_BSSC: torch.Tensor) -> torch.Tensor:
    """(B, P, 2C) from diffusers, with the pixels scaled in the plainest way."""
    pixels = views_BSSC.permute(0, 3, 1, 2).float() / 255 * 2 - 1
    with torch.no_grad():
        dist = model.encode(pixels).latent_dist
    return torch.cat([dist.mean, dist.logvar], dim=1).flatten(2).transpose(1, 2)


@pytest.mark.parametrize("changes", [{}, {"use_quant_conv": False}, {"mid_block_add_attention": False}])
def test_mean_and_log_variance_are_those_of_diffusers(tmp_path: Path, changes: dict[str, Any]) -> None:
    model = build(**changes)
    config = VaeTokenizer(path=str(save(model, tmp_path)), view_size=36)
    spec = describe(config).spec
    assert isinstance(spec, FeaturesSpec)
    assert (spec.kind, spec.view_size, spec.grid, spec.width) == ("vae", 36, (18, 18), 2 * LATENTS)
    assert (spec.settings["scaling_factor"], spec.settings["shift_factor"]) == (0.3611, 0.1159)
    views = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 36, 36, 3), np.uint8))
    producer = load(config, spec, dtype="float32", device="cpu")
    found = producer.encode(views)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, posterior(model, views), atol=1e-5, rtol=1e-5)
    assert torch.equal(found, producer.encode(views))  # nothing is sampled


def test_a_job_from_pictures_to_latents(pictures: Path, vae: Path, tmp_path: Path) -> None:
    config = vae_job(pictures, vae, tmp_path / "out")
    manifest = run_job(config).manifest
    assert manifest.kind == "features"
    assert manifest.geometry.background == (127, 127, 127)
    assert verify(tmp_path / "out").problems == []
    opened = open_manifest(tmp_path / "out")
    ids = opened.index()["image_id"].to_pylist()
    views = np.concatenate([make_views(decode((pictures / name).read_bytes()), manifest.geometry)[0] for name in ids])
    found = np.concatenate(opened.read_features(ids))
    assert found.shape == (20, (SIZE // 2) ** 2, 2 * LATENTS)
    np.testing.assert_allclose(found, posterior(build(), torch.from_numpy(views)).numpy(), atol=1e-4)
    before = content(tmp_path / "out")
    assert run_job(config).plan is None
    run_job(vae_job(pictures, vae, tmp_path / "again"))
    assert content(tmp_path / "again") == before


def test_the_old_names_of_attention_are_read(tmp_path: Path) -> None:
    """As in the weights of Stable Diffusion 1 and 2."""
    new, old = save(build(), tmp_path / "new"), save(build(), tmp_path / "old")
    weights = load_file(old / WEIGHTS)
    for name in list(weights):
        for now, then in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            if f".{now}." in name:
                weights[name.replace(now, then)] = weights.pop(name)
    save_file(weights, old / WEIGHTS)
    views = torch.full((1, SIZE, SIZE, 3), 77, dtype=torch.uint8)
    encoded = [
        load(config, describe(config).spec, dtype="float32", device="cpu").encode(views)
        for config in (VaeTokenizer(path=str(new)), VaeTokenizer(path=str(old)))
    ]
    assert torch.equal(*encoded)


def edit_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_class_name": "AutoencoderTiny"}, "is of a AutoencoderTiny: give the folder of an AutoencoderKL"),
        ({"in_channels": 4}, "in_channels is '4', not the 3 channels of a picture"),
        ({"block_out_channels": "many"}, "not a list of 1 to 12 widths"),
        ({"down_block_types": ["NoSuchBlock", "NoSuchBlock"]}, "is not the configuration of an AutoencoderKL"),
        ({"block_out_channels": [8, 24]}, "tensors of another shape than its configuration says"),
        ({"use_quant_conv": False}, "quant_conv"),
        ({"sample_size": 27}, "does not divide views of 27"),
    ],
)
def test_a_wrong_configuration_is_one_sentence(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    folder = save(build(), tmp_path)
    edit_config(folder, **changes)
    with pytest.raises(InputError, match=message) as caught:
        describe(VaeTokenizer(path=str(folder)))
    assert "\n" not in str(caught.value)


def test_wrong_weights_are_one_sentence(tmp_path: Path) -> None:
    folder = save(build(), tmp_path)
    weights = load_file(folder / WEIGHTS)
    config = VaeTokenizer(path=str(folder))
    save_file({**weights, "encoder.conv_in.bias": torch.full((8,), torch.inf)}, folder / WEIGHTS)
    spec = describe(config).spec
    with pytest.raises(InputError, match=r"NaN or infinity in 1 tensors \(encoder\.conv_in\.bias\)"):
        load(config, spec, dtype="float32", device="cpu")
    save_file({name: tensor for name, tensor in weights.items() if name != "encoder.conv_in.bias"}, folder / WEIGHTS)
    with pytest.raises(InputError, match=r"encoder\.conv_in\.bias"):
        describe(config)
    (folder / WEIGHTS).unlink()
    with pytest.raises(InputError, match=f"has no {WEIGHTS}: give the folder of an AutoencoderKL"):
        describe(config)


def test_a_vae_computes_in_float32(pictures: Path, vae: Path, tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="a VAE computes in float32"):
        vae_job(pictures, vae, tmp_path / "out", dtype="bfloat16")


WITHOUT_DIFFUSERS = """
import sys
sys.modules["diffusers"] = None  # what `import` finds for a package that is not there
from manifests.errors import EnvironmentProblem
from tokenize_stage.config import VaeTokenizer
from tokenize_stage.identity import describe
try:
    describe(VaeTokenizer(path=sys.argv[1]))
except EnvironmentProblem as error:
    print(error)
"""


def test_a_missing_package_is_one_sentence(vae: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_DIFFUSERS, str(vae)], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.splitlines() == ["the package diffusers is not installed; run: pip install 'asvr[vae]'"]
