"""What compiling sets for the whole process while it lasts, and gives back."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
from torch import nn

import moec
from moec import MoecError
from moec.undisturbed import undisturbed
from tests.frontend.changing import Plain, made


@pytest.fixture(autouse=True)
def _thresholds() -> Iterator[None]:
    before = gc.get_threshold()
    yield
    gc.set_threshold(*before)


@pytest.mark.parametrize("set_to", [(700, 10, 10), (123, 4, 5), (0, 10, 10), (50_000, 7, 7)])
def test_garbage_is_looked_for_as_before(set_to: tuple[int, int, int]) -> None:
    gc.set_threshold(*set_to)
    moec.compile(made(Plain))
    assert gc.get_threshold() == set_to
    with pytest.raises(MoecError):
        moec.compile(nn.Linear)
    assert gc.get_threshold() == set_to


def test_garbage_is_looked_for_less_often_meanwhile_and_never_more_often() -> None:
    for set_to, meanwhile in (((700, 10, 10), 20_000), ((50_000, 7, 7), 50_000), ((0, 10, 10), 0)):
        gc.set_threshold(*set_to)
        with undisturbed(), undisturbed():
            assert gc.get_threshold() == (meanwhile, *set_to[1:])
        assert gc.get_threshold() == set_to
