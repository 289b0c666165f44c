"""The whole way with the real launcher: `deepspeed` starts two ranks, then the run is sampled and reported."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent.parent
BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def trained(tmp_path_factory, corpus):
    """A run of a few steps, started the way users start it."""
    folder = tmp_path_factory.mktemp("deepspeed")
    config = {
        "run": str(folder / "run"),
        "model": {
            "vocab_size": 512, "dim": 32, "num_layers": 2, "context_length": 32, "tie_embeddings": True,
            "block_pattern": [{
                "token": {"type": "attention", "num_heads": 2},
                "channel": {"type": "switch", "num_experts": 4, "hidden_dim": 32},
            }],
        },
        "data": {"path": str(corpus)},
        "parallel": {"expert": 2},
        "optimizer": {"lr": 1.0e-2},
        "train": {"steps": 30, "global_batch_size": 16, "micro_batch_size": 8, "eval_every": 10},
        "prompts": ["1 plus", "7 times [2]"],
    }  # fmt: skip
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    environment = os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}"}
    options = ["--num_gpus", "2", "--master_port", "29517"]
    command = [BIN / "deepspeed", *options, "launcher/pretrain.py", folder / "run.yaml"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "run", done.stdout


def test_the_run_folder_holds_everything(trained):
    run, output = trained
    summary = json.loads((run / "summary.json").read_text())
    keys = {
        "held_out_bpb", "unigram_bpb", "gzip_context_bpb", "gzip_all_bpb", "xz_all_bpb",
        "steps", "tokens", "tokens_per_second", "world_size", "layout",
    }  # fmt: skip
    assert keys <= summary.keys()
    assert (summary["world_size"], summary["layout"], summary["steps"]) == (2, "TP1xPP1xEP2xDP2", 30)
    assert summary["tokens"] == 30 * 16 * 32
    assert summary["held_out_bpb"] < summary["unigram_bpb"]
    for name in ("config.yaml", "tokenizer.json", "report.html", "loss.png", "experts.png", "throughput.png"):
        assert (run / name).stat().st_size > 0
    assert list((run / "tensorboard").iterdir())
    assert "this model" in output
    assert "7 times [2]" in output


def test_loss_falls_and_every_metric_is_there(trained):
    records = [json.loads(line) for line in (trained[0] / "metrics.jsonl").read_text().splitlines()]
    train = [r for r in records if r["kind"] == "train"]
    assert train[-1]["loss"] < train[0]["loss"] - 0.5
    assert 0 < train[-1]["mfu"] < 1
    assert all(abs(sum(load) - 1) < 1e-9 for r in train for load in r["expert_load"].values())
    assert [r["step"] for r in records if r["kind"] == "eval"] == [10, 20, 30]


@pytest.mark.parametrize("options", [["--temperature", "0.8", "--top-k", "5"], ["--num-beams", "4"]])
def test_generate_continues_the_prompt(trained, start, options):
    command = start("generate", [str(trained[0]), "--prompt", "1 plus", "--max-new-tokens", "8", *options])
    assert command.wait() == 0, command.text()
    assert command.text().strip()
    assert "Traceback" not in command.text()


def test_generate_on_something_else_says_what_it_wants(start, tmp_path):
    command = start("generate", [str(tmp_path), "--prompt", "x"])
    assert command.wait() == 1
    assert "not a run folder" in command.text()
