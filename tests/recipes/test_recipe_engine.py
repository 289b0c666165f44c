"""The chain of stages: done once, gone on with, redone where something changed, nothing overwritten."""

from dataclasses import replace
from pathlib import Path

import orjson
import pytest

from lightbulb.folder import FolderError, FolderInUse, claim
from lightbulb.recipes.engine import Record, Stage, StageError, changes, duration, file_digest, read_record, run_stages


class Kitchen:
    """Three stages that write files: b reads a's, c reads b's; each counts how often it worked."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.settings = {"a": {"x": 1}, "b": {"y": {"z": 2}}, "c": {}}
        self.worked: list[str] = []
        self.fails = ""
        self.idle = ""

    def stages(self) -> list[Stage]:
        needs = {"a": (), "b": ("a",), "c": ("a", "b")}
        return [self._stage(name, needs[name]) for name in "abc"]

    def cook(self) -> list[str]:
        """Run the chain; gives the stages that worked."""
        self.worked.clear()
        run_stages(self.folder, self.stages())
        return list(self.worked)

    def _stage(self, name: str, needs: tuple[str, ...]) -> Stage:
        path = self.folder / name / "out.txt"

        def work() -> None:
            self.worked.append(name)
            path.parent.mkdir(exist_ok=True)
            (path.parent / "half").write_text("begun")
            if self.fails == name:
                raise RuntimeError("the power went")
            if self.idle != name:
                inputs = [(self.folder / other / "out.txt").read_text() for other in needs]
                path.write_text(f"{name} {self.settings[name]} {inputs}")

        return Stage(name, name, self.settings[name], needs, (path.parent,), work, lambda: file_digest(path))


@pytest.fixture
def kitchen(tmp_path):
    return Kitchen(tmp_path / "run")


def test_what_is_done_is_skipped(kitchen, capsys):
    assert kitchen.cook() == ["a", "b", "c"]
    assert kitchen.cook() == []
    assert capsys.readouterr().out.count("done already") == 3


@pytest.mark.parametrize("name", "abc")
def test_after_a_failure_the_stage_goes_on_and_the_rest_follows(kitchen, name):
    kitchen.fails = name
    with pytest.raises(RuntimeError):
        kitchen.cook()
    assert kitchen.worked == list("abc")[: "abc".index(name) + 1]
    kitchen.fails = ""
    assert kitchen.cook() == list("abc")["abc".index(name) :]
    assert (kitchen.folder / name / "half").exists()  # not moved away: it goes on with what is there
    assert not (kitchen.folder / "replaced").exists()


def test_a_stage_that_was_done_but_not_recorded_is_not_done_twice(kitchen):
    kitchen.cook()
    path = kitchen.folder / "stages/b.json"
    path.write_bytes(orjson.dumps(orjson.loads(path.read_bytes()) | {"output": None}))
    assert kitchen.cook() == []
    assert read_record(path).output == file_digest(kitchen.folder / "b/out.txt")


def test_a_changed_setting_redoes_what_depends_on_it_and_says_so(kitchen, capsys):
    kitchen.cook()
    before = (kitchen.folder / "b/out.txt").read_text()
    kitchen.settings["b"] = {"y": {"z": 3}}
    assert kitchen.cook() == ["b", "c"]
    printed = capsys.readouterr().out
    assert "anew: y.z was 2, is 3" in printed
    assert "b was redone" in printed
    assert (kitchen.folder / "replaced/b-1/b/out.txt").read_text() == before
    assert (kitchen.folder / "replaced/c-1/c/out.txt").exists()
    kitchen.settings["b"] = {"y": {"z": 2}}
    kitchen.cook()
    assert (kitchen.folder / "replaced/b-2/b/out.txt").exists()


def test_a_redone_stage_with_the_same_output_redoes_nothing_else(kitchen):
    kitchen.cook()
    (kitchen.folder / "a/out.txt").unlink()
    assert kitchen.cook() == ["a"]


def test_an_output_that_was_changed_is_made_again_and_kept_aside(kitchen, capsys):
    kitchen.cook()
    (kitchen.folder / "b/out.txt").write_text("tampered")
    assert kitchen.cook() == ["b"]
    assert "not what was made" in capsys.readouterr().out
    assert (kitchen.folder / "replaced/b-1/b/out.txt").read_text() == "tampered"


def test_what_no_record_knows_is_refused(kitchen):
    (kitchen.folder / "stages").mkdir(parents=True)
    (kitchen.folder / "b").mkdir()
    (kitchen.folder / "b/precious.txt").write_text("mine")
    with pytest.raises(FolderError, match=r"b: is there, but not made by stage b"):
        kitchen.cook()
    assert kitchen.worked == ["a"]
    assert (kitchen.folder / "b/precious.txt").read_text() == "mine"


def test_a_folder_of_something_else_is_refused(kitchen):
    kitchen.folder.mkdir()
    (kitchen.folder / "thesis.tex").write_text("x")
    with pytest.raises(FolderError, match="no recipe's"):
        kitchen.cook()
    assert [path.name for path in kitchen.folder.iterdir()] == ["thesis.tex"]


def test_one_process_at_a_time(kitchen):
    kitchen.cook()
    with claim(kitchen.folder), pytest.raises(FolderInUse):
        kitchen.cook()


def test_a_stage_without_its_output_is_an_error(kitchen):
    kitchen.idle = "b"
    with pytest.raises(StageError, match="stage b: ended, but its output is not complete"):
        kitchen.cook()
    kitchen.idle = ""
    assert kitchen.cook() == ["b", "c"]


@pytest.mark.parametrize("content", [b"{", b'{"settings": 1, "inputs": {}}', b'{"settings": {}, "inputs": {}, "x": 1}'])
def test_a_damaged_record_is_named(kitchen, content):
    kitchen.cook()
    (kitchen.folder / "stages/b.json").write_bytes(content)
    with pytest.raises(StageError, match=r"stages/b\.json: .*remove it"):
        kitchen.cook()


def test_a_failure_names_its_stage_and_its_cause_whatever_can_still_be_written(kitchen, capsys):
    kitchen.cook()
    kitchen.settings["b"], kitchen.fails = {"y": 3}, "b"
    records, stage = kitchen.folder / "stages", kitchen.stages()[1]

    def work() -> None:
        records.rename(kitchen.folder / "gone")  # as on a disk that takes no more
        stage.work()

    with pytest.raises(RuntimeError, match="the power went"):
        run_stages(kitchen.folder, [kitchen.stages()[0], replace(stage, work=work)])
    assert "[2/2] b  stopped after 0:00" in capsys.readouterr().out


def test_a_setting_that_a_newer_version_has_and_nobody_sets_redoes_nothing(kitchen):
    kitchen.cook()
    kitchen.settings["b"] = {"y": {"z": 2, "new": None}}
    assert kitchen.cook() == []
    kitchen.settings["b"] = {"y": {"z": 2, "new": 0}}
    assert kitchen.cook() == ["b", "c"]


@pytest.mark.parametrize(
    ("before", "now", "is_change"),
    [
        ({"y.z": 2}, {"y.z": 2, "y.new": 0}, False),
        ({"y.z": 2}, {"y.z": 2, "section.new": 0}, False),
        ({"y.z": 2}, {"y.z": 2, "other": 0}, True),  # is not at its default
        ({"y.new": 1}, {"y.new": 0}, True),  # was known
        ({"section": None}, {"section.new": 0}, True),  # a section that was off is on, with its defaults
        ({"list.0.a": 1}, {"list.0.a": 1, "list.0.new": 0}, False),
        ({"list.0.a": 1}, {"list.0.a": 1, "list.1.new": 0}, True),  # another item
    ],
)
def test_a_setting_of_a_newer_version_at_its_default_is_no_change(before, now, is_change):
    defaults = {"y.new", "section.new", "list.0.new", "list.1.new"}
    found = changes(Record(settings=before, inputs={}), Record(settings=now, inputs={}), defaults)
    assert bool(found) == is_change


def test_what_was_replaced_may_be_renamed_and_removed(kitchen):
    for number, renamed in ((3, "b-kept"), (4, "b-old-1")):
        kitchen.cook()
        kitchen.settings["b"] = {"y": {"z": number}}
        kitchen.cook()
        (kitchen.folder / "replaced/b-1").rename(kitchen.folder / "replaced" / renamed)
    assert (kitchen.folder / "replaced/b-kept/b/out.txt").read_text().startswith("b {'y': {'z': 2}}")
    assert (kitchen.folder / "replaced/b-old-1/b/out.txt").read_text().startswith("b {'y': {'z': 3}}")


def test_many_changes_are_cut(kitchen):
    kitchen.cook()
    record = read_record(kitchen.folder / "stages/a.json")
    now = record.model_copy(update={"settings": {f"k{i}": i for i in range(6)}, "inputs": {"z": "1"}})
    assert changes(record, now) == (
        "k0 was not set, is 0; k1 was not set, is 1; k2 was not set, is 2; k3 was not set, is 3 and 4 more"
    )
    assert changes(record, record.model_copy(update={"inputs": {}})) == ""
    assert changes(now, record).endswith("more")


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (200, "3:20"), (3740, "1:02:20")])
def test_durations(seconds, text):
    assert duration(seconds) == text
