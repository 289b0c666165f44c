"""What `lightbulb preprocess` reads and does: one corpus from its sources to its shards."""

import os
import string
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from lightbulb.config import Config, Registered
from lightbulb.data_prep.conversation import ConversationConfig
from lightbulb.registry import register

Domain = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$")]
"""A domain's name is the name of its folder."""

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


class SourceConfig(Config):
    """Base of every source."""

    type: str

    domain: Domain
    """Folder its rows are written under; sources of one domain share it."""


class FileSourceConfig(SourceConfig):
    """Base of sources that read one file or every matching file below a folder."""

    path: str
    """A file or folder: a path here, or a URL that fsspec knows (s3://, hf://, file://)."""

    suffixes: tuple[str, ...]
    """Endings of the file names that are read from a folder; a path to a file is read whatever its name."""

    domain_folder: Annotated[int, Field(ge=1)] | None = None
    """Take the domain from a folder of each file's path below `path`: 1 is the outermost."""


class RecordSourceConfig(FileSourceConfig):
    """Base of sources whose files hold records with named fields."""

    text_field: str = "text"
    """Field with the text; `a.b` is field b of field a."""

    template: str | None = None
    """Text made of several fields, for example "{question}\\n{answer}"; in place of text_field."""

    conversation: ConversationConfig | None = None
    """Prompts and answers, or lists of messages, of which only the answers are learned; in place of text_field."""

    join: str = ", "
    """Stands between the items of a field of the template that is a list."""

    id_field: str | None = None
    """Field that names a document in messages and decides whether it is held out; its place in the file otherwise."""

    domain_field: str | None = None
    """Field whose value, in lower case, is the document's domain."""

    @model_validator(mode="after")
    def _template_has_plain_fields(self) -> "RecordSourceConfig":
        if self.template is not None and not self.text_fields:
            raise ValueError(f'template: {self.template!r} names no field; write for example "{{question}}"')
        return self

    @model_validator(mode="after")
    def _conversation_stands_alone(self) -> "RecordSourceConfig":
        if self.conversation is not None and (self.template is not None or self.text_field != "text"):
            raise ValueError("conversation: takes the place of text_field and template; leave these out")
        return self

    @property
    def text_fields(self) -> list[str]:
        """The fields that the text is made of."""
        if self.conversation is not None:
            return self.conversation.fields
        if self.template is None:
            return [self.text_field]
        try:
            return [name for _, name, _, _ in string.Formatter().parse(self.template) if name]
        except ValueError as error:
            raise ValueError(f"template: {self.template!r}: {error}; write {{{{ for a brace") from None

    @property
    def columns(self) -> list[str]:
        """The outermost names of all fields that are read."""
        fields = [*self.text_fields, *filter(None, (self.id_field, self.domain_field))]
        return sorted({field.partition(".")[0] for field in fields})


@register("source", "python_stdlib")
class PythonStdlibConfig(SourceConfig):
    """The Python standard library's own sources."""

    type: Literal["python_stdlib"]
    domain: Domain = "python"

    tests: bool = False
    """Its tests too; they are long, repetitive and full of deliberately broken text."""


@register("source", "pydoc")
class PydocConfig(SourceConfig):
    """The language reference that `help()` shows, one document per topic."""

    type: Literal["pydoc"]
    domain: Domain = "pydoc"


@register("source", "text")
class TextConfig(FileSourceConfig):
    """Text files, source trees among them, one document per file unless a delimiter is given; .gz and .zst too."""

    type: Literal["text"]
    domain: Domain = "text"
    suffixes: tuple[str, ...] = (".txt", ".md", ".rst", ".py")

    delimiter: str | None = None
    """A line equal to this ends a document; an empty string means a blank line."""


@register("source", "jsonl")
class JsonlConfig(RecordSourceConfig):
    """One JSON object per line; .gz and .zst are unpacked while reading."""

    type: Literal["jsonl"]
    domain: Domain = "jsonl"
    suffixes: tuple[str, ...] = (".jsonl", ".jsonl.gz", ".jsonl.zst")


@register("source", "json")
class JsonConfig(RecordSourceConfig):
    """Files of one JSON object, or one list of objects, each."""

    type: Literal["json"]
    domain: Domain = "json"
    suffixes: tuple[str, ...] = (".json",)


@register("source", "csv")
class CsvConfig(RecordSourceConfig):
    """Tables with a line of column names; .gz and .zst are unpacked while reading."""

    type: Literal["csv"]
    domain: Domain = "csv"
    suffixes: tuple[str, ...] = (".csv", ".csv.gz", ".csv.zst", ".tsv", ".tsv.gz", ".tsv.zst")

    separator: Annotated[str, Field(min_length=1, max_length=1)] | None = None
    """Between the columns; a tab for .tsv and a comma otherwise."""


@register("source", "parquet")
class ParquetConfig(RecordSourceConfig):
    """Parquet files with one document per row."""

    type: Literal["parquet"]
    domain: Domain = "parquet"
    suffixes: tuple[str, ...] = (".parquet",)


@register("source", "arrow")
class ArrowConfig(RecordSourceConfig):
    """A folder that Hugging Face `datasets` saved to disk: Arrow files with one document per row."""

    type: Literal["arrow"]
    domain: Domain = "arrow"
    suffixes: tuple[str, ...] = (".arrow",)


class TokenSourceConfig(FileSourceConfig):
    """Base of sources that are ids of the tokenizer that `tokenizer.path` names; nothing that needs text is done."""

    domain_folder: None = None


@register("source", "megatron")
class MegatronConfig(TokenSourceConfig):
    """A folder of Megatron's indexed datasets, NAME.idx and NAME.bin."""

    type: Literal["megatron"]
    domain: Domain = "megatron"
    suffixes: tuple[str, ...] = (".idx", ".bin")


@register("source", "mds")
class MdsConfig(TokenSourceConfig):
    """A folder of uncompressed MDS shards with token ids, as llm-foundry and others write them."""

    type: Literal["mds"]
    domain: Domain = "mds"
    suffixes: tuple[str, ...] = ("index.json", ".mds")

    column: str = "tokens"
    """Column with the ids, an `ndarray` or `bytes`."""

    dtype: Literal["uint16", "int32", "uint32", "int64"] = "int64"
    """Of the ids in a column of bytes."""

    stream: bool = True
    """The samples are pieces of one stream of documents, each with its end of text; else each is a document."""


class RepetitionConfig(Config):
    """Shares above which a document repeats itself too much (Gopher, Rae et al. 2021, arXiv:2112.11446, table A1)."""

    duplicate_lines: Fraction = 0.30
    """Lines that stood before, of all lines."""

    duplicate_line_characters: Fraction = 0.20
    duplicate_paragraphs: Fraction = 0.30
    duplicate_paragraph_characters: Fraction = 0.20

    top_ngrams: dict[int, Fraction] = {2: 0.20, 3: 0.18, 4: 0.16}
    """Characters in the most frequent n-gram of words."""

    duplicate_ngrams: dict[int, Fraction] = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}
    """Characters in n-grams of words that stood before."""


class CleanConfig(Config):
    """What is repaired in a document, and which documents are dropped; both are counted."""

    encoding: Literal["drop", "repair"] = "drop"
    """Bytes that are not UTF-8: drop the document, or read UTF-16 with a byte-order mark and replace what is left."""

    controls: Literal["keep", "strip"] = "keep"
    """Control characters but tab, line and page breaks. A document with NUL is dropped unless they are stripped."""

    min_chars: Annotated[int, Field(ge=1)] = 1
    max_chars: Annotated[int, Field(ge=1)] | None = None

    repetition: RepetitionConfig | None = None
    """Drop documents that repeat themselves; `{}` takes Gopher's limits."""

    min_stop_words: Annotated[int, Field(ge=0, le=8)] = 0
    """Drop documents without so many of Gopher's eight English stop words (2 there)."""


class NearConfig(Config):
    """Near-duplicates by MinHash (Broder 1997): documents whose sets of word n-grams overlap."""

    ngram: Annotated[int, Field(ge=1, le=64)] = 5
    """Words per n-gram."""

    threshold: Annotated[float, Field(ge=0.3, lt=1.0)] = 0.8
    """Jaccard similarity from which documents are the same, as 128 permutations estimate it."""


class DeduplicateConfig(Config):
    """Which documents are the same; the first of them in the order of the sources stays."""

    exact: bool = True
    """Those whose texts are equal."""

    near: NearConfig | None = None
    """Those whose texts nearly are; `{}` takes the defaults."""


class DecontaminateConfig(Config):
    """Drop training documents that share n-grams of words with evaluation texts."""

    sources: Annotated[tuple[Annotated[SourceConfig, Registered("source")], ...], Field(min_length=1)]
    """The evaluation texts."""

    ngram: Annotated[int, Field(ge=1, le=64)] = 13
    """Words per n-gram."""

    max_overlap: Fraction = 0.0
    """Share of a document's n-grams that may stand in evaluation texts."""


class TokenizerConfig(Config):
    """Which tokenizer the corpus is written with."""

    path: Path | None = None
    """A tokenizer.json to use; without one a tokenizer is trained on the training split."""

    method: Literal["bpe", "unigram"] = "bpe"
    """What is trained: byte-level BPE, or a byte-level Unigram model (Kudo 2018, arXiv:1804.10959)."""

    vocab_size: Annotated[int, Field(ge=257, le=1 << 20)] = 8192
    """Entries of a trained tokenizer, the 256 bytes and the end of text among them."""

    train_bytes: Annotated[int, Field(ge=1)] = 1 << 30
    """Training stops reading text after this many bytes."""

    eos: str | None = None
    """Token that ends a document, for a loaded tokenizer whose name for it is unusual."""


class EmbedConfig(Config):
    """A vector for every document: TF-IDF and a truncated SVD, or a sentence-transformer."""

    method: Literal["tfidf", "sentence_transformer"] = "tfidf"
    path: Path | None = None
    """Folder of the sentence-transformer."""

    dimensions: Annotated[int, Field(ge=2, le=4096)] = 100
    """Of the truncated SVD."""

    max_features: Annotated[int, Field(ge=2)] = 1 << 16
    """Terms that TF-IDF counts."""

    fit_documents: Annotated[int, Field(ge=2)] = 100_000
    """Training documents that TF-IDF, SVD and the centres of clusters are fitted on, drawn by the corpus's seed."""

    @model_validator(mode="after")
    def _path_goes_with_its_method(self) -> "EmbedConfig":
        if (self.method == "sentence_transformer") != (self.path is not None):
            raise ValueError("path: method sentence_transformer needs the path of one, and tfidf takes none")
        return self


class ClusterConfig(Config):
    """Balanced spherical k-means over the documents' vectors (c-BTM, Gururangan et al. 2023, arXiv:2303.14177)."""

    num_clusters: Annotated[int, Field(ge=1, le=4096)]
    capacity_factor: Annotated[float, Field(ge=1.0)] | None = 1.1
    """Most training documents of a cluster, as a multiple of the mean; null for any number."""


class OrderConfig(Config):
    """Order of the training documents: random, or in-context (Shi et al. 2023, arXiv:2310.10638)."""

    method: Literal["random", "in_context"] = "random"
    neighbours: Annotated[int, Field(ge=0)] = 10
    """Neighbours of a document in the similarity graph."""


class PackConfig(Config):
    """How documents become contexts."""

    method: Literal["concatenate", "best_fit", "ordered"] = "concatenate"
    """`concatenate` cuts the documents' stream; `best_fit` cuts no document that fits into a context (Ding et al.
    2024, arXiv:2404.10830); `ordered` cuts the stream of the given order and shuffles the contexts afterwards. Groups
    with conversations are always packed by best fit, held-out ones too."""


class ExecutorConfig(Config):
    """Where tasks run, through datatrove's executors."""

    type: Literal["local", "slurm", "ray"] = "local"

    workers: Annotated[int, Field(ge=1)] | None = None
    """Tasks at once, and threads of a task that runs alone; None takes every core, and all tasks on Slurm and Ray."""

    options: dict[str, Any] = {}
    """Further arguments of datatrove's SlurmPipelineExecutor (partition, time, ...) or RayPipelineExecutor."""

    @model_validator(mode="after")
    def _local_has_no_options(self) -> "ExecutorConfig":
        if self.type == "local" and self.options:
            raise ValueError("options: type local has none; set workers, or type slurm or ray")
        return self

    @property
    def num_workers(self) -> int:
        """Processes or threads on this machine."""
        return self.workers or os.cpu_count() or 1


class CorpusConfig(Config):
    """One corpus: read, cleaned, divided, tokenised, packed and written as MDS shards with a manifest."""

    output: Path

    seed: Annotated[int, Field(ge=0)] = 0
    """Order of the training documents and contexts."""

    context_length: Annotated[int, Field(ge=2, le=1 << 24)] = 512
    """Tokens a model sees at once; rows hold one more, for the label of the last."""

    held_out_fraction: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.05
    """Share of the documents kept out of training, chosen by a hash of each document's relative path."""

    sources: Annotated[tuple[Annotated[SourceConfig, Registered("source")], ...], Field(min_length=1)]

    clean: CleanConfig = CleanConfig()
    deduplicate: DeduplicateConfig | None = None
    decontaminate: DecontaminateConfig | None = None
    tokenizer: TokenizerConfig = TokenizerConfig()
    embed: EmbedConfig | None = None
    cluster: ClusterConfig | None = None
    order: OrderConfig = OrderConfig()
    pack: PackConfig = PackConfig()

    shard_bytes: Annotated[int, Field(ge=1 << 12, lt=1 << 32)] = 1 << 24
    """Size at which a shard is closed and the next one begun."""

    task_bytes: Annotated[int, Field(ge=1)] = 1 << 26
    """Input that one task reads, in whole files. The output does not depend on it."""

    executor: ExecutorConfig = ExecutorConfig()

    keep_work: bool = False
    """Keep the work folder of a finished corpus, so that a run with other settings redoes only what they change."""

    @model_validator(mode="after")
    def _output_is_a_folder_of_its_own(self) -> "CorpusConfig":
        if self.output.name in ("", ".."):
            raise ValueError(f"output: {str(self.output)!r} is not a folder name; write for example data/my_corpus")
        return self

    @model_validator(mode="after")
    def _steps_have_what_they_need(self) -> "CorpusConfig":
        if self.cluster is not None and self.embed is None:
            raise ValueError("cluster: needs the documents' vectors; add embed: {}")
        if self.order.method == "in_context" and self.embed is None:
            raise ValueError("order: method in_context needs the documents' vectors; add embed: {}")
        if self.order.method == "in_context" and self.pack.method == "concatenate":
            raise ValueError("pack: method concatenate shuffles documents; order in_context needs pack.method=ordered")
        return self

    @model_validator(mode="after")
    def _ids_need_no_text(self) -> "CorpusConfig":
        if not self.is_tokenised:
            return self
        if not all(isinstance(source, TokenSourceConfig) for source in self.sources):
            raise ValueError(
                "sources: text and token ids in one corpus; write two, and give both to one tokenizer.path"
            )
        if self.tokenizer.path is None:
            raise ValueError("tokenizer.path: sources of token ids need the tokenizer.json they were made with")
        texts = {"deduplicate": self.deduplicate, "decontaminate": self.decontaminate, "embed": self.embed}
        needing = [name for name, value in texts.items() if value is not None]
        needing += ["clean"] if self.clean != CleanConfig() else []
        if needing:
            raise ValueError(f"{needing[0]}: works on text, and the sources are token ids; leave it out")
        return self

    @property
    def too_long(self) -> tuple[str | None, ...]:
        """For each source what happens to conversations longer than a row; None where it holds documents."""
        conversations = [getattr(source, "conversation", None) for source in self.sources]
        return tuple(None if found is None else found.too_long for found in conversations)

    @property
    def is_tokenised(self) -> bool:
        """Whether the sources are token ids."""
        return any(isinstance(source, TokenSourceConfig) for source in self.sources)

    def settings(self) -> dict[str, Any]:
        """Everything that can change the output."""
        return self.model_dump(mode="json", exclude={"output", "executor", "task_bytes", "keep_work"})
