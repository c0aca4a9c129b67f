"""An image walks the whole way, each stage started as its user would start it: by the command, from one recipe."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from users_folder import PICTURES, asvr, make_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("walk"))


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
