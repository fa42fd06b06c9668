"""Arguments by name and back, as Python itself binds them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest

from moec.frontends.torch.binding import Binder


def plain(x: Any, experts: Any, weights: Any = None) -> Any: ...


def keyword_only(x: Any, *, experts: Any, scale: float = 2.0) -> Any: ...


def positional_only(x: Any, experts: Any, /, scale: float = 2.0) -> Any: ...


def variadic(x: Any, *args: Any, flag: bool = False, **kwargs: Any) -> Any: ...


CALLS: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]] = [
    (plain, (1, 2), {}),
    (plain, (1, 2, 3), {}),
    (plain, (1,), {"experts": 2}),
    (plain, (), {"weights": 3, "experts": 2, "x": 1}),
    (keyword_only, (1,), {"experts": 2}),
    (keyword_only, (), {"x": 1, "experts": 2, "scale": 3.0}),
    (positional_only, (1, 2), {"scale": 3.0}),
    (positional_only, (1, 2, 3.0), {}),
    (variadic, (1,), {}),
    (variadic, (1, 2, 3), {"flag": True}),
    (variadic, (1,), {"flag": True, "other": 4}),
]


def pythons(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    bound = inspect.signature(function).bind(*args, **kwargs)
    bound.apply_defaults()
    return dict(bound.arguments)


@pytest.mark.parametrize(("function", "args", "kwargs"), CALLS)
def test_binds_as_python_does(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    expected = pythons(function, args, kwargs)
    surplus = expected.pop("args", ())
    expected |= {f"*{i}": v for i, v in enumerate(surplus)} | expected.pop("kwargs", {})
    assert Binder(function)(args, kwargs) == expected


@pytest.mark.parametrize(("function", "args", "kwargs"), CALLS)
def test_unbinding_makes_the_same_call(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    binder = Binder(function)
    again, named = binder.unbind(binder(args, kwargs))
    assert pythons(function, again, named) == pythons(function, args, kwargs)


def test_what_a_call_must_have() -> None:
    assert Binder(plain).required == ("x", "experts")
    assert Binder(keyword_only).required == ("x", "experts")
    assert Binder(variadic).required == ("x",)


def test_binding_leaves_what_it_was_given_alone() -> None:
    kwargs = {"experts": 2}
    bound = Binder(plain)((1,), kwargs)
    bound.pop("experts")
    assert kwargs == {"experts": 2}
    assert Binder(plain).defaults == {"weights": None}
