from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from manifests.errors import EnvironmentProblem, InputError
from tokenize_stage import search
from tokenize_stage.fast_pass import Float32Pass
from tokenize_stage.search import ResidualSearch, oracle, residual_search

Books = list[npt.NDArray[np.float32]]


def numpy_oracle(features_Nn: torch.Tensor, codebooks: Books) -> npt.NDArray[np.int64]:
    """The definition once more, in a second library and with another order of summation."""
    residual_Nn = features_Nn.numpy().astype(np.float64)
    codes = []
    for book in codebooks:
        distance_NK = np.square(residual_Nn[:, None] - book.astype(np.float64)).sum(2)
        codes.append(distance_NK.argmin(1))
        residual_Nn = residual_Nn - book[codes[-1]].astype(np.float64)
    return np.stack(codes, 1)


def check(features: npt.NDArray[np.float32], codebooks: Books) -> ResidualSearch:
    """The search equals the oracle in every element; returned for its counters."""
    features_Nn = torch.from_numpy(features)
    found = ResidualSearch(codebooks)
    codes_ND = found(features_Nn)
    assert codes_ND.dtype == torch.int32
    assert codes_ND.shape == (len(features), len(codebooks))
    assert torch.equal(codes_ND, oracle(features_Nn, codebooks))
    return found


def normal(seed: int, *shape: int, scale: float = 1.0) -> npt.NDArray[np.float32]:
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)


def test_random_features_equal_both_oracles() -> None:
    features, books = normal(0, 500, 48), [normal(d + 1, 300, 48, scale=0.7**d) for d in range(4)]
    found = check(features, books)
    assert np.array_equal(
        residual_search(torch.from_numpy(features), books).numpy(), numpy_oracle(torch.from_numpy(features), books)
    )
    assert found.fallback_rows == 0


@settings(max_examples=150)
@given(
    seed=st.integers(0, 2**32 - 1),
    count=st.integers(0, 40),
    sizes=st.lists(st.integers(1, 70), min_size=1, max_size=3),
    width=st.integers(1, 40),
    exponent=st.integers(-40, 36),
    offset=st.sampled_from([0.0, 1.0, 1e3, -1e6]),
    coarse=st.booleans(),
    duplicates=st.booleans(),
    zeros=st.booleans(),
)
def test_the_search_equals_the_oracle(
    seed: int,
    count: int,
    sizes: Sequence[int],
    width: int,
    exponent: int,
    offset: float,
    coarse: bool,
    duplicates: bool,
    zeros: bool,
) -> None:
    """Random, exactly tied (small integers), duplicated, zero, shifted, and from the subnormal to the huge."""
    random = np.random.default_rng(seed)

    def draw(rows: int) -> npt.NDArray[np.float32]:
        values = random.integers(-2, 3, (rows, width)) if coarse else random.standard_normal((rows, width))
        scaled = np.float64(10.0) ** exponent * (values + offset)
        drawn = np.clip(scaled, -3e38, 3e38).astype(np.float32)
        if zeros and rows:
            drawn[random.integers(rows)] = 0
        return drawn

    books = [draw(size) for size in sizes]
    if duplicates:
        books = [book[random.integers(len(book), size=len(book))] for book in books]
    check(draw(count), books)


@pytest.mark.parametrize("size", [1, 2, 127, 128, 129, 255, 256, 257, 300])
def test_the_two_lowest_scores_wherever_they_stand(size: int) -> None:
    scores_NK = torch.from_numpy(normal(size, size * size, size))
    pairs = torch.cartesian_prod(torch.arange(size), torch.arange(size)).T
    scores_NK[torch.arange(size * size), pairs[0]] = -9.0
    scores_NK[torch.arange(size * size), pairs[1]] = torch.where(pairs[0] == pairs[1], -9.0, -8.0)
    lowest_N, best_N, second_N = search._two_lowest(scores_NK)
    assert torch.equal(best_N, pairs[0])
    two_N2 = torch.cat([scores_NK, torch.full((len(scores_NK), 1), torch.inf)], 1).topk(2, largest=False).values
    assert torch.equal(torch.stack([lowest_N, second_N], 1), two_N2)


@pytest.mark.parametrize("size", [127, 128, 129, 257, 400])
def test_ties_between_any_two_columns_go_to_the_lower_id(size: int) -> None:
    book = np.zeros((size, 2), np.float32)
    book[:, 0] = 2 + np.arange(size)
    first, second = np.random.default_rng(size).integers(size, size=(2, 200))
    for k, j in zip(first, second, strict=True):
        if k != j:
            tied = book.copy()
            tied[k], tied[j] = (0, 1), (0, -1)
            assert check(np.zeros((1, 2), np.float32), [tied]).reranked_rows == 1


@given(seed=st.integers(0, 2**32 - 1), gap=st.integers(-60, 0), width=st.integers(2, 64))
def test_near_ties_at_every_distance(seed: int, gap: int, width: int) -> None:
    """Features half way between two vectors, moved off by 2^gap of their distance."""
    random = np.random.default_rng(seed)
    book = random.standard_normal((32, width)).astype(np.float32)
    first, second = book[random.integers(32, size=50)], book[random.integers(32, size=50)]
    features = (first + second) / 2 + (first - second) * np.float32(2.0**gap)
    check(features.astype(np.float32), [book, book * np.float32(0.25)])


def test_ties_go_to_the_lower_id() -> None:
    book = np.array([[1, 0], [-1, 0], [0, 1], [-1, 0], [1, 0]], np.float32)
    features = np.array([[0, 0], [0, 0.5], [-3, 0], [3, 0], [0, -1]], np.float32)
    codes = residual_search(torch.from_numpy(features), [book])[:, 0]
    assert codes.tolist() == [0, 2, 1, 0, 0]


def test_equal_rows_cost_no_fall_back() -> None:
    """Dead codes that were never moved are equal rows: they must not send every feature the slow way."""
    book = np.concatenate([np.zeros((500, 8), np.float32), normal(3, 20, 8), np.zeros((500, 8), np.float32)])
    found = check(normal(4, 200, 8, scale=0.2), [book])
    assert found.fallback_rows == 0


def test_many_candidates_fall_back_and_are_counted() -> None:
    """Vectors on a tiny sphere about the feature: no float32 product can tell them apart."""
    book = (1000 + normal(5, 200, 16, scale=1e-4)).astype(np.float32)
    book[0] = -1000
    found = check(np.full((7, 16), 1000, np.float32), [book])
    assert found.fallback_rows == 7


def test_features_beyond_the_fast_range_fall_back() -> None:
    """In the unit that makes the codebook's norms 1, these features do not fit into float32."""
    book = normal(6, 40, 8, scale=1e-20)
    features = normal(7, 10, 8, scale=1e30)
    features[::2] *= np.float32(1e-25) * np.float32(1e-25)
    found = check(features, [book])
    assert found.fallback_rows == 5


def test_one_vector_and_no_features() -> None:
    check(normal(8, 5, 3), [normal(9, 1, 3), normal(10, 1, 3)])
    check(np.empty((0, 3), np.float32), [normal(11, 4, 3), normal(12, 2, 3)])


def test_codes_do_not_depend_on_chunking(monkeypatch: pytest.MonkeyPatch) -> None:
    features, books = torch.from_numpy(normal(13, 1000, 24)), [normal(14 + d, 64, 24) for d in range(3)]
    whole = residual_search(features, books)
    assert torch.equal(torch.cat([residual_search(part, books) for part in features.split(77)]), whole)
    monkeypatch.setattr(search, "SCORE_BYTES", {"cpu": 1})
    monkeypatch.setattr(search, "_LEAST_ROWS", 64)
    monkeypatch.setattr(search, "_EXACT_BYTES", {"cpu": 2000})
    assert torch.equal(residual_search(features, books), whole)
    assert torch.equal(oracle(features, books), whole)


@settings(max_examples=80)
@given(seed=st.integers(0, 2**32 - 1), width=st.integers(1, 300), scale=st.integers(-30, 30), offset=st.integers(0, 5))
def test_the_bound_brackets_the_true_score(seed: int, width: int, scale: int, offset: int) -> None:
    """lower <= S + tau and S <= lower + 2 eps (h + A C) + tau, S in extended precision."""
    random = np.random.default_rng(seed)
    book = (random.standard_normal((30, width)) * 10.0**offset + 10.0**offset) * 10.0**scale
    vectors = torch.from_numpy(book.astype(np.float32)).double()
    residual = torch.from_numpy(random.standard_normal((20, width)) * 10.0**scale * 10.0 ** (offset / 2))
    fast = Float32Pass(vectors)
    bracket = fast.bracket(residual, torch.empty(20 * 30))
    wide_a = (residual.numpy().astype(np.longdouble) - fast._mean_n.numpy()) * fast._scale
    wide_b = (vectors.numpy().astype(np.longdouble) - fast._mean_n.numpy()) * fast._scale
    score = np.square(wide_b).sum(1) / 2 - wide_a @ wide_b.T
    lower = bracket.lower_NK.numpy().astype(np.longdouble)
    norm_N, norm_K = bracket.norm_N.numpy(), fast._norm_K.numpy()
    tau = fast._tau * (2 + norm_N[:, None])
    width_NK = 2 * fast._eps * (np.square(norm_K) / 2 + norm_N[:, None] * norm_K)
    assert bool(bracket.usable_N.all())
    assert (lower <= score + tau).all()
    assert (score <= lower + width_NK + tau).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_errors(bad: float) -> None:
    features, book = normal(20, 6, 4), normal(21, 5, 4)
    broken = features.copy()
    broken[3, 2] = bad
    with pytest.raises(InputError, match="NaN or infinity"):
        residual_search(torch.from_numpy(broken), [book])
    broken = book.copy()
    broken[0, 0] = bad
    with pytest.raises(InputError, match="codebook of depth 1"):
        residual_search(torch.from_numpy(features), [book, broken])


def test_shapes_that_do_not_fit() -> None:
    book = normal(22, 5, 4)
    with pytest.raises(ValueError, match="float32"):
        residual_search(torch.zeros(3, 4, dtype=torch.float64), [book])
    with pytest.raises(ValueError, match="float32"):
        residual_search(torch.zeros(3, 5), [book])
    with pytest.raises(InputError, match="depth 1"):
        ResidualSearch([book, normal(23, 5, 3)])
    with pytest.raises(InputError, match="depth 0"):
        ResidualSearch([np.empty((0, 4), np.float32)])


def test_reduced_precision_products_are_refused() -> None:
    book = normal(24, 5, 4)
    found = ResidualSearch([book])
    torch.set_float32_matmul_precision("high")
    try:
        with pytest.raises(EnvironmentProblem, match="reduced-precision"):
            found(torch.zeros(1, 4))
    finally:
        torch.set_float32_matmul_precision("highest")
    assert found(torch.zeros(1, 4)).shape == (1, 1)


@pytest.mark.gpu
def test_a_gpu_gives_the_same_codes() -> None:
    features, books = torch.from_numpy(normal(25, 4000, 96)), [normal(26 + d, 512, 96, scale=0.7**d) for d in range(4)]
    assert torch.equal(ResidualSearch(books, "cuda")(features).cpu(), oracle(features, books))
