"""TA-Tok against numbers computed with its public implementation, and against files that are not what they should be."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import golden_files
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden_files import DATA, close, load_described, one_sentence, random_views, read_golden, run_python

from manifests.errors import InputError
from manifests.schema import Geometry
from tokenize_stage.config import TaTokTokenizer
from tokenize_stage.cosine_search import cosine_oracle, unit
from tokenize_stage.identity import describe, identify
from tokenize_stage.search import oracle
from tokenize_stage.tokenizers.ta_tok import TaTok

cache = golden_files.cache
FIXTURE = DATA / "tatok"
FILE = FIXTURE / "ta_tok.pth"
ENCODER = FIXTURE / "siglip2-tiny" / "config.json"
SIZE, GRID, CODES, CODE_DIM = 84, (6, 6), 128, 16
QUERY = "encoder.encoder.layers.2.self_attn.q_proj.weight"
TABLE = "bottleneck.regularizer.embedding.weight"

Model = dict[str, Any]
Change = Callable[[Model], object]


def configured(file: Path = FILE, **choices: Any) -> TaTokTokenizer:
    return TaTokTokenizer(checkpoint=str(file), **{"encoder_config": str(ENCODER), **choices})


def load_from(config: TaTokTokenizer) -> TaTok:
    tokenizer = load_described(config)
    assert isinstance(tokenizer, TaTok)
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> TaTok:
    return load_from(configured())


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    return read_golden(FIXTURE)


@pytest.fixture
def changed(tmp_path: Path) -> Callable[[Change], Path]:
    """A copy of the fixture whose `{"args": ..., "sd": ...}` was changed."""

    def make(change: Change) -> Path:
        content = torch.load(FILE, weights_only=True)
        change(content["model"])
        torch.save(content, tmp_path / "ta_tok.pth")
        return tmp_path / "ta_tok.pth"

    return make


def normalised(golden: dict[str, torch.Tensor]) -> torch.Tensor:
    return (golden["pixel_values"] - 0.5) / 0.5


def codes_of(tokenizer: TaTok, pixels_BCSS: torch.Tensor) -> torch.Tensor:
    encoder = tokenizer.encoder
    return tokenizer.quantise(encoder.project(encoder.task_features(encoder.pool(encoder.hidden(pixels_BCSS)))))


def set_quantiser(**arguments: Any) -> Change:
    def change(model: Model) -> None:
        model["args"]["bottleneck"]["args"]["regularizer"]["args"].update(arguments)

    return change


def test_every_step_is_the_reference_s(tokenizer: TaTok, golden: dict[str, torch.Tensor]) -> None:
    encoder = tokenizer.encoder
    hidden_BPn = encoder.hidden(normalised(golden))
    close(hidden_BPn, golden["hidden_states_m2"], atol=1e-4)
    task_BPn = encoder.task_features(hidden_BPn)
    close(task_BPn, golden["vq_feats"], atol=5e-5)
    projected_BPm = encoder.project(task_BPn)
    close(projected_BPm, golden["projected_z"], atol=5e-5)
    close(unit(projected_BPm), golden["unregularized_z"], atol=1e-5)
    table_Km = torch.from_numpy(tokenizer.codebooks()[0])
    close(table_Km, golden["emb"], atol=1e-6)
    codes_BP1 = tokenizer.quantise(projected_BPm)
    assert torch.equal(codes_BP1, golden["ids"])
    vectors_BPm = table_Km[codes_BP1[..., 0].long()]
    close(vectors_BPm, golden["regularized_z"], atol=1e-6)
    stored = torch.load(FILE, weights_only=True)["model"]["sd"]
    out = [stored[f"bottleneck.out_linear.{name}"].float() for name in ("weight", "bias")]
    close(F.linear(vectors_BPm, *out), golden["encoded"], atol=1e-5)


@pytest.mark.parametrize("scale", [2, 3])
def test_pooled_codes_are_the_reference_s(golden: dict[str, torch.Tensor], scale: int) -> None:
    tokenizer = load_from(configured(pool_scale=scale))
    assert torch.equal(codes_of(tokenizer, normalised(golden)), golden[f"ids_pool{scale}"])
    assert tokenizer.spec.grid == (GRID[0] // scale, GRID[1] // scale)
    assert tokenizer.encode(random_views(2, SIZE)).shape == (2, tokenizer.spec.positions, 1)


def test_pooling_drops_what_does_not_fill_a_square() -> None:
    tokenizer = load_from(configured(pool_scale=4))
    assert tokenizer.spec.grid == (1, 1)
    hidden_BPn = torch.arange(36.0).view(1, 36, 1)
    corner = hidden_BPn.view(6, 6)[:4, :4]
    assert tokenizer.encoder.pool(hidden_BPn).item() == corner.mean()


def test_the_pool_scale_of_the_file_is_the_default(changed: Callable[[Change], Path]) -> None:
    file = changed(lambda model: model["args"].update(pool_scale=2))
    assert describe(configured(file)).spec.grid == (3, 3)
    assert describe(configured(file, pool_scale=1)).spec.grid == GRID


def test_without_normalisation_the_nearest_row_is_the_code(
    changed: Callable[[Change], Path], golden: dict[str, torch.Tensor]
) -> None:
    tokenizer = load_from(configured(changed(set_quantiser(l2_normalized=False, stochastic=False))))
    assert torch.equal(codes_of(tokenizer, normalised(golden)), golden["ids_plain"])
    assert tokenizer.spec.settings["metric"] == "squared_l2"
    features_Nm = tokenizer.encoder.features(random_views(2, SIZE)).flatten(0, 1)
    assert torch.equal(
        tokenizer.encode(random_views(2, SIZE)).flatten(0, 1), oracle(features_Nm, tokenizer.codebooks())
    )


@pytest.mark.parametrize("antialias", ["antialias", "noantialias"])
def test_what_the_reference_resized_itself_gets_the_same_codes(
    tokenizer: TaTok, golden: dict[str, torch.Tensor], antialias: str
) -> None:
    assert torch.equal(codes_of(tokenizer, golden[f"raw_resized_{antialias}"]), golden[f"ids_raw_{antialias}"])


def test_no_code_is_drawn_at_random(changed: Callable[[Change], Path], tokenizer: TaTok) -> None:
    """The fixture says `stochastic`; a file that says otherwise, or learnt its temperature, has the same codes."""
    codes = tokenizer.encode(random_views(2, SIZE))
    torch.manual_seed(1)
    assert torch.equal(tokenizer.encode(random_views(2, SIZE)), codes)

    def learnt_temperature(model: Model) -> None:
        set_quantiser(stochastic_temperature=-1.0)(model)
        model["sd"]["bottleneck.regularizer.stochastic_temperature_inv"] = torch.tensor(10.0)

    for change in (set_quantiser(stochastic=False), learnt_temperature):
        assert torch.equal(load_from(configured(changed(change))).encode(random_views(2, SIZE)), codes)


def test_codes_are_the_oracle_on_the_features(tokenizer: TaTok) -> None:
    codes = tokenizer.encode(random_views(3, SIZE))
    assert codes.dtype == torch.int32
    assert codes.shape == (3, 36, 1)
    features_Nm = tokenizer.encoder.features(random_views(3, SIZE)).flatten(0, 1)
    assert torch.equal(codes.flatten(0, 1), cosine_oracle(features_Nm, tokenizer.codebooks()))
    assert tokenizer.fallbacks == 0


def test_views_are_normalised_as_the_file_says(changed: Callable[[Change], Path], tokenizer: TaTok) -> None:
    pixels = random_views(2, SIZE).permute(0, 3, 1, 2).float() / 255
    assert torch.equal(tokenizer.encode(random_views(2, SIZE)), codes_of(tokenizer, (pixels - 0.5) / 0.5))
    file = changed(lambda model: model["sd"].update({"scale_layer.shift": torch.full((1, 3, 1, 1), 0.25)}))
    other = load_from(configured(file))
    assert other.spec.settings["image_mean"] == [0.25] * 3
    assert torch.equal(other.encode(random_views(2, SIZE)), codes_of(other, (pixels - 0.25) / 0.5))


def test_the_spec_says_what_the_codes_are(tokenizer: TaTok) -> None:
    spec = tokenizer.spec
    assert (spec.kind, spec.view_size, spec.grid, spec.residual) == ("ta_tok", SIZE, GRID, True)
    assert (spec.codebook_sizes, spec.code_dim) == ((CODES,), CODE_DIM)
    assert spec.settings == {
        "layer": 3, "pool_scale": 1, "metric": "cosine", "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
    }  # fmt: skip
    assert set(spec.weights_sha256) == {"checkpoint", "encoder_config"}


def test_the_codebook_is_the_table_that_is_searched(tokenizer: TaTok, golden: dict[str, torch.Tensor]) -> None:
    (table,) = describe(configured()).codebooks()
    assert table.dtype == np.float32
    assert np.array_equal(table, tokenizer.codebooks()[0])
    np.testing.assert_allclose(table, golden["emb"].numpy(), atol=1e-6)


def test_identifying_what_was_identified_before_imports_no_torch(tokenizer: TaTok) -> None:
    run_python(
        "import sys\n"
        "from tokenize_stage.config import TaTokTokenizer\n"
        "from tokenize_stage.identity import describe\n"
        f"describe(TaTokTokenizer(checkpoint={str(FILE)!r}, encoder_config={str(ENCODER)!r}))\n"
        "assert 'torch' not in sys.modules\n"
    )


def drop(pattern: str) -> Change:
    def change(model: Model) -> None:
        for name in [name for name in model["sd"] if pattern in name]:
            del model["sd"][name]

    return change


@pytest.mark.parametrize(
    "pattern", ["decoder.", "decode_task_layer", "out_linear", "encoder.head.", "post_layernorm", "encoder.layers.3."]
)
def test_what_the_codes_do_not_need_may_be_absent(
    changed: Callable[[Change], Path], golden: dict[str, torch.Tensor], pattern: str
) -> None:
    tokenizer = load_from(configured(changed(drop(pattern))))
    assert torch.equal(codes_of(tokenizer, normalised(golden)), golden["ids"])


def set_tensor(name: str, value: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    def change(model: Model) -> None:
        model["sd"][name] = value(model["sd"][name])

    return change


def rename(model: Model) -> None:
    model["sd"][QUERY.replace("q_proj", "query")] = model["sd"].pop(QUERY)


def poison(tensor: torch.Tensor) -> torch.Tensor:
    tensor[0, 0] = float("inf")
    return tensor


def as_plain_vq(model: Model) -> None:
    model["args"]["bottleneck"]["args"]["regularizer"]["name"] = "vq"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (drop(QUERY), "q_proj.weight"),
        (rename, "q_proj.weight"),
        (drop(TABLE), TABLE),
        (drop("embedding_proj"), "embedding_proj.weight"),
        (drop("scale_layer"), "scale_layer.shift"),
        (set_tensor(TABLE, lambda table: table[:-1]), TABLE),
        (set_tensor(TABLE, poison), "NaN"),
        (set_tensor(QUERY, poison), "NaN"),
        (set_tensor("scale_layer.scale", torch.zeros_like), "scale_layer.scale"),
        (lambda model: model["sd"].update(extra=torch.zeros(2)), "extra"),
        (lambda model: model.pop("sd"), "'sd'"),
        (lambda model: model.pop("args"), "model.args"),
        (set_quantiser(codebook_size=64), TABLE),
        (set_quantiser(codebook_size="many"), "codebook_size"),
        (as_plain_vq, "simvq"),
        (lambda model: model["args"].update(select_layer_id=-9), "select_layer_id"),
        (lambda model: model["args"].update(input_size=96), "96"),
        (lambda model: model["args"]["bottleneck"]["args"].update(bottleneck_dim=8), "in_linear"),
    ],
)
def test_a_checkpoint_with_other_contents_is_one_sentence(
    changed: Callable[[Change], Path], change: Change, says: str
) -> None:
    file = changed(change)
    with pytest.raises(InputError) as caught:
        load_from(configured(file))
    one_sentence(caught.value, says, str(file))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"num_hidden_layers": 3}, "encoder.layers.3"),
        ({"num_hidden_layers": 6}, "encoder.layers.4"),
        ({"intermediate_size": 64}, "mlp.fc1"),
        ({"image_size": 98}, "98"),
        ({"patch_size": 12}, "patch_embedding"),
    ],
)
def test_an_encoder_of_another_shape_is_one_sentence(tmp_path: Path, change: dict[str, int], says: str) -> None:
    config = json.loads(ENCODER.read_text())
    config["vision_config"].update(change)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError) as caught:
        load_from(configured(encoder_config=str(tmp_path)))
    one_sentence(caught.value, says, str(FILE))


@pytest.mark.parametrize(
    "change",
    [{"num_hidden_layers": 10**9}, {"num_attention_heads": -1}, {"num_attention_heads": 5}, {"num_channels": 1},
     {"intermediate_size": 0}, {"hidden_act": "no such thing"}],
)  # fmt: skip
def test_an_encoder_configuration_that_makes_no_sense_is_one_sentence(
    tmp_path: Path, change: dict[str, object]
) -> None:
    config = json.loads(ENCODER.read_text())
    config["vision_config"].update(change)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError) as caught:
        load_from(configured(encoder_config=str(tmp_path)))
    one_sentence(caught.value, str(tmp_path))


@pytest.mark.parametrize("size", [0, 1000, 700_000])
def test_a_truncated_file_is_one_sentence(tmp_path: Path, size: int) -> None:
    file = tmp_path / "ta_tok.pth"
    file.write_bytes(FILE.read_bytes()[:size])
    with pytest.raises(InputError) as caught:
        describe(configured(file))
    one_sentence(caught.value, str(file))


def test_files_of_other_families_are_one_sentence(tmp_path: Path) -> None:
    shutil.copy(DATA / "vilau" / "model.safetensors", tmp_path)
    other = tmp_path / "other.pt"
    torch.save({"state_dict": {"quantizer_semantic.codebooks.0.weight": torch.zeros(65, 32)}}, other)
    for file in (tmp_path / "model.safetensors", other):
        with pytest.raises(InputError) as caught:
            describe(configured(file))
        one_sentence(caught.value, str(file))


def test_a_pickle_that_would_run_code_is_refused_and_not_run(tmp_path: Path) -> None:
    torch.save({"model": {"args": Runs(tmp_path / "ran"), "sd": {}}}, tmp_path / "ta_tok.pth")
    with pytest.raises(InputError) as caught:
        describe(configured(tmp_path / "ta_tok.pth"))
    one_sentence(caught.value, "ta_tok.pth")
    assert not (tmp_path / "ran").exists()


class Runs:
    """Unpickled without care, it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.mkdir, (self.folder,)


def test_a_pool_scale_larger_than_the_grid_is_refused() -> None:
    with pytest.raises(InputError) as caught:
        describe(configured(pool_scale=7))
    one_sentence(caught.value, "pool_scale of 7")


def test_views_of_another_size_are_refused() -> None:
    with pytest.raises(InputError, match="views of 84 pixels"):
        identify(configured(), Geometry(mode="squash", size=64))
