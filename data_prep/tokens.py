"""Sources that are token ids already: Megatron's indexed datasets and MDS folders of other tools.

They take the place of reading, cleaning and tokenising; splitting, packing, lineage and writing follow as for text. All
that an index says of sizes and offsets is checked before anything is read by it, and every id against the vocabulary.
MDS is read without mosaicml-streaming, whose readers believe an index and unpickle columns on request.
"""

import json
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash

from lightbulb.data.tokenizer import Tokenizer
from lightbulb.data_prep.config import MdsConfig, MegatronConfig, TokenizerConfig
from lightbulb.data_prep.counts import CorpusError, Counts
from lightbulb.data_prep.documents import INDEX_NAME, Document, Documents, DocumentWriter
from lightbulb.data_prep.files import check_unchanged
from lightbulb.data_prep.ingest import Input, Read
from lightbulb.data_prep.split import DROPPED, load_split
from lightbulb.data_prep.step import Step, Task
from lightbulb.data_prep.tokenise import LENGTHS_NAME, TOKENS_NAME, map_tokens, token_dtype

MAX_DOCUMENT_TOKENS = 1 << 24
MAGIC = b"MMIDIDX\0\0"
MEGATRON_TYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}  # 6 and 7 are floats
MDS_TYPES = {8: "uint8", 16: "uint16", 17: "int16", 32: "uint32", 33: "int32", 64: "uint64", 65: "int64"}
_BASENAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


class Tokens(NamedTuple):
    """A document's ids, without its end of text, and what names it in its source."""

    name: str
    ids: np.ndarray


@dataclass(frozen=True)
class ReadTokens(Read):
    """As :class:`Read` for sources of token ids; writes the ids of every document beside its (empty) text."""

    tokenizer: TokenizerConfig

    name = "read_tokens"
    title = "Reading kB of tokens"
    version = 2

    def settings(self) -> Any:
        return [super().settings(), self._load().digest, self.tokenizer.eos]

    def run_task(self, rank: int, task: Task) -> dict[str, Any]:
        tokenizer = self._load()
        dtype = token_dtype(tokenizer.vocab_size)
        counts: dict[int, Counts] = defaultdict(Counts)
        hashes, sizes, lengths = [], [], []
        text_bytes = np.asarray(tokenizer.token_bytes())
        with DocumentWriter(task.out) as writer, (task.out / TOKENS_NAME).open("wb") as file:
            for item in self.tasks[rank]:
                found = counts[item.source]
                for document in self._read(item, tokenizer.eos_id):
                    ids = _checked(item, document, tokenizer.vocab_size).astype(dtype)
                    if not len(ids):
                        found.drop("empty", document.name)
                        continue
                    writer.add(item.source, Document(document.name, "", self.sources[item.source].domain))
                    np.append(ids, tokenizer.eos_id).astype(dtype).tofile(file)
                    hashes.append(np.frombuffer(xxhash.xxh3_128_digest(ids.tobytes()), dtype="<u8"))
                    sizes.append(int(text_bytes[ids].sum()))
                    lengths.append(len(ids) + 1)
                    found.documents += 1
                    found.bytes += sizes[-1]
                check_unchanged(item.file)
                task.advance(item.file.bytes // 1000)
            domains = writer.domains
        index = np.load(task.out / INDEX_NAME)
        if len(index):
            index["content"], index["bytes"] = np.stack(hashes), sizes
        np.save(task.out / INDEX_NAME, index)
        np.save(task.out / LENGTHS_NAME, np.array(lengths, dtype=np.int64))
        return {
            "documents": len(lengths),
            "domains": domains,
            "dtype": dtype,
            "sources": {str(number): found.to_json() for number, found in counts.items()},
        }

    def _load(self) -> Tokenizer:
        assert self.tokenizer.path is not None
        return Tokenizer.load(self.tokenizer.path.expanduser(), self.tokenizer.eos)

    def _read(self, item: Input, eos_id: int) -> Iterator[Tokens]:
        """The documents of an index; files of ids are only hashed, and read through their index."""
        source, name = self.sources[item.source], item.file.name
        if not item.file.is_local:
            raise CorpusError(f"{item.file.path}: token ids are read from this machine's disks; copy the folder here")
        beside = {other.file.name: Path(other.file.path) for other in self.inputs if other.source == item.source}
        if isinstance(source, MegatronConfig) and name.endswith(".idx"):
            data = beside.get(name.removesuffix(".idx") + ".bin")
            if data is None:
                raise CorpusError(
                    f"{item.file.path}: its .bin is not beside it; set sources.path to a folder with both"
                )
            yield from read_megatron(Path(item.file.path), data, name, eos_id)
        elif isinstance(source, MdsConfig) and name.endswith("index.json"):
            yield from read_mds(Path(item.file.path), source, name, eos_id)


@dataclass(frozen=True)
class TakeTokens(Step):
    """The ids of the documents that are kept, as :class:`Tokenise` writes them."""

    documents: Documents
    split: Any

    name = "take_tokens"
    title = "Taking tokens"

    def settings(self) -> Any:
        return None

    def parts(self) -> Sequence[Any]:
        return [[key, self.split.keys, rank] for rank, key in enumerate(self.documents.read.keys)]

    def run_task(self, rank: int, task: Task) -> dict[str, Any]:
        read, dtype = self.documents.read.folders[rank], self.documents.read.reports[rank]["dtype"]
        kept = load_split(self.split)[self.documents.of_task(rank)] != DROPPED
        lengths, tokens = np.load(read / LENGTHS_NAME), map_tokens(read, dtype)
        stops = np.cumsum(lengths)
        with (task.out / TOKENS_NAME).open("wb") as file:
            for number in np.flatnonzero(kept):
                tokens[stops[number] - lengths[number] : stops[number]].tofile(file)
        np.save(task.out / LENGTHS_NAME, lengths[kept])
        return {"documents": int(kept.sum()), "tokens": int(lengths[kept].sum()), "dtype": dtype}


def _checked(item: Input, document: Tokens, vocab_size: int) -> np.ndarray:
    if len(document.ids) and not 0 <= int(document.ids.min()) <= int(document.ids.max()) < vocab_size:
        raise CorpusError(
            f"{document.name}: ids from {document.ids.min()} to {document.ids.max()}, the tokenizer has {vocab_size}; "
            "set tokenizer.path to the tokenizer.json that the source was made with"
        )
    if len(document.ids) > MAX_DOCUMENT_TOKENS:
        raise CorpusError(f"{document.name}: a document of {len(document.ids)} tokens; split it where it was made")
    return document.ids


def read_megatron(index: Path, data: Path, name: str, eos_id: int) -> Iterator[Tokens]:
    """Documents of an indexed dataset (MMIDIDX, version 1).

    Raises:
        CorpusError: the index is of another format, or says what cannot be true of the ids' file.
    """
    content = index.read_bytes()
    if len(content) < 34 or not content.startswith(MAGIC) or int.from_bytes(content[9:17], "little") != 1:
        raise CorpusError(f"{index}: not an index of Megatron (MMIDIDX, version 1)")
    if content[17] not in MEGATRON_TYPES:
        raise CorpusError(f"{index}: its values are of type {content[17]}, which is none of token ids")
    dtype = np.dtype(MEGATRON_TYPES[content[17]])
    sequences, bounds = (int(count) for count in np.frombuffer(content[18:34], dtype="<u8"))
    least = 34 + 12 * sequences + 8 * bounds
    if len(content) not in (least, least + sequences):  # a byte more per sequence in multimodal data
        raise CorpusError(f"{index}: {len(content)} bytes for {sequences} sequences and {bounds} bounds of documents")
    lengths = np.frombuffer(content, "<i4", sequences, 34).astype(np.int64)
    starts = np.frombuffer(content, "<i8", sequences, 34 + 4 * sequences)
    documents = np.frombuffer(content, "<i8", bounds, 34 + 12 * sequences)
    size = data.stat().st_size
    fits = (lengths >= 0) & (starts >= 0) & (starts % dtype.itemsize == 0)
    fits &= (starts <= size) & (lengths <= (size - starts) // dtype.itemsize)
    if not fits.all():
        bad = int(np.flatnonzero(~fits)[0])
        raise CorpusError(
            f"{index}: sequence {bad} is {lengths[bad]} values from byte {starts[bad]} on, {data.name} has {size} "
            "bytes; copy both files again"
        )
    is_cover = bounds > 0 and documents[0] == 0 and documents[-1] == sequences and (np.diff(documents) >= 0).all()
    if not is_cover:
        raise CorpusError(f"{index}: its documents do not cover its {sequences} sequences in order")
    values = np.memmap(data, dtype=dtype, mode="r") if size >= dtype.itemsize else np.zeros(0, dtype=dtype)
    firsts = starts // dtype.itemsize
    for number, (begin, end) in enumerate(zip(documents[:-1], documents[1:], strict=True)):
        parts = [values[firsts[i] : firsts[i] + lengths[i]] for i in range(begin, end)]
        ids = np.concatenate(parts) if parts else values[:0]
        yield Tokens(f"{name}/{number}", ids[:-1] if len(ids) and ids[-1] == eos_id else ids)


def read_mds(index: Path, source: MdsConfig, name: str, eos_id: int) -> Iterator[Tokens]:
    """Documents of an MDS folder: its samples, or what ends of text divide the stream of them into.

    Raises:
        CorpusError: the index is damaged, or the column is none of token ids.
    """
    samples = (ids for shard in _mds_shards(index) for ids in _mds_samples(index.parent, shard, source))
    pieces = _cut(samples, eos_id) if source.stream else samples
    for number, ids in enumerate(pieces):
        yield Tokens(f"{name}/{number}", ids[:-1] if len(ids) and ids[-1] == eos_id else ids)


def _cut(samples: Iterator[np.ndarray], eos_id: int) -> Iterator[np.ndarray]:
    """The samples end to end, cut behind every end of text."""
    open_parts: list[np.ndarray] = []
    for ids in samples:
        *whole, rest = np.split(ids, np.flatnonzero(ids == eos_id) + 1)
        for part in whole:
            yield np.concatenate([*open_parts, part])
            open_parts = []
        open_parts.append(rest)
        if sum(map(len, open_parts)) >= MAX_DOCUMENT_TOKENS // 2:
            yield np.concatenate(open_parts)
            open_parts = []
    if any(map(len, open_parts)):
        yield np.concatenate(open_parts)


def _mds_shards(index: Path) -> list[dict[str, Any]]:
    try:
        content = json.loads(index.read_bytes())
        shards = content["shards"]
        for shard in shards:
            raw = shard["raw_data"]
            if not len(shard["column_names"]) == len(shard["column_encodings"]) == len(shard["column_sizes"]):
                raise ValueError("names, encodings and sizes of columns differ in number")
            if shard["format"] != "mds" or shard["version"] != 2:
                raise ValueError(f"a shard of format {shard['format']} {shard['version']}, not mds 2")
            if shard["compression"] is not None:
                raise ValueError(f"compressed by {shard['compression']}; write it again without, or unpack it")
            if not _BASENAME.fullmatch(raw["basename"]):
                raise ValueError(f"{raw['basename']!r} is not a plain file name")
            if (index.parent / raw["basename"]).stat().st_size != raw["bytes"]:
                raise ValueError(f"{raw['basename']} does not have the {raw['bytes']} bytes it should; copy it again")
    except (KeyError, TypeError, ValueError, OSError) as error:
        lacks = "lacks " if isinstance(error, KeyError) else ""
        raise CorpusError(f"{index}: {lacks}{error}; no index of uncompressed MDS shards") from None
    return shards


def _mds_samples(folder: Path, shard: dict[str, Any], source: MdsConfig) -> Iterator[np.ndarray]:
    """The column of ids of every sample of a shard."""
    path = folder / shard["raw_data"]["basename"]
    names, sizes = shard["column_names"], shard["column_sizes"]
    if source.column not in names:
        raise CorpusError(f"{path}: no column {source.column!r}; it has {', '.join(names)}; set sources.column")
    place = names.index(source.column)
    encoding = shard["column_encodings"][place]
    content = np.memmap(path, dtype=np.uint8, mode="r")
    count = int(content[:4].view("<u4")[0]) if len(content) >= 4 else -1
    if count != shard["samples"] or len(content) < 4 * (count + 2):
        raise CorpusError(f"{path}: begins with {count} samples, index.json says {shard['samples']}; copy it again")
    bounds = content[4 : 4 * (count + 2)].view("<u4").astype(np.int64)
    if bounds[0] < 4 * (count + 2) or (np.diff(bounds) < 0).any() or bounds[-1] > len(content):
        raise CorpusError(f"{path}: its offsets do not rise within its {len(content)} bytes; copy it again")
    for number, (begin, end) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        try:
            yield _decoded(_column(bytes(content[begin:end]), sizes, place), encoding, source.dtype)
        except (ValueError, IndexError) as error:
            raise CorpusError(f"{path}: sample {number}: column {source.column!r} ({encoding}): {error}") from None


def _column(sample: bytes, sizes: Sequence[int | None], place: int) -> bytes:
    """One column of a sample: sizes that the index does not know stand first."""
    unknown = [i for i, size in enumerate(sizes) if not size]
    stored = np.frombuffer(sample[: 4 * len(unknown)], dtype="<u4")
    if len(stored) < len(unknown):
        raise ValueError("cut short")
    known = dict(zip(unknown, stored.tolist(), strict=True))
    lengths = [known.get(i, size) or 0 for i, size in enumerate(sizes)]
    begin = 4 * len(unknown) + sum(lengths[:place])
    value = sample[begin : begin + lengths[place]]
    if len(value) < lengths[place]:
        raise ValueError("cut short")
    return value


def _decoded(value: bytes, encoding: str, dtype: str) -> np.ndarray:
    """A value of type ``bytes`` or ``ndarray[:dtype[:shape]]``, of one dimension."""
    kind, *known = encoding.split(":")
    if kind == "ndarray":
        if not known:
            known, value = [MDS_TYPES.get(value[0], "")], value[1:]
        if len(known) == 1:  # the shape: how many dimensions and of which type, then each
            head, width = value[0], 1 << (value[0] & 3)
            if head >> 2 != 1:
                raise ValueError("not of one dimension")
            value = value[1 + width :]
        dtype = known[0]
    elif kind != "bytes":
        raise ValueError("holds no token ids; set sources.column")
    if dtype not in MDS_TYPES.values():
        raise ValueError("not of whole numbers")
    return np.frombuffer(value, dtype=dtype)
