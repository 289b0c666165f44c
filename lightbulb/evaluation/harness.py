"""Tasks of EleutherAI's lm-eval-harness (Gao et al. 2021, doi:10.5281/zenodo.5371628) on a run, from local files.

:class:`LightBulbLM` is a model of the harness that reads a run's sharded checkpoint, registered there as ``lightbulb``.
:func:`evaluate_tasks` runs the tasks of YAML files whose data sets lie beside them; nothing is asked of a hub.

Contexts of one length are read together, and once, however many continuations follow: each goes on from a copy of the
decode state. Importing this module needs the package ``lm_eval`` (``pip install 'lightbulb[eval]'``).
"""

import contextlib
import hashlib
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # both are read when the packages are imported
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

import torch
from jinja2 import TemplateError
from lm_eval import simple_evaluate, utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.tasks import TaskManager
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from lightbulb.config import ConfigError
from lightbulb.data.loader import IGNORED_LABEL
from lightbulb.evaluation.results import FILE, find_task, record_task
from lightbulb.evaluation.runs import EvaluationConfig, Subject
from lightbulb.inference.generate import TextStream, reorder_state, sample_next

T = TypeVar("T")
BOOTSTRAP = 1000
"""Resamples for the standard errors that have no formula."""
MAX_NEW_TOKENS = 256
"""Where a task says nothing."""

Request = tuple[tuple[str, str], list[int], list[int]]
"""Texts and token ids of a context and its continuation."""


@register_model("lightbulb")
class LightBulbLM(TemplateLM):
    """A run, or what `lightbulb pack` made of one, as the harness asks for it.

    Args:
        run: its folder.
        batch_size: sequences per forward pass.
        device: such as cpu; None for CUDA when there is a device.
        precision: fp32 or bf16; None for the run's own.
        max_batch_size: which the harness passes on, and nobody needs.

    Raises:
        CheckpointError: no run, or one without an intact checkpoint.
        ConfigError: a setting is wrong.
    """

    def __init__(
        self,
        run: str | Path,
        batch_size: int | str = 8,
        device: str | None = None,
        precision: str | None = None,
        max_batch_size: int | None = None,
    ):
        super().__init__()
        options = {"batch_size": batch_size, "device": device, "precision": precision}
        self.subject = Subject(Path(run), EvaluationConfig.model_validate(options))
        self.batch_size = self.subject.options.batch_size
        self.model = self.subject.load()
        self.codec = self.subject.tokenizer
        self._device = next(self.model.parameters()).device

    @property
    def eot_token_id(self) -> int:
        return self.codec.eos_id

    @property
    def tokenizer_name(self) -> str:
        return self.codec.digest

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        return self.codec.encode_batch([string])[0]

    @torch.no_grad()
    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        found: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        by_context: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for number, (_, context, continuation) in enumerate(requests):
            by_context[tuple(self._cut(context, continuation))].append(number)
        with tqdm(total=len(requests), desc="loglikelihood", disable=disable_tqdm) as progress:
            for contexts in _of_one_length(by_context, self.batch_size):
                for numbers, answers in self._score(contexts, by_context, requests):
                    for number, answer in zip(numbers, answers, strict=True):
                        found[number] = answer
                        self.cache_hook.add_partial("loglikelihood", requests[number][0], answer)
                    progress.update(len(numbers))
        return found

    def _score(
        self, contexts: list[tuple[int, ...]], by_context: dict[tuple[int, ...], list[int]], requests: list[Request]
    ) -> Iterator[tuple[list[int], list[tuple[float, bool]]]]:
        """Numbers and answers of all requests with these contexts, which have one length."""
        rows = [(row, number) for row, context in enumerate(contexts) for number in by_context[context]]
        longest = max(len(requests[number][2]) for _, number in rows)
        prefix = torch.tensor(contexts, device=self._device)
        first, state = self.model.decode(prefix, self.model.init_state(len(contexts), prefix.shape[1] + longest))
        for part in _parts(rows, self.batch_size):
            row = torch.tensor([row for row, _ in part], device=self._device)
            numbers = [number for _, number in part]
            ids = [torch.tensor(requests[number][2]) for number in numbers]
            labels = pad_sequence(ids, batch_first=True, padding_value=IGNORED_LABEL).to(self._device)
            logits = first[row, -1:]
            if labels.shape[1] > 1:  # behind a shorter continuation stands what no earlier token sees
                later, _ = self.model.decode(labels[:, :-1].clamp_min(0), reorder_state(state, row))
                logits = torch.cat([logits, later], dim=1)
            yield numbers, _answers(logits, labels)

    def _cut(self, context: Sequence[int], continuation: Sequence[int]) -> Sequence[int]:
        """The end of the context that fits before the continuation."""
        room = self.model.context_length + 1 - len(continuation)
        if room < 1:
            raise ConfigError(
                f"a continuation has {len(continuation)} tokens, the model's context_length is "
                f"{self.model.context_length}; leave the task out, or score it with output_type loglikelihood_rolling"
            )
        return context[-room:]

    @torch.no_grad()
    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        windows = []
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            for inputs, labels in utils.get_rolling_token_windows(
                ids, self.prefix_token_id, self.model.context_length, context_len=1
            ):
                ignored = [IGNORED_LABEL] * (len(inputs) - len(labels))
                windows.append((number, torch.tensor(inputs), torch.tensor(ignored + labels)))
        windows.sort(key=lambda window: -len(window[1]))
        found = [0.0] * len(requests)
        with tqdm(total=len(windows), desc="loglikelihood_rolling", disable=disable_tqdm) as progress:
            for part in _parts(windows, self.batch_size):
                tokens = pad_sequence([inputs for _, inputs, _ in part], batch_first=True)
                labels = pad_sequence([label for *_, label in part], batch_first=True, padding_value=IGNORED_LABEL)
                losses = self.model(tokens.to(self._device), labels.to(self._device))
                for (number, *_), nats in zip(part, losses.double().sum(1).tolist(), strict=True):
                    found[number] -= nats
                progress.update(len(part))
        for request, answer in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, answer)
        return found

    @torch.no_grad()
    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        found = [""] * len(requests)
        alike: dict[tuple[int, str], list[int]] = defaultdict(list)
        prompts = [self._prompt(*request.args) for request in requests]
        for number, (request, prompt) in enumerate(zip(requests, prompts, strict=True)):
            alike[len(prompt), repr(sorted(request.args[1].items()))].append(number)
        with tqdm(total=len(requests), desc="generate_until", disable=disable_tqdm) as progress:
            for _, numbers in sorted(alike.items(), reverse=True):
                for part in _parts(numbers, self.batch_size):
                    texts = self._continue([prompts[number] for number in part], requests[part[0]].args[1])
                    for number, text in zip(part, texts, strict=True):
                        found[number] = text
                        self.cache_hook.add_partial("generate_until", requests[number].args, text)
                    progress.update(len(part))
        return found

    def _prompt(self, text: str, settings: dict[str, Any]) -> list[int]:
        """Its end, which leaves room for what is to be generated, but at least half of what the model can read."""
        length = self.model.context_length
        wanted = settings.get("max_gen_toks", MAX_NEW_TOKENS)
        return (self.tok_encode(text) or [self.eot_token_id])[-max(length - wanted, length // 2) :]

    def _continue(self, prompts: list[list[int]], settings: dict[str, Any]) -> list[str]:
        """Continuations of prompts of one length, each up to its first stop text or the end of text."""
        until = settings.get("until") or []
        stops = [until] if isinstance(until, str) else [stop for stop in until if stop]
        temperature = settings.get("temperature", 1.0) if settings.get("do_sample") else 0.0
        sampling = {"temperature": temperature, "top_k": settings.get("top_k", 0), "top_p": settings.get("top_p", 1.0)}
        generator = torch.Generator().manual_seed(0)
        wanted = settings.get("max_gen_toks", MAX_NEW_TOKENS)
        tokens = torch.tensor(prompts, device=self._device)
        limit = min(wanted, self.model.context_length - tokens.shape[1])
        state = self.model.init_state(len(prompts), tokens.shape[1] + limit)
        streams, texts, is_open = [TextStream() for _ in prompts], [""] * len(prompts), [True] * len(prompts)
        for _ in range(limit):
            logits, state = self.model.decode(tokens, state)
            chosen = sample_next(logits[:, -1], generator=generator, **sampling)
            for row, token in enumerate(chosen.tolist()):
                is_open[row] = is_open[row] and token != self.eot_token_id
                if is_open[row]:
                    texts[row] += streams[row].feed(self.codec.decode_bytes([token]))
                    is_open[row] = not any(stop in texts[row] for stop in stops)
            if not any(is_open):
                break
            tokens = chosen[:, None]
        whole = [text + stream.finish() for text, stream in zip(texts, streams, strict=True)]
        return [text[: min((text.index(s) for s in stops if s in text), default=len(text))] for text in whole]


def _answers(logits: Tensor, labels: Tensor) -> list[tuple[float, bool]]:
    """Log-likelihood of each row's labels, and whether all of them are the most likely ones."""
    counted = labels != IGNORED_LABEL
    log_p = logits.double().log_softmax(-1).gather(-1, labels.clamp_min(0)[..., None])[..., 0]
    is_best = (logits.argmax(-1) == labels) | ~counted
    return list(zip(log_p.where(counted, 0.0).sum(1).tolist(), is_best.all(1).tolist(), strict=True))


def _of_one_length(contexts: Sequence[tuple[int, ...]] | dict, size: int) -> Iterator[list[tuple[int, ...]]]:
    """Contexts of one length together, at most ``size``, the longest first."""
    by_length: dict[int, list[tuple[int, ...]]] = defaultdict(list)
    for context in contexts:
        by_length[len(context)].append(context)
    for _, alike in sorted(by_length.items(), reverse=True):
        yield from _parts(alike, size)


def _parts(items: list[T], size: int) -> Iterator[list[T]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def evaluate_tasks(subject: Subject, path: Path, again: bool = False) -> dict[str, Any]:
    """Run tasks on a run, or read what they gave before; writes ``evaluation.json``.

    Data files are named relative to the folder of the tasks (``dataset_path: json`` with ``dataset_kwargs:
    {data_files: {test: questions.json}}``). A task is run again when any file in that folder has changed.

    Args:
        subject: the run.
        path: a YAML file, or a folder of them. Python that they name is run.
        again: run tasks whose results are known.

    Returns:
        the results by task: ``metrics`` and ``samples``.

    Raises:
        ConfigError: no task there, or one that cannot be read.
        CheckpointError: the run cannot be read.
        FolderError: the run folder cannot be written.
    """
    folder = (path if path.is_dir() else path.parent).resolve()
    manager, names = _tasks_of(path, folder)
    file = subject.folder.resolve() / FILE
    on = {"tasks": _digest(folder)}
    kept = {name: None if again else find_task(file, name, subject.key | on) for name in names}
    known = {name: result for name, result in kept.items() if result is not None}
    wanted = [name for name in names if name not in known]
    if wanted:
        options = subject.options
        model = LightBulbLM(subject.folder.resolve(), options.batch_size, options.device, options.precision)
        results = _run(model, wanted, manager, folder)
        for name in wanted:
            known[name] = {"key": model.subject.key | on} | results[name]
            record_task(file, name, known[name])
    return {name: known[name] for name in names}


def _tasks_of(path: Path, folder: Path) -> tuple[TaskManager, list[str]]:
    if not path.exists():
        raise ConfigError(f"--tasks: {path}: no such file; name a task's YAML file, or a folder of them")
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    files = {name: manager.task_index[name].yaml_path for name in manager.all_subtasks}
    names = [name for name, file in files.items() if path.is_dir() or (file and file.resolve() == path.resolve())]
    if not names:
        raise ConfigError(f"--tasks: {path}: no task of lm-eval-harness; a task is a YAML file with the key 'task'")
    return manager, names


def _run(model: LightBulbLM, names: list[str], manager: TaskManager, folder: Path) -> dict[str, Any]:
    try:
        with contextlib.chdir(folder):
            found = simple_evaluate(
                model, tasks=names, task_manager=manager, log_samples=False, bootstrap_iters=BOOTSTRAP
            )
    except (OSError, ValueError, KeyError, TypeError, TemplateError) as error:
        raise ConfigError(f"--tasks: {folder}: {', '.join(names)} cannot be run: {error}") from error
    return {
        name: {"metrics": _metrics(found["results"][name]), "samples": found["n-samples"][name]["effective"]}
        for name in names
    }


def _metrics(found: dict[str, Any]) -> dict[str, float]:
    """The numbers among a task's results, whose names are ``acc,none`` for a metric without a filter."""
    named = {key.removesuffix(",none"): value for key, value in found.items() if "," in key}
    return {name: float(value) for name, value in named.items() if isinstance(value, int | float)}


def _digest(folder: Path) -> str:
    """Of every file in a folder of tasks."""
    hasher = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts):
        hasher.update(f"{path.relative_to(folder)}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            hasher.update(hashlib.file_digest(file, "sha256").digest())
    return hasher.hexdigest()
