"""Checking a corpus: every file its manifest lists, and the manifest itself."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import orjson

from lightbulb.data_prep.manifest import MANIFEST_NAME, damaged_files, listed_files, manifest_digest, read_manifest


@dataclass
class CorpusReport:
    """What was found in a corpus folder: files and bytes read, and what is wrong, every damaged file named."""

    corpus: str
    files: int = 0
    bytes: int = 0
    problems: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"ok": not self.problems} | asdict(self)


def is_corpus(folder: Path) -> bool:
    """Whether the folder is one that `lightbulb preprocess` wrote, or what is left of it."""
    return (folder / MANIFEST_NAME).is_file() or any((folder / split).is_dir() for split in ("train", "held_out"))


def verify_corpus(folder: Path) -> CorpusReport:
    """Compare every file with its hash; reads only."""
    report = CorpusReport(str(folder))
    again = "copy it again, or run `lightbulb preprocess` again"
    manifest = read_manifest(folder)
    if manifest is None:
        report.problems.append(f"{folder / MANIFEST_NAME}: missing, or no manifest of a corpus; {again}")
        return report
    try:
        if manifest_digest(manifest) != manifest["digest"]:
            report.problems.append(f"{folder / MANIFEST_NAME}: damaged: its content is not what was written; {again}")
        report.problems += [f"{path}: {problem}; {again}" for path, problem in damaged_files(folder, manifest)]
        files = [path for path, _, _ in listed_files(folder, manifest) if path.is_file()]
        report.files, report.bytes = len(files) + 1, sum(path.stat().st_size for path in files)
    except (KeyError, TypeError, AttributeError, orjson.JSONEncodeError) as error:
        report.problems.append(f"{folder / MANIFEST_NAME}: lacks what a manifest has ({error}); {again}")
    return report
