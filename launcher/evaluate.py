"""Evaluate runs: `lightbulb evaluate RUN [RUN...] --data CORPUS [--ensemble likelihood] [--tasks FILE]`.

Reads the newest checkpoint of each run (or a folder that `lightbulb pack` wrote) and the held-out split of a corpus.
Writes RUN/evaluation.json (bits per byte by domain and cluster, expert use) and pictures of which experts tokens go to;
with `--ensemble` OUT/evaluation.json for the runs as one cluster-weighted mixture. `--tasks` runs tasks of
lm-eval-harness from local files (`pip install 'lightbulb[eval]'`). Known results are shown as they are, with `--again`
they are computed again. See docs/evaluation.md.
"""

import argparse
import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console

from lightbulb.config import Config, ConfigError, build_config
from lightbulb.data.config import DataError
from lightbulb.data.tokenizer import TokenizerError
from lightbulb.evaluation.ensemble import EnsembleConfig
from lightbulb.evaluation.results import names_of, reading_bar, show
from lightbulb.evaluation.runs import EvaluationConfig, Subject, evaluate_ensemble, evaluate_run
from lightbulb.folder import FolderError
from lightbulb.train.manifest import CheckpointError

C = TypeVar("C", bound=Config)
REFUSALS = (CheckpointError, ConfigError, DataError, FolderError, TokenizerError)


def main(argv: Sequence[str]) -> int:
    """Run the command; gives the exit code."""
    options = parser().parse_args(argv)
    try:
        results = evaluate(options)
    except REFUSALS as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if options.json:
        print(json.dumps(results))
    else:
        show(Console(), results)
    return 0


def parser() -> argparse.ArgumentParser:
    """Options; those of models and ensembles are the fields of their configs."""
    result = argparse.ArgumentParser(prog="lightbulb evaluate", description=__doc__.partition(":")[0] + ".")
    result.add_argument("runs", metavar="RUN", type=Path, nargs="+", help="folder of a run, or of a packed model")
    result.add_argument("--data", type=Path, metavar="CORPUS", help="corpus whose held-out split is read")
    result.add_argument("--tasks", type=Path, metavar="FILE", help="task of lm-eval-harness (YAML) or folder of them")
    result.add_argument("--ensemble", choices=("tfidf", "likelihood", "uniform"), help="the runs as one mixture")
    result.add_argument("--clusters", metavar="0,1,...", help="cluster of each run, where runs do not say it")
    result.add_argument("--out", type=Path, help="folder of the ensemble's result (default: beside the first run)")
    result.add_argument("--again", action="store_true", help="evaluate what was evaluated already")
    result.add_argument("--json", action="store_true", help="print one JSON object")
    for config in (EvaluationConfig, EnsembleConfig):
        for name, field in config.model_fields.items():
            if name != "weights":
                action = "store_true" if field.annotation is bool else "store"
                about = f"{field.description} (default {field.default})"
                option = "--" + name.replace("_", "-")
                result.add_argument(option, action=action, default=argparse.SUPPRESS, help=about)
    return result


def evaluate(options: argparse.Namespace) -> dict[str, Any]:
    """Do what the options ask for; results by kind and run."""
    if options.data is None and (options.ensemble or options.tasks is None):
        raise ConfigError("--data: missing; name a corpus that `lightbulb preprocess` wrote, or give --tasks")
    if options.ensemble is None and any(name in options for name in EnsembleConfig.model_fields):
        raise ConfigError("options of ensembles have no effect without --ensemble; add it, or leave them out")
    subjects = [Subject(run, _settings(EvaluationConfig, options)) for run in options.runs]
    names = names_of(options.runs)
    found: dict[str, Any] = {"runs": {}, "tasks": {}}
    for name, subject in zip(names, subjects, strict=True):
        if options.data is not None and options.ensemble is None:
            with reading_bar(name) as advance:
                found["runs"][name] = evaluate_run(subject, options.data, options.again, advance)
        if options.tasks is not None:
            found["tasks"][name] = _harness().evaluate_tasks(subject, options.tasks, options.again)
    if options.ensemble is not None:
        config = _settings(EnsembleConfig, options, {"weights": options.ensemble})
        clusters = None if options.clusters is None else _numbers(options.clusters)
        found["out"] = str(options.out or options.runs[0].parent / f"ensemble-{options.ensemble}")
        with reading_bar(f"ensemble of {len(subjects)}") as advance:
            out = Path(found["out"])
            result = evaluate_ensemble(subjects, options.data, config, out, clusters, options.again, advance)
        found["runs"] = dict(zip(names, result["members"], strict=True)) | {"ensemble": result}
    return found


def _settings(cls: type[C], options: argparse.Namespace, values: dict[str, Any] | None = None) -> C:
    """A config from the options that were given."""
    given = {name: getattr(options, name) for name in cls.model_fields if name in options}
    return build_config(cls, given | (values or {}), "options")


def _harness() -> Any:
    try:
        return importlib.import_module("lightbulb.evaluation.harness")
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("lightbulb"):
            raise
        raise ConfigError(f"--tasks: needs {error.name}; install it with pip install 'lightbulb[eval]'") from None


def _numbers(text: str) -> list[int]:
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise ConfigError(f"--clusters: {text!r} is not a list of numbers such as 0,1,2") from None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
