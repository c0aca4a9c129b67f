"""The tensor-core pass: on a CPU with emulated sums, with CUDA on the real ones."""

from __future__ import annotations

from functools import partial

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenize_stage.fast_pass import Float32Pass
from tokenize_stage.float16_pass import WIDEST, Float16Pass, sums_in_float32
from tokenize_stage.search import ResidualSearch, fast_pass, oracle

Books = list[npt.NDArray[np.float32]]


def truncated_sums(
    rows_Nm: torch.Tensor, vectors_mK: torch.Tensor, out_NK: torch.Tensor, *, block: int = 4, bits: int = 24
) -> None:
    """What the literature says of tensor cores, at their worst: `block` exact products and the accumulator, each
    truncated to `bits` bits of the largest of them, are added, and the sum is truncated to `bits` bits."""
    left, right = rows_Nm.double().numpy(), vectors_mK.double().numpy()
    sum_NK = np.zeros((len(left), right.shape[1]))
    for start in range(0, left.shape[1], block):
        part = slice(start, start + block)
        terms = np.concatenate(
            [left[:, None, part] * right[None, :, :][:, part].transpose(0, 2, 1), sum_NK[..., None]], 2
        )
        aligned = truncate(terms, np.abs(terms).max(2, keepdims=True), bits).sum(2)  # exact in float64
        sum_NK = truncate(aligned, np.abs(aligned), bits)
    out_NK.copy_(torch.from_numpy(sum_NK))


def truncate(values: npt.NDArray[np.float64], largest: npt.NDArray[np.float64], bits: int) -> npt.NDArray[np.float64]:
    step = np.exp2(np.frexp(largest)[1] - bits)
    truncated: npt.NDArray[np.float64] = np.trunc(values / step) * step
    return truncated


class Block4(Float16Pass):
    multiply = staticmethod(truncated_sums)


class Block16(Float16Pass):
    multiply = staticmethod(partial(truncated_sums, block=16))


HARDWARE = [Float16Pass, Block4, Block16]


def normal(seed: int, *shape: int, scale: float = 1.0) -> npt.NDArray[np.float32]:
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)


def check(
    features: npt.NDArray[np.float32], codebooks: Books, hardware: type[Float16Pass] = Float16Pass
) -> ResidualSearch:
    found = ResidualSearch(codebooks, make_pass=hardware)
    features_Nn = torch.from_numpy(features)
    assert torch.equal(found(features_Nn), oracle(features_Nn, codebooks))
    return found


def assert_brackets(fast: Float16Pass, vectors_Kn: torch.Tensor, residual_Nn: torch.Tensor) -> None:
    """lower <= S <= lower + 2 margin for every row and code, S in extended precision."""
    count, size = len(residual_Nn), len(vectors_Kn)
    bracket = fast.bracket(residual_Nn, torch.empty(count * size, device=residual_Nn.device))
    assert bool(bracket.usable_N.all())
    mean = vectors_Kn.mean(0).cpu().numpy().astype(np.longdouble)
    wide_a = (residual_Nn.cpu().numpy().astype(np.longdouble) - mean) * fast.scale
    wide_b = (vectors_Kn.cpu().numpy().astype(np.longdouble) - mean) * fast.scale
    score = np.square(wide_b).sum(1) / 2 - wide_a @ wide_b.T
    lower = bracket.lower_NK.cpu().numpy().astype(np.longdouble)
    columns = bracket._replace(norm_N=bracket.norm_N[:, None], lost_N=bracket.lost_N[:, None])
    margin = fast.margin(columns, torch.arange(size, device=residual_Nn.device)).cpu().numpy()
    assert (lower <= score).all()
    assert (score <= lower + 2 * margin).all()


@settings(max_examples=120)
@given(
    seed=st.integers(0, 2**32 - 1),
    hardware=st.sampled_from(HARDWARE),
    width=st.integers(1, 200),
    scale=st.integers(-30, 30),
    spread=st.floats(0, 4),
    relative=st.integers(-9, 1),
    offset=st.sampled_from([0.0, 1.0, -1e3]),
    aligned=st.booleans(),
)
def test_the_bound_brackets_the_true_score(
    seed: int,
    hardware: type[Float16Pass],
    width: int,
    scale: int,
    spread: float,
    relative: int,
    offset: float,
    aligned: bool,
) -> None:
    """Norms over many orders of magnitude, and rows whose products all have one sign, so that truncation adds up."""
    random = np.random.default_rng(seed)
    book = random.standard_normal((24, width)) * np.exp(spread * random.standard_normal((24, 1)))
    rows = random.standard_normal((12, width)) * 10.0**relative * np.abs(book).max()
    if aligned:
        rows = np.abs(rows) * np.sign(book[random.integers(24, size=12)])
    vectors_Kn = torch.from_numpy(((book + offset) * 10.0**scale).astype(np.float32)).double()
    residual_Nn = torch.from_numpy((rows + offset) * 10.0**scale)
    assert_brackets(hardware(vectors_Kn), vectors_Kn, residual_Nn)


def of_one_sign(device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """Float16s that rounding leaves alone, of mean zero, whose 1,152 products add up: only the sums can be off."""
    positive = np.abs(normal(0, 12, 1152)).astype(np.float16).astype(np.float64)
    rows = np.abs(normal(1, 8, 1152)).astype(np.float16).astype(np.float64)
    return torch.from_numpy(np.concatenate([positive, -positive])).to(device), torch.from_numpy(rows).to(device)


@pytest.mark.parametrize("hardware", HARDWARE)
def test_sums_of_one_sign_at_the_real_width(hardware: type[Float16Pass]) -> None:
    vectors_Kn, residual_Nn = of_one_sign()
    fast = hardware(vectors_Kn)
    assert_brackets(fast, vectors_Kn, residual_Nn)
    assert float(fast.bracket(residual_Nn, torch.empty(8 * 24)).lost_N.max()) == 2.0**-14  # the least that e+ can be


@settings(max_examples=120)
@given(
    seed=st.integers(0, 2**32 - 1),
    hardware=st.sampled_from(HARDWARE),
    count=st.integers(0, 20),
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    width=st.integers(1, 40),
    exponent=st.integers(-40, 36),
    offset=st.sampled_from([0.0, 1.0, 1e3, -1e6]),
    coarse=st.booleans(),
    gap=st.integers(-60, 0),
)
def test_the_search_equals_the_oracle(
    seed: int, hardware: type[Float16Pass], count: int, sizes: list[int], width: int, exponent: int, offset: float,
    coarse: bool, gap: int,
) -> None:  # fmt: skip
    """Random, tied, shifted, from the subnormal to the huge; half the features half way between two vectors, nearly."""
    random = np.random.default_rng(seed)

    def draw(rows: int) -> npt.NDArray[np.float32]:
        values = random.integers(-2, 3, (rows, width)) if coarse else random.standard_normal((rows, width))
        return np.clip(np.float64(10.0) ** exponent * (values + offset), -3e38, 3e38).astype(np.float32)

    books = [draw(size) for size in sizes]
    first, second = (books[0][random.integers(sizes[0], size=count)].astype(np.float64) for _ in range(2))
    between = (first + second) / 2 + (first - second) * 2.0**gap
    check(np.concatenate([draw(count), between.astype(np.float32)]), books, hardware)


def test_operands_are_what_the_derivation_says() -> None:
    vectors_Kn = torch.from_numpy(normal(2, 300, 70) * np.geomspace(1e-9, 1, 300, dtype=np.float32)[:, None]).double()
    fast = Float16Pass(vectors_Kn)
    operands = fast._vectors_Km.double()
    norm_above, loss_above = fast._norm_above_K.double(), fast._loss_above_K.double()
    half_norm = fast._norm_K.square() / 2
    assert 64 <= float(fast._norm_K.max()) <= 128.001
    assert bool(((operands == 0) | ((operands.abs() >= 2.0**-14) & (operands.abs() < 65504))).all())
    assert bool((norm_above >= fast._norm_K).all())
    assert bool((norm_above >= operands[:, :70].norm(dim=1)).all())
    assert bool((loss_above <= norm_above / 16).all())
    assert bool((fast._deficit_K >= 1.25 * fast.omega * half_norm + 2.0**-14).all())
    assert fast._vectors_Km.shape[1] % 8 == 0


def test_features_beyond_the_fast_range_fall_back() -> None:
    features = normal(3, 10, 8)
    features[::2] *= np.float32(1e6)
    assert check(features, [normal(4, 40, 8)]).fallback_rows == 5


def test_few_candidates_and_no_fall_back_on_gaussian_features() -> None:
    found = check(normal(5, 400, 256), [normal(6 + d, 600, 256, scale=0.9**d) for d in range(3)])
    assert found.fallback_rows == 0
    assert found.reranked_rows < 400 * 3 // 2


def test_too_wide_vectors_are_for_the_other_pass() -> None:
    with pytest.raises(ValueError, match="32768"):
        Float16Pass(torch.zeros(1, WIDEST + 1, dtype=torch.float64))


def test_a_cpu_keeps_the_float32_pass() -> None:
    assert isinstance(fast_pass(torch.zeros(2, 3, dtype=torch.float64)), Float32Pass)


def test_narrow_sums_are_noticed() -> None:
    cpu = torch.device("cpu")
    assert sums_in_float32(cpu)
    assert sums_in_float32(cpu, truncated_sums)
    assert not sums_in_float32(cpu, partial(truncated_sums, block=16, bits=14))
    assert not sums_in_float32(cpu, partial(truncated_sums, bits=11))


@pytest.mark.gpu
def test_tensor_cores_keep_the_bound() -> None:
    """At the real width: Gaussian rows, a single one (other kernels), and rows of one sign."""
    vectors_Kn = torch.from_numpy(normal(7, 4096, 1152)).cuda().double()
    residual_Nn = torch.from_numpy(normal(8, 256, 1152)).cuda().double()
    assert_brackets(Float16Pass(vectors_Kn), vectors_Kn, residual_Nn)
    assert_brackets(Float16Pass(vectors_Kn), vectors_Kn, residual_Nn[:1])
    vectors_Kn, residual_Nn = of_one_sign("cuda")
    assert_brackets(Float16Pass(vectors_Kn), vectors_Kn, residual_Nn)


@pytest.mark.gpu
def test_a_gpu_takes_the_float16_pass_and_gives_the_oracles_codes() -> None:
    features = torch.from_numpy(normal(9, 3000, 1152))
    books = [normal(10 + d, 2048, 1152, scale=0.8**d) for d in range(4)]
    found = ResidualSearch(books, "cuda")
    assert isinstance(fast_pass(torch.zeros(2, 8, dtype=torch.float64, device="cuda")), Float16Pass)
    assert torch.equal(found(features).cpu(), oracle(features.cuda(), books).cpu())
    assert found.fallback_rows == 0


@pytest.mark.gpu
def test_the_settings_of_the_process_are_put_back() -> None:
    matmul = torch.backends.cuda.matmul
    matmul.allow_fp16_reduced_precision_reduction = matmul.allow_fp16_accumulation = True
    try:
        assert sums_in_float32(torch.device("cuda:0"), lambda *tensors: Float16Pass.multiply(*tensors))
        assert matmul.allow_fp16_reduced_precision_reduction
        assert matmul.allow_fp16_accumulation
    finally:
        matmul.allow_fp16_accumulation = False
