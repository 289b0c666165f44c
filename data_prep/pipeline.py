"""A corpus from start to end: the chain of steps, and their files put together.

The steps work in ``<output>.work`` (:mod:`lightbulb.data_prep.work`), where a run that was killed goes on; the corpus
is put together there too and renamed, so that ``<output>`` is a whole corpus or absent.
"""

import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.progress import Progress

from lightbulb.data.tokenizer import Tokenizer
from lightbulb.data_prep.config import CorpusConfig
from lightbulb.data_prep.counts import EXAMPLES, CorpusError, Counts
from lightbulb.data_prep.decontaminate import SHARES_NAME, Contaminated
from lightbulb.data_prep.deduplicate import KEPT_NAME, ExactDuplicates, NearDuplicates, Signatures
from lightbulb.data_prep.documents import DROPPED_NAME, Documents, dropped, kept
from lightbulb.data_prep.embed import model_digest
from lightbulb.data_prep.ingest import Input, Read, inputs_digest, inputs_of, source_counts
from lightbulb.data_prep.lineage import LINEAGE_FOLDER, Lineage
from lightbulb.data_prep.manifest import (
    MANIFEST_NAME,
    config_hash,
    damaged_files,
    group_entry,
    read_manifest,
    source_entry,
    write_manifest,
)
from lightbulb.data_prep.mds import write_index
from lightbulb.data_prep.relate import Cluster, Embed, FitEmbedder, Order
from lightbulb.data_prep.split import SPLITS, TRAIN, Split
from lightbulb.data_prep.step import REPORT_NAME, Output, Step, digest
from lightbulb.data_prep.tokenise import TOKENIZER_NAME, MakeTokenizer, Tokenise
from lightbulb.data_prep.tokens import ReadTokens, TakeTokens
from lightbulb.data_prep.turns import CUT, TOO_LONG, TokeniseTurns
from lightbulb.data_prep.work import Work, display
from lightbulb.data_prep.write import CLUSTERS_NAME, Pack, Write
from lightbulb.folder import FolderError, check_writable, claim, explained, sync_folder

CLUSTER_FOLDER = "clusters"
"""Of the models that give new text its cluster, and of the clusters' picture."""


class Result(NamedTuple):
    """The corpus's manifest, and whether it was there already."""

    manifest: dict[str, Any]
    is_up_to_date: bool


def preprocess(config: CorpusConfig) -> Result:
    """Build the corpus, unless the same settings and inputs gave the one that is there.

    Raises:
        CorpusError: nothing usable in a source, or too little text.
        TokenizerError: the tokenizer cannot be read or trained.
        FolderError: the output cannot be written, is in use, or is someone else's.
        ExecutorError: a task failed in another process.
    """
    output = config.output.expanduser()
    inputs = inputs_of(config.sources)
    everything = _digest(config, inputs)
    if found := _up_to_date(output, config, everything):
        return Result(found, True)
    _refuse_foreign(output)
    folder = output.with_name(output.name + ".work")
    with claim(folder):
        # The texts once more, their tokens, and rows of tokens with document numbers.
        check_writable(folder, 3 * sum(item.file.bytes for item in inputs))
        with display() as progress:
            manifest = _Build(config, inputs, folder, progress).run(everything)
        _publish(folder, output)
        if not config.keep_work:
            shutil.rmtree(folder, ignore_errors=True)
    return Result(manifest, False)


@dataclass
class _Drops:
    """Steps that dropped documents, each with its reason, and what each made of the sources' counts."""

    documents: Documents
    named: list[tuple[str, Output]]

    def add(self, reason: str, output: Output, counts: list[Counts]) -> None:
        """Count what a step dropped under its reason."""
        numbers = dropped(output)
        sources = self.documents.index["source"][numbers]
        for source in set(sources.tolist()):
            of_source = numbers[sources == source]
            (first,) = self.documents.find([int(of_source[0])])
            counts[source].dropped[reason] += len(of_source)
            counts[source].first_dropped[reason] = first.path
            counts[source].examples[reason] = self._examples(output, of_source)
            size = int(self.documents.index["bytes"][of_source].astype(int).sum())
            counts[source].documents -= len(of_source)
            counts[source].bytes -= size
        self.named.append((reason, output))

    def _examples(self, output: Output, numbers: np.ndarray) -> list[dict[str, Any]]:
        """Some of a source's documents that a step dropped: the first with those that stay for them, or those that
        share most with evaluation texts."""
        more: list[dict[str, Any]]
        if (shares := _beside(output, SHARES_NAME, numbers)) is not None:
            most = np.argsort(-shares, kind="stable")[:EXAMPLES]
            numbers, more = numbers[most], [{"share": share} for share in shares[most].tolist()]
        else:
            numbers = numbers[:EXAMPLES]
            stay = _beside(output, KEPT_NAME, numbers)
            assert stay is not None, "a step that drops documents says why"
            more = [{"kept": document.path} for document in self.documents.find(stay.tolist())]
        paths = [document.path for document in self.documents.find(numbers.tolist())]
        return [{"path": path} | about for path, about in zip(paths, more, strict=True)]

    @property
    def outputs(self) -> list[Output]:
        """The steps."""
        return [output for _, output in self.named]


class _Related(NamedTuple):
    """The steps that relate documents to each other, as far as they are wanted."""

    embedder: Output | None
    clusters: Output | None
    order: Output | None


class _Build:
    """The chain of steps."""

    def __init__(self, config: CorpusConfig, inputs: tuple[Input, ...], folder: Path, progress: Progress):
        self.config = config
        self.inputs = inputs
        self.work = Work(folder, config.executor, progress)
        self.corpus = folder / "corpus"

    def run(self, everything: str) -> dict[str, Any]:
        """Build the corpus; ``everything`` is the hash of all that is read."""
        config, work = self.config, self.work
        read = work.run(self.reading())
        counts = source_counts(read, config.sources)
        documents = Documents(read)
        drops = self.drop(documents, counts)
        split = work.run(Split(documents, tuple(drops.outputs), config.held_out_fraction))
        tokenizer = work.run(MakeTokenizer(config.tokenizer, documents, split))
        tokens = work.run(self.tokenising(documents, split, tokenizer))
        conversations = tuple(number for number, way in enumerate(config.too_long) if way is not None)
        if conversations:
            drops.add(TOO_LONG, tokens, counts)
            for report in tokens.reports:
                for source, number in report["cut"].items():
                    counts[int(source)].repaired[CUT] += number
        related = self.relate(documents, split)
        clusters, order = related.clusters, related.order
        length, seed = config.context_length, config.seed
        packed = work.run(Pack(documents, split, tokens, clusters, order, config.pack, length, seed, conversations))
        self.check_not_empty(packed)
        self.lineage = work.run(Lineage(documents, split, tuple(drops.named), clusters, tokens, packed))
        eos_id = tokenizer.reports[0]["eos_id"]
        shards = work.run(Write(packed, tokens, length, config.shard_bytes, eos_id))
        work.remove_unused()
        return self.assemble(everything, counts, tokenizer, related, packed, shards)

    def reading(self) -> Read:
        """The first step: of texts, or of token ids."""
        config = self.config
        given = (config.sources, config.clean, self.inputs, config.task_bytes)
        return ReadTokens(*given, config.tokenizer) if config.is_tokenised else Read(*given)

    def tokenising(self, documents: Documents, split: Output, tokenizer: Output) -> Step:
        """The step that writes the ids of every document: of texts, of conversations, or as they were read."""
        config = self.config
        if config.is_tokenised:
            return TakeTokens(documents, split)
        given = (documents, split, tokenizer, config.tokenizer.eos)
        if any(config.too_long):
            return TokeniseTurns(*given, config.too_long, config.context_length + 1)
        return Tokenise(*given)

    def drop(self, documents: Documents, counts: list[Counts]) -> _Drops:
        """Everything that drops whole documents, before they are divided."""
        drops = _Drops(documents, [])
        wanted = self.config.deduplicate
        if wanted is not None and wanted.exact:
            drops.add("duplicate", self.work.run(ExactDuplicates(documents)), counts)
        if wanted is not None and wanted.near is not None:
            signed = self.work.run(Signatures(documents, kept(documents, drops.outputs), wanted.near.ngram))
            drops.add("near_duplicate", self.work.run(NearDuplicates(signed, wanted.near)), counts)
        if (against := self.config.decontaminate) is not None:
            inputs = inputs_of(against.sources)
            read = self.work.run(Read(against.sources, self.config.clean, inputs, self.config.task_bytes))
            found = self.work.run(
                Contaminated(documents, kept(documents, drops.outputs), Documents(read), against),
            )
            drops.add("contaminated", found, counts)
        return drops

    def relate(self, documents: Documents, split: Output) -> "_Related":
        """Vectors, clusters and order of the documents, as far as they are wanted."""
        config, work = self.config, self.work
        if config.embed is None:
            return _Related(None, None, None)
        embedder = work.run(FitEmbedder(documents, split, config.embed, config.seed))
        vectors = work.run(Embed(documents, split, embedder))
        clusters = order = None
        if config.cluster is not None:
            fit = config.embed.fit_documents
            clusters = work.run(Cluster(documents, split, embedder, vectors, config.cluster, fit, config.seed))
        if config.order.method == "in_context":
            order = work.run(Order(documents, split, vectors, clusters, config.order, config.seed))
        return _Related(embedder, clusters, order)

    def check_not_empty(self, packed: Output) -> None:
        """There is a row to train on."""
        train = [group for group in packed.reports[0]["groups"] if group["split"] == TRAIN]
        if not any(group["rows"] for group in train):
            raise CorpusError(
                f"sources: {sum(group['tokens'] for group in train)} training tokens do not fill one row of "
                f"{self.config.context_length + 1}; add documents or lower context_length"
            )

    def assemble(
        self,
        everything: str,
        counts: list[Counts],
        tokenizer: Output,
        related: _Related,
        packed: Output,
        shards: Output,
    ) -> dict[str, Any]:
        """Everything that was written under its final name, the manifest last."""
        shutil.rmtree(self.corpus, ignore_errors=True)
        self.corpus.mkdir()
        _link([tokenizer.folders[0] / TOKENIZER_NAME], self.corpus)
        _link_tree(self.lineage.folders[0], self.corpus / LINEAGE_FOLDER)
        splits: dict[str, dict[str, Any]] = {split: {} for split in SPLITS}
        for group in packed.reports[0]["groups"]:
            if group["rows"]:
                folder, number = self.corpus / group["split"] / group["name"], f"{group['number']:05}"
                entries: list[dict[str, Any]] = []
                for path, report in zip(shards.folders, shards.reports, strict=True):
                    task = report["shards"].get(number, [])
                    _link([path / number / entry["raw_data"]["basename"] for entry in task], folder)
                    entries += task
                write_index(folder, entries)
                splits[group["split"]][group["name"]] = group_entry(folder, group, entries)
        content = {
            "tokenizer": {"file": TOKENIZER_NAME, **tokenizer.reports[0]},
            "sources": [source_entry(source, found) for source, found in zip(self.config.sources, counts, strict=True)],
            **self.describe_related(related),
            "splits": splits,
        }
        return write_manifest(self.corpus, self.config, everything, content)

    def describe_related(self, related: _Related) -> dict[str, Any]:
        """What the manifest says of clusters and order; the models that assign new text are put beside it."""
        content: dict[str, Any] = {}
        if related.clusters is not None and related.embedder is not None:
            folder = self.corpus / CLUSTER_FOLDER
            models = [related.embedder.folders[0], related.clusters.folders[0]]
            unwanted = {REPORT_NAME, CLUSTERS_NAME}
            _link([file for model in models for file in sorted(model.iterdir()) if file.name not in unwanted], folder)
            content["clusters"] = related.clusters.reports[0]["clusters"]
        if related.order is not None:
            total = sum(report["documents"] for report in related.order.reports)
            content["order"] = {
                name: round(sum(r[name] * r["documents"] for r in related.order.reports) / max(1, total), 4)
                for name in ("adjacent_similarity", "random_similarity")
            }
        return content


def _beside(output: Output, name: str, numbers: np.ndarray) -> np.ndarray | None:
    """What a step's file says of documents that it dropped; None where it has no such file."""
    if not all((folder / name).exists() for folder in output.folders):
        return None
    known, values = (np.concatenate([np.load(f / n) for f in output.folders]) for n in (DROPPED_NAME, name))
    order = np.argsort(known)
    return values[order[np.searchsorted(known[order], numbers)]]


def _link(files: Iterable[Path], folder: Path) -> None:
    """Finished files once more under another folder, without copying where the file system can."""
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for file in files:
            try:
                os.link(file, folder / file.name)
            except OSError:
                shutil.copyfile(file, folder / file.name)


def _digest(config: CorpusConfig, inputs: tuple[Input, ...]) -> str:
    """Hash of everything that is read: the sources' files, the tokenizer, evaluation texts, a model of sentences."""
    path = config.tokenizer.path
    tokenizer = Tokenizer.load(path.expanduser(), config.tokenizer.eos).digest if path is not None else None
    found: list[Any] = [inputs_digest(inputs), tokenizer]
    if config.decontaminate is not None:
        found.append(inputs_digest(inputs_of(config.decontaminate.sources)))
    if config.embed is not None and config.embed.path is not None:
        found.append(model_digest(config.embed.path))
    return digest(found)


def _link_tree(source: Path, folder: Path) -> None:
    """All files of a finished task but its report, under another folder."""
    for path in sorted(source.rglob("*")):
        if path.is_file() and path.name != REPORT_NAME:
            _link([path], folder / path.relative_to(source).parent)


def _up_to_date(output: Path, config: CorpusConfig, everything: str) -> dict[str, Any] | None:
    """The manifest of a corpus that the same settings and inputs gave, if all of it is there undamaged."""
    manifest = read_manifest(output)
    if manifest is None or manifest.get("inputs_digest") != everything:
        return None
    if manifest.get("config_hash") != config_hash(config):
        return None
    try:
        return None if any(damaged_files(output, manifest)) else manifest
    except KeyError:
        return None


def _refuse_foreign(output: Path) -> None:
    """An output folder is replaced only when it holds a corpus."""
    if output.is_dir() and any(output.iterdir()) and not (output / MANIFEST_NAME).exists():
        raise FolderError(f"{output}: not empty and not a corpus; choose another output or move this folder away")
    if output.exists() and not output.is_dir():
        raise FolderError(f"{output}: a file stands where the corpus goes; choose another output or move it away")


def _publish(folder: Path, output: Path) -> None:
    """Put the finished corpus in place of an older one."""
    replaced = folder / "replaced"
    with explained(output):
        shutil.rmtree(replaced, ignore_errors=True)
        if output.exists():
            output.rename(replaced)
        (folder / "corpus").rename(output)
        sync_folder(output.parent)
        shutil.rmtree(replaced, ignore_errors=True)
