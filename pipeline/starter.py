"""`asvr init`: looks at the data at hand and writes a commented recipe for it.

A recipe is text that a person goes on editing, so it is written as text; every value from outside is quoted as JSON,
which is YAML too.
"""

from __future__ import annotations

import json
import os
import stat
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from manifests.atomic import storage_errors
from manifests.errors import InputError

LOOKED_AT = 20_000
"""Files of a folder, or records of a file, that are looked at before it is decided what they are."""

FULL_SIZE = 16_384
"""Vectors of a codebook for FULL_SIZE / 2 images or more; of fewer images, twice as many as there are, down to 256."""

_RECORDS = (".json", ".jsonl", ".json.zst", ".jsonl.zst")
_TARS = (".tar", ".tar.zst")
_TABLES = (".parquet", ".arrow")
_PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
_KINDS = {"webdataset": _TARS, "parquet": _TABLES, "folder": _PICTURES}


@dataclass(frozen=True)
class Data:
    """What was found: the source of a recipe, and the records to train on where there are some.

    `why` says in words what was seen; `images` is None where it would take long to count them; `long_talks`: a record holds
    more than one question and answer.
    """

    source: dict[str, str]
    why: str
    records: tuple[str, str] | None = None
    images: int | None = None
    long_talks: bool = False


def write_recipe(data: str, output: Path, *, encoder: str, language_model: str) -> Data:
    """Write a recipe for `data` (a file or folder) to the new file `output`, and return what was found.

    Raises `InputError` when the data are of no known kind or `output` exists, and `StorageError`.
    """
    found = look_at(Path(data).absolute())
    text = recipe_text(found, encoder=_model(encoder), language_model=_model(language_model))
    with storage_errors("write", output):
        output.parent.mkdir(parents=True, exist_ok=True)
        try:
            with output.open("x", encoding="utf-8") as file:
                file.write(text)
        except FileExistsError:
            raise InputError(f"{output} is there already: name another file with --output, or remove it") from None
    return found


def look_at(path: Path) -> Data:
    """What kind of source a file or folder is; `InputError` if it is none."""
    with storage_errors("read", path):
        if not path.exists():
            raise InputError(f"{path} does not exist: give the folder or file that your pictures or records are in")
        if path.is_file():
            return _file(path)
        names = list(islice(_files(path), LOOKED_AT))
    records = [name for name in names if name.lower().endswith(_RECORDS)]
    conversations = [found for name in records if (found := _records(path / name)) is not None]
    if len(conversations) == 1:
        return conversations[0]
    if len(conversations) > 1:
        raise InputError(
            f"{path} holds {len(conversations)} files of records: name the one you want, e.g. asvr init "
            f"{conversations[0].source['path']}"
        )
    seen: Counter[str] = Counter()
    for name in names:
        seen.update(kind for kind, suffixes in _KINDS.items() if name.lower().endswith(suffixes))
    if not seen:
        raise InputError(
            f"{path} holds no LLaVA records ({', '.join(_RECORDS)}), tars, Parquet files or pictures: "
            "give the folder or file that they are in"
        )
    kind, count = seen.most_common(1)[0]
    if kind == "parquet":
        first = next(name for name in sorted(names) if name.lower().endswith(_TABLES))
        return _table(path / first, path)
    more = "more than " if len(names) == LOOKED_AT else ""
    noun = "tar files" if kind == "webdataset" else "pictures"
    images = count if kind == "folder" and not more else None
    return Data({"kind": kind, "path": str(path)}, f"{more}{count:,} {noun} below {path}", images=images)


def _file(path: Path) -> Data:
    name = path.name.lower()
    if name.endswith(_RECORDS):
        found = _records(path)
        if found is None:
            _read_first(path)
            raise InputError(f"no record of {path} names an image: give LLaVA records or Hugging Face messages")
        return found
    if name.endswith(_TARS):
        return Data({"kind": "webdataset", "path": str(path)}, f"the tar file {path}")
    if name.endswith(_TABLES):
        return _table(path, path)
    raise InputError(f"{path} is no file of records, tar or Parquet file: give one, or a folder")


def _records(path: Path) -> Data | None:
    """LLaVA records, with the folder in which their first image is; None for JSON of another kind."""
    try:
        images = _read_first(path)
    except InputError:
        return None
    if not images:
        return None
    beside = sorted(child for child in path.parent.iterdir() if child.is_dir())
    roots = [path.parent, path.parent / "images", *beside]
    root = next((root for image in images[:10] for root in roots if _is_below(root, image)), None)
    told = (
        f"with pictures below {root}"
        if root
        else f"whose pictures were not found: correct image_root (now {path.parent})"
    )
    root = root or path.parent
    source = {"kind": "llava", "path": str(path), "image_root": str(root)}
    count, long_talks = _counted(path)
    return Data(
        source, f"the records {path}, {told}", records=(str(path), str(root)), images=count, long_talks=long_talks
    )


def _read_first(path: Path) -> list[str]:
    """The images that the first records of a file name. Raises `InputError` when it cannot be read."""
    from manifests.records import Record, read_records

    first = islice(read_records(path), 100)
    return [image for record in first if isinstance(record, Record) for image in record.images]


def _counted(path: Path) -> tuple[int | None, bool]:
    """`Data.images` and `Data.long_talks` of records; no number for a file that is long, or damaged further on."""
    from manifests.records import Record, read_records

    images: set[str] = set()
    long_talks = False
    try:
        for number, record in enumerate(read_records(path)):
            if number == LOOKED_AT:
                return None, long_talks
            if isinstance(record, Record):
                images.update(record.images)
                long_talks |= len(record.conversations) > 2
    except InputError:
        return None, long_talks
    return len(images), long_talks


def _is_below(root: Path, image: str) -> bool:
    try:
        return not os.path.isabs(image) and ".." not in Path(image).parts and (root / image).is_file()  # noqa: PTH117
    except (OSError, ValueError):  # a name too long, or with a NUL character
        return False


def _table(path: Path, given: Path) -> Data:
    import pyarrow as pa
    import pyarrow.parquet as pq
    import pyarrow.types as pt

    try:
        if path.suffix.lower() == ".arrow":
            with pa.OSFile(str(path)) as file:
                schema = pa.ipc.open_stream(file).schema
        else:
            schema = pq.read_schema(path)
    except pa.ArrowException as error:
        raise InputError(f"{path} is not a table that can be read ({error}): repair it, or give other data") from error
    for field in schema:
        kind = field.type
        holder = kind.field("bytes").type if pt.is_struct(kind) and kind.get_field_index("bytes") >= 0 else kind
        if pt.is_binary(holder) or pt.is_large_binary(holder):
            source = {"kind": "parquet", "path": str(given), "image_column": field.name}
            return Data(source, f"the images in column {field.name} of {path}")
    raise InputError(
        f"no column of {path} holds image bytes, it has {', '.join(schema.names)}: for a column of paths write "
        "source: {kind: parquet, image_column: ..., image_root: ...} by hand"
    )


def _files(folder: Path) -> Iterator[str]:
    """The files below a folder, relative to it, what is nearest first; links to folders are not followed."""
    waiting = [folder]
    while waiting:
        current = waiting.pop(0)
        with os.scandir(current) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(Path(entry.path))
                elif stat.S_ISREG(entry.stat().st_mode) if not entry.is_symlink() else entry.is_file():
                    yield str(Path(entry.path).relative_to(folder))


def _model(name: str) -> str:
    """A model's folder as an absolute path, since the recipe may lie elsewhere; a hub id as it is."""
    return str(Path(name).resolve()) if Path(name).is_dir() else name


def _view_size(encoder: str) -> int:
    """The pixels that an encoder's own configuration names, if it is a folder here; else what the largest take."""
    path = Path(encoder) / "config.json"
    if not path.is_file():
        return 384
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        size = config.get("vision_config", config).get("image_size")
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(
            f"{path} is no configuration of an encoder ({error}): repair it, or give another --encoder"
        ) from error
    return size if isinstance(size, int) and size > 0 else 384


def _codebook_size(images: int | None) -> int:
    size = FULL_SIZE
    while images is not None and size > max(256, 2 * images):
        size //= 2
    return size


def recipe_text(data: Data, *, encoder: str, language_model: str) -> str:
    """The recipe: a codebook on the images, the token set, and the training where there are records."""
    quoted = json.dumps
    source = "{" + ", ".join(f"{key}: {quoted(value, ensure_ascii=False)}" for key, value in data.source.items()) + "}"
    size = _view_size(encoder)
    vectors = _codebook_size(data.images)
    return f"""\
# yaml-language-server: $schema={Path(__file__).with_name("recipe.schema.json").as_uri()}
# Made by asvr init from {quoted(data.why, ensure_ascii=False)[1:-1]}.
# Relative paths are relative to this file.
#
#   asvr plan THIS             what is to be done; asvr run THIS does all of it, or step by step:
#   asvr fit-codebook THIS     once: codebooks for the encoder's features
#   asvr tokenize THIS         run it again after any interruption; --limit 1000 is a trial that measures rate and size
#   asvr train THIS            run it again after any interruption; --check says before what it lacks and takes

codebooks:
  own:
    source: {source}
    geometry: {{mode: pad, size: {size}}}    # squash | pad | crop; size is what the encoder takes
    encoder: {{path: {quoted(encoder, ensure_ascii=False)}, layer: -2}}    # a folder or hub id
    depth: 8                            # codes a position
    size: {vectors:<5}                         # vectors in each codebook; some 10,000 images are enough for 16384
    output: codebooks/own

tokenize:
  images:
    source: {source}
    geometry: {{mode: pad, size: {size}}}    # the very same as the codebook's
    tokenizer: {{kind: fitted, path: codebooks/own}}    # asvr tokenizers lists the others
    engine: local                       # ray: the same bytes, on a cluster
    max_reject_rate: 0.01               # more unreadable images than that stop the job
    output: tokens

{_training(data, encoder, language_model)}"""


def _training(data: Data, encoder: str, language_model: str) -> str:
    path, root, llm, tower = (
        json.dumps(text, ensure_ascii=False)
        for text in (*(data.records or ("data.json", "images")), language_model, encoder)
    )
    template = (
        "\n      template: vicuna_v1             # the usual plain takes one question and one answer; some records have more"
        if data.long_talks
        else ""
    )
    text = f"""\
train:
  output: runs/own
  model: {{language_model: {llm}, vision_tower: {tower}, vision_feature_layer: -2}}
  phases:
    - name: pretrain                    # the projector and the visual head learn{template}
      data: [{{path: {path}, image_root: {root}}}]
      manifests: [images]
      objective: {{kind: codes}}          # none | codes | denoise | align
      batch_size: 256
    - name: instruct                    # and the language model
      data: [{{path: {path}, image_root: {root}}}]
      manifests: [images]
      objective: {{kind: codes}}
      batch_size: 128
"""
    if data.records:
        return text
    told = "# Training needs conversations about the images, in LLaVA's format; name them and take the # away.\n"
    return told + "".join(f"# {line}\n" for line in text.splitlines())
