"""QLIP against numbers computed with its public implementation."""

from __future__ import annotations

import json
from pathlib import Path

import golden_files
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden_files import close, random_views, read_golden, run_python
from made_jobs import MEAN, STD, job_config, make_pictures
from qlip_files import FIXTURE, ROPE, TOWER, complete, features, load_from
from safetensors.torch import load_file, save_file

from manifests.errors import InputError
from manifests.reader import open_manifest
from manifests.schema import Geometry
from manifests.verify import verify
from tokenize_stage.config import QlipTokenizer
from tokenize_stage.identities.qlip import implicit_codebooks
from tokenize_stage.identity import describe, identify
from tokenize_stage.job import run_job
from tokenize_stage.tokenizers.eva_vit import rope_tables
from tokenize_stage.tokenizers.qlip import Qlip, binarise, group, normalised

cache = golden_files.cache
SIZE, GRID, BITS = 64, (4, 4), 28


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return complete(tmp_path_factory.mktemp("model") / "qlip")


@pytest.fixture(scope="module")
def qlip(folder: Path) -> Qlip:
    return load_from(folder)


def test_every_stage_and_every_bit_is_the_reference_s(qlip: Qlip) -> None:
    golden = read_golden(FIXTURE)
    hidden_BPn = qlip.encoder.hidden(golden["pixel_values"])
    close(hidden_BPn, golden["encoder_features"], atol=5e-5)
    features_BPE = qlip.encoder.project(hidden_BPn)
    close(features_BPE, golden["features"], atol=5e-5)
    close(normalised(features_BPE), golden["features_normalised"], atol=1e-5)
    bits_BPE = binarise(normalised(features_BPE))
    assert torch.equal(bits_BPE, golden["bits"])
    assert torch.equal(group(bits_BPE, 28), golden["ids"])
    assert torch.equal(group(bits_BPE, 14), golden["ids_two_halves"])
    # The public code's own sums, taken in float32, are other numbers.
    assert not torch.equal(group(bits_BPE, 28), golden["ids_reference_float"])


@torch.inference_mode()
def test_the_class_token_is_the_reference_s_too(qlip: Qlip) -> None:
    """Codes do not use it; it tells what the patches cannot: that the token they attend to is right in every block."""
    golden = read_golden(FIXTURE)
    outputs: list[torch.Tensor] = []
    tower = qlip.encoder._model
    hook = tower.encoder["layers"][-1].register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
    hidden_BPn = qlip.encoder.hidden(golden["pixel_values"])
    hook.remove()
    assert torch.equal(outputs[0][:, 1:], hidden_BPn)
    stored = {name: tensor.float() for name, tensor in load_file(FIXTURE / "model.safetensors").items()}
    weight, bias = (stored[f"{TOWER}post_layernorm.{name}"] for name in ("weight", "bias"))
    eps = json.loads((FIXTURE / "config.json").read_text())["vision_config"]["layer_norm_eps"]
    pooled_Bn = F.layer_norm(outputs[0][:, 0], weight.shape, weight, bias, eps)
    close(pooled_Bn, golden["pooled"], atol=5e-5)


def test_the_quantiser_alone_is_the_reference_s() -> None:
    golden = read_golden(FIXTURE)
    bits = binarise(normalised(golden["bsq_input"]))
    assert torch.equal(bits, golden["bsq_bits"])
    assert torch.equal(group(bits, 28), golden["bsq_ids"])


def test_codes_stand_for_the_reference_s_vectors(qlip: Qlip) -> None:
    golden = read_golden(FIXTURE)
    ids = golden["ids_two_halves"].long()
    vectors = [torch.from_numpy(book)[ids[..., d]] for d, book in enumerate(qlip.codebooks())]
    quant = torch.cat(vectors, -1)
    close(quant, golden["quant"], atol=1e-6)
    after = {name: tensor.float() for name, tensor in load_file(FIXTURE / "model.safetensors").items()}
    inner, outer = (f"{TOWER}quant_embed_post.{name}" for name in ("c_fc", "c_proj"))
    hidden = F.gelu(F.linear(quant, after[f"{inner}.weight"], after[f"{inner}.bias"]))
    close(F.linear(hidden, after[f"{outer}.weight"], after[f"{outer}.bias"]), golden["post_features"], atol=5e-5)


def test_the_first_bit_is_the_most_significant_and_zero_gives_zero() -> None:
    assert binarise(torch.tensor([[0.5, -0.1, 0.0, -0.0, 2.0]])).tolist() == [[1, 0, 0, 0, 1]]
    assert group(torch.tensor([[1, 0, 0, 1, 1, 0]], dtype=torch.int32), 3).tolist() == [[4, 6]]
    book = implicit_codebooks(6, 3)[1]
    assert np.sign(book[4]).tolist() == [1, -1, -1]
    assert np.allclose(np.linalg.norm(np.concatenate([book[4], book[6]])), 1)


@pytest.mark.parametrize("size", [1, 2, 4, 7, 14])
def test_any_grouping_keeps_the_same_bits(folder: Path, size: int) -> None:
    tokenizer = load_from(folder, group_bits=size)
    depth = BITS // size
    assert tokenizer.spec.codebook_sizes == (2**size,) * depth
    assert tokenizer.spec.code_dim == size
    assert tokenizer.spec.settings["group_bits"] == size
    codes = group(binarise(features(tokenizer)), size)
    vectors = [torch.from_numpy(book)[codes[..., d].long()] for d, book in enumerate(tokenizer.codebooks())]
    assert torch.equal(binarise(torch.cat(vectors, -1)), read_golden(FIXTURE)["bits"])


def test_views_are_normalised_by_the_preprocessor_s_values(qlip: Qlip) -> None:
    codes = qlip.encode(random_views(3, SIZE))
    assert codes.dtype == torch.int32
    assert codes.shape == (3, 16, 2)
    pixels = (
        ((random_views(3, SIZE).float() / 255 - torch.tensor(MEAN)) / torch.tensor(STD))
        .permute(0, 3, 1, 2)
        .contiguous()
    )
    features_BPE = qlip.encoder.project(qlip.encoder.hidden(pixels))
    assert torch.equal(codes, group(binarise(features_BPE), 14))
    assert qlip.fallbacks == 0


def test_features_that_are_not_finite_are_refused() -> None:
    with pytest.raises(InputError, match="NaN"):
        normalised(torch.tensor([1.0, float("nan")]))


def test_the_spec_says_what_the_codes_are(qlip: Qlip) -> None:
    spec = qlip.spec
    assert (spec.kind, spec.view_size, spec.grid, spec.residual) == ("qlip", SIZE, GRID, False)
    assert (spec.codebook_sizes, spec.code_dim) == ((16384, 16384), 14)
    assert spec.settings == {"bits": 28, "group_bits": 14, "image_mean": list(MEAN), "image_std": list(STD)}
    assert set(spec.weights_sha256) == {"config.json", "preprocessor_config.json", "model.safetensors"}
    assert [(book.shape, book.dtype) for book in qlip.codebooks()] == [((16384, 14), np.float32)] * 2


def test_identifying_it_again_imports_no_torch(folder: Path) -> None:
    describe(QlipTokenizer(path=str(folder)))
    run_python(
        "import sys\n"
        "from tokenize_stage.config import QlipTokenizer\n"
        "from tokenize_stage.identity import describe\n"
        f"describe(QlipTokenizer(path={str(folder)!r})).codebooks()\n"
        "assert 'torch' not in sys.modules\n"
    )


def test_a_job_writes_grouped_bits(folder: Path, tmp_path: Path) -> None:
    pictures = make_pictures(tmp_path / "pictures", 5)
    run_job(job_config(pictures, tmp_path, tmp_path / "out",
                       geometry={"mode": "crop", "size": SIZE}, tokenizer={"kind": "qlip", "path": str(folder)}))  # fmt: skip
    opened = open_manifest(tmp_path / "out")
    assert opened.manifest.tokenizer.residual is False
    assert verify(tmp_path / "out").problems == []
    assert opened.read_codes(["000001.jpg"])[0].shape == (1, 16, 2)


def test_rotary_tables_are_those_of_the_checkpoint() -> None:
    stored = load_file(FIXTURE / "model.safetensors")
    cos_Pd, sin_Pd = rope_tables(4, 16)
    close(cos_Pd, stored[ROPE], atol=1e-6)
    close(sin_Pd, stored[ROPE.replace("cos", "sin")], atol=1e-6)


def test_the_epsilon_and_the_heads_are_told_apart_by_the_features(tmp_path: Path) -> None:
    for key, value in (("layer_norm_eps", 1e-5), ("num_attention_heads", 2)):
        folder = complete(tmp_path / key)
        config = json.loads((folder / "config.json").read_text())
        config["vision_config"][key] = value
        (folder / "config.json").write_text(json.dumps(config))
        tables = load_file(folder / "model.safetensors")
        save_file(
            {name: tensor for name, tensor in tables.items() if ".rope." not in name}, folder / "model.safetensors"
        )
        assert (features(load_from(folder)) - read_golden(FIXTURE)["features"]).abs().max() > 2e-4


def test_views_of_another_size_are_refused(folder: Path) -> None:
    with pytest.raises(InputError, match="views of 64 pixels"):
        identify(QlipTokenizer(path=str(folder)), Geometry(mode="crop", size=72))
