"""Write a corpus as MDS shards: `lightbulb preprocess configs/debug/corpus.yaml [key=value ...]`."""

import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from lightbulb.config import ConfigError, load_config
from lightbulb.data.tokenizer import TokenizerError
from lightbulb.data_prep.config import CorpusConfig
from lightbulb.data_prep.counts import CorpusError
from lightbulb.data_prep.executor import ExecutorError
from lightbulb.data_prep.pipeline import preprocess

USAGE = "usage: lightbulb preprocess CONFIG [key=value ...]"


def main(argv: Sequence[str]) -> int:
    """Run the command; gives the exit code."""
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE, file=sys.stderr if not argv else sys.stdout)
        return 0 if argv else 2
    try:
        config = load_config(CorpusConfig, argv[0], argv[1:])
        manifest, is_up_to_date = preprocess(config)
    except (ConfigError, TokenizerError, CorpusError, ExecutorError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the next run goes on from here", file=sys.stderr)
        return 130
    console = Console()
    console.print(summary(manifest))
    for line in dropped(manifest):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    state = "up to date" if is_up_to_date else "written"
    console.print(f"{config.output}: {state}; tokenizer with {manifest['tokenizer']['vocab_size']:,} entries")
    return 0


def summary(manifest: dict[str, Any]) -> Table:
    """Sizes of each domain and split."""
    table = Table("split", "domain", *(("documents", "MB", "tokens", "rows", "bytes/token")))
    for column in table.columns[2:]:
        column.justify = "right"
    for split, domains in manifest["splits"].items():
        for domain, entry in domains.items():
            table.add_row(
                split,
                domain,
                f"{entry['documents']:,}",
                f"{entry['bytes'] / 1e6:.2f}",
                f"{entry['tokens']:,}",
                f"{entry['rows']:,}",
                f"{entry['bytes_per_token']:.3f}",
            )
    return table


def dropped(manifest: dict[str, Any]) -> list[str]:
    """One line per source and reason, naming the first document that was dropped for it."""
    return [
        f"dropped {count:,} {reason} from {entry['source']} (first: {entry['first_dropped'][reason]})"
        for entry in manifest["sources"]
        for reason, count in entry["dropped"].items()
    ]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
