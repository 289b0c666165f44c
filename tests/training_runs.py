"""A small pretraining run as tests start it, and what its folder says."""

import json
import time
from pathlib import Path
from typing import Any

import yaml

STEPS = 12
TRAIN: dict[str, Any] = {
    "steps": STEPS, "global_batch_size": 8, "micro_batch_size": 2, "precision": "fp32",
    "save_every": 3, "eval_every": 5, "eval_contexts": 8,
}  # fmt: skip


def write_run_file(folder: Path, corpus: Path, name: str = "run", **changes: Any) -> Path:
    """Write ``NAME.yaml`` for a run in ``folder/NAME``; ``changes`` replace sections."""
    config = {
        "run": str(folder / name),
        "model": {
            "vocab_size": 512, "dim": 32, "num_layers": 2, "context_length": 32,
            "block_pattern": [{
                "token": {"type": "attention", "num_heads": 4, "num_kv_heads": 2, "qk_norm": True},
                "channel": {"type": "switch", "num_experts": 4, "hidden_dim": 32},
            }],
        },
        "data": {"path": str(corpus)},
        "optimizer": {"lr": 5.0e-3},
        "train": TRAIN,
    } | changes  # fmt: skip
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def losses(run: Path) -> dict[int, float]:
    """Loss of every step in the run's metrics, each step exactly once."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [(r["step"], r["loss"]) for r in records if r["kind"] == "train"]
    assert len(steps) == len(dict(steps)), "a step was written twice"
    return dict(steps)


def wait_for(condition, seconds=60.0):
    """Poll until the condition holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


def reached(run: Path, step: int) -> bool:
    """Whether the run has trained this step."""
    path = run / "metrics.jsonl"
    return path.exists() and f'"step":{step},' in path.read_text()


def step_reached(run: Path) -> int:
    """The last step in the run's metrics; 0 when there are none."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return max((json.loads(line)["step"] for line in lines if '"train"' in line), default=0)


def final_hashes(run: Path, step: int = STEPS) -> dict[str, str]:
    """Hashes of the tensors in a checkpoint."""
    manifest = json.loads((run / "checkpoints" / f"step-{step:08d}" / "manifest.json").read_text())
    return {name: entry["xxh3_128"] for name, entry in manifest["files"].items() if name.endswith(".safetensors")}
