"""An image walks the whole way, each stage started as its user would start it: by the command, from one recipe."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from tiny_models import save_language_model, save_tower

PICTURES = 12
RECIPE = {
    "codebooks": {
        "tiny": {
            "source": {"kind": "folder", "path": "images"},
            "geometry": {"mode": "pad", "size": 28},
            "encoder": {"path": "tower", "layer": 2},
            "depth": 3,
            "size": 8,
            "images": 10,
            "iterations": 5,
            "output": "codebook",
        }
    },
    "tokenize": {
        "pictures": {
            "source": {"kind": "llava", "path": "talks.json", "image_root": "images"},
            "geometry": {"mode": "pad", "size": 28},
            "tokenizer": {"kind": "fitted", "path": "codebook"},
            "engine": "local",
            "unit_size": 5,
            "batch_size": 4,
            "output": "tokens",
        }
    },
    "train": {
        "output": "run",
        "precision": "float32",
        "model": {"language_model": "llama", "vision_tower": "tower", "vision_feature_layer": 2},
        "save_every": 2,
        "log_every": 1,
        "phases": [
            {
                "name": name,
                "data": [{"path": "talks.json", "image_root": "images"}],
                "manifests": ["pictures"],
                "objective": {"kind": "codes", "head": {"width": 16, "layers": 1, "heads": 2, "ffn": 24}},
                "batch_size": 4,
                "micro_batch_size": 2,
                "lr": 1e-3,
            }
            for name in ("pretrain", "instruct")
        ],
    },
}


def asvr(*arguments: str, cwd: Path, code: int = 0) -> str:
    """Run the command and return what it printed; its exit code must be `code`."""
    result = subprocess.run(
        [sys.executable, "-m", "pipeline", *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=300,
        check=False,
    )
    assert result.returncode == code, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    return result.stdout if code == 0 else result.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder: pictures, conversations about them, models and a recipe."""
    folder = tmp_path_factory.mktemp("walk")
    (folder / "images").mkdir()
    rng = np.random.default_rng(0)
    talks = []
    for number in range(PICTURES):
        pixels = rng.integers(0, 256, (30 + number, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{number}.png")
        turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": f"Picture {number}."}]
        talks.append({"id": str(number), "image": f"{number}.png", "conversations": turns})
    (folder / "talks.json").write_text(json.dumps(talks))
    save_tower("dinov2", folder / "tower")
    save_language_model(folder / "llama", tied=False)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE, sort_keys=False))
    return folder


def test_walk(folder: Path) -> None:
    # A codebook is missing, and the command says what to do about it.
    assert "fit-codebook" in asvr("tokenize", "recipe.yaml", cwd=folder, code=4)

    asvr("fit-codebook", "recipe.yaml", cwd=folder)
    asvr("tokenize", "recipe.yaml", cwd=folder)
    report = json.loads(asvr("verify", "tokens", "--json", cwd=folder))
    assert (report["images"], report["ok"], report["rejected"], report["shards"]) == (PICTURES, PICTURES, 0, 3)
    assert report["problems"] == []
    manifest = (folder / "tokens" / "manifest.json").read_bytes()
    asvr("tokenize", "recipe.yaml", cwd=folder)
    assert (folder / "tokens" / "manifest.json").read_bytes() == manifest

    assert f"trained in {folder / 'run'}; asvr export" in asvr("train", "recipe.yaml", cwd=folder)
    for phase in ("pretrain", "instruct"):
        steps = [json.loads(line) for line in (folder / "run" / phase / "metrics.jsonl").read_text().splitlines()]
        assert [step["step"] for step in steps] == [1, 2, 3]
    asvr("train", "recipe.yaml", cwd=folder)  # nothing left to do

    asvr("export", "run", cwd=folder)
    answer = subprocess.run(
        [sys.executable, "-c", PLAIN_TRANSFORMERS], cwd=folder, capture_output=True, text=True, check=True
    )
    assert json.loads(answer.stdout.splitlines()[-1])["modules_of_ours"] == []
    assert (folder / "run" / "export" / "visual_head.safetensors").is_file()


PLAIN_TRANSFORMERS = """
import json, sys
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration
model, report = LlavaForConditionalGeneration.from_pretrained("run/export", output_loading_info=True)
assert not report["missing_keys"] and not report["unexpected_keys"], report
processor = AutoProcessor.from_pretrained("run/export")
talk = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]
prompt = processor.apply_chat_template(talk, add_generation_prompt=True)
inputs = processor(images=Image.open("images/0.png"), text=prompt, return_tensors="pt")
tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False)
ours = sorted(name for name in sys.modules if name.split(".")[0] in
              ("manifests", "train_stage", "tokenize_stage", "pipeline"))
print(json.dumps({"tokens": tokens.shape[1], "modules_of_ours": ours}))
"""


def test_a_wrong_key_is_named_with_its_line(folder: Path) -> None:
    text = (folder / "recipe.yaml").read_text().replace("unit_size", "unit_sise")
    (folder / "wrong.yaml").write_text(text)
    line = text.splitlines().index("    unit_sise: 5") + 1
    said = asvr("tokenize", "wrong.yaml", cwd=folder, code=3)
    assert said.startswith(f"error: wrong.yaml:{line}: tokenize.pictures.unit_sise")
    assert "unit_size" in said
