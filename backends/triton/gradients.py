"""Forward and backward of a layer of experts as launches, for one number of tokens.

T tokens, K experts per token, P = T * K pairs, E experts, D model width, F expert width, O output width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton

from moec.backends.triton.arranging import summing
from moec.backends.triton.choose import Plan, Tile
from moec.backends.triton.gradient_tiles import GradientTiles, gradient_tiles
from moec.backends.triton.grouped_path import COUNTS, META, GroupedRun, Y, grouped_run
from moec.backends.triton.kernels import group
from moec.backends.triton.kernels.hidden_gradient import hidden_gradient, weight_sums
from moec.backends.triton.kernels.input_gradient import input_gradient
from moec.backends.triton.kernels.train_in import train_in
from moec.backends.triton.kernels.weight_gradient import bias_gradient, weight_gradient
from moec.backends.triton.launch import Fixed, Launch, current_stream
from moec.backends.triton.operands import Stored
from moec.backends.triton.site import Site, base, cdiv, matrix, vector
from moec.backends.triton.spec import Layer


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which gradients a backward computes."""

    x: bool
    weights: bool
    w_in: bool
    """Of gate and up."""
    w_out: bool
    b_in: bool
    b_out: bool

    @property
    def hidden(self) -> bool:
        """Whether the gradients of gate and up are needed on the way."""
        return self.x or self.w_in or self.b_in


@dataclass(frozen=True, slots=True)
class Saved:
    """What the forward keeps for the backward besides x, ids and routing weights."""

    z: torch.Tensor
    """[P, F] or, gated, [P, 2F]: gate and up before the activation, in the order of `meta`; a backward that needs their
    gradients puts them in their place."""
    meta: torch.Tensor
    """The grouping, as in kernels/group.py."""


Memory = Callable[[bool], Layer]
"""Gives where gradients are written: of the first product's weights (True), or of the second's."""


class TrainRun:
    """The launches for T tokens with K experts each. Every sum has a fixed order: the same bits each time."""

    def __init__(self, site: Site, plan: Plan, tokens: int) -> None:
        assert isinstance(plan.first, Tile)
        self.site, self.tokens, self.layer = site, tokens, site.layer
        self.grouped: GroupedRun = grouped_run(site, plan, tokens)
        self.rows = plan.first.bm
        self.pairs = tokens * site.k
        self.most = group.max_tiles(self.pairs, site.layer.experts, self.rows)
        self.at = group.at_tiles(site.layer.experts)
        self.at_order = self.at + 2 * self.most
        self.tiles: GradientTiles = gradient_tiles(site.layer, self.rows, self.pairs, site.facts)
        self.width = 2 * site.layer.f if site.layer.up is not None else site.layer.f
        self.sum_inputs, _ = summing(replace(site, layer=replace(site.layer, o=site.layer.d)), tokens)

    def forward(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor | None) -> tuple[torch.Tensor, Saved]:
        """x[T, D], ids[T, K], weights[T, K]? -> [T, O], and what the backward needs."""
        grouped, layer = self.grouped, self.layer
        meta, counts = (grouped.scratch.apart(index, x.device) for index in (META, COUNTS))
        z, h = x.new_empty(self.pairs, self.width), x.new_empty(self.pairs, layer.f)
        out = x.new_empty(self.tokens, layer.o)
        y = out if grouped.straight else grouped.scratch.apart(Y, x.device)
        stream = current_stream(x.device)
        grouped.arrange(stream, ids, None, meta, counts)
        self._first(stream, x, meta, z, h)
        grouped.second(stream, h, meta, weights, y)
        grouped.last(stream, y, ids, None, out)
        return out, Saved(z, meta)

    def backward(
        self,
        dy: torch.Tensor,
        x: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor | None,
        saved: Saved,
        grads: Memory,
        wanted: Wanted,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """dy[T, O] -> gradients of x and of the routing weights; those of the layer's weights go to what `grads` gives.

        Memory is asked for when it is written to, and z is overwritten: a step takes as little as it can.
        """
        stream, meta = current_stream(x.device), saved.meta
        dz, wh, dw = self._hidden(stream, dy, weights, saved, wanted)
        if wanted.w_out or wanted.b_out:
            self._second_weights(stream, dy, wh, weights, meta, grads(False), wanted)
        del wh
        if dz is None:
            return None, dw
        if wanted.w_in or wanted.b_in:
            self._first_weights(stream, dz, x, meta, grads(True), wanted)
        return self._inputs(stream, dz, ids, meta) if wanted.x else None, dw

    def restore(self, x: torch.Tensor, saved: Saved) -> None:
        """Compute z again, which a backward has overwritten."""
        h = x.new_empty(self.pairs, self.layer.f)
        self._first(current_stream(x.device), x, saved.meta, saved.z, h)

    def _second_weights(
        self,
        stream: int,
        dy: torch.Tensor,
        wh: torch.Tensor | None,
        weights: torch.Tensor | None,
        meta: torch.Tensor,
        to: Layer,
        wanted: Wanted,
    ) -> None:
        """Gradients of the second product's weights."""
        layer = self.layer
        if wanted.w_out:
            ends = {"OUTS": layer.o, "INS": layer.f, "GATHER_OUTS": True, "GATHER_INS": False}
            self._weights(stream, dy, wh, meta, to.down.w, ends)
        if wanted.b_out:
            self._bias(stream, dy, weights, meta, to.down.b, {"OUTS": layer.o, "GATHER": True})

    def _first_weights(
        self, stream: int, dz: torch.Tensor, x: torch.Tensor, meta: torch.Tensor, to: Layer, wanted: Wanted
    ) -> None:
        """Gradients of the first product's weights."""
        layer = self.layer
        for i, product in enumerate((to.gate, to.up)):
            if product is not None and wanted.w_in:
                ends = {"OUTS": self.width, "INS": layer.d, "GATHER_OUTS": False, "GATHER_INS": True}
                self._weights(stream, dz, x, meta, product.w, ends, i * layer.f)
            if product is not None and wanted.b_in:
                self._bias(stream, dz, None, meta, product.b, {"OUTS": self.width, "GATHER": False}, i * layer.f)

    def _first(self, stream: int, x: torch.Tensor, meta: torch.Tensor, z: torch.Tensor, h: torch.Tensor) -> None:
        layer, tile = self.layer, self.tiles.first
        gate, up = layer.gate, layer.up or layer.gate
        constants = (
            {"K": self.site.k, "D": layer.d, "F": layer.f, "AT": self.at}
            | matrix(gate.w)
            | vector(gate.b, "B")
            | layer.activation
            | {"HAS_BIAS": gate.b is not None, "PRECISION": self.site.precision}
        )
        bases = tuple(base(part) for part in (gate.w, up.w, gate.b, up.b))
        launch, grid = self._tiled(train_in, constants, tile, layer.f)
        launch(stream, grid, x, meta, *bases, z, h, self.most)

    def _hidden(
        self, stream: int, dy: torch.Tensor, weights: torch.Tensor | None, saved: Saved, wanted: Wanted
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """dz in z's memory, wh and the gradients of the routing weights, each None where nothing needs it."""
        layer, tile = self.layer, self.tiles.hidden
        columns = cdiv(layer.f, tile.bn)
        dz = saved.z if wanted.hidden else None
        wh = saved.z.new_empty(self.pairs, layer.f) if wanted.w_out else None
        shares = saved.z.new_empty(self.pairs, columns, dtype=torch.float32) if wanted.weights else None
        if dz is None and wh is None and shares is None:
            return None, None, None
        constants = (
            {"K": self.site.k, "F": layer.f, "O": layer.o, "AT": self.at}
            | matrix(layer.down.w)
            | layer.activation
            | {"WEIGHTED": self.site.weighted, "HAS_SHARES": shares is not None}
            | {"HAS_WH": wh is not None, "HAS_DZ": dz is not None, "PRECISION": self.site.precision}
        )
        launch, grid = self._tiled(hidden_gradient, constants, tile, layer.f)
        launch(stream, grid, dy, saved.meta, weights, base(layer.down.w), saved.z, dz, wh, shares, self.most)
        if shares is None:
            return dz, wh, None
        assert weights is not None
        dw = torch.zeros_like(weights)
        constants = {"K": self.site.k, "O": layer.o, "AT": self.at, "COLUMNS": columns} | vector(layer.down.b, "B")
        constants |= {"HAS_BIAS": layer.down.b is not None, "BM": self.rows}
        constants |= {"BC": min(64, max(16, triton.next_power_of_2(columns))), "BO": 128}
        sums = self.site.launch(weight_sums, constants, pdl=False)
        sums(stream, (self.most, 1, 1), shares, dy, saved.meta, base(layer.down.b), dw, self.most)
        return dz, wh, dw

    def _inputs(self, stream: int, dz: torch.Tensor, ids: torch.Tensor, meta: torch.Tensor) -> torch.Tensor:
        """The gradient of x[T, D]."""
        layer, tile = self.layer, self.tiles.inputs
        gate, up = layer.gate, layer.up or layer.gate
        constants = (
            {"D": layer.d, "F": layer.f, "AT": self.at}
            | matrix(gate.w)
            | {"GATED": layer.up is not None, "PRECISION": self.site.precision}
        )
        dx = dz.new_empty(self.tokens, layer.d)
        pairs = dx if self.site.k == 1 else dz.new_empty(self.pairs, layer.d)
        launch, grid = self._tiled(input_gradient, constants, tile, layer.d)
        launch(stream, grid, dz, meta, base(gate.w), base(up.w), pairs, self.most)
        self.sum_inputs(stream, pairs, ids, None, dx)
        return dx

    def _weights(
        self,
        stream: int,
        outs: torch.Tensor,
        ins: torch.Tensor | None,
        meta: torch.Tensor,
        to: Stored,
        ends: dict[str, Any],
        first: int = 0,
    ) -> None:
        """The gradient of one matrix of every expert, [E, N, C], written to `to`."""
        tile = self.tiles.weights
        n, c = to.shape
        aligned = to.base.data_ptr() % 16 == 0
        constants = (
            {"K": self.site.k, "N": n, "C": c, "OUTS": ends["OUTS"], "INS": ends["INS"], "FROM": first}
            | {"GATHER_OUTS": ends["GATHER_OUTS"], "GATHER_INS": ends["GATHER_INS"]}
            | matrix(to)
            | {"ALIGNED": aligned, "PRECISION": self.site.precision}
            | {"BM": tile.bm, "BN": tile.bn, "BK": tile.bk, "GROUP": tile.group}
        )
        launch = self.site.launch(weight_gradient, constants, warps=tile.warps, stages=tile.stages, pdl=False)
        grid = (self.layer.experts * cdiv(n, tile.bm) * cdiv(c, tile.bn), 1, 1)
        launch(stream, grid, outs, ins, meta, Fixed.at(to.base), self.at_order)

    def _bias(
        self,
        stream: int,
        outs: torch.Tensor,
        weights: torch.Tensor | None,
        meta: torch.Tensor,
        to: Stored | None,
        ends: dict[str, Any],
        first: int = 0,
    ) -> None:
        """The gradient of one bias of every expert, [E, N], written to `to`."""
        assert to is not None
        (n,) = to.shape
        constants = (
            {"K": self.site.k, "N": n, "OUTS": ends["OUTS"], "FROM": first, "GATHER": ends["GATHER"]}
            | {"WEIGHTED": weights is not None}
            | vector(to, "B")
            | {"BN": 64, "BK": 64}
        )
        launch = self.site.launch(bias_gradient, constants, pdl=False)
        grid = (cdiv(n, 64), self.layer.experts, 1)
        launch(stream, grid, outs, weights, meta, Fixed.at(to.base), self.at_order)

    def _tiled(
        self, kernel: Any, constants: dict[str, Any], tile: Tile, columns: int
    ) -> tuple[Launch, tuple[int, int, int]]:
        """A kernel over all tiles of rows and blocks of columns."""
        blocks = {"BM": tile.bm, "BN": tile.bn, "BK": tile.bk, "GROUP": tile.group}
        launch = self.site.launch(kernel, constants | blocks, warps=tile.warps, stages=tile.stages, pdl=False)
        return launch, (self.most * cdiv(columns, tile.bn), 1, 1)
