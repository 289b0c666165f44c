"""Pretrain a model from a run file, on one process or many.

::

    deepspeed --num_gpus 8 launcher/pretrain.py configs/pretrain/NAME.yaml train.steps=1000
    deepspeed --hostfile hosts launcher/pretrain.py configs/pretrain/NAME.yaml      # several machines
    torchrun --nproc-per-node 8 launcher/pretrain.py configs/pretrain/NAME.yaml
    python launcher/pretrain.py configs/debug/quickstart.yaml                        # one process
    lightbulb pretrain configs/debug/quickstart.yaml                                 # the same

Reads a corpus written by `lightbulb preprocess`; writes the run folder (config, metrics, checkpoints, samples,
report). Run again, it resumes. Next: `lightbulb generate RUN`.
"""

import argparse
import logging
import sys

import torch.distributed as dist

from lightbulb.config import ConfigError, load_config
from lightbulb.data.config import DataError
from lightbulb.evaluation.finish import finish_run
from lightbulb.folder import FolderError
from lightbulb.parallel.collective import RankError
from lightbulb.parallel.host import pick_device, process_group, share_cores, tune_allocator
from lightbulb.train.checkpoint import CheckpointError
from lightbulb.train.config import RunConfig
from lightbulb.train.loop import TrainingError, open_trainer

EXPECTED = (ConfigError, DataError, FolderError, CheckpointError, TrainingError, RankError)


def main(argv: list[str]) -> int:
    """Run the command; 0 when the run is complete or was stopped by a signal after saving."""
    parser = argparse.ArgumentParser(prog="lightbulb pretrain", description="Pretrain a model from a run file.")
    parser.add_argument("config", help="run file (YAML)")
    parser.add_argument("overrides", nargs="*", help="settings such as train.steps=100")
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # some launchers add it
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    logging.getLogger("lightbulb").setLevel(logging.INFO)
    try:
        return pretrain(load_config(RunConfig, arguments.config, arguments.overrides))
    except EXPECTED as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def pretrain(config: RunConfig) -> int:
    """Train, evaluate on everything held out, and write what the run learned."""
    tune_allocator()
    share_cores()
    device = pick_device()
    with process_group(device):
        logging.getLogger("lightbulb").setLevel(logging.INFO if dist.get_rank() == 0 else logging.ERROR)
        with open_trainer(config, device) as trainer:
            finished = trainer.run()
            held_out = trainer.evaluate() if finished else None
            facts = trainer.facts()
            settled, folder = trainer.config, trainer.folder
        if dist.get_rank() == 0 and held_out is not None:
            finish_run(folder, settled, facts | held_out)
        elif dist.get_rank() == 0:
            print(f"stopped at step {facts['steps']} of {settled.train.steps}; run the same command to go on")
        dist.barrier()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
