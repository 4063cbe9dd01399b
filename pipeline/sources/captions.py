"""Captions made of labels, such as "the sound of {label}"."""

from __future__ import annotations

import string
from dataclasses import replace

from pipeline.settings import ConfigError
from pipeline.sources.listing import Source


def check_template(template: str) -> list[tuple[str, bool]]:
    """Split a template into texts, each with whether a label follows.

    Raises:
        ConfigError: a field other than {label}, or none, or a brace alone.
    """
    try:
        parsed = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ConfigError(f"caption_template {template!r}: {error}") from None
    fields = [(name, spec, how) for _, name, spec, how in parsed if name is not None]
    if set(fields) != {("label", "", None)}:
        raise ConfigError(
            f"caption_template {template!r}: expected the field {{label}} and no other, such as "
            '"the sound of {label}"'
        )
    return [(text, name is not None) for text, name, _, _ in parsed]


def with_captions(source: Source, template: str) -> Source:
    """Caption the clips that have a label only."""
    if not template:
        return source
    parts = check_template(template)

    def caption(label: str) -> str:
        return " ".join("".join(text + label * follows for text, follows in parts).split())

    clips = [
        replace(clip, caption=caption(clip.label)) if clip.label and not clip.caption else clip
        for clip in source.clips
    ]
    return replace(source, clips=clips)
