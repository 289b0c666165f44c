"""What a finished run shows: held-out bits per byte beside baselines, samples, summary and report."""

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lightbulb.data.loader import HeldOut
from lightbulb.data.tokenizer import Tokenizer
from lightbulb.evaluation.compression import baselines, context_bytes
from lightbulb.folder import write_atomically
from lightbulb.inference.generate import SamplingConfig, generate
from lightbulb.train.checkpoint import load_model_for_inference
from lightbulb.train.config import RunConfig
from lightbulb.train.report import write_report

_NAMES = {
    "unigram_bpb": "bytes by their frequency",
    "gzip_context_bpb": "gzip -9 of each context by itself",
    "gzip_all_bpb": "gzip -9 of everything at once",
    "xz_all_bpb": "xz -9 of everything at once",
}


def finish_run(run: Path, config: RunConfig, facts: dict[str, Any]) -> None:
    """Compare, sample, and write ``summary.json``, ``samples.json`` and the report of a run (on one process)."""
    console = Console()
    with console.status("comparing with gzip and xz on the same text"):
        compared = _baselines(config)
    summary = facts | compared | {"baselines": {_NAMES[key]: value for key, value in compared.items()}}
    write_atomically(run / "summary.json", json.dumps(summary, indent=1))
    with console.status("sampling"):
        samples = _samples(run, config)
    write_atomically(run / "samples.json", json.dumps(samples, indent=1))
    console.print(_table(facts["held_out_bpb"], compared))
    for sample in samples:
        console.print(f"[bold]{_escaped(sample['prompt'])}[/bold]{_escaped(sample['text'])}\n", highlight=False)
    console.print(f"report: {write_report(run)}")


def _baselines(config: RunConfig) -> dict[str, float]:
    """The compressors on exactly the held-out contexts that were evaluated."""
    tokenizer = Tokenizer.load(config.data.path.expanduser() / "tokenizer.json")
    held_out = HeldOut(config.data, config.model.context_length, config.model.vocab_size, micro_batch_size=1)
    return baselines(context_bytes(held_out, tokenizer))


def _samples(run: Path, config: RunConfig, max_new_tokens: int = 60) -> list[dict[str, str]]:
    if not config.prompts:
        return []
    model, tokenizer, _ = load_model_for_inference(run)
    sampling = SamplingConfig(temperature=0.7, top_p=0.95, max_new_tokens=max_new_tokens, seed=config.seed)
    samples = []
    for prompt in config.prompts:
        ids = tokenizer.encode_batch([prompt])[0]
        text = tokenizer.decode(list(generate(model, ids, sampling, tokenizer.eos_id)))
        samples.append({"prompt": prompt, "text": text})
    return samples


def _table(held_out: float, compared: dict[str, float]) -> Table:
    rows = {**{_NAMES[key]: value for key, value in compared.items()}, "this model": held_out}
    table = Table("held-out text", "bits per byte", title="How well the text is predicted (lower is better)")
    for name, value in sorted(rows.items(), key=lambda row: -row[1]):
        style = "bold green" if name == "this model" else None
        table.add_row(name, f"{value:.3f}", style=style)
    return table


def _escaped(text: str) -> str:
    return text.replace("[", r"\[")
