"""What was once read out of a checkpoint, remembered, so that a rerun need not open it (nor import torch) again."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from pydantic import ValidationError

from manifests.atomic import write_atomically
from manifests.fingerprint import canonical_json, digest
from manifests.hashes import cache_dir
from manifests.schema import FeaturesSpec, TokenizerSpec

VERSION = 1
"""Raised whenever any family reads, or checks, its files differently: what was remembered before is forgotten."""

_log = logging.getLogger(__name__)

Spec = TypeVar("Spec", TokenizerSpec, FeaturesSpec)


def remembered_spec(
    kind: str,
    weights_sha256: Mapping[str, str],
    choices: Mapping[str, Any],
    *,
    origin: str,
    revision: str | None,
    read: Callable[[], Spec],
    form: type[Spec],
) -> Spec:
    """`read()`, which opens and checks the checkpoint, or what it returned last time for the very same files.

    The spec is kept in `cache_dir()/specs` under the hash of `kind`, `weights_sha256` (role -> sha256 of every file that
    decides a code) and `choices` (what else of the recipe decides the spec). `origin` and `revision`, where the files
    lie, are not part of that and are set on the answer, a `form`. A damaged entry is read again; errors are not remembered.
    """
    key = {"version": VERSION, "kind": kind, "weights_sha256": dict(weights_sha256), "choices": dict(choices)}
    file = cache_dir() / "specs" / f"{digest(key)}.json"
    spec = _load(file.read_bytes, key, form)
    if spec is None:
        spec = read()
        entry = {"key": key, "spec": spec.model_dump(mode="json", exclude={"origin", "revision"})}
        try:
            write_atomically(file, json.dumps(entry, indent=1).encode())
        except OSError as error:
            _log.warning("cannot remember the tokenizer in %s: %s", file.parent, error.strerror)
    return spec.model_copy(update={"origin": origin, "revision": revision})


def _load(read_bytes: Callable[[], bytes], key: Mapping[str, Any], form: type[Spec]) -> Spec | None:
    try:
        entry = json.loads(read_bytes())
        if canonical_json(entry["key"]) != canonical_json(key):
            return None
        spec = form.model_validate({**entry["spec"], "origin": ""})
    except (OSError, ValueError, KeyError, TypeError, ValidationError):
        return None  # absent or damaged: the checkpoint is read again
    return spec if (spec.kind, spec.weights_sha256) == (key["kind"], key["weights_sha256"]) else None
