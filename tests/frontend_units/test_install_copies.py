"""Compiled layers in copies and pickles, and in modules whose weights moved."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moec.errors import MoecError
from moec.frontends.torch.fallback import FallbackWarning
from moec.frontends.torch.install import (
    drop_own_methods,
    installed,
)
from tests.frontend_units.installed import D, Installed, Layer, X

pytestmark = pytest.mark.filterwarnings("error")


def test_a_copy_of_the_module_is_compiled_on_its_own_weights(layer: Installed) -> None:
    twin = copy.deepcopy(layer.module)
    (method,) = installed(twin)
    assert method.module is twin
    with torch.no_grad():
        twin.inner.weight.zero_()
        twin.inner.bias.fill_(0.5)
        torch.testing.assert_close(twin(X)[0], torch.full((3, D), 0.5).tanh())
        assert not torch.allclose(layer.module(X)[0], torch.full((3, D), 0.5).tanh())
    assert layer.call.ran == 2


def replace_module(module: Any) -> None:
    module.inner = nn.Linear(D, D)


class Shifted(nn.Linear):
    """The same weights in the same places, another function."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


def replace_by_another_kind(module: Any) -> None:
    module.inner = Shifted(D, D)


def change_strides(module: Any) -> None:
    module.inner.weight = nn.Parameter(module.inner.weight.detach().t().contiguous().t())


@pytest.mark.parametrize("change", [replace_module, change_strides])
def test_a_layer_whose_weights_moved_falls_back(layer: Installed, change: Callable[[Any], None]) -> None:
    change(layer.module)
    assert layer.method.moved() != ""
    with pytest.warns(FallbackWarning):
        got = layer.module(X)[0]
    torch.testing.assert_close(got, layer.method.original(X)[0])


@pytest.mark.parametrize("change", [replace_module, change_strides])
def test_and_so_does_a_copy_of_it(layer: Installed, change: Callable[[Any], None]) -> None:
    change(layer.module)
    twin = copy.deepcopy(layer.module)
    with pytest.warns(FallbackWarning):
        twin(X)
    assert twin.ran == 1
    again = copy.deepcopy(twin)
    again(X)
    assert again.ran == 2


@pytest.mark.parametrize("change", [replace_by_another_kind, change_strides])
def test_a_copy_that_is_changed_before_its_first_call_falls_back(
    layer: Installed, change: Callable[[Any], None]
) -> None:
    for twin in (copy.deepcopy(layer.module), copy.deepcopy(copy.deepcopy(layer.module))):
        change(twin)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.testing.assert_close(twin(X)[0], twin.inner(X).tanh())
        assert twin.ran == 1


def test_writes_are_no_moves(layer: Installed) -> None:
    layer.module.double()
    layer.module.load_state_dict(Layer().state_dict())
    assert layer.method.moved() == ""


def test_a_hook_on_a_copy_blocks_the_copy_alone(layer: Installed) -> None:
    twin = copy.deepcopy(layer.module)
    twin.inner.register_forward_hook(lambda *args: None)
    layer.module(X)
    assert layer.ran() == (1, 0)
    with pytest.warns(FallbackWarning):
        twin(X)


def test_the_method_alone_cannot_be_copied(layer: Installed) -> None:
    with pytest.raises(MoecError) as raised:
        copy.deepcopy(layer.method)
    assert raised.value.code == "MOEC232"


def test_a_pickle_has_the_original_code(layer: Installed) -> None:
    loaded = pickle.loads(pickle.dumps(layer.module))
    assert installed(loaded) == []
    with torch.no_grad():
        torch.testing.assert_close(loaded(X)[0], layer.module(X)[0])
    assert loaded.ran == 1


def test_an_unpickled_module_is_plain_again(layer: Installed) -> None:
    loaded = pickle.loads(pickle.dumps(layer.module))
    loaded.inner.forward = own = lambda x: x
    drop_own_methods(loaded)
    assert "forward" not in loaded.__dict__
    assert loaded.inner.__dict__["forward"] is own
