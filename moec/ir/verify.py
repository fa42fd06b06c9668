"""Whether a region is well-formed: names, definitions before uses, types as inferred, letters that an input binds."""

from collections.abc import Iterable, Mapping

from moec.errors import MoecError, count, did_you_mean
from moec.ir.core import VALUE_NAME, Node, Op, Region, Value
from moec.ir.ops_opaque import Opaque
from moec.ir.ops_weights import Weight
from moec.ir.printer import print_header, print_node, print_return
from moec.ir.types import Dim, Tensor


def verify(region: Region) -> None:
    """Raise MoecError with the offending line of `str(region)` unless the region is well-formed.

    Lines count as in that text: the header is line 1, the first node line 2.
    """
    defined: dict[str, Value] = {}
    letters = frozenset[str]()
    weights: dict[str, Tensor] = {}
    try:
        check_header(region)
        for value in region.inputs:
            check_new_name(value, defined)
            letters |= value.type.letters
    except MoecError as error:
        raise error.located(f"line 1: {print_header(region)}") from None
    for number, node in enumerate(region.nodes, start=2):
        try:
            letters |= bound_letters(node.op)
            check_node(node, defined, letters)
            check_weight(node.op, weights)
        except MoecError as error:
            raise error.located(f"line {number}: {print_node(node)}") from None
    try:
        check_outputs(region.outputs, defined)
    except MoecError as error:
        raise error.located(f"line {len(region.nodes) + 2}: {print_return(region)}") from None


def check_header(region: Region) -> None:
    """MOEC116 unless the region's name is one line of text."""
    one_line = region.name.isprintable() and region.name != ""
    if not one_line:
        raise MoecError("MOEC116", f"region name {region.name!r} must be one line of text")


def check_new_name(value: Value, defined: dict[str, Value]) -> None:
    """Enter the value among those defined. Raises MOEC111 when its name is taken, MOEC116 when it is malformed."""
    if not VALUE_NAME.fullmatch(value.name):
        hint = "letters, digits, '_' and '.', and '.' not first"
        raise MoecError("MOEC116", f"malformed value name {value.name!r}", hint=hint)
    if value.name in defined:
        raise MoecError("MOEC111", f"{value} is defined already, as {defined[value.name].type}")
    defined[value.name] = value


def check_node(node: Node, defined: dict[str, Value], letters: frozenset[str]) -> None:
    """Operands are defined, letters bound, result types as inferred; enters the results among those defined."""
    for value in node.op.operands:
        check_defined(value, defined, node.op.name)
    inferred = node.op.result_types()
    for size in sizes_of(node.op):
        for letter in sorted(size.letters - letters):
            hint = did_you_mean(letter, letters) or "a letter must occur in the type of an input or a weight"
            raise MoecError("MOEC114", f"{node.op.name}: no input binds the letter {letter} of size {size}", hint=hint)
    if len(node.results) != len(inferred):
        found = count(len(node.results), "name")
        message = f"{node.op.name}: defines {count(len(inferred), 'value')}, found {found}"
        raise MoecError("MOEC113", message)
    for value, type in zip(node.results, inferred, strict=True):
        if value.type != type:
            raise MoecError("MOEC112", f"{node.op.name}: {value} is declared {value.type} but is {type}")
        check_new_name(value, defined)


def check_defined(value: Value, defined: Mapping[str, Value], user: str) -> None:
    """MOEC110 unless the value is defined, with this type."""
    known = defined.get(value.name)
    if known is None:
        raise MoecError("MOEC110", f"{user}: {value} is not defined", hint=_closest(value.name, defined))
    if known != value:
        raise MoecError("MOEC110", f"{user}: {value} is used as {value.type} but defined as {known.type}")


def _closest(name: str, defined: Iterable[str]) -> str | None:
    hint = did_you_mean(name, defined)
    return hint.replace('"', '"%', 1) if hint else None


def bound_letters(op: Op) -> frozenset[str]:
    """Letters that an op itself gives a value: those of a weight's shape and of an opaque graph's results."""
    if isinstance(op, Weight):
        return op.type.letters
    if isinstance(op, Opaque):
        return frozenset().union(*(type.letters for type in op.types))
    return frozenset()


def sizes_of(op: Op) -> tuple[Dim, ...]:
    """All sizes that an op states: attributes and declared types."""
    sizes: list[Dim] = []
    for field in op.fields:
        value = getattr(op, field.name)
        if isinstance(value, Dim):
            sizes.append(value)
        if field.role == "declared":
            for type in (value,) if isinstance(value, Tensor) else value:
                sizes += type.shape
    return tuple(sizes)


def check_weight(op: Op, weights: dict[str, Tensor]) -> None:
    """MOEC115 when a weight reference occurs with two types."""
    if not isinstance(op, Weight):
        return
    known = weights.setdefault(op.ref, op.type)
    if known != op.type:
        raise MoecError("MOEC115", f'weight: "{op.ref}" is {op.type} here and {known} before')


def check_outputs(outputs: tuple[Value, ...], defined: Mapping[str, Value]) -> None:
    """MOEC117 when there are none, MOEC110 for one that is not defined."""
    if not outputs:
        raise MoecError("MOEC117", "the region returns nothing", hint="return at least one value")
    for value in outputs:
        check_defined(value, defined, "return")
