"""Try the rejects of a token set again, with the settings that its folder remembers: `asvr retry OUT`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import yaml
from pydantic import ValidationError

from manifests.commits import read_commits
from manifests.documents import first_problem
from manifests.errors import RecipeError
from manifests.id_index import IdIndex
from manifests.reader import OpenManifest, load_manifest
from manifests.rejects import RejectReason
from manifests.repeated_ids import columns_of
from manifests.storage import Store
from tokenize_stage.config import TokenSetConfig
from tokenize_stage.job import JobResult, run_job
from tokenize_stage.output_folder import read_config, read_job_file
from tokenize_stage.progress import Progress

RETRYABLE = frozenset(
    {
        "max_pixels", "max_reject_rate", "max_consecutive_rejects", "engine", "ray", "device", "torch_threads",
        "decode_threads",
    }
)  # fmt: skip
"""Settings that a retry may change, because they decide which images are rejects or how the job runs, and no code."""


@dataclass(frozen=True)
class RetryReport:
    """The rejects that were tried again, by reason, and how many of them are ok now. `result`: None without any."""

    tried: dict[str, int]
    recovered: int
    result: JobResult | None


def retry_rejects(
    store: Store, reasons: Sequence[str] = (), overrides: Sequence[str] = (), *, progress: Progress | None = None
) -> RetryReport:
    """Read the rejected images of the given reasons (none given: all) again; ok images are copied, not encoded.

    The set need not be finished: a job that its rejects have stopped goes on with this. `overrides` are `KEY=VALUE` of
    the settings in `RETRYABLE`. Raises `RecipeError` for an unknown reason or setting, `InputError` where no job was,
    and what `run_job` raises.
    """
    wanted = _reasons(reasons)
    config = _overridden(read_config(store), overrides)
    rejects = _rejects(store, wanted)
    tried = Counter(rejects["reason"].to_pylist())
    if not tried:
        return RetryReport({}, 0, None)
    result = run_job(config, retry=wanted, progress=progress)
    return RetryReport(dict(sorted(tried.items())), _ok_now(load_manifest(store.location), rejects["image_id"]), result)


def _reasons(reasons: Sequence[str]) -> frozenset[str]:
    known = {reason.value for reason in RejectReason}
    if unknown := sorted(set(reasons) - known):
        raise RecipeError(f"{unknown[0]!r} is no reason of a reject: choose from {', '.join(sorted(known))}")
    return frozenset(reasons) or frozenset(known)


def _overridden(config: TokenSetConfig, overrides: Sequence[str]) -> TokenSetConfig:
    values: dict[str, Any] = config.model_dump(mode="json")
    for override in overrides:
        key, given, text = override.partition("=")
        if not given or key not in RETRYABLE:
            raise RecipeError(
                f"--set {override!r} is not possible in a retry: write KEY=VALUE with one of {', '.join(sorted(RETRYABLE))}"
            )
        try:
            values[key] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise RecipeError(f"--set {override!r} has no value that YAML reads: correct it") from error
    try:
        return TokenSetConfig.model_validate(values)
    except ValidationError as error:
        raise RecipeError(f"--set is refused ({first_problem(error)}): correct it") from error


def _rejects(store: Store, reasons: frozenset[str]) -> pa.Table:
    """Id and reason of the rejects with these reasons, those among them that no manifest has yet."""
    mark = read_job_file(store).fingerprint
    ids: list[str] = []
    why: list[str] = []
    for record in read_commits(store):
        rows = [row for row in record.rejects if row.reason in reasons] if record.fingerprint == mark else []
        ids += [row.image_id for row in rows]
        why += [row.reason for row in rows]
    return pa.table({"image_id": pa.array(ids, pa.string()), "reason": pa.array(why, pa.string())})


def _ok_now(opened: OpenManifest, names: pa.ChunkedArray) -> int:
    """How many of some images the set holds: they are looked up from a pass over its index."""
    index = IdIndex(names)
    return sum(int((index.find(ids) >= 0).sum()) for ids in columns_of(opened.iter_index(["image_id"])))
