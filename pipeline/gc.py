"""``python -m pipeline.gc DIR [--yes]``: what a data set can do without, and its removal.

Always listed, removed only with ``--yes``: files that no commit record names, once they are so
old that no running writer can still need them; and columns and folders of facts, whole, but only
those that are named on the command line.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline import format as fmt
from pipeline.data_root import open_root
from pipeline.files import is_local
from pipeline.orphans import (
    ColumnFiles,
    Found,
    all_files,
    column_folders,
    entries,
    facts_folders,
    temporaries,
)
from pipeline.records import records_or_errors
from pipeline.removal import Holding, Orphan, is_part_of_column, is_part_of_facts, remove
from pipeline.sweep import command_parser, one_line_errors
from pipeline.wording import age_text, counted, size_text

MIN_AGE_HOURS = 24.0
SHOWN = 10


def main() -> None:
    """Parse the command line, list and remove; exit 1 where something is damaged."""
    parser = command_parser(
        "gc",
        "List what a data set can do without: files that no commit record names, and the columns "
        "and facts that you name. --yes removes them.",
    )
    parser.add_argument("--yes", action="store_true", help="remove what is listed as removable")
    parser.add_argument(
        "--columns", help="folders of columns and facts to remove whole, comma-separated"
    )
    parser.add_argument(
        "--min-age-hours",
        type=float,
        default=MIN_AGE_HOURS,
        help="what is younger may belong to a running writer and is kept (default 24)",
    )
    arguments = parser.parse_args()
    if not arguments.min_age_hours >= 0:
        parser.error("--min-age-hours must be 0 or more")
    with one_line_errors("what is removed is gone, the rest is as it was"):
        names = arguments.columns.split(",") if arguments.columns else []
        listing = collect(open_root(arguments.dir), names, arguments.min_age_hours * 3600)
        if arguments.yes:
            remove(listing.orphans, listing.holdings, listing.min_age_s)
        print(json.dumps(listing.told(), indent=2) if arguments.json else as_text(listing))
        if listing.problems:
            sys.exit(
                f"error: {len(listing.problems)} damaged, their files were left alone; "
                f"python -m pipeline.verify {arguments.dir} looks closer"
            )


@dataclass
class Listing:
    """What is in a data set, and what of it can go.

    Attributes:
        root: the data set.
        min_age_s: what is younger is kept.
        orphans: files that no record names.
        holdings: columns, then folders of facts.
        named_by: facts folder -> columns -> how many records of it name these facts.
        problems: damage; what is damaged is left alone.
    """

    root: Path
    min_age_s: float
    orphans: list[Orphan] = field(default_factory=list)
    holdings: list[Holding] = field(default_factory=list)
    named_by: dict[str, Counter[str]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def add_orphans(self, found: Sequence[Found], column: fmt.Column | None = None) -> None:
        """Take in files that no record names, those of ``column`` or temporaries elsewhere."""
        for one in found:
            kept = ""
            if not one.is_ours:
                kept = "no file that pipeline.encode writes"
            elif one.age_s is None or one.age_s < self.min_age_s:
                kept = "maybe being written"
            self.orphans.append(Orphan(one, column, kept))

    def told(self) -> dict[str, Any]:
        """Return what programs are told."""
        holdings = [holding.told() for holding in self.holdings]
        for holding in holdings:
            if holding["name"].startswith("facts@"):
                holding["named_by"] = dict(self.named_by.get(holding["name"], {}))
        return {
            "dir": str(self.root),
            "min_age_hours": self.min_age_s / 3600,
            "orphans": [orphan.told(self.root) for orphan in self.orphans],
            "columns": [h for h in holdings if not h["name"].startswith("facts@")],
            "facts": [h for h in holdings if h["name"].startswith("facts@")],
            "removable_bytes": self.num_bytes("removable"),
            "removed_bytes": self.num_bytes("removed"),
            "problems": self.problems,
        }

    def num_bytes(self, state: str) -> int:
        """Return the bytes of everything in a state: "removable", "removed" or "kept"."""
        return sum(item.num_bytes for item in self.items if item.state == state)

    @property
    def items(self) -> list[Orphan | Holding]:
        """All that may be removed."""
        return [*self.orphans, *self.holdings]


def collect(root: Path, names: Sequence[str], min_age_s: float) -> Listing:
    """List what is in a data set and decide what can go.

    Args:
        root: the data set.
        names: folders of columns and facts to remove.
        min_age_s: what is younger is kept.

    Raises:
        FormatError: it is no data set, or one of ``names`` must not be removed.
    """
    plan, listing = fmt.read_plan(root), Listing(root, min_age_s)
    columns = column_folders(root)
    facts = facts_folders(root)
    if unknown := sorted(set(names) - {*columns, *facts}):
        there = ", ".join([*columns, *facts]) or "none"
        raise fmt.FormatError(
            f"{root} has no folder {unknown[0]!r} of a column or of facts; there: {there}"
        )
    listing.add_orphans(temporaries(root))
    for name in columns:
        add_column(listing, root, name, plan.plan_id, name in names)
    for name in facts:
        found = all_files(root / name, entries(root / name))
        listing.holdings.append(Holding(root / name, found, name in names))
        if name not in names:
            listing.add_orphans([one for one in found if one.path.name.startswith(".")])
    for run in sorted(entries(root / "runs")):
        listing.add_orphans(temporaries(root / "runs" / run))
    for holding in listing.holdings:
        if holding.is_chosen:
            check_removable(listing, holding, set(names))
    return listing


def add_column(listing: Listing, root: Path, name: str, plan_id: str, is_chosen: bool) -> None:
    """Take in a column: its size, what its records name, and what they do not."""
    files = ColumnFiles(root / name)
    listing.holdings.append(Holding(root / name, all_files(root / name, files.there), is_chosen))
    try:
        column = fmt.open_column(root, name, plan_id)
    except fmt.FormatError as error:
        if not is_chosen:
            listing.problems.append(str(error))
        return

    for shard, record in records_or_errors(column):
        if isinstance(record, fmt.FormatError):
            if not is_chosen:
                listing.problems.append(str(record))
            record = None
        files.claim(shard, record)
        if record is not None and record.facts:
            listing.named_by.setdefault(record.facts, Counter())[name] += 1
    for facts in files.taken_back_facts:
        listing.named_by.setdefault(facts, Counter())[name] += 1
    if not is_chosen:
        listing.add_orphans(files.orphans(), column)


def check_removable(listing: Listing, holding: Holding, names: set[str]) -> None:
    """Make sure that a folder may be removed.

    Raises:
        FormatError: it is a link, holds what no run of ours writes, may be being written, or is
            or may be named by commit records that stay.
    """
    path = holding.path
    if is_local(path) and path.is_symlink():
        raise fmt.FormatError(f"{path} is a link; remove what it leads to by hand, then the link")
    is_part = is_part_of_facts if holding.is_facts else is_part_of_column
    for found in holding.files:
        if not (found.is_file and is_part(found.path.name)):
            raise fmt.FormatError(
                f"{found.path} is not what pipeline.encode writes; move it away first"
            )
    age_s = holding.age_s
    if holding.files and (age_s is None or age_s < listing.min_age_s):
        written = "at an unknown time" if age_s is None else f"{age_text(age_s)} ago"
        raise fmt.FormatError(
            f"{path} was written {written}, a run may still write it; stop that and give "
            "--min-age-hours 0"
        )
    staying = [name for name in listing.named_by.get(path.name, {}) if name not in names]
    if staying:
        raise fmt.FormatError(
            f"{path} is named by the commit records of {', '.join(staying)}; expected facts that "
            "no column needs: name these columns too, or leave the facts"
        )
    if holding.is_facts and listing.problems:
        raise fmt.FormatError(
            f"{path}: whether commit records name it can't be told ({listing.problems[0]})"
        )


def as_text(listing: Listing) -> str:
    """Return the listing as lines for a person: first what can go."""
    lines = []
    for state in ("removable", "removed", "kept"):
        some = [orphan for orphan in listing.orphans if orphan.state == state]
        if some or state == "removable":
            total = size_text(sum(orphan.num_bytes for orphan in some))
            lines.append(f"files that no commit record names, {state}: {len(some):,}, {total}")
        for orphan in some[:SHOWN]:
            why = f" ({orphan.kept})" if orphan.kept else ""
            lines.append(f"  {orphan.told(listing.root)['file']}  {described(orphan)}{why}")
        lines += [f"  … {len(some) - SHOWN:,} more"] * (len(some) > SHOWN)
    lines.append("columns and facts (removed only if named by --columns):")
    for holding in listing.holdings:
        named_by = sum(listing.named_by.get(holding.path.name, {}).values())
        named = f", named by {counted(named_by, 'commit record')}" if holding.is_facts else ""
        state = f": {holding.state}" if holding.is_chosen else ""
        lines.append(f"  {holding.path.name}  {described(holding)}{named}{state}")
    removable, removed = listing.num_bytes("removable"), listing.num_bytes("removed")
    if any(item.state == "removable" for item in listing.items):
        lines.append(f"nothing was removed; --yes removes {size_text(removable)}")
    else:
        lines.append(f"removed: {size_text(removed)}" if removed else "nothing to remove")
    return "\n".join([*lines, *(f"damaged: {problem}" for problem in listing.problems)])


def described(item: Orphan | Holding) -> str:
    """Return size and age of something."""
    age = "age unknown" if item.age_s is None else f"{age_text(item.age_s)} old"
    shards = f"{counted(item.num_shards, 'shard')}, " if isinstance(item, Holding) else ""
    return f"{shards}{size_text(item.num_bytes)}, {age}"


if __name__ == "__main__":
    main()
