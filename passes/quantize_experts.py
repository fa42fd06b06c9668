"""int8 weights for experts and FFNs: symmetric, one scale for each output channel of each expert.

E experts, N outputs, C inputs.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from moec.ir import Act, Glu, Linear, Node, Op, QuantizeWeight, Region, Value
from moec.ir.rewrite import Rewriter
from moec.passbase import PassLog
from moec.passes.sites import Mismatch, as_product, is_weight, need, need_weight, num_bytes, product_of

# Operands that decide which experts a token goes to and with which weight.
_ROUTING = ("logits", "noise", "bias", "ids", "experts", "weights")


@dataclass(frozen=True)
class QuantizeExperts:
    """Weight-only int8 for every matrix of an expert or a dense FFN, fused or not: w becomes q * scale[E, N].

    scale is max |w| over a row's inputs divided by 127, so that |w - q * scale| <= scale / 2. The router, shared gates,
    norms, biases and linears outside an FFN stay as they are. The log names each weight that was left, and its numbers
    (bytes_total, bytes_covered, bytes_after) say how much of what the ops read is int8.
    """

    name: ClassVar[str] = "quantize-experts"
    changes_numerics: ClassVar[bool] = True

    def __call__(self, region: Region, log: PassLog) -> Region:
        work = _Work(region, log)
        for node in region.nodes:
            work.quantize(node)
        if not work.done:
            return region
        after = work.edit.finish()
        total, covered, left = _bytes_read(region), sum(map(num_bytes, work.done)), _bytes_read(after)
        log.did(f"{covered:,} of {total:,} bytes of weights ({covered / total:.1%}) became int8; {left:,} bytes now")
        log.add("bytes_total", total)
        log.add("bytes_covered", covered)
        log.add("bytes_after", left)
        return after


@dataclass
class _Work:
    region: Region
    log: PassLog
    done: dict[Value, tuple[Value, Value]] = field(default_factory=dict)
    """The weights that were quantised, each once however many ops use it: q and scale."""

    def __post_init__(self) -> None:
        self.edit = Rewriter(self.region)
        self.routing = _routing_values(self.region)

    def quantize(self, node: Node) -> None:
        changes: dict[str, Any] = {}
        for name, scale_name in _matrices(node.op):
            w: Value | None = getattr(node.op, name)
            if w is None:
                continue
            try:
                self._check(node, w)
                changes[name], changes[scale_name] = self._quantized(w)
            except Mismatch as reason:
                self.log.skip(str(reason))
        if changes:
            self.edit.replace_op(node, replace(node.op, **changes))

    def _check(self, node: Node, w: Value) -> None:
        result = node.results[0]
        need(w.type.dtype != "i8", w, "it is int8 already")
        need(result not in self.routing, w, f"{result} takes part in routing")
        if isinstance(node.op, Linear):
            need(_in_ffn(self.region, node), w, f"{result} is a linear outside an FFN")
        need_weight(self.region, w)

    def _quantized(self, w: Value) -> tuple[Value, Value]:
        if w not in self.done:
            source = self.region.producer(w)
            q, scale = self.edit.add_many(QuantizeWeight(w), (f"{w.name}_q", f"{w.name}_scale"), after=source)
            self.done[w] = q, scale
            after = num_bytes(q) + num_bytes(scale)
            self.log.did(f"{w}: {w.type} became {q.type} and {scale.type}, {num_bytes(w):,} bytes became {after:,}")
        return self.done[w]


def _matrices(op: Op) -> list[tuple[str, str]]:
    """The op's operands that are matrices with a scale: (w, scale), (w_in, scale_in), ..."""
    names = {one.name for one in op.fields}
    return [
        (name, f"scale{name[1:]}") for name in sorted(names) if name.startswith("w") and f"scale{name[1:]}" in names
    ]


def _in_ffn(region: Region, node: Node) -> bool:
    """Whether the linear is the first or the second of linear, activation, linear."""
    x = region.producer(node.op.operands[0])
    if x is not None and isinstance(x.op, Act | Glu):
        return any(product_of(region, value) for value in x.op.operands)
    behind = [user for user in region.users(node.results[0]) if isinstance(user.op, Act | Glu)]
    return any(as_product(user) for one in behind for user in region.users(one.results[0]))


def _routing_values(region: Region) -> set[Value]:
    """Every value that the choice of experts or their weights depend on."""
    found: set[Value] = set()
    for node in reversed(region.nodes):
        names = _ROUTING if found.isdisjoint(node.results) else None
        found.update(value for name, value in node.op.named_operands if names is None or name in names)
    return found


def _bytes_read(region: Region) -> int:
    """Bytes of all weights as the ops read them: after joining, selecting and quantising."""
    read = {value for node in region.nodes if not node.op.of_weights for value in node.op.operands}
    return sum(num_bytes(value) for value in read if is_weight(region, value) and not value.type.letters)
