"""From a recipe to codes through the command, in processes of their own as a user has them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

RECIPE = """\
codebooks:
  tiny:
    source:   {kind: folder, path: images}
    geometry: {mode: pad, size: 28}
    encoder:  {path: encoder, layer: 1}
    depth: 2
    size: 16
    iterations: 10
    minibatch: 64
    output: codebook
tokenize:
  tiny:
    source:    {kind: folder, path: images}
    geometry:  {mode: pad, size: 28}
    tokenizer: {kind: fitted, path: codebook}
    max_reject_rate: 0.1
    unit_size: 16
    output: tokens
"""


def asvr(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pipeline", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import Dinov2Config, Dinov2Model

    folder = tmp_path_factory.mktemp("recipe")
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_ratio": 2}
    Dinov2Model(Dinov2Config(image_size=28, patch_size=14, **shape)).save_pretrained(folder / "encoder")
    normalisation = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "rescale_factor": 1 / 255, "do_normalize": True}
    (folder / "encoder" / "preprocessor_config.json").write_text(json.dumps(normalisation))
    (folder / "images").mkdir()
    rng = np.random.default_rng(0)
    for number in range(39):
        pixels = rng.integers(0, 256, (30 + number, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{number:02}.png")
    (folder / "images" / "evil \x1b[2J.png").write_bytes(b"<html>")
    (folder / "r.yaml").write_text(RECIPE)
    return folder


def test_a_codebook_then_codes_then_nothing_to_do(folder: Path) -> None:
    fitted = asvr(folder, "fit-codebook", "r.yaml")
    assert fitted.returncode == 0, fitted.stderr
    assert "tiny: 2 depths fitted on 39 images, 1 rejected" in fitted.stdout
    assert fitted.stdout.splitlines()[1].split() == ["depth", "codes", "used", "perplexity", "error", "left"]
    assert "tiny, depth 2/2: 10/10 steps (100%)" in fitted.stderr

    dry = (
        "import sys\nfrom pipeline.cli import run\ncode = run(['tokenize', 'r.yaml', '--dry-run'])\n"
        "sys.exit(code or ', '.join({'torch', 'ray', 'transformers'} & set(sys.modules)) or 0)"
    )
    planned = subprocess.run([sys.executable, "-c", dry], cwd=folder, capture_output=True, text=True, timeout=60)
    assert (planned.returncode, planned.stderr) == (0, ""), planned.stderr
    assert "tiny: 40 new: 00.png, 01.png, 02.png, ..." in planned.stdout
    assert not (folder / "tokens").exists()

    trial = asvr(folder, "tokenize", "r.yaml", "--limit", "10")
    assert trial.returncode == 0, trial.stderr
    assert "tiny: trial of 16 images in " in trial.stdout
    assert "at that rate the 24 images that are left take " in trial.stdout
    assert not (folder / "tokens" / "manifest.json").exists()

    first = asvr(folder, "tokenize", "r.yaml")
    assert first.returncode == 0, first.stderr
    assert "40 images, 39 ok, 1 rejected" in first.stdout
    assert "tiny: 40/40 images (100%)" in first.stderr
    assert "24 new: " in first.stderr
    assert "\x1b" not in first.stdout + first.stderr
    manifest = (folder / "tokens" / "manifest.json").read_bytes()

    script = (
        "import sys\nfrom pipeline.cli import run\ncode = run(['tokenize', 'r.yaml'])\n"
        "sys.exit(code or ', '.join({'torch', 'ray', 'transformers'} & set(sys.modules)) or 0)"
    )
    again = subprocess.run([sys.executable, "-c", script], cwd=folder, capture_output=True, text=True, timeout=60)
    assert (again.returncode, again.stderr) == (0, ""), again.stderr
    assert again.stdout.startswith("tiny: nothing to do; 40 images, 39 ok, 1 rejected")
    assert (folder / "tokens" / "manifest.json").read_bytes() == manifest

    status = json.loads(asvr(folder, "status", "tokens", "--json").stdout)
    assert (status["state"], status["images"], status["ok"], status["rejected"], status["shards"]) == (
        "complete", 40, 39, 1, 3,
    )  # fmt: skip

    other = asvr(folder, "tokenize", "r.yaml", "--set", "tokenize.tiny.geometry.mode=squash")
    assert other.returncode == 5
    assert other.stderr.count("\n") == 1
    assert "geometry.mode" in other.stderr
