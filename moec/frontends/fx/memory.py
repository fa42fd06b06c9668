"""Which nodes of an fx.Graph write in place, to what, and which values may share memory.

What is not known to give fresh memory may share it with its operands.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Mapping
from typing import Any

import networkx as nx
import torch
from torch import fx, nn

_CHANGING = "setitem delitem iadd iand iconcat ifloordiv ilshift imod imul imatmul ior ipow irshift isub itruediv ixor"
# Views of the first operand, whatever the others are.
_VIEWING = """
    view reshape view_as reshape_as expand_as type_as transpose t permute squeeze unsqueeze expand flatten unflatten
    movedim moveaxis swapaxes swapdims getitem chunk split tensor_split unbind narrow select diagonal as_strided
    getattr detach contiguous to float half bfloat16 double type ravel"""
_MAKING = """
    abs add sub mul div truediv floordiv mod neg pow exp log sqrt rsqrt reciprocal round floor ceil clamp clamp_min
    clamp_max eq ne lt le gt ge and_ or_ xor invert not_ logical_and logical_or logical_not bitwise_and bitwise_or
    bitwise_not sum mean prod var std amax amin max min argmax argmin topk sort argsort cumsum cumprod logsumexp norm
    any all isnan isinf isfinite nonzero bincount histc searchsorted one_hot where masked_fill scatter scatter_add
    index_add index_put index_copy index_select gather embedding cat concat stack clone zeros ones full arange empty
    zeros_like ones_like full_like empty_like rand_like randn_like new_zeros new_ones new_full new_empty tensor
    linear matmul mm bmm addmm addmv addbmm baddbmm dot outer mv _grouped_mm softmax log_softmax _softmax _log_softmax
    sigmoid logsigmoid tanh relu relu6 gelu silu elu leaky_relu softplus hardswish hardsigmoid mish sin cos tan erf
    square layer_norm native_layer_norm rms_norm group_norm repeat tile size numel dim sym_size item maximum minimum
    layer"""
_IN_PLACE, _VIEWS, _FRESH = (frozenset(names.split()) for names in (_CHANGING, _VIEWING, _MAKING))
_PLAIN_MODULES = tuple(f"torch.nn.modules.{name}" for name in ("linear", "sparse", "normalization", "activation"))
_KNOWN_PACKAGES = ("torch", "_operator", "operator", "math", "builtins", "einops", "moec")
_SETTINGS = ("shape", "dtype", "device", "ndim")
# What gives the same each time although it has no operands.
_FIXED = frozenset({"arange", "zeros", "ones", "full", "tensor", "scalar_tensor", "eye", "linspace"})
_RANDOM = ("rand", "dropout", "empty", "bernoulli", "multinomial", "poisson", "rrelu", "gumbel")


def name_of(node: fx.Node) -> str:
    """The bare name of what the node calls: mul_ for aten.mul_.Tensor, imul for operator.imul."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.split("::")[-1]
    return target if isinstance(target, str) else getattr(target, "__name__", "")


class Memory:
    """Of a graph whose modules are in `host`; `tensors` are those that nodes of weights hold."""

    def __init__(self, graph: fx.Graph, host: nn.Module, tensors: Mapping[fx.Node, torch.Tensor]) -> None:
        self._host = host
        links = nx.Graph()
        links.add_nodes_from(graph.nodes)
        links.add_edges_from((one, node) for node in graph.nodes for one in self._shared(node))
        self._holders: dict[int, list[fx.Node]] = {}
        for node, tensor in tensors.items():
            self._holders.setdefault(_storage(tensor), []).append(node)
        held: dict[Any, list[fx.Node]] = {}
        for node in graph.find_nodes(op="get_attr"):
            held.setdefault(node.target, []).append(node)
        for group in (*held.values(), *self._holders.values()):
            links.add_edges_from((group[0], node) for node in group[1:])
        self._groups = {node: group for group in nx.connected_components(links) for node in group}
        self.writes = {node: found for node in graph.nodes if (found := self._written(node))}
        """By node that writes: the operands it writes to."""

    def aliases(self, *values: fx.Node) -> set[fx.Node]:
        """The values and all that may share their memory."""
        return set().union(*(self._groups[node] for node in values))

    def written(self, write: fx.Node) -> set[fx.Node]:
        """All that may change when this node runs."""
        return self.aliases(*self.writes[write])

    def holders(self, call: fx.Node) -> set[fx.Node]:
        """The nodes that hold what the called module computes with."""
        if call.op != "call_module":
            return set()
        module = self._module(call)
        tensors = [*module.parameters(), *module.buffers()]
        return {node for tensor in tensors for node in self._holders.get(_storage(tensor), ())}

    def _module(self, node: fx.Node) -> nn.Module:
        return self._host.get_submodule(str(node.target))

    def _shared(self, node: fx.Node) -> list[fx.Node]:
        """The operands whose memory the result may be in."""
        written = self._written(node)
        name, operands = name_of(node), list(node.all_input_nodes)
        if node.op == "output" or not operands:
            return []
        if node.op == "call_module":
            kind = type(self._module(node))
            return written if kind.__module__ in _PLAIN_MODULES and kind is not nn.Identity else operands
        if name == "getattr" and len(node.args) > 1 and node.args[1] in _SETTINGS:
            return []
        if _is_known(node) and (name in _FRESH or (name == "einsum" and len(operands) > 1)):
            return written
        if written and not isinstance(node.target, torch._ops.OpOverload):
            return written
        if name in _VIEWS and node.args and isinstance(node.args[0], fx.Node):
            return [node.args[0]]
        if isinstance(node.target, torch._ops.OpOverload) and (written or not _decomposes(node.target)):
            declared = [one for arg, one in _arguments(node) if arg.alias_info is not None]
            return [node for one in declared for node in _nodes(one)]
        return operands

    def _written(self, node: fx.Node) -> list[fx.Node]:
        if node.op in ("placeholder", "get_attr", "output"):
            return []
        if node.op == "call_module":
            in_place = any(getattr(one, "inplace", False) for one in self._module(node).modules())
            return list(node.all_input_nodes) if in_place else []
        if isinstance(node.target, torch._ops.OpOverload):
            changed = [one for arg, one in _arguments(node) if arg.alias_info is not None and arg.alias_info.is_write]
            return [node for one in changed for node in _nodes(one)]
        if "out" in node.kwargs and node.kwargs["out"] is not None:
            return _nodes(node.kwargs["out"])
        if _writes_by_name(node):
            return _nodes(node.args[0]) if node.args else list(node.all_input_nodes)
        if node.op == "call_function" and (_is_foreign(node.target) or _asks_for_it(node)):
            return list(node.all_input_nodes)
        return []


def is_fixed(node: fx.Node) -> bool:
    """Whether the node gives the same each time for the same operands."""
    name = name_of(node)
    if node.op not in ("call_function", "call_method") or any(word in name for word in _RANDOM) or name == "normal":
        return False
    module = getattr(node.target, "__module__", "") or ""
    return bool(node.all_input_nodes) or name in _FIXED or module in ("_operator", "operator", "math")


def _writes_by_name(node: fx.Node) -> bool:
    name = name_of(node)
    if getattr(node.target, "__module__", None) in ("_operator", "operator"):
        return name in _IN_PLACE
    if name.startswith("__") and name.endswith("__"):
        return name.strip("_") in _IN_PLACE
    return name.endswith("_") or name in _IN_PLACE or bool(node.kwargs.get("inplace"))


def _asks_for_it(node: fx.Node) -> bool:
    """Whether a function is told to write, by position or name; statistics and norms of embeddings count."""
    if name_of(node) in ("batch_norm", "instance_norm"):
        return True
    try:
        bound = inspect.signature(node.target).bind(*node.args, **node.kwargs).arguments  # type: ignore[arg-type]
    except (TypeError, ValueError):  # a builtin has no signature
        return bool(node.kwargs.get("max_norm"))
    return bool(bound.get("inplace")) or bound.get("max_norm") is not None


def _is_known(node: fx.Node) -> bool:
    """Whether its name is torch's own."""
    return not isinstance(node.target, torch._ops.OpOverload) or node.target.namespace in ("aten", "prims", "moec")


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata if tensor.layout == torch.strided else id(tensor)


def _is_foreign(target: Any) -> bool:
    """Whether it is a function of the user's or runs a graph of its own, and may do anything."""
    if isinstance(target, torch._ops.HigherOrderOperator):
        return True
    package = (getattr(target, "__module__", None) or "torch").split(".")[0]
    return isinstance(target, types.FunctionType) and package not in _KNOWN_PACKAGES


def _decomposes(target: torch._ops.OpOverload) -> bool:
    """Whether it is made of other operations: its schema need not say that it gives a view."""
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(target.name(), "CompositeImplicitAutograd"))


def _arguments(node: fx.Node) -> list[tuple[Any, Any]]:
    target = node.target
    assert isinstance(target, torch._ops.OpOverload)
    found = []
    for i, arg in enumerate(target._schema.arguments):
        if i < len(node.args) and not arg.kwarg_only:
            found.append((arg, node.args[i]))
        elif arg.name in node.kwargs:
            found.append((arg, node.kwargs[arg.name]))
    return found


def _nodes(value: Any) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.map_arg(value, found.append)
    return found
