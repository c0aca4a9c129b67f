import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manifests.errors import FingerprintMismatch
from manifests.fingerprint import canonical_json, check_same, differing_keys, digest, fingerprint

leaves = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
values = st.recursive(leaves, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=12)
key_sets = st.dictionaries(st.text(), values, max_size=5)


@given(key_sets)
def test_canonical_json_round_trips_and_ignores_key_order(keys):
    text = canonical_json(keys)
    assert json.loads(text) == keys
    assert canonical_json(dict(reversed(keys.items()))) == text


@given(key_sets, key_sets)
def test_no_key_differs_exactly_when_fingerprints_agree(a, b):
    assert (differing_keys(a, b) == []) == (fingerprint(a) == fingerprint(b))
    assert differing_keys(a, a) == []


def test_the_digest_is_pinned():
    """A change of this value would strand every token set ever made."""
    assert digest({"b": [1, 2.5, True, None], "a": {"é": "x"}}) == (
        "db343cc9c2d49819a25da7488fecf28a550ec11d922d59a263dc557b1b170d72"
    )


def test_nan_has_no_fingerprint():
    with pytest.raises(ValueError, match="JSON compliant"):
        fingerprint({"a": float("nan")})


def test_a_mismatch_names_keys_and_both_values():
    old = {"geometry": {"size": 224, "mode": "pad"}, "dtype": "float32", "gone": 1}
    new = {"geometry": {"size": 336, "mode": "pad"}, "dtype": "float32", "policy": {"exif": True}}
    assert differing_keys(old, new) == [
        "geometry.size: 224 -> 336",
        "gone: 1 -> (absent)",
        'policy: (absent) -> {"exif":true}',
    ]
    with pytest.raises(FingerprintMismatch, match=r"out holds codes .*geometry\.size: 224 -> 336.*--replace") as caught:
        check_same(old, new, where="out")
    assert "\n" not in str(caught.value)
    check_same(old, dict(old), where="out")


def test_a_long_list_of_differences_is_cut_short():
    with pytest.raises(FingerprintMismatch, match="and 12 more"):
        check_same({}, {f"k{i:02d}": "x" * 500 for i in range(20)}, where="out")
