"""`lightbulb parts`, and the page that shows what it prints."""

import json
from pathlib import Path

import pytest

from lightbulb.launcher.parts import KINDS, main, markdown, parts
from lightbulb.registry import names

PAGE = Path(__file__).parents[2] / "docs/parts.md"
MISSION = {
    "token mixer": {"attention", "block_sparse", "infini", "retention", "mamba", "moa"},
    "channel mixer": {"mlp", "kan", "switch", "lory", "deepseek_moe"},
    "modifier": {"bitlinear", "mixture_of_depths", "denseformer", "lora"},
}


def test_json_lists_every_part_with_its_axes_and_state(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    for kind, title in KINDS.items():
        found = {part["name"] for part in listed if part["kind"] == title}
        assert found == set(names(kind)) >= MISSION[title]
    for part in listed:
        assert part["shards"] and part["state"] and part["about"] and part["cost"], part
        assert "20" in part["paper"], part  # a year


def test_tables_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    printed = capsys.readouterr().out
    assert all(title + "s" in printed for title in KINDS.values())


@pytest.mark.parametrize("kind", KINDS.values())
def test_the_page_shows_what_the_command_prints(kind: str) -> None:
    assert markdown(kind) in PAGE.read_text(), "run `lightbulb parts --markdown` and put its tables into docs/parts.md"
    assert len(markdown(kind).splitlines()) == 2 + sum(part["kind"] == kind for part in parts())
