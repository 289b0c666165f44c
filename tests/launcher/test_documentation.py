"""Commands that README.md and docs/ show exist, with the options and files they name."""

import re
from contextlib import suppress
from pathlib import Path

import pytest

from lightbulb.launcher.cli import COMMANDS, run_command

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SHOWN = re.compile(r"(?:^|`|/)lightbulb ([a-z][a-z-]*)((?:\\\n|[^`\n#])*)", re.MULTILINE)
"""A command at the beginning of a line or in backquotes, with what is behind it, continued lines too."""
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z_-]*")
PASSED_ON = {"--num_gpus"}
"""Options of deepspeed's launcher."""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_of_the_documentation_are_commands(page, capsys):
    for name, arguments in SHOWN.findall(page.read_text(encoding="utf-8")):
        assert name in COMMANDS, f"{page.name}: lightbulb {name}"
        known = PASSED_ON | set(OPTION.findall(_help(name, capsys)))
        for option in OPTION.findall(arguments):
            assert option in known, f"{page.name}: lightbulb {name} {option}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_files_of_the_documentation_are_there(page):
    text = page.read_text(encoding="utf-8")
    named = set(re.findall(r"\b(?:configs|benchmarks|tests)/[\w./-]+\.(?:yaml|py)\b", text))
    linked = {target for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text) if ":" not in target}
    missing = [name for name in named if not (ROOT / name).is_file()]
    missing += [target for target in linked if not (page.parent / target).exists()]
    assert not missing


def test_the_readme_shows_every_command_and_page():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert not [page.name for page in (ROOT / "docs").glob("*.md") if f"(docs/{page.name})" not in text]
    assert set(COMMANDS) - set(re.findall(r"\blightbulb ([a-z-]+)", text)) == set()


def _help(name: str, capsys) -> str:
    with suppress(SystemExit):
        run_command(name, ["--help"])
    return capsys.readouterr().out
