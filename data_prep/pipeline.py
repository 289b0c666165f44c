"""A corpus from start to end: read, divide, train a tokenizer, tokenise, pack, write.

Everything is built in ``<output>.partial`` and renamed when it is complete, so that ``<output>`` is a whole corpus
or absent. A run that was killed leaves its partial folder behind, and the next one starts over in it.
"""

import hashlib
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from lightbulb.data.tokenizer import Tokenizer
from lightbulb.data_prep.config import CorpusConfig
from lightbulb.data_prep.manifest import (
    MANIFEST_NAME,
    TOKENIZER_NAME,
    config_hash,
    domain_entry,
    is_intact,
    read_manifest,
    source_entry,
    write_manifest,
)
from lightbulb.data_prep.read import CorpusError, Counts, read_source, source_digest
from lightbulb.data_prep.split import HELD_OUT, SPLITS, TRAIN, Spool
from lightbulb.data_prep.tokenise import TokenFile, num_rows, token_dtype, tokenise
from lightbulb.data_prep.writer import Job, ShardWriter
from lightbulb.folder import LOCK_NAME, FolderError, check_writable, claim, explained, sync_folder


class Result(NamedTuple):
    """The corpus's manifest, and whether it was there already."""

    manifest: dict[str, Any]
    is_up_to_date: bool


def preprocess(config: CorpusConfig, writer: ShardWriter) -> Result:
    """Build the corpus, unless the same settings and inputs gave the one that is there.

    Raises:
        CorpusError: nothing usable in a source, or too little text.
        TokenizerError: the tokenizer cannot be read or trained.
        FolderError: the output cannot be written, is in use, or is someone else's.
        WriterError: the writing process died.
    """
    if config.workers is not None:
        # Read by the tokenizers library when it starts its threads, at the first text it encodes.
        os.environ["RAYON_NUM_THREADS"] = str(config.workers)
    output = config.output.expanduser()
    digest, input_bytes = _inputs(config)
    if found := _up_to_date(output, config, digest):
        return Result(found, True)
    _refuse_foreign(output)
    partial = output.with_name(output.name + ".partial")
    with claim(partial):
        try:
            _clear(partial)
            # The texts once more, their tokens, and rows of tokens with document numbers.
            check_writable(partial, 3 * input_bytes)
            writer.start()
            with _progress() as progress:
                manifest = _Build(config, partial, writer, progress).run(digest)
            _publish(partial, output)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return Result(manifest, False)


@dataclass(frozen=True)
class _Group:
    """One domain of one split."""

    split: str
    domain: str
    tokens: TokenFile
    num_bytes: int

    @property
    def is_padded(self) -> bool:
        """Held-out streams are evaluated to their last token; training streams drop a partial last row."""
        return self.split == HELD_OUT


class _Build:
    """The steps, each with a line of the display."""

    def __init__(self, config: CorpusConfig, partial: Path, writer: ShardWriter, progress: Progress):
        self.config = config
        self.writer = writer
        self.progress = progress
        self.domains = sorted({source.domain for source in config.sources})
        self.spool_folder = partial / "spool"
        self.corpus = partial / "corpus"
        self.spool_folder.mkdir()
        self.corpus.mkdir()

    def run(self, digest: str) -> dict[str, Any]:
        with Spool(self.spool_folder / "texts") as spool:
            sources = self.read(spool)
        held_out = spool.held_out(self.config.held_out_fraction, self.domains)
        tokenizer = self.tokenizer(spool, ~held_out)
        tokenizer.save(self.corpus / TOKENIZER_NAME)
        splits: dict[str, dict[str, dict[str, Any]]] = {split: {} for split in SPLITS}
        groups = self.tokenise(spool, held_out, tokenizer)
        total = sum(num_rows(g.tokens.num_tokens, self.config.context_length, g.is_padded) for g in groups)
        advance = self.step("Writing rows", total)
        for number, group in enumerate(groups):
            if entry := self.write(group, number, tokenizer.eos_id, advance):
                splits[group.split][group.domain] = entry
        self.check_not_empty(groups, splits[TRAIN])
        return write_manifest(self.corpus, self.config, digest, tokenizer, sources, splits)

    def step(self, name: str, total: int | None) -> Callable[[int], None]:
        """Begin a line of the display; the function it gives moves the line's bar."""
        task = self.progress.add_task(name, total=total)
        return lambda amount: self.progress.advance(task, amount)

    def read(self, spool: Spool) -> list[dict[str, Any]]:
        entries = []
        advance = self.step("Reading documents", None)
        for source in self.config.sources:
            counts = Counts()
            for document in read_source(source, counts):
                spool.add(self.domains.index(source.domain), document)
                advance(1)
            entries.append(source_entry(source, counts))
        self.progress.update(self.progress.task_ids[-1], total=len(spool))
        return entries

    def tokenizer(self, spool: Spool, train: np.ndarray) -> Tokenizer:
        wanted = self.config.tokenizer
        if wanted.path is not None:
            return Tokenizer.load(wanted.path.expanduser(), wanted.eos)
        is_first = np.cumsum(train) == 1
        chosen = train & (is_first | (np.cumsum(spool.sizes() * train) <= wanted.train_bytes))
        advance = self.step("Training tokenizer", int(chosen.sum()))
        return Tokenizer.train(spool.texts(chosen), wanted.vocab_size, lambda _: advance(1))

    def tokenise(self, spool: Spool, held_out: np.ndarray, tokenizer: Tokenizer) -> list[_Group]:
        """Every domain of the training split, then every domain of the held-out split."""
        group_of = spool.domains() + held_out * len(self.domains)
        sizes = np.bincount(group_of, weights=spool.sizes(), minlength=2 * len(self.domains)).astype(int)
        dtype = token_dtype(tokenizer.vocab_size)
        groups = []
        for number, (split, domain) in enumerate(product(SPLITS, self.domains)):
            tokens = TokenFile(self.spool_folder, str(number), dtype)
            groups.append(_Group(split, domain, tokens, int(sizes[number])))
        tokenise(spool, tokenizer, group_of, [g.tokens for g in groups], self.step("Tokenising documents", len(spool)))
        return groups

    def write(self, group: _Group, number: int, eos_id: int, advance: Callable[[int], None]) -> dict[str, Any] | None:
        """Write one group's shards and describe them; None where there is not one row."""
        length = self.config.context_length
        tokens = group.tokens
        if num_rows(tokens.num_tokens, length, group.is_padded) == 0:
            return None
        folder = self.corpus / group.split / group.domain
        job = Job(
            folder=str(folder),
            tokens=str(tokens.tokens),
            lengths=str(tokens.lengths),
            dtype=tokens.dtype,
            context_length=length,
            shard_bytes=self.config.shard_bytes,
            shuffle_seed=None if group.is_padded else (self.config.seed, number),
            pad_with=eos_id if group.is_padded else None,
        )
        rows = self.writer.write(job, advance)
        unused = max(0, tokens.num_tokens - 1 - rows * length)
        return domain_entry(folder, tokens.num_documents, group.num_bytes, tokens.num_tokens, rows, unused)

    def check_not_empty(self, groups: list[_Group], train: dict[str, Any]) -> None:
        if not train:
            num_tokens = sum(group.tokens.num_tokens for group in groups if group.split == TRAIN)
            raise CorpusError(
                f"sources: {num_tokens} training tokens do not fill one row of {self.config.context_length + 1}; "
                "add documents or lower context_length"
            )


def _inputs(config: CorpusConfig) -> tuple[str, int]:
    """Hash of everything that is read, and the bytes of the sources."""
    inputs = [source_digest(source) for source in config.sources]
    digests = [digest for digest, _ in inputs]
    if config.tokenizer.path is not None:
        digests.append(Tokenizer.load(config.tokenizer.path.expanduser(), config.tokenizer.eos).digest)
    return hashlib.sha256("\n".join(digests).encode()).hexdigest(), sum(size for _, size in inputs)


def _up_to_date(output: Path, config: CorpusConfig, digest: str) -> dict[str, Any] | None:
    """The manifest of a corpus that the same settings and inputs gave, if all of it is there undamaged."""
    manifest = read_manifest(output)
    if manifest is None or manifest.get("inputs_digest") != digest:
        return None
    if manifest.get("config_hash") != config_hash(config):
        return None
    return manifest if is_intact(output, manifest) else None


def _refuse_foreign(output: Path) -> None:
    """An output folder is replaced only when it holds a corpus."""
    if output.is_dir() and any(output.iterdir()) and not (output / MANIFEST_NAME).exists():
        raise FolderError(f"{output}: not empty and not a corpus; choose another output or move this folder away")
    if output.exists() and not output.is_dir():
        raise FolderError(f"{output}: a file stands where the corpus goes; choose another output or move it away")


def _clear(partial: Path) -> None:
    """Remove what a killed run left; the lock is ours."""
    with explained(partial):
        for entry in partial.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry)
            elif entry.name != LOCK_NAME:
                entry.unlink()


def _publish(partial: Path, output: Path) -> None:
    """Put the finished corpus in place of an older one."""
    with explained(output):
        if output.exists():
            output.rename(partial / "replaced")
        (partial / "corpus").rename(output)
        sync_folder(output.parent)


def _progress() -> Progress:
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description:<22}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
