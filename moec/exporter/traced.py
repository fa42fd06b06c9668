"""A torch model as an ONNX graph with a mark in the place of each layer: torch.export, then torch's exporter.

The sizes that may change are given; torch fixes those of them that the model's code fixes.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from moec.errors import MoecError
from moec.exporter import attention
from moec.exporter.calls import Mark, call_marked
from moec.exporter.marks import experts_mark, ffn_mark, translations
from moec.exporter.wider import widen_first
from moec.frontends.torch.lifted import Lifted
from moec.trees import tree_flatten, tree_unflatten


@dataclass(frozen=True)
class Layout:
    """How a model's arguments and results are taken apart into named tensors."""

    spec: Any
    leaves: tuple[Any, ...]
    """The arguments' leaves; None in the place of a tensor."""
    names: tuple[str, ...]

    def arguments(self, tensors: Sequence[torch.Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with these tensors in their places."""
        given = iter(tensors)
        leaves = [next(given) if isinstance(leaf, _Hole) else leaf for leaf in self.leaves]
        found: tuple[tuple[Any, ...], dict[str, Any]] = tree_unflatten(leaves, self.spec)
        return found


class _Hole:
    """The place of a tensor among the leaves."""


def take_apart(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Layout, list[torch.Tensor]]:
    """The layout of a call, and its tensors."""
    named = _by_name(model, args, dict(kwargs))
    leaves, spec = tree_flatten(((), named))
    names = []
    for name, value in named.items():
        tensors = [leaf for leaf in tree_flatten(value)[0] if isinstance(leaf, torch.Tensor)]
        names += [name] if len(tensors) == 1 else [f"{name}.{index}" for index in range(len(tensors))]
    holes = tuple(_Hole() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves)
    return Layout(spec, holes, tuple(names)), [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


def _by_name(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    bound = inspect.signature(model.forward).bind(*args, **kwargs)
    flat: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        kind = bound.signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            flat |= value
        elif kind is inspect.Parameter.VAR_POSITIONAL:
            raise MoecError("MOEC701", f"the model's arguments *{name} have no names", hint="pass them by keyword")
        else:
            flat[name] = value
    return flat


class Flat(nn.Module):
    """A model whose inputs are tensors in a row, and whose result is a tuple of tensors."""

    def __init__(self, model: nn.Module, layout: Layout) -> None:
        super().__init__()
        self.model, self.layout = model, layout

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        args, kwargs = self.layout.arguments(tensors)
        return tuple(tensor for _, tensor in results(self.model(*args, **kwargs)))


def results(result: Any) -> list[tuple[str, torch.Tensor]]:
    """Name and value of each tensor in a model's result; caches and other objects are no results."""
    if isinstance(result, torch.Tensor):
        return [("output", result)]
    found: list[tuple[str, torch.Tensor]] = []
    parts = result.items() if isinstance(result, Mapping) else enumerate(_sequence(result))
    for key, value in parts:
        title = key if isinstance(key, str) else f"output_{key}"
        if isinstance(value, torch.Tensor):
            found.append((title, value))
        elif isinstance(value, tuple | list):
            tensors = [one for one in value if isinstance(one, torch.Tensor)]
            found += [(f"{title}.{index}", one) for index, one in enumerate(tensors)]
    return found


def _sequence(result: Any) -> Sequence[Any]:
    return result if isinstance(result, tuple | list) else ()


MarkOf = Callable[[Lifted], Mark]


@contextlib.contextmanager
def marked(twin: nn.Module, layers: Sequence[Lifted], mark_of: MarkOf) -> Iterator[None]:
    """While it lasts, the layers' methods on the twin compute their experts by `mark_of(layer)`."""
    changed = []
    try:
        for lifted in layers:
            module = twin.get_submodule(lifted.name)
            module.__dict__[lifted.method] = _method(lifted, module, mark_of(lifted))
            changed.append((module, lifted.method))
        yield
    finally:
        for module, method in changed:
            module.__dict__.pop(method, None)


def _method(lifted: Lifted, module: nn.Module, mark: Mark) -> Any:
    def method(*args: Any, **kwargs: Any) -> Any:
        return call_marked(lifted.call, module, mark, args, kwargs)

    return method


def _node(lifted: Lifted) -> Mark:
    """The custom op that stands for a layer in the graph."""
    width = lifted.body.outputs

    def mark(x: torch.Tensor, *routing: torch.Tensor) -> torch.Tensor:
        if not routing:
            one: torch.Tensor = ffn_mark(x, layer_key(lifted), width)
            return one
        found: torch.Tensor = experts_mark(x, routing[0], routing[1], layer_key(lifted), width)
        return found

    return mark


def layer_key(lifted: Lifted) -> str:
    """What the marks of a layer say; a module may have two methods that are layers."""
    return f"{lifted.name}:{lifted.method}"


def trace(
    twin: nn.Module,
    layers: Sequence[Lifted],
    layout: Layout,
    tensors: Sequence[torch.Tensor],
    dynamic: Sequence[Collection[int]],
) -> Any:
    """The twin as an onnx-ir model with a node of moec's domain for each layer; `dynamic` has the axes of each tensor.

    Raises MOEC702 where torch cannot.
    """
    flat = Flat(twin, layout).eval()
    args, kwargs = layout.arguments(tensors)
    with torch.no_grad():
        outputs = [name for name, _ in results(twin(*args, **kwargs))]
    sizes = (tuple(_sizes(tensor.dim(), axes) for tensor, axes in zip(tensors, dynamic, strict=True)),)
    try:
        with marked(twin, layers, _node), torch.no_grad(), _silent(), _casts_to_itself():
            program = torch.export.export(flat, tuple(tensors), dynamic_shapes=sizes, strict=False)
            _forget_bases(program)
            widen_first(program)
            onnx_program = torch.onnx.export(
                program,
                dynamo=True,
                input_names=list(layout.names),
                output_names=outputs,
                custom_translation_table={**translations(), **attention.translations()},
                verbose=False,
            )
    except MoecError:
        raise
    except Exception as error:  # torch.export and the exporter raise dozens of kinds
        raise MoecError(
            "MOEC702",
            f"torch.export or torch's ONNX exporter cannot express this {type(twin).__name__}: {_reason(error)}",
            hint="what surrounds the layers is exported by torch; --debug shows its whole message",
        ) from error
    assert onnx_program is not None
    return onnx_program.model


def _sizes(rank: int, dynamic: Collection[int]) -> dict[int, Any]:
    """AUTO leaves it to torch whether the code between fixes a size after all."""
    kind = torch.export.Dim
    return {axis: kind.AUTO if axis in dynamic else kind.STATIC for axis in range(rank)}


def _forget_bases(program: Any) -> None:
    """torch writes guards on the sizes of what an input was a view of, while it traced, and then fails on them."""
    code = getattr(program, "_guards_code", None)
    if isinstance(code, list):
        program._guards_code = [guard for guard in code if "._base" not in guard]


@contextlib.contextmanager
def _casts_to_itself() -> Iterator[None]:
    """A module cast to the type it has is that module: routers do it in their forward, and torch.export refuses it."""
    original = nn.Module.to

    def to(self: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        kinds = {p.dtype for p in self.parameters() if p.is_floating_point()}
        same = len(args) == 1 and not kwargs and isinstance(args[0], torch.dtype) and kinds <= {args[0]}
        return self if same else original(self, *args, **kwargs)

    nn.Module.to = to  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.to = original  # type: ignore[method-assign]


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Without the exporter's notes about packages that are not there, and its lines on stdout."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _reason(error: BaseException) -> str:
    """The first line of the innermost cause."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]
