"""What branching did: bits per byte of each cluster's held-out text, of the seed and of its branch."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import orjson
import torch

from lightbulb.data.corpus import Corpus
from lightbulb.data.loader import IGNORED_LABEL
from lightbulb.data.shards import Row
from lightbulb.data.tokenizer import Tokenizer
from lightbulb.experts.branch import Branch, Branches
from lightbulb.folder import write_atomically
from lightbulb.models.language import LanguageModel
from lightbulb.train.checkpoint import load_model_for_inference
from lightbulb.train.manifest import step_of

SUMMARY = "summary.json"


def summarise(branches: Branches) -> list[dict[str, Any]]:
    """A row for each branch, which is complete; also written as ``summary.json``. One model is in memory at a time.

    ``before_bpb`` and ``after_bpb`` are None for a cluster without held-out text, and with ``eval_contexts: 0``.
    """
    limit = branches.config.eval_contexts
    text = {branch.cluster: _held_out(branch, limit) for branch in branches.branches if limit}
    before: dict[int, float | None] = {}
    after: dict[int, float | None] = {}
    if limit:
        seed, tokenizer, config = load_model_for_inference(branches.config.seed_run, step_of(branches.checkpoint))
        for number, rows in text.items():
            before[number] = bits_per_byte(seed, tokenizer, rows, config.data.document_mask)
        del seed
        for branch in branches.branches:
            model, tokenizer, config = load_model_for_inference(branch.folder, branch.config.train.steps)
            after[branch.cluster] = bits_per_byte(model, tokenizer, text[branch.cluster], config.data.document_mask)
    table = []
    for branch in branches.branches:
        about = {"cluster": branch.cluster, "run": str(branch.folder), "words": branch.words, "size": branch.tokens}
        scores = {"before_bpb": before.get(branch.cluster), "after_bpb": after.get(branch.cluster)}
        table.append(about | {"tokens": branch.needs} | scores)
    write_atomically(branches.config.run / SUMMARY, orjson.dumps({"branches": table}, option=orjson.OPT_INDENT_2))
    return table


def _held_out(branch: Branch, limit: int) -> list[Row]:
    """Held-out rows of a branch's groups, evenly spaced, at most so many."""
    model = branch.config.model
    corpus = Corpus(branch.config.data.path.expanduser(), "held_out", model.context_length, model.vocab_size)
    numbers = [
        (name, row) for name in branch.groups if name in corpus.groups for row in range(corpus.groups[name].rows)
    ]
    count = min(limit, len(numbers))
    chosen = [numbers[place * len(numbers) // count] for place in range(count)]
    return [corpus.domains[name][row] for name, row in chosen]


@torch.no_grad()
def bits_per_byte(model: LanguageModel, tokenizer: Tokenizer, rows: Sequence[Row], document_mask: bool) -> float | None:
    """Of the rows' predicted text; None where there is none."""
    token_bytes = np.asarray(tokenizer.token_bytes())
    device = next(model.parameters()).device
    nats, text_bytes = 0.0, 0
    for row in rows:  # one at a time: contexts are long, and there are few
        parts = (row.tokens, row.document_ids, row.labels())
        ids, numbers, labels = (torch.from_numpy(values.astype(np.int64))[None].to(device) for values in parts)
        losses = model(ids[:, :-1], labels, numbers[:, :-1] if document_mask else None)
        predicted = labels[labels != IGNORED_LABEL]
        nats += float(losses[labels != IGNORED_LABEL].double().sum())
        text_bytes += int(token_bytes[predicted.cpu().numpy()].sum())
    return nats / math.log(2) / text_bytes if text_bytes else None
