"""Rows of csv files with the line at which each begins."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator

from pipeline.settings import ConfigError
from pipeline.sources.listing import reading
from pipeline.storage import Folder


def csv_rows(folder: Folder, name: str) -> Iterator[tuple[str, list[str]]]:
    """Yield (file and line, cells) of a csv file.

    Raises:
        ConfigError: no such file, no UTF-8, no csv; with the line.
    """
    path = f"{folder.root}/{name}"
    line = 1
    try:
        with reading(path), folder.open(name) as file:
            text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
            rows = csv.reader(text, strict=True)
            for row in rows:
                yield f"{path} line {line}", row
                line = rows.line_num + 1
    except csv.Error as error:
        raise ConfigError(
            f"{path} line {line} can't be read as csv: {error} (a quote that opens there may not "
            "be closed)"
        ) from None
    except UnicodeDecodeError as error:
        line = _line_that_is_no_text(folder, name)
        raise ConfigError(f"{path} line {line}: expected UTF-8 text, {error.reason}") from None


def _line_that_is_no_text(folder: Folder, name: str) -> int:
    with folder.open(name) as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode()
            except UnicodeDecodeError:
                return number
    return 0
