"""The twin shares every tensor with the original and nothing else; in place there is no twin."""

from __future__ import annotations

import gc
import threading
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moec
from moec.frontends.torch.remade import Remade
from tests.corpus import CASES
from tests.corpus.blocks import LoopList
from tests.frontend.changing import D, Sliced, made
from tests.frontend.compare import state, state_difference
from tests.frontend.modules import FEW, agree, compiled, first, report_of, tokens, told
from tests.frontend.observed import example

SOME = pytest.mark.parametrize("name", FEW)


@SOME
def test_writes_reach_both(name: str) -> None:
    module, fast = compiled(name)
    args = tokens(name)
    for writer, reader in ((module, fast), (fast, module)):
        before = first(reader, args)
        with torch.no_grad():
            for parameter in writer.parameters():
                parameter.add_(0.05 * torch.sin(torch.arange(parameter.numel()).view_as(parameter).float()))
        assert not torch.allclose(first(reader, args), before, atol=1e-4)
        agree(fast, module, args)


@SOME
def test_requires_grad_reaches_both(name: str) -> None:
    module, fast = compiled(name)
    fast.requires_grad_(False)
    assert not any(p.requires_grad for p in module.parameters())
    module.requires_grad_(True)
    assert all(p.requires_grad for p in fast.parameters())


@SOME
def test_modes_and_attributes_are_the_twins_own(name: str) -> None:
    module, fast = compiled(name)
    fast.train()
    assert not module.training
    fast.note = "mine"
    assert not hasattr(module, "note")
    assert not hasattr(module, "moec")
    assert "forward" not in vars(module)


@SOME
def test_in_place(name: str) -> None:
    module, reference = CASES[name].make(), CASES[name].make()
    tensors = {key: id(value) for key, value in module.named_parameters()}
    fast = moec.compile(module, example_inputs=example(CASES[name]), inplace=True)
    assert fast is module
    assert any(layer.status == "compiled" for layer in report_of(fast).layers)
    assert {key: id(value) for key, value in module.named_parameters()} == tensors
    assert list(module.state_dict()) == list(reference.state_dict())
    agree(module, reference, tokens(name))
    agree(module, reference, tokens(name, 130))


@SOME
@pytest.mark.parametrize("inplace", [False, True])
def test_restore(name: str, inplace: bool) -> None:
    """Back to the original forward: bitwise, with no trace left."""
    before = state(CASES[name].make())
    _, fast = compiled(name, inplace=inplace)
    first(fast, tokens(name))
    assert moec.restore(fast) is fast
    assert state_difference(state(fast), before, exact=False) == ""
    parts = [path for path, part in fast.named_modules() if "forward" in vars(part)]
    assert parts == []
    agree(fast, CASES[name].make(), tokens(name), bar=0.0)


@SOME
def test_compiling_twice(name: str) -> None:
    """Two twins of one original, and a twin of a twin."""
    module, fast = compiled(name)
    again = moec.compile(module, example_inputs=example(CASES[name]))
    nested = moec.compile(fast, example_inputs=example(CASES[name]))
    assert len({id(m) for m in (module, fast, again, nested)}) == 4
    for one in (fast, again, nested):
        agree(one, module, tokens(name))
    moec.restore(again)
    agree(again, module, tokens(name), bar=0.0)
    agree(fast, module, tokens(name))
    agree(nested, module, tokens(name))


@SOME
def test_compiling_in_place_twice(name: str) -> None:
    module, reference = CASES[name].make(), CASES[name].make()
    for _ in range(2):
        with told():
            assert moec.compile(module, example_inputs=example(CASES[name]), inplace=True) is module
        agree(module, reference, tokens(name))
    moec.restore(module)
    agree(module, reference, tokens(name), bar=0.0)


@SOME
def test_functional_call_uses_the_given_weights(name: str) -> None:
    """torch.func swaps parameters for the length of a call: the compiled layer must see them."""
    module, fast = compiled(name)
    args = tokens(name)
    given = {key: value.detach() * 1.25 for key, value in module.named_parameters()}
    want = first(lambda *a: torch.func.functional_call(module, given, a), args)
    with told():
        got = first(lambda *a: torch.func.functional_call(fast, given, a), args)
    assert not torch.allclose(want, first(module, args), atol=1e-3)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    agree(fast, module, args)


@pytest.mark.parametrize("name", ["loop_list.swiglu", "sorted.relu", "ffn.swiglu"])
def test_a_replaced_parameter_is_seen_or_refused(name: str) -> None:
    """`linear.weight = nn.Parameter(...)` on the twin: a new object under an old name."""
    module, fast = compiled(name)
    reference = CASES[name].make()
    for target in (fast, reference):
        linears = [part for part in target.modules() if isinstance(part, nn.Linear)]
        for linear in linears:
            linear.weight = nn.Parameter(linear.weight.detach() * 1.5)
    with told():
        agree(fast, reference, tokens(name))
    agree(module, CASES[name].make(), tokens(name), bar=0.0)


def test_a_replaced_expert_is_seen_or_refused() -> None:
    """Another module in the experts' list after compiling."""
    module, fast = compiled("loop_list.swiglu")
    reference = CASES["loop_list.swiglu"].make()
    for target in (fast, reference):
        target.experts[2] = nn.Identity()
    with told():
        agree(fast, reference, tokens("loop_list.swiglu", 130))
    agree(module, CASES["loop_list.swiglu"].make(), tokens("loop_list.swiglu"), bar=0.0)


def test_a_hook_registered_later_is_called() -> None:
    module, fast = compiled("loop_list.gelu")
    reference = CASES["loop_list.gelu"].make()
    for target in (fast, reference):
        target.experts[1].register_forward_hook(lambda part, args, result: result * 3)
        target.experts[4].fc1.register_forward_pre_hook(lambda part, args: (args[0] + 1,))
    with told():
        agree(fast, reference, tokens("loop_list.gelu", 130))
    agree(module, CASES["loop_list.gelu"].make(), tokens("loop_list.gelu"), bar=0.0)


def test_a_global_hook_is_called() -> None:
    """register_module_forward_hook sees every module of the original; the compiled model must not go quiet."""
    module, fast = compiled("loop_list.gelu")
    seen: list[str] = []
    handle = nn.modules.module.register_module_forward_hook(lambda part, args, result: seen.append(type(part).__name__))
    try:
        with told():
            first(module, tokens("loop_list.gelu"))
            want, seen[:] = list(seen), []
            first(fast, tokens("loop_list.gelu"))
    finally:
        handle.remove()
    assert seen == want


def test_no_second_copy_of_the_weights() -> None:
    """Tensors alive after compiling, scratch for 515 tokens included, come to less than half of the weights."""
    module = LoopList(dim=512, hidden=1024, experts=8)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)) / 24)
    module.eval()
    weights = sum(p.numel() * p.element_size() for p in module.parameters())
    gc.collect()
    before = living_bytes()
    fast = moec.compile(module)
    gc.collect()
    assert any(layer.status == "compiled" for layer in report_of(fast).layers)
    assert living_bytes() - before < weights / 2


def living_bytes() -> int:
    storages: dict[int, int] = {}
    for thing in gc.get_objects():
        if type(thing) in {Tensor, nn.Parameter}:
            storages[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
    return sum(storages.values())


class Locked(LoopList):
    """Holds a lock, which deepcopy cannot copy."""

    def build_router(self) -> None:
        super().build_router()
        self.lock: Any = threading.Lock()


def test_a_module_that_cannot_be_copied() -> None:
    module = Locked().eval()
    with pytest.raises(moec.MoecError, match="inplace=True") as caught:
        moec.compile(module)
    assert "inplace=True" in (caught.value.hint or "")
    assert "forward" not in vars(module)
    fast = moec.compile(module, inplace=True)
    assert fast is module
    assert any(layer.status == "compiled" for layer in report_of(fast).layers)


def test_threads_share_a_compiled_module() -> None:
    module, fast = compiled("loop_list.swiglu")
    inputs = [tokens("loop_list.swiglu", 20 + i, seed=i) for i in range(8)]
    want = [first(module, args) for args in inputs]
    results: dict[int, Tensor] = {}

    def work(index: int) -> None:
        for _ in range(5):
            with torch.no_grad():
                results[index] = fast(*inputs[index])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, expected in enumerate(want):
        torch.testing.assert_close(results[index], expected, rtol=1e-5, atol=1e-5)


def test_example_inputs_are_let_go() -> None:
    """They may be large; what a later refresh and measurements need is made anew."""
    module = made(Sliced)
    x = torch.randn(2, 6, D)
    alive = weakref.ref(x)
    fast = moec.compile(module, example_inputs=(x,))
    del x
    gc.collect()
    assert alive() is None
    fast.top_k = module.top_k = 1
    moec.refresh(fast)
    assert report_of(fast).whole_model_error is not None
    agree(fast, module, (torch.randn(3, 5, D),))
    assert report_of(fast).layers[0].fallbacks == 0


def test_other_example_inputs_are_kept() -> None:
    mask = torch.tensor([True, False])
    made = Remade(({"x": torch.zeros(2, 3, dtype=torch.bfloat16), "mask": mask, "n": 3},)).make()
    assert made[0]["mask"] is mask
    assert made[0]["n"] == 3
    assert (made[0]["x"].shape, made[0]["x"].dtype) == ((2, 3), torch.bfloat16)
    assert Remade(None).make() is None


def test_small_parameters_with_gaps_are_read_where_they_lie() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)).eval()
    first = model[0]
    assert isinstance(first, nn.Linear)
    first.bias = nn.Parameter(torch.randn(16, 2)[:, 0])
    x = torch.randn(5, 8)
    for inplace in (False, True):
        wanted = model(x)
        fast = moec.compile(model, inplace=inplace)
        assert len(fast.moec.report.compiled) == 1
        assert torch.allclose(fast(x), wanted, atol=1e-5)
