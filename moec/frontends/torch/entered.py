"""The submodules whose code a cut replaces: those its call entered, and the containers on the way to them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from moec.frontends.torch.oplog import Log, Site


def replaced_by(site: Site, logs: Iterable[Log], kept: Iterable[str] = ()) -> tuple[str, ...]:
    """Paths relative to the site's module, without what lies in a submodule of `kept`, which stays a call."""
    entered = {id(inner.module) for log in logs for inner in _inside(site, log)} - {id(site.module)}
    kept = [f"{path}." for path in kept]
    found: set[str] = set()
    for path, module in site.module.named_modules(remove_duplicate=False):
        if path and id(module) in entered and not any(f"{path}.".startswith(k) for k in kept):
            parts = path.split(".")
            found.update(".".join(parts[: i + 1]) for i in range(len(parts)))
    return tuple(path for path, _ in site.module.named_modules(remove_duplicate=False) if path in found)


def _inside(site: Site, log: Log) -> Iterator[Site]:
    """The calls within the site's own call in this log."""
    for inner in log.sites:
        outer = inner.parent
        while outer is not None and (outer.path, outer.method) != (site.path, site.method):
            outer = outer.parent
        if outer is not None:
            yield inner
