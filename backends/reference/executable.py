"""A region that runs: inputs checked, weights read live, every op by its meaning or by a faster way to the same."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from threading import Lock

import torch

from moec.backendbase import OpaqueGraph, Weights
from moec.backends.reference.fast import Fast, Planner
from moec.backends.reference.frame import Frame
from moec.backends.reference.inputs import Inputs
from moec.backends.reference.joined import Experts, whole
from moec.backends.reference.steps import Step, call_steps, computed_once, constant_nodes, planned
from moec.backends.reference.weights import LiveWeight, LiveWeights, per_expert
from moec.ir import Node, Region, Weight
from moec.ir.printer import print_op


@dataclass(frozen=True)
class Held:
    """Copies of weights and what the weights were like when they were made."""

    version: Hashable
    values: Mapping[str, Experts]


@dataclass(frozen=True, eq=False)
class Kept:
    """What a call reads of the weights, and where they were then."""

    placement: Hashable
    held: Held
    values: Mapping[str, Experts]


class RegionExecutable:
    """Runs a region on whatever device its inputs are.

    Weights are read where they lie on each call. What is computed from them once is held: int8 weights, and with `pack`
    joined weights and whatever faster ways copy; it is made anew when `weights.version()` changed. Calls may run in
    several threads at once. No graph is recorded, whatever the grad mode.
    """

    # Whether a call asks if any weight moved, instead of reading those it needs anew: of many experts few are hit.
    _keeps = False

    def __init__(
        self,
        region: Region,
        weights: Weights,
        opaques: Mapping[str, OpaqueGraph],
        *,
        pack: bool,
        plan: Planner,
    ) -> None:
        self._region, self._store, self._opaques, self._pack = region, weights, dict(opaques), pack
        experts = per_expert(region)
        self._live = {
            node.results[0].name: LiveWeight(weights, node.op, of_experts=node.results[0].name in experts)
            for node in region.nodes
            if isinstance(node.op, Weight)
        }
        self._constant = constant_nodes(region)
        fast = planned(region, self._constant, plan)
        self._once = computed_once(self._constant, region, pack, fast)
        self._steps = call_steps(region, self._once, fast)
        # A region of one faster op, as most are, has no values to keep account of.
        only = self._steps[0] if len(self._steps) == 1 else None
        self._only = only if only and only.fast and only.node.results == region.outputs else None
        read = {value.name for step in self._steps for value in step.node.op.operands}
        read |= {value.name for value in region.outputs}
        self._read = LiveWeights(weights, {name: live for name, live in self._live.items() if name in read})
        self._inputs = Inputs(region)
        self._sized = tuple(
            node.results[0] for node in region.nodes if isinstance(node.op, Weight) and node.op.type.letters
        )
        self._lock = Lock()
        self._held: Held | None = None
        self._kept: Kept | None = None
        with torch.no_grad():
            for live in self._live.values():
                live.check()
        self.refresh()

    def __call__(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The region's outputs. Raises MOEC404 and MOEC109 for inputs that do not fit, MOEC405 for weights."""
        sizes = self._inputs.check(inputs)
        if not torch.is_grad_enabled():
            return self._compute(inputs, sizes)
        with torch.no_grad():
            return self._compute(inputs, sizes)

    def _compute(self, inputs: Sequence[torch.Tensor], sizes: Mapping[str, int]) -> tuple[torch.Tensor, ...]:
        values = self._weights()
        values.update(zip(self._inputs.names, inputs, strict=True))
        at = Frame(values, self._opaques, sizes)
        if self._sized:
            at.bind({value: self._live[value.name].read() for value in self._sized})
        if self._only is not None:
            return tuple(self._only.results(at))
        for step in self._steps:
            step.run(at)
            for name in step.drop:
                del at.values[name]
        return tuple(at.tensor(value) for value in self._region.outputs)

    def _weights(self) -> dict[str, Experts]:
        """The weights that a call needs, in a dict of its own."""
        return dict(self.kept().values) if self._keeps else self._read_weights()

    def kept(self) -> Kept:
        """What calls read of the weights: the same object until one moved, or a copy of weights was made anew."""
        placement, held = self._store.placement(), self._current()
        kept = self._kept
        if kept is None or kept.placement != placement or kept.held is not held:
            read = {name: _all_read(experts) for name, experts in self._read_weights().items()}
            self._kept = kept = Kept(placement, held, self._from_weights(read))
        return kept

    def _from_weights(self, values: dict[str, Experts]) -> dict[str, Experts]:
        """The weights, and whatever else is to be kept with them."""
        return values

    def _read_weights(self) -> dict[str, Experts]:
        values: dict[str, Experts] = dict(self._current().values)
        self._read.read_into(values)
        return values

    @property
    def nbytes_packed(self) -> int:
        """Bytes of copies of weights: int8 weights, joined ones with `pack`, and those of faster ways."""
        held = self._held.values.values() if self._held is not None else ()
        return sum(whole(copy).nbytes for copy in held) + sum(fast.nbytes_packed for fast in self._packing())

    def refresh(self) -> None:
        """Make all copies of weights anew, after writes that `weights.version()` does not see (`p.data`)."""
        with self._lock:
            self._hold()

    def describe(self) -> str:
        """One line for each op: where its weights are, or how it runs."""
        steps = {step.node.results: step for step in self._steps}
        return "\n".join(f"{_text(node)}: {self._way(node, steps.get(node.results))}" for node in self._region.nodes)

    def _way(self, node: Node, step: Step | None) -> str:
        if isinstance(node.op, Weight):
            return "read where it lies"
        if node in self._once:
            copies = self._current().values
            count = sum(whole(copies[value.name]).nbytes for value in node.results)
            return f"a copy of {count:,} bytes, made anew when the weights change"
        if node in self._constant:
            return "left where the weights lie, put together when used"
        assert step is not None
        return "by its meaning" if step.fast is None else step.fast.describe()

    def _packing(self) -> list[Fast]:
        """The faster ways that may copy weights."""
        return [step.fast for step in self._steps if step.fast is not None and self._pack]

    def _current(self) -> Held:
        """The copies, made anew if the weights changed."""
        held = self._held
        guarded = held is None or held.version is not None
        # Reading versions would break a graph that torch.compile traces.
        if not guarded or torch.compiler.is_compiling():
            assert held is not None
            return held
        version = self._store.version()
        if held is not None and held.version == version:
            return held
        with self._lock:
            if self._held is None or self._held.version != version:
                self._hold()
            assert self._held is not None
            return self._held

    def _hold(self) -> None:
        """Compute what is computed once. The old copies go first, so that there are never two."""
        self._held = None
        copies: dict[str, Experts] = {}
        fast = self._packing()
        # Read first: a write during the copying then shows as another version on the next call.
        version = self._store.version() if self._once or fast else None
        if self._once or fast:
            with torch.no_grad():
                at = Frame({name: live.read() for name, live in self._live.items()}, self._opaques, {})
                for node in self._constant:
                    Step(node, None, ()).run(at)
                    if node in self._once:
                        copies.update((value.name, whole(at.values[value.name])) for value in node.results)
                        at.values.update(copies)
                for one in fast:
                    if one.device == at.device.type:
                        one.pack(at)
        guarded = bool(copies) or any(one.nbytes_packed for one in fast)
        self._held = Held(version if guarded else None, copies)


def _all_read(experts: Experts) -> Experts:
    """Experts that are read one by one, read now; never the very object that was read before.

    A parameter whose memory was exchanged (`p.data = ...`) is the same object, and who holds addresses must notice.
    """
    return experts.detach() if isinstance(experts, torch.Tensor) else [experts[e] for e in range(len(experts))]


def _text(node: Node) -> str:
    return f"{', '.join(map(str, node.results))} = {print_op(node.op)}"
