"""The card of a published token set: what a person reads on the Hub, and what `datasets` needs to load the shards."""

from __future__ import annotations

import json
from typing import Any

import yaml

from manifests.reader import OpenManifest
from manifests.redact import redact_text
from manifests.schema import TokenizerSpec
from tokenize_stage.families import PUBLISHED

CARD_NAME = "README.md"


def data_card(opened: OpenManifest, repo: str, licence: str | None) -> str:
    """Markdown with YAML front matter. Everything that was written by others stands in code, so none of it is markup."""
    manifest = opened.manifest
    spec, totals = manifest.producer, manifest.totals
    front: dict[str, Any] = {
        "license": licence or "other",
        "tags": ["asvr", "visual-tokens", manifest.kind],
        "configs": [{"config_name": "default", "data_files": [{"split": "train", "path": "shards/*.parquet"}]}],
    }
    rows = {
        "kind": manifest.kind,
        "images": f"{totals.ok:,} ok, {totals.rejected:,} rejected",
        "made by": f"{spec.kind}, {spec.origin}" + (f" at {spec.revision}" if getattr(spec, "revision", None) else ""),
        "a view": f"{spec.view_size} pixels, {manifest.geometry.mode}; {spec.grid[0]} x {spec.grid[1]} positions",
        "values": _values(spec),
        "licence of the published tokenizer": _licence_of(spec.kind),
        "fingerprint": manifest.fingerprint,
        "manifest": opened.digest,
        "made with": ", ".join(f"{name} {version}" for name, version in manifest.provenance.versions.items()),
    }
    table = "\n".join(f"| {name} | {_code(value)} |" for name, value in rows.items())
    return f"""\
---
{yaml.safe_dump(front, sort_keys=False).strip()}
---

# {manifest.kind.capitalize()} of {totals.ok:,} images

One row per image, without the images themselves. `manifest.json` says what the set is; shards that it does not name do
not belong to it. Whether you may use these values for your purpose depends on the licences of the images and of the tokenizer.

| | |
|---|---|
{table}

Read the shards as plain Parquet, or train on them: `manifests: [hf://datasets/{repo}]` in a phase of a recipe.
"""


def _values(spec: Any) -> str:
    if isinstance(spec, TokenizerSpec):
        depths = "residual" if spec.residual else "independent"
        return f"{spec.depth} {depths} codes a position, codebooks of {json.dumps(list(spec.codebook_sizes))}"
    return f"{spec.values} numbers a position, {spec.dtype}"


def _licence_of(kind: str) -> str:
    return ", ".join(sorted({row.licence for row in PUBLISHED if row.kind == kind})) or "-"


def _code(value: str) -> str:
    """Text from outside as inline code of one table cell."""
    harmless = redact_text(value).replace("`", "'").replace("|", "/")
    return f"`{' '.join(harmless.split())}`"
