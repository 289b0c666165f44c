"""Look at a corpus: `lightbulb inspect DIR [--samples N] [--split held_out] [--plot FILE.png]`.

Shows what the manifest says of sources and groups, prints pieces of documents as they were written
(of conversations with what counts towards the loss in brackets), and draws the
lengths of the documents and the sizes of the domains. Reads only what `lightbulb preprocess` wrote; the picture goes
beside the corpus unless --plot names a file. `lightbulb verify DIR` checks every byte.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text

from lightbulb.data.tokenizer import TokenizerError
from lightbulb.data_prep.counts import CorpusError
from lightbulb.data_prep.inspect import Sample, draw, open_manifest, samples, tables


def main(argv: Sequence[str]) -> int:
    """Run the command; gives the exit code."""
    parser = argparse.ArgumentParser(prog="lightbulb inspect", description="Show what is in a corpus.")
    parser.add_argument("corpus", metavar="DIR", type=Path, help="folder that lightbulb preprocess wrote")
    parser.add_argument("--samples", type=int, default=3, metavar="N", help="how many pieces of documents to show")
    parser.add_argument("--split", default="train", help="where they come from: train (default) or held_out")
    parser.add_argument("--seed", type=int, default=0, help="draws them")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="where the picture goes (default: DIR.png)")
    arguments = parser.parse_args(argv)
    folder: Path = arguments.corpus
    plot = arguments.plot or folder.with_name(f"{folder.resolve().name}.png")
    console = Console()
    try:
        manifest = open_manifest(folder)
        for table in tables(manifest):
            console.print(table)
        for sample in samples(folder, manifest, arguments.split, arguments.samples, arguments.seed):
            console.rule(f"{sample.place}, {sample.tokens} tokens")
            console.print(shown(sample), highlight=False, soft_wrap=True)
        draw(folder, plot)
    except (CorpusError, TokenizerError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    console.print(f"{plot}: lengths and domains", markup=False, highlight=False)
    return 0


def shown(sample: Sample) -> Text:
    """The sample's text; where some of it does not count towards the loss, what counts stands in coloured brackets."""
    if all(counts for _, counts in sample.parts):
        return Text("".join(text for text, _ in sample.parts))
    parts = ((f"⟦{text}⟧", "bold green") if counts else (text, "") for text, counts in sample.parts)
    return Text.assemble(*parts)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
