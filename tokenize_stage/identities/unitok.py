"""Who a `unitok` tokenizer is: the published `unitok_tokenizer.pth`, whose own `args` say what was trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from manifests.codebook import Codebooks
from manifests.errors import InputError
from manifests.hashes import file_sha256
from manifests.schema import TokenizerSpec
from tokenize_stage.config import UniTokTokenizer, ViTaminConfig
from tokenize_stage.described import remembered_spec
from tokenize_stage.hub import locate_file
from tokenize_stage.identity import Identity
from tokenize_stage.json_config import Settings

FILE = "unitok_tokenizer.pth"
MEAN = STD = (0.5, 0.5, 0.5)
"""Pixels in [-1, 1]."""

STRIDE = 16
"""Pixels of a view, along an edge, that become one position."""

_PUBLISHED = {"vitamin_large": ViTaminConfig(widths=(160, 320, 1024), conv_blocks=(2, 4), blocks=31, heads=16)}
_TRAINED_AS = {"quant_proj": "attn", "vocab_norm": True, "num_query": 0}
"""What the published model has, and what is built here."""


@dataclass(frozen=True)
class UniTokShape:
    """What a checkpoint's `args` say of it."""

    encoder: ViTaminConfig
    view_size: int
    codebooks: int
    codes: int
    code_dim: int

    @property
    def width(self) -> int:
        """Of a feature before it is cut into one chunk per codebook."""
        return self.codebooks * self.code_dim

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of positions in a view."""
        return self.view_size // STRIDE, self.view_size // STRIDE


def describe(tokenizer: UniTokTokenizer) -> Identity:
    """Raises `InputError` if the file is not a UniTok checkpoint, or its tensors are not what its `args` say."""
    found = locate_file(tokenizer.checkpoint, name=FILE)
    sha256 = {"checkpoint": file_sha256(found.path)}

    def read() -> TokenizerSpec:
        from tokenize_stage.tokenizers.unitok import open_checkpoint

        shape = open_checkpoint(found.path, tokenizer.encoder).shape
        return TokenizerSpec(
            kind=tokenizer.kind,
            origin=tokenizer.checkpoint,
            weights_sha256=sha256,
            view_size=shape.view_size,
            grid=shape.grid,
            codebook_sizes=(shape.codes,) * shape.codebooks,
            code_dim=shape.code_dim,
            residual=False,
            settings={
                "encoder": shape.encoder.model_dump(mode="json"),
                "image_mean": list(MEAN),
                "image_std": list(STD),
            },
        )

    spec = remembered_spec(
        tokenizer.kind,
        sha256,
        {"encoder": tokenizer.encoder and tokenizer.encoder.model_dump(mode="json")},
        origin=tokenizer.checkpoint,
        revision=found.revision,
        read=read,
        form=TokenizerSpec,
    )
    return Identity(spec, lambda: _codebooks(found.path, tokenizer))


def read_args(args: Mapping[str, Any], given: ViTaminConfig | None, file: Path) -> UniTokShape:
    """The shape that `args` and, for an encoder that is not a published one, the recipe describe."""
    settings = Settings(args, f"the args of {file}")
    for key, built in _TRAINED_AS.items():
        if args.get(key, built) != built:
            raise settings.wrong(key, f"{built!r} as in the published UniTok")
    encoder = given or _PUBLISHED.get(settings.text("model"))
    if encoder is None:
        raise InputError(
            f"the args of {file} name the encoder {args['model']}, which is none of {', '.join(_PUBLISHED)}: "
            "say in tokenizer.encoder what shape it has"
        )
    size, books = settings.count("img_size"), settings.count("num_codebooks")
    if size % STRIDE:
        raise settings.wrong("img_size", f"a multiple of {STRIDE}")
    for key in ("vocab_size", "vocab_width"):
        if settings.count(key) % books:
            raise settings.wrong(key, f"a multiple of the num_codebooks {books}")
    width = settings.count("vocab_width")
    if encoder.widths[-1] % width or encoder.widths[-1] == width:
        raise settings.wrong("vocab_width", f"a smaller divisor of the encoder's width {encoder.widths[-1]}")
    return UniTokShape(encoder, size, books, settings.count("vocab_size") // books, width // books)


def _codebooks(file: Path, tokenizer: UniTokTokenizer) -> Codebooks:
    from tokenize_stage.tokenizers.unitok import open_checkpoint

    return open_checkpoint(file, tokenizer.encoder).codebooks()
