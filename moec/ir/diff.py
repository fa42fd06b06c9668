"""What a pass changed: a diff of regions by structure, in which values that were merely renamed do not show."""

from difflib import SequenceMatcher

from moec.ir.core import Node, Op, Region, Value
from moec.ir.printer import print_header, print_node, print_return

_COLORS = {"-": "\x1b[31m", "+": "\x1b[32m"}
_CONTEXT = 2


def diff(before: Region, after: Region, *, color: bool = False) -> str:
    """Lines that went (`-`) and came (`+`) with two lines of context; empty when the regions differ in names only.

    A node of `after` is the same as one of `before` when op, attributes, result types and operands (by this same
    rule) are equal; it is then shown under its old names, and so is one that differs in part of them only.
    """
    old = [print_header(before), *(f"  {print_node(node)}" for node in before.nodes), f"  {print_return(before)}"]
    renamed = _with_old_names(before, after)
    new = [print_header(renamed), *(f"  {print_node(node)}" for node in renamed.nodes), f"  {print_return(renamed)}"]
    lines: list[str] = []
    for group in SequenceMatcher(a=old, b=new, autojunk=False).get_grouped_opcodes(_CONTEXT):
        if lines or group[0][1] > 0:
            lines.append("  ...")
        for tag, a, b, c, d in group:
            if tag == "equal":
                lines += [f"  {line}" for line in old[a:b]]
                continue
            lines += [_marked("-", line, color) for line in old[a:b]] + [_marked("+", line, color) for line in new[c:d]]
    return "\n".join(lines)


def _marked(mark: str, line: str, color: bool) -> str:
    return f"{_COLORS[mark]}{mark} {line}\x1b[0m" if color else f"{mark} {line}"


def _with_old_names(before: Region, after: Region) -> Region:
    """`after` with every value that `before` has too under the name it has there."""
    left = list(before.nodes)
    shown: dict[Value, Value] = {}
    taken: set[str] = set()

    def name(value: Value, wish: str) -> None:
        while wish in taken:
            wish += "'"
        taken.add(wish)
        shown[value] = Value(wish, value.type)

    for position, value in enumerate(after.inputs):
        same = position < len(before.inputs) and before.inputs[position].type == value.type
        name(value, before.inputs[position].name if same else value.name)
    nodes: list[Node] = []
    for node in after.nodes:
        op = node.op.map_operands(lambda value: shown.get(value, value))
        match = _same(left, op, node) or _changed(left, op, node)
        if match is not None:
            left.remove(match)
        for value, old in zip(node.results, match.results if match else node.results, strict=True):
            name(value, old.name)
        nodes.append(Node(tuple(shown[value] for value in node.results), op))
    inputs = tuple(shown[value] for value in after.inputs)
    return Region(after.name, inputs, tuple(nodes), tuple(shown.get(value, value) for value in after.outputs))


def _same(left: list[Node], op: Op, node: Node) -> Node | None:
    types = [value.type for value in node.results]
    return next((old for old in left if old.op == op and [value.type for value in old.results] == types), None)


def _changed(left: list[Node], op: Op, node: Node) -> Node | None:
    """The node that this one most likely was: the same op on some of the same operands; users need not show then."""
    for old in left:
        alike = type(old.op) is type(op) and len(old.results) == len(node.results)
        if alike and (
            set(old.op.operands) & set(op.operands) or (not op.operands and old.op.attributes == op.attributes)
        ):
            return old
    return None
