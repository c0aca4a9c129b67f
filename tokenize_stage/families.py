"""What tokenizers there are: one row for each published model of a kind, as `asvr tokenizers` prints it. Imports no torch.

A new kind adds its rows here. The figures are those of the published weights and licences, where they could be seen; a
None is what the recipe, or a file that is not public, decides. What a job uses is always read from the files themselves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Target = Literal["semantic", "appearance"]


@dataclass(frozen=True)
class PublishedTokenizer:
    """A model that a tokenizer of `kind` loads."""

    kind: str
    model: str
    target: Target
    """What its codes or features say of a position: what is there, or what it looks like (made to rebuild pixels)."""
    view_size: int | None
    grid: tuple[int, int] | None
    depth: int | None
    codebook_size: int | None
    code_dim: int | None
    residual: bool | None
    """Depth d quantises what those before left over; False: depths are independent; None: there is one depth, or none
    where features are stored instead of codes."""
    origin: str
    licence: str

    @property
    def positions(self) -> int | None:
        """Positions of a view."""
        return self.grid[0] * self.grid[1] if self.grid else None

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "kind": self.kind,
            "model": self.model,
            "target": self.target,
            "view_size": self.view_size,
            "grid": list(self.grid) if self.grid else None,
            "positions": self.positions,
            "depth": self.depth,
            "codebook_size": self.codebook_size,
            "code_dim": self.code_dim,
            "residual": self.residual,
            "origin": self.origin,
            "licence": self.licence,
        }


CONTINUOUS = frozenset({"features", "vae"})
"""The kinds that make shards of features instead of codes."""

_OWN = "your encoder and images"
_DUALTOKEN = "MIT (README, no licence file)"
_QLIP = "non-commercial: NVIDIA Source Code License-NC, weights CC BY-NC 4.0"
_CARD = "see the model's card"

PUBLISHED: tuple[PublishedTokenizer, ...] = (
    PublishedTokenizer(
        "fitted", "asvr fit-codebook, residual", "semantic", None, None, None, None, None, True,
        _OWN, "that of the encoder",
    ),
    PublishedTokenizer(
        "fitted", "asvr fit-codebook, product", "semantic", None, None, None, None, None, False,
        _OWN, "that of the encoder",
    ),
    PublishedTokenizer(
        "dualtoken", "DualToken of ASVR, semantic", "semantic", 384, (27, 27), 8, 16384, 1152, True,
        "Songweii/DualToken (its README links the files)", _DUALTOKEN,
    ),
    PublishedTokenizer(
        "dualtoken", "DualToken of ASVR, appearance", "appearance", 384, (27, 27), 8, 16384, 1152, True,
        "Songweii/DualToken (its README links the files)", _DUALTOKEN,
    ),
    PublishedTokenizer(
        "dualtoken", "DualToken of 2026, semantic", "semantic", 384, (27, 27), 8, 16384, 32, True,
        "github.com/songweii/DualToken (weights not found)", _DUALTOKEN,
    ),
    PublishedTokenizer(
        "dualtoken", "DualToken of 2026, appearance", "appearance", 384, (27, 27), 8, 16384, 32, True,
        "github.com/songweii/DualToken (weights not found)", _DUALTOKEN,
    ),
    PublishedTokenizer(
        "vila_u", "VILA-U 256", "semantic", 256, (16, 16), 4, 16384, 1024, True,
        "hf://mit-han-lab/vila-u-7b-256/vision_tower", "MIT",
    ),
    PublishedTokenizer(
        "ta_tok", "TA-Tok of Tar", "semantic", 384, (27, 27), 1, 65536, None, None,
        "hf://csuhan/TA-Tok/ta_tok.pth", "none found",
    ),
    PublishedTokenizer(
        "unitok", "UniTok", "semantic", 256, (16, 16), 8, 4096, 8, False,
        "hf://FoundationVision/unitok_tokenizer/unitok_tokenizer.pth", "MIT code, Apache-2.0 weights",
    ),
    PublishedTokenizer(
        "qlip", "QLIP-B-16-256", "semantic", 256, (16, 16), 2, 16384, 14, False, "nvidia/QLIP-B-16-256", _QLIP
    ),
    PublishedTokenizer(
        "qlip", "QLIP-B-8-256", "semantic", 256, (32, 32), 2, 16384, 14, False, "nvidia/QLIP-B-8-256", _QLIP
    ),
    PublishedTokenizer(
        "qlip", "QLIP-L-14-392", "semantic", 392, (28, 28), 2, 16384, 14, False, "nvidia/QLIP-L-14-392", _QLIP
    ),
    PublishedTokenizer(
        "hf_vq", "GLM-Image", "semantic", 512, (32, 32), 1, 16384, 2048, None,
        "hf://zai-org/GLM-Image/vision_language_encoder", _CARD,
    ),
    PublishedTokenizer(
        "hf_vq", "Chameleon", "appearance", 512, (32, 32), 1, 8192, 256, None,
        "facebook/chameleon-7b", f"research only, {_CARD}",
    ),
    PublishedTokenizer(
        "hf_vq", "Emu3", "appearance", 512, (64, 64), 1, 32768, 4, None, "Emu3-community/Emu3-Chat-hf", _CARD
    ),
    PublishedTokenizer(
        "hf_vq", "Janus", "appearance", 384, (24, 24), 1, 16384, 8, None,
        "deepseek-community/Janus-Pro-1B", "MIT code, DeepSeek Model License",
    ),
    PublishedTokenizer(
        "features", "hidden states of any encoder", "semantic", None, None, None, None, None, None,
        "your encoder", "that of the encoder",
    ),
    PublishedTokenizer(
        "vae", "latents of any AutoencoderKL", "appearance", None, None, None, None, None, None,
        "your VAE, in diffusers' format", "that of the VAE",
    ),
)  # fmt: skip
