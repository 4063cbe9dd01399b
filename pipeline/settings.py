"""Settings: frozen pydantic dataclasses <- YAML file <- dotted ``key=value`` overrides.

Shared by pipeline and train. Unknown keys are errors that name the nearest known one.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import re
import textwrap
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

Settings = TypeVar("Settings")

# For `@dataclass(frozen=True, kw_only=True, config=STRICT)` of pydantic.dataclasses.
STRICT = ConfigDict(extra="forbid", str_strip_whitespace=True, allow_inf_nan=False)
# What PyYAML raises for text that is no YAML, such as `!!int a` or 2023-99-99.
NO_YAML = (yaml.YAMLError, ValueError, AttributeError, LookupError, RecursionError)
# An attribute in a docstring and its text: to where the next begins at the same depth, or a blank.
ATTRIBUTE = re.compile(r"^ ?(?: {4})?(\w+): (.+(?:\n {5,}\S.*)*)", re.MULTILINE)


class ConfigError(Exception):
    """A setting, an argument or an input the user gave can't be used."""


def load(cls: type[Settings], path: Path | None, overrides: list[str]) -> Settings:
    """Read settings from a YAML file, apply overrides and validate once.

    Args:
        cls: the root dataclass; every field has a default.
        path: YAML file with differences from the defaults, or None.
        overrides: ``section.key=value`` strings; the value is read as YAML.

    Raises:
        ConfigError: unreadable file, unknown key (with the nearest known), wrong value.
    """
    values: dict[str, Any] = read_yaml(path) if path else {}
    for text in overrides:
        set_dotted(cls, values, text)
    return build(cls, values, origin(path, overrides))


def origin(path: Path | None, overrides: list[str]) -> str:
    """Return where settings came from, for messages about them."""
    return " or ".join([str(path)] * bool(path) + ["the command line"] * bool(overrides))


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping.

    Raises:
        ConfigError: no such file, no YAML, or no mapping.
    """
    try:
        values = yaml.safe_load(path.read_text()) or {}
    except OSError as error:
        raise ConfigError(f"settings file {path}: {error.strerror}") from None
    except NO_YAML as error:
        raise ConfigError(f"settings file {path} is not YAML: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"settings file {path} holds a {type(values).__name__}, not a mapping")
    return values


def set_dotted(cls: type, values: dict[str, Any], text: str) -> None:
    """Apply one ``section.key=value`` of the settings ``cls`` to nested ``values`` in place.

    The value is read as YAML, except where a text is wanted: the fingerprint 01234567 is no number.
    """
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise ConfigError(f"argument {text!r}: expected key=value, such as data.root=shards/")
    *sections, last = name.split(".")
    for section in sections:
        inner = values.setdefault(section, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"argument {text!r}: {section!r} is already set to {inner!r}")
        values = inner
    hints = typing.get_type_hints(section_of(cls, sections) or object)
    is_text = hints.get(last) is str or str in typing.get_args(hints.get(last))
    try:
        values[last] = value if is_text and value != "null" else yaml.safe_load(value)
    except NO_YAML:
        values[last] = value


def section_of(cls: type, names: Sequence[Any]) -> type | None:
    """Return the settings dataclass that dotted names lead to, or None.

    A number among the names is a place in a list of sections.
    """
    section: Any = cls
    for name in names:
        if isinstance(name, int):
            section = next(iter(typing.get_args(section)), None)
        else:
            section = typing.get_type_hints(section).get(str(name)) if section else None
    return section if dataclasses.is_dataclass(section) else None  # pyright: ignore[reportReturnType]


def build(cls: type[Settings], values: dict[str, Any], where: str) -> Settings:
    """Validate ``values`` into ``cls``.

    Raises:
        ConfigError: one line per wrong key, with its dotted name.
    """
    try:
        return TypeAdapter(cls).validate_python(values)
    except ValidationError as error:
        lines = []
        for item in error.errors():
            name = ".".join(str(part) for part in item["loc"])
            if item["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
                lines.append(f"unknown setting {name[:80]!r}{nearest(cls, item['loc'])}")
            else:
                what = item["msg"].removeprefix("Value error, ")
                lines.append(f"setting {name[:80]!r}: {what}, got {item['input']!r:.80}")
        raise ConfigError(f"{where}: " + "; ".join(lines)) from None


def nearest(cls: type, location: tuple[Any, ...]) -> str:
    """Return "; did you mean …?" for an unknown key, or the known keys of its section."""
    section = section_of(cls, location[:-1])
    known = [field.name for field in dataclasses.fields(section)] if section else []
    elsewhere = [name for name in dotted_names(cls) if name.split(".")[-1] == str(location[-1])]
    close = difflib.get_close_matches(str(location[-1]), known, n=1, cutoff=0.5)
    if len(elsewhere) == 1:  # the right name in the wrong place
        return f"; did you mean {elsewhere[0]!r}?"
    if close:
        return f"; did you mean {'.'.join([*map(str, location[:-1]), close[0]])!r}?"
    return f"; known here: {', '.join(known)}" if known else ""


def dotted_names(cls: type, prefix: str = "") -> Iterator[str]:
    """Yield the dotted names of all settings, but for those in lists."""
    for name, hint in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            yield from dotted_names(hint, f"{prefix}{name}.")
        elif name in {field.name for field in dataclasses.fields(cls)}:
            yield f"{prefix}{name}"


def dump(settings: Any) -> str:
    """Return settings as YAML text that ``load`` reads back."""
    return yaml.safe_dump(TypeAdapter(type(settings)).dump_python(settings, mode="json"))


def describe(settings: Any) -> str:
    """Return settings as ``--help`` shows them: names, defaults, and what their classes say."""
    lines = []
    for name, value, text in _described(settings):
        lines.append(f"  {name}={value}")
        lines += textwrap.wrap(text, 96, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)


def _described(settings: Any, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """Yield dotted name, value and explanation of every setting, those of sections in place."""
    texts = attribute_texts(type(settings))
    for field in dataclasses.fields(settings):
        name, value = f"{prefix}{field.name}", getattr(settings, field.name)
        if dataclasses.is_dataclass(value):
            yield from _described(value, f"{name}.")
        else:
            plain = TypeAdapter(Any).dump_python(value, mode="json")
            text = yaml.safe_dump(plain, default_flow_style=True).split("\n")[0]
            yield name, text, texts.get(field.name, "")


def attribute_texts(cls: type) -> dict[str, str]:
    """Return what "Attributes:" in a class's docstring says, by name."""
    section = (inspect.getdoc(cls) or "").partition("Attributes:")[2]
    found = ATTRIBUTE.findall(section)
    return {name: " ".join(text.replace("``", "").split()) for name, text in found}
