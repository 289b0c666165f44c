"""Checkpoint folders: what is damaged is named, what is hostile is refused, any slice can be read."""

import json
import os
import pickle
from dataclasses import asdict

import pytest
import torch

from lightbulb.config import build_config, save_config
from lightbulb.nn.parameter import initialise
from lightbulb.train import checkpoint
from lightbulb.train.checkpoint import Checkpoint, CheckpointError, load_model_for_inference, newest_checkpoint
from lightbulb.train.config import RunConfig
from lightbulb.train.faults import PlantedFault
from lightbulb.train.manifest import (
    FOLDER,
    FORMAT,
    TrainState,
    complete_checkpoints,
    entry,
    remove_old,
    set_aside_newer,
    step_folder,
    sweep,
    write_manifest,
)
from lightbulb.train.tensor_file import FileRecord, hash_file, write_tensors

LOGICAL = torch.arange(24.0).view(4, 6)
WHOLE = (slice(0, 4), slice(0, 6))


def record_of(path):
    size = path.stat().st_size
    return entry(FileRecord(size, hash_file(path, size)))


def write(run, step=3):
    """A checkpoint of one logical tensor in two parts, one in each of two files."""
    folder = step_folder(run, step)
    folder.mkdir(parents=True)
    parts = []
    for rank, rows in enumerate((slice(0, 1), slice(1, 4))):
        name = f"model-rank{rank:04d}.safetensors"
        write_tensors(folder / name, {"w": LOGICAL[rows, :]})
        parts.append({"file": name, "key": "w", "start": [rows.start, 0], "shape": [rows.stop - rows.start, 6]})
    state = TrainState(step, 10, step, 0, {}, {}, "TP1xPP1xEP1xDP1")
    (folder / "state.json").write_text(json.dumps(asdict(state)))
    files = {p.name: record_of(p) for p in folder.iterdir()}
    manifest = {"format": FORMAT, "step": step, "files": files, "tensors": {"w": {"shape": [4, 6], "parts": parts}}}
    write_manifest(folder, manifest)
    return folder


def change_manifest(folder, change):
    """Change a manifest and its digest, as a forger would."""
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["digest"]
    change(manifest)
    write_manifest(folder, manifest)


@pytest.mark.parametrize("slices", [(slice(0, 4), slice(0, 6)), (slice(0, 2), slice(3, 6)), (slice(2, 3), slice(1, 2))])
def test_any_slice_of_a_logical_tensor_is_put_together_from_its_parts(tmp_path, slices):
    assert torch.equal(Checkpoint(write(tmp_path)).read("w", slices, (4, 6)), LOGICAL[slices])


@pytest.mark.parametrize(
    "name", ["model-rank0000.safetensors", "model-rank0001.safetensors", "state.json", "manifest.json"]
)
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


@pytest.mark.parametrize("text", ["", "\0garbage", "../../x", "/etc", "step-00000099", "step-00000003/../../.."])
def test_latest_is_never_trusted(tmp_path, text):
    write(tmp_path, 3)
    write(tmp_path / "x", 9)
    (tmp_path / FOLDER / "latest").write_text(text)
    checkpoint, _ = newest_checkpoint(tmp_path)
    assert checkpoint is not None and checkpoint.state.step == 3


def test_interrupted_saves_are_not_checkpoints_and_are_swept(tmp_path):
    write(tmp_path, 3)
    partial = tmp_path / FOLDER / ".step-00000009.partial"
    write(tmp_path, 9).rename(partial)
    assert [p.name for p in complete_checkpoints(tmp_path)] == ["step-00000003"]
    sweep(tmp_path)
    assert not partial.exists()


class _Canary:
    def __reduce__(self):
        return (open, ("canary", "w"))


@pytest.mark.parametrize("name", ["manifest.json", "state.json", "model-rank0000.safetensors", ".metadata", "x.pt"])
def test_a_pickle_in_place_of_a_file_is_refused_unread(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    folder = write(tmp_path)
    known = (folder / name).exists()
    (folder / name).write_bytes(pickle.dumps(_Canary()))
    if known:
        with pytest.raises(CheckpointError, match=name):
            Checkpoint(folder)
    if name not in ("manifest.json", ".metadata", "x.pt"):  # also when the forger knows how to hash
        rewrite(folder, name, pickle.dumps(_Canary()))
        with pytest.raises(CheckpointError, match=name):
            Checkpoint(folder).read("w", WHOLE, (4, 6))
    if not known:  # what is not in the manifest is not looked at
        assert torch.equal(Checkpoint(folder).read("w", WHOLE, (4, 6)), LOGICAL)
    assert not (tmp_path / "canary").exists()


def first_part(**changes):
    return lambda manifest: manifest["tensors"]["w"]["parts"][0].update(changes)


def a_file(name, **changes):
    return lambda manifest: manifest["files"].update({name: {"size": 1, "xxh3_128": "0" * 32} | changes})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (a_file("../../secret"), "secret"),
        (a_file("/etc/passwd"), "passwd"),
        (a_file("a\0b"), "files"),
        (a_file(".."), "files"),
        (a_file("x", size=-1), "files.x.size"),
        (a_file("x", size=1e9), "files.x.size"),
        (a_file("x", size=True), "files.x.size"),
        (a_file("x", size=1 << 63), "files.x.size"),
        (a_file("x", xxh3_128="zz"), "xxh3_128"),
        (first_part(file="../step-00000003/model-rank0000.safetensors"), "tensors.w.parts"),
        (first_part(file="model-rank0009.safetensors"), "not listed"),
        (first_part(start=[-1, 0]), "start"),
        (first_part(start=[0.0, 0]), "start"),
        (first_part(start=[0]), "dimensions"),
        (first_part(start=[4, 0]), "reaches to 5 in a dimension of 4"),
        (first_part(shape=[1 << 40, 6]), "reaches to"),
        (first_part(shape=[0, 6]), "shape"),
        (first_part(surprise=1), "surprise"),
        (lambda m: m["tensors"]["w"].update(shape=[1 << 47, 1 << 47]) or first_part(shape=[1 << 47, 6])(m), "bytes"),
        (lambda m: m["files"].pop("state.json"), "state.json"),
        (lambda m: m.update(format=1), "format 1, this version reads 2"),
        (lambda m: m.update(step=4), "of step 4"),
        (lambda m: m.pop("tensors"), "tensors"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_manifest_that_says_what_cannot_be_is_refused_before_a_file_is_opened(tmp_path, change, message):
    folder = write(tmp_path)
    change_manifest(folder, change)
    for file in folder.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(CheckpointError, match=message) as caught:
        Checkpoint(folder)
    assert str(folder / "manifest.json") in str(caught.value) and len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[" * 100_000, b"\xff", b"[]", b"1" * 5000, b'{"format": 2}'], ids=range(7)
)
@pytest.mark.parametrize("name", ["manifest.json", "state.json"])
def test_json_that_is_none_is_named(tmp_path, name, content):
    folder = write(tmp_path)
    (folder / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=name):
        Checkpoint(folder)


def rewrite(folder, name, content):
    """Change a file and its hash in the manifest, as a forger would."""
    (folder / name).write_bytes(content)
    change_manifest(folder, lambda m: m["files"].update({name: record_of(folder / name)}))


@pytest.mark.parametrize(
    "header",
    [
        b"\xff" * 8,
        (1 << 20).to_bytes(8, "little"),
        (2).to_bytes(8, "little") + b"[]",
        (9).to_bytes(8, "little") + b'{"w": []}',
        (5).to_bytes(8, "little") + b"[[[[[",
    ],
    ids=["2^64", "beyond the end", "list", "no entry", "cut"],
)
def test_a_forged_tensor_file_is_refused(tmp_path, header):
    folder = write(tmp_path)
    rewrite(folder, "model-rank0000.safetensors", header + b" " * 200)
    with pytest.raises(CheckpointError, match="model-rank0000"):
        Checkpoint(folder).read("w", WHOLE, (4, 6))


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F64", "shape": [1, 6], "data_offsets": [0, 24]},
        {"dtype": "F32", "shape": [6], "data_offsets": [0, 24]},
        {"dtype": "F32", "shape": [1, 6], "data_offsets": [0, 20]},
        {"dtype": "F32", "shape": [1, 6], "data_offsets": [-24, 0]},
        {"dtype": "F32", "shape": [1, 6], "data_offsets": [8, 32]},
        {"dtype": "F32", "shape": [1, 6], "data_offsets": [0.0, 24.0]},
        {"dtype": "F32", "shape": [1, 6]},
    ],
    ids=lambda entry: str(entry.get("data_offsets")) + entry["dtype"] + str(entry["shape"]),
)
def test_a_forged_entry_of_a_tensor_file_is_refused(tmp_path, entry):
    folder = write(tmp_path)
    header = json.dumps({"w": entry}).encode()
    rewrite(folder, "model-rank0000.safetensors", len(header).to_bytes(8, "little") + header + b"\0" * 24)
    with pytest.raises(CheckpointError, match="model-rank0000.safetensors: damaged: no float32 tensor 'w'"):
        Checkpoint(folder).read("w", WHOLE, (4, 6))


def test_links_and_pipes_are_not_followed(tmp_path):
    folder = write(tmp_path)
    file = folder / "model-rank0001.safetensors"
    file.rename(tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="symbolic link"):
        Checkpoint(folder)
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(CheckpointError, match="not a plain file"):
        Checkpoint(folder)
    step_folder(tmp_path, 8).symlink_to(write(tmp_path / "other", 8))
    assert complete_checkpoints(tmp_path) == [folder]


def test_parts_that_overlap_do_not_hide_a_hole(tmp_path):
    folder = write(tmp_path)
    parts = [{"file": "model-rank0001.safetensors", "key": "w", "start": [r, 0], "shape": [3, 6]} for r in (0, 1)]
    change_manifest(folder, lambda m: m["tensors"]["w"].update(parts=parts))
    with pytest.raises(CheckpointError, match="overlap"):
        Checkpoint(folder).read("w", WHOLE, (4, 6))


def test_missing_parts_are_an_error_not_garbage(tmp_path):
    folder = write(tmp_path)
    change_manifest(folder, lambda m: m["tensors"]["w"]["parts"].pop())
    with pytest.raises(CheckpointError, match="cover 6 of 24"):
        Checkpoint(folder).read("w", WHOLE, (4, 6))


def test_another_shape_is_refused_with_both(tmp_path):
    with pytest.raises(CheckpointError, match=r"'w' has shape \(4, 6\), the model expects \(8, 6\)"):
        Checkpoint(write(tmp_path)).read("w", (slice(0, 8), slice(0, 6)), (8, 6))


def test_the_newest_is_chosen_by_its_step_not_by_any_clock(tmp_path):
    for step, seconds in ((3, 4e9), (12, 0), (6, 1e9)):
        os.utime(write(tmp_path, step), (seconds, seconds))
    for path in tmp_path.rglob("*"):
        os.utime(path, (4e9, 4e9)) if "00000003" in str(path) else None
    checkpoint, problems = newest_checkpoint(tmp_path)
    assert checkpoint is not None and checkpoint.state.step == 12 and not problems


def test_a_folder_under_another_step_s_name_is_refused(tmp_path):
    write(tmp_path, 3).rename(step_folder(tmp_path, 9))
    with pytest.raises(CheckpointError, match=r"step-00000009/manifest.json: of step 3"):
        Checkpoint(step_folder(tmp_path, 9))


def test_removal_keeps_the_newest_and_what_is_going_is_no_checkpoint(tmp_path, monkeypatch):
    for step in (3, 6, 9):
        write(tmp_path, step)
    monkeypatch.setenv("LIGHTBULB_FAULT", "raise:point=save.deleting")
    with pytest.raises(PlantedFault):
        remove_old(tmp_path, 1)
    assert [p.name for p in complete_checkpoints(tmp_path)] == ["step-00000009", "step-00000003"]
    monkeypatch.delenv("LIGHTBULB_FAULT")
    (tmp_path / FOLDER / ".step-mine.partial").mkdir()
    sweep(tmp_path)
    remove_old(tmp_path, 1)
    names = sorted(p.name for p in (tmp_path / FOLDER).iterdir())
    assert names == [".step-mine.partial", "step-00000009"]


def test_damaged_newer_checkpoints_are_set_aside_and_keep_nothing_from_being_kept(tmp_path):
    for step in (3, 6, 9):
        write(tmp_path, step)
    assert [p.name for p in set_aside_newer(tmp_path, 3)] == [".step-00000009.damaged", ".step-00000006.damaged"]
    sweep(tmp_path)
    remove_old(tmp_path, 1)
    assert [p.name for p in complete_checkpoints(tmp_path)] == ["step-00000003"]


def test_inference_has_the_weights_and_the_routers_biases(tmp_path, monkeypatch):
    router = {"top_k": 2, "score": "sigmoid", "normalize_gates": True, "bias_rate": 0.01}
    block = {
        "token": {"type": "attention", "num_heads": 2},
        "channel": {"type": "deepseek_moe", "num_experts": 4, "hidden_dim": 4, "router": router},
    }
    model = {"vocab_size": 16, "dim": 8, "num_layers": 1, "context_length": 8, "block_pattern": [block]}
    train = {"steps": 1, "global_batch_size": 1, "micro_batch_size": 1, "precision": "fp32"}
    values = {"run": str(tmp_path), "model": model, "data": {"path": "data"}, "train": train}
    config = build_config(RunConfig, values)
    wanted = config.model.build()
    initialise(wanted, 0)
    wanted.blocks["0"].channel.router.bias.copy_(torch.tensor([0.5, -0.5, 0.25, 0.0]))
    folder = write(tmp_path)
    tensors = dict(wanted.state_dict())
    write_tensors(folder / "model-rank0000.safetensors", tensors)
    (folder / "model-rank0001.safetensors").unlink()
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["digest"]
    part = {"file": "model-rank0000.safetensors"}
    manifest["tensors"] = {
        name: {"shape": [*v.shape], "parts": [part | {"key": name, "start": [0] * v.dim(), "shape": [*v.shape]}]}
        for name, v in tensors.items()
    }
    manifest["files"] = {p.name: record_of(p) for p in folder.iterdir() if p.name != "manifest.json"}
    write_manifest(folder, manifest)
    save_config(config, tmp_path / "config.yaml")
    monkeypatch.setattr(checkpoint.Tokenizer, "load", lambda path: None)
    found, _, _ = load_model_for_inference(tmp_path)
    assert found.state_dict().keys() == tensors.keys()
    for name, value in found.state_dict().items():
        assert torch.equal(value, tensors[name]), name


def test_a_folder_that_is_no_run_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="not a run folder"):
        load_model_for_inference(tmp_path)
