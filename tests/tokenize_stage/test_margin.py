"""The bound by which a differing code is judged: exact where it can be, and right about every flip that rounding makes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tokenize_stage.cosine_search import CosineSearch, unit_codebook
from tokenize_stage.margin import TOLERANCE, feature_shifts, shifts
from tokenize_stage.search import residual_search

LINE = [np.array([[0.0, 0.0], [2.0, 0.0]], np.float32), np.array([[0.0, 0.0], [0.0, 2.0]], np.float32)]


def one(feature: list[float], stored: list[int], computed: list[int], books=LINE, **options) -> tuple[int, float]:
    found = shifts(np.array([feature], np.float32), np.array([stored]), np.array([computed]), books, **options)
    assert found.row_M.tolist() == [0]
    return int(found.depth_M[0]), float(found.shift_M[0])


def test_the_shift_is_the_distance_to_the_border():
    # The border between the codes of depth 0 is x = 1; the feature (1.1, 0) is 0.1 away from it.
    assert one([1.1, 0.0], [0, 0], [1, 0], residual=True) == (0, pytest.approx(0.1 / 1.1, rel=1e-6))
    assert one([1.0, 0.0], [1, 0], [0, 0], residual=True) == (0, 0.0)
    # At depth 1 the residual counts: (2, 1.25) - (2, 0), whose border is y = 1.
    length = np.hypot(2, 1.25)
    assert one([2.0, 1.25], [1, 0], [1, 1], residual=True) == (1, pytest.approx(0.25 / length, rel=1e-6))


def test_only_the_first_depth_that_differs_is_judged():
    assert one([1.1, 5.0], [0, 0], [1, 1], residual=True)[0] == 0


def test_chunks_are_judged_by_themselves():
    assert one([9.0, 9.0, 0.0, 1.5], [1, 0], [1, 1], residual=False) == (1, pytest.approx(0.5 / 1.5, rel=1e-6))


def test_ids_that_no_codebook_has_and_equal_vectors():
    assert one([1.1, 0.0], [7, 0], [1, 0], residual=True) == (0, float("inf"))
    twins = [np.zeros((3, 2), np.float32)]
    assert one([1.0, 1.0], [2], [0], books=twins, residual=True) == (0, 0.0)
    assert one([0.0, 0.0], [1], [0], books=LINE[:1], residual=True) == (0, float("inf"))


def test_equal_codes_need_no_shift():
    found = shifts(np.ones((3, 2), np.float32), np.ones((3, 2)), np.ones((3, 2)), LINE, residual=True)
    assert len(found.row_M) == 0


@given(seed=st.integers(0, 2**32 - 1), noise=st.sampled_from([1e-6, 1e-4, 1e-2]))
def test_noise_of_a_size_makes_flips_of_at_most_that_size(seed, noise):
    rng = np.random.default_rng(seed)
    books = [rng.normal(size=(64, 8)).astype(np.float32) / (depth + 1) for depth in range(3)]
    features = rng.normal(size=(400, 8)).astype(np.float32)
    direction = rng.normal(size=features.shape)
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    moved = (features + noise * np.linalg.norm(features, axis=1, keepdims=True) * direction).astype(np.float32)
    stored = residual_search(torch.from_numpy(moved), books).numpy()
    computed = residual_search(torch.from_numpy(features), books).numpy()
    found = shifts(features, stored, computed, books, residual=True)
    assert (found.shift_M <= noise * 1.01 + 1e-6).all()
    assert set(found.row_M) == set(np.flatnonzero((stored != computed).any(axis=1)))


@given(seed=st.integers(0, 2**32 - 1))
def test_cosine_codes_obey_the_same_bound(seed):
    rng = np.random.default_rng(seed)
    books = [unit_codebook(torch.from_numpy(rng.normal(size=(64, 4)).astype(np.float32))) for _ in range(2)]
    features = rng.normal(size=(400, 8)).astype(np.float32)
    noise = 1e-3
    chunks = features.reshape(400, 2, 4)
    direction = rng.normal(size=chunks.shape)
    direction /= np.linalg.norm(direction, axis=2, keepdims=True)
    moved = chunks + noise * np.linalg.norm(chunks, axis=2, keepdims=True) * direction
    search = CosineSearch(books)
    stored = search(torch.from_numpy(moved.reshape(400, 8).astype(np.float32))).numpy()
    computed = search(torch.from_numpy(features)).numpy()
    found = shifts(features, stored, computed, books, residual=False)
    assert (found.shift_M <= noise * 1.01 + 1e-6).all()


def test_a_code_at_random_is_no_work_of_rounding():
    rng = np.random.default_rng(0)
    books = [rng.normal(size=(256, 16)).astype(np.float32)]
    features = rng.normal(size=(1000, 16)).astype(np.float32)
    computed = residual_search(torch.from_numpy(features), books).numpy()
    stored = rng.integers(0, 256, computed.shape)
    found = shifts(features, stored, computed, books, residual=True)
    assert (found.shift_M > TOLERANCE["float32"]).mean() > 0.999
    assert (found.shift_M > TOLERANCE["bfloat16"]).mean() > 0.9


def test_features_are_judged_by_their_length():
    stored = np.array([[3.0, 4.0], [3.0, 4.0], [0.0, 0.0], [1.0, 0.0]], np.float32)
    computed = np.array([[3.0, 4.0], [3.0, 4.5], [0.0, 0.0], [0.0, 0.0]], np.float32)
    shift = feature_shifts(stored, computed)
    assert shift[0] == shift[2] == 0.0
    assert shift[1] == pytest.approx(0.5 / np.hypot(3, 4.5))
    assert shift[3] > 1e30
