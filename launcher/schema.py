"""Print the JSON schema of a config file, for editors: `lightbulb schema run > run.schema.json`.

With the YAML language server, `# yaml-language-server: $schema=run.schema.json` in the first line of a config gives
completion and checks.
"""

import argparse
import json
import sys
from collections.abc import Sequence

from lightbulb.config import Config
from lightbulb.data_prep.config import CorpusConfig
from lightbulb.experts.branch_config import BranchConfig
from lightbulb.experts.fuse_config import FuseConfig
from lightbulb.experts.upcycle_config import UpcycleConfig
from lightbulb.recipes.config import RecipeConfig
from lightbulb.train.config import RunConfig

SCHEMAS: dict[str, type[Config]] = {
    "run": RunConfig,
    "corpus": CorpusConfig,
    "branch": BranchConfig,
    "upcycle": UpcycleConfig,
    "fuse": FuseConfig,
    "recipe": RecipeConfig,
}
# not a field: load_config reads and removes it
BASE = {"type": "string", "description": "File, relative to this one, whose settings this file changes."}


def main(argv: Sequence[str]) -> int:
    """Run the command; gives the exit code."""
    parser = argparse.ArgumentParser(prog="lightbulb schema", description=__doc__.partition(":")[0] + ".")
    parser.add_argument(
        "name", choices=SCHEMAS, help="run: of lightbulb pretrain; corpus: of preprocess; the others: of the commands"
    )
    schema = SCHEMAS[parser.parse_args(argv).name].model_json_schema()
    schema["properties"] = {"base": BASE} | schema["properties"]
    # what the base has given need not be given again
    required = schema.pop("required", [])
    schema["anyOf"] = [{"required": required}, {"required": ["base"]}]
    print(json.dumps({"$schema": "https://json-schema.org/draft/2020-12/schema"} | schema, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
