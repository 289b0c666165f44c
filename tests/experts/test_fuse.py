"""Targets of several models: fused, aligned, resumable, and connected with the rows they belong to."""

import random
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from dense_runs import MODEL, make_run, model_of, tensors

from lightbulb.config import ConfigError, build_config, read_yaml, save_config
from lightbulb.data.config import DataConfig, DataError
from lightbulb.data.corpus import Corpus
from lightbulb.data.loader import TrainLoader
from lightbulb.data.soft_targets import DistilConfig, SoftTargetFolder
from lightbulb.data.tokenizer import Tokenizer
from lightbulb.data_prep.config import CorpusConfig
from lightbulb.data_prep.pipeline import preprocess
from lightbulb.experts import fuse as fusing
from lightbulb.experts.fuse import fused, fusion_weights
from lightbulb.experts.fuse_config import FuseConfig
from lightbulb.experts.receipt import RECEIPT, read_receipt
from lightbulb.experts.source import open_source
from lightbulb.experts.teacher import Opinion, combined
from lightbulb.experts.translate import Translation, edit_distances
from lightbulb.folder import FolderError
from lightbulb.launcher.upcycle import main
from lightbulb.nn.cross_entropy import IGNORE
from lightbulb.nn.soft_targets import SoftTargets
from lightbulb.train.config import RunConfig

LENGTH = MODEL["context_length"]
WORDS = ["when ", "the ", "moon ", "is ", "späte ", "Züge ", "12 ", "345\n"]
TOKENIZER = Tokenizer.train(WORDS * 3, 290)
WIDE = MODEL | {"vocab_size": TOKENIZER.vocab_size, "dim": 32}


def document(seed: int) -> str:
    return "".join(random.Random(seed).choices(WORDS, k=20))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("fusing")
    TOKENIZER.save(folder / "tokenizer.json")
    (folder / "text").mkdir()
    for i in range(12):
        (folder / "text" / f"{i}.txt").write_text(document(i))
    values = {
        "output": str(folder / "corpus"), "context_length": LENGTH, "held_out_fraction": 0.2,
        "tokenizer": {"path": str(folder / "tokenizer.json")},
        "sources": [{"type": "text", "domain": "all", "path": str(folder / "text")}],
    }  # fmt: skip
    preprocess(build_config(CorpusConfig, values))
    return folder / "corpus"


@pytest.fixture
def source(tmp_path, corpus):
    """``source(1)``: a run of another model for each seed, with the corpus's tokenizer or another."""

    def make(seed: int, tokenizer: Tokenizer | None = None) -> Path:
        rows = WIDE["vocab_size"] if tokenizer is None else tokenizer.vocab_size + 5
        path = make_run(tmp_path / f"source-{seed}", WIDE | {"init_std": 0.3, "vocab_size": rows}, seed)
        (tokenizer or TOKENIZER).save(path / "tokenizer.json")
        return path

    return make


def config_of(folder: Path, corpus: Path, sources, **settings) -> FuseConfig:
    values = {
        "method": "fuse", "run": str(folder / "student"), "targets": str(folder / "targets"),
        "sources": [{"path": str(path)} for path in sources], "data": {"path": str(corpus)},
    }  # fmt: skip
    return build_config(FuseConfig, values | settings)


def written(folder: Path, corpus: Path, sources, **settings) -> SoftTargetFolder:
    fusing.fuse(config_of(folder, corpus, sources, **settings), lambda *_: None)
    return targets_of(folder / "targets", corpus)


def targets_of(folder: Path, corpus: Path, share: float = 0.9) -> SoftTargetFolder:
    config = DistilConfig(targets=folder, language_share=share)
    return SoftTargetFolder(config, Corpus(corpus, "train", LENGTH, WIDE["vocab_size"]))


def batch(corpus: Path, rows: range) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and labels."""
    data = Corpus(corpus, "train", LENGTH, WIDE["vocab_size"])
    tokens = torch.stack([torch.from_numpy(data[row].tokens) for row in rows])
    documents = torch.stack([torch.from_numpy(data[row].document_ids) for row in rows])
    return tokens[:, :-1], tokens[:, 1:].masked_fill(documents[:, 1:] == 0, IGNORE)


def divergence(run: Path, targets: SoftTargets, tokens, labels) -> float:
    """Nats per token of a run's model from targets."""
    model = model_of(run)
    model(tokens, labels, targets=targets)
    return float(model.divergence) / int((labels != IGNORE).sum())


@pytest.mark.parametrize("top_k", [1, 4, 300])
def test_equality_of_one_source_and_the_student(tmp_path, corpus, source, top_k):
    targets = written(tmp_path, corpus, [source(1)], top_k=top_k)
    rows, (tokens, labels) = range(5), batch(corpus, range(5))
    assert abs(divergence(source_path(tmp_path, 1), targets.batch(rows, 5), tokens, labels)) < 1e-5
    assert divergence(source(2), targets.batch(rows, 5), tokens, labels) > 0.1


def source_path(folder: Path, seed: int) -> Path:
    return folder / f"source-{seed}"


def test_with_the_whole_share_the_gradient_is_that_of_the_text(tmp_path, corpus, source):
    run = source(1)
    written(tmp_path, corpus, [source(2)])
    tokens, labels = batch(corpus, range(4))
    found = {}
    for share in (None, 1.0, 0.9):
        model = model_of(run).requires_grad_(True)
        soft = None if share is None else targets_of(tmp_path / "targets", corpus, share).batch(range(4), 4)
        losses = model(tokens, labels, targets=soft)
        losses.sum().backward()
        found[share] = losses.detach(), {name: p.grad for name, p in model.named_parameters()}
    for share in (1.0, 0.9):
        assert torch.equal(found[share][0], found[None][0])  # the loss that is told is the text's
    difference = {
        share: max(float((found[share][1][n] - g).abs().max()) for n, g in found[None][1].items())
        for share in (1.0, 0.9)
    }
    assert difference[1.0] < 1e-5 and difference[0.9] > 1e-3


@pytest.mark.parametrize("fusion", ["min_ce", "avg_ce"])
def test_rows_sum_to_one_and_the_better_source_counts_more(tmp_path, corpus, source, fusion):
    sources = [source(seed) for seed in (1, 2, 3)]
    targets = written(tmp_path, corpus, sources, top_k=WIDE["vocab_size"], fusion=fusion)
    rows, (tokens, labels) = range(6), batch(corpus, range(6))
    soft = targets.batch(rows, 6)
    has_label = labels != IGNORE
    assert (soft.probabilities.sum(-1)[has_label] - 1).abs().max() < 1e-4
    assert not soft.probabilities[~has_label].any()
    log_probabilities = torch.stack([model_of(run)(tokens).log_softmax(-1) for run in sources])
    nats = -log_probabilities.gather(-1, labels.clamp_min(0)[None, ..., None].expand(3, -1, -1, 1))[..., 0]
    loss = (nats * has_label).sum(-1) / has_label.sum(-1)
    weights = torch.nn.functional.one_hot(loss.argmin(0), 3).t().float() if fusion == "min_ce" else (-loss).softmax(0)
    wanted = (weights[:, :, None, None] * log_probabilities.exp()).sum(0)
    found = torch.zeros_like(wanted).scatter_add(-1, soft.ids, soft.probabilities)
    assert (found - wanted)[has_label].abs().max() < 1e-5
    assert weights.argmax(0).unique().numel() > 1  # rows differ in who knows them best


def test_a_run_goes_on_from_what_was_written(tmp_path, corpus, source, monkeypatch):
    monkeypatch.setattr(fusing, "SHARD_BYTES", 8 * 10 * LENGTH * 7)  # seven rows
    sources = [source(1), source(2)]
    whole = written(tmp_path / "whole", corpus, sources)
    config = config_of(tmp_path, corpus, sources)

    def stop_at(limit: int, what: str, done: int, total: int) -> None:
        if what == "source 1" and done > limit:
            raise KeyboardInterrupt

    for limit in (9, 16):
        with pytest.raises(KeyboardInterrupt):
            fusing.fuse(config, partial(stop_at, limit))
        assert not (tmp_path / "student").exists()
    kept = sorted(path.name for path in (tmp_path / "targets").glob(".source-*"))
    times = [(tmp_path / "targets" / name).stat().st_mtime_ns for name in kept]
    assert len(kept) > 3
    said: list[str] = []
    monkeypatch.setattr(Path, "unlink", lambda self, missing_ok=False: said.append(self.name))  # to look at them below
    fusing.fuse(config, lambda *_: None)
    assert times == [(tmp_path / "targets" / name).stat().st_mtime_ns for name in kept] and set(kept) <= set(said)
    again = targets_of(tmp_path / "targets", corpus)
    assert len(whole.manifest.shards) > 3 and again.manifest.shards == whole.manifest.shards
    for changes, message in (({"top_k": 3}, "was begun with other sources or settings"), ({}, "there is something")):
        run = str(tmp_path / "other") if changes else str(tmp_path / "student")
        with pytest.raises((ConfigError, FolderError), match=message):
            fusing.fuse(config_of(tmp_path, corpus, sources, run=run, **changes), lambda *_: None)


def test_rows_keep_their_targets_in_every_order(tmp_path, corpus, source):
    written(tmp_path, corpus, [source(1)])
    data = DataConfig(path=corpus)
    distil = DistilConfig(targets=tmp_path / "targets")
    model = model_of(source_path(tmp_path, 1))
    for rank in range(2):
        loader = TrainLoader(data, LENGTH, WIDE["vocab_size"], 3, 4, 2, rank, 2, distil=distil)
        for found in loader.next_step() + loader.next_step():
            best = model(found.tokens).argmax(-1)
            assert torch.equal(found.targets.ids[..., 0][found.labels != IGNORE], best[found.labels != IGNORE])
        loader.close()


def test_the_command_writes_a_run_of_the_student(tmp_path, corpus, source, capsys):
    path = tmp_path / "fuse.yaml"
    path.write_text(
        config_of(tmp_path, corpus, [source(1), source(2)], student=str(source(3)), batch=16).model_dump_json()
    )
    assert main([str(path), "top_k=3"]) == 0
    shown = capsys.readouterr().out
    assert "source 1: " in shown and "next: lightbulb pretrain" in shown
    student, teacher = (tensors(tmp_path / name) for name in ("student", "source-3"))
    assert student.keys() == teacher.keys() and all(torch.equal(student[name], teacher[name]) for name in student)
    receipt = read_receipt(tmp_path / "student" / RECEIPT)
    assert receipt.conversion == "fuse" and len(receipt.sources) == 2
    assert targets_of(tmp_path / "targets", corpus).manifest.top_k == 3


def test_the_students_run_begins_by_itself_and_meets_nobody(tmp_path, corpus, source):
    """The student is a branch that began warm and has sisters."""
    student = source(1)
    outer = {"every": 2, "folder": str(tmp_path / "exchange"), "branch": 0, "branches": 2}
    values = read_yaml(student / "config.yaml") | {"outer": outer, "start_from": "seed", "start_from_moments": True}
    save_config(build_config(RunConfig, values), student / "config.yaml")
    config = fusing.run_config(config_of(tmp_path, corpus, [student]), open_source(student))
    assert config.outer is None and config.start_from is None and config.data.path == corpus
    assert config.distil is not None and config.distil.targets == tmp_path / "targets"
    train = {"steps": 1, "global_batch_size": 3, "micro_batch_size": 2}
    with pytest.raises(ConfigError, match=r"train\.global_batch_size 3 is not a multiple"):
        fusing.run_config(config_of(tmp_path, corpus, [student], train=train), open_source(student))


def test_damaged_and_strange_targets_are_named(tmp_path, corpus, source):
    written(tmp_path, corpus, [source(1)])
    (shard,) = (tmp_path / "targets").glob("targets-*.safetensors")
    content = bytearray(shard.read_bytes())
    content[-5] ^= 1
    shard.write_bytes(content)
    with pytest.raises(DataError, match=r"targets-00000\.safetensors: damaged: its hash"):
        targets_of(tmp_path / "targets", corpus).batch([0], 1)
    other = shutil.copytree(corpus, tmp_path / "other")
    (other / "tokenizer.json").write_text((other / "tokenizer.json").read_text() + "\n")
    manifest = (other / "manifest.json").read_text()
    old = Tokenizer.load(corpus / "tokenizer.json").digest
    (other / "manifest.json").write_text(manifest.replace(old, Tokenizer.load(other / "tokenizer.json").digest))
    with pytest.raises(DataError, match="written for another corpus"):
        targets_of(tmp_path / "targets", other)
    with pytest.raises(DataError, match=r"targets\.json: missing"):
        targets_of(tmp_path, corpus)


def test_equality_of_an_alignment_with_itself():
    translation = Translation(TOKENIZER, TOKENIZER)
    first, second = TOKENIZER.encode_batch([document(1), document(2)])
    row = [*first, TOKENIZER.eos_id, *second]
    found = translation.align(row)
    assert found.ids == row and found.ours == found.theirs == list(range(len(row)))
    ids = torch.arange(TOKENIZER.vocab_size)
    assert torch.equal(translation.translated(ids), ids)


def test_pairs_of_two_tokenizers_begin_at_the_same_byte():
    student, other = TOKENIZER, Tokenizer.train([document(seed) for seed in range(40)], 275)
    translation = Translation(other, student)
    whole = student.encode_batch([f"ß {document(3)}"])[0]  # of two tokens, the first of which is cut off below
    assert student.decode_bytes(whole[:1]) == "ß".encode()[:1]
    for row in (whole, [*whole, student.eos_id, *whole[:9]], whole[1:]):
        found = translation.align(row)
        assert len(found.ours) == len(found.theirs) > len(row) // 4
        offset = len(student.decode_bytes(row)) - len(other.decode_bytes(found.ids))
        for i, j in zip(found.ours, found.theirs, strict=True):
            start = len(student.decode_bytes(row[:i]))
            assert start - offset == len(other.decode_bytes(found.ids[:j]))
            assert int(translation.translated(torch.tensor(found.ids[j]))) == row[i]
        assert found.ours == sorted(set(found.ours)) and found.theirs == sorted(set(found.theirs))


def test_a_teacher_with_another_tokenizer(tmp_path, corpus, source):
    """Where the tokenizations meet, its distribution is the model's own, in the student's tokens."""
    other = Tokenizer.train([document(seed) for seed in range(40)], 275)
    run = source(1, other)
    targets = written(tmp_path, corpus, [run], student=str(source(2)), top_k=5)
    student = TOKENIZER
    translation, model = Translation(other, student), model_of(run)
    tokens, labels = batch(corpus, range(8))
    rows = torch.cat([tokens, labels[:, -1:]], 1)
    soft, checked = targets.batch(range(8), 8), 0
    for number in range(8):
        row = rows[number][: 1 + int((labels[number] != IGNORE).sum())].tolist()
        found = translation.align(row)
        ids = found.ids[: LENGTH + 1]
        probabilities = model(torch.tensor([ids[:-1]]))[0].softmax(-1)
        pairs = {i - 1: j - 1 for i, j in zip(found.ours, found.theirs, strict=True) if i and 0 < j < len(ids)}
        for place in range(LENGTH):
            if place not in pairs:
                assert not soft.probabilities[number, place].any()
                continue
            best = probabilities[pairs[place]].topk(20)
            to = translation.translated(best.indices) % (
                student.vocab_size + 1
            )  # the last collects what has no counterpart
            whole = torch.zeros(student.vocab_size + 1).index_add(0, to, best.values)
            wanted = whole[:-1].topk(5)
            assert torch.allclose(soft.probabilities[number, place], wanted.values, atol=1e-6)
            checked += 1
    assert checked > 20


def test_edit_distances_are_levenshteins():
    def naive(a: bytes, b: bytes) -> int:
        if not a or not b:
            return len(a) + len(b)
        return min(naive(a[1:], b) + 1, naive(a, b[1:]) + 1, naive(a[1:], b[1:]) + (a[0] != b[0]))

    generator = random.Random(0)
    pieces = [bytes(generator.choices(b"abc", k=generator.randrange(6))) for _ in range(20)]
    letters = np.full((20, 5), -1)
    for number, piece in enumerate(pieces):
        letters[number, : len(piece)] = list(piece)
    lengths = np.array([len(piece) for piece in pieces])
    for piece in pieces:
        assert edit_distances(piece, letters, lengths).tolist() == [naive(piece, other) for other in pieces]


def test_tokens_that_stand_twice_are_added():
    ids, probabilities = combined(torch.tensor([[4, 7, 4, -1]]), torch.tensor([[0.2, 0.3, 0.25, 0.1]]), 3)
    assert ids[0, :2].tolist() == [4, 7]
    torch.testing.assert_close(probabilities, torch.tensor([[0.45, 0.3, 0.0]]))


def test_sources_without_a_target_do_not_count():
    ids = torch.tensor([[[1, 2]]])
    one = Opinion(ids, torch.tensor([[[0.5, 0.25]]]), torch.tensor([1.0]))
    none = Opinion(ids, torch.zeros(1, 1, 2), torch.tensor([1.0]))
    weights = fusion_weights(torch.stack([one.loss, none.loss]), "avg_ce")
    assert weights.tolist() == [[0.5], [0.5]]
    assert torch.equal(fused([one, none], weights, 2)[1], one.probabilities)
