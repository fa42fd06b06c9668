"""moec compiles Mixture-of-Experts layers. Public names load on first use, so that importing moec loads no torch."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from moec.api import compile, explain, refresh, restore
    from moec.errors import MoecError
    from moec.exporter.export import export
    from moec.exporter.result import ExportReport
    from moec.hf import register_hf
    from moec.options import Options
    from moec.report import LayerReport, Report

_HOME = {
    "ExportReport": "moec.exporter.result",
    "LayerReport": "moec.report",
    "MoecError": "moec.errors",
    "Options": "moec.options",
    "Report": "moec.report",
    "compile": "moec.api",
    "explain": "moec.api",
    "export": "moec.exporter.export",
    "refresh": "moec.api",
    "register_hf": "moec.hf",
    "restore": "moec.api",
}

__all__ = [
    "ExportReport",
    "LayerReport",
    "MoecError",
    "Options",
    "Report",
    "__version__",
    "compile",
    "explain",
    "export",
    "refresh",
    "register_hf",
    "restore",
]


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module 'moec' has no attribute {name!r}")
    value = getattr(import_module(home), name)
    globals()[name] = value  # the next access does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
