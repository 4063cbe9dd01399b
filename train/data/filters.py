"""Which clips a run wants, as a text: read into a pyarrow expression, never executed.

The text is written as in Python: ``and``, ``or``, ``not``, comparisons (also chained), ``in`` a
list, ``is None``, arithmetic, names of plan columns, and facts as ``facts.motion``. A fact that is
not known makes its comparison unknown, as in SQL, and a clip passes only where the whole is true.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.settings import ConfigError
from pipeline.tables import pc

PLAN_SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("key", "uri", "caption", "label", "split")),
        *((name, pa.float64()) for name in ("start_s", "duration_s")),
    ]
)
MAX_CHARACTERS = 10_000
SHOWN_CHARACTERS = 120  # of a filter, in messages
COMPARISONS: dict[type[ast.cmpop], str] = {
    ast.Eq: "equal",
    ast.NotEq: "not_equal",
    ast.Lt: "less",
    ast.LtE: "less_equal",
    ast.Gt: "greater",
    ast.GtE: "greater_equal",
}
# Checked: whole numbers beyond 64 bits are an error; others would wrap round to wrong clips.
ARITHMETIC: dict[type[ast.operator], str] = {
    ast.Add: "add_checked",
    ast.Sub: "subtract_checked",
    ast.Mult: "multiply_checked",
    ast.Div: "divide",
}


@dataclass(frozen=True)
class ClipFilter:
    """A filter that was read.

    Attributes:
        text: as it was written.
        expression: a pyarrow expression over plan columns and columns named ``facts.NAME``.
        plan_columns: the plan columns it names.
        facts: the facts it names, and at which character each stands first.
    """

    text: str
    expression: Any
    plan_columns: tuple[str, ...]
    facts: Mapping[str, int]

    def passes(self, clips: Mapping[str, Sequence[Any]], facts: pa.Table | None) -> np.ndarray:
        """Return which clips pass, bool [R].

        Args:
            clips: values of plan columns by name, R each: ``key``, and those of the filter.
            facts: R rows with the columns named in ``facts``; may be None where none is.

        Raises:
            ConfigError: a fact is not known, or the types don't fit, such as text and number.
        """
        for name, place in self.facts.items():
            if facts is None or name not in facts.column_names:
                known = [] if facts is None else [f"facts.{each}" for each in facts.column_names]
                raise unknown(self.text, place, f"facts.{name}", known)
        is_passing = np.zeros(len(clips["key"]), dtype=bool)
        rows = pa.array(np.arange(len(is_passing)))
        try:
            columns = {
                name: pa.array(clips[name], PLAN_SCHEMA.field(name).type)
                for name in self.plan_columns
            }
            columns |= {f"facts.{name}": facts[name] for name in self.facts if facts is not None}
            table = pa.table({**columns, "row of shard": rows})
            found = table.filter(self.expression)["row of shard"]
        except (pa.ArrowException, LookupError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ConfigError(
                f"data.filter {shown(self.text)} can't be computed: {reason}"
            ) from None
        is_passing[found.to_numpy()] = True
        return is_passing


def parse_filter(text: str) -> ClipFilter:
    """Read a filter.

    Raises:
        ConfigError: it is no expression, or holds what a filter may not; names the place.
    """
    if len(text) > MAX_CHARACTERS:
        raise ConfigError(f"data.filter has {len(text)} characters, expected <= {MAX_CHARACTERS}")
    text = text.strip()
    reader = _Reader(text)
    try:
        expression = reader.read(ast.parse(text, mode="eval").body)
    except SyntaxError as error:
        place = error.offset or 1
        raise misread(text, place, error.msg) from None
    except (RecursionError, MemoryError, ValueError) as error:
        raise ConfigError(f"data.filter {shown(text)} can't be read: {error}") from None
    return ClipFilter(text, expression, tuple(reader.plan_columns), reader.facts)


def unknown(text: str, place: int, name: str, known: Sequence[str]) -> ConfigError:
    """Return the error that a name of a filter is not known."""
    return misread(text, place, f"unknown name {name!r}; known: {', '.join(known)}")


def misread(text: str, place: int, reason: str) -> ConfigError:
    """Return the error that a filter can't be read from a character on, counted from 1."""
    return ConfigError(f"data.filter {shown(text, place)}, character {place}: {reason}")


def shown(text: str, place: int = 1) -> str:
    """Return a filter as messages show it: of a long one what is around a character."""
    first = max(0, min(place - SHOWN_CHARACTERS // 2, len(text) - SHOWN_CHARACTERS))
    part = text[first : first + SHOWN_CHARACTERS]
    before, after = "… " * (first > 0), " …" * (first + len(part) < len(text))
    return repr(f"{before}{part}{after}")


@dataclass
class _Reader:
    """Turns the nodes of a syntax tree into expressions; notes which names it met."""

    text: str
    plan_columns: dict[str, int] = field(default_factory=dict)
    facts: dict[str, int] = field(default_factory=dict)

    def read(self, node: ast.AST) -> Any:
        match node:
            case ast.BoolOp(op=op, values=values):
                name = "and_kleene" if isinstance(op, ast.And) else "or_kleene"
                return self._joined(name, [self.read(value) for value in values])
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                return pc.invert(self.read(operand))
            case ast.Constant() | ast.UnaryOp(op=ast.USub(), operand=ast.Constant()):
                return pc.scalar(self._literal(node))
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return pc.negate_checked(self.read(operand))
            case ast.Compare(left=left, ops=ops, comparators=rights):
                lefts = [left, *rights[:-1]]
                pairs = [self._compared(*pair) for pair in zip(lefts, ops, rights, strict=True)]
                return self._joined("and_kleene", pairs)
            case ast.BinOp(left=left, op=op, right=right) if type(op) in ARITHMETIC:
                one, two = self.read(left), self.read(right)
                if isinstance(op, ast.Div):
                    one = one.cast(pa.float64())  # 1 / 2 is a half
                return getattr(pc, ARITHMETIC[type(op)])(one, two)
            case ast.Name(id=name):
                return self._plan_column(name, node)
            case ast.Attribute(value=ast.Name(id="facts"), attr=name):
                self.facts.setdefault(name, node.col_offset + 1)
                return pc.field(f"facts.{name}")
        raise self._error(
            node,
            f"{ast.unparse(node)!r:.80} is not allowed; expected and, or, not, comparisons, in a "
            "list, is None, + - * /, names of plan columns, facts.NAME, numbers and texts",
        )

    def _joined(self, name: str, expressions: list[Any]) -> Any:
        whole = expressions[0]
        for expression in expressions[1:]:
            whole = getattr(pc, name)(whole, expression)
        return whole

    def _compared(self, left: ast.expr, op: ast.cmpop, right: ast.expr) -> Any:
        one = self.read(left)
        if isinstance(op, ast.Is | ast.IsNot):
            if not (isinstance(right, ast.Constant) and right.value is None):
                raise self._error(right, "'is' compares with None only; write == or !=")
            return one.is_null() if isinstance(op, ast.Is) else one.is_valid()
        if isinstance(op, ast.In | ast.NotIn):
            found = one.isin(self._literals(right))
            found = found if isinstance(op, ast.In) else pc.invert(found)
            return pc.if_else(one.is_valid(), found, pa.scalar(None, pa.bool_()))
        return getattr(pc, COMPARISONS[type(op)])(one, self.read(right))

    def _plan_column(self, name: str, node: ast.expr) -> Any:
        if name not in PLAN_SCHEMA.names:
            known = [*PLAN_SCHEMA.names, "facts.NAME"]
            raise unknown(self.text, node.col_offset + 1, name, known)
        self.plan_columns.setdefault(name, node.col_offset + 1)
        return pc.field(name)

    def _literals(self, node: ast.expr) -> pa.Array:
        if not isinstance(node, ast.List | ast.Tuple) or not node.elts:
            raise self._error(node, "'in' needs a list of numbers or texts, such as ['a', 'b']")
        try:
            return pa.array([self._literal(value) for value in node.elts])
        except pa.ArrowException:
            raise self._error(node, "the list mixes numbers and texts") from None

    def _literal(self, node: ast.expr) -> Any:
        match node:
            case ast.Constant(value=bool() | int() | float() | str() as value):
                pass
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
                value = -value
            case _:
                raise self._error(node, f"{ast.unparse(node)!r:.80} is no number and no text")
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise self._error(node, "the number is outside the whole ones of 64 bits")
        return value

    def _error(self, node: ast.AST, reason: str) -> ConfigError:
        place = getattr(node, "col_offset", 0) + 1
        return misread(self.text, place, reason)
