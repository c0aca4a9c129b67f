"""VILA-U against numbers computed with its public implementation, and against files that are not what they should be."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import golden_files
import numpy as np
import pytest
import torch
from golden_files import DATA, close, load_described, one_sentence, random_views, read_golden, run_python
from safetensors.torch import load_file, save_file

from manifests.errors import InputError
from manifests.schema import Geometry
from tokenize_stage.config import VilaUTokenizer
from tokenize_stage.identity import describe, identify
from tokenize_stage.search import oracle, residual_search
from tokenize_stage.tokenizers import load
from tokenize_stage.tokenizers.residual import ResidualTokenizer
from tokenize_stage.tokenizers.vila_u import VilaUEncoder

cache = golden_files.cache
FIXTURE = DATA / "vilau"
SIZE, PATCH, WIDTH, GRID, DEPTH, CODES = 64, 16, 64, (4, 4), 4, 96
BOOKS = "rqvaesiglip.quantizer.codebooks."
VISION = "rqvaesiglip.siglip_model.vision_model."
QUERY = f"{VISION}encoder.layers.2.self_attn.q_proj.weight"

Tensors = dict[str, torch.Tensor]
Change = Callable[[Tensors], object]


def load_from(folder: Path) -> ResidualTokenizer:
    config = VilaUTokenizer(path=str(folder))
    tokenizer = load_described(config)
    assert isinstance(tokenizer, ResidualTokenizer)
    return tokenizer


def features(tokenizer: ResidualTokenizer, pixels_BCSS: torch.Tensor) -> torch.Tensor:
    assert isinstance(tokenizer.encoder, VilaUEncoder)
    return tokenizer.encoder.hidden(pixels_BCSS)


def quantise(tokenizer: ResidualTokenizer, features_BPn: torch.Tensor) -> torch.Tensor:
    codes_ND = residual_search(features_BPn.flatten(0, 1), tokenizer.codebooks())
    return codes_ND.unflatten(0, features_BPn.shape[:2])


@pytest.fixture(scope="module")
def tower() -> ResidualTokenizer:
    return load_from(FIXTURE)


@pytest.fixture
def changed(tmp_path: Path) -> Callable[[Change], Path]:
    """A copy of the fixture whose tensors were changed."""

    def make(change: Change) -> Path:
        folder = shutil.copytree(FIXTURE, tmp_path / "vilau")
        tensors = load_file(FIXTURE / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")
        return folder

    return make


def reconfigured(tmp_path: Path, **changes: object) -> Path:
    """A copy of the fixture with other values in the `rqvaesiglip` part of config.json."""
    folder = shutil.copytree(FIXTURE, tmp_path / "vilau")
    config = json.loads((folder / "config.json").read_text())
    config["rqvaesiglip"].update(changes)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_features_codes_and_vectors_are_the_reference_s(tower: ResidualTokenizer) -> None:
    golden = read_golden(FIXTURE)
    features_BPn = features(tower, golden["pixel_values"])
    close(features_BPn, golden["features"], atol=5e-5)
    codes_BPD = quantise(tower, features_BPn)
    assert torch.equal(codes_BPD, golden["ids"])
    book_Kn = torch.from_numpy(tower.codebooks()[0])
    vectors_BPDn = book_Kn[codes_BPD.long()]
    assert torch.equal(vectors_BPDn, golden["code_emb_depth"])
    close(vectors_BPDn.sum(2), golden["z_q"], atol=1e-5)


def test_the_encoder_s_gelu_and_epsilon_are_told_apart_by_the_features(tmp_path: Path) -> None:
    golden = read_golden(FIXTURE)
    for change in ({"hidden_act": "gelu"}, {"layer_norm_eps": 1e-5}):
        folder = shutil.copytree(FIXTURE, tmp_path / next(iter(change)))
        file = folder / "siglip-tiny" / "config.json"
        config = json.loads(file.read_text())
        config["vision_config"].update(change)
        file.write_text(json.dumps(config))
        found = features(load_from(folder), golden["pixel_values"])
        assert (found - golden["features"]).abs().max() > 2e-4


def test_views_are_normalised_to_minus_one_to_one(tower: ResidualTokenizer) -> None:
    pixels = random_views(2, SIZE).permute(0, 3, 1, 2).float() / 127.5 - 1
    assert torch.equal(tower.encode(random_views(2, SIZE)), quantise(tower, features(tower, pixels)))


def test_codes_are_the_oracle_on_the_features(tower: ResidualTokenizer) -> None:
    codes = tower.encode(random_views(3, SIZE))
    assert codes.dtype == torch.int32
    assert codes.shape == (3, 16, DEPTH)
    pixels = (random_views(3, SIZE).permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5
    features_Nn = features(tower, pixels).flatten(0, 1)
    assert torch.equal(codes.flatten(0, 1), oracle(features_Nn, tower.codebooks()))
    assert tower.fallbacks == 0


def test_the_spec_says_what_the_codes_are(tower: ResidualTokenizer) -> None:
    spec = tower.spec
    assert (spec.kind, spec.view_size, spec.grid, spec.residual) == ("vila_u", SIZE, GRID, True)
    assert (spec.codebook_sizes, spec.code_dim) == ((CODES,) * DEPTH, WIDTH)
    assert spec.settings["image_mean"] == spec.settings["image_std"] == [0.5] * 3
    assert set(spec.weights_sha256) == {"config", "encoder_config", "model.safetensors"}


def test_the_padding_row_is_no_code(tower: ResidualTokenizer) -> None:
    books = tower.codebooks()
    assert [(book.shape, book.dtype) for book in books] == [((CODES, WIDTH), np.float32)] * DEPTH
    stored = load_file(FIXTURE / "model.safetensors")[f"{BOOKS}0.weight"]
    assert np.array_equal(books[0], stored[:-1].float().numpy())
    identity = describe(VilaUTokenizer(path=str(FIXTURE)))
    assert all(np.array_equal(a, b) for a, b in zip(identity.codebooks(), books, strict=True))


def test_identifying_what_was_identified_before_imports_no_torch(tower: ResidualTokenizer) -> None:
    run_python(
        "import sys\n"
        "from tokenize_stage.config import VilaUTokenizer\n"
        "from tokenize_stage.identity import describe\n"
        f"describe(VilaUTokenizer(path={str(FIXTURE)!r}))\n"
        "assert 'torch' not in sys.modules\n"
    )


def drop(pattern: str) -> Change:
    def change(tensors: Tensors) -> None:
        for name in [name for name in tensors if pattern in name]:
            del tensors[name]

    return change


def keep_one_codebook(tensors: Tensors) -> None:
    for depth in range(1, DEPTH):
        drop(f"{BOOKS}{depth}.")(tensors)


@pytest.mark.parametrize(
    "change",
    [
        keep_one_codebook,
        drop("_ema"),
        drop("rqtransformer."),
        drop("rqvaesiglip.decoder."),
        drop("post_quant_conv"),
        drop("text_model"),
        drop("logit_"),
        drop("vision_model.head."),
        drop("encoder.layers.3."),
        drop("post_layernorm"),
    ],
)
def test_what_the_codes_do_not_need_may_be_absent(changed: Callable[[Change], Path], change: Change) -> None:
    golden = read_golden(FIXTURE)
    tokenizer = load_from(changed(change))
    assert torch.equal(quantise(tokenizer, features(tokenizer, golden["pixel_values"])), golden["ids"])


def test_weights_in_several_files_are_read_through_their_index(tmp_path: Path, tower: ResidualTokenizer) -> None:
    folder = shutil.copytree(FIXTURE, tmp_path / "vilau")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"model-1.safetensors": names[:100], "model-2.safetensors": names[100:]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert torch.equal(load_from(folder).encode(random_views(1, SIZE)), tower.encode(random_views(1, SIZE)))
    (folder / "model-2.safetensors").unlink()
    with pytest.raises(InputError) as caught:
        load_from(folder)
    one_sentence(caught.value, "model-2.safetensors")


def test_the_encoder_s_dtype_is_the_job_s(tower: ResidualTokenizer) -> None:
    config = VilaUTokenizer(path=str(FIXTURE))
    half = load(config, tower.spec, dtype="bfloat16", device="cpu")
    assert isinstance(half, ResidualTokenizer)
    found, exact = half.encoder.features(random_views(2, SIZE)), tower.encoder.features(random_views(2, SIZE))
    assert found.dtype == torch.float32
    assert 1e-4 < (found - exact).abs().max() < 0.3


def rename(old: str, new: str) -> Change:
    def change(tensors: Tensors) -> None:
        tensors[new] = tensors.pop(old)

    return change


def replace(name: str, value: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    def change(tensors: Tensors) -> None:
        tensors[name] = value(tensors[name]).clone()

    return change


def poison(tensor: torch.Tensor) -> torch.Tensor:
    tensor[0, 0] = float("nan")
    return tensor


def as_dualtoken(tensors: Tensors) -> None:
    for name in list(tensors):
        tensor = tensors.pop(name)
        if name.startswith("rqvaesiglip."):
            tensors[name.removeprefix("rqvaesiglip.").replace("quantizer.", "quantizer_semantic.")] = tensor


def other_book_at_depth_2(tensors: Tensors) -> None:
    tensors[f"{BOOKS}2.weight"] = tensors[f"{BOOKS}2.weight"] * 2


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (drop(QUERY), "q_proj.weight"),
        (rename(QUERY, QUERY.replace("q_proj", "query")), "q_proj.weight"),
        (drop(f"{BOOKS}"), "codebooks.0.weight"),
        (drop(f"{BOOKS}3."), "codebooks.3.weight"),
        (rename(f"{BOOKS}3.weight", f"{BOOKS}4.weight"), "codebooks.3.weight"),
        (other_book_at_depth_2, "shared"),
        (replace(f"{BOOKS}0.weight", lambda book: book[:-1]), "codebooks.0.weight"),
        (replace(f"{BOOKS}0.weight", poison), "NaN"),
        (replace(QUERY, poison), "NaN"),
        (replace(QUERY, lambda weight: weight[:32]), "q_proj.weight"),
        (lambda tensors: tensors.update({f"{VISION}encoder.extra.weight": torch.zeros(2)}), "encoder.extra.weight"),
        (as_dualtoken, "VILA-U"),
    ],
)
def test_a_checkpoint_with_other_tensors_is_one_sentence(
    changed: Callable[[Change], Path], change: Change, says: str
) -> None:
    folder = changed(change)
    with pytest.raises(InputError) as caught:
        load_from(folder)
    one_sentence(caught.value, says, str(folder))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"code_shape": [4, 4, 3]}, "codebooks.3"),
        ({"code_shape": [4, 4, 5], "shared_codebook": False}, "codebooks.4.weight"),
        ({"code_shape": [4, 4, 10**9]}, "code_shape"),
        ({"code_shape": [8, 8, 4]}, "code_shape"),
        ({"n_embed": 95}, "codebooks.0.weight"),
        ({"embed_dim": 32}, "embed_dim"),
        ({"pretrained_model": "siglip-other/nowhere/x"}, "encoder_config"),
    ],
)
def test_a_config_of_another_tower_is_one_sentence(tmp_path: Path, changes: dict[str, object], says: str) -> None:
    folder = reconfigured(tmp_path, **changes)
    with pytest.raises(InputError) as caught:
        load_from(folder)
    one_sentence(caught.value, says)


def test_a_truncated_file_is_one_sentence(tmp_path: Path) -> None:
    folder = shutil.copytree(FIXTURE, tmp_path / "vilau")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:500_000])
    with pytest.raises(InputError) as caught:
        load_from(folder)
    one_sentence(caught.value, str(file))


def test_a_folder_of_something_else_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        describe(VilaUTokenizer(path=str(DATA / "tatok" / "siglip2-tiny")))
    one_sentence(caught.value, "VILA-U")
    with pytest.raises(InputError) as caught:
        describe(VilaUTokenizer(path=str(tmp_path)))
    one_sentence(caught.value, str(tmp_path))


def test_views_of_another_size_are_refused() -> None:
    with pytest.raises(InputError, match="views of 64 pixels"):
        identify(VilaUTokenizer(path=str(FIXTURE)), Geometry(mode="squash", size=84))
