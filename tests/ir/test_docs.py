"""docs/ir.md: its table of ops is the op table's, its examples parse and run, its worked drops are right."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from moec.ir import DTYPES, OPS, Dim, Op, Tensor, parse, parse_program
from moec.ir.core import OpField, attribute_kind
from moec.ir.printer import print_attribute
from tests.ir.test_broken_rules import BROKEN

DOCS = (Path(__file__).parents[2] / "docs" / "ir.md").read_text(encoding="utf-8")
THEMES = (
    *("ops_route", "ops_group", "ops_combine", "ops_linear", "ops_activation", "ops_norm", "ops_elementwise"),
    *("ops_fused", "ops_dense", "ops_weights", "ops_opaque"),
)
KINDS = {int: "int", float: "float", bool: "bool", str: "string", Dim: "size", tuple[int, ...]: "ints"}


def operand(field: OpField) -> str:
    """`x`, `b=?` or `weights...` as the table has it."""
    if field.role == "values":
        return f"{field.name}..."
    return f"{field.name}{'=' if field.keyword else ''}{'?' if field.role == 'optional' else ''}"


def attribute(field: OpField) -> str:
    kind, _ = attribute_kind(field)
    text = f"{field.name}: {KINDS[kind]}"  # type: ignore[index]
    default = print_attribute(field.default, is_float=kind is float)
    return text if field.required else f"{text} = {default}"


def row(cls: type[Op]) -> str:
    """The line of the table for one op."""
    assert cls.__doc__ is not None
    rule = " ".join(cls.__doc__.split("\n\n")[0].split())
    operands = ", ".join(operand(field) for field in cls.fields if field.role in ("value", "optional", "values"))
    attributes = ", ".join(attribute(field) for field in cls.fields if field.role == "attribute")
    cells = [f"`{cls.name}`", f"`{operands}`" if operands else "", rule, f"`{attributes}`" if attributes else ""]
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def table() -> str:
    """The whole table, by theme; ops that tests or users have added are left out."""
    head = ["| op | operands | type rule | attributes |", "|---|---|---|---|"]
    ours = [cls for cls in OPS.values() if cls.__module__.startswith("moec.ir.")]
    return "\n".join(
        head + [row(cls) for cls in sorted(ours, key=lambda cls: THEMES.index(cls.__module__.rsplit(".", 1)[1]))]
    )


def words() -> str:
    """The words an attribute may be, as the errors of the type rules list them."""
    found: dict[tuple[str, str], list[str]] = {}
    for line, _, _, message in BROKEN:
        match = re.fullmatch(r'(\w+)="\w+" must be one of (.*)', message)
        name = re.split(r"[ (]", line, maxsplit=1)[0]
        if match:
            found.setdefault((match[1], match[2]), []).append(name)
    for (attribute, _), ops in found.items():
        if sum(name == attribute for name, _ in found) == 1:  # then it means the same wherever it occurs
            ops += [cls.name for cls in OPS.values() if attribute in {field.name for field in cls.fields}]
    rows = [f"| {attribute} | {', '.join(sorted(set(ops)))} | {some} |" for (attribute, some), ops in found.items()]
    return "\n".join(["| attribute | of | words |", "|---|---|---|", *sorted(rows)])


def blocks(kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```$", DOCS, re.DOTALL | re.MULTILINE)


def test_the_table_of_ops_is_the_op_table() -> None:
    found = DOCS.split("tests/ir/test_docs.py -->\n", 1)[1].split("\n<!-- end of ops", 1)[0].strip()
    assert found == table(), f"put this into docs/ir.md:\n{table()}"


def test_the_words_of_attributes_are_those_of_the_rules() -> None:
    found = DOCS.split("Attributes that are one of some words:\n", 1)[1].split("\n## ", 1)[0].strip()
    assert found == words(), f"put this into docs/ir.md:\n{words()}"


@pytest.mark.parametrize("text", blocks("moec"))
def test_regions_parse_and_print_as_they_stand(text: str) -> None:
    without_comments = re.sub(r"^ *#.*\n", "", text, flags=re.MULTILINE)
    assert str(parse(text)) == without_comments.strip()


@pytest.mark.parametrize("text", blocks("moec-program"))
def test_programs_parse_and_print_as_they_stand(text: str) -> None:
    assert str(parse_program(text)) == text.strip()


def test_examples_in_python_run() -> None:
    rewriting, adding = blocks("python")
    region = blocks("moec")[0]
    code = f"text = {region!r}\n{rewriting}\n{adding}\nprint(SwapHalves(region.inputs[0]).result_types()[0])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    shown = DOCS.split("compared:\n", 1)[1].split("```\n", 3)[2]
    assert done.stdout == f"{shown}f32[T, 64]\n"


def test_element_types() -> None:
    assert f"`{' '.join(DTYPES)}`" in DOCS


EQUAL_SIZES = re.findall(r"`([^`]+)` is\s+`([^`]+)`", DOCS.split("compare equal:", 1)[1].split("Rational", 1)[0])


@pytest.mark.parametrize(("written", "printed"), EQUAL_SIZES)
def test_sizes_that_the_page_calls_equal(written: str, printed: str) -> None:
    assert str(Dim.parse(written)) == printed
    assert Tensor.of("f32", written) == Tensor.of("f32", printed)


def test_the_page_names_equal_sizes() -> None:
    assert len(EQUAL_SIZES) == 4


def group(ids: list[int], *, experts: int, capacity: int | None, sequence: int) -> tuple[list[int], list[int]]:
    """`group` for one choice per token by counting, straight from its docstring."""
    kept = [
        slot
        for slot, expert in enumerate(ids)
        if capacity is None or ids[slot // sequence * sequence : slot].count(expert) < capacity
    ]
    order = sorted(kept, key=lambda slot: ids[slot])
    offsets = [sum(ids[slot] < expert for slot in kept) for expert in range(experts + 1)]
    return order + [-1] * (len(ids) - len(kept)), offsets


DROPS = re.findall(r"^\| (`capacity.*?`|without capacity) \| ([\d ]+) \| ([-\d ]+) \| ([\d ]+) \|$", DOCS, re.MULTILINE)


@pytest.mark.parametrize(("how", "ids", "order", "offsets"), DROPS)
def test_worked_drops(how: str, ids: str, order: str, offsets: str) -> None:
    given = {name: int(number) for name, number in re.findall(r"(capacity|sequence)=(\d+)", how)}
    numbers = [[int(number) for number in text.split()] for text in (ids, order, offsets)]
    found = group(numbers[0], experts=2, capacity=given.get("capacity"), sequence=given.get("sequence", 100))
    assert found == (numbers[1], numbers[2])


def test_the_page_works_out_drops() -> None:
    assert len(DROPS) == 3
