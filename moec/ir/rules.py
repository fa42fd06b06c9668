"""Checks that type rules share, so that the same mistake reads the same in every op."""

from collections.abc import Sequence

from moec.errors import count, did_you_mean
from moec.ir.core import Value, require
from moec.ir.types import FLOATS, INDICES, Dim


def require_rank(name: str, value: Value, rank: int) -> None:
    """MOEC103 unless the value has this many sizes."""
    require(value.type.rank == rank, "MOEC103", f"{name} must have {count(rank, 'size')}, found {value.type}")


def require_min_rank(name: str, value: Value, rank: int) -> None:
    """MOEC103 unless the value has at least this many sizes."""
    message = f"{name} must have at least {count(rank, 'size')}, found {value.type}"
    require(value.type.rank >= rank, "MOEC103", message)


def require_dtype(name: str, value: Value, *allowed: str) -> None:
    """MOEC104 unless the value's elements are of one of these types."""
    message = f"{name} must hold {' or '.join(allowed)}, found {value.type}"
    require(value.type.dtype in allowed, "MOEC104", message)


def require_float(name: str, value: Value) -> None:
    """MOEC104 unless the value's elements are floating point."""
    require(value.type.dtype in FLOATS, "MOEC104", f"{name} must hold floating point numbers, found {value.type}")


def require_index(name: str, value: Value) -> None:
    """MOEC104 unless the value's elements are i32 or i64."""
    require_dtype(name, value, *INDICES)


def require_same_dtype(name: str, value: Value, other_name: str, other: Value) -> None:
    """MOEC104 unless both hold the same type of elements."""
    message = f"{name} is {value.type} but {other_name} is {other.type}: they must hold the same type"
    require(value.type.dtype == other.type.dtype, "MOEC104", message)


def require_shape(name: str, value: Value, shape: Sequence[Dim], why: str) -> None:
    """MOEC105 unless the value has this shape; `why` ends the sentence."""
    expected = f"[{', '.join(map(str, shape))}]"
    require(value.type.shape == tuple(shape), "MOEC105", f"{name} must be {expected} {why}, found {value.type}")


def require_size(what: str, found: Dim, expected: Dim, why: str) -> None:
    """MOEC105 unless two sizes are equal."""
    require(found == expected, "MOEC105", f"{what} must be {expected} {why}, found {found}")


def require_choice(name: str, value: str, allowed: Sequence[str]) -> None:
    """MOEC102 unless an attribute is one of these words."""
    hint = did_you_mean(value, allowed)
    require(value in allowed, "MOEC102", f'{name}="{value}" must be one of {", ".join(allowed)}', hint=hint)


def require_at_least(name: str, value: int, least: int) -> None:
    """MOEC102 unless an attribute is at least this."""
    require(value >= least, "MOEC102", f"{name}={value} must be at least {least}")


def require_positive(name: str, size: Dim) -> None:
    """MOEC102 when a size that is an attribute is a constant below 1; with letters it shows only at run time."""
    require(size.constant is None or size.constant >= 1, "MOEC102", f"{name}={size} must be at least 1")
