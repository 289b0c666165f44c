"""The `lightbulb` command: a table of subcommands, each imported only when it is called.

`lightbulb COMMAND --help` explains one. Every command is a module of this package with ``main(argv) -> exit code``.
"""

import importlib
import os
import sys
from collections.abc import Sequence

from lightbulb.registry import nearest

COMMANDS: dict[str, tuple[str, str]] = {
    "doctor": ("lightbulb.launcher.doctor", "show what is installed, what is missing and what that costs"),
    "preprocess": ("lightbulb.launcher.preprocess", "write a corpus as shards of tokens"),
    "inspect": ("lightbulb.launcher.inspect", "show what is in a corpus: tables, documents, histograms"),
    "pretrain": ("lightbulb.launcher.pretrain", "train a model on shards; resumes where it stopped"),
    "branch-decay": ("lightbulb.launcher.branch_decay", "fork a stable run into decays with other mixtures"),
    "finetune": ("lightbulb.launcher.finetune", "go on from a run: routers, experts, LoRA, prompts and answers"),
    "tree": ("lightbulb.launcher.tree", "draw where runs came from: branches, decays, mixtures"),
    "verify": ("lightbulb.launcher.verify", "check a corpus, or a run's checkpoints, sample ledger and data"),
    "ledger": ("lightbulb.launcher.ledger", "say what a run was trained on: documents, steps, epochs"),
    "prove": ("lightbulb.launcher.prove", "compare every parallel layout with one process"),
    "branch": ("lightbulb.launcher.branch", "train one expert for each cluster of a corpus, from one seed"),
    "recipe": ("lightbulb.launcher.recipe", "grow a mixture of experts from a corpus, all stages"),
    "upcycle": ("lightbulb.launcher.upcycle", "make a mixture of experts of dense models"),
    "pack": ("lightbulb.launcher.pack", "write a ternary model with packed weights, for generate"),
    "evaluate": ("lightbulb.launcher.evaluate", "bits per byte by domain, expert use, ensembles, lm-eval tasks"),
    "generate": ("lightbulb.launcher.generate", "continue a prompt with a trained model"),
    "export": ("lightbulb.launcher.export", "write a run's model as a Hugging Face folder, with a receipt"),
    "import": ("lightbulb.launcher.import_model", "write a Hugging Face model as a run, with a receipt"),
    "report": ("lightbulb.launcher.report", "draw a run's curves and write report.html"),
    "parts": ("lightbulb.launcher.parts", "list the mixers, experts and modifiers a model can be made of"),
    "schema": ("lightbulb.launcher.schema", "print the JSON schema of a config file"),
}
"""Command to its module and its line of help."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; gives the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage(), file=sys.stdout if arguments else sys.stderr)
        return 0 if arguments else 2
    name, *rest = arguments
    if name not in COMMANDS:
        print(f"error: no command {name!r}{nearest(name, list(COMMANDS))}; see lightbulb --help", file=sys.stderr)
        return 2
    return run_command(name, rest)


def usage() -> str:
    """The table of commands."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {about}" for name, (_, about) in COMMANDS.items()]
    return "\n".join(["usage: lightbulb COMMAND ...", "", *lines, "", "lightbulb COMMAND --help explains one."])


def run_command(name: str, argv: list[str]) -> int:
    """Import the command's module and call its ``main``."""
    try:
        return importlib.import_module(COMMANDS[name][0]).main(argv)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "lightbulb"):
            raise
        print(f"error: lightbulb {name} needs the package {package!r}; see lightbulb doctor", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # the reader (head, less) has gone: nothing is wrong, but Python's own flush at exit would complain
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


if __name__ == "__main__":
    sys.exit(main())
