"""Each `require` of each op, broken; a last test makes sure that none was forgotten."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType

import pytest

import moec.ir
from moec.errors import MoecError
from moec.ir import Op, Opaque
from tests.ir import broken_fused, broken_products, broken_rest, broken_routing
from tests.ir.build import read, result_types

BROKEN = [*broken_routing.BROKEN, *broken_products.BROKEN, *broken_rest.BROKEN, *broken_fused.BROKEN]


@pytest.mark.parametrize(("line", "operands", "code", "message"), BROKEN, ids=[case[0] for case in BROKEN])
def test_broken_rule(line: str, operands: str, code: str, message: str) -> None:
    with pytest.raises(MoecError) as caught:
        result_types(line, operands)
    name = re.split(r"[ (]", line, maxsplit=1)[0]
    assert (caught.value.code, caught.value.message) == (code, f"{name}: {message}")


def _opaque_without_results() -> Op:
    return Opaque(graph="router", types=())


# What text cannot say.
BROKEN_IN_PYTHON: list[tuple[Callable[[], Op], str, str]] = [
    (_opaque_without_results, "MOEC125", "opaque: must declare the types of its results"),
]


@pytest.mark.parametrize(("make", "code", "message"), BROKEN_IN_PYTHON)
def test_broken_rule_in_python(make: Callable[[], Op], code: str, message: str) -> None:
    with pytest.raises(MoecError) as caught:
        make().result_types()
    assert (caught.value.code, caught.value.message) == (code, message)


def test_hints() -> None:
    with pytest.raises(MoecError) as caught:
        result_types('act(%x) {fn="gelu_tan"}', "x: f32[T, 64]")
    assert caught.value.hint == 'did you mean "gelu_tanh"?'
    with pytest.raises(MoecError) as caught:
        result_types("linear(%x, %q)", "x: f32[T, 64], q: i8[96, 64]")
    assert caught.value.hint == "add the second result of quantize_weight"


def test_every_require_is_broken() -> None:
    """Of all calls of `require...` in the files that hold type rules, each has failed in a case above."""
    folder = Path(moec.ir.__file__).parent
    files = [*sorted(folder.glob("ops_*.py")), folder / "rules.py"]
    calls = {(file.name, node.lineno) for file in files for node in _require_calls(file)}
    ops = [read(line, operands)[0] for line, operands, _, _ in BROKEN] + [make() for make, _, _ in BROKEN_IN_PYTHON]
    failed = {place for op in ops for place in _failed_calls(op, files)}
    assert sorted(calls - failed) == []
    assert len(calls) > 100


def _require_calls(file: Path) -> Iterator[ast.Call]:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id.startswith("require"):
            yield node


def _failed_calls(op: Op, files: list[Path]) -> Iterator[tuple[str, int]]:
    names = {str(file): file for file in files}
    try:
        op.result_types()
    except MoecError as error:
        context = error.__context__
        assert isinstance(context, MoecError)  # as `infer` raised it, before the op's name was put in front
        trace: TracebackType | None = context.__traceback__
        while trace is not None:
            file = names.get(trace.tb_frame.f_code.co_filename)
            if file is not None:
                yield file.name, trace.tb_lineno
            trace = trace.tb_next
