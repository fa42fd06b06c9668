"""Settings, methods, submodules and hooks changed after compiling: the compiled model follows, and says so."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import moec
from moec.frontends.torch.fallback import FallbackWarning
from tests.frontend import changing, elsewhere
from tests.frontend.changing import Direct, Expert, Plain, Sliced, made

Change = Callable[[Any], Any]


def on_experts(act: Callable[[Expert], Any]) -> Change:
    return lambda m: [act(e) for e in m.experts]


def doubled(self: Any, x: Tensor) -> Tensor:
    return x * 2


def hook(part: nn.Module) -> Any:
    return part.register_forward_hook(lambda module, args, result: result * 2)


CHANGES: dict[str, tuple[type[nn.Module], Change, str]] = {
    "top_k": (Sliced, lambda m: setattr(m, "top_k", 1), "'top_k' of the layer is 1, it was 2"),
    "a class attribute set on the instance": (Sliced, lambda m: setattr(m, "renormalise", False), "'renormalise' of"),
    "temperature": (Sliced, lambda m: setattr(m, "temperature", 0.2), "'temperature' of"),
    "a configuration's flag": (
        Sliced,
        lambda m: setattr(m.config, "norm_topk_prob", False),
        "'norm_topk_prob' of config is False",
    ),
    "another configuration": (
        Sliced,
        lambda m: setattr(m, "config", type(m.config)(norm_topk_prob=False)),
        "'config' of the layer was replaced",
    ),
    "a list of numbers": (Sliced, lambda m: m.factors.__setitem__(0, 3.0), "'factors' of the layer was changed"),
    "a partial": (Sliced, lambda m: setattr(m, "finish", lambda y: y * 3), "'finish' of the layer"),
    "a method of the instance": (
        Sliced,
        lambda m: setattr(m, "route", lambda rows: (type(m).route(m, rows)[0] * 2, type(m).route(m, rows)[1])),
        "'route' of the layer was set",
    ),
    "an expert's number": (Sliced, on_experts(lambda e: setattr(e, "scale", 3.0)), r"'scale' of experts\.\d is 3.0"),
    "one expert's number": (Sliced, lambda m: setattr(m.experts[3], "scale", 9.0), r"'scale' of experts\.3 is 9.0"),
    "an expert's activation": (Sliced, on_experts(lambda e: setattr(e, "act", torch.tanh)), r"'act' of experts\.\d"),
    "an expert's submodule": (Sliced, on_experts(lambda e: setattr(e, "out", nn.Tanh())), r"experts\.\d\.out' was"),
    "a submodule around them": (Sliced, lambda m: setattr(m, "before", nn.Tanh()), "submodule 'before' was replaced"),
    "a submodule before a weight": (Sliced, lambda m: setattr(m, "drop", nn.Tanh()), "submodule 'drop' was replaced"),
    "a dropout's mode": (Sliced, lambda m: m.drop.train(), "training mode"),
    "a hook around them": (Sliced, lambda m: hook(m.drop), "has hooks"),
    "a hook before the router": (Sliced, lambda m: hook(m.before), "has hooks"),
    "a hook in an expert": (Sliced, lambda m: hook(m.experts[2].out), "has hooks"),
    "a stack's activation": (Direct, lambda m: setattr(m.experts, "act", torch.tanh), "'act' of the layer was changed"),
    "a stack's submodule": (Direct, lambda m: setattr(m.experts, "act_module", nn.Tanh()), "submodule 'act_module'"),
    "a stack's configuration": (Direct, lambda m: setattr(m.experts.config, "scale", 3.0), "'scale' of config is 3.0"),
    "an FFN's number": (Plain, lambda m: setattr(m, "scale", 3.0), "'scale' of the layer is 3.0, it was 1.0"),
    "an FFN's activation": (Plain, lambda m: setattr(m, "act", nn.Tanh()), "submodule 'act' was replaced"),
    "an FFN's dropout's mode": (Plain, lambda m: m.drop.train(), "training mode"),
    "an activation's number": (Plain, lambda m: setattr(m.act, "approximate", "tanh"), "'approximate' of act is"),
    "an activation's forward": (
        Plain,
        lambda m: setattr(m.act, "forward", torch.tanh),
        "'forward' of act was set",
    ),
}
X = torch.randn(3, 7, changing.D, generator=torch.Generator().manual_seed(1))


def run(model: nn.Module, x: Tensor = X) -> Tensor:
    torch.manual_seed(0)
    with torch.no_grad():
        y: Tensor = model(x)
    return y


def compiled(kind: type[nn.Module], **options: Any) -> tuple[Any, Any]:
    model = made(kind, **options)
    fast = moec.compile(model)
    assert [layer.status for layer in fast.moec.report.layers] == ["compiled"], fast.moec.report
    torch.testing.assert_close(run(fast), run(model))
    assert fast.moec.report.layers[0].fallbacks == 0
    return model, fast


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_followed_and_named(name: str) -> None:
    kind, change, reason = CHANGES[name]
    model, fast = compiled(kind)
    before = run(model)
    change(model)
    change(fast)
    with pytest.warns(FallbackWarning, match=reason):
        got = run(fast)
    assert not torch.allclose(run(model), before)
    torch.testing.assert_close(got, run(model), rtol=0, atol=0)
    assert fast.moec.report.layers[0].fallbacks == 1


@pytest.mark.parametrize("name", [n for n in CHANGES if "hook" not in n and "mode" not in n and "forward" not in n])
def test_refresh_compiles_what_it_is_now_or_says_why_not(name: str) -> None:
    kind, change, _ = CHANGES[name]
    model, fast = compiled(kind)
    change(model)
    change(fast)
    moec.refresh(fast)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(run(fast), run(model))
    assert all(layer.fallbacks == 0 for layer in fast.moec.report.layers)


@pytest.mark.parametrize("name", ["top_k", "a configuration's flag", "one expert's number", "an FFN's activation"])
@pytest.mark.parametrize("when", ["before the copy", "after the copy"])
def test_a_copy_follows_too(name: str, when: str) -> None:
    kind, change, _ = CHANGES[name]
    model, fast = compiled(kind)
    if when == "before the copy":
        change(fast)
    again = copy.deepcopy(fast)
    if when == "after the copy":
        change(again)
    change(model)
    with pytest.warns(FallbackWarning):
        got = run(again)
    torch.testing.assert_close(got, run(model), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["FACTOR", "renormalise"])
def test_a_global_is_followed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, fast = compiled(Sliced)
    monkeypatch.setattr(changing, name, 3.0 if name == "FACTOR" else lambda weights: weights * 3)
    with pytest.warns(FallbackWarning, match=f"{name}' of module tests.frontend.changing"):
        got = run(fast)
    torch.testing.assert_close(got, run(model), rtol=0, atol=0)


@pytest.mark.parametrize(("place", "name"), [(changing.Settings, "shift"), (elsewhere, "SHIFT")])
def test_a_setting_in_a_class_or_module_is_followed(place: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, fast = compiled(Sliced)
    monkeypatch.setattr(place, name, 0.5)
    with pytest.warns(FallbackWarning, match=f"'{name}' of .* is 0.5, it was 0.0"):
        got = run(fast)
    torch.testing.assert_close(got, run(model), rtol=0, atol=0)


def test_a_method_of_the_class_is_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, fast = compiled(Sliced)
    monkeypatch.setattr(Expert, "forward", doubled)
    with pytest.warns(FallbackWarning, match="'forward' of class Expert"):
        got = run(fast)
    torch.testing.assert_close(got, run(model), rtol=0, atol=0)


def test_put_back_it_is_compiled_again() -> None:
    model, fast = compiled(Sliced)
    fast.top_k = 1
    with pytest.warns(FallbackWarning):
        run(fast)
    fast.top_k = 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(run(fast), run(model))
    assert fast.moec.report.layers[0].fallbacks == 1


@pytest.mark.parametrize(
    "harmless",
    [
        lambda m: setattr(m, "note", "mine"),
        lambda m: setattr(m, "aux_loss", torch.zeros(())),
        lambda m: setattr(m.experts[1], "index", 1),
        lambda m: setattr(m.config, "name", "large"),
        lambda m: m.register_forward_hook(lambda module, args, result: None),
        lambda m: m.router.register_forward_hook(lambda module, args, result: None),
        lambda m: m.experts[0].up.train(),
    ],
)
def test_what_the_code_does_not_read_may_change(harmless: Change) -> None:
    _, fast = compiled(Sliced)
    harmless(fast)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(fast)
    assert fast.moec.report.layers[0].fallbacks == 0


def test_experts_that_are_not_asked_cost_nothing() -> None:
    """What belongs to one expert is asked when its weights are read."""
    _, fast = compiled(Sliced, num_experts=12)
    method = fast.__dict__["forward"]
    small = compiled(Sliced)[1].__dict__["forward"]
    for kind in ("_rows", "_objects", "_absent", "_hooks", "_modes"):
        assert len(getattr(method._guards.front, kind)) == len(getattr(small._guards.front, kind))
    assert len(method._guards.by_weight) == 12


def test_strict_refuses_a_changed_layer() -> None:
    fast = moec.compile(made(Sliced), strict=True)
    fast.top_k = 1
    with pytest.raises(moec.MoecError, match="'top_k' of the layer is 1") as raised:
        run(fast)
    assert raised.value.code == "MOEC231"


def test_functions_are_compared_by_identity() -> None:
    model, fast = compiled(Direct)
    for m in (model, fast):
        m.experts.act = F.silu
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(run(fast), run(model))


class Counting(Direct):
    """Its own code counts; the experts' method that is cut out of it does not."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        rows = x.reshape(-1, changing.D)
        weights, ids = self.router(rows).softmax(-1).topk(self.top_k)
        return self.mix(rows, ids, weights).view_as(x)

    def mix(self, rows: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        y: Tensor = changing.Experts.forward(self.experts, rows, ids, weights)
        return y


def test_code_around_a_method_that_was_cut_out_is_free() -> None:
    model, fast = compiled(Counting)
    assert callable(fast.__dict__["mix"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(run(fast), run(model))
    assert fast.calls == 2
