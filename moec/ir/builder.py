"""Building a region op by op; the types are inferred, the names made unique."""

from collections.abc import Sequence

from moec.errors import MoecError, count
from moec.ir.core import Node, Op, Region, Value
from moec.ir.printer import print_op
from moec.ir.types import Tensor
from moec.ir.verify import check_defined, verify


class Names:
    """Names that are not taken: a wish that is taken gets the first free number behind it."""

    def __init__(self, taken: Sequence[str] = ()) -> None:
        self.taken = set(taken)

    def fresh(self, wish: str) -> str:
        """The wish, or `wish_2`, `wish_3`...; the result is taken from now on."""
        name, number = wish, 2
        while name in self.taken:
            name, number = f"{wish}_{number}", number + 1
        self.taken.add(name)
        return name


class Builder:
    """Builds one region.

    ```python
    b = Builder("moe")
    x = b.input("x", Tensor.of("f32", "T", 64))
    y = b.add(Act(x, fn="relu"), name="y")
    region = b.build(y)
    ```
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.names = Names()
        self.inputs: list[Value] = []
        self.nodes: list[Node] = []

    def input(self, name: str, type: Tensor) -> Value:
        """A new input. Raises MOEC111 when the name is taken: callers pass inputs by their names."""
        if name in self.names.taken:
            raise MoecError("MOEC111", f"%{name} is defined already")
        value = Value(self.names.fresh(name), type)
        self.inputs.append(value)
        return value

    def add(self, op: Op, name: str | None = None) -> Value:
        """Append an op with one result and give the result. A name that is taken gets a number behind it."""
        (value,) = self.add_many(op, (name or op.name,))
        return value

    def add_many(self, op: Op, names: Sequence[str]) -> tuple[Value, ...]:
        """Append an op and give its results, one for each name. Raises what the op's type rule raises, and MOEC113
        when the number of names is not the number of results."""
        try:
            defined = {value.name: value for value in (*self.inputs, *(v for node in self.nodes for v in node.results))}
            for operand in op.operands:
                check_defined(operand, defined, op.name)
            types = op.result_types()
        except MoecError as error:
            raise error.located(f"line {len(self.nodes) + 2}: {print_op(op)}") from None
        if len(names) != len(types):
            raise MoecError(
                "MOEC113", f"{op.name}: defines {count(len(types), 'value')}, found {count(len(names), 'name')}"
            )
        values = tuple(Value(self.names.fresh(name), type) for name, type in zip(names, types, strict=True))
        self.nodes.append(Node(values, op))
        return values

    def build(self, *outputs: Value) -> Region:
        """The region that returns these values, verified."""
        region = Region(self.name, tuple(self.inputs), tuple(self.nodes), outputs)
        verify(region)
        return region
