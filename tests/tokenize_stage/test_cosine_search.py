"""The cosine search against its float64 oracle, where rounding, ties and scale could make them differ."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from manifests.errors import EnvironmentProblem, InputError
from tokenize_stage import cosine_search
from tokenize_stage.cosine_search import CosineSearch, cosine_oracle, unit, unit_codebook

Books = list[NDArray[np.float32]]


def random_books(depth: int, size: int, width: int, seed: int = 0) -> Books:
    generator = torch.Generator().manual_seed(seed)
    return [unit_codebook(torch.randn(size, width, generator=generator)) for _ in range(depth)]


def random_features(count: int, width: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("depth", "size", "width"), [(8, 512, 8), (4, 64, 8), (1, 300, 7), (3, 40, 1), (2, 50, 33)])
def test_every_code_is_the_oracle_s(depth: int, size: int, width: int) -> None:
    books = random_books(depth, size, width)
    features = random_features(500, depth * width)
    codes = CosineSearch(books)(features)
    assert codes.dtype == torch.int32
    assert torch.equal(codes, cosine_oracle(features, books))


def test_codes_that_float32_cannot_tell_apart_are_decided_in_float64() -> None:
    generator = torch.Generator().manual_seed(5)
    centres = torch.randn(20, 8, generator=generator).repeat_interleave(20, 0)
    book = unit_codebook(centres + 1e-7 * torch.randn(400, 8, generator=generator))
    features = random_features(300, 8)
    search = CosineSearch([book])
    codes = search(features)
    assert torch.equal(codes, cosine_oracle(features, [book]))
    assert search.reranked_rows > 100
    fast = (unit(features) @ torch.from_numpy(book).T).argmax(1)
    assert not torch.equal(codes[:, 0].long(), fast)  # the case is as hard as it claims to be


def test_ties_go_to_the_lower_id_even_between_rows_of_different_length() -> None:
    row = torch.tensor([[0.3, -1.2, 0.7, 0.1]])
    book = unit_codebook(torch.cat([-row, row * 3, row * 0.7, row]))
    features = torch.cat([row * 5, row * 1e-20, -row])
    assert CosineSearch([book])(features)[:, 0].tolist() == [1, 1, 0]


def test_a_chunk_of_zeros_gets_code_zero() -> None:
    books = random_books(2, 64, 8)
    features = random_features(3, 16)
    features[1, :8] = 0
    codes = CosineSearch(books)(features)
    assert codes[1, 0] == 0
    assert torch.equal(codes, cosine_oracle(features, books))


def test_the_length_of_a_chunk_does_not_matter() -> None:
    books = random_books(4, 128, 8)
    features = random_features(200, 32)
    scales = torch.tensor([2.0**-40, 1.0, 2.0**40, 2.0**-100]).repeat_interleave(8)
    assert torch.equal(CosineSearch(books)(features * scales), CosineSearch(books)(features))


def test_neither_the_batch_nor_the_chunks_change_a_code(monkeypatch: pytest.MonkeyPatch) -> None:
    books = random_books(4, 96, 8)
    features = random_features(333, 32)
    whole = CosineSearch(books)(features)
    monkeypatch.setattr(cosine_search, "SCORE_BYTES", {"cpu": 1})
    monkeypatch.setattr(cosine_search, "_PAIR_BYTES", {"cpu": 1})
    assert torch.equal(CosineSearch(books)(features), whole)
    assert torch.equal(torch.cat([CosineSearch(books)(part) for part in features.split(7)]), whole)


def test_units_have_length_one() -> None:
    vectors = random_features(1000, 8) * torch.logspace(-30, 15, 1000)[:, None]
    assert (unit(vectors).double().norm(dim=1) - 1).abs().max() < 2.0**-23


def test_what_has_no_direction_or_no_value_is_refused() -> None:
    with pytest.raises(InputError, match="row of zeros"):
        unit_codebook(torch.tensor([[1.0, 2.0], [0.0, 0.0]]))
    features = random_features(3, 16)
    features[2, 3] = torch.nan
    with pytest.raises(InputError, match="NaN"):
        CosineSearch(random_books(2, 64, 8))(features)


def test_reduced_precision_products_are_refused() -> None:
    search = CosineSearch(random_books(1, 8, 4))
    torch.set_float32_matmul_precision("high")
    try:
        with pytest.raises(EnvironmentProblem):
            search(random_features(2, 4))
    finally:
        torch.set_float32_matmul_precision("highest")
