"""Tasks through datatrove's executors for clusters: Ray for real where it is installed, Slurm as far as its script."""

import os
import sys
from pathlib import Path

import pytest

from lightbulb.config import load_config
from lightbulb.data_prep.config import CorpusConfig
from lightbulb.data_prep.pipeline import preprocess

DEBUG = Path(__file__).parents[2] / "configs" / "debug"


def texts_in(folder: Path) -> Path:
    folder.mkdir()
    for i in range(30):
        (folder / f"{i:02}.txt").write_text(f"text number {i}\n" * 50)
    return folder


@pytest.mark.slow
def test_ray_gives_the_same_bytes(tmp_path: Path) -> None:
    ray = pytest.importorskip("ray", reason="ray is not installed: pip install ray")
    source = {"type": "text", "path": str(texts_in(tmp_path / "texts"))}
    values = {"sources": [source], "context_length": 32, "tokenizer": {"vocab_size": 300}, "task_bytes": 8_000}
    local = CorpusConfig.model_validate(values | {"output": tmp_path / "local", "executor": {"workers": 1}})
    preprocess(local)
    remote = load_config(CorpusConfig, DEBUG / "corpus-ray.yaml").executor
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        preprocess(CorpusConfig.model_validate(values | {"output": tmp_path / "ray", "executor": remote}))
    finally:
        ray.shutdown()
    for path in (path for path in local.output.rglob("*") if path.is_file()):
        assert (tmp_path / "ray" / path.relative_to(local.output)).read_bytes() == path.read_bytes()


SBATCH = """#!/bin/bash
# A cluster of one node: runs the array's jobs at once, and has nothing queued afterwards.
script=$(cat); [ -z "$script" ] && script=$(cat "${@: -1}")
last=$(grep -oP '(?<=--array=0-)[0-9]+' <<< "$script")
case "$script" in *launch_pickled_pipeline*)
  for i in $(seq 0 "${last:-0}"); do
    SLURM_ARRAY_TASK_ID=$i RUN_OFFSET=0 SLURM_NODELIST=node bash -c "$script" >> "$LOG" 2>&1
  done;;
esac
echo Submitted batch job 1
"""
SRUN = """#!/bin/bash
while [ "${1:0:1}" = "-" ]; do [ "$1" = "-n" ] && shift; shift; done
exec "$@"
"""


@pytest.mark.slow
def test_slurm_array_of_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """datatrove's script for sbatch, run by a stand-in for the scheduler: every task finds its rank and its step."""
    programs = tmp_path / "bin"
    programs.mkdir()
    contents = {"sbatch": SBATCH, "srun": SRUN, "squeue": "#!/bin/bash\n", "scontrol": "#!/bin/bash\necho node\n"}
    for name, content in contents.items():
        (programs / name).write_text(content)
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.setenv("LOG", str(tmp_path / "log"))
    source = {"type": "text", "path": str(texts_in(tmp_path / "texts"))}
    values = {"sources": [source], "context_length": 32, "tokenizer": {"vocab_size": 300}, "task_bytes": 8_000}
    executor = load_config(CorpusConfig, DEBUG / "corpus-slurm.yaml").executor
    executor = executor.model_copy(update={"options": executor.options | {"venv_path": None}})
    preprocess(CorpusConfig.model_validate(values | {"output": tmp_path / "slurm", "executor": executor}))
    preprocess(CorpusConfig.model_validate(values | {"output": tmp_path / "local", "executor": {"workers": 1}}))
    for path in (path for path in (tmp_path / "local").rglob("*") if path.is_file()):
        assert (tmp_path / "slurm" / path.relative_to(tmp_path / "local")).read_bytes() == path.read_bytes()
