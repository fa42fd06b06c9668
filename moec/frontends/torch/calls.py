"""A verified cut as something to call: bind the arguments, run the executable, give back what the original would.

`Call` objects hold no tensors and no modules, so they are shared by copies of a model.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Protocol

import torch

from moec.frontends.torch.binding import Binder
from moec.frontends.torch.direct import Roles, spread_over
from moec.frontends.torch.expertchoice import CHOSEN, by_expert, check
from moec.frontends.torch.ids import Ids
from moec.frontends.torch.oplog import Ref
from moec.frontends.torch.places import Places
from moec.frontends.torch.routing import FORMS, NoTokens, Unusual
from moec.frontends.torch.sizes import Size
from moec.frontends.torch.sliced import More, Slice

Executable = Callable[..., tuple[torch.Tensor, ...]]


class Call(Protocol):
    """Runs one verified cut."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the input it was verified with."""
        ...

    def __call__(
        self, module: torch.nn.Module, executable: Executable, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """The original method's result, its experts computed by the executable. Raises Unusual for other inputs."""
        ...


def check_tokens(x: Any, ranks: Collection[int], dtype: torch.dtype, width: int) -> torch.Tensor:
    """x where it is a tensor of tokens as it was verified. Raises Unusual, NoTokens where it is empty."""
    if not isinstance(x, torch.Tensor) or x.dim() not in ranks:
        found = f"has {x.dim()} dimensions" if isinstance(x, torch.Tensor) else "is no tensor"
        verified = " or ".join(map(str, sorted(ranks)))
        raise Unusual(f"the input {found}, it was verified with {verified}; compile with such example_inputs")
    if x.dtype != dtype:
        raise Unusual(f"the input is {x.dtype}, the layer was compiled for {dtype}")
    if x.shape[-1] != width:
        raise Unusual(f"the input is {x.shape[-1]} wide, not {width}")
    if not x.numel():
        raise NoTokens("there are no tokens")
    return x


def check_more(given: Any, more: More, tokens: Sequence[int]) -> torch.Tensor:
    """A tensor beside the tokens, where its dtype and shape are as verified. Raises Unusual."""
    if not isinstance(given, torch.Tensor) or given.dtype != more.dtype:
        raise Unusual(f"argument {more.name} is no tensor of {more.dtype} as it was when verified")
    if tuple(given.shape) != more.sizes(tokens):
        raise Unusual(f"argument {more.name} is {tuple(given.shape)}, {more.sizes(tokens)} was verified")
    return given


def check_others(bound: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Arguments without a role must be what was verified; a tensor that the code never reads (a Ref) may be any."""
    if bound.keys() != expected.keys():
        raise Unusual(f"other arguments than those verified: {sorted(bound.keys() ^ expected.keys())}")
    for name, value in expected.items():
        given = bound[name]
        if isinstance(value, Ref):
            if not isinstance(given, torch.Tensor):
                raise Unusual(f"argument {name} is no tensor as it was when verified")
            continue
        if given is not value and (isinstance(given, torch.Tensor) or given != value):
            raise Unusual(f"argument {name}={given!r} where {value!r} was verified")


@dataclass(frozen=True)
class DirectCall:
    """A call whose arguments are x, selector and weights. `out_shapes`: the result's shape by verified rank of x."""

    binder: Binder
    roles: Roles
    others: Mapping[str, Any]
    dtype: torch.dtype
    experts: int
    inputs: int
    out_shapes: Mapping[int, tuple[int | Size, ...]]
    weight_dtype: torch.dtype | None = None
    ids: Ids | None = None

    def __call__(
        self, module: torch.nn.Module, executable: Executable, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        roles = self.roles
        if roles.form is None and len(args) == 1 and not kwargs and not self.others:
            x = check_tokens(args[0], self.out_shapes, self.dtype, self.inputs)
            if x.dim() == 2 and self._alike[2]:  # rows already; a reshape of a small layer's is a part of its time
                return executable(x)[0]
            (y,) = executable(x.reshape(-1, self.inputs))
            return y.reshape(self._shape(x))
        bound = self.binder(args, kwargs)
        x = check_tokens(bound.pop(roles.x, None), self.out_shapes, self.dtype, self.inputs)
        rows = x.reshape(-1, self.inputs)
        if roles.form is None:
            check_others(bound, self.others)
            (y,) = executable(rows)
        else:
            routing = {name: bound.pop(name, None) for name in roles.tensors if name != roles.x}
            if not all(isinstance(v, torch.Tensor) for v in routing.values()):
                raise Unusual("the routing is not given as tensors")
            check_others(bound, self.others)
            if roles.weights is not None and routing[roles.weights].dtype != self.weight_dtype:
                raise Unusual(f"the weights are {routing[roles.weights].dtype}, not {self.weight_dtype}")
            if self.ids is not None and roles.selector is not None:
                self.ids.check(routing[roles.selector])
            (y,) = executable(rows, *roles.routing({**routing, roles.x: x}, rows.shape[0], self.experts))
        return y.reshape(self._shape(x))

    def _shape(self, x: torch.Tensor) -> Sequence[int]:
        """The shape of the result for x."""
        shape = x.shape
        if shape[-1] == self.out_shapes[len(shape)][-1] and self._alike[len(shape)]:
            return shape
        return [n if type(n) is int else n(shape) for n in self.out_shapes[len(shape)]]  # type: ignore[operator]

    @functools.cached_property
    def _alike(self) -> dict[int, bool]:
        """By rank, whether all leading sizes of the result are x's own."""
        own = {rank: tuple(Size((i,), Fraction(1), 0) for i in range(rank - 1)) for rank in self.out_shapes}
        return {rank: sizes[:-1] == own[rank] for rank, sizes in self.out_shapes.items()}


@dataclass(frozen=True)
class PlacedCall:
    """A call whose one argument holds each expert's rows by their places."""

    binder: Binder
    x_name: str
    others: Mapping[str, Any]
    dtype: torch.dtype
    experts: int
    inputs: int
    rank: int
    places: Places
    ids: Ids | None = None

    def __call__(
        self, module: torch.nn.Module, executable: Executable, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        bound = self.binder(args, kwargs)
        x = check_tokens(bound.pop(self.x_name, None), (self.rank,), self.dtype, self.inputs)
        check_others(bound, self.others)
        if not self.places.counted(x.shape, self.experts):
            raise Unusual(f"the input is {tuple(x.shape)}, which has no rows for {self.experts} experts as verified")
        rows = self.places.rows(x, self.experts)
        (y,) = executable(rows, *FORMS["places"](None, rows, rows.shape[0], self.experts, 1))
        return self.places.back(y, self.places.shape(x.shape, self.experts, y.shape[-1]))


@dataclass(frozen=True)
class ChosenCall:
    """A call whose arguments are x, the tokens that each expert chose, and their weights."""

    binder: Binder
    x_name: str
    tokens_name: str
    weights_name: str
    others: Mapping[str, Any]
    form: str
    dtype: torch.dtype
    weight_dtype: torch.dtype
    experts: int
    inputs: int
    rank: int
    distinct: bool
    """An expert that has a token twice was not verified, or does something else with it than to add."""
    ids: Ids | None = None

    def __call__(
        self, module: torch.nn.Module, executable: Executable, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        bound = self.binder(args, kwargs)
        x = check_tokens(bound.pop(self.x_name, None), (self.rank,), self.dtype, self.inputs)
        tokens, weights = (bound.pop(name, None) for name in (self.tokens_name, self.weights_name))
        check_others(bound, self.others)
        if not isinstance(tokens, torch.Tensor) or tokens.is_floating_point() or tokens.dtype == torch.bool:
            raise Unusual("the tokens that experts choose are not given as integers")
        if not isinstance(weights, torch.Tensor) or weights.dtype != self.weight_dtype:
            raise Unusual(f"the weights are no tensor of {self.weight_dtype}")
        rows = x.reshape(-1, self.inputs)
        chosen, weights = by_expert(self.form, tokens, weights, self.experts)
        check(chosen, rows.shape[0], distinct=self.distinct)
        (y,) = executable(rows, chosen, weights)
        return y.reshape(*x.shape[:-1], y.shape[-1])


@dataclass(frozen=True)
class SlicedCall:
    """A block whose own operations run before and after the experts."""

    binder: Binder
    sliced: Slice
    form: str | None
    num_slots: int
    rank: int
    dtype: torch.dtype
    experts: int
    inputs: int
    width: int
    ids: Ids | None = None
    places: Places | None = None
    scale: float = 1.0
    spread: bool = False

    def __call__(
        self, module: torch.nn.Module, executable: Executable, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        s = self.sliced
        one = self._takes_one and len(args) == 1 and not kwargs
        given, more = (args[0], ()) if one else self._among(args, kwargs)
        x = check_tokens(given, (self.rank,), self.dtype, self.width)
        # The recorded operations are those of a contiguous input; on another, view would fail where reshape did not.
        even, dims = x.contiguous(), x.shape
        x, selector, weights, y_shape, carried = s.to_experts(module, dims, even, *more)
        rows = x.reshape(-1, self.inputs) if self.places is None else self.places.rows(x, self.experts)
        if self.form is None:
            (y,) = executable(rows)
        else:
            weights = rows if weights is None else weights
            if self.ids is not None:
                self.ids.check(selector)
            selector = spread_over(selector, x.shape[:-1]) if self.spread else selector
            chosen, weights = self._routing(selector, weights, rows.shape[0])
            (y,) = executable(rows, chosen, weights if self.scale == 1 else weights * self.scale)
        if self.places is None:
            y = y.reshape(y_shape)
        else:
            y = self.places.back(y, self.places.shape(x.shape, self.experts, y.shape[-1]))
        # A block that hands its input back hands back that very tensor.
        return s.from_experts(module, dims, even, y.to(s.y_dtype), *carried, given)

    def _routing(self, selector: torch.Tensor, weights: torch.Tensor, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """What the experts take: experts and weights [T, K], or tokens and weights [E, C]. Raises Unusual."""
        assert self.form is not None
        if self.form not in CHOSEN:
            return FORMS[self.form](selector, weights, tokens, self.experts, self.num_slots)
        chosen, weights = by_expert(self.form, selector, weights, self.experts)
        check(chosen, tokens, distinct=False)  # that none comes twice was proved of the code that gives them
        return chosen, weights

    @functools.cached_property
    def _takes_one(self) -> bool:
        """Whether a call with one positional argument gives the input and nothing else."""
        s = self.sliced
        return not s.others and not s.more and self.binder.names[:1] == (s.x_name,)

    def _among(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, tuple[torch.Tensor, ...]]:
        """The tokens among the arguments, and the tensors beside them.

        Raises Unusual where others are not those that were verified.
        """
        bound = self.binder(args, kwargs)
        given = bound.pop(self.sliced.x_name, None)
        x = check_tokens(
            given, (self.rank,), self.dtype, self.width
        )  # first: a call without tokens may have any others
        more = tuple(check_more(bound.pop(m.name, None), m, x.shape).contiguous() for m in self.sliced.more)
        check_others(bound, self.sliced.others)
        return given, more
