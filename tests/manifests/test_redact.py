"""Secrets do not reach what is written down, and nothing else is changed."""

from __future__ import annotations

import json
import string
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manifests.redact import HIDDEN, command_line, is_secret_name, redact, redact_text

SECRETS = st.text(string.ascii_letters + string.digits + "+_-", min_size=12, max_size=40)


@pytest.mark.parametrize(
    "name",
    [
        "HF_TOKEN",
        "AWS_SECRET_ACCESS_KEY",
        "WANDB_API_KEY",
        "--token",
        "--api-key",
        "password",
        "db_passwd",
        "X-Amz-Signature",
    ],
)
def test_names_of_secrets(name: str) -> None:
    assert is_secret_name(name)


@pytest.mark.parametrize(
    "name",
    ["tokenizer", "tokenize", "tokens", "pad_token_id", "image_token", "max_tokens", "keys", "path", "eos_token"],
)
def test_names_that_only_look_like_it(name: str) -> None:
    assert not is_secret_name(name)


@given(SECRETS)
def test_no_way_of_giving_a_secret_lets_it_through(secret: str) -> None:
    ways = [
        f"https://user:{secret}@host/data",
        f"s3://{secret}@bucket/x",
        f"https://bucket/x?X-Amz-Signature={secret}&more=1",
        f"https://account.blob/x?sv=1&sig={secret}&se=2",
        f"--set=train.api_key={secret}",
        f"password: {secret}",
    ]
    for text in ways:
        assert secret not in redact_text(text), text
    given_as = {"wandb": {"api_key": secret, "group": "a"}, "list": [{"HF_TOKEN": secret}]}
    assert secret not in json.dumps(redact(given_as))
    assert redact(given_as)["wandb"]["group"] == "a"


def test_a_secret_of_the_environment_is_known_wherever_it_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_STORE_PASSWORD", "correct-horse-battery")
    monkeypatch.setattr(
        sys, "argv", ["asvr", "tokenize", "r.yaml", "--set", "a.b=xcorrect-horse-batteryx", "--token", "t0k"]
    )
    said = command_line()
    assert "correct-horse" not in " ".join(said)
    assert said == ["asvr", "tokenize", "r.yaml", "--set", f"a.b=x{HIDDEN}x", "--token", HIDDEN]


def test_tokens_of_published_forms(monkeypatch: pytest.MonkeyPatch) -> None:
    for token in ("hf_" + "a" * 34, "ghp_" + "b" * 36, "AKIA" + "C" * 16):
        assert token not in redact_text(f"push --as {token} now")


@given(st.text(string.ascii_lowercase + " ./_", max_size=60))
def test_other_text_stays_as_it_is(text: str) -> None:
    assert redact_text(text) == text
