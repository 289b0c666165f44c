"""``manifest.json``: what a corpus was made of, what is in it, and hashes that tell when either has changed."""

import hashlib
import platform
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import orjson
import xxhash

from lightbulb.data.tokenizer import PATTERN
from lightbulb.data_prep.config import CorpusConfig, SourceConfig
from lightbulb.data_prep.counts import Counts
from lightbulb.data_prep.files import describe_source
from lightbulb.data_prep.mds import INDEX_NAME, SHARD_HASH
from lightbulb.data_prep.tokenise import TOKENIZER_NAME
from lightbulb.folder import write_atomically

FORMAT_VERSION = 2
MANIFEST_NAME = "manifest.json"


def config_hash(config: CorpusConfig) -> str:
    """Hash of everything beside the inputs that can change the output."""
    settings = [FORMAT_VERSION, PATTERN, config.settings()]
    return hashlib.sha256(orjson.dumps(settings, option=orjson.OPT_SORT_KEYS | orjson.OPT_NON_STR_KEYS)).hexdigest()


def read_manifest(output: Path) -> dict[str, Any] | None:
    """The manifest of a finished corpus, or None where there is none that can be read."""
    try:
        manifest = orjson.loads((output / MANIFEST_NAME).read_bytes())
    except (OSError, orjson.JSONDecodeError):
        return None
    is_ours = isinstance(manifest, dict) and manifest.get("format") == FORMAT_VERSION
    return manifest if is_ours else None


def listed_files(output: Path, manifest: dict[str, Any]) -> Iterator[tuple[Path, Callable[[Path], str], str]]:
    """Every file the manifest lists, what it is hashed with and its hash.

    Raises:
        KeyError: the manifest lacks something.
    """
    yield output / TOKENIZER_NAME, _sha256, manifest["tokenizer"]["digest"]
    for name, expected in manifest["files"].items():
        yield output / name, file_hash, expected
    for split, groups in manifest["splits"].items():
        for name, group in groups.items():
            folder = output / split / name
            yield folder / INDEX_NAME, _sha256, group["index_sha256"]
            for shard in group["shards"]:
                yield folder / shard["basename"], file_hash, shard["hashes"][SHARD_HASH]


def damaged_files(output: Path, manifest: dict[str, Any]) -> Iterator[tuple[Path, str]]:
    """Every file the manifest lists that is not what was written, and what is wrong with it.

    Raises:
        KeyError: the manifest lacks something.
    """
    root = output.resolve()
    for path, hash_of, expected in listed_files(output, manifest):
        if not path.resolve().is_relative_to(root):
            yield path, "listed, but not inside the corpus"
            continue
        try:
            found = hash_of(path)
        except OSError as error:
            yield path, "missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
        else:
            if found != expected:
                yield path, f"damaged: its hash is {found[:16]}, manifest.json says {expected[:16]}"


def manifest_digest(manifest: dict[str, Any]) -> str:
    """Hash of everything in the manifest but the hash itself."""
    content = {name: value for name, value in manifest.items() if name != "digest"}
    return hashlib.sha256(orjson.dumps(content, option=orjson.OPT_SORT_KEYS | orjson.OPT_NON_STR_KEYS)).hexdigest()


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def file_hash(path: Path) -> str:
    """XXH64 of a file, as shards have it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, xxhash.xxh64).hexdigest()  # type: ignore[arg-type]


def source_entry(source: SourceConfig, counts: Counts) -> dict[str, Any]:
    """What one source gave, and what was repaired in it and dropped from it."""
    return {"source": describe_source(source), "domain": source.domain, **counts.to_json()}


def group_entry(folder: Path, group: dict[str, Any], shards: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One group: sizes, and its shards as its index lists them."""
    tokens, documents = group["tokens"], group["documents"]
    names = ("domain", "cluster", "documents", "bytes", "tokens", "rows", "unused_tokens")
    masked = ("counted_tokens",) if "counted_tokens" in group else ()
    return {name: group[name] for name in (*names, *masked)} | {
        "bytes_per_token": round(group["bytes"] / max(1, tokens - documents), 4),
        "index_sha256": _sha256(folder / INDEX_NAME),
        "shards": [shard["raw_data"] | {"samples": shard["samples"]} for shard in shards],
    }


def write_manifest(folder: Path, config: CorpusConfig, inputs_digest: str, content: dict[str, Any]) -> dict[str, Any]:
    """Write the manifest, the last file of a corpus; ``content`` is what its steps reported.

    Besides the tokenizer and the shards, it lists every file that is in the folder.
    """
    shards = {folder / split / name for split, groups in content["splits"].items() for name in groups}
    others = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.parent not in shards]
    manifest = {
        "format": FORMAT_VERSION,
        "config_hash": config_hash(config),
        "inputs_digest": inputs_digest,
        "context_length": config.context_length,
        "seed": config.seed,
        **content,
        "files": {
            path.relative_to(folder).as_posix(): file_hash(path) for path in others if path.name != TOKENIZER_NAME
        },
        "config": config.settings(),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("lightbulb", "tokenizers", "numpy", "datatrove")},
        },
    }
    manifest["digest"] = manifest_digest(manifest)
    options = orjson.OPT_INDENT_2 | orjson.OPT_NON_STR_KEYS
    write_atomically(folder / MANIFEST_NAME, orjson.dumps(manifest, option=options))
    return manifest
