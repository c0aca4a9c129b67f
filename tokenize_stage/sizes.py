"""What a set's values come to in bytes: harmless for codes, the first thing to know of features."""

from __future__ import annotations

from manifests.schema import FeaturesSpec, Producer
from manifests.shards import value_column
from tokenize_stage.worker import VIEWS

MOST_UNIT_BYTES = 512 << 20
"""A worker holds a unit's features until their shard is written; 4,096 images of 729 x 1,152 in bfloat16 are 7 GB."""


def image_bytes(spec: Producer) -> int:
    """What an image takes in a shard, before compression."""
    return VIEWS * spec.positions * spec.values * value_column(spec).dtype.itemsize


def images_of_a_unit(configured: int, spec: Producer) -> int:
    """`configured`, or fewer where a worker could not hold their features."""
    if not isinstance(spec, FeaturesSpec):
        return configured
    return min(configured, max(1, MOST_UNIT_BYTES // image_bytes(spec)))
