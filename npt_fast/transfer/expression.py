"""Evaluate arithmetic on modulations that a user typed: ``0.7*a - b``, ``mean(a, b, c)``."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable

from npt_fast.errors import TransferError
from npt_fast.schema import shown
from npt_fast.transfer.modulation import Modulation, mean

Value = Modulation | float
_LONGEST = 1000  # characters; Python's parser recurses on nested expressions
_OPERATORS: dict[type[ast.operator], Callable[..., Value]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
}


def evaluate(text: str, find: Callable[[str], Modulation]) -> Modulation:
    """Evaluate an expression exactly, on dW.

    Args:
        text: Names, numbers, ``+ - * ( )`` and ``mean(...)``; anything else is refused.
        find: Function that returns the modulation of a name.

    Raises:
        TransferError: the expression is malformed, or its modulations do not fit together.
    """
    if len(text) > _LONGEST:
        raise TransferError(f"an expression of {len(text)} characters is too long")
    try:
        tree = ast.parse(text.strip(), mode="eval")
    # Python's parser raises MemoryError for 980 minus signs
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise TransferError(
            f"{shown(text.strip())} cannot be read; write it like 0.7*a - b"
        ) from None
    found = _value(tree.body, find)
    if not isinstance(found, Modulation):
        raise TransferError(f"{shown(text.strip())} is a number, not a modulation")
    return found


def _value(node: ast.expr, find: Callable[[str], Modulation]) -> Value:
    match node:
        case ast.Name(id=name):
            return find(name)
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            return float(number)
        case ast.UnaryOp(op=ast.USub() | ast.UAdd() as sign, operand=operand):
            value = _value(operand, find)
            return -value if isinstance(sign, ast.USub) else value
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            a, b = _value(left, find), _value(right, find)
            both = isinstance(a, Modulation) and isinstance(b, Modulation)
            if isinstance(op, ast.Mult) and both:
                raise TransferError("modulations are multiplied by numbers, not by each other")
            if not isinstance(op, ast.Mult) and isinstance(a, Modulation) != isinstance(
                b, Modulation
            ):
                raise TransferError(
                    "a number cannot be added to a modulation or subtracted from it"
                )
            return _OPERATORS[type(op)](a, b)
        case ast.Call(func=ast.Name(id="mean"), args=arguments, keywords=[]) if arguments:
            values = [_value(argument, find) for argument in arguments]
            modulations = [value for value in values if isinstance(value, Modulation)]
            if len(modulations) < len(values):
                raise TransferError("mean() takes modulations, not numbers")
            return mean(modulations)
    raise TransferError(f"{ast.unparse(node)!r:.60}: only names, numbers, + - * ( ) and mean(...)")
