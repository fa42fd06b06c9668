"""Text of regions: one op a line, types always, defaults never. `parse` reads it back to an equal region."""

import json
import re

from moec.ir.core import Attribute, Node, Op, Region, Value
from moec.ir.types import Dim

BARE_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.]*")


def print_region(region: Region) -> str:
    """The region's text, without a newline at the end."""
    lines = [print_header(region)]
    lines += [f"  {print_node(node)}" for node in region.nodes]
    lines += [f"  {print_return(region)}", "}"]
    return "\n".join(lines)


def print_header(region: Region) -> str:
    """The first line: `region moe(%x: f32[T, 64]) {`."""
    name = region.name if BARE_NAME.fullmatch(region.name) else json.dumps(region.name, ensure_ascii=False)
    return f"region {name}({', '.join(f'{value}: {value.type}' for value in region.inputs)}) {{"


def print_return(region: Region) -> str:
    """The last line: `return %y`."""
    return f"return {_names(region.outputs)}".rstrip()


def print_node(node: Node) -> str:
    """One line: `%rows = gather(%x, %order) {k=2} : f32[2T, 64]`."""
    return f"{_names(node.results)} = {print_op(node.op)} : {', '.join(str(value.type) for value in node.results)}"


def print_op(op: Op) -> str:
    """The op without results and types: `gather(%x, %order) {k=2}`."""
    keyword = {field.name for field in op.fields if field.keyword}
    operands = [f"{name}={value}" if name in keyword else str(value) for name, value in op.named_operands]
    attributes = [
        f"{field.name}={print_attribute(value, is_float=field.kind in (float, float | None))}"
        for field in op.fields
        if field.role == "attribute" and (value := getattr(op, field.name)) != field.default
    ]
    text = f"{op.name}({', '.join(operands)})" if operands else op.name
    return f"{text} {{{', '.join(attributes)}}}" if attributes else text


def print_attribute(value: Attribute, *, is_float: bool = False) -> str:
    """The value of an attribute: `2`, `1.25`, `true`, `"silu"`, `ceildiv(T, 4)`, `[0, 1]`."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, tuple):
        return f"[{', '.join(map(str, value))}]"
    if isinstance(value, Dim):
        return str(value)
    return repr(float(value)) if is_float else str(value)


def _names(values: tuple[Value, ...]) -> str:
    return ", ".join(map(str, values))
