"""Checkpoints of several processes: what is written is read, and what is damaged is named."""

from pathlib import Path

import pytest
import torch

from lorank.distributed import saving

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is .*:UserWarning")  # one process is enough here

TABLE = torch.arange(12.0).view(4, 3)


def test_one_tensor_under_two_names_is_written_twice(tmp_path: Path) -> None:
    """As the table of 8-bit moments is, which all parameters share."""
    saving._write({"a": TABLE, "b": TABLE}, tmp_path / "weights")
    read = {"a": torch.zeros(4, 3), "b": torch.zeros(4, 3)}
    saving._read(read, tmp_path / "weights", alone=True)
    assert torch.equal(read["a"], TABLE) and torch.equal(read["b"], TABLE)


def test_a_folder_that_cannot_be_written_is_an_error_of_the_disk(tmp_path: Path) -> None:
    """Torch's own exception is no Exception, so nobody would catch it."""
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="Not a directory"):
        saving._write({"a": TABLE}, tmp_path / "file/weights")


def test_a_missing_or_damaged_file_of_a_tensor_is_named(tmp_path: Path) -> None:
    saving._write({"a": TABLE[2:].clone()}, tmp_path)
    [file] = tmp_path.glob("*.safetensors")
    second = file.read_bytes().replace(b"[0, 0]", b"[2, 0]")  # now the last two rows of four, without the first
    file.write_bytes(second)
    with pytest.raises(ValueError, match="must have all parts of a, but a file of it is missing"):
        saving._shapes(tmp_path)
    file.write_bytes(second[:60])
    with pytest.raises(ValueError, match="must have whole files, but one is damaged"):
        saving._shapes(tmp_path)
