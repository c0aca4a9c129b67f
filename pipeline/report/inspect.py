"""`asvr inspect`: one image of a token set, its codes as a map or as numbers, and the shard and row they stand in."""

from __future__ import annotations

import hashlib
import io
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from manifests.decode import Reject
from manifests.errors import InputError
from manifests.geometry import make_views
from manifests.reader import OpenManifest, open_manifest
from manifests.rows import Place, ShardRow, read_rows
from manifests.storage import Store, is_url
from pipeline.console import plain, write_json, write_line, write_table
from pipeline.report.colours import code_colours, draw_sheet
from pipeline.report.gallery import PictureReader, boxes_of, carried, codes_of

_GAP = 2


@dataclass(frozen=True)
class Inspected:
    """An image of a set, and the other images there that have the same bytes."""

    opened: OpenManifest
    row: ShardRow
    codes_VPD: NDArray[np.unsignedinteger] | None
    boxes_V4: NDArray[np.float32]
    copies: list[str]

    def value(self, name: str) -> Any:
        """A column of the image's row."""
        return self.row.values[name][0].as_py()


def inspect_image(image: str, out: str, *, as_json: bool, png: Path | None) -> None:
    """Print what a set knows of an image. Raises InputError where it has none such, or no picture is there to draw."""
    found = find_image(open_manifest(out), image)
    if png:
        write_png(found, png)
    if as_json:
        write_json(as_dict(found))
        return
    write_table(_rows(found))
    if found.codes_VPD is not None:
        _show_codes(found, found.codes_VPD)
    if png:
        write_line(plain(f"drawn: {png}"))


def find_image(opened: OpenManifest, image: str) -> Inspected:
    """The image with this id, or with the bytes of this local file. InputError says why there is none."""
    opened.check_index()  # of a damaged set nothing else is said
    row = _first(opened, "image_id", image) if _is_text(image) else None
    row = row or _by_content(opened, image)
    (found,) = read_rows(opened, [Place(row["shard"], row["row"])])
    copies = _ids(opened, lambda batch: pc.equal(batch["sha256"], row["sha256"]))
    others = [name for name in copies if name != row["image_id"]]
    return Inspected(opened, found, codes_of(opened, found), boxes_of(found), others)


def _by_content(opened: OpenManifest, image: str) -> dict[str, Any]:
    """The row of the index whose sha256 is that of a local file."""
    path = Path(image)
    if not is_url(image) and "\0" not in image and len(image) < os.pathconf("/", "PC_PATH_MAX") and path.is_file():
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        if row := _first(opened, "sha256", sha256):
            return row
        raise InputError(
            f"no image of {opened.folder} has the bytes of {image}: it was not tokenized, or has changed since"
        )
    if not _is_text(image):
        raise InputError(f"{image!r} is no image of {opened.folder}, and cannot be: it is not UTF-8")
    for batch in opened.iter_rejects(["image_id", "reason", "message"]):
        for refused in batch.filter(pc.equal(batch["image_id"], image)).to_pylist():
            raise InputError(f"{image} has no codes: it was rejected as {refused['reason']} ({refused['message']})")
    text = Path(image).name or image
    near = list(islice(_ids(opened, lambda batch: pc.match_substring(batch["image_id"], text)), 3))
    hint = f"did you mean {' or '.join(near)}?" if near else "give an image id, or a file with its bytes"
    raise InputError(f"{opened.folder} has no image {image}: {hint}")


def _first(opened: OpenManifest, column: str, value: str) -> dict[str, Any] | None:
    """The first row of the index with this value in a column; the rest is not read."""
    for batch in opened.iter_index(["image_id", "sha256", "shard", "row"]):
        for row in batch.filter(pc.equal(batch[column], value)).slice(0, 1).to_pylist():
            return dict(row)
    return None


def _ids(opened: OpenManifest, mask: Callable[[pa.RecordBatch], pa.Array]) -> Iterator[str]:
    """The ids of the images for which `mask` is true of their id and sha256, as they are come upon."""
    for batch in opened.iter_index(["image_id", "sha256"]):
        yield from batch.filter(mask(batch))["image_id"].to_pylist()


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def as_dict(found: Inspected) -> dict[str, Any]:
    """For programs. `codes` is one list a view, of one list a depth, of P codes row-major."""
    views = [{"box": box.tolist()} for box in found.boxes_V4]
    if found.codes_VPD is not None:
        for view, codes_PD in zip(views, found.codes_VPD, strict=True):
            view["codes"] = codes_PD.T.tolist()
    return {
        **{name: found.value(name) for name in ("image_id", "sha256", "width", "height", "file", "offset", "length")},
        "shard": found.row.shard.path,
        "row": found.row.row,
        "unit": found.row.shard.unit,
        "grid": list(found.opened.manifest.producer.grid),
        "views": views,
        "carried": dict(carried(found.opened, found.row)),
        "same_bytes": found.copies,
    }


def _rows(found: Inspected) -> list[tuple[str, str]]:
    geometry, length = found.opened.manifest.geometry, found.value("length")
    lies = f"{length:,} bytes at {found.value('offset'):,} of {found.value('file')}"
    rows = [
        ("image", found.value("image_id")),
        ("size", f"{found.value('width'):,} x {found.value('height'):,} pixels"),
        ("sha256", found.value("sha256")),
        ("source", lies),
        ("shard", found.opened.store.where(found.row.shard.path)),
        ("row", f"{found.row.row:,}, counted from 0, of {found.row.shard.rows:,}"),
        (
            "views",
            f"{len(found.boxes_V4)} of {geometry.mode} {geometry.size}; a box is left, top, right, bottom in source pixels",
        ),
    ]
    rows += [(f"box {n}", " ".join(f"{edge:g}" for edge in box)) for n, box in enumerate(found.boxes_V4)]
    rows += carried(found.opened, found.row)
    rows += [("same bytes", name) for name in found.copies[:3]]
    return rows


def _show_codes(found: Inspected, codes_VPD: NDArray[np.unsignedinteger]) -> None:
    rows, columns = found.opened.tokenizer.grid
    codes_VYXD = codes_VPD.reshape(len(codes_VPD), rows, columns, -1)
    from rich.console import Console

    screen = Console(highlight=False, markup=False, emoji=False)
    coloured = screen.is_terminal and screen.color_system is not None and not screen.no_color
    colours = [code_colours(book) for book in found.opened.codebooks()] if coloured else []
    for view, codes_YXD in enumerate(codes_VYXD):
        if coloured:
            for line in map_lines(codes_YXD, colours, screen.width, f"view {view}, " if len(codes_VYXD) > 1 else ""):
                screen.print(line, no_wrap=True, crop=True)
            continue
        for depth in range(codes_YXD.shape[-1]):
            write_line()
            write_line(f"view {view}, depth {depth}")
            width = len(str(found.opened.tokenizer.codebook_sizes[depth] - 1))
            for line in codes_YXD[:, :, depth]:
                write_line(" ".join(f"{code:>{width}}" for code in line))
    sys.stdout.flush()


def map_lines(
    codes_YXD: NDArray[np.unsignedinteger], colours: Sequence[NDArray[np.uint8]], width: int, title: str = ""
) -> list[Any]:
    """The code maps of all depths as lines of rich text, as many maps side by side as fit; a cell is two rows of codes."""
    from rich.color import Color
    from rich.style import Style
    from rich.text import Text

    rows, columns, depths = codes_YXD.shape
    cell = max(columns, 8)
    beside = max(1, (width + _GAP) // (cell + _GAP))
    lines = []
    for first in range(0, depths, beside):
        chosen = range(first, min(first + beside, depths))
        lines.append(Text(""))
        lines.append(Text((" " * _GAP).join(f"{'depth ' + str(d):<{cell}}" for d in chosen)))
        if title and not first:
            lines.insert(-1, Text(title.rstrip(", ")))
        for top in range(0, rows, 2):
            line = Text()
            for depth in chosen:
                for column in range(columns):
                    upper = Color.from_rgb(*colours[depth][codes_YXD[top, column, depth]].tolist())
                    lower = (
                        Color.from_rgb(*colours[depth][codes_YXD[top + 1, column, depth]].tolist())
                        if top + 1 < rows
                        else None
                    )
                    line.append("\u2580", Style(color=upper, bgcolor=lower))
                line.append(" " * (cell - columns + _GAP))
            lines.append(line)
    return lines


def write_png(found: Inspected, path: Path) -> None:
    """Draw the views beside their code maps into a PNG file; without codes the views alone."""
    spec = found.opened.manifest.producer
    try:
        pixels = PictureReader(found.opened).decoded(found.row)
    except Reject as reject:
        raise InputError(f"{found.value('image_id')} cannot be drawn ({reject.message}): leave --png out") from reject
    views, _ = make_views(pixels, found.opened.manifest.geometry)
    codes = np.empty((len(views), *spec.grid, 0), np.uint16)
    if found.codes_VPD is not None:
        codes = found.codes_VPD.reshape(len(views), *spec.grid, -1)
    colours = [code_colours(book) for book in found.opened.codebooks()] if found.codes_VPD is not None else []
    stream = io.BytesIO()
    draw_sheet(views, codes, colours).save(stream, "PNG")
    Store.open(path.parent).write(path.name, stream.getvalue())
