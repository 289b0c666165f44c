"""Receipts refuse what is not what it should be, whichever way it went wrong, and nothing is left behind."""

import ctypes
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hf_models import ATTENTION, MLP, SWITCH, our_config, sample, save_ours, save_theirs, their_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightbulb.experts.hf.convert import Options, export, import_model
from lightbulb.experts.hf.families import family_of
from lightbulb.experts.hf.family import InteropError
from lightbulb.experts.hf.folder import in_shards, write_shards
from lightbulb.experts.hf.links import LinkTable
from lightbulb.experts.receipt import RECEIPT, ReceiptError, Text, compare, digest, watching_routers
from lightbulb.experts.run_folder import untrained_config, whole_pieces, write_run
from lightbulb.experts.source import open_source
from lightbulb.launcher import export as export_command
from lightbulb.train.checkpoint import load_model_for_inference

DENSE = [{"token": ATTENTION, "channel": MLP}]
SPARSE = [{"token": ATTENTION, "channel": SWITCH}]
TEXT = Text(source="numbers", token_ids=[[1, 2, 3]])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with experts."""
    return save_ours(our_config(SPARSE), tmp_path_factory.mktemp("receipt") / "run")


def altered(name: str, values: Tensor) -> Tensor:
    """One number of one tensor, moved by a tenth."""
    if name == "blocks.1.channel.experts.down.weight" or name.endswith("layers.1.block_sparse_moe.experts.2.w2.weight"):
        values = values.clone()
        values.view(-1)[7] += 0.1
    return values


@pytest.mark.parametrize("kind", ["one number", "swapped", "not a number"])
def test_a_planted_corruption_of_an_export_is_refused(
    kind: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    honest = LinkTable.theirs

    def corrupt(table: LinkTable, name: str, read: object) -> Tensor:
        values = honest(table, name, read)  # type: ignore[arg-type]
        if kind == "one number":
            return altered(name, values)
        if kind == "swapped" and "experts.1.w1" in name:
            return honest(table, name.replace("w1", "w3"), read)  # type: ignore[arg-type]
        return values * float("nan") if kind == "not a number" and name == "lm_head.weight" else values

    monkeypatch.setattr(LinkTable, "theirs", corrupt)
    assert export_command.main([str(run), str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert "a logit differs by" in error and "the bound is 0.0001; nothing was written" in error
    assert list(tmp_path.iterdir()) == []


def test_a_planted_corruption_of_an_import_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, honest = save_theirs(their_model("mixtral"), tmp_path / "theirs"), LinkTable.ours
    monkeypatch.setattr(LinkTable, "ours", lambda table, name, read: altered(name, honest(table, name, read)))
    with pytest.raises(ReceiptError, match=r"run: a logit differs by .* from transformers 4"):
        import_model(folder, tmp_path / "run", Options())
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


def test_a_tensor_that_changes_after_its_receipt_is_refused(run: Path, tmp_path: Path) -> None:
    export(run, tmp_path / "out", Options())
    path = tmp_path / "out" / "model.safetensors"
    name = "model.layers.1.block_sparse_moe.experts.2.w2.weight"
    values = load_file(path)
    save_file({key: altered(key, value) for key, value in values.items()}, path, {"format": "pt"})
    with pytest.raises(InteropError, match=rf"'{name}' is not what was written there, as receipt.json says"):
        import_model(tmp_path / "out", tmp_path / "again", Options())
    assert not (tmp_path / "again").exists()
    source = open_source(tmp_path / "out")
    source.read("head")
    (tmp_path / "out" / RECEIPT).unlink()  # the change was meant
    assert not torch.equal(
        open_source(tmp_path / "out").read("blocks.1.channel.experts.down.weight"),
        open_source(run).read("blocks.1.channel.experts.down.weight"),
    )


@pytest.mark.parametrize("kind", ["changed", "cut", "no mapping"])
def test_a_damaged_receipt_is_named(kind: str, run: Path, tmp_path: Path) -> None:
    export(run, tmp_path / "out", Options())
    path = tmp_path / "out" / RECEIPT
    text = path.read_text()
    path.write_text(
        {"changed": text.replace('"bound": 0.0001', '"bound": 0.1'), "cut": text[:-3], "no mapping": "[]"}[kind]
    )
    with pytest.raises(ReceiptError, match=r"receipt.json: damaged"):
        open_source(tmp_path / "out")


def test_digests_are_of_the_values_that_are_there(run: Path, tmp_path: Path) -> None:
    receipt = export(run, tmp_path / "out", Options(dtype=torch.bfloat16))
    values = load_file(tmp_path / "out" / "model.safetensors")
    assert values.keys() == receipt.tensors_out.keys()
    for name, value in values.items():
        assert receipt.tensors_out[name] == digest(value, record=True)
        assert receipt.tensors_out[name].dtype == "bfloat16" and receipt.tensors_out[name].shape == list(value.shape)
    source = open_source(run)
    assert receipt.tensors_in == source.digests() and receipt.tensors_in.keys() == set(source.names())


def test_a_digest_knows_the_order_of_the_values_not_of_the_memory() -> None:
    x = torch.arange(6.0).view(2, 3)
    assert digest(x) == digest(x.t().contiguous().t()) != digest(x.t())
    assert digest(x.bfloat16()) != digest(x) and digest(torch.empty(0)) != digest(x)


def test_comparison() -> None:
    expected = torch.tensor([[[0.0, 1.0], [2.0, 0.0], [0.0, 3.0]]])
    found = compare(expected + torch.tensor([0.0, -1.5]), expected, "itself", TEXT, 2.0)
    assert (found.greatest_difference, found.mean_difference) == (1.5, 0.75)
    assert found.same_choices == pytest.approx(2 / 3)
    found.check("it")
    for bound, values in ((1.4, found), (2.0, compare(expected * float("nan"), expected, "itself", TEXT, 2.0))):
        with pytest.raises(ReceiptError, match="it: a logit differs by"):
            values.model_copy(update={"bound": bound}).check("it")
    with pytest.raises(ReceiptError, match=r"\(1, 3, 1\) are not those of itself, \(1, 3, 2\)"):
        compare(expected[..., :1], expected, "itself", TEXT, 1.0)


def test_entropy_and_load_of_routers(run: Path) -> None:
    model = load_model_for_inference(run)[0]
    with torch.no_grad(), watching_routers(model) as records:
        model.blocks["0"].channel.router.weight.zero_()
        model.blocks["1"].channel.router.weight.mul_(1e4)
        model(sample())
    assert records["blocks.0.channel.router"].entropy == pytest.approx(1.0)
    assert records["blocks.1.channel.router"].entropy < 0.01
    assert all(sum(record.load) == pytest.approx(1) for record in records.values())
    count = len(records)
    model(sample())
    assert len(records) == count == 2


@contextmanager
def peak_of_memory() -> Iterator[list[int]]:
    """Greatest growth of this process's own pages (bytes), of mapped files none."""

    def now() -> int:
        line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("RssAnon"))
        return int(line.split()[1]) << 10

    ctypes.CDLL(None).malloc_trim(0)  # what was freed before must not hide what is used now
    start, result, stop = now(), [0], threading.Event()

    def watch() -> None:
        while not stop.wait(0.0005):
            result[0] = max(result[0], now() - start)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield result
    finally:
        stop.set()
        thread.join()


def test_memory_is_that_of_a_shard(tmp_path: Path) -> None:
    """A model of 100 MB in shards of 8 MB, both ways; what the allocator keeps of freed blocks counts too."""
    block = {"token": ATTENTION, "channel": MLP | {"hidden_dim": 1536}}
    config = our_config([block], dim=512, num_layers=8)
    family, total, shard = family_of(config), 4 * config.cost().params, 8_000_000
    run, theirs, back = (tmp_path / name for name in ("run", "theirs", "back"))
    source, table = open_source(save_ours(config, run)), family.table(config)

    def write(folder: Path, size: int) -> int:
        folder.mkdir()
        with peak_of_memory() as peak:
            write_shards(
                folder, table.their_shapes, lambda name: table.theirs(name, source.read_part), torch.bfloat16, size
            )
        return peak[0]

    out_peak = write(theirs, shard)
    whole_peak = write(tmp_path / "whole", total)  # what it is when all is held
    values = {"model_type": family.model_type} | family.write(config)
    (theirs / "config.json").write_text(json.dumps(values))
    back.mkdir()
    with peak_of_memory() as in_peak:
        imported = open_source(theirs)
        pieces = whole_pieces(config, imported.read, imported.names())
        write_run(back, untrained_config(back, config, Path("data")), pieces, "{}")
    assert total > 90_000_000 and len(list(theirs.glob("*.safetensors"))) > 5
    assert out_peak < 0.75 * whole_peak and in_peak[0] < 0.55 * total, (out_peak, whole_peak, in_peak)
    assert torch.equal(open_source(back).read("head"), source.read("head").bfloat16().float())


def test_shards_are_full_but_not_over() -> None:
    shapes = {"a": (3,), "b": (2,), "c": (9,), "d": (1,), "e": ()}
    assert list(in_shards(shapes, 4, 20)) == [["a", "b"], ["c"], ["d", "e"]]
    assert list(in_shards({}, 4, 20)) == [[]]


def test_links_that_leave_something_out_are_found() -> None:
    table = LinkTable({"a": (2, 3), "b": (4,)})
    table.add_part("a", "x", (0,))
    table.add("b", "y")
    assert list(table.problems()) == ["a: 3 of 6 values have a counterpart"]
