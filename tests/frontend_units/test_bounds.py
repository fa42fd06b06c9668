"""Out of bounds on a GPU must be what it is on a CPU: compared with what the CPU raises, call by call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from moec.frontends.torch.bounds import check_indices, on_gpu

X, ROWS = torch.arange(24.0).reshape(4, 6), torch.arange(6.0)
CALLS: dict[str, Callable[[torch.Tensor], Any]] = {
    "index": lambda i: X[i],
    "index of a later dimension": lambda i: X[:, i],
    "two indices": lambda i: X[torch.zeros_like(i), i],
    "index after a mask": lambda i: X.reshape(2, 2, 6)[torch.tensor([[True, False], [False, True]])][:, i],
    "index_select": lambda i: X.index_select(1, i),
    "gather": lambda i: X.gather(1, i.expand(4, -1)),
    "scatter": lambda i: X.scatter(1, i.expand(4, -1), 0.0),
    "scatter_": lambda i: X.clone().scatter_(1, i.expand(4, -1), 0.0),
    "scatter_add": lambda i: X.scatter_add(1, i.expand(4, -1), X),
    "index_add_": lambda i: X.clone().index_add_(0, i, X[: i.numel()]),
    "index_put_": lambda i: X.clone().index_put_((i,), torch.zeros(())),
    "embedding": lambda i: torch.nn.functional.embedding(i, X),
    "one_hot": lambda i: torch.nn.functional.one_hot(i, 5),
}


INDICES: list[list[int]] = [[0, 3], [-1, 0], [3, 4], [5, 0], [6, 0], [99, 1], [-4, 0], [-5, 0], [-7, 0], []]


class Checked(TorchDispatchMode):
    """Asks before each call, as the recorder does, and keeps whether it raised."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.raised = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        try:
            check_indices(func, args)
        except IndexError:
            self.raised = True
            raise
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize(
    "index", [[0, 3], [-1, 0], [3, 4], [5, 0], [6, 0], [99, 1], [-4, 0], [-5, 0], [-7, 0], []], ids=str
)
def test_the_same_as_on_a_cpu(name: str, index: list[int]) -> None:
    given = torch.tensor(index, dtype=torch.int64)
    try:
        CALLS[name](given)
    except (IndexError, RuntimeError) as error:
        refused: Exception | None = error
    else:
        refused = None
    with Checked() as checked:
        try:
            CALLS[name](given)
        except (IndexError, RuntimeError):
            pass
        else:
            assert refused is None
    # one_hot refuses by itself, before a kernel could read anything.
    assert checked.raised == (refused is not None) or name == "one_hot"


def test_only_a_gpu_is_asked() -> None:
    assert not on_gpu((X,))
    assert not on_gpu(())
    assert not on_gpu((3,))
