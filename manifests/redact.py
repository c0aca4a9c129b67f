"""Secrets are taken out of what is written down: command lines and settings that go into manifests, checkpoints and leases.

Nobody is meant to put one there, and somebody always does: a token behind an option, a password in a URL, a signed link.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from typing import Any

HIDDEN = "***"
"""What stands in a secret's place."""

_NAME = r"(?:secret|passw(?:or)?d|passphrase|credentials?|api[_-]?key|access[_-]?key|private[_-]?key|signature)"
_OF_TEXT = r"(?<!image[_-])(?<!pad[_-])(?<!bos[_-])(?<!eos[_-])(?<!unk[_-])"
"""Tokens that are no secrets: those of a text tokenizer."""
_SECRET_NAME = re.compile(rf"(?:^|[^a-z]){_NAME}(?:$|[^a-z])|(?:^|[^a-z]){_OF_TEXT}token$", re.IGNORECASE)
_ASSIGNED = re.compile(
    rf"((?:^|[^A-Za-z])(?:{_NAME}[A-Za-z_-]*|{_OF_TEXT}token)\s*[=:]\s*)([^\s&;,'\"]+)", re.IGNORECASE
)
_IN_URL = re.compile(r"(\w[\w+.-]*://)[^/@\s]*@")
_SIGNED = re.compile(r"([?&]sig=)[^\s&;,'\"]+")
"""Azure's signature in a URL."""
_PUBLISHED_FORMS = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{20,}|gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{30,}|glpat-[\w-]{20,}|sk-[\w-]{20,}|"
    r"(?:AKIA|ASIA)[A-Z0-9]{16}|xox[abprs]-[\w-]{10,}|AIza[\w-]{35})"
)
"""Tokens that say themselves what they are: Hugging Face, GitHub, GitLab, OpenAI, AWS, Slack, Google."""

_LEAST_SECRET = 8
"""Values of fewer characters are no secrets, and could stand anywhere by chance."""


def command_line() -> list[str]:
    """This process's command line, for provenance, without the secrets that may stand in it."""
    hidden: list[str] = []
    for argument in sys.argv:
        behind_option = bool(hidden) and hidden[-1].startswith("--") and "=" not in hidden[-1]
        secret = behind_option and is_secret_name(hidden[-1]) and not argument.startswith("-")
        hidden.append(HIDDEN if secret else redact_text(argument))
    return hidden


def redact(value: Any, name: str = "") -> Any:
    """A JSON-like value without secrets: by the names of its keys, and by what its texts look like."""
    if isinstance(value, Mapping):
        return {key: redact(item, str(key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [redact(item, name) for item in value]
    if isinstance(value, str):
        return HIDDEN if value and is_secret_name(name) else redact_text(value)
    return value


def redact_text(text: str) -> str:
    """`text` without URL credentials, `password=...`, tokens of well-known forms, and this environment's own secrets."""
    text = _IN_URL.sub(rf"\1{HIDDEN}@", text)
    text = _ASSIGNED.sub(rf"\1{HIDDEN}", text)
    text = _SIGNED.sub(rf"\1{HIDDEN}", text)
    text = _PUBLISHED_FORMS.sub(HIDDEN, text)
    for secret in _environment_secrets():
        text = text.replace(secret, HIDDEN)
    return text


def is_secret_name(name: str) -> bool:
    """Whether a key, an option or a variable of this name holds a secret: `HF_TOKEN`, `--api-key`, `db_password`."""
    return bool(_SECRET_NAME.search(name.replace("_", "-")))


def _environment_secrets() -> list[str]:
    """Values of variables whose names say that they are secrets, the longest first."""
    values = {value for name, value in os.environ.items() if is_secret_name(name) and len(value) >= _LEAST_SECRET}
    # A path to a file of credentials is no secret, and stands in many a sentence.
    return sorted((value for value in values if not value.startswith(("/", "~"))), key=len, reverse=True)
