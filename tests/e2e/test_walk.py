"""An image walks the whole way, each stage started as its user would start it: by the command, from one recipe."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from users_folder import PICTURES, asvr, make_folder


def test_walk(trained: Path) -> None:
    report = json.loads(asvr("verify", "tokens", "--json", cwd=trained))
    assert (report["images"], report["ok"], report["rejected"], report["shards"]) == (PICTURES, PICTURES, 0, 3)
    assert report["problems"] == []
    manifest = (trained / "tokens" / "manifest.json").read_bytes()
    asvr("tokenize", "recipe.yaml", cwd=trained)
    assert (trained / "tokens" / "manifest.json").read_bytes() == manifest

    asvr("train", "recipe.yaml", cwd=trained)  # nothing is left to do
    for phase in ("pretrain", "instruct"):
        steps = [json.loads(line) for line in (trained / "run" / phase / "metrics.jsonl").read_text().splitlines()]
        assert [step["step"] for step in steps] == [1, 2, 3]

    answer = subprocess.run(
        [sys.executable, "-c", PLAIN_TRANSFORMERS], cwd=trained, capture_output=True, text=True, check=True
    )
    assert json.loads(answer.stdout.splitlines()[-1])["modules_of_ours"] == []
    assert (trained / "run" / "export" / "visual_head.safetensors").is_file()


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


def test_a_missing_codebook_and_a_wrong_key_are_named(tmp_path: Path) -> None:
    folder = make_folder(tmp_path)
    assert "fit-codebook" in asvr("tokenize", "recipe.yaml", cwd=folder, code=4)
    text = (folder / "recipe.yaml").read_text().replace("unit_size", "unit_sise")
    (folder / "wrong.yaml").write_text(text)
    line = text.splitlines().index("    unit_sise: 5") + 1
    said = asvr("tokenize", "wrong.yaml", cwd=folder, code=3)
    assert said.startswith(f"error: wrong.yaml:{line}: tokenize.pictures.unit_sise")
    assert "unit_size" in said
