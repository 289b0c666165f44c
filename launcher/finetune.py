"""Fine-tune a run's model: routers, experts, everything or low-rank updates, on plain text or prompts and answers.

::

    lightbulb finetune configs/experts/finetune-routers.yaml train.steps=500          # one process
    deepspeed --num_gpus 8 launcher/finetune.py configs/experts/finetune-sft.yaml     # and all other ways of pretrain
    lightbulb finetune configs/experts/finetune-lora.yaml --restart 3 --num_gpus 8

Reads a run (`start_from`) and a corpus that `lightbulb preprocess` wrote with the run's tokenizer; writes an ordinary
run folder, and with `merge: true` RUN/merged, in which low-rank updates are part of the weights. Run again, it resumes.
Next: `lightbulb generate RUN`, `lightbulb export RUN OUT`.
"""

import sys
from pathlib import Path

if sys.path and Path(sys.path[0]) == Path(__file__).parent:
    del sys.path[0]  # as in pretrain.py

import errno
import shutil
from functools import partial

from lightbulb.config import ConfigError
from lightbulb.data.config import DataError
from lightbulb.data.tokenizer import TokenizerError
from lightbulb.experts.merge_updates import merge_updates
from lightbulb.experts.receipt import RECEIPT, ReceiptError
from lightbulb.folder import FolderError
from lightbulb.launcher.pretrain import Prepared, make_parser, train
from lightbulb.train.finetune import Finetuning, load_finetune_config
from lightbulb.train.manifest import CheckpointError, step_folder
from lightbulb.train.origin import Parent, parent_of, read_origin, write_origin

MERGED = "merged"
REFUSALS = (CheckpointError, ConfigError, DataError, FolderError, ReceiptError, TokenizerError)


def main(argv: list[str]) -> int:
    """Run the command; 0 when the run is complete or was stopped by a signal after saving."""
    return train(argv, make_parser("finetune", "Fine-tune a run's model."), prepare, __file__)


def prepare(path: str, overrides: list[str]) -> Prepared:
    """The run that a fine-tuning file describes, and what follows it."""
    plan = load_finetune_config(path, overrides)
    return Prepared(plan.run, partial(finish, plan))


def finish(plan: Finetuning) -> int:
    """Say in the run's folder that it was fine-tuned, and merge the updates of its last step, unless that was done."""
    folder = Path(plan.run.run).expanduser()
    out = folder / MERGED
    try:
        origin = read_origin(folder)
        if origin is not None and origin.kind == "start":
            detail = {"trainable": plan.run.train.trainable}
            write_origin(folder, origin.model_copy(update={"kind": "finetune", "detail": detail}))
        if plan.merge and not _is_merged(out, parent_of(step_folder(folder, plan.run.train.steps))):
            shutil.rmtree(out, ignore_errors=True)  # of an earlier step
            receipt = merge_updates(folder, out, plan.run.data.path.expanduser())
            assert receipt.comparison is not None
            print(f"merged: {out}; greatest difference of a logit {receipt.comparison.greatest_difference:.2g}")
    except REFUSALS as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _is_merged(out: Path, last: Parent) -> bool:
    """Whether the folder holds this checkpoint's updates, merged; an empty or missing one does not."""
    if not out.exists():
        return False
    origin = read_origin(out)
    if origin is None or not (out / RECEIPT).exists():
        raise FolderError(errno.EEXIST, f"{out}: no merged model of ours; move it away")
    return origin.parents == [last]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
