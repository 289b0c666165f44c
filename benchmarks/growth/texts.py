"""Five domains of real text for benchmarks/upcycling.py, written as JSONL for `lightbulb preprocess`.

A document is cut into pieces of about equal size, so that clusters of as many documents are clusters of as much text;
all pieces of a document carry its name, which decides whether it is held out. Documents are taken in the order of a
hash of their names until a domain has its share of bytes.
"""

import hashlib
import io
import json
import sysconfig
import zipfile
from collections.abc import Iterable, Iterator
from importlib.metadata import distributions
from pathlib import Path
from pydoc_data.topics import topics

import numpy
import torch

Document = tuple[str, str]
"""Name and text."""

PIECE = 3_000
"""Characters of a piece, about."""
PROBLEMS = 8
"""Problems of a maths document; one has 500 characters."""
SCENE = 12_000
"""Characters of a document of drama, about."""

DRAMA, MATHS, SPEECHES = "tinyshakespeare.txt", "gsm8k_train.jsonl", "state_union.zip"
"""What a corpora folder holds: github.com/karpathy/char-rnn, github.com/openai/grade-school-math (train.jsonl) and
nltk_data's corpora/state_union.zip, each byte for byte."""


def domains(corpora: Path | None) -> dict[str, Iterable[Document]]:
    """Documents by domain: of a corpora folder, or of what every machine with LightBulb has.

    Raises:
        FileNotFoundError: the folder lacks one of its three files.
    """
    common = {"code": _python(Path(sysconfig.get_path("stdlib"))), "reference": topics.items()}
    if corpora is None:
        return common | {"headers": _headers(), "packages": _packages(), "tests": _tests()}
    for name in (DRAMA, MATHS, SPEECHES):
        if not (corpora / name).is_file():
            raise FileNotFoundError(f"--corpora {corpora}: has no {name}; put it there, or leave --corpora out")
    return common | {
        "drama": _drama(corpora / DRAMA),
        "maths": _maths(corpora / MATHS),
        "speeches": _speeches(corpora / SPEECHES),
    }


def write_texts(corpora: Path | None, folder: Path, domain_bytes: int) -> dict[str, int]:
    """One JSONL file for each domain, of about so many bytes at most; gives the bytes of each."""
    folder.mkdir(parents=True, exist_ok=True)
    sizes = {}
    for domain, documents in domains(corpora).items():
        size, lines = 0, []
        for name, text in sorted(documents, key=lambda document: hashlib.sha256(document[0].encode()).digest()):
            if size >= domain_bytes:
                break
            room = min(len(text), domain_bytes // 16)  # no document is a large part of its domain
            size += len(text[:room].encode())
            lines += [json.dumps({"id": name, "text": piece}) for piece in pieces(text[:room])]
        path, content = folder / f"{domain}.jsonl", "\n".join(lines) + "\n"
        if not path.is_file() or path.read_text("utf-8") != content:  # others may be reading it
            path.write_text(content, encoding="utf-8")
        sizes[domain] = size
    return sizes


def pieces(text: str) -> Iterator[str]:
    """The text cut at ends of lines, a piece as soon as it has :data:`PIECE` characters."""
    lines: list[str] = []
    for line in text.splitlines(keepends=True):
        lines.append(line)
        if sum(map(len, lines)) >= PIECE:
            yield "".join(lines)
            lines = []
    if "".join(lines).strip():
        yield "".join(lines)


def _files(folder: Path, files: Iterable[Path]) -> Iterator[Document]:
    for path in files:
        try:
            yield str(path.relative_to(folder)), path.read_text("utf-8")
        except UnicodeDecodeError:
            continue


def _python(folder: Path) -> Iterator[Document]:
    left_out = {"site-packages", "test", "tests", "idlelib", "lib2to3", "pydoc_data", "__pycache__"}
    files = (path for path in folder.rglob("*.py") if not left_out & set(path.relative_to(folder).parts))
    return _files(folder, files)


def _headers() -> Iterator[Document]:
    folder = Path(torch.__file__).parent / "include" / "ATen"
    return _files(folder, (path for path in folder.rglob("*.h") if "ops" not in path.parts))


def _tests() -> Iterator[Document]:
    folder = Path(numpy.__file__).parent
    return _files(folder, folder.rglob("tests/test_*.py"))


def _packages() -> Iterator[Document]:
    for distribution in distributions():
        if text := distribution.read_text("METADATA"):
            yield distribution.metadata["Name"], text


def _drama(path: Path) -> Iterator[Document]:
    """Runs of speeches, which blank lines separate."""
    scene: list[str] = []
    number = 0
    for speech in path.read_text("utf-8").split("\n\n"):
        scene.append(speech)
        if sum(map(len, scene)) >= SCENE:
            yield f"scene {number}", "\n\n".join(scene)
            scene, number = [], number + 1
    yield f"scene {number}", "\n\n".join(scene)


def _maths(path: Path) -> Iterator[Document]:
    problems = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    for start in range(0, len(problems), PROBLEMS):
        group = problems[start : start + PROBLEMS]
        yield f"problems {start}", "\n\n".join(f"{one['question']}\n{one['answer']}" for one in group)


def _speeches(path: Path) -> Iterator[Document]:
    with zipfile.ZipFile(io.BytesIO(path.read_bytes())) as archive:
        for name in archive.namelist():
            if name.endswith(".txt"):
                yield name, archive.read(name).decode("latin-1")
