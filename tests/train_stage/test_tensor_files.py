"""What a disk refuses is one sentence, whichever library was writing, and files can be read by whoever reads others."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from manifests.errors import StorageError, TrainingStopped
from train_stage.tensor_files import load_weights, save_tensors, tensor_storage_errors

TENSORS = {"a": torch.arange(6.0)}


def test_a_file_has_the_mode_of_other_new_files(tmp_path: Path) -> None:
    save_tensors(TENSORS, tmp_path / "a.safetensors")
    (tmp_path / "other").touch()
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode
    assert torch.equal(load_file(tmp_path / "a.safetensors")["a"], TENSORS["a"])


def test_safetensors_says_why(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"^cannot write .*no such file or directory; check that the path is right"):
        save_tensors(TENSORS, tmp_path / "absent" / "a.safetensors")


def test_torch_on_a_full_disk() -> None:
    full = Path("/dev/full")
    with pytest.raises(StorageError, match=r"^cannot write /dev/full: "), tensor_storage_errors(full):
        torch.save(TENSORS, full)


@pytest.mark.parametrize("left", [None, b"", b"cut"])
def test_a_damaged_checkpoint_is_one_sentence(tmp_path: Path, left: bytes | None) -> None:
    if left is not None:
        (tmp_path / "w.safetensors").write_bytes(left)
    with pytest.raises(TrainingStopped, match=r"is damaged .*: remove it, and the run goes on from before it"):
        load_weights(tmp_path / "w.safetensors")


def test_other_errors_of_torch_are_bugs() -> None:
    with pytest.raises(RuntimeError), tensor_storage_errors(Path("x")):
        torch.zeros(2) @ torch.zeros(3)
