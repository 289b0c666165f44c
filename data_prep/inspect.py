"""Looking at a corpus: its manifest as tables, documents as they were written, histograms as a picture."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
from matplotlib.figure import Figure
from rich.markup import escape
from rich.table import Table

from lightbulb.data.tokenizer import Tokenizer
from lightbulb.data_prep.counts import CorpusError
from lightbulb.data_prep.lineage import DOCUMENTS_NAME, LINEAGE_FOLDER
from lightbulb.data_prep.manifest import MANIFEST_NAME, read_manifest
from lightbulb.data_prep.mds import ShardFormat
from lightbulb.data_prep.pack import PADDING_DOCUMENT
from lightbulb.data_prep.tokenise import TOKENIZER_NAME, token_dtype
from lightbulb.folder import explained

LEFT = ("group", "repaired", "dropped", "words", "nearest")
"""Columns of text; the others hold numbers."""


class Sample(NamedTuple):
    """A piece of a document as it stands in a row.

    Attributes:
        place: split, group and row.
        tokens: how many it has.
        parts: its text by turns, each with whether it counts towards the loss.
    """

    place: str
    tokens: int
    parts: list[tuple[str, bool]]


def open_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a corpus.

    Raises:
        CorpusError: the folder holds none.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        raise CorpusError(f"{folder / MANIFEST_NAME}: missing, or of another version; write it with preprocess")
    return manifest


def tables(manifest: dict[str, Any]) -> Iterator[Table]:
    """Sources, what was dropped from them, with examples; the groups of each split; clusters and order, if any."""
    sources = _table("source", "documents", "MB", "repaired", "dropped")
    for entry in manifest["sources"]:
        dropped = ", ".join(f"{count:,} {reason}" for reason, count in entry["dropped"].items())
        repaired = ", ".join(f"{count:,} {reason}" for reason, count in entry["repaired"].items())
        sources.add_row(
            entry["source"], f"{entry['documents']:,}", f"{entry['bytes'] / 1e6:.2f}", repaired or "-", dropped or "-"
        )
    yield sources
    if (examples := _examples(manifest)).rows:
        yield examples
    masked = ("counted",) if has_loss_mask(manifest) else ()
    groups = _table("split", "group", "documents", "MB", "tokens", *masked, "share", "rows", "bytes/token")
    for split, entries in manifest["splits"].items():
        total = sum(entry["tokens"] for entry in entries.values())
        for name, entry in entries.items():
            groups.add_row(
                split,
                name,
                f"{entry['documents']:,}",
                f"{entry['bytes'] / 1e6:.2f}",
                f"{entry['tokens']:,}",
                *(f"{entry['counted_tokens'] / max(1, entry['tokens']):.1%}" for _ in masked),
                f"{entry['tokens'] / max(1, total):.1%}",
                f"{entry['rows']:,}",
                f"{entry['bytes_per_token']:.3f}",
            )
    yield groups
    if clusters := manifest.get("clusters"):
        yield _clusters(clusters)
    if order := manifest.get("order"):
        table = _table("order", "similarity of neighbours")
        for name, value in order.items():
            table.add_row(name.removesuffix("_similarity"), f"{value:.4f}")
        yield table


def _examples(manifest: dict[str, Any]) -> Table:
    """Some dropped documents, and what each was dropped for: the one that stays, its share, or how it begins."""
    table = Table("dropped", "source", "path", "because")
    for entry in manifest["sources"]:
        for reason, examples in entry.get("examples", {}).items():
            for example in examples:
                if "kept" in example:
                    because = f"like {example['kept']}"
                elif "share" in example:
                    because = f"shares {example['share']:.1%} with evaluation texts"
                else:
                    because = example["text"]
                table.add_row(*map(escape, (reason, entry["domain"], example["path"], because)))
    return table


def _clusters(clusters: list[dict[str, Any]]) -> Table:
    """What is in each cluster."""
    table = _table("cluster", "documents", "similarity", "words", "nearest")
    for number, entry in enumerate(clusters):
        words, nearest = " ".join(entry["words"]) or "-", "\n".join(entry["nearest"])
        table.add_row(
            str(number), f"{entry['documents']:,}", f"{entry['similarity']:.3f}", escape(words), escape(nearest)
        )
    return table


def has_loss_mask(manifest: dict[str, Any]) -> bool:
    """Whether the rows say which tokens count."""
    return any("counted_tokens" in entry for groups in manifest["splits"].values() for entry in groups.values())


def _table(*columns: str) -> Table:
    table = Table(*columns)
    for column in table.columns[1:]:
        column.justify = "right" if column.header not in LEFT else "left"
    return table


def samples(folder: Path, manifest: dict[str, Any], split: str, count: int, seed: int) -> list[Sample]:
    """Pieces of documents from rows drawn by seed, decoded.

    Raises:
        CorpusError: the split has no rows.
    """
    groups = manifest["splits"].get(split, {})
    ends = np.cumsum([entry["rows"] for entry in groups.values()])
    if not len(ends):
        raise CorpusError(f"{folder}: split {split!r} has no rows; it has {', '.join(manifest['splits'])}")
    tokenizer = Tokenizer.load(folder / TOKENIZER_NAME, manifest["config"]["tokenizer"]["eos"])
    length = manifest["context_length"] + 1
    dtype, has_mask = token_dtype(manifest["tokenizer"]["vocab_size"]), has_loss_mask(manifest)
    shards = ShardFormat(length, dtype, manifest["config"]["shard_bytes"], has_mask)
    generator = np.random.default_rng(seed)
    found = []
    for place in np.sort(generator.choice(ends[-1], min(count, int(ends[-1])), replace=False)):
        group = int(np.searchsorted(ends, place, side="right"))
        name, number = list(groups)[group], int(place - (ends[group - 1] if group else 0))
        shard, row = divmod(number, shards.rows_per_shard)
        content = shards.read(folder / split / name / groups[name]["shards"][shard]["basename"], row)
        pieces = np.unique(content["document_ids"][content["document_ids"] != PADDING_DOCUMENT])
        chosen = content["document_ids"] == generator.choice(pieces)
        ids = content["tokens"][chosen]
        counted = content["loss_mask"][chosen] if has_mask else np.ones_like(ids)
        parts = _parts(ids, counted, tokenizer)
        found.append(Sample(f"{split}/{name} row {number}", len(ids), parts))
    return found


def _parts(ids: np.ndarray, counted: np.ndarray, tokenizer: Tokenizer) -> list[tuple[str, bool]]:
    """The text of the ids, cut where they begin or cease to count."""
    cuts = np.flatnonzero(np.diff(counted)) + 1
    pieces = zip(np.split(ids, cuts), np.split(counted, cuts), strict=True)
    return [(tokenizer.decode(piece.tolist()), bool(flags[0])) for piece, flags in pieces]


def draw(folder: Path, path: Path) -> None:
    """Histograms of the documents' lengths and of the domains, as a PNG.

    Raises:
        FolderError: the picture cannot be written.
    """
    table = pq.read_table(folder / LINEAGE_FOLDER / DOCUMENTS_NAME, columns=["domain", "split", "tokens"])
    is_kept = np.array(table["split"].is_valid())
    tokens = table["tokens"].to_numpy()[is_kept].astype(np.int64)
    domains, domain_of = np.unique(table["domain"].to_numpy(zero_copy_only=False)[is_kept], return_inverse=True)
    figure = Figure(figsize=(11, 1.5 + max(3.5, 0.25 * len(domains))), layout="constrained")
    lengths, totals = figure.subplots(1, 2)
    bins = np.geomspace(1, max(2, tokens.max(initial=1)), 60)
    order = np.argsort([-tokens[domain_of == i].sum() for i in range(len(domains))], kind="stable")
    for i in order[:10]:
        lengths.hist(tokens[domain_of == i], bins=bins, histtype="step", label=domains[i])
    lengths.set(xscale="log", xlabel="tokens of a document", ylabel="documents", title="Lengths")
    lengths.legend(fontsize="small")
    sums = np.array([tokens[domain_of == i].sum() for i in order])
    totals.barh(np.arange(len(order)), sums)
    totals.set_yticks(np.arange(len(order)), [domains[i] for i in order])
    totals.invert_yaxis()
    totals.set(xlabel="tokens", title="Domains")
    with explained(path):
        figure.savefig(path, dpi=120, format="png")
