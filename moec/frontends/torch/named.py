"""What a layer's report says of its capacity: in words and as a region, where it was proved; else why it was not.

T tokens, B sequences, S positions, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch

from moec.frontends.torch.body import Body
from moec.frontends.torch.crowd import Crowd, Unseen, routers
from moec.frontends.torch.effects import Watch
from moec.frontends.torch.instances import NotLifted
from moec.frontends.torch.lift import common_dtype, lift_routed
from moec.frontends.torch.lifted import Lifted
from moec.frontends.torch.limits import find_limits
from moec.frontends.torch.manner import Limits, dropped
from moec.frontends.torch.observe import Driver, ProbeFailed
from moec.frontends.torch.oplog import Log

# Tokens at which the share of dropped slots is told.
_TOLD_AT = (64, 512)


def with_limits(
    lifted: Lifted, log: Log, driver: Driver, drivers: Iterator[Driver], params: Mapping[str, torch.Tensor]
) -> Lifted:
    """The layer with its capacity named, or with the reason why it is not; as it was where no token is dropped.

    `log` is a run of `driver`; the router may be in a block around it, which is one of `drivers`.
    """
    if not _may_drop(lifted, log, driver.main):
        return lifted
    try:
        found = _look(lifted.body, drivers, params, lifted.dtype)
        if found is None:
            return lifted
        region = lift_routed(
            lifted.region.name,
            lifted.body,
            lambda b, logits: found.manner.add(b, logits, lifted.body.experts, found.capacity),
            dtype=common_dtype(lifted.body, params, lifted.dtype),
        )
        return replace(lifted, named=region, evidence=(*lifted.evidence, *_words(found, lifted.body)))
    except NotLifted as reason:
        if isinstance(reason, (Unseen, ProbeFailed)) and getattr(lifted.call, "places", None) is None:
            return lifted
        line = f"its capacity is not named, and stays the code's own: {reason}"
        return replace(lifted, evidence=(*lifted.evidence, line))


def _may_drop(lifted: Lifted, log: Log, main: torch.Tensor | None) -> bool:
    """Whether places, masks, or counts over tokens, could leave tokens without their expert."""
    if lifted.kind != "moe" or lifted.body.experts < 2:
        return False
    places, roles = getattr(lifted.call, "places", None), getattr(lifted.call, "roles", None)
    if places is not None:
        return places.x_axis is not None
    if roles is not None and roles.form in ("mask", "dense"):
        return True
    if main is None or not main.shape[-1]:
        return False
    tokens = main.numel() // main.shape[-1]
    counted = (log.tensors[entry.reads[0]].numel() for entry in log.entries if entry.name == "cumsum")
    return any(count and count % tokens == 0 for count in counted)


def _look(
    body: Body, drivers: Iterator[Driver], params: Mapping[str, torch.Tensor], dtype: torch.dtype
) -> Limits | None:
    """The limits of the smallest block that has a router. Raises NotLifted with the reason where they have no name."""
    for driver in drivers:
        main = driver.main
        if main is None or main.shape[-1] < 1:
            continue
        try:
            log, _ = driver.observe()
        except ProbeFailed:
            continue
        unseen: Unseen | None = None
        for router in routers(log, body, main.numel() // main.shape[-1])[:2]:
            if dtype != torch.float32:
                raise Unseen(f"routing is proved in fp32, and the layer is {dtype}".replace("torch.", ""))
            try:
                return _watched(Crowd(driver, body, params, router))
            except Unseen as reason:
                unseen = unseen or reason
        if unseen is not None:
            raise unseen
    return None


def _watched(crowd: Crowd) -> Limits | None:
    """The limits, with all effects of the runs undone. Raises NotLifted for random ones."""
    watch = Watch(crowd.driver.module, hear=True)
    found: Limits | None = None
    reason: NotLifted | None = None
    try:
        found = find_limits(crowd)
    except NotLifted as failed:
        reason = failed
    finally:
        random = "draws random numbers" in watch.changes()
        watch.undo()
    if random and (found is not None or reason is not None):
        raise NotLifted("the block draws random numbers")
    if reason is not None:
        raise reason
    return found


def _words(found: Limits, body: Body) -> tuple[str, ...]:
    """Capacity, order, scope and drops for people."""
    manner = found.manner
    letter, what = ("T", "batch") if manner.scope == "batch" else ("S", "sequence")
    order = {
        "arrival": "earlier tokens first",
        "weight": "larger weights first",
        "token_weight": "tokens with the largest best weight first",
    }[manner.policy]
    if manner.priority == "choice":
        order = f"all first choices before all second ones, among them {order}"
    lost = "adds nothing to its token"
    if manner.kept != "none":
        lost += ", whose other weights are scaled up to sum to one"
    elif manner.k > 1:
        lost += ", whose other weights stay as they are"
    places = f"at most {found.capacity.text(letter)} slots of a {what} of {letter} tokens, {order}"
    shares = ", ".join(f"{dropped(found, body.experts, tokens):.0%} of {tokens} tokens" for tokens in _TOLD_AT)
    ties = "; ties between the experts of a token may be broken otherwise" if not found.ties else ""
    return (
        f"capacity: each of {body.experts} experts takes {places}; a slot beyond that is dropped and {lost}",
        f"of choices at random in one sequence it drops {shares}",
        f"proved by value in {found.tried} runs with experts crowded on purpose{ties}; who is kept is left to the code",
    )
