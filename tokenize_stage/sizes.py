"""What a set's values come to in bytes: harmless for codes, the first thing to know of features."""

from __future__ import annotations

from manifests.anyres import most_views
from manifests.schema import Geometry, Producer
from manifests.shards import value_column

MOST_UNIT_BYTES = 512 << 20
"""A worker holds a unit's values until their shard is written. 4,096 images of 729 positions are 48 MB of codes, depth 8,
but 7 GB of features 1,152 wide in bfloat16; with 36 tiles an image the codes are 1.8 GB."""


def image_bytes(spec: Producer, geometry: Geometry) -> int:
    """The most that an image takes in a shard, before compression."""
    return most_views(geometry) * spec.positions * spec.values * value_column(spec).dtype.itemsize


def images_of_a_unit(configured: int, spec: Producer, geometry: Geometry) -> int:
    """`configured`, or fewer where a worker could not hold what they become."""
    return min(configured, max(1, MOST_UNIT_BYTES // image_bytes(spec, geometry)))
