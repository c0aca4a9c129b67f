"""The stage's configuration: what a recipe may say, and that reading it costs no torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from tokenize_stage.config import CodebookConfig, FolderSource, GeometryConfig, LlavaSource, TokenSetConfig

SET = {
    "source": {"kind": "folder", "path": "images"},
    "geometry": {"mode": "pad", "size": 224},
    "tokenizer": {"kind": "fitted", "path": "codebook"},
    "output": "tokens",
}


def test_the_shape_of_the_documented_recipe() -> None:
    config = TokenSetConfig.model_validate({**SET, "engine": "ray", "ray": {"address": "auto"}, "unit_size": 4096})
    assert isinstance(config.source, FolderSource)
    assert config.tokenizer.path == Path("codebook")
    assert (config.engine, config.ray.address, config.max_reject_rate) == ("ray", "auto", 0.01)


def test_the_kind_of_a_source_decides_its_keys() -> None:
    source = {"kind": "llava", "path": "data.json", "image_root": "images"}
    assert isinstance(TokenSetConfig.model_validate({**SET, "source": source}).source, LlavaSource)
    with pytest.raises(ValidationError, match="image_root"):
        TokenSetConfig.model_validate({**SET, "source": {**source, "kind": "folder"}})


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"unit_sise": 1}, "unit_sise"),
        ({"unit_size": 0}, "unit_size"),
        ({"max_reject_rate": 1.5}, "max_reject_rate"),
        ({"engine": "spark"}, "engine"),
        ({"source": {"kind": "tarball", "path": "x"}}, "source"),
        ({"geometry": {"mode": "squash"}}, "geometry.size"),
        ({"ray": {"cpus_per_worker": 0}}, "ray.cpus_per_worker"),
    ],
)
def test_a_wrong_value_is_named(changes: dict[str, object], named: str) -> None:
    with pytest.raises(ValidationError) as caught:
        TokenSetConfig.model_validate({**SET, **changes})
    assert named in [".".join(map(str, error["loc"])) for error in caught.value.errors()]


def test_anyres_is_llava_nexts_unless_said_otherwise() -> None:
    geometry = GeometryConfig(mode="anyres", size=336).resolve((0.5, 0.5, 0.5))
    assert geometry.grid_pinpoints == ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
    assert geometry.background == (0, 0, 0)
    own = GeometryConfig(mode="anyres", size=14, grid_pinpoints=((28, 28),), background=(1, 2, 3)).resolve()
    assert (own.grid_pinpoints, own.background) == (((28, 28),), (1, 2, 3))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"grid_pinpoints": [[28, 30]]}, "not a multiple of size 14"),
        ({"grid_pinpoints": []}, "at least 1 item"),
        ({"grid_pinpoints": [[14 * 65, 14]]}, "more than 64 tiles"),
        ({"mode": "pad", "grid_pinpoints": [[28, 28]]}, "belong to anyres"),
    ],
)
def test_pinpoints_that_make_no_grid_are_refused(changes: dict[str, object], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        GeometryConfig.model_validate({"mode": "anyres", "size": 14, **changes})


def test_a_configuration_survives_json() -> None:
    config = TokenSetConfig.model_validate(SET)
    assert TokenSetConfig.model_validate_json(config.model_dump_json()) == config


def test_codebook_config_has_its_own_defaults() -> None:
    config = CodebookConfig.model_validate(
        {"source": SET["source"], "geometry": SET["geometry"], "encoder": {"path": "vit"}, "output": "codebook"}
    )
    assert (config.depth, config.size, config.encoder.layer) == (8, 4096, -2)


def test_reading_a_configuration_imports_neither_torch_nor_ray() -> None:
    code = "import sys, tokenize_stage.config, tokenize_stage.job; print({'torch', 'ray', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
