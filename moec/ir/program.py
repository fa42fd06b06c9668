"""A program: the regions of a model, the user's graphs that opaque ops name, and the host around them."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace

from moec.errors import MoecError, did_you_mean
from moec.ir.core import Region
from moec.ir.ops_opaque import Opaque
from moec.ir.printer import BARE_NAME, print_region
from moec.ir.verify import verify


@dataclass(frozen=True)
class Graph:
    """The user's own code under the name that `opaque` ops use, as text to read."""

    name: str
    text: str


@dataclass(frozen=True)
class Program:
    """All regions of a model; `host` is the text of what stays around them. Verified by `verify_program`."""

    regions: tuple[Region, ...]
    graphs: tuple[Graph, ...] = ()
    host: str = ""

    def __str__(self) -> str:
        blocks = [print_verbatim(f"graph {_title(graph.name)}", graph.text) for graph in self.graphs]
        if self.host:
            blocks.append(print_verbatim("host", self.host))
        return "\n\n".join(blocks + [print_region(region) for region in self.regions])

    def region(self, name: str) -> Region:
        """The region of this name. Raises MOEC132 with the closest name as a hint."""
        for region in self.regions:
            if region.name == name:
                return region
        hint = did_you_mean(name, [region.name for region in self.regions])
        raise MoecError("MOEC132", f'the program has no region "{name}"', hint=hint)

    def map_regions(self, change: Callable[[Region], Region]) -> "Program":
        """The same program with each region changed, verified."""
        program = replace(self, regions=tuple(change(region) for region in self.regions))
        verify_program(program)
        return program


def verify_program(program: Program) -> None:
    """Raise MoecError unless all regions are well-formed, names are unique and each opaque graph is there."""
    names: set[str] = set()
    graphs: set[str] = set()
    for graph in program.graphs:
        if graph.name in graphs or not graph.name.isprintable() or not graph.name:
            problem = "is used twice" if graph.name in graphs else "must be one line of text"
            raise MoecError("MOEC116", f"graph name {graph.name!r} {problem}")
        graphs.add(graph.name)
    for region in program.regions:
        if region.name in names:
            raise MoecError("MOEC130", f'two regions are called "{region.name}"')
        names.add(region.name)
        verify(region)
        for number, node in enumerate(region.nodes, start=2):
            if isinstance(node.op, Opaque) and node.op.graph not in graphs:
                where = f'line {number} of region "{region.name}": {node}'
                hint = did_you_mean(node.op.graph, graphs)
                raise MoecError(
                    "MOEC131", f'opaque: the program has no graph "{node.op.graph}"', where=where, hint=hint
                )


def print_verbatim(head: str, text: str) -> str:
    """Text that is kept as it is, each line behind a '|'."""
    lines = [f"  | {line}" if line else "  |" for line in text.split("\n")] if text else []
    return "\n".join([f"{head} {{", *lines, "}"])


def _title(name: str) -> str:
    return name if BARE_NAME.fullmatch(name) else json.dumps(name, ensure_ascii=False)
