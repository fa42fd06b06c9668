"""The user's own code behind an `opaque` op: called as it is, its results checked against what the op declares."""

from __future__ import annotations

import torch

from moec.backends.reference.dtypes import DTYPES, described
from moec.backends.reference.frame import Frame
from moec.errors import MoecError
from moec.ir import Opaque, Value


def opaque(op: Opaque, at: Frame) -> tuple[torch.Tensor, ...]:
    """Raises MOEC407 where the graph's results are not what the op declares. Letters that are new are the graph's."""
    results: object = at.opaques[op.graph](*[at.tensor(value) for value in op.args])
    if not isinstance(results, tuple) or len(results) != len(op.types):
        found = f"{len(results)}" if isinstance(results, tuple) else f"a {type(results).__name__}"
        raise _error(op, f"must return a tuple of {len(op.types)}, found {found}")
    for number, (result, declared) in enumerate(zip(results, op.types, strict=True)):
        if not isinstance(result, torch.Tensor):
            raise _error(op, f"result {number} must be {declared}, found a {type(result).__name__}")
        if result.dtype != DTYPES[declared.dtype] or result.dim() != declared.rank:
            raise _error(op, f"result {number} must be {declared}, found {described(result)}")
    try:
        at.bind({Value(f"result{number}", kind): results[number] for number, kind in enumerate(op.types)})
    except MoecError as error:
        raise _error(op, error.message) from None
    return results


def _error(op: Opaque, message: str) -> MoecError:
    return MoecError("MOEC407", f'opaque: graph "{op.graph}" {message}')
