"""Strict configuration: frozen pydantic models, YAML files, ``a.b=c`` overrides.

Precedence: field defaults < the file named by ``base:`` < the file itself < overrides on the command line.
Unknown keys are errors that name the nearest valid key; the resolved config is saved with every run.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, SerializationInfo, ValidationError, model_validator
from pydantic_core import core_schema

from lightbulb.registry import lookup, names, nearest

C = TypeVar("C", bound="Config")


class ConfigError(ValueError):
    """A config that cannot be used; the message names each field, its value and the fix."""


@dataclass(frozen=True)
class Cost:
    """What a part costs, known from its config alone.

    Attributes:
        params: number of parameters.
        active_params: parameters one token uses (a top-2 of 8 experts uses 2 of 8).
        forward_flops: floating-point operations of one token's forward pass (2 per multiply-add), averaged
            over a context; element-wise work is not counted.
    """

    params: int
    active_params: int
    forward_flops: float

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            self.params + other.params,
            self.active_params + other.active_params,
            self.forward_flops + other.forward_flops,
        )

    @property
    def train_flops(self) -> float:
        """FLOPs per token of forward and backward (backward does every product twice)."""
        return 3.0 * self.forward_flops

    @staticmethod
    def zero() -> "Cost":
        return Cost(0, 0, 0.0)


class Config(BaseModel):
    """Base of every config: immutable, and unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _name_unknown_keys(cls, values: Any) -> Any:
        if isinstance(values, dict):
            for key in values:
                if key not in cls.model_fields:
                    known = list(cls.model_fields)
                    raise ValueError(f"unknown key {key!r}{nearest(key, known)}; valid keys: {', '.join(known)}")
        return values


class _PartError(ValueError):
    """Carries the errors of a registered part's own validation up to :func:`describe`."""

    def __init__(self, error: ValidationError):
        super().__init__("; ".join(describe(error)))
        self.error = error


_IN_SCHEMA: set[str] = set()
"""Kinds of parts whose options are being listed."""


class Registered:
    """Annotation for a field holding one registered part: ``Annotated[TokenMixerConfig, Registered("token_mixer")]``.

    The value is a mapping whose ``type`` names the part, or an instance of the part's config.
    """

    def __init__(self, kind: str):
        self.kind = kind

    def _validate(self, value: Any) -> Any:
        if isinstance(value, Config):
            return value
        if not isinstance(value, dict) or "type" not in value:
            raise ValueError(f"expected a mapping with 'type: <name>'; known {self.kind} names: {names(self.kind)}")
        try:
            return lookup(self.kind, value["type"]).model_validate(value)  # type: ignore[attr-defined]
        except ValidationError as error:
            raise _PartError(error) from error

    def _written(self, part: Any, info: SerializationInfo) -> dict[str, Any]:
        """A part as a mapping, which always says its type."""
        return {"type": part.type} | part.model_dump(mode="json", exclude_defaults=info.exclude_defaults)

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(
            self._validate,
            serialization=core_schema.plain_serializer_function_ser_schema(self._written, info_arg=True),
        )

    def __get_pydantic_json_schema__(self, schema: Any, handler: Any) -> dict[str, Any]:
        if self.kind in _IN_SCHEMA:  # a part in a part of its kind (an expert that is a channel mixer): no second level
            return {"type": "object", "properties": {"type": {"enum": names(self.kind)}}, "required": ["type"]}
        _IN_SCHEMA.add(self.kind)
        try:
            return {"oneOf": self._options(handler)}
        finally:
            _IN_SCHEMA.remove(self.kind)

    def _options(self, handler: Any) -> list[Any]:
        # through the handler, so that the parts' own nested definitions land in the schema's $defs
        return [handler(lookup(self.kind, name).__pydantic_core_schema__) for name in names(self.kind)]  # type: ignore[attr-defined]


def describe(error: ValidationError, prefix: tuple[Any, ...] = ()) -> list[str]:
    """One line per problem: ``field.path: what is wrong (got value)``."""
    lines = []
    for item in error.errors():
        where = prefix + tuple(item["loc"])
        cause = item.get("ctx", {}).get("error")
        if isinstance(cause, _PartError):
            lines += describe(cause.error, where)
            continue
        field = ".".join(str(part) for part in where) or "config"
        message = str(cause) if cause is not None else item["msg"]
        is_whole = isinstance(item["input"], dict | Config) or item["type"] == "missing"
        value = "" if is_whole else f" (got {item['input']!r})"
        lines.append(f"{field}: {message}{value}")
    return lines


def build_config(cls: type[C], values: dict[str, Any], source: str = "config") -> C:
    """Validate plain values into a config.

    Raises:
        ConfigError: one line per problem, each naming the field and its value.
    """
    try:
        return cls.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{source}: " + f"\n{source}: ".join(describe(error))) from None


def load_config(cls: type[C], path: str | Path, overrides: Sequence[str] = ()) -> C:
    """Read a YAML file, its ``base:`` file if it names one, and ``a.b=c`` overrides.

    Raises:
        ConfigError: the file is missing, is not YAML, or does not describe a valid config.
    """
    return build_config(cls, read_values(Path(path), overrides), str(path))


def read_values(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """What :func:`load_config` validates: the file's values over its base's, and the overrides over them.

    Raises:
        ConfigError: a file is missing or not YAML, or an override is none.
    """
    values = read_yaml(path)
    base = values.pop("base", None)
    if base is not None:
        parent = read_yaml(path.parent / str(base))
        if "base" in parent:
            raise ConfigError(f"{path}: base {base!r} has a base of its own; only one level of inheritance is allowed")
        values = _merge(parent, values)
    for override in overrides:
        values = _merge(values, parse_override(override))
    return values


def over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Values over defaults, whole mappings merged key by key."""
    merged: dict[str, Any] = _merge(below, above)
    return merged


def changed(config: C, changes: dict[str, Any], overrides: Sequence[str] = (), source: str = "config") -> C:
    """A config with changed values, whole mappings merged key by key, and then ``a.b=c`` overrides.

    Raises:
        ConfigError: what comes out is not valid.
    """
    values = _merge(config.model_dump(mode="json"), changes)
    for text in overrides:
        values = _merge(values, parse_override(text))
    return build_config(type(config), values, source)


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping from a file (safe loader: no Python objects).

    Raises:
        ConfigError: missing, unreadable, not YAML or not a mapping.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such config file") from None
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{path}: not a readable YAML file: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a mapping at the top level, found {type(values).__name__}")
    return values


def parse_override(text: str) -> dict[str, Any]:
    """``"train.steps=20"`` as ``{"train": {"steps": 20}}``; the value is read as YAML.

    Raises:
        ConfigError: there is no ``=`` or no key.
    """
    key, separator, value = text.partition("=")
    parts = key.lstrip("-").split(".")
    if not separator or not all(parts):
        raise ConfigError(f"override {text!r}: write it as key=value, for example train.steps=20")
    try:
        nested: Any = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {text!r}: the value is not YAML: {error}") from None
    for part in reversed(parts):
        nested = {part: nested}
    return nested


def save_config(config: Config, path: Path) -> None:
    """Write the resolved config as YAML."""
    path.write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False), encoding="utf-8")


def _merge(below: Any, above: Any) -> Any:
    """Mappings merge key by key (a changed ``type`` replaces the whole part); list items by index given as key."""
    if isinstance(below, list) and isinstance(above, dict) and above and all(str(k).isdigit() for k in above):
        if any(int(k) >= len(below) for k in above):
            raise ConfigError(f"override index {max(map(int, above))} is outside a list of {len(below)} items")
        return [_merge(item, above.get(str(i), item)) for i, item in enumerate(below)]
    if not (isinstance(below, dict) and isinstance(above, dict)):
        return above
    if "type" in above and "type" in below and above["type"] != below["type"]:
        return above
    merged = dict(below)
    for key, value in above.items():
        merged[key] = _merge(below[key], value) if key in below else value
    return merged


def flatten(values: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings and lists as ``{"a.b.0": value}``."""
    if isinstance(values, list):
        values = {str(index): item for index, item in enumerate(values)}
    if not isinstance(values, dict):
        return {prefix: values}
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return flat
