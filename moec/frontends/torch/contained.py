"""Attributes that submodules set on themselves, such as the capacity a router works out: a call that stays does so too.

An attribute is contained in its module's own calls when nothing else changed it, and when a second run on the same
input leaves the same value, so that it makes no difference how often the call is made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from moec.frontends.torch.oplog import Log

PLAIN = (int, float, bool, str, type(None), torch.dtype)
ABSENT = "no such attribute"


def plain_attributes(module: torch.nn.Module) -> dict[str, Any]:
    """The module's own numbers, flags and words."""
    return {k: v for k, v in module.__dict__.items() if type(v) in PLAIN}


def contained(
    log: Log,
    root: torch.nn.Module,
    prefix: str,
    changed: Mapping[str, tuple[Any, Any]],
    again: Callable[[], object],
) -> set[str]:
    """Those of the attributes in `changed`, name -> (before, after), that are; `again` runs the code once more.

    Names are relative to `root`, which the log knows as `prefix`.
    """
    found = {name for name, values in changed.items() if _only_inside(log, prefix, name, *values)}
    if not found:
        return found
    again()
    return {name for name in found if _same(_read(root, name), changed[name][1])}


def _only_inside(log: Log, prefix: str, name: str, before: Any, after: Any) -> bool:
    """Whether each change of the attribute happened within a call of its module's forward."""
    owner, _, attribute = name.rpartition(".")
    if not owner:
        return False
    path = f"{prefix}.{owner}".lstrip(".")
    now = before
    for site in log.sites:
        if site.path == path and site.method == "forward" and attribute in site.assigned:
            start, end = site.assigned[attribute]
            if not _same(now, start):
                return False
            now = end
    return _same(now, after)


def _read(root: torch.nn.Module, name: str) -> Any:
    owner, _, attribute = name.rpartition(".")
    return root.get_submodule(owner).__dict__.get(attribute)


def _same(a: Any, b: Any) -> bool:
    return type(a) is type(b) and bool(a == b)
