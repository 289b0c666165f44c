"""Strict loading: unknown keys, wrong types, inheritance, overrides."""

from typing import Annotated

import pytest
import yaml

from lightbulb.config import Config, ConfigError, Registered, build_config, load_config, save_config
from lightbulb.registry import lookup, register


class _Part(Config):
    type: str


@register("test_part", "small")
class _Small(_Part):
    width: int = 1


@register("test_part", "large")
class _Large(_Part):
    depth: int = 2


class _Whole(Config):
    steps: int
    rate: float = 0.1
    parts: list[Annotated[_Part, Registered("test_part")]] = []


def write(path, values):
    path.write_text(yaml.safe_dump(values))
    return path


def test_unknown_key_names_the_nearest_valid_one():
    with pytest.raises(ConfigError, match="unknown key 'stpes', did you mean 'steps'"):
        build_config(_Whole, {"stpes": 1})


def test_unknown_key_inside_a_part_is_located():
    with pytest.raises(ConfigError, match=r"parts\.0: unknown key 'widht', did you mean 'width'"):
        build_config(_Whole, {"steps": 1, "parts": [{"type": "small", "widht": 3}]})


def test_unknown_part_lists_the_known_ones():
    with pytest.raises(ConfigError, match=r"unknown test_part 'smal', did you mean 'small'.*\['large', 'small'\]"):
        build_config(_Whole, {"steps": 1, "parts": [{"type": "smal"}]})


def test_wrong_type_names_field_and_value():
    with pytest.raises(ConfigError, match=r"steps: .*got 'many'"):
        build_config(_Whole, {"steps": "many"})


def test_every_problem_is_reported_at_once():
    with pytest.raises(ConfigError) as caught:
        build_config(_Whole, {"steps": "many", "rate": "fast"})
    assert str(caught.value).count("\n") == 1


def test_base_file_then_own_values_then_overrides(tmp_path):
    write(tmp_path / "base.yaml", {"steps": 1, "rate": 0.5, "parts": [{"type": "small", "width": 7}]})
    child = write(tmp_path / "child.yaml", {"base": "base.yaml", "steps": 2})
    config = load_config(_Whole, child, ["rate=1e-3", "parts.0.width=9"])
    assert (config.steps, config.rate, config.parts[0].width) == (2, 1e-3, 9)


def test_a_changed_type_replaces_the_whole_part(tmp_path):
    path = write(tmp_path / "c.yaml", {"steps": 1, "parts": [{"type": "small", "width": 7}]})
    assert load_config(_Whole, path, ["parts.0={type: large}"]).parts[0] == _Large(type="large")


def test_only_one_level_of_inheritance(tmp_path):
    write(tmp_path / "a.yaml", {"steps": 1})
    write(tmp_path / "b.yaml", {"base": "a.yaml"})
    with pytest.raises(ConfigError, match="one level"):
        load_config(_Whole, write(tmp_path / "c.yaml", {"base": "b.yaml"}))


@pytest.mark.parametrize("override", ["steps", "=3", "a..b=1", "steps=[1"])
def test_malformed_overrides_are_refused(tmp_path, override):
    with pytest.raises(ConfigError, match="override"):
        load_config(_Whole, write(tmp_path / "c.yaml", {"steps": 1}), [override])


def test_yaml_cannot_build_python_objects(tmp_path):
    path = tmp_path / "evil.yaml"
    path.write_text("steps: !!python/object/apply:os.getcwd []")
    with pytest.raises(ConfigError, match="not a readable YAML file"):
        load_config(_Whole, path)


def test_saved_config_loads_to_the_same(tmp_path):
    config = build_config(_Whole, {"steps": 3, "parts": [{"type": "large", "depth": 5}]})
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(_Whole, tmp_path / "saved.yaml") == config


def test_configs_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        build_config(_Whole, {"steps": 3}).steps = 4


def test_a_name_is_registered_once():
    assert lookup("test_part", "small") is _Small
    with pytest.raises(ValueError, match="already registered"):
        register("test_part", "small")(_Large)
