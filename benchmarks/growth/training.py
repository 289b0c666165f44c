"""Tasks of benchmarks/upcycling.py done by LightBulb's own trainer and upcycling, in this process."""

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import torch

from growth.corpora import CLUSTERS, CONTEXT, VOCABULARY
from growth.ensembles import evaluate_together
from growth.plan import TOP_K, Settings, Task
from growth.sync import train_synced
from lightbulb.config import build_config
from lightbulb.data.corpus import Corpus
from lightbulb.data.tokenizer import Tokenizer
from lightbulb.experts.receipt import RECEIPT, read_receipt
from lightbulb.experts.upcycle import upcycle
from lightbulb.experts.upcycle_config import UpcycleConfig
from lightbulb.parallel.host import process_group, tune_allocator
from lightbulb.train.checkpoint import newest_checkpoint
from lightbulb.train.config import RunConfig
from lightbulb.train.loop import Trainer

CPU = torch.device("cpu")
ORDERS = 1_000
"""Seeds of runs are apart by this, so that each has room for several orders of its data."""
SAVE_EVERY = 1_000
CLUSTER_TOKENS = 2_048
"""Read of each cluster for a learned router."""


class Stopped(RuntimeError):
    """A signal ended a training before its last step; what it had is saved."""


def run_task(task: Task, seed: int, work: Path, folders: dict[str, Path]) -> Settings:
    """Do one task; runs it had begun go on.

    Args:
        task: what to do.
        seed: of the repetition.
        work: holds the corpora.
        folders: of every task's run.

    Returns:
        what it found, for the JSON of its results.

    Raises:
        Stopped: by a signal.
    """
    started, cpu = time.time(), time.process_time()
    torch.set_num_threads(1)
    tune_allocator()
    with process_group(CPU):
        if task.kind == "train":
            found = _train(task, seed, work, folders)
        elif task.kind == "sync":
            found = train_synced(task, run_config(task, seed, work, folders), folders)
        else:
            runs = [folders[name] for name in task.settings["runs"]]
            found = evaluate_together(runs, work / "corpus", task.settings["by_cluster"])
    return found | {"seconds": time.time() - started, "cpu_seconds": time.process_time() - cpu}


def run_config(task: Task, seed: int, work: Path, folders: dict[str, Path]) -> RunConfig:
    """The run file of a task."""
    settings = task.settings
    mixtures = settings.get("mixtures", [])
    data: dict[str, Any] = {"path": str(work / settings.get("corpus", "corpus"))}
    if mixtures:
        data["mixture"] = mixtures[0]
        data["stages"] = [{"start": "decay", "mixture": mixture} for mixture in mixtures[1:]]
    values = {
        "run": str(folders[task.name]),
        "seed": ORDERS * (seed + 1) + settings["order"],
        "model": settings["model"],
        "data": data,
        "parallel": {"distributed_optimizer": False},
        "optimizer": {"lr": settings["lr"], "weight_decay": 0.1},
        "schedule": settings["schedule"],
        "train": {
            "steps": settings["steps"],
            "global_batch_size": settings["rows"],
            "micro_batch_size": settings["rows"],
            "precision": "fp32",
            "save_every": SAVE_EVERY,
            "keep_checkpoints": 1,
            "async_save": False,
            "log_every": 500,
            "trainable": settings.get("trainable", "all"),
        },
    }
    if settings.get("start") in ("weights", "moments"):
        values["start_from"] = str(folders[task.needs[0]])
        values["start_from_moments"] = settings["start"] == "moments"
    if settings.get("start") == "upcycle":
        values["start_from"] = str(_start_folder(folders[task.name]))
        values["start_from_moments"] = settings["upcycle"].get("moments") == "keep"
    return build_config(RunConfig, values, task.name).resolve(1)


def _train(task: Task, seed: int, work: Path, folders: dict[str, Path]) -> Settings:
    """One run, evaluated after its last step, and before its first if it was upcycled."""
    folder, start = folders[task.name], task.settings["start"]
    if start == "upcycle":
        _upcycle(task, seed, work, folders)
    if start == "resume" and newest_checkpoint(folder)[0] is None:
        _copy_run(folders[task.needs[0]], folder)
    found, before = Settings(), _start_folder(folder) / "before.json"
    with Trainer(run_config(task, seed, work, folders), CPU) as trainer:
        if start == "upcycle" and not before.is_file():
            before.write_text(json.dumps({"start_bpb": trainer.evaluate()["held_out_bpb"]}))
        if not trainer.run():
            raise Stopped(task.name)
        if task.settings["evaluate"]:
            result = trainer.evaluate()
            found |= {"bpb": result["held_out_bpb"], "domain_bpb": result["domain_bpb"]}
        facts = trainer.facts()
    if start == "upcycle":
        receipt = read_receipt(_start_folder(folder) / RECEIPT)
        assert receipt is not None
        found |= json.loads(before.read_bytes()) | {"notes": receipt.notes}
    found["skipped"] = facts["skipped_steps"]
    return found | {name: facts[name] for name in ("parameters", "active_parameters", "tokens", "domain_tokens")}


def _upcycle(task: Task, seed: int, work: Path, folders: dict[str, Path]) -> None:
    """Write the mixture that a run starts from, by `lightbulb upcycle`, if it is not there."""
    settings, out = task.settings["upcycle"], _start_folder(folders[task.name])
    if (out / "config.yaml").is_file():
        return
    paths = [_source(name, folders) for name in settings["sources"]]
    values: dict[str, Any] = {
        "run": str(out),
        "method": settings["method"],
        "seed": seed,
        "sources": [{"path": str(path)} for path in paths],
        "router": {"top_k": TOP_K},
        "router_start": {"kind": settings["router"], "tokens": CLUSTER_TOKENS, "scale": settings.get("scale", 1.0)},
        "moments": settings.get("moments", "zero"),
        "data": {"path": str(work / "corpus")},
    }
    if len(paths) == 1:
        values["num_experts"] = settings["experts"]
    prompts = cluster_prompts(work / "corpus", paths[0] / "tokenizer.json") if settings["router"] != "random" else []
    for number, texts in enumerate(prompts):
        if len(paths) > 1:
            values["sources"][number]["prompts"] = texts
        else:
            values.setdefault("clusters", []).append({"path": str(paths[0]), "prompts": texts})
    upcycle(build_config(UpcycleConfig, values, task.name))


def cluster_prompts(corpus: Path, tokenizer: Path) -> list[list[str]]:
    """Rows of each cluster that are trained on, as text."""
    rows, decoder = Corpus(corpus, "train", CONTEXT, VOCABULARY), Tokenizer.load(tokenizer)
    prompts = []
    for number in range(CLUSTERS):
        parts = [part for name, part in rows.domains.items() if name.endswith(f"cluster-{number:02d}")]
        places = [(part, row) for part in parts for row in range(len(part))]
        chosen = places[:: max(len(places) // (CLUSTER_TOKENS // CONTEXT), 1)]
        prompts.append([decoder.decode(part[row].tokens[:-1].tolist()) for part, row in chosen])
    return prompts


def _source(name: str, folders: dict[str, Path]) -> Path:
    """The run of a task, or TASK:NUMBER for one of several."""
    task, _, number = name.partition(":")
    return folders[task] / number


def _start_folder(run: Path) -> Path:
    return run.with_name(run.name + "-start")


def _copy_run(source: Path, target: Path) -> None:
    """A run to go on from, without touching it."""
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, partial)
    os.replace(partial, target)
