"""Whether a choice of experts is a layer: solved on the first run of the graph, confirmed on all others.

T tokens, K experts per token, E experts, D model width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from moec.frontends.onnx.candidates import Candidate
from moec.frontends.onnx.layer import Form, Layer, Left, Run, element
from moec.frontends.onnx.solve import Recorded, Solution, activated, in_words, lift, loose, near, project, solve


def prove(candidate: Candidate, runs: Sequence[Run]) -> Layer | Left:
    """The layer that a candidate is, or why it is none."""
    if candidate.reason or candidate.found is None:
        return Left(candidate.name, candidate.reason or "no weights of experts were found")
    try:
        recorded = [recorded_of(candidate, run) for run in runs]
    except ValueError as error:
        return Left(candidate.name, str(error))
    solution = solve(recorded[0], candidate.found)
    if solution is None:
        return Left(candidate.name, "no reading of its weights and activations gives the recorded values")
    if not all(fits(solution, one) for one in recorded[1:]):
        return Left(candidate.name, "what fits one run does not fit another")
    ids = torch.cat([one.ids.flatten() for one in recorded])
    experts = len(solution.body.w_in)
    if int(ids.max()) >= experts or int(ids.min()) < 0:
        return Left(candidate.name, f"it chooses numbers outside its {experts} experts")
    return _layer(candidate, solution, recorded, runs[0])


def _layer(candidate: Candidate, solution: Solution, recorded: Sequence[Recorded], run: Run) -> Layer:
    values = {v.name: v for v in (*candidate.xs, *candidate.weights, *candidate.ys)}
    x, k = values[solution.x], recorded[0].ids.shape[1]
    routing = None if solution.weights is None else values[solution.weights]
    dtypes = element(run, x), element(run, x if routing is None else routing)
    region, weights = lift(f"experts.{candidate.name}", solution, k, *dtypes)
    xs = _alike(solution.x, [one.xs for one in recorded])
    form: Form = "slots" if solution.weights is None else recorded[0].forms[solution.weights]
    routings: list[Any] = [None]
    if solution.weights is not None:
        names = _alike(solution.weights, [one.weights for one in recorded])
        routings = [values[name] for name in names if recorded[0].forms[name] == form]
    pairs = tuple((values[one], routing) for one in xs for routing in routings)
    return Layer(
        name=region.name,
        region=region,
        weights=weights,
        x=pairs[0][0],
        y=values[solution.y],
        ids=candidate.ids,
        routing=pairs[0][1],
        form=form,
        evidence=_evidence(candidate, solution, recorded, form),
        alike=pairs,
        scores=candidate.scores,
    )


FORMS = {
    "gates": "told by a weight for every expert, 0 where it is not asked",
    "places": "told by a weight for each place of every expert, so tokens beyond its capacity are dropped",
}


def _evidence(candidate: Candidate, solution: Solution, recorded: Sequence[Recorded], form: Form) -> tuple[str, ...]:
    experts, k = len(solution.body.w_in), recorded[0].ids.shape[1]
    ops = " and ".join(choice.op_type for choice in candidate.choices)
    return (
        f"{experts} experts, {k} of them for each token, chosen by {ops}",
        in_words(solution.activation),
        f"proved by value on {len(recorded)} runs, {sum(one.ids.shape[0] for one in recorded)} tokens",
        *([FORMS[form]] if form in FORMS else []),
    )


def _alike(name: str, runs: Sequence[Mapping[str, torch.Tensor]]) -> list[str]:
    """This value and those that were equal to it in every run."""
    return [name, *(other for other in runs[0] if other != name and _equal(name, other, runs))]


def _equal(name: str, other: str, runs: Sequence[Mapping[str, torch.Tensor]]) -> bool:
    return all(other in run and torch.equal(run[name], run[other]) for run in runs)


def recorded_of(candidate: Candidate, run: Run) -> Recorded:
    """The candidates' values in one run, those whose sizes fit. Raises ValueError where the choices do not."""
    assert candidate.found is not None
    ids = _chosen(candidate, run)
    (tokens, k), experts = ids.shape, len(candidate.found.matrices[0])
    xs = {name: rows for name, rows in _rows(candidate.xs, run, tokens, own_width=True).items() if rows.shape[1] != k}
    weights: dict[str, torch.Tensor] = {}
    forms: dict[str, Form] = {}
    for value in candidate.weights:
        found = _weights(run.get(value.name), ids, experts)
        if found is not None:
            weights[value.name], forms[value.name] = found
    ys = _rows(candidate.ys, run, tokens, own_width=False)
    bar = loose(run[name] for name in (*xs, *ys))
    return Recorded(ids, xs, weights, ys, forms, bar)


def _chosen(candidate: Candidate, run: Run) -> torch.Tensor:
    """experts[T, K] of all its choices."""
    parts = []
    for choice, value in zip(candidate.choices, candidate.ids, strict=True):
        array = tensor(run[value.name])
        k = array.shape[-1] if choice.op_type == "TopK" and array.dim() else 1
        parts.append(array.reshape(-1, max(1, k)))
    if len({len(part) for part in parts}) != 1 or not len(parts[0]):
        raise ValueError("its choices are not for the same tokens, or for none")
    return torch.cat(parts, 1).long()


def _rows(values: Sequence[Any], run: Run, tokens: int, *, own_width: bool) -> dict[str, torch.Tensor]:
    """Values as [T, anything]; `own_width` leaves out those whose rows are not their last dimension."""
    found = {}
    for value in values:
        array = run.get(value.name)
        if array is None or array.dtype.kind != "f" or not array.size or array.size % tokens:
            continue
        if not own_width or array.size == tokens * array.shape[-1]:
            found[value.name] = tensor(array).reshape(tokens, -1).float()
    return found


def _weights(array: Any, ids: torch.Tensor, experts: int) -> tuple[torch.Tensor, Form] | None:
    """The weight of each choice, [T, K], and how a value holds it."""
    if array is None or array.dtype.kind != "f" or not array.size or not array.ndim:
        return None
    tokens, k = ids.shape
    if array.size == tokens * k:
        return tensor(array).reshape(tokens, k).float(), "slots"
    if int(ids.max()) >= experts or int(ids.min()) < 0:
        return None
    if array.shape[-1] == experts and array.size == tokens * experts:
        return tensor(array).reshape(tokens, experts).float().gather(1, ids), "gates"
    if array.ndim > 2 and array.shape[-2] == experts and array.size == tokens * experts * array.shape[-1]:
        return tensor(array).reshape(tokens, experts, -1).float().sum(-1).gather(1, ids), "places"
    return None


def tensor(array: Any) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))


def fits(solution: Solution, one: Recorded) -> bool:
    """Whether a solution of one run gives the values of another."""
    body, at = solution.body, solution.activation
    if solution.x not in one.xs or solution.y not in one.ys:
        return False
    h = project(one.xs[solution.x], one.ids, body.w_in, body.b_in)
    up = None if body.w_up is None else project(one.xs[solution.x], one.ids, body.w_up, body.b_up)
    rows = project(activated(h, up, at), one.ids, body.w_out, body.b_out)
    weights = torch.ones(one.ids.shape) if solution.weights is None else one.weights.get(solution.weights)
    return weights is not None and near((rows * weights.unsqueeze(-1)).sum(1), one.ys[solution.y], one.bar)
