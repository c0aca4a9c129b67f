"""`--where` of `asvr manifest filter`: a condition on the columns of the index, compiled to Arrow. Nothing is evaluated.

The text has Python's grammar and is parsed by Python's parser, of whose tree only these parts are known: column names,
numbers and texts; `+ - * /`; `== != < <= > >=`, also chained; `in (a, b)`; `and or not`; `startswith(image_id, "a/")`.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from manifests.errors import RecipeError

COLUMNS = ("image_id", "sha256", "width", "height", "source_size", "source_mtime_ns")

_LONGEST = 1_000  # characters, which bounds the depth of the tree as well

_COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: pc.equal,
    ast.NotEq: pc.not_equal,
    ast.Lt: pc.less,
    ast.LtE: pc.less_equal,
    ast.Gt: pc.greater,
    ast.GtE: pc.greater_equal,
}
_ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: pc.add_checked,
    ast.Sub: pc.subtract_checked,
    ast.Mult: pc.multiply_checked,
    ast.Div: lambda x, y: pc.divide(pc.cast(x, pa.float64()), y),
}


def where(text: str, index: pa.Table) -> npt.NDArray[np.bool_]:
    """The rows of an index for which the condition holds; `RecipeError` if it is none.

    Integers are 64 bits wide, division is that of float64.
    """
    columns = {
        name: index[name].cast(pa.int64()) if pa.types.is_integer(index[name].type) else index[name] for name in COLUMNS
    }
    try:
        if len(text) > _LONGEST:
            raise ValueError(f"it is longer than {_LONGEST} characters")
        found = _Condition(columns)(ast.parse(text.strip(), mode="eval").body)
        if not isinstance(found, pa.ChunkedArray) or not pa.types.is_boolean(found.type):
            raise ValueError("it is not true or false of an image")
    except (SyntaxError, ValueError, OverflowError, pa.ArrowException, MemoryError, RecursionError) as error:
        reason = (getattr(error, "msg", "") or str(error)).split("\n", 1)[0]
        raise RecipeError(
            f"--where {text[:200]!r} is not a condition on an image ({reason}): write for example "
            '"width >= 256 and height >= 256"; columns are ' + ", ".join(COLUMNS)
        ) from error
    return np.asarray(found.fill_null(False).to_pylist(), bool)


class _Condition:
    """Compiles a tree over some columns."""

    def __init__(self, columns: dict[str, pa.ChunkedArray]) -> None:
        self._columns = columns

    def __call__(self, node: ast.expr) -> Any:
        """A column or a constant."""
        match node:
            case ast.BoolOp(op=op, values=values):
                parts = [self._truth(value) for value in values]
                join = pc.and_ if isinstance(op, ast.And) else pc.or_
                whole = parts[0]
                for part in parts[1:]:
                    whole = join(whole, part)
                return whole
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                return pc.invert(self._truth(operand))
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as number)):
                return pa.scalar(operator.neg(number))
            case ast.Compare(left=left, ops=ops, comparators=comparators):
                return self._comparison(left, ops, comparators)
            case ast.BinOp(op=op, left=left, right=right) if type(op) in _ARITHMETIC:
                return _ARITHMETIC[type(op)](self(left), self(right))
            case ast.Call(
                func=ast.Name(id="startswith"), args=[column, ast.Constant(value=str() as start)], keywords=[]
            ):
                return pc.starts_with(self(column), start)
            case ast.Constant(value=int() | float() | str() as value) if not isinstance(value, bool):
                return pa.scalar(value)
            case ast.Name(id=name) if name in self._columns:
                return self._columns[name]
        raise ValueError(_not_known(node))

    def _truth(self, node: ast.expr) -> Any:
        value = self(node)
        if not pa.types.is_boolean(value.type):
            raise ValueError(f"{ast.unparse(node)} is not true or false")
        return value

    def _comparison(self, left: ast.expr, ops: list[ast.cmpop], comparators: list[ast.expr]) -> Any:
        whole = None
        for op, right in zip(ops, comparators, strict=True):
            if isinstance(op, ast.In | ast.NotIn) and isinstance(right, ast.Tuple | ast.List):
                part = pc.is_in(self(left), value_set=pa.array([self(item).as_py() for item in right.elts]))
                part = pc.invert(part) if isinstance(op, ast.NotIn) else part
            elif type(op) in _COMPARE:
                part = _COMPARE[type(op)](self(left), self(right))
            else:
                raise ValueError(_not_known(right))
            whole = part if whole is None else pc.and_(whole, part)
            left = right
        return whole


def _not_known(node: ast.expr) -> str:
    return f"{ast.unparse(node)[:60]} is not understood here"
