"""``evaluation.json``: results by what they are results of; and the console: a bar, and tables of several runs."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import orjson
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from lightbulb.config import ConfigError
from lightbulb.folder import write_atomically

FILE = "evaluation.json"
FORMAT = 1
_FIX = "remove the file to evaluate anew"

Result = Mapping[str, Any]


def find(path: Path, key: Mapping[str, Any]) -> dict[str, Any] | None:
    """The result of a file with this ``key``, or None.

    Raises:
        ConfigError: the file is damaged.
    """
    return next((result for result in _all(_read(path)) if result.get("key") == key), None)


def newest(path: Path) -> dict[str, Any]:
    """The result that was asked for last; empty where there is none.

    Raises:
        ConfigError: the file is damaged.
    """
    return next(iter(_all(_read(path))), {})


def record(path: Path, result: dict[str, Any]) -> dict[str, Any]:
    """Put a result on top of a file, and give it back; the one with its key goes, the others stay.

    Raises:
        ConfigError: the file is damaged.
        FolderError: it cannot be written.
    """
    content = _read(path)
    earlier = [other for other in _all(content) if other["key"] != result["key"]]
    tasks = {"tasks": content["tasks"]} if "tasks" in content else {}
    _write(path, {"format": FORMAT, **result, **tasks, "earlier": earlier})
    return result


def find_task(path: Path, name: str, key: Mapping[str, Any]) -> dict[str, Any] | None:
    """The result of a task with this ``key``, or None.

    Raises:
        ConfigError: the file is damaged.
    """
    known = _read(path).get("tasks", {}).get(name)
    return known if known is not None and known["key"] == key else None


def record_task(path: Path, name: str, result: Result) -> None:
    """Put a task's result in the place of an earlier one.

    Raises:
        ConfigError: the file is damaged.
        FolderError: it cannot be written.
    """
    content = _read(path)
    _write(path, {"format": FORMAT} | content | {"tasks": content.get("tasks", {}) | {name: result}})


def _all(content: Result) -> list[dict[str, Any]]:
    """The results of a corpus in a file, the newest first."""
    newest = {name: value for name, value in content.items() if name not in ("format", "tasks", "earlier")}
    return ([newest] if newest else []) + list(content.get("earlier", []))


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = orjson.loads(path.read_bytes())
    except (OSError, orjson.JSONDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); {_FIX}") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ConfigError(f"{path}: not of format {FORMAT}; {_FIX}")
    return content


def _write(path: Path, content: Result) -> None:
    write_atomically(path, orjson.dumps(content, option=orjson.OPT_INDENT_2))


def names_of(runs: Sequence[Path]) -> list[str]:
    """The folders' names where they differ, else their paths."""
    names = [run.resolve().name for run in runs]
    return names if len(set(names)) == len(names) else [str(run) for run in runs]


def show(console: Console, found: Mapping[str, Any]) -> None:
    """Print what `lightbulb evaluate` found: ``runs`` and ``tasks``, both by run, and the ensemble's folder ``out``."""
    tables = [bits_table(found["runs"]) if found["runs"] else None, experts_table(found["runs"])]
    for table in filter(None, [*tables, tasks_table(found["tasks"])]):
        console.print(table)
    if "out" in found:
        ensemble = found["runs"]["ensemble"]
        console.print(
            f"ensemble: {ensemble['branches_in_use']:.2f} branches in use, {ensemble['flops_per_token']:.3g} FLOPs per "
            f"token; {found['out']}/{FILE}"
        )


@contextmanager
def reading_bar(name: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr that shows how many contexts a model has read."""
    columns = (TextColumn(name), BarColumn(), MofNCompleteColumn(), TextColumn("contexts"), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(name, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def bits_table(results: Mapping[str, Result]) -> Table:
    """Bits per byte of results by name, a column each; the best of a row is bold."""
    table = Table("held-out text", *results, title="Bits per byte (lower is better)")
    for column in table.columns[1:]:
        column.justify = "right"
    _add(table, "everything", [result["bpb"] for result in results.values()])
    for kind in ("domain_bpb", "cluster_bpb"):
        names = sorted({name for result in results.values() for name in result[kind]})
        for number, name in enumerate(names):
            if number == 0:
                table.add_section()
            _add(table, name, [result[kind].get(name) for result in results.values()])
    return table


def _add(table: Table, name: str, values: Sequence[float | None]) -> None:
    known = [value for value in values if value is not None]
    best = min(known) if len(values) > 1 else None
    cells = ["" if v is None else f"[bold green]{v:.4f}[/]" if v == best else f"{v:.4f}" for v in values]
    table.add_row(name, *cells)


def experts_table(results: Mapping[str, Result]) -> Table | None:
    """Specialisation of each layer with a router, or None where no result has one."""
    table = Table("run", "layer", "bits", "of the most", "dead", "overloaded", title="What experts tell of domains")
    table.columns[1].no_wrap = True
    for run, result in results.items():
        for name, layer in result.get("experts", {}).get("layers", {}).items():
            part = layer["domain"]["specialisation"]
            table.add_row(
                run, name, f"{layer['domain']['information_bits']:.3f}", "" if part is None else f"{part:.1%}",
                _listed(layer["dead"]), _listed(layer["overloaded"]),
            )  # fmt: skip
    return table if table.row_count else None


def tasks_table(results: Mapping[str, Result]) -> Table | None:
    """Metrics of tasks, runs side by side; ``results`` are the tasks of each run."""
    rows = sorted({(task, metric) for tasks in results.values() for task in tasks for metric in tasks[task]["metrics"]})
    table = Table("task", "metric", *results, title="Tasks")
    for task, metric in rows:
        values = [tasks.get(task, {}).get("metrics", {}).get(metric) for tasks in results.values()]
        table.add_row(task, metric, *["" if value is None else f"{value:.4f}" for value in values])
    return table if rows else None


def _listed(experts: Sequence[int]) -> str:
    return ", ".join(map(str, experts)) or "none"
