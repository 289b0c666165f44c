"""What `lightbulb preprocess` reads: sources, split, tokenizer and output of one corpus."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from lightbulb.config import Config, Registered
from lightbulb.registry import register

Domain = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$")]
"""A domain's name is the name of its folder."""


class SourceConfig(Config):
    """Base of every source."""

    type: str

    domain: Domain
    """Folder its rows are written under; sources of one domain share it."""


class FileSourceConfig(SourceConfig):
    """Base of sources that read one file or every matching file below a folder."""

    path: Path

    suffixes: tuple[str, ...]
    """Endings of the file names that are read from a folder; a path to a file is read whatever its name."""


@register("source", "python_stdlib")
class PythonStdlibConfig(SourceConfig):
    """The Python standard library's own sources, without tests."""

    type: Literal["python_stdlib"]
    domain: Domain = "python"


@register("source", "pydoc")
class PydocConfig(SourceConfig):
    """The language reference that `help()` shows, one document per topic."""

    type: Literal["pydoc"]
    domain: Domain = "pydoc"


@register("source", "text")
class TextConfig(FileSourceConfig):
    """Text files in UTF-8, one document each unless a delimiter is given."""

    type: Literal["text"]
    domain: Domain = "text"
    suffixes: tuple[str, ...] = (".txt", ".md", ".rst", ".py")

    delimiter: str | None = None
    """A line equal to this ends a document; an empty string means a blank line."""


@register("source", "jsonl")
class JsonlConfig(FileSourceConfig):
    """One JSON object per line; .gz and .zst are unpacked while reading."""

    type: Literal["jsonl"]
    domain: Domain = "jsonl"
    suffixes: tuple[str, ...] = (".jsonl", ".jsonl.gz", ".jsonl.zst")

    text_field: str = "text"


@register("source", "parquet")
class ParquetConfig(FileSourceConfig):
    """Parquet files with one document per row."""

    type: Literal["parquet"]
    domain: Domain = "parquet"
    suffixes: tuple[str, ...] = (".parquet",)

    text_field: str = "text"


class TokenizerConfig(Config):
    """Which tokenizer the corpus is written with."""

    path: Path | None = None
    """A tokenizer.json to use; without one a byte-level BPE is trained on the training split."""

    vocab_size: Annotated[int, Field(ge=257, le=1 << 20)] = 8192
    """Entries of a trained tokenizer, the 256 bytes and the end of text among them."""

    train_bytes: Annotated[int, Field(ge=1)] = 1 << 30
    """Training stops reading text after this many characters."""

    eos: str | None = None
    """Token that ends a document, for a loaded tokenizer whose name for it is unusual."""


class CorpusConfig(Config):
    """One corpus: read, split, tokenised, packed and written as MDS shards with a manifest."""

    output: Path

    seed: Annotated[int, Field(ge=0)] = 0
    """Order of the training documents."""

    context_length: Annotated[int, Field(ge=2, le=1 << 24)] = 512
    """Tokens a model sees at once; rows hold one more, for the label of the last."""

    held_out_fraction: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.05
    """Share of the documents kept out of training, chosen by a hash of each document's relative path."""

    sources: Annotated[tuple[Annotated[SourceConfig, Registered("source")], ...], Field(min_length=1)]

    tokenizer: TokenizerConfig = TokenizerConfig()

    shard_bytes: Annotated[int, Field(ge=1 << 12, lt=1 << 32)] = 1 << 24
    """Size at which a shard is closed and the next one begun."""

    workers: Annotated[int, Field(ge=1)] | None = None
    """Threads of the tokenizer; None takes every core. The output does not depend on it."""

    @model_validator(mode="after")
    def _output_is_a_folder_of_its_own(self) -> "CorpusConfig":
        if self.output.name in ("", ".."):
            raise ValueError(f"output: {str(self.output)!r} is not a folder name; write for example data/my_corpus")
        return self
