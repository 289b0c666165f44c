"""Accounts by domain: every token and every label belongs to one domain, whichever ranks read it."""

import math

import numpy as np
import pytest
import torch

from lightbulb.data.config import DataConfig, MixtureConfig
from lightbulb.data.loader import IGNORED_LABEL, HeldOut, TrainLoader
from lightbulb.train.accounts import DomainAccount, HeldOutTally, bytes_predicted

LENGTH, VOCAB = 16, 300
BYTES = torch.arange(VOCAB) % 5


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("max_rows", [None, 7])
def test_each_held_out_label_is_evaluated_for_its_domain_once(data: DataConfig, size: int, max_rows) -> None:
    ranks = [HeldOut(data, LENGTH, VOCAB, 4, rank, size, max_rows) for rank in range(size)]
    tallies = [HeldOutTally(rank, BYTES) for rank in ranks]
    border = len(ranks[0].corpus.domains["plain"])
    expected, mixed = {"plain": 0, "poems": 0}, 0
    for step, batches in enumerate(zip(*ranks, strict=True)):
        parts = [list(tally.by_domain(step, batch)) for tally, batch in zip(tallies, batches, strict=True)]
        # every rank evaluates the same domains in the same order: evaluation is a collective
        assert len({tuple(domain for domain, _ in own) for own in parts}) == 1
        mixed += len(parts[0]) > 1
        for own, batch, tally in zip(parts, batches, tallies, strict=True):
            together = torch.stack([part.labels for _, part in own])
            assert torch.equal(together.amax(0), batch.labels) and IGNORED_LABEL < 0
            assert ((together != IGNORED_LABEL).sum(0) <= 1).all()
            for domain, part in own:
                tally.add(domain, part, 3.0 * int((part.labels != IGNORED_LABEL).sum()), 0)
        for batch in batches:
            for row, labels in zip(batch.sample_ids.tolist(), batch.labels, strict=True):
                if row >= 0:
                    expected["plain" if row < border else "poems"] += int(BYTES[labels[labels != IGNORED_LABEL]].sum())
    assert mixed <= 1
    assert [sum(tally.bytes[i] for tally in tallies) for i in range(2)] == list(expected.values())


def test_results_are_those_of_all_domains_together(data: DataConfig) -> None:
    held_out = HeldOut(data, LENGTH, VOCAB, 4)
    tally = HeldOutTally(held_out, BYTES)
    batch = next(iter(held_out))
    tally.add(0, batch, 30.0, 10)
    tally.add(1, batch, 10.0, 10)
    tally.add(0, batch, 10.0, 10)
    found = tally.results([20, 5])
    assert found["held_out_loss"] == 50 / 30
    assert found["held_out_bpb"] == pytest.approx(50 / math.log(2) / 25)
    assert found["domain_loss"] == {"plain": 2.0, "poems": 1.0}
    assert found["domain_bpb"]["poems"] == pytest.approx(10 / math.log(2) / 5)
    untouched = HeldOutTally(held_out, BYTES).results([0, 0])
    assert untouched["domain_loss"] == {} and untouched["held_out_loss"] == 0.0


@pytest.mark.parametrize(
    "mixtures", [[], [(0, MixtureConfig(weights={"poems": 3, "plain": 1}))]], ids=["plain", "mixed"]
)
def test_tokens_by_domain_add_up_over_ranks(data: DataConfig, mixtures: list) -> None:
    ranks = [TrainLoader(data, LENGTH, VOCAB, 0, 8, 2, rank, 2, mixtures) for rank in range(2)]
    accounts = [DomainAccount(rank) for rank in ranks]
    predicted = text_bytes = 0
    for _ in range(9):
        batches = [rank.next_step() for rank in ranks]
        counts = np.sum([account.count(own) for account, own in zip(accounts, batches, strict=True)], axis=0)
        predicted += sum(int((batch.labels != IGNORED_LABEL).sum()) for own in batches for batch in own)
        text_bytes += sum(bytes_predicted(own, BYTES) for own in batches)
        for account in accounts:
            account.add(counts.tolist())
    assert accounts[0].tokens == accounts[1].tokens and sum(accounts[0].tokens.values()) == predicted
    drawn = dict(zip(("plain", "poems"), ranks[0].drawn.tolist(), strict=True))
    assert accounts[0].tokens == {name: rows * LENGTH for name, rows in drawn.items()}
    assert sum(drawn.values()) == 72 and text_bytes > 0
    assert accounts[0].record()["group_epochs"] == ranks[0].group_epochs


def test_a_used_up_group_and_a_stage_are_said_once(data: DataConfig) -> None:
    caps = MixtureConfig(weights={"*": 1}, max_epochs={"poems": 0.03})
    loader = TrainLoader(data, LENGTH, VOCAB, 0, 8, 2, mixtures=[(0, caps), (4, MixtureConfig())])
    account, said = DomainAccount(loader), {}
    for step in range(1, 8):
        loader.next_step()
        if news := account.news():
            said[step] = news
    used_up = [text for news in said.values() for text in news if text.startswith("group poems has been read 0.0")]
    assert len(used_up) == 1 and said[4][0] == "the next one begins data.stages.0 and its mixture"
    assert sum(map(len, said.values())) == 2
