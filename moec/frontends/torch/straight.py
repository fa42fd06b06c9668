"""A slice's own operations as one Python function, written out: a call runs the operations and looks nothing up.

For a layer of small experts, walking the steps and filling their arguments in would take as long as the experts do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from keyword import iskeyword
from typing import Any

import torch

from moec.errors import MoecError
from moec.frontends.torch.oplog import Ref, slots
from moec.frontends.torch.program import Live, SizeOf, Step
from moec.frontends.torch.sizes import Size
from moec.trees import tree_flatten, tree_unflatten

Straight = Callable[..., Any]
"""(module, dims, *tensors) -> what was asked for."""


def write_out(steps: Sequence[Step], takes: Sequence[int], gives: Any, *, anew: int | None = None) -> Straight:
    """The steps as a function of the module, the input's sizes and the tensors of slots `takes`; it returns `gives`, a
    template. Submodules and parameters are looked up on each call.

    The slot `anew` is one that `gives` reads as another tensor than the steps do: the function's last argument.
    """
    writer = _Writer()
    taken = ", ".join([f"t{slot}" for slot in takes] + (["last"] if anew is not None else []))
    body = [writer.line(step) for step in steps]
    if anew is not None:
        body.append(f"t{anew} = last")
    source = "\n    ".join([f"def straight(module, dims, {taken}):", *body, f"return {writer.expression(gives)}"])
    names: dict[str, Any] = {"live": read_live, "flat": _flat, "unflatten": tree_unflatten, **writer.constants}
    exec(compile(source, "<a layer's own operations>", "exec"), names)
    written: Straight = names["straight"]
    return written


def used_by(steps: Sequence[Step], result: Any) -> set[int]:
    """Slots that the steps and the result read and that no earlier of the steps makes."""
    made: set[int] = set()
    used: set[int] = set()
    for step in steps:
        used |= _read(step.arguments) - made
        made |= {slot for slot in step.outs if slot is not None}
    return used | _read(result) - made


def _read(tree: Any) -> set[int]:
    """Slots whose values or sizes a template reads."""
    return {*slots(tree), *(leaf.slot for leaf in tree_flatten(tree)[0] if isinstance(leaf, SizeOf))}


def is_plain(name: str) -> bool:
    """Whether Python code can say `module.name`: keywords are identifiers, too, and names of submodules."""
    return name.isidentifier() and not iskeyword(name)


class _Writer:
    """Python expressions for templates; what has no literal is a constant by name."""

    def __init__(self) -> None:
        self.constants: dict[str, Any] = {}

    def line(self, step: Step) -> str:
        """The assignment of one step."""
        args, kwargs = step.arguments
        given = "".join(f"{self.expression(arg)}, " for arg in args)
        named = f"**{self.expression(kwargs)}" if kwargs else ""
        call = f"{self._called(step)}({given}{named})"
        targets = [f"t{slot}" if slot is not None else "_" for slot in step.outs]
        return f"{', '.join(targets)}{',' if targets else '()'} = flat({call})"

    def _called(self, step: Step) -> str:
        if step.path is None:
            return self.constant(step.op)
        parts = step.path.split(".")
        direct = all(is_plain(part) for part in parts)
        return f"module.{step.path}" if direct else f"module.get_submodule({step.path!r})"

    def constant(self, value: Any) -> str:
        name = f"c{len(self.constants)}"
        self.constants[name] = value
        return name

    def expression(self, tree: Any) -> str:
        """What gives the template's value in a call."""
        if isinstance(tree, Ref):
            return f"t{tree.slot}"
        if isinstance(tree, Live):
            return f"live(module, {self.constant(tree)})"
        if isinstance(tree, Size):
            plain = len(tree.factors) == 1 and tree.scale == 1 and tree.shift == 0
            return f"dims[{tree.factors[0]}]" if plain else f"{self.constant(tree)}(dims)"
        if isinstance(tree, SizeOf):
            return f"t{tree.slot}.shape[{tree.axis}] * {tree.times}"
        if tree is None or type(tree) in (bool, int, str):
            return repr(tree)
        if type(tree) in (tuple, list):
            inner = "".join(f"{self.expression(part)}, " for part in tree)
            return f"({inner})" if type(tree) is tuple else f"[{inner}]"
        if type(tree) is dict:
            inner = ", ".join(f"{self.expression(key)}: {self.expression(part)}" for key, part in tree.items())
            return f"{{{inner}}}"
        leaves, spec = tree_flatten(tree)
        if len(leaves) == 1 and leaves[0] is tree:
            return self.constant(tree)
        return f"unflatten({self.expression(leaves)}, {self.constant(spec)})"


def _flat(out: Any) -> Sequence[Any]:
    """The tensors of an operation's result, in order."""
    if isinstance(out, torch.Tensor):
        return (out,)
    plain = type(out) in (tuple, list) and all(isinstance(one, torch.Tensor) for one in out)
    return out if plain else tree_flatten(out)[0]


def read_live(module: torch.nn.Module, live: Live) -> torch.Tensor:
    """A parameter or buffer as it is now. Raises MOEC230 where it has another layout than when it was compiled."""
    path, _, leaf = live.name.rpartition(".")
    found = getattr(module.get_submodule(path) if path else module, leaf)
    if not isinstance(found, torch.Tensor) or (tuple(found.shape), found.stride()) != (
        live.owner_shape,
        live.owner_stride,
    ):
        raise MoecError("MOEC230", f"{live.name!r} has another layout than when it was compiled")
    if tuple(found.shape) == live.shape and found.stride() == live.stride and live.offset == 0:
        return found
    return found.as_strided(live.shape, live.stride, found.storage_offset() + live.offset)
