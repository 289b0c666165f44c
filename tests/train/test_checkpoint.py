"""Checkpoint folders: what is damaged is named, what is hostile is refused, any slice can be read."""

import json
import pickle
from dataclasses import asdict

import pytest
import torch
from safetensors.torch import save_file

from lightbulb.train.checkpoint import (
    FOLDER,
    FORMAT,
    Checkpoint,
    CheckpointError,
    TrainState,
    _hash,
    complete_checkpoints,
    load_model_for_inference,
    newest_checkpoint,
    step_folder,
    sweep_partial,
)

LOGICAL = torch.arange(24.0).view(4, 6)


def write(run, step=3):
    """A checkpoint of one logical tensor in four parts, two in each of two files."""
    folder = step_folder(run, step)
    folder.mkdir(parents=True)
    parts = []
    for rank, rows in enumerate((slice(0, 1), slice(1, 4))):
        name = f"model-rank{rank:04d}.safetensors"
        save_file({"w": LOGICAL[rows, :].contiguous()}, folder / name)
        parts.append({"file": name, "start": [rows.start, 0], "shape": [rows.stop - rows.start, 6]})
    state = TrainState(step, 10, step, 0, {}, {}, "TP1xPP1xEP1xDP1")
    (folder / "state.json").write_text(json.dumps(asdict(state)))
    files = {p.name: {"size": p.stat().st_size, "xxh3_128": _hash(p)} for p in folder.iterdir()}
    manifest = {"format": FORMAT, "step": step, "files": files, "tensors": {"w": {"shape": [4, 6], "parts": parts}}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


@pytest.mark.parametrize("slices", [(slice(0, 4), slice(0, 6)), (slice(0, 2), slice(3, 6)), (slice(2, 3), slice(1, 2))])
def test_any_slice_of_a_logical_tensor_is_put_together_from_its_parts(tmp_path, slices):
    assert torch.equal(Checkpoint(write(tmp_path)).read("w", slices), LOGICAL[slices])


@pytest.mark.parametrize("name", ["model-rank0000.safetensors", "model-rank0001.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["flip first", "flip middle", "flip last", "truncate", "empty", "delete"])
def test_damage_to_any_file_is_found_and_named(tmp_path, name, damage):
    path = write(tmp_path) / name
    content = bytearray(path.read_bytes())
    if damage == "delete":
        path.unlink()
    else:
        place = {"flip first": 0, "flip middle": len(content) // 2, "flip last": -1}.get(damage)
        if place is not None:
            content[place] ^= 4
        path.write_bytes(content[: {"truncate": -5, "empty": 0}.get(damage)])
    with pytest.raises(CheckpointError, match=name):
        Checkpoint(path.parent)


def test_two_ranks_files_swapped_are_refused(tmp_path):
    folder = write(tmp_path)
    first, second = folder / "model-rank0000.safetensors", folder / "model-rank0001.safetensors"
    one, two = first.read_bytes(), second.read_bytes()
    first.write_bytes(two)
    second.write_bytes(one)
    with pytest.raises(CheckpointError, match="damaged"):
        Checkpoint(folder)


def test_the_newest_intact_checkpoint_is_chosen_and_the_others_explained(tmp_path):
    write(tmp_path, 3)
    (write(tmp_path, 6) / "state.json").write_text("{")
    checkpoint, problems = newest_checkpoint(tmp_path)
    assert checkpoint is not None and checkpoint.state.step == 3
    assert len(problems) == 1 and "step-00000006" in problems[0]


def test_latest_is_never_trusted(tmp_path):
    write(tmp_path, 3)
    (tmp_path / FOLDER / "latest").write_text("../../etc")
    checkpoint, _ = newest_checkpoint(tmp_path)
    assert checkpoint is not None and checkpoint.state.step == 3


def test_interrupted_saves_are_not_checkpoints_and_are_swept(tmp_path):
    write(tmp_path, 3)
    partial = tmp_path / FOLDER / ".step-00000009.partial"
    write(tmp_path, 9).rename(partial)
    assert [p.name for p in complete_checkpoints(tmp_path)] == ["step-00000003"]
    sweep_partial(tmp_path)
    assert not partial.exists()


def test_paths_out_of_the_folder_are_refused(tmp_path):
    folder = write(tmp_path)
    manifest = json.loads((folder / "manifest.json").read_text())
    (tmp_path / "secret").write_text("x")
    manifest["files"]["../../secret"] = {"size": 1, "xxh3_128": _hash(tmp_path / "secret")}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="secret"):
        Checkpoint(folder)


class _Canary:
    def __reduce__(self):
        return (open, ("canary", "w"))


@pytest.mark.parametrize("name", ["manifest.json", "state.json", "model-rank0000.safetensors"])
def test_a_pickle_in_place_of_a_file_is_refused_unread(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    folder = write(tmp_path)
    (folder / name).write_bytes(pickle.dumps(_Canary()))
    with pytest.raises(CheckpointError, match=name):
        Checkpoint(folder)
    assert not (tmp_path / "canary").exists()


def test_a_part_listed_in_a_file_that_was_not_hashed_is_refused(tmp_path):
    folder = write(tmp_path)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["tensors"]["w"]["parts"][0]["file"] = "../step-00000003/model-rank0000.safetensors"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="not listed"):
        Checkpoint(folder)


def test_missing_parts_are_an_error_not_garbage(tmp_path):
    folder = write(tmp_path)
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["tensors"]["w"]["parts"][1]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="cover 6 of 24"):
        Checkpoint(folder).read("w", (slice(0, 4), slice(0, 6)))


def test_a_folder_that_is_no_run_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="not a run folder"):
        load_model_for_inference(tmp_path)
