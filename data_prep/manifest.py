"""``manifest.json``: what a corpus was made of, what is in it, and hashes that tell when either has changed."""

import hashlib
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import orjson
import xxhash

from lightbulb.data.tokenizer import PATTERN, Tokenizer
from lightbulb.data_prep.config import CorpusConfig, SourceConfig
from lightbulb.data_prep.read import READ_BYTES, Counts, describe_source
from lightbulb.data_prep.writer import SHARD_HASH
from lightbulb.folder import write_atomically

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
TOKENIZER_NAME = "tokenizer.json"


def config_hash(config: CorpusConfig) -> str:
    """Hash of everything beside the inputs that can change the output."""
    settings = config.model_dump(mode="json", exclude={"output", "workers"})
    return hashlib.sha256(orjson.dumps([FORMAT_VERSION, PATTERN, settings], option=orjson.OPT_SORT_KEYS)).hexdigest()


def read_manifest(output: Path) -> dict[str, Any] | None:
    """The manifest of a finished corpus, or None where there is none that can be read."""
    try:
        manifest = orjson.loads((output / MANIFEST_NAME).read_bytes())
    except (OSError, orjson.JSONDecodeError):
        return None
    is_ours = isinstance(manifest, dict) and manifest.get("format") == FORMAT_VERSION
    return manifest if is_ours else None


def is_intact(output: Path, manifest: dict[str, Any]) -> bool:
    """Whether every file the manifest lists is there with the content it had."""
    try:
        domains = [(split, name, entry) for split, group in manifest["splits"].items() for name, entry in group.items()]
        return _sha256(output / TOKENIZER_NAME) == manifest["tokenizer"]["digest"] and all(
            _is_domain_intact(output / split / name, entry) for split, name, entry in domains
        )
    except (OSError, KeyError):
        return False


def _is_domain_intact(folder: Path, entry: dict[str, Any]) -> bool:
    if _sha256(folder / "index.json") != entry["index_sha256"]:
        return False
    return all(_shard_hash(folder / shard["basename"]) == shard["hashes"][SHARD_HASH] for shard in entry["shards"])


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _shard_hash(path: Path) -> str:
    hasher = xxhash.xxh64()
    with path.open("rb") as file:
        while block := file.read(READ_BYTES):
            hasher.update(block)
    return hasher.hexdigest()


def source_entry(source: SourceConfig, counts: Counts) -> dict[str, Any]:
    """What one source gave, and what was dropped from it."""
    return {
        "source": describe_source(source),
        "domain": source.domain,
        "documents": counts.documents,
        "bytes": counts.bytes,
        "dropped": dict(sorted(counts.dropped.items())),
        "first_dropped": dict(sorted(counts.first_dropped.items())),
    }


def domain_entry(folder: Path, documents: int, num_bytes: int, tokens: int, rows: int, unused: int) -> dict[str, Any]:
    """One domain of one split: sizes, and its shards as its index lists them."""
    index = orjson.loads((folder / "index.json").read_bytes())
    shards = [shard["raw_data"] | {"samples": shard["samples"]} for shard in index["shards"]]
    return {
        "documents": documents,
        "bytes": num_bytes,
        "tokens": tokens,
        "bytes_per_token": round(num_bytes / max(1, tokens - documents), 4),
        "rows": rows,
        "unused_tokens": unused,
        "index_sha256": _sha256(folder / "index.json"),
        "shards": shards,
    }


def write_manifest(
    folder: Path,
    config: CorpusConfig,
    inputs_digest: str,
    tokenizer: Tokenizer,
    sources: Sequence[dict[str, Any]],
    splits: dict[str, dict[str, dict[str, Any]]],
) -> dict[str, Any]:
    """Write the manifest, the last file of a corpus."""
    manifest = {
        "format": FORMAT_VERSION,
        "config_hash": config_hash(config),
        "inputs_digest": inputs_digest,
        "context_length": config.context_length,
        "seed": config.seed,
        "tokenizer": {
            "file": TOKENIZER_NAME,
            "digest": tokenizer.digest,
            "vocab_size": tokenizer.vocab_size,
            "eos_id": tokenizer.eos_id,
        },
        "sources": list(sources),
        "splits": splits,
        "config": config.model_dump(mode="json", exclude={"output", "workers"}),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("lightbulb", "tokenizers", "mosaicml-streaming")},
        },
    }
    write_atomically(folder / MANIFEST_NAME, orjson.dumps(manifest, option=orjson.OPT_INDENT_2))
    return manifest
