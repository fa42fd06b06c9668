"""A region run once, each op by its meaning and nothing held: for autograd, which follows torch's own operations."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moec.backendbase import Weights
from moec.backends.reference.frame import Frame
from moec.backends.reference.inputs import Inputs
from moec.backends.reference.joined import Experts
from moec.backends.reference.steps import Step
from moec.backends.reference.weights import LiveWeight, per_expert
from moec.ir import Region, Weight


def run_meanings(region: Region, weights: Weights, inputs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """The region's outputs, part of the autograd graph. Raises what calls of a built region raise."""
    found = Inputs(region)
    sizes, experts = found.check(inputs), per_expert(region)
    values: dict[str, Experts] = dict(zip(found.names, inputs, strict=True))
    lettered = {}
    for node in region.nodes:
        if isinstance(node.op, Weight):
            (value,) = node.results
            values[value.name] = LiveWeight(weights, node.op, of_experts=value.name in experts).read()
            if node.op.type.letters:
                lettered[value] = values[value.name]
    at = Frame(values, {}, sizes)
    at.bind(lettered)
    for node in region.nodes:
        if not isinstance(node.op, Weight):
            Step(node, None, ()).run(at)
    return tuple(at.tensor(value) for value in region.outputs)
