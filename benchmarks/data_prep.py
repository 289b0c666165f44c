"""Data preparation against the field's libraries and against its own parts; ratios in one run.

- ``tokenize_vs_hf``: documents to shards, against the tokenizers library's ``encode_batch`` alone (CPU time, one
  thread).
- ``minhash_vs_datasketch``: signatures of 128 permutations of 5-word runs (CPU time, one thread).
- ``pipeline_vs_tokenize``: the whole of ``configs/debug/corpus-full.yaml`` with a tokenizer at hand, as a multiple of
  the tokenizers library's time for its documents (wall time, all cores).
- ``loader_stall_share``: the share of a step that reading rows would take if training were eight times as fast as the
  quickstart is here.
- ``order_growth_exponent``: how the time of clustering and ordering grows from 10,000 to 1,000,000 documents.

With ``--corpora FOLDER``, a folder with tinyshakespeare.txt, gsm8k_train.jsonl and state_union.zip, also how well
clusters recover five domains of real text. The last line printed is JSON.
"""

import argparse
import json
import os
import random
import re
import resource
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ["RAYON_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"] = "1"  # before the libraries start their threads

from pydoc_data import topics

import numpy as np
import orjson
from datasketch import MinHash
from rich.progress import Progress
from tokenizers import Tokenizer as PlainTokenizer

from lightbulb.config import load_config
from lightbulb.data.config import DataConfig
from lightbulb.data.loader import TrainLoader
from lightbulb.data_prep.cluster import BLOCK, Clusters
from lightbulb.data_prep.config import CorpusConfig, ExecutorConfig
from lightbulb.data_prep.documents import Documents
from lightbulb.data_prep.embed import TfidfEmbedder, normalised
from lightbulb.data_prep.ingest import Read, inputs_of
from lightbulb.data_prep.minhash import signatures
from lightbulb.data_prep.order import in_context_order
from lightbulb.data_prep.pipeline import preprocess
from lightbulb.data_prep.relate import adjacent_similarity
from lightbulb.data_prep.split import Split
from lightbulb.data_prep.tokenise import MakeTokenizer, Tokenise
from lightbulb.data_prep.work import Work
from lightbulb.data_prep.write import Pack, Write

ROOT = Path(__file__).parent.parent
CORPUS = ROOT / "configs/debug/corpus-full.yaml"
RUN = ROOT / "configs/debug/quickstart.yaml"
FASTER = 8
SIZES = (10_000, 100_000, 1_000_000)
ROUNDS = 3


def main() -> None:
    """Measure everything, print a table and a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("--json", action="store_true", help="print the JSON line only")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the JSON here too")
    parser.add_argument("--corpora", type=Path, help="folder of real texts for the claims about clusters")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="documents of the growth measurement")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = load_config(CorpusConfig, CORPUS, [f"output={folder / 'corpus'}"])
        result: dict[str, Any] = {}
        for measure in (
            lambda: pipeline(config, folder),
            lambda: tokenising(config, folder),
            near_duplicates,
            lambda: loading(config),
            lambda: growth(options.sizes),
            *([lambda: claims(options.corpora)] if options.corpora else []),
        ):
            found = measure()
            result |= found
            if not options.json:
                print("\n".join(f"{key:>32}  {value}" for key, value in found.items()), flush=True)
    if options.output is not None:
        options.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


def cpu_seconds(run: Callable[[], object]) -> float:
    """CPU time of this process."""
    started = time.process_time()
    run()
    return time.process_time() - started


def ratio(peer: Callable[[], object], ours: Callable[[], object]) -> float:
    """The peer's CPU time by ours, the median of rounds that alternate."""
    return float(np.median([cpu_seconds(peer) / cpu_seconds(ours) for _ in range(ROUNDS)]))


def pipeline(config: CorpusConfig, folder: Path) -> dict[str, Any]:
    """The whole pipeline once to have a tokenizer, then timed with it."""
    preprocess(config)
    tokenizer = folder / "tokenizer.json"
    tokenizer.write_bytes((config.output / "tokenizer.json").read_bytes())
    again = config.model_copy(
        update={
            "output": folder / "again",
            "tokenizer": config.tokenizer.model_copy(update={"path": tokenizer}),
        }
    )
    started = time.perf_counter()
    preprocess(again)
    whole = time.perf_counter() - started
    alone = tokenised_elsewhere(tokenizer, texts_of(config, folder / "texts"), folder)
    return {"pipeline_seconds": round(whole, 1), "pipeline_vs_tokenize": round(whole / alone, 2)}


def tokenised_elsewhere(tokenizer: Path, texts: Sequence[str], folder: Path) -> float:
    """Seconds of the tokenizers library for the texts with all cores, in a process that may have so many threads."""
    documents = folder / "documents.json"
    documents.write_bytes(orjson.dumps(list(texts)))
    program = (
        "import sys, time, orjson, tokenizers\n"
        "texts = orjson.loads(open(sys.argv[1], 'rb').read())\n"
        "tokenizer = tokenizers.Tokenizer.from_file(sys.argv[2])\n"
        "started = time.perf_counter()\n"
        "tokenizer.encode_batch(texts)\n"
        "print(time.perf_counter() - started)\n"
    )
    environment = os.environ | {"RAYON_NUM_THREADS": str(os.cpu_count())}
    command = [sys.executable, "-c", program, str(documents), str(tokenizer)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout)


def texts_of(config: CorpusConfig, folder: Path) -> list[str]:
    """The documents that a corpus reads."""
    with Progress(disable=True) as progress:
        read = Documents(_work(folder, progress).run(_reading(config)))
    return [text for task in range(len(read.read.folders)) for _, text in read.texts(task)]


def _work(folder: Path, progress: Progress) -> Work:
    folder.mkdir(exist_ok=True)
    return Work(folder, ExecutorConfig(workers=1), progress)


def _reading(config: CorpusConfig) -> Read:
    return Read(config.sources, config.clean, inputs_of(config.sources), config.task_bytes)


def tokenising(config: CorpusConfig, folder: Path) -> dict[str, Any]:
    """Tokenising, packing and writing the documents, against encoding alone."""
    texts, tokenizer = texts_of(config, folder / "texts"), folder / "tokenizer.json"
    plain = PlainTokenizer.from_file(str(tokenizer))
    counted = []

    with Progress(disable=True) as progress:
        ready = _work(folder / "texts", progress)
        documents = Documents(ready.run(_reading(config)))
        split = ready.run(Split(documents, (), config.held_out_fraction))
        made = ready.run(MakeTokenizer(config.tokenizer.model_copy(update={"path": tokenizer}), documents, split))
    plan = config.pack.model_copy(update={"method": "concatenate"})

    def ours() -> None:
        with tempfile.TemporaryDirectory() as place, Progress(disable=True) as progress:
            work = _work(Path(place), progress)
            tokens = work.run(Tokenise(documents, split, made, None))
            packed = work.run(Pack(documents, split, tokens, None, None, plan, config.context_length, config.seed))
            eos = made.reports[0]["eos_id"]
            work.run(Write(packed, tokens, config.context_length, config.shard_bytes, eos))
            counted.append(sum(report["tokens"] for report in tokens.reports))

    faster = ratio(lambda: plain.encode_batch(texts), ours)
    rate = counted[0] / cpu_seconds(ours)
    return {"tokenize_vs_hf": round(faster, 2), "tokens_to_shards_per_second": round(rate)}


def near_duplicates() -> dict[str, Any]:
    """Signatures of documents of about 1 kB, as many a batch as a step takes."""
    words = [re.sub(r"\W+", "", word) for word in " ".join(topics.topics.values()).split()]
    generator = random.Random(0)
    texts = [" ".join(generator.choices(words, k=170)) for _ in range(2000)]
    few = texts[:200]

    def peer() -> None:
        for text in few:
            tokens = re.findall(r"\w+", text.lower())
            sketch = MinHash(128)
            sketch.update_batch([" ".join(tokens[i : i + 5]).encode() for i in range(len(tokens) - 4)])

    return {"minhash_vs_datasketch": round(ratio(peer, lambda: signatures(texts, 5)) * len(texts) / len(few), 1)}


def loading(config: CorpusConfig) -> dict[str, Any]:
    """What the loader gives in a second of CPU time, and what the quickstart's model takes."""
    run = config.output.parent / "run"
    command = [sys.executable, str(ROOT / "launcher/pretrain.py"), str(RUN), f"run={run}", f"data.path={config.output}"]
    subprocess.run([*command, "train.steps=20", "prompts=[]"], check=True, capture_output=True, cwd=ROOT)
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    trained = max(record["tokens_per_second"] for record in records if record["kind"] == "train")
    size = 64
    loader = TrainLoader(DataConfig(path=config.output), config.context_length, 8192, 0, size, size)
    loader.next_step()  # verifies the first shard
    steps = len(loader.corpus) // size
    for _ in range(steps):
        loader.next_step()  # and all others
    loaded = steps * size * config.context_length / cpu_seconds(lambda: [loader.next_step() for _ in range(steps)])
    return {
        "loader_tokens_per_second": round(loaded),
        "training_tokens_per_second": round(trained),
        "loader_stall_share": round(FASTER * trained / loaded, 5),
    }


def growth(sizes: Sequence[int]) -> dict[str, Any]:
    """CPU seconds and memory of clusters and order for synthetic documents: 100 to a subject, 64 dimensions."""
    seconds, memory = [], []
    for size in sizes:
        generator = np.random.default_rng(0)
        subjects = normalised(generator.standard_normal((size // 100, 64)))
        noise = 0.1 * generator.standard_normal((size, 64), dtype=np.float32)
        vectors = normalised(subjects[generator.integers(0, len(subjects), size)] + noise)

        def clustered_and_ordered(vectors: np.ndarray = vectors) -> None:
            clusters = Clusters.fit(vectors[:100_000], 16, 1.1, seed=0)
            clusters.assign(np.split(vectors, range(BLOCK, len(vectors), BLOCK)))
            in_context_order(vectors, 10, seed=0)

        seconds.append(cpu_seconds(clustered_and_ordered))
        memory.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10)
    exponent = float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])
    hours = seconds[-1] * (235e6 / sizes[-1]) ** exponent / 3600
    return {
        "order_growth_exponent": round(exponent, 3),
        "order_seconds": {str(size): round(value, 1) for size, value in zip(sizes, seconds, strict=True)},
        "order_peak_mib": {str(size): value for size, value in zip(sizes, memory, strict=True)},
        "order_cpu_hours_for_235m": round(hours, 1),
    }


def claims(folder: Path) -> dict[str, Any]:
    """Five domains, as many documents of each: do clusters recover them, and are neighbours of the order related?"""
    root = Path(os.__file__).parent
    with zipfile.ZipFile(folder / "state_union.zip") as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".txt"))
        speeches = [archive.read(name).decode("latin-1") for name in names]
    lines = (folder / "gsm8k_train.jsonl").read_bytes().splitlines()
    problems = [record["question"] + "\n" + record["answer"] for record in map(orjson.loads, lines)]
    drama = (folder / "tinyshakespeare.txt").read_text().split("\n\n")
    domains = {
        "code": [path.read_text(errors="replace") for path in sorted(root.glob("*.py"))],
        "reference": [text for _, text in sorted(topics.topics.items()) if len(text) > 500],
        "drama": ["\n\n".join(drama[i : i + 20]) for i in range(0, len(drama), 20)],
        "problems": ["\n\n".join(problems[i : i + 5]) for i in range(0, len(problems), 5)],
        "speeches": [speech for speech in speeches if len(speech) > 500],
    }
    count = min(map(len, domains.values()))
    generator = random.Random(0)
    texts = [text for found in domains.values() for text in generator.sample(found, count)]
    truth = np.repeat(np.arange(len(domains)), count)
    vectors = TfidfEmbedder.fit(texts, 100, 1 << 16, seed=0).embed(texts)
    chosen = Clusters.fit(vectors, len(domains), 1.1, seed=0).assign([vectors])
    purity = sum(np.bincount(truth[chosen == cluster]).max() for cluster in np.unique(chosen)) / len(truth)
    order = in_context_order(vectors, 10, seed=0)
    return {
        "documents_per_domain": count,
        "cluster_purity": round(float(purity), 4),
        "adjacent_similarity": adjacent_similarity(vectors[order]),
        "random_similarity": adjacent_similarity(vectors[np.random.default_rng(0).permutation(len(vectors))]),
    }


if __name__ == "__main__":
    main()
