"""The command line called in this process, and what its tests give it."""

from __future__ import annotations

import pytest

from moec import cli
from moec.report import LayerReport


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit status, stdout, stderr."""
    try:
        status = cli.main(arguments)
    except SystemExit as left:
        status = int(left.code or 0)
    out, err = capsys.readouterr()
    return status, out, err


BENCH = ("--seconds", "0", "--tokens", "1,3")
REGION = """region {name}(%x: f32[T, 4]) {{
  %w = weight {{ref="w"}} : f32[8, 4]
  %h = linear(%x, %w) : f32[T, 8]
  %a = act(%h) {{fn="silu"}} : f32[T, 8]
  %b = act(%h) {{fn="gelu"}} : f32[T, 8]
  return %a
}}
"""


def layers() -> list[LayerReport]:
    compiled = LayerReport("a", "ffn", "compiled", max_error=1e-7, evidence=("two linears",), ir_before="region a")
    return [compiled, LayerReport("b", "ffn", "left alone", reason="its activation is not known")]
