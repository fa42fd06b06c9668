"""A verified cut as a plain Python function that tracers can follow: the operations of run time, the experts one call.

T tokens, D inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch

from moec.frontends.torch.calls import Call, DirectCall, PlacedCall, SlicedCall
from moec.frontends.torch.expertchoice import CHOSEN
from moec.frontends.torch.oplog import Ref
from moec.frontends.torch.places import Places
from moec.frontends.torch.program import Live, SizeOf, Step
from moec.frontends.torch.sizes import Size
from moec.frontends.torch.sliced import More
from moec.frontends.torch.straight import is_plain

Experts = Callable[..., torch.Tensor]
"""x[..., D], selector or None, weights or None -> [T, O]."""


@dataclass(frozen=True)
class Written:
    """`function(module, experts, sizes, x, selector, weights)`, or `(module, experts, sizes, x, *more)` for a block.

    `sizes(x)` is the shape of x; all else are operators of ATen, so that it also writes graphs that hold nothing else.
    """

    function: Callable[..., Any]
    unfit: Callable[[Mapping[str, Any]], str]
    """Arguments by name -> why they are outside what was verified, as far as shapes and types say; empty if not."""
    text: str
    inputs: tuple[str, ...]
    """The names under which the cut's method takes them."""


def write(call: Call) -> Written | None:
    """The cut as a function; None for a kind of cut that has none, or that has more to it than is written here."""
    if isinstance(call, DirectCall) and _known(call, _OF_DIRECT):
        return _direct(call)
    if isinstance(call, PlacedCall) and _known(call, _OF_PLACED):
        return _placed(call)
    if isinstance(call, SlicedCall) and call.form not in CHOSEN and _known(call, _OF_SLICED):
        return _sliced(call) if _known(call.sliced, _OF_SLICE) else None
    return None


_OF_DIRECT = "binder roles others dtype experts inputs out_shapes weight_dtype ids"
_OF_PLACED = "binder x_name others dtype experts inputs rank places ids"
_OF_SLICED = "binder sliced form num_slots rank dtype experts inputs width ids places scale spread"
_OF_SLICE = "x_name others before after x selector weights y_slot y_shape y_dtype input_slot result more"


def _known(value: Any, names: str) -> bool:
    return {field.name for field in fields(value)} == set(names.split())


class _Page:
    """Lines of a function's body, and the values that its text has no spelling for."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.values: dict[str, Any] = {"torch": torch}

    def function(self, head: str) -> tuple[Callable[..., Any], str]:
        text = "\n    ".join([f"def {head}:", *self.lines]) + "\n"
        space = dict(self.values)
        exec(compile(text, "<moec: a cut>", "exec"), space)  # text of our own making
        return space[head.partition("(")[0]], text

    def held(self, value: Any) -> str:
        for name, known in self.values.items():
            if known is value:
                return name
        name = f"c{len(self.values)}"
        self.values[name] = value
        return name

    def spell(self, tree: Any) -> str:
        """The text of a template."""
        if isinstance(tree, Ref):
            return f"v{tree.slot}"
        if isinstance(tree, Size):
            return _size(tree)
        if isinstance(tree, SizeOf):
            return f"v{tree.slot}.shape[{tree.axis}] * {tree.times}"
        if isinstance(tree, Live):
            return _live(tree)
        if type(tree) is list:
            return f"[{', '.join(map(self.spell, tree))}]"
        if type(tree) is tuple:
            return f"({', '.join(map(self.spell, tree))}{',' if len(tree) == 1 else ''})"
        if type(tree) is dict:
            return f"{{{', '.join(f'{key!r}: {self.spell(value)}' for key, value in tree.items())}}}"
        if type(tree) in (int, bool, str, type(None)):
            return repr(tree)
        if type(tree) is float:
            return repr(tree) if tree - tree == 0 else f"float({str(tree)!r})"
        if isinstance(tree, torch.dtype | torch.layout | torch.memory_format):
            return str(tree)
        return self.held(tree)


def _size(size: int | Size) -> str:
    if isinstance(size, int):
        return str(size)
    product = " * ".join(f"d{i}" for i in size.factors)
    if size.scale.numerator != 1:
        product += f" * {size.scale.numerator}"
    if size.scale.denominator != 1:
        product += f" // {size.scale.denominator}"
    return f"({product} + {size.shift})" if size.shift else f"({product})"


def attribute(name: str) -> str:
    """How to reach a parameter or submodule of `module`, by attributes alone: containers number theirs."""
    text = "module"
    for part in name.split(".") if name else ():
        text = f"{text}.{part}" if is_plain(part) else f"getattr({text}, {part!r})"
    return text


def _live(live: Live) -> str:
    found = attribute(live.name)
    if (live.shape, live.stride, live.offset) == (live.owner_shape, live.owner_stride, 0):
        return found
    # Parameters that start inside of a larger storage are told apart by the layout they had when compiled.
    return f"torch.as_strided({found}, {live.shape}, {live.stride}, {found}.storage_offset() + {live.offset})"


def _direct(call: DirectCall) -> Written:
    page, roles = _Page(), call.roles
    page.lines.append("y = experts(x, selector, weights)")
    for rank, sizes in sorted(call.out_shapes.items()):
        names = ", ".join(f"d{i}" for i in range(rank))
        page.lines += [
            f"if len(sizes(x)) == {rank}:",
            f"    ({names},) = sizes(x)",
            f"    return torch.ops.aten.reshape.default(y, [{', '.join(map(_size, sizes))}])",
        ]
    function, text = page.function("cut(module, experts, sizes, x, selector=None, weights=None)")
    inputs = tuple(name or "" for name in (roles.x, roles.selector, roles.weights))
    dtypes = {roles.x: call.dtype, **({roles.weights: call.weight_dtype} if roles.weights is not None else {})}
    return Written(function, _unfit(inputs, dtypes, tuple(call.out_shapes), call.inputs, call.others), text, inputs)


def _sliced(call: SlicedCall) -> Written:
    s, page = call.sliced, _Page()
    dims = ", ".join(f"d{i}" for i in range(call.rank))
    first = f"v{s.input_slot}"
    page.lines += [f"({dims},) = sizes(x)", f"{first} = torch.ops.aten.contiguous.default(x)"]
    _steps(page, s.before)
    selector, weights = (page.spell(one) for one in (s.selector, s.weights))
    if call.places is not None:
        shaped = _by_places(page, call.places, page.spell(s.x), call.experts, call.inputs)
    else:
        # The operator asks for x's own leading sizes where one choice holds for a sequence.
        rows = page.spell(s.x)
        rows = rows if call.spread else f"torch.ops.aten.reshape.default({rows}, [-1, {call.inputs}])"
        page.lines.append(f"y = experts({rows}, {selector}, {weights})")
        shaped = f"torch.ops.aten.reshape.default(y, {page.spell(list(s.y_shape))})"
    page.lines.append(f"v{s.y_slot} = torch.ops.aten.to.dtype({shaped}, {s.y_dtype})")
    _steps(page, s.after)
    page.lines += [f"{first} = x", f"return {page.spell(s.result)}"]
    more = [f"v{m.slot}" for m in s.more]
    function, text = page.function(f"cut({', '.join(['module, experts, sizes, x', *more])})")
    inputs = (s.x_name, *(m.name for m in s.more))
    dtypes = {s.x_name: call.dtype, **{m.name: m.dtype for m in s.more}}
    return Written(function, _unfit(inputs, dtypes, (call.rank,), call.width, s.others, s.more), text, inputs)


def _placed(call: PlacedCall) -> Written:
    page = _Page()
    page.lines.append(f"return {_by_places(page, call.places, 'x', call.experts, call.inputs)}")
    function, text = page.function("cut(module, experts, sizes, x)")
    axis = call.places.x_axis
    sizes = call.places.sizes or (call.experts,)
    counted = () if axis is None else tuple((axis + i, size) for i, size in enumerate(sizes))
    checks = _unfit((call.x_name,), {call.x_name: call.dtype}, (call.rank,), call.inputs, call.others, counted=counted)
    return Written(function, checks, text, (call.x_name,))


def _by_places(page: _Page, places: Places, x: str, experts: int, inputs: int) -> str:
    """Lines that run the experts on the rows of x by their places, and the text of y in its shape."""
    if places.x_axis is None:
        page.lines.append(f"each = torch.ops.aten.unsqueeze.default({x}, 0)")
        page.lines.append(f"each = torch.ops.aten.expand.default(each, [{experts}] + [-1] * (each.dim() - 1))")
    else:
        page.lines.append(f"each = {_moved(x, places.x_axis, 0, places.span)}")
    page.lines.append(f"y = experts(torch.ops.aten.reshape.default(each, [-1, {inputs}]), None, None)")
    # A tensor of y's shape, but for its last axis: no size has to be known here.
    page.lines.append("one = torch.ops.aten.slice.Tensor(each, -1, 0, 1)")
    page.lines.append("like = torch.ops.aten.expand.default(one, [-1] * (one.dim() - 1) + [y.shape[-1]])")
    return _moved("torch.ops.aten.reshape_as.default(y, like)", 0, places.y_axis, places.span)


def _moved(x: str, source: int, goal: int, count: int) -> str:
    """The text of x with `count` axes from `source` on at `goal`."""
    if count == 1:
        return f"torch.ops.aten.movedim.int({x}, {source}, {goal})"
    axes = [list(range(start, start + count)) for start in (source, goal)]
    return f"torch.ops.aten.movedim.intlist({x}, {axes[0]}, {axes[1]})"


def _unfit(
    inputs: Sequence[str],
    dtypes: Mapping[str, Any],
    ranks: Sequence[int],
    width: int,
    others: Mapping[str, Any],
    more: Sequence[More] = (),
    counted: Sequence[tuple[int, int]] = (),
) -> Callable[[Mapping[str, Any]], str]:
    """The checks of a call, with all they compare with in their text: numbers elsewhere may be symbols while traced."""
    page = _Page()
    page.values["Same"] = _same
    tensors = [name for name in inputs if name]
    for name in tensors:
        page.lines.append(f"if not isinstance(bound.get({name!r}), torch.Tensor): return '{name} is no tensor'")
    page.lines += [f"x = bound[{tensors[0]!r}]", f"if x.dim() not in {tuple(ranks)}: return 'an input of another rank'"]
    page.lines.append(f"if x.shape[-1] != {width}: return 'an input of another width'")
    for name, dtype in dtypes.items():
        page.lines.append(f"if bound[{name!r}].dtype != {dtype}: return '{name} of another dtype'")
    page.lines += [f"if x.shape[{axis}] != {size}: return 'other experts'" for axis, size in counted]
    for one in more:
        page.lines.append("(" + "".join(f"d{i}, " for i in range(ranks[0])) + ") = x.shape")
        page.lines.append(f"if bound[{one.name!r}].dim() != {len(one.shape)}: return '{one.name} of another rank'")
        sizes = "".join(f"{_size(n)}, " for n in one.shape)
        page.lines.append(f"if bound[{one.name!r}].shape != ({sizes}): return '{one.name} of another size'")
    page.lines.append(f"if len(bound) != {len(others) + len(tensors)}: return 'other arguments'")
    for name, value in others.items():
        page.lines.append(f"if {name!r} not in bound: return 'other arguments'")
        if isinstance(value, Ref):  # the code never reads that tensor
            page.lines.append(f"if not isinstance(bound[{name!r}], torch.Tensor): return '{name} is no tensor'")
            continue
        page.lines.append(f"if not Same(bound[{name!r}], {page.spell(value)}): return 'another value of {name}'")
    page.lines.append("return ''")
    return page.function("unfit(bound)")[0]


def _same(given: Any, value: Any) -> bool:
    return given is value or (not isinstance(given, torch.Tensor) and given == value)


def _steps(page: _Page, steps: Sequence[Step]) -> None:
    for step in steps:
        args, kwargs = step.arguments
        named = [f"{key}={page.spell(value)}" for key, value in kwargs.items()]
        called = attribute(step.path) if step.path is not None else _operator(page, step.op)
        text = f"{called}({', '.join([*map(page.spell, args), *named])})"
        if len(step.outs) == 1:
            page.lines.append(f"{_target(step.outs[0])} = {text}")
            if step.path is not None:  # a submodule may return its one tensor in a tuple
                page.lines.append(f"{_target(step.outs[0])} = first({_target(step.outs[0])})")
                page.values["first"] = _first
        elif step.path is None:  # operators give their tensors in a row
            page.lines.append(f"({', '.join(map(_target, step.outs))},) = {text}")
        else:
            page.values["flat"] = _flat
            page.lines.append(f"({', '.join(map(_target, step.outs))},) = flat({text})")


def _target(slot: int | None) -> str:
    return "unused" if slot is None else f"v{slot}"


def _operator(page: _Page, op: Any) -> str:
    """Operators of torch by their names, which tracers need not guard."""
    spelled = f"torch.ops.{op}"
    found: Any = torch.ops
    for part in str(op).split("."):
        found = getattr(found, part, None)
    return spelled if found is op else page.held(op)


def _first(result: Any) -> Any:
    return result if isinstance(result, torch.Tensor) else _flat(result)[0]


def _flat(result: Any) -> list[Any]:
    """The leaves of a result, in the order of a pytree's."""
    if isinstance(result, tuple | list):
        return [leaf for part in result for leaf in _flat(part)]
    if isinstance(result, Mapping):
        return [leaf for part in result.values() for leaf in _flat(part)]
    return [result]
