"""A model that is shown codes instead of pixels: it trains, and its export says the same without this package."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_run
import tiny_set
import torch
from pages import ROOT, blocks

from manifests.errors import InputError
from manifests.schema import Geometry
from train_stage.config import TrainConfig
from train_stage.discrete_llava import CodeEmbedding, load
from train_stage.export import HEAD_FILE, export_llava
from train_stage.parts import load_trainable
from train_stage.prepare import Prepared, open_inputs, prepare
from train_stage.tensor_files import load_weights, save_tensors
from train_stage.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_model: Any) -> tuple[Path, TrainConfig]:
    """A tiny run whose phases are shown the codes that they also predict."""
    folder = tmp_path_factory.mktemp("discrete")
    made = tiny_run.make_config(folder, tiny_model("siglip", tied=True), pictures=6)
    values = made.model_dump(mode="json")
    for phase in values["phases"]:
        phase["input_codes"] = [str(folder / "tokens")]
    return folder, TrainConfig.model_validate(values)


def alone(config: TrainConfig, phase: str, **changes: Any) -> TrainConfig:
    values = config.model_dump(mode="json")
    values["phases"] = [own | changes for own in values["phases"] if own["name"] == phase]
    return TrainConfig.model_validate(values)


def trained(config: TrainConfig, phase: str) -> tuple[Prepared, list[float]]:
    """Three steps on all samples at once; the optimizer is the engine's, without the engine."""
    only = alone(config, phase)
    ready = prepare(only, only.phase(phase))
    optimizer = torch.optim.AdamW([p for p in ready.model.parameters() if p.requires_grad], lr=1e-2)
    batch = ready.collator(np.arange(len(ready.samples)))
    losses = []
    for _ in range(3):
        sums = ready.model(batch)
        loss = sums.total(sums.text_tokens, {"codes": sums.terms["codes"].targets}, {"codes": 1.0})
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return ready, losses


def test_it_trains_exports_and_reloads(
    run: tuple[Path, TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ASVR_CACHE", str(tmp_path / "cache"))
    _, config = run
    only = alone(config, "instruct")
    before = {
        name: p.detach().clone() for name, p in open_inputs(only, only.phase("instruct")).model.named_parameters()
    }
    ready, losses = trained(config, "instruct")
    assert losses[-1] < losses[0]
    still = [name for name, p in ready.model.named_parameters() if p.requires_grad and torch.equal(p, before[name])]
    assert not still
    for parameter in ready.model.vision_tower.parameters():
        parameter.data.fill_(float("nan"))  # it is not run

    # What a checkpoint keeps is enough to have the model again.
    own = dict(ready.model.named_parameters())
    save_tensors({name: own[name].detach() for name in ready.carried}, tmp_path / "weights.safetensors")
    again = open_inputs(only, only.phase("instruct")).model
    load_trainable(again, load_weights(tmp_path / "weights.safetensors"))
    tokenizer = load_tokenizer(config.model)
    export_llava(again.eval(), tokenizer, tiny_set.GEOMETRY, tmp_path / "out", chat_template="{{ messages }}")
    assert (tmp_path / "out" / HEAD_FILE).is_file()

    batch = ready.collator(np.array([2]))
    with torch.no_grad():
        ours = ready.model.eval().llava.lm_head(ready.model.hidden_states(batch))
    model, loaded_tokenizer = load(tmp_path / "out")
    with torch.no_grad():
        theirs = model(batch.input_ids, batch.targets["input_codes"])
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)
    assert loaded_tokenizer.chat_template == "{{ messages }}"

    np.savez(tmp_path / "in.npz", ids=batch.input_ids, codes=batch.targets["input_codes"], logits=ours)
    (page,) = blocks(ROOT / "docs" / "model.md", "python")
    code = f"""
import sys
import numpy as np, torch
read = {{name: torch.from_numpy(values) for name, values in np.load(sys.argv[1]).items()}}
input_ids, codes = read["ids"], read["codes"]
{page}
assert torch.allclose(logits, read["logits"], rtol=0, atol=1e-5)
assert model.generate(input_ids, codes, max_new_tokens=3, min_new_tokens=3).shape == (1, 3)
assert not [name for name in sys.modules if name.split(".")[0] in ("train_stage", "manifests", "deepspeed")]
"""
    command = [sys.executable, "-c", code, str(tmp_path / "in.npz")]
    done = subprocess.run(command, cwd=tmp_path / "out", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    settings = json.loads((tmp_path / "out" / "discrete_llava.json").read_text())
    assert settings["codebook_sizes"] == list(tiny_set.SIZES)
    with pytest.raises(ValueError, match="16 image tokens for codes of shape"):
        model(batch.input_ids, batch.targets["input_codes"][:0])


def test_its_weights_go_from_phase_to_phase_and_not_to_another_input(
    run: tuple[Path, TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ASVR_CACHE", str(tmp_path / "cache"))
    _, config = run
    first, second = (open_inputs(config, config.phase(name)).model for name in ("pretrain", "instruct"))
    weights = {name: p.detach() + 1 for name, p in first.named_parameters() if "multi_modal_projector" in name}
    load_trainable(second, weights)
    assert torch.equal(second.llava.model.multi_modal_projector.linear_1.weight, weights[PROJECTOR])
    pixels = alone(config, "instruct", input_codes=[])
    with pytest.raises(InputError, match=r"linear_1\.weight has shape \(32, 8\) in the earlier phase and \(32, 32\)"):
        load_trainable(open_inputs(pixels, pixels.phase("instruct")).model, weights)


PROJECTOR = "llava.model.multi_modal_projector.linear_1.weight"


def test_vectors_of_codes_are_summed_or_stand_side_by_side() -> None:
    books = [torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[10.0, 20.0], [30.0, 40.0], [50.0, 60.0]])]
    codes = torch.tensor([[[0, 2], [1, 0]]])
    assert CodeEmbedding(books, residual=True)(codes).tolist() == [[[51, 62], [13, 24]]]
    apart = CodeEmbedding(books, residual=False)
    assert apart(codes).tolist() == [[[1, 2, 50, 60], [3, 4, 10, 20]]]
    assert apart.width == 4


def test_what_cannot_be_shown_is_one_sentence(
    run: tuple[Path, TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ASVR_CACHE", str(tmp_path / "cache"))
    folder, config = run
    ids = sorted(path.name for path in (folder / "images").iterdir())
    tiles = Geometry(mode="anyres", size=28, grid_pinpoints=((28, 56),))
    tiny_set.save_manifest(tmp_path / "tiles", folder / "images", ids, geometry=tiles)
    tiny_set.save_manifest(tmp_path / "coarse", folder / "images", ids, grid=(2, 2))
    several = alone(config, "instruct", input_codes=[str(tmp_path / "tiles")], manifests=[str(tmp_path / "tiles")])
    with pytest.raises(InputError, match="takes one view an image"):
        open_inputs(several, several.phase("instruct"))
    coarse = alone(config, "instruct", input_codes=[str(tmp_path / "coarse")])
    with pytest.raises(InputError, match="has 2x2 positions a view and the vision tower makes 4x4"):
        open_inputs(coarse, coarse.phase("instruct"))
    with pytest.raises(ValueError, match="gives both vision_features and input_codes"):
        alone(config, "instruct", vision_features=["x"])
