"""How the codebooks and token sets of a recipe stand, read from their folders. Imports no torch and no Ray."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from manifests.errors import AsvrError, FingerprintMismatch, InputError
from manifests.fingerprint import differing_keys
from manifests.schema import MANIFEST_NAME
from manifests.storage import Store, is_url
from pipeline.steps import Changing, State, Step, counted, in_words

if TYPE_CHECKING:
    from tokenize_stage.config import CodebookConfig, SourceConfig, TokenSetConfig
    from tokenize_stage.planned import Planned

_CODEBOOK_WORDS = {
    "encoder.sha256": "encoder weights changed",
    "encoder.layer": "encoder layer changed:",
    "encoder.dtype": "arithmetic changed:",
    "source": "source changed",
    "geometry.mode": "geometry changed:",
    "geometry.size": "geometry changed:",
    "geometry": "geometry changed",
    "start_from": "the codebook it starts from changed",
}

_SET_WORDS = {
    "tokenizer.weights_sha256": "tokenizer weights changed",
    "tokenizer.weights_sha256.codebook.safetensors": "codebook changed",
    "tokenizer.kind": "tokenizer changed:",
    "tokenizer": "tokenizer changed",
    "geometry.mode": "geometry changed:",
    "geometry.size": "view size changed:",
    "geometry.probe_sha256": "pixels changed",
    "geometry": "geometry changed",
    "dtype": "arithmetic changed:",
    "carry": "carried columns changed:",
    "schema_version": "shard format changed:",
}


def codebook_step(name: str, config: CodebookConfig, before: Changing) -> Step:
    """How one codebook stands. What cannot be told, and why, is a `blocked` step."""
    from tokenize_stage.codebook_folder import DESCRIPTION, TENSORS, codebook_file, read_description
    from tokenize_stage.fit_keys import fit_keys

    def step(state: State, *reasons: str, replaces: bool = False, error: AsvrError | None = None) -> Step:
        return Step("codebook", name, str(config.output), state, reasons, replaces, error)

    there = (config.output / DESCRIPTION).is_file()
    upstream = before.get(str(config.start_from)) if config.start_from else None
    if upstream:
        reason = f"the {upstream} that it starts from will change"
        return step("stale", reason, replaces=True) if there else step("missing")
    try:
        keys = fit_keys(config)
    except AsvrError as error:
        return step("blocked", str(error), error=error)
    absent = _absent(config.source)
    if not there and absent:
        return step("blocked", str(absent), error=absent)
    if not there:
        begun = (config.output / TENSORS).is_file()
        return step("interrupted", "the fit did not end: it begins again") if begun else step("missing")
    try:
        description = read_description(config.output)
        codebook_file(config.output, description)
    except AsvrError as error:
        return step("stale", str(error), replaces=True)
    if description.fit_keys is None:
        changed = description.encoder.sha256 != keys["encoder"]["sha256"]
        differing = ["encoder.sha256: "] if changed else []
    else:
        differing = differing_keys(description.fit_keys, keys)
    if differing and absent:
        return step("blocked", str(absent), error=absent)
    if differing:
        return step("stale", *in_words(_causes(differing), _CODEBOOK_WORDS), replaces=True)
    return step("fresh", f"{len(description.codebook_sizes)} depths of {description.codebook_sizes[0]:,}")


def _absent(source: SourceConfig) -> InputError | None:
    """What of a source on a disk does not exist. Patterns and URLs are left to the step that lists them."""
    for key in ("image_root", "path"):
        named = getattr(source, key, None)
        for place in (named,) if isinstance(named, str) else named or ():
            if not is_url(place) and not set("*?{[") & set(place) and not Path(place).exists():
                return InputError(f"{place} does not exist: correct source.{key}")
    return None


def _causes(differing: list[str]) -> list[str]:
    """Of several differences in the geometry the first that is a setting; the rest follow from it."""
    geometry = [one for one in differing if one.startswith("geometry.")]
    first = ("geometry.mode:", "geometry.size:", "geometry.")
    cause = next((one for start in first for one in geometry if one.startswith(start)), None)
    return [one for one in differing if one not in geometry or one == cause]


def token_set_step(name: str, config: TokenSetConfig, before: Changing) -> Step:
    """How one token set stands, with the source looked at as `asvr tokenize` would. Writes nothing, takes no lease."""
    from tokenize_stage.job import JobResult, preview_job
    from tokenize_stage.output_folder import existing_keys
    from tokenize_stage.resolved import resolve

    def step(state: State, *reasons: str, replaces: bool = False, error: AsvrError | None = None) -> Step:
        return Step("token set", name, config.output, state, reasons, replaces, error)

    try:
        store = Store.open(config.output)
        if owner := store.lease_owner():
            return step("running", f"written by {owner}")
        existing = existing_keys(store)
        codebook = before.get(str(config.tokenizer.path)) if config.tokenizer.kind == "fitted" else None
        if codebook and (absent := _absent(config.source)):
            return step("blocked", str(absent), error=absent)
        if codebook:
            reason = f"its {codebook} will change"
            return step("missing") if existing is None else step("stale", reason, replaces=True)
        found = preview_job(config)
        if isinstance(found, JobResult):
            totals = found.manifest.totals
            rejected = f", {totals.rejected:,} rejected" if totals.rejected else ""
            noted = f"; {found.listing_note}" if found.listing_note else ""
            return step("fresh", f"{counted(totals.images, 'image')}{rejected}{noted}")
        found.budget.check()
        return step(*_unfinished(store, found))
    except FingerprintMismatch as error:
        if existing is None:
            return step("blocked", str(error), error=error)
        differing = differing_keys(existing, resolve(config).keys)
        return step("stale", *in_words(_causes(differing), _SET_WORDS), replaces=True)
    except AsvrError as error:
        return step("blocked", str(error), error=error)


def _unfinished(store: Store, found: Planned) -> tuple[State, str]:
    """The state and reasons of a set that its folder's settings fit, but that is not complete."""
    from tokenize_stage.output_folder import JOB_NAME

    plan = found.plan
    total = found.inventory.images
    left = counted(plan.encode, "image") + " to encode"
    if not store.exists(MANIFEST_NAME):
        if store.exists(JOB_NAME):
            return "interrupted", f"{plan.unchanged:,} of {counted(total, 'image')} committed"
        return "missing", left
    if _goes_on(store, found):
        return "interrupted", f"{plan.unchanged:,} of {counted(total, 'image')} committed"
    kinds = ((plan.new, "added"), (plan.changed, "changed"), (plan.removed, "removed"), (plan.moved, "in another file"))
    said = [f"{counted(changes.count, 'image')} {verb}" for changes, verb in kinds if changes.count]
    if found.stale:
        said.append(f"{counted(len(found.stale), 'unit')} with a lost shard")
    return "stale", "; ".join(said) or "its manifest is to be written anew"


def _goes_on(store: Store, found: Planned) -> bool:
    """Whether an earlier run began to bring the set up to date, or to replace it, and did not end."""
    from manifests.reader import read_manifest
    from manifests.status import status

    _, manifest, _ = read_manifest(store.location)
    if manifest.fingerprint != found.job.fingerprint:
        return True
    return status(Path(store.location) if store.is_local else store.location).state == "interrupted"
