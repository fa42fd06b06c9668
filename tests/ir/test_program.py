"""Programs: regions, the user's graphs and the host, and their text."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moec.errors import MoecError
from moec.ir import Graph, Opaque, Program, Region, drop_dead, parse, parse_program, verify_program
from tests.ir.build import MOE, moe
from tests.ir.making import STRINGS
from tests.ir.random_regions import regions

ROUTED = """\
region "block[0]"(%x: f32[T, 64]) {
  %weights, %experts = opaque(%x) {graph="router"} : f32[T, 2], i32[T, 2]
  return %weights, %experts
}"""
PROGRAM = f"""\
graph router {{
  | logits = linear(x, gate)
  |
  |   return top_k(logits)
}}

host {{
  | class Block:
  |     ...
}}

{MOE}

{ROUTED}"""


def program() -> Program:
    graph = Graph("router", "logits = linear(x, gate)\n\n  return top_k(logits)")
    return Program((moe(), parse(ROUTED)), (graph,), "class Block:\n    ...")


def test_golden_text() -> None:
    assert str(program()) == PROGRAM
    assert parse_program(PROGRAM) == program()


def test_a_region_is_a_program() -> None:
    assert parse_program(MOE) == Program((moe(),))
    assert parse_program("") == Program(())
    assert str(Program(())) == ""


LINES = st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\n"), max_size=8), max_size=4)


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(
    st.lists(regions(), max_size=2, unique_by=lambda region: region.name), LINES, LINES, STRINGS.filter(str.isprintable)
)
def test_round_trip(some: list[Region], lines: list[str], host: list[str], name: str) -> None:
    named = {node.op.graph for region in some for node in region.nodes if isinstance(node.op, Opaque)}
    if not all(graph.isprintable() for graph in named):
        some, named = [], set()
    graphs = [Graph(graph, "\n".join(lines)) for graph in dict.fromkeys([name, *sorted(named)])]
    program = Program(tuple(some), tuple(graphs), "\n".join(host))
    verify_program(program)
    assert parse_program(str(program)) == program


def test_region_by_name() -> None:
    assert program().region("block[0]") == parse(ROUTED)


def test_map_regions() -> None:
    def rename(region: Region) -> Region:
        return Region(f"new.{region.name}", region.inputs, region.nodes, region.outputs)

    after = program().map_regions(rename)
    assert [region.name for region in after.regions] == ["new.moe", "new.block[0]"]
    assert after.graphs == program().graphs
    assert program().map_regions(drop_dead) == program()
    with pytest.raises(MoecError) as caught:
        program().map_regions(lambda region: Region("same", region.inputs, region.nodes, region.outputs))
    assert caught.value.code == "MOEC130"


MALFORMED = [
    ("grph r {\n}", "expected 'region', 'graph' or one 'host', found 'grph'", 'did you mean "graph"?'),
    ("host {\n  | a\n}\nhost {\n}", "expected 'region', 'graph' or one 'host', found 'host'", 'did you mean "host"?'),
    ("graph {\n}", "expected a name of the graph, found '{'", None),
    ("graph g {\n  a\n}", "expected '}' after the lines of text, each behind a '|', found 'a'", None),
    ("graph g {", "expected '}' after the lines of text, each behind a '|', found end of text", None),
]


@pytest.mark.parametrize(("text", "message", "hint"), MALFORMED)
def test_malformed(text: str, message: str, hint: str | None) -> None:
    with pytest.raises(MoecError) as caught:
        parse_program(text)
    assert (caught.value.code, caught.value.message, caught.value.hint) == ("MOEC120", message, hint)
