"""Files of tensors: readable by the safetensors library, hashed as they are written."""

import pytest
import torch
import xxhash
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lightbulb.folder import FolderError
from lightbulb.train.tensor_file import TensorFile, TensorFileError, hash_file, write_tensors

TENSORS = {
    "matrix": torch.randn(37, 53),
    "transposed": torch.randn(7, 5).t(),
    "big": torch.randn(3, 700_000),
    "one": torch.tensor([1.5]),
    "scalar": torch.tensor(2.5),
    'a name with "quotes" and é': torch.randn(2, 3, 4),
    "empty": torch.empty(0, 3),
}


def test_the_safetensors_library_reads_what_is_written_and_the_other_way_round(tmp_path):
    write_tensors(tmp_path / "ours", TENSORS)
    theirs = load_file(tmp_path / "ours")
    assert theirs.keys() == TENSORS.keys()
    assert all(torch.equal(theirs[name], tensor) for name, tensor in TENSORS.items())
    save_file({name: tensor.contiguous() for name, tensor in TENSORS.items()}, tmp_path / "theirs", {"a": "b"})
    file = TensorFile(tmp_path / "theirs")
    assert all(torch.equal(file.read(name, tensor.shape), tensor) for name, tensor in TENSORS.items())
    with safe_open(tmp_path / "ours", "pt") as opened:
        assert opened.get_slice("matrix")[3:5, 2].tolist() == TENSORS["matrix"][3:5, 2].tolist()


def test_the_record_is_that_of_the_file(tmp_path):
    record = write_tensors(tmp_path / "file", TENSORS)
    content = (tmp_path / "file").read_bytes()
    assert record == (len(content), xxhash.xxh3_128(content).hexdigest())
    assert hash_file(tmp_path / "file", record.size) == record.xxh3_128
    with pytest.raises(TensorFileError, match=rf"file: damaged: {len(content)} bytes, 5 were written"):
        hash_file(tmp_path / "file", 5)


def test_writing_through_a_tensor_does_not_reach_the_file(tmp_path):
    write_tensors(tmp_path / "file", TENSORS)
    TensorFile(tmp_path / "file").read("one", [1]).zero_()
    assert TensorFile(tmp_path / "file").read("one", [1]).item() == 1.5


def test_a_full_disk_is_said_with_the_size_of_the_file(tmp_path):
    with pytest.raises(FolderError, match=r"/dev/full: the disk is full \(8\.\d MB needed, "):
        (tmp_path / "file").symlink_to("/dev/full")
        write_tensors((tmp_path / "file").resolve(), TENSORS)
