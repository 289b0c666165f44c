"""Write a run's ternary model with packed weights: `lightbulb pack RUN OUT [--format base3]`.

Reads the newest checkpoint of a run folder that `lightbulb pretrain` wrote, with the modifier bitlinear. Writes a
folder that holds all that `lightbulb generate OUT` needs, which comes next, and a receipt of sizes and exactness
(packed.json): on text that the model writes, each packed layer is compared with the exact product of the same inputs,
and the logits with those of the quantised model. Nothing is left behind when a layer differs by more than rounding or a
logit by more than the bound.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from lightbulb.config import ConfigError
from lightbulb.data.tokenizer import Tokenizer, TokenizerError
from lightbulb.folder import FolderError
from lightbulb.inference.generate import GenerationError, SamplingConfig, generate
from lightbulb.models.language import LanguageModel
from lightbulb.ops import FORMATS
from lightbulb.train.checkpoint import CheckpointError, load_model_for_inference
from lightbulb.train.packed_folder import PackError, Receipt, write_packed

BOUND = 0.5
"""Of the greatest difference of a logit, in standard deviations of all. Layers are exact, which is checked one by one.
What surrounds them rounds, and where rounding moves an input's code, later layers see it: the quantised model itself in
float64 and in float32 differed by as much before it was trained."""
SAMPLE_TOKENS = 256


def main(argv: Sequence[str]) -> int:
    """Run the command; gives the exit code."""
    parser = argparse.ArgumentParser(prog="lightbulb pack", description="Write a ternary model with packed weights.")
    parser.add_argument("run", metavar="RUN", type=Path, help="folder of the run")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to write")
    parser.add_argument("--format", choices=FORMATS, default=FORMATS[0], help="4 (2bit) or 5 (base3) codes to a byte")
    about = f"greatest difference of a logit that is let through, in standard deviations (default {BOUND})"
    parser.add_argument("--bound", type=float, default=BOUND, help=about)
    options = parser.parse_args(argv)
    try:
        model, tokenizer, _ = load_model_for_inference(options.run)
        tokens = sample(model, tokenizer)
        receipt = write_packed(model, options.run, options.out, options.format, tokens, options.bound)
    except (CheckpointError, ConfigError, TokenizerError, GenerationError, PackError, FolderError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    show(receipt, options.out)
    return 0


def sample(model: LanguageModel, tokenizer: Tokenizer) -> Tensor:
    """``[1, length]`` tokens of a text that the model writes, as long as its context allows; always the same."""
    sampling = SamplingConfig(max_new_tokens=min(SAMPLE_TOKENS, model.context_length - 1))
    # No end of text: what comes behind it is as good to compare.
    ids = list(generate(model, [tokenizer.eos_id], sampling, eos_id=None))
    return torch.tensor([[tokenizer.eos_id, *ids]], device=next(model.parameters()).device)


def show(receipt: Receipt, out: Path) -> None:
    """Print a receipt."""
    before, after = receipt.bytes_before, receipt.bytes_after
    print(f"{out}: {receipt.layers} layers packed, {before / 1e6:.2f} MB in bfloat16 to {after / 1e6:.2f} MB,", end=" ")
    print(f"1/{before / after:.1f}")
    print(
        f"packed layers exact to {receipt.greatest_rounding:.1g} standard deviations of their results; "
        f"greatest difference of a logit {receipt.greatest_difference:.2g} standard deviations, the same choice for "
        f"{receipt.same_choices:.1%} of {receipt.tokens} tokens"
    )
    print(f"next: lightbulb generate {out}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
