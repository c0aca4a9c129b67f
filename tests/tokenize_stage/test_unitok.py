"""UniTok against numbers computed with its public implementation, and against files that are not what they should be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import golden_files
import numpy as np
import pytest
import torch
from golden_files import DATA, close, load_described, one_sentence, random_views, read_golden, run_python
from made_jobs import job_config, make_pictures

from manifests.errors import InputError
from manifests.reader import open_manifest
from manifests.schema import Geometry
from manifests.verify import verify
from tokenize_stage.config import UniTokTokenizer, ViTaminConfig
from tokenize_stage.cosine_search import CosineSearch, cosine_oracle
from tokenize_stage.identities.unitok import read_args
from tokenize_stage.identity import describe, identify
from tokenize_stage.job import run_job
from tokenize_stage.tokenizers.unitok import UniTok
from tokenize_stage.tokenizers.vitamin import ViTamin

cache = golden_files.cache
FIXTURE = DATA / "unitok"
FILE = FIXTURE / "unitok_tokenizer.pth"
TINY = ViTaminConfig(widths=(16, 24, 64), conv_blocks=(1, 2), blocks=2, heads=4)
SIZE, GRID, DEPTH, CODES, CODE_DIM = 64, (4, 4), 4, 64, 8
BOOK = "quantizer.codebooks.{}.codebook.weight"
QKV = "encoder.blocks.1.attn.qkv.weight"

Content = dict[str, Any]
Change = Callable[[Content], object]


def config_of(file: Path) -> UniTokTokenizer:
    return UniTokTokenizer(checkpoint=str(file), encoder=TINY)


def load_from(file: Path, config: UniTokTokenizer | None = None) -> UniTok:
    config = config or config_of(file)
    tokenizer = load_described(config)
    assert isinstance(tokenizer, UniTok)
    return tokenizer


@pytest.fixture(scope="module")
def unitok() -> UniTok:
    return load_from(FILE)


@pytest.fixture
def changed(tmp_path: Path) -> Callable[[Change], Path]:
    """A copy of the fixture whose content was changed."""

    def make(change: Change) -> Path:
        content = torch.load(FILE, weights_only=True)
        change(content)
        torch.save(content, tmp_path / "changed.pth")
        return tmp_path / "changed.pth"

    return make


def test_every_stage_and_every_code_is_the_reference_s(unitok: UniTok) -> None:
    golden = read_golden(FIXTURE)
    stages = unitok.encoder.stages(golden["pixel_values"])
    close(stages.patches_BPn, golden["patch_embed"], atol=5e-5)
    close(stages.hidden_BPn, golden["encoder_features"], atol=5e-5)
    close(stages.features_BPm, golden["features"], atol=5e-5)
    codes_ND = CosineSearch(unitok.codebooks())(stages.features_BPm.flatten(0, 1))
    assert torch.equal(codes_ND.view(2, 16, DEPTH), golden["ids"])


def test_codes_stand_for_the_reference_s_vectors(unitok: UniTok) -> None:
    golden = read_golden(FIXTURE)
    ids = golden["ids"].long()
    vectors = [torch.from_numpy(book)[ids[..., d]] for d, book in enumerate(unitok.codebooks())]
    close(torch.cat(vectors, -1), golden["z_q"], atol=1e-6)
    chunks = torch.nn.functional.normalize(golden["features"].unflatten(-1, (DEPTH, CODE_DIM)), dim=-1)
    score = torch.stack([chunks[..., d, :] @ torch.from_numpy(book).T for d, book in enumerate(unitok.codebooks())], 2)
    best = score.topk(2).values
    close(best[..., 0] - best[..., 1], golden["top2_gap"], atol=1e-5)


def test_views_go_through_the_whole_model(unitok: UniTok) -> None:
    codes = unitok.encode(random_views(3, SIZE))
    assert codes.dtype == torch.int32
    assert codes.shape == (3, 16, DEPTH)
    pixels = random_views(3, SIZE).permute(0, 3, 1, 2).float() / 127.5 - 1
    features_Nm = unitok.encoder.stages(pixels).features_BPm.flatten(0, 1)
    assert torch.equal(codes.flatten(0, 1), cosine_oracle(features_Nm, unitok.codebooks()))


def test_the_spec_says_what_the_codes_are(unitok: UniTok) -> None:
    spec = unitok.spec
    assert (spec.kind, spec.view_size, spec.grid, spec.residual) == ("unitok", SIZE, GRID, False)
    assert (spec.codebook_sizes, spec.code_dim) == ((CODES,) * DEPTH, CODE_DIM)
    assert spec.settings["image_mean"] == spec.settings["image_std"] == [0.5] * 3
    assert spec.settings["encoder"]["heads"] == TINY.heads
    assert set(spec.weights_sha256) == {"checkpoint"}


def test_codebooks_have_rows_of_length_one(unitok: UniTok) -> None:
    books = unitok.codebooks()
    assert [(book.shape, book.dtype) for book in books] == [((CODES, CODE_DIM), np.float32)] * DEPTH
    assert max(np.abs(np.linalg.norm(book.astype(np.float64), axis=1) - 1).max() for book in books) < 2e-7
    assert all(np.array_equal(a, b) for a, b in zip(describe(config_of(FILE)).codebooks(), books, strict=True))


def test_identifying_it_again_imports_no_torch() -> None:
    describe(config_of(FILE))
    run_python(
        "import sys\n"
        "from tokenize_stage.config import UniTokTokenizer\n"
        "from tokenize_stage.identity import describe\n"
        f"describe(UniTokTokenizer.model_validate_json({config_of(FILE).model_dump_json()!r}))\n"
        "assert 'torch' not in sys.modules\n"
    )


def test_a_job_writes_independent_codes(unitok: UniTok, tmp_path: Path) -> None:
    pictures = make_pictures(tmp_path / "pictures", 5)
    run_job(job_config(pictures, tmp_path, tmp_path / "out",
                       geometry={"mode": "crop", "size": SIZE}, tokenizer=config_of(FILE).model_dump()))  # fmt: skip
    opened = open_manifest(tmp_path / "out")
    assert opened.manifest.tokenizer.residual is False
    assert verify(tmp_path / "out").problems == []
    assert all(np.array_equal(a, b) for a, b in zip(opened.codebooks(), unitok.codebooks(), strict=True))
    assert opened.read_codes(["000001.jpg"])[0].shape == (1, 16, DEPTH)


def test_the_published_encoder_has_as_many_parameters_as_its_paper_says() -> None:
    args = {"model": "vitamin_large", "img_size": 256, "num_codebooks": 8, "vocab_size": 32768, "vocab_width": 64}
    shape = read_args(args, None, FILE)
    assert (shape.grid, shape.codes, shape.code_dim) == ((16, 16), 4096, 8)
    with torch.device("meta"):
        model = ViTamin(shape.encoder)
    count = sum(parameter.numel() for parameter in model.parameters())
    # 333.3 M with the 196 position embeddings and the projection to 768 of the CLIP model, which UniTok has not.
    assert round((count + 196 * 1024 + 1024 * 768) / 1e6, 1) == 333.3


def state(content: Content) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = content["trainer"]["unitok"]
    return found


def drop(*patterns: str) -> Change:
    def change(content: Content) -> None:
        for name in [name for name in state(content) if any(pattern in name for pattern in patterns)]:
            del state(content)[name]

    return change


@pytest.mark.parametrize(
    "unused",
    ["decoder.", "post_quant_proj.", "text_encoder.", "fc_norm.", "logit_scale", ".vocab_usage"],
)
def test_what_the_codes_do_not_need_may_be_absent(changed: Callable[[Change], Path], unused: str) -> None:
    tokenizer = load_from(changed(drop(unused)))
    features_Nm = tokenizer.encoder.stages(read_golden(FIXTURE)["pixel_values"]).features_BPm.flatten(0, 1)
    codes = cosine_oracle(features_Nm, tokenizer.codebooks())
    assert torch.equal(codes.view(2, 16, DEPTH), read_golden(FIXTURE)["ids"])


def rename(old: str, new: str) -> Change:
    def change(content: Content) -> None:
        state(content)[new] = state(content).pop(old)

    return change


def replace(name: str, value: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    def change(content: Content) -> None:
        state(content)[name] = value(state(content)[name].clone())

    return change


def set_args(**values: object) -> Change:
    return lambda content: content["args"].update(values)


def poison(tensor: torch.Tensor) -> torch.Tensor:
    tensor[0, 0] = float("nan")
    return tensor


def zero_row(tensor: torch.Tensor) -> torch.Tensor:
    tensor[5] = 0
    return tensor


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (drop(QKV), QKV),
        (rename(QKV, QKV.replace("qkv", "in_proj")), QKV),
        (drop("encoder.blocks.1."), "encoder.blocks.1."),
        (drop("quant_proj.attn.zero_k_bias"), "zero_k_bias"),
        (drop(BOOK.format(3)), BOOK.format(3)),
        (rename(BOOK.format(3), BOOK.format(4)), BOOK.format(3)),
        (replace(BOOK.format(0), lambda book: book[:-1]), BOOK.format(0)),
        (replace(BOOK.format(2), poison), "NaN"),
        (replace(BOOK.format(2), zero_row), "row of zeros"),
        (replace(QKV, poison), "NaN"),
        (replace(QKV, lambda weight: weight[:-1]), QKV),
        (lambda content: state(content).update({"encoder.blocks.2.norm1.weight": torch.ones(64)}), "blocks.2"),
        (lambda content: state(content).update({"encoder.reg_token": torch.ones(1, 1, 64)}), "reg_token"),
        (set_args(num_codebooks=8), "codebook"),
        (set_args(num_codebooks=3), "vocab_size"),
        (set_args(vocab_width=48), "vocab_width"),
        (set_args(img_size=72), "img_size"),
        (set_args(img_size="big"), "img_size"),
        (set_args(quant_proj="linear"), "quant_proj"),
        (set_args(vocab_norm=False), "vocab_norm"),
        (lambda content: content.pop("args"), "no args"),
        (lambda content: content.update(trainer={"vae": {}}), "unitok"),
        (lambda content: content.update(trainer={"unitok": {}}), "no tensors"),
    ],
)
def test_a_checkpoint_that_is_not_right_is_one_sentence(
    changed: Callable[[Change], Path], change: Change, says: str
) -> None:
    file = changed(change)
    with pytest.raises(InputError) as caught:
        load_from(file)
    one_sentence(caught.value, says, str(file))


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.999])
def test_a_truncated_file_is_one_sentence(tmp_path: Path, keep: float) -> None:
    file = tmp_path / "unitok.pth"
    data = FILE.read_bytes()
    file.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(InputError) as caught:
        load_from(file)
    one_sentence(caught.value, str(file))


@pytest.mark.parametrize("other", ["tatok/ta_tok.pth", "qlip/model.safetensors", "unitok/nothing.pth"])
def test_a_file_of_another_family_is_one_sentence(other: str) -> None:
    with pytest.raises(InputError) as caught:
        load_from(DATA / other)
    one_sentence(caught.value, other)


def test_an_encoder_that_is_not_published_must_be_described() -> None:
    with pytest.raises(InputError) as caught:
        load_from(FILE, UniTokTokenizer(checkpoint=str(FILE)))
    one_sentence(caught.value, "vitamin_tiny", "tokenizer.encoder")


@pytest.mark.parametrize("wrong", [{"blocks": 3}, {"conv_blocks": (1, 3)}, {"widths": (16, 32, 64)}])
def test_a_wrong_description_of_the_encoder_is_one_sentence(wrong: dict[str, Any]) -> None:
    config = UniTokTokenizer(checkpoint=str(FILE), encoder=TINY.model_copy(update=wrong))
    with pytest.raises(InputError) as caught:
        load_from(FILE, config)
    one_sentence(caught.value, "encoder.", str(FILE))


def test_views_of_another_size_are_refused() -> None:
    with pytest.raises(InputError, match="views of 64 pixels"):
        identify(config_of(FILE), Geometry(mode="crop", size=72))
