"""One expert_ffn over weights that the caller makes.

T tokens, K experts per token, E experts, D model width, F expert width, O output width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from moec.ir import Builder, ExpertFfn, Tensor, Value


def expert_ffn(
    b: Builder,
    weight: Callable[..., Value],
    sizes: tuple[int, int, int, int],
    dtypes: tuple[str, str, str],
    *,
    layout: str,
    bias: bool,
    **attributes: Any,
) -> ExpertFfn:
    """The op for `sizes` (E, D, F, O); `dtypes` are x's, the ids' and the routing weights'.

    `weight(name, *shape)` makes each of its weights, in the order w_up, b_in, b_out, b_up, w_in, w_out.
    """
    e, d, f, o = sizes
    rows = f if layout in ("none", "pair") else 2 * f
    x = b.input("x", Tensor.of(dtypes[0], "T", d))
    ids = b.input("experts", Tensor.of(dtypes[1], "T", "K"))
    weights = b.input("weights", Tensor.of(dtypes[2], "T", "K"))
    more: dict[str, Any] = {"fn": "silu", "layout": layout, **attributes}
    if layout == "pair":
        more["w_up"] = weight("w_up", e, f, d)
    if bias:
        more |= {"b_in": weight("b_in", e, rows), "b_out": weight("b_out", e, o)}
    if bias and layout == "pair":
        more["b_up"] = weight("b_up", e, f)
    return ExpertFfn(x, ids, weights, weight("w_in", e, rows, d), weight("w_out", e, o, f), **more)
