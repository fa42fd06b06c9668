"""Plans that tuning found on this machine, which go before those that moec ships and before the cost model.

A file holds entries for one GPU: a layer's key, a number of tokens, the plan that was fastest and its microseconds.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from math import log2
from pathlib import Path
from typing import Any

from moec.backends.triton.choose import GEMV, Plan, Rows, Shape, Tile
from moec.writing import write_text

HERE = "tuned here"
"""The origin of a plan that this machine measured."""
NEAR = 0.5
"""How far a number of tokens may be from a measured one, as a difference of their base-2 logarithms."""


@dataclass(frozen=True)
class Entry:
    """What one measurement found."""

    key: str
    tokens: int
    plan: Plan
    us: float

    def to_json(self) -> dict[str, Any]:
        plan = {"path": self.plan.path, "first": list(self.plan.first), "second": list(self.plan.second)}
        return {"key": self.key, "tokens": self.tokens, **plan, "us": round(self.us, 2)}

    @classmethod
    def from_json(cls, found: Mapping[str, Any], origin: str) -> Entry:
        """Raises what comes of a malformed entry: KeyError, TypeError, ValueError."""
        form = Rows if found["path"] == GEMV else Tile
        plan = Plan(str(found["path"]), form(*found["first"]), form(*found["second"]), origin)
        return cls(str(found["key"]), int(found["tokens"]), plan, float(found["us"]))


def key_of(shape: Shape, k: int) -> str:
    """What a plan is good for: everything that a choice depends on but the number of tokens and the GPU."""
    dtypes = "-".join(str(dtype).removeprefix("torch.") for dtype in (shape.dtype, shape.weights))
    lies = "".join("t" if turned else "n" for turned in shape.turned) + ("a" if shape.tma else "u") + "l" * shape.listed
    gate = "gated" if shape.gated else "plain"
    return f"E{shape.experts}k{k}D{shape.d}F{shape.f}O{shape.o}-{gate}-{dtypes}-{lies}"


def cache_file(gpu: str) -> Path:
    """Where this machine's results for a GPU are: under MOEC_CACHE, else the user's cache folder."""
    root = os.environ.get("MOEC_CACHE")
    if root is None:
        root = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "moec")
    return Path(root) / "triton" / f"{_slug(gpu)}-triton-{version('triton')}.json"


def _slug(gpu: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")


def lookup(shape: Shape, k: int, tokens: int, gpu: str) -> Plan | None:
    """The plan measured here for the nearest number of tokens; None if none is near."""
    entries = _read(cache_file(gpu), HERE).get(key_of(shape, k), ())
    near = [(abs(log2(entry.tokens / tokens)), entry.tokens, entry) for entry in entries]
    distance, _, entry = min(near, default=(NEAR + 1, 0, None))
    # One token is like no other number: nothing is shared.
    fits = entry is not None and distance <= NEAR and (tokens > 1) == (entry.tokens > 1)
    return entry.plan if fits and entry is not None else None


def record(entries: Iterable[Entry], gpu: str, path: Path | None = None) -> Path:
    """Add entries to this machine's file, in place of older ones for the same key and tokens; the file's path."""
    path = path or cache_file(gpu)
    _read.cache_clear()
    kept = {(e.key, e.tokens): e for group in _read(path, "").values() for e in group}
    kept |= {(e.key, e.tokens): e for e in entries}
    listed = [entry.to_json() for _, entry in sorted(kept.items(), key=lambda item: item[0])]
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join("  " + json.dumps(entry) for entry in listed)
    write_text(
        path, f'{{"gpu": {json.dumps(gpu)}, "triton": {json.dumps(version("triton"))}, "entries": [\n{lines}\n]}}\n'
    )
    _read.cache_clear()
    return path


@lru_cache(maxsize=16)
def _read(path: Path, origin: str) -> dict[str, list[Entry]]:
    """A file's entries by key. One that is damaged is left out with a warning: plans are only about speed."""
    if not path.is_file():
        return {}
    found: dict[str, list[Entry]] = {}
    try:
        for raw in json.loads(path.read_text(encoding="utf-8"))["entries"]:
            entry = Entry.from_json(raw, origin)
            found.setdefault(entry.key, []).append(entry)
    except (OSError, ValueError, KeyError, TypeError) as error:
        text = f"[MOEC610] {path} holds no tuning results ({type(error).__name__}: {error}); it is not used"
        warnings.warn(text, stacklevel=2)
        return {}
    return found
