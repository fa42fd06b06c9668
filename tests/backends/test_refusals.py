"""What the reference back end refuses, with the exact code, and what it says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from moec.backendbase import Backend, load_backend
from moec.errors import MoecError
from moec.ir import OPS, Act, Node, Op, Region, Tensor, Value, parse
from moec.ir.core import require
from tests.backends.live import JOINED, UNFUSED, inputs, layer
from tests.backends.running import Weights, build
from tests.backends.shapes import some


def refused(code: str, call: Any, *args: Any, **kwargs: Any) -> MoecError:
    """The error, which has this code."""
    with pytest.raises(MoecError) as caught:
        call(*args, **kwargs)
    assert caught.value.code == code, caught.value
    return caught.value


def test_unknown_back_ends() -> None:
    error = refused("MOEC401", load_backend, "refrence")
    assert str(error) == '[MOEC401] unknown back end "refrence"\n  hint: did you mean "reference"?'
    assert refused("MOEC401", load_backend, "cuda").hint == "one of onnxruntime, reference, triton"


def test_the_reference_is_a_back_end() -> None:
    backend = load_backend("reference")
    assert isinstance(backend, Backend)
    assert backend.name == "reference"


@dataclass(frozen=True)
class Strange(Op):
    """An op from elsewhere, which is not in the op table."""

    name = "strange"
    x: Value

    def infer(self) -> tuple[Tensor, ...]:
        require(True, "MOEC102", "")
        return (self.x.type,)


def test_an_op_from_elsewhere() -> None:
    backend = load_backend("reference")
    x = Value("x", Tensor.of("f32", "T"))
    y = Value("y", x.type)
    assert backend.supports(Act(x, fn="relu")) is None
    assert "no meaning" in str(backend.supports(Strange(x)))
    region = Region("odd", (x,), (Node((y,), Strange(x)),), (y,))
    error = refused("MOEC403", build, region, Weights())
    assert error.where is not None
    assert error.where.startswith("line 2: %y = strange")


def test_every_op_is_supported() -> None:
    backend = load_backend("reference")
    for cls in OPS.values():
        assert backend.supports(object.__new__(cls)) is None, cls


@pytest.mark.parametrize("text", [UNFUSED, JOINED], ids=["unfused", "joined"])
def test_inputs_that_do_not_fit(text: str) -> None:
    executable = build(parse(text), layer())
    x, ids, factors = inputs()
    error = refused("MOEC404", executable, x, ids)
    assert error.message == "takes 3 inputs (%x: f32[T, 6], %experts: i32[T, 2], %weights: f32[T, 2]), found 2"
    assert error.where == "region moe"
    error = refused("MOEC404", executable, x.double(), ids, factors)
    assert error.message == "%x must be f32[T, 6], found f64[7, 6]"
    refused("MOEC404", executable, x, ids.float(), factors)
    refused("MOEC404", executable, x, ids.short(), factors)
    refused("MOEC404", executable, x, ids, factors.bfloat16())
    error = refused("MOEC404", executable, x, ids, [1.0])
    assert error.message == "%weights must be a tensor f32[T, 2], found list"
    error = refused("MOEC404", executable, x, ids.to("meta"), factors)
    assert error.message == f"%x and %experts are on {x.device} and meta"
    error = refused("MOEC109", executable, x[:3], ids, factors)
    assert error.message == "%experts is i32[T, 2]: T is 3, found 7"
    refused("MOEC109", executable, x[:, :5], ids, factors)
    refused("MOEC109", executable, x.unsqueeze(0), ids, factors)
    refused("MOEC109", executable, x, ids[:, :1], factors)
    # And after all that it still runs.
    assert executable(x, ids, factors)[0].shape == (7, 6)


def test_many_shapes_do_not_fill_memory() -> None:
    executable: Any = build(parse('region r(%x: f32[T]) {\n  %y = act(%x) {fn="relu"}\n  return %y\n}'), Weights())
    for tokens in range(600):
        assert executable(torch.zeros(tokens))[0].shape == (tokens,)
    assert len(executable._inputs._sizes) <= 256


def test_a_region_that_is_not_well_formed() -> None:
    region = parse(UNFUSED)
    refused("MOEC110", build, Region(region.name, region.inputs, region.nodes[1:], region.outputs), layer())


@pytest.mark.parametrize("layout", ["stacked", "separate"])
def test_weights_that_do_not_fit(layout: str) -> None:
    def weights(gate: torch.Tensor) -> Weights:
        found = Weights()
        getattr(found, layout)("gate", gate)
        return found.stacked("up", some(4, 5, 6)).stacked("down", some(4, 6, 5))

    build(parse(UNFUSED), weights(some(4, 5, 6)))
    for gate in (some(4, 5, 7), some(3, 5, 6), some(4, 5, 6).double()):
        error = refused("MOEC405", build, parse(UNFUSED), weights(gate))
        assert error.message.startswith('weight "gate" must be f32[4, 5, 6], found ')
    missing = Weights().stacked("gate", some(4, 5, 6)).stacked("up", some(4, 5, 6))
    error = refused("MOEC405", build, parse(UNFUSED), missing)
    assert error.message == 'weight "down" must be f32[4, 6, 5], but there is none of this name'


def test_one_expert_of_another_shape() -> None:
    weights = layer()
    parts = Weights()
    for name in ("up", "down"):
        parts.stacked(name, weights.params[name].data)
    parts.separate("gate", weights.params["gate"].data)
    parts.separate("odd", some(1, 5, 7))
    gate, odd = parts.views["gate"], parts.views["odd"]
    assert isinstance(gate, tuple)
    assert isinstance(odd, tuple)
    parts.views["gate"] = (*gate[:3], odd[0])
    error = refused("MOEC405", build, parse(UNFUSED), parts)
    assert error.message == 'weight "gate" must be f32[4, 5, 6], found f32[5, 7] for expert 3'


def test_weights_cast_later() -> None:
    """Nothing is converted in silence: the caller hears that the layer is not the one that was built."""
    for text in (UNFUSED, JOINED):
        weights = layer()
        executable = build(parse(text), weights)
        weights.module.to(torch.bfloat16)
        error = refused("MOEC405", executable, *inputs())
        assert error.message == 'weight "gate" must be f32[4, 5, 6], found bf16[4, 5, 6]'
        weights.module.to(torch.float32)
        assert executable(*inputs())[0].isfinite().all()


OPAQUE = """\
region own(%x: f32[T, 4]) {
  %a, %b = opaque(%x) {graph="router"} : f32[T, 4], i32[M]
  %y = add(%a, %x)
  return %y, %b
}"""


def _router(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return x * 2, torch.arange(len(x) + 1, dtype=torch.int32)


def test_opaque_graphs_are_called_as_they_are() -> None:
    x = some(3, 4)
    y, b = build(parse(OPAQUE), Weights(), opaques={"router": _router})(x)
    assert torch.equal(y, 3 * x)
    assert b.tolist() == [0, 1, 2, 3]


def test_opaque_graphs_that_are_missing() -> None:
    error = refused("MOEC406", build, parse(OPAQUE), Weights(), opaques={"ruter": _router})
    assert error.message == 'opaque: no graph is called "router"'
    assert error.hint == 'did you mean "ruter"?'
    assert error.where is not None
    assert error.where.startswith("line 2: ")


ODD_RESULTS = {
    "must return a tuple of 2, found 1": lambda x: (x,),
    "must return a tuple of 2, found a Tensor": lambda x: x,
    "result 0 must be f32[T, 4], found f64[3, 4]": lambda x: (x.double(), torch.zeros(1, dtype=torch.int32)),
    "result 0 must be f32[T, 4], found f32[12]": lambda x: (x.flatten(), torch.zeros(1, dtype=torch.int32)),
    "result 1 must be i32[M], found a NoneType": lambda x: (x, None),
    "%result0 is f32[3, 4]: expected 3, found 2": lambda x: (x[:2], torch.zeros(1, dtype=torch.int32)),
    "%result0 is f32[3, 4]: expected 4, found 3": lambda x: (x[:, :3], torch.zeros(1, dtype=torch.int32)),
}


@pytest.mark.parametrize("message", ODD_RESULTS)
def test_opaque_graphs_with_other_results(message: str) -> None:
    executable = build(parse(OPAQUE), Weights(), opaques={"router": ODD_RESULTS[message]})
    error = refused("MOEC407", executable, some(3, 4))
    assert error.message == f'opaque: graph "router" {message}'


def test_errors_from_inside_name_the_op() -> None:
    def broken(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        raise ZeroDivisionError("in the user's code")

    executable = build(parse(OPAQUE), Weights(), opaques={"router": broken})
    with pytest.raises(ZeroDivisionError) as caught:
        executable(some(3, 4))
    assert caught.value.__notes__ == ['in %a, %b = opaque(%x) {graph="router"} : f32[T, 4], i32[M]']


def test_a_module_without_parameters_is_fine() -> None:
    assert isinstance(Weights().module, nn.Module)
    region = parse("region r(%x: f32[T]) {\n  return %x\n}")
    x = some(3)
    (y,) = build(region, Weights())(x)
    assert torch.equal(x, y)
