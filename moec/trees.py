"""Arguments and results taken apart into leaves: tuples, lists, dicts and what is built on these.

Everything else is a leaf, also what a library has registered with torch's pytree meanwhile, as transformers does with
its caches of keys and values when a model is exported: taken apart they would be put together again from other things
than tensors, and they are not the same objects then.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from torch.utils import _pytree
from torch.utils._pytree import TreeSpec, tree_unflatten

__all__ = ["TreeSpec", "tree_flatten", "tree_map", "tree_unflatten"]
_CONTAINERS = (tuple, list, dict, deque)


def _whole(value: Any) -> bool:
    return not isinstance(value, _CONTAINERS)


def tree_flatten(tree: Any) -> tuple[list[Any], TreeSpec]:
    """The leaves of a tree in order, and what puts them together again."""
    return _pytree.tree_flatten(tree, is_leaf=_whole)


def tree_map(change: Callable[..., Any], tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> Any:
    """The same tree with its leaves changed; `is_leaf` names more of them."""
    if is_leaf is None:
        return _pytree.tree_map(change, tree, is_leaf=_whole)
    return _pytree.tree_map(change, tree, is_leaf=lambda value: _whole(value) or is_leaf(value))
