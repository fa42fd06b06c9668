"""Types, values, ops, regions and builders as Python objects."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import subprocess
import sys

import pytest

from moec.errors import MoecError
from moec.ir import (
    DTYPES,
    OPS,
    Act,
    Add,
    Builder,
    ConcatWeights,
    Dim,
    Exchange,
    Group,
    GroupedLinear,
    Linear,
    Op,
    Opaque,
    Tensor,
    Value,
    Weight,
    find_op,
)
from tests.ir.build import MOE, moe, values


def test_ir_loads_no_tensor_library() -> None:
    heavy = ("torch", "triton", "onnx", "onnxruntime", "numpy", "transformers", "rich")
    code = f"import sys, moec.ir; print(sorted(set({heavy!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_tensor() -> None:
    tensor = Tensor.of("bf16", "T", 64, Dim.parse("2E"))
    assert str(tensor) == "bf16[T, 64, 2E]"
    assert tensor == Tensor("bf16", (Dim.of("T"), Dim.of(64), Dim.of("2E")))
    assert hash(tensor) == hash(Tensor.of("bf16", "T", 64, "E + E"))
    assert tensor.rank == 3
    assert tensor.is_float
    assert tensor.letters == {"T", "E"}
    assert tensor.evaluate({"T": 3, "E": 4}) == (3, 64, 8)
    assert tensor.num_elements({"T": 3, "E": 4}) == 1536
    assert tensor.num_bytes({"T": 3, "E": 4}) == 3072
    assert tensor.with_dtype("i8") == Tensor.of("i8", "T", 64, "2E")
    assert tensor.substitute({"E": Dim.of("T")}) == Tensor.of("bf16", "T", 64, "2T")
    assert str(Tensor.of("bool")) == "bool[]"
    assert Tensor.of("f32").letters == frozenset()
    assert not Tensor.of("i8").is_float


def test_element_types() -> None:
    assert set(DTYPES) == {"f64", "f32", "f16", "bf16", "i8", "i32", "i64", "bool"}
    with pytest.raises(MoecError) as caught:
        Tensor.of("int8")
    assert str(caught.value) == '[MOEC101] unknown element type "int8"\n  hint: did you mean "i8"?'
    with pytest.raises(MoecError) as caught:
        Tensor.of("complex")
    assert caught.value.hint == "one of f64, f32, f16, bf16, i8, i32, i64, bool"


def test_everything_is_frozen() -> None:
    region = moe()
    for thing in (region, region.nodes[0], region.nodes[0].op, region.inputs[0], region.inputs[0].type, Dim.of("T")):
        field = dataclasses.fields(thing)[0].name
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(thing, field, None)


def test_copies_and_pickles() -> None:
    region = moe()
    assert copy.deepcopy(region) == region
    assert pickle.loads(pickle.dumps(region)) == region


@pytest.mark.parametrize("cls", OPS.values(), ids=OPS)
def test_every_op_says_what_it_means(cls: type[Op]) -> None:
    assert cls.__doc__ is not None
    assert "->" in cls.__doc__.splitlines()[0] + cls.__doc__.splitlines()[-1]
    assert cls.__doc__ != Op.__doc__
    assert find_op(cls.name) is cls


def test_find_op() -> None:
    with pytest.raises(MoecError) as caught:
        find_op("gathr")
    assert str(caught.value) == '[MOEC121] unknown op "gathr"\n  hint: did you mean "gather"?'


def test_operands_and_attributes() -> None:
    v = values("x: f32[T, 64], w: f32[96, 64], b: f32[96]")
    plain, biased = Linear(v["x"], v["w"]), Linear(v["x"], v["w"], b=v["b"])
    assert plain.operands == (v["x"], v["w"])
    assert biased.named_operands == (("x", v["x"]), ("w", v["w"]), ("b", v["b"]))
    assert plain.attributes == {"dtype": None}
    other = Value("y", v["x"].type)
    assert biased.map_operands(lambda value: other if value == v["x"] else value) == Linear(other, v["w"], b=v["b"])
    many = ConcatWeights((v["w"], v["w"]), axis=0)
    assert many.operands == (v["w"], v["w"])
    assert many.map_operands(lambda _: v["b"]) == ConcatWeights((v["b"], v["b"]), axis=0)
    weight = Weight(ref="w", type=v["w"].type)
    assert weight.operands == ()
    assert weight.map_operands(lambda _: v["b"]) is weight
    assert Group(v["x"], experts=8).attributes == {
        "experts": 8,
        "capacity": None,
        "policy": "arrival",
        "priority": "token",
        "scope": "batch",
        "sequence": None,
        "by": "token",
    }


def test_which_ops_are_pure_and_which_depend_on_weights_only() -> None:
    assert [name for name, cls in OPS.items() if not cls.pure] == ["opaque"]
    of_weights = {name for name, cls in OPS.items() if cls.of_weights}
    assert of_weights == {"weight", "concat_weights", "quantize_weight", "select_experts"}


def test_device_order() -> None:
    v = values("rows: f32[R, 4], offsets: i32[6]")
    exchange = Exchange(v["rows"], v["offsets"], owners=(2, 0, 2, 0, 1), devices=4)
    assert exchange.device_order() == (1, 3, 4, 0, 2)


def test_an_op_without_a_type_rule_says_so() -> None:
    with pytest.raises(NotImplementedError, match="Op has no type rule"):
        Op().infer()


def test_region_queries() -> None:
    region = moe()
    assert {ref: str(type) for ref, type in region.weights.items()} == {
        "gate_up": "f32[8, 96, 64]",
        "down": "f32[8, 64, 48]",
    }
    order, offsets = region.nodes[0].results
    assert region.producer(offsets) is region.nodes[0]
    assert region.producer(region.inputs[0]) is None
    assert [node.op.name for node in region.users(order)] == ["gather", "combine"]
    assert [value.name for value in region.values][:5] == ["x", "experts", "weights", "order", "offsets"]
    assert str(region.nodes[1]) == "%rows = gather(%x, %order) {k=2} : f32[2T, 64]"


def test_builder() -> None:
    b = Builder("r")
    x = b.input("x", Tensor.of("f32", "T", 64))
    first = b.add(Act(x, fn="relu"))
    second = b.add(Act(first, fn="relu"), name="x")
    third = b.add(Add(second, first))
    assert [value.name for value in (first, second, third)] == ["act", "x_2", "add"]
    region = b.build(third, x)
    assert region.outputs == (third, x)
    with pytest.raises(MoecError) as caught:
        b.input("act", x.type)
    assert str(caught.value) == "[MOEC111] %act is defined already"
    with pytest.raises(MoecError) as caught:
        b.add_many(Act(x, fn="relu"), ("a", "b"))
    assert caught.value.message == "act: defines 1 value, found 2 names"
    with pytest.raises(MoecError) as caught:
        b.add(GroupedLinear(x, x, x))
    assert caught.value.where == "line 5: grouped_linear(%x, %x, %x)"
    with pytest.raises(MoecError) as caught:
        b.build()
    assert caught.value.code == "MOEC117"


def test_built_and_read_are_the_same() -> None:
    assert str(moe()) == MOE
    b = Builder("r")
    types = (Tensor.of("f32", 2), Tensor.of("i32"))
    values = b.add_many(Opaque((), graph="g", types=types), ("a", "b"))
    assert str(b.build(*values)) == 'region r() {\n  %a, %b = opaque {graph="g"} : f32[2], i32[]\n  return %a, %b\n}'
