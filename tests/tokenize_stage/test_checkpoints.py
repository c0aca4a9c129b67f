"""Untrusted checkpoint files: what is read is complete and finite, and what is wrong is said in one sentence."""

from __future__ import annotations

import contextlib
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from manifests.errors import InputError
from tokenize_stage.checkpoints import fill, read_pickle, read_safetensors, shapes_of, take, tensors_at
from tokenize_stage.layout import check_layout, shown

WHERE = "the checkpoint x.pt"
STATE = {"a.weight": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16), "text.c": torch.zeros(1)}
NEEDED = {"a.weight": (2, 3), "b": (4,)}
GROUPS = {"text tower": r"text\..+"}


class Dangerous:
    """Unpickling it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Callable[..., None], tuple[str]]:
        return os.mkdir, (str(self.folder),)


def one_sentence(error: pytest.ExceptionInfo[InputError]) -> None:
    assert re.fullmatch(r"[^\n]{10,600}: [^\n]+[^.\n]", str(error.value))


def saved(file: Path, value: Any) -> Path:
    torch.save(value, file)
    return file


def test_tensors_come_back_as_they_were_saved(tmp_path: Path) -> None:
    loaded = tensors_at(read_pickle(saved(tmp_path / "x.pt", {"model": {"sd": STATE}})), ["model", "sd"], where=WHERE)
    assert loaded.keys() == STATE.keys()
    assert all(torch.equal(loaded[key], STATE[key]) for key in STATE)


def test_a_pickle_with_code_is_refused_and_the_code_not_run(tmp_path: Path) -> None:
    made = tmp_path / "made"
    with pytest.raises(InputError, match="nothing in it is run") as error:
        read_pickle(saved(tmp_path / "x.pt", {"state_dict": STATE, "extra": Dangerous(made)}))
    one_sentence(error)
    assert not made.exists()


@pytest.mark.parametrize("keep", [0.2, 0.9, 0.999])
def test_a_truncated_archive_is_refused(tmp_path: Path, keep: float) -> None:
    file = saved(tmp_path / "x.pt", STATE)
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * keep)])
    with pytest.raises(InputError, match="is cut off") as error:
        read_pickle(file)
    one_sentence(error)


@pytest.mark.parametrize("what", ["empty", "text", "safetensors", "bare pickle", "folder", "absent", "other zip"])
def test_what_is_no_checkpoint_is_refused(tmp_path: Path, what: str) -> None:
    import zipfile

    file = tmp_path / "x.pt"
    if what == "empty":
        file.touch()
    elif what == "text":
        file.write_text("version https://git-lfs.github.com/spec/v1")
    elif what == "safetensors":
        save_file({"a": torch.ones(3)}, file)
    elif what == "bare pickle":
        file.write_bytes(pickle.dumps({"a": 1}))
    elif what == "folder":
        file.mkdir()
    elif what == "other zip":
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("readme.txt", "hello")
    with pytest.raises(InputError) as error:
        read_pickle(file)
    one_sentence(error)


def test_a_damaged_byte_is_an_input_error_or_harmless(tmp_path: Path) -> None:
    good = saved(tmp_path / "good.pt", {"state_dict": {"a": torch.arange(8.0)}}).read_bytes()
    for position in range(0, len(good), 7):
        file = tmp_path / "bad.pt"
        file.write_bytes(good[:position] + bytes([good[position] ^ 0xFF]) + good[position + 1 :])
        with contextlib.suppress(InputError):  # any other error is a failure
            tensors_at(read_pickle(file), ["state_dict"], where=WHERE)


@pytest.mark.parametrize(
    ("value", "match"),
    [
        ({"model": STATE}, "has no 'state_dict'.*model"),
        ([1], "holds a list"),
        ({"state_dict": {}}, "holds no tensors"),
        ({"state_dict": STATE["b"]}, "holds no tensors"),
        ({"state_dict": {**STATE, "epoch": 3, 5: 1}}, "2 values that are not tensors.*epoch, 5"),
    ],
)
def test_tensors_in_another_place_are_refused(value: Any, match: str) -> None:
    with pytest.raises(InputError, match=match) as error:
        tensors_at(value, ["state_dict"], where=WHERE)
    one_sentence(error)


def test_take_gives_the_needed_tensors_in_float32_and_nothing_else() -> None:
    taken = take(STATE, NEEDED, GROUPS, where=WHERE)
    assert {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in taken.items()} == {
        key: (torch.float32, shape) for key, shape in NEEDED.items()
    }
    assert torch.equal(taken["b"], torch.ones(4))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"b": None}, r"lacks 1 of the 2 tensors needed \(b\): "),
        ({"b": None, "B": torch.ones(4)}, r"lacks 1 .*\(b\), and holds 1 that are unknown \(B\)"),
        ({"d": torch.ones(1)}, r"neither needed nor .*\(d; ignored: text tower\)"),
        ({"text": torch.ones(1)}, r"\(text; ignored"),
        ({"b": torch.ones(5)}, r"another shape .*b is \(5\), not \(4\)"),
        ({"b": torch.ones(4, dtype=torch.int64)}, r"not floating point \(b is torch.int64\)"),
        ({"b": torch.tensor([1.0, float("nan"), 1, 1])}, r"NaN or infinity in 1 tensors \(b\)"),
        ({"a.weight": torch.full((2, 3), float("inf"))}, r"NaN or infinity .*a.weight"),
    ],
)
def test_take_refuses_what_does_not_fit(changes: dict[str, torch.Tensor | None], match: str) -> None:
    state = {key: tensor for key, tensor in {**STATE, **changes}.items() if tensor is not None}
    with pytest.raises(InputError, match=match) as error:
        take(state, NEEDED, GROUPS, where=WHERE)
    one_sentence(error)


def test_a_long_list_of_keys_is_cut_with_a_count() -> None:
    assert shown(map(str, range(6))) == "0, 1, 2, 3, 4, 5"
    with pytest.raises(InputError, match=r"lacks 40 of the 40 tensors needed \(k0, k1, k2, k3, k4, k5, and 34 more\)"):
        check_layout({}, {f"k{number}": (1,) for number in range(40)}, {}, where=WHERE)


def test_a_module_on_the_meta_device_is_filled_and_frozen() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    state = {f"head.{key}": tensor.to(torch.bfloat16) for key, tensor in model.state_dict().items()}
    with torch.device("meta"):
        empty = nn.Linear(3, 2)
    needed = shapes_of(empty, "head.")
    assert needed == {"head.weight": (2, 3), "head.bias": (2,)}
    fill(empty, take(state, needed, {}, where=WHERE), "head.")
    assert torch.equal(empty.weight, model.weight.to(torch.bfloat16).float())
    assert not empty.weight.requires_grad


def test_safetensors_of_one_file_or_several(tmp_path: Path) -> None:
    state = {key: tensor.clone() for key, tensor in STATE.items()}
    save_file(state, tmp_path / "model.safetensors")
    assert all(torch.equal(tensor, STATE[key]) for key, tensor in read_safetensors(tmp_path).items())
    many = tmp_path / "many"
    many.mkdir()
    save_file({"a.weight": state["a.weight"]}, many / "one.safetensors")
    save_file({"b": state["b"]}, many / "two.safetensors")
    index = '{"weight_map": {"a.weight": "one.safetensors", "b": "two.safetensors"}}'
    (many / "model.safetensors.index.json").write_text(index)
    assert read_safetensors(many).keys() == NEEDED.keys()
    save_file(state, many / "two.safetensors")
    with pytest.raises(InputError, match=r"holds 1 tensors twice \(a.weight\)"):
        read_safetensors(many)


def test_damaged_safetensors_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({key: tensor.clone() for key, tensor in STATE.items()}, file)
    whole = file.read_bytes()
    for data in (whole[:-3], whole[:5], b"", b"\xff" * 40):
        file.write_bytes(data)
        with pytest.raises(InputError, match="cut off or not a safetensors file") as error:
            read_safetensors(tmp_path)
        one_sentence(error)
