"""`kind: features`: what stands in the shards is what transformers computes, in the encoder's own dtype."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_jobs import ROOT, content, job_config, make_pictures, start_driver
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from tiny_encoders import MEAN, SIZE, STD, WIDTH, all_hidden_states, build, save

from manifests.decode import decode
from manifests.errors import FingerprintMismatch, InputError
from manifests.geometry import make_views
from manifests.reader import open_manifest
from manifests.schema import FeaturesSpec
from manifests.verify import verify
from tokenize_stage import sizes
from tokenize_stage.config import FeaturesTokenizer, TokenSetConfig
from tokenize_stage.encoder import VisionEncoder
from tokenize_stage.encoder_files import Normalisation
from tokenize_stage.identity import describe
from tokenize_stage.job import run_job
from tokenize_stage.tokenizers import load


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(build("dinov2"), tmp_path_factory.mktemp("encoder"))


def features_job(pictures: Path, encoder: Path, output: Path, **changes: Any) -> TokenSetConfig:
    settings = {"path": encoder, "layer": changes.pop("layer", -2), "dtype": changes.pop("encoder_dtype", "float32")}
    tokenizer = {"kind": "features", "encoder": {name: str(v) if name == "path" else v for name, v in settings.items()}}
    return job_config(pictures, encoder, output, tokenizer=tokenizer, **changes)


def some_views(count: int = 3) -> torch.Tensor:
    pixels = np.random.default_rng(1).integers(0, 256, (count, SIZE, SIZE, 3), np.uint8)
    return torch.from_numpy(pixels)


@pytest.mark.parametrize(("family", "prefix"), [("dinov2_registers", 5), ("siglip_two_towers", 0), ("clip", 1)])
@pytest.mark.parametrize("layer", [0, -2])
def test_they_are_the_hidden_states_of_transformers(tmp_path: Path, family: str, prefix: int, layer: int) -> None:
    model = build(family)
    config = FeaturesTokenizer.model_validate({"encoder": {"path": str(save(model, tmp_path)), "layer": layer}})
    spec = describe(config).spec
    assert isinstance(spec, FeaturesSpec)
    assert (spec.kind, spec.view_size, spec.grid, spec.width, spec.dtype) == (
        "features",
        SIZE,
        (4, 4),
        WIDTH,
        "float32",
    )
    producer = load(config, spec, dtype="float32", device="cpu")
    features = producer.encode(some_views())
    wanted = all_hidden_states(model, some_views())[layer][:, prefix:]
    assert features.dtype == torch.float32
    torch.testing.assert_close(features, wanted, atol=1e-5, rtol=1e-5)
    assert producer.codebooks() == []


def test_bfloat16_features_are_those_the_encoder_computes(dinov2: Path) -> None:
    settings = {"path": str(dinov2), "layer": 3, "dtype": "bfloat16"}
    config = FeaturesTokenizer.model_validate({"encoder": settings, "view_size": 42})
    spec = describe(config).spec
    assert spec.grid == (6, 6)
    views = torch.zeros(2, 42, 42, 3, dtype=torch.uint8) + 90
    features = load(config, spec, dtype="bfloat16", device="cpu").encode(views)
    encoder = VisionEncoder(
        dinov2,
        layer=3,
        view_size=42,
        normalisation=Normalisation(tuple(MEAN), tuple(STD)),
        dtype="bfloat16",
        device="cpu",
    )
    assert features.dtype == torch.bfloat16
    assert torch.equal(features.float(), encoder.features(views))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_job_from_pictures_to_features(
    pictures: Path, dinov2: Path, tmp_path: Path, dtype: str, caplog: pytest.LogCaptureFixture
) -> None:
    config = features_job(pictures, dinov2, tmp_path / "out", encoder_dtype=dtype)
    with caplog.at_level(logging.INFO):
        manifest = run_job(config).manifest
    assert (manifest.kind, manifest.totals.ok, manifest.totals.codes) == ("features", 20, 0)
    assert manifest.fingerprint_keys["dtype"] == manifest.fingerprint_keys["tokenizer"]["dtype"] == dtype
    assert manifest.fingerprint_keys["tokenizer"]["kind"] == "features"
    assert manifest.geometry.background == tuple(int(255 * mean) for mean in MEAN)
    assert verify(tmp_path / "out").problems == []
    size = {"float32": 4, "bfloat16": 2}[dtype] * 16 * WIDTH
    assert f"features in {dtype} take {size / 1e6:.3f} MB an image, " in caplog.text
    assert f"16 positions x {WIDTH} features a view" in caplog.text

    opened = open_manifest(tmp_path / "out")
    ids = opened.index()["image_id"].to_pylist()
    views = [make_views(decode((pictures / name).read_bytes()), manifest.geometry)[0] for name in ids]
    model = build("dinov2")
    wanted = all_hidden_states(model, torch.from_numpy(np.concatenate(views)))[-2][:, 1:].numpy()
    found = np.concatenate(opened.read_features(ids))
    assert found.shape == (20, 16, WIDTH)
    assert found.dtype == np.float32
    assert np.abs(found - wanted).max() < {"float32": 1e-4, "bfloat16": 0.1}[dtype]


def test_a_second_run_does_nothing_without_torch_and_another_dtype_is_another_set(
    pictures: Path, dinov2: Path, tmp_path: Path
) -> None:
    config = features_job(pictures, dinov2, tmp_path / "out", encoder_dtype="bfloat16")
    run_job(config)
    code = (
        "import sys; from tokenize_stage.config import TokenSetConfig; from tokenize_stage.job import run_job\n"
        "result = run_job(TokenSetConfig.model_validate_json(sys.argv[1]))\n"
        "print(result.plan, {'torch', 'ray', 'transformers', 'diffusers'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, config.model_dump_json()], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.strip() == "None set()"
    with pytest.raises(FingerprintMismatch, match=r"tokenizer\.dtype"):
        run_job(features_job(pictures, dinov2, tmp_path / "out"))
    with pytest.raises(FingerprintMismatch, match=r"tokenizer\.settings\.layer"):
        run_job(features_job(pictures, dinov2, tmp_path / "out", encoder_dtype="bfloat16", layer=1))


def test_a_killed_job_goes_on_and_ends_with_the_same_bytes(dinov2: Path, tmp_path: Path) -> None:
    pictures = make_pictures(tmp_path / "pictures", 40)
    run_job(features_job(pictures, dinov2, tmp_path / "whole", unit_size=4))
    config = features_job(pictures, dinov2, tmp_path / "killed", unit_size=4)
    driver = start_driver(config)
    while not list((tmp_path / "killed").glob("commits/*.zst")) and driver.poll() is None:
        pass
    driver.kill()
    driver.communicate()
    result = run_job(config)
    assert result.encoded < 40
    assert content(tmp_path / "killed") == content(tmp_path / "whole")


def test_a_rewritten_unit_copies_the_features_that_stand(pictures: Path, dinov2: Path, tmp_path: Path) -> None:
    config = features_job(pictures, dinov2, tmp_path / "out", encoder_dtype="bfloat16")
    before = run_job(config).manifest
    name = open_manifest(tmp_path / "out").index()["image_id"][2].as_py()
    (pictures / name).write_bytes(b"not a picture")
    result = run_job(config.model_copy(update={"max_reject_rate": 0.5}))
    assert (result.encoded, result.copied, result.manifest.totals.rejected) == (1, 7, 1)
    assert result.manifest.shards[1:] == before.shards[1:]
    assert verify(tmp_path / "out").problems == []


@pytest.mark.usefixtures("ray_cluster")
def test_ray_gives_the_bytes_of_the_local_engine(
    pictures: Path, dinov2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The encoder's path is relative to a folder in which no worker was started."""
    save(build("siglip"), tmp_path / "encoder")
    monkeypatch.chdir(tmp_path)
    run_job(features_job(pictures, Path("encoder"), Path("local"), encoder_dtype="bfloat16"))
    run_job(features_job(pictures, Path("encoder"), Path("ray"), encoder_dtype="bfloat16", engine="ray"))
    assert content(tmp_path / "ray") == content(tmp_path / "local")


def test_units_are_cut_to_what_a_worker_can_hold(
    pictures: Path, dinov2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sizes, "MOST_UNIT_BYTES", 3 * 16 * WIDTH * 4)
    manifest = run_job(features_job(pictures, dinov2, tmp_path / "out")).manifest
    assert [shard.rows for shard in manifest.shards] == [3] * 6 + [2]


def test_the_dtype_is_said_once(pictures: Path, dinov2: Path, tmp_path: Path) -> None:
    config = features_job(pictures, dinov2, tmp_path / "out", encoder_dtype="bfloat16", dtype="bfloat16")
    assert config.compute_dtype == "bfloat16"
    assert TokenSetConfig.model_validate_json(config.model_dump_json()) == config
    with pytest.raises(ValidationError, match=r"dtype is float32, tokenizer.encoder.dtype bfloat16: leave out dtype"):
        features_job(pictures, dinov2, tmp_path / "out", encoder_dtype="bfloat16", dtype="float32")


def test_what_is_wrong_with_an_encoder_is_one_sentence(pictures: Path, dinov2: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"takes views of 28 pixels, not 56: set geometry\.size to 28"):
        run_job(features_job(pictures, dinov2, tmp_path / "out", geometry={"mode": "pad", "size": 56}))
    with pytest.raises(InputError, match="layer 9 does not exist"):
        run_job(features_job(pictures, dinov2, tmp_path / "out", layer=9))
    broken = save(build("dinov2"), tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    weights["encoder.layer.0.mlp.fc1.bias"][0] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="makes features that are NaN or infinite"):
        run_job(features_job(pictures, broken, tmp_path / "out"))
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "image_size": [28, 42]}))
    with pytest.raises(InputError, match=r"does not say which square size it takes: set tokenizer\.view_size"):
        run_job(features_job(pictures, broken, tmp_path / "other"))
