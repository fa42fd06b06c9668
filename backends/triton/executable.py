"""A region on one GPU: weights are looked up again only when they moved, and each call leaves the host at once."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from moec.backendbase import OpaqueGraph, Weights
from moec.backends.reference.executable import RegionExecutable
from moec.backends.reference.fast import Planner
from moec.backends.reference.frame import Frame
from moec.backends.reference.joined import Experts
from moec.backends.triton.express import Express
from moec.backends.triton.fused import TritonFused
from moec.errors import MoecError
from moec.ir import Region


class TritonExecutable(RegionExecutable):
    """Runs a region on the GPU that its inputs are on, on the current stream.

    Differs from its base in that what it reads of the weights is kept while `weights.placement()` stays the same:
    kernels hold addresses, and writes in place are seen through them.
    """

    _keeps = True

    def __init__(
        self,
        region: Region,
        weights: Weights,
        opaques: Mapping[str, OpaqueGraph],
        *,
        pack: bool,
        plan: Planner,
        device: str,
    ) -> None:
        self._device = device
        super().__init__(region, weights, opaques, pack=pack, plan=plan)
        constant = [node for node in self._constant if node not in self._once]
        self._weight_steps = tuple(step for step in self._steps if step.node in constant)
        self._steps = tuple(step for step in self._steps if step.node not in constant)
        self._express = Express.of(region, self._steps)
        self._make_ready()

    def __call__(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The region's outputs. Raises MOEC404 also for inputs elsewhere than the kernels run."""
        first = inputs[0] if inputs else None
        if not isinstance(first, torch.Tensor) or first.device.type != self._device:
            self._let_go()
            where = getattr(first, "device", "nowhere")
            raise MoecError(
                "MOEC404",
                f"the layer was compiled for {self._device}, its input is on {where}",
                where=f"region {self._region.name}",
                hint="compile the model again after moving it",
            )
        if first.is_cuda and first.device.index != torch.cuda.current_device():
            with torch.cuda.device(first.device):
                return self._run(inputs)
        return self._run(inputs)

    def _run(self, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """The region's outputs, by the express way where these inputs were checked before and no weight moved since."""
        express = self._express
        if express is None:
            return super().__call__(*inputs)
        key = tuple([(t.shape, t.dtype, t.device) for t in inputs])
        kept = self.kept()
        found = express.run(key, inputs, kept)
        if found is None:
            found = super().__call__(*inputs)
            express.learn(key, inputs[0].device, kept)
        return found

    @property
    def straight(self) -> bool:
        """Whether the region is one fused op, so that a call is nothing but its launches."""
        return self._express is not None

    @property
    def fused(self) -> list[TritonFused]:
        """The ops that run by kernels."""
        return [step.fast for step in self._steps if isinstance(step.fast, TritonFused)]

    def tune(self) -> None:
        """Measure the plans of usual numbers of tokens that were not measured on this machine yet; minutes."""
        from moec.backends.triton.tune import tune_new  # which is written in terms of this class

        tune_new(self)

    def _let_go(self) -> None:
        """Hold on to no memory of weights that are elsewhere now."""
        self._kept = None
        if self._express is not None:
            self._express.forget()
        for fused in self.fused:
            fused.forget()

    def _from_weights(self, values: dict[str, Experts]) -> dict[str, Experts]:
        at = Frame(values, self._opaques, {})
        for step in self._weight_steps:
            step.run(at)
        return at.values

    def _make_ready(self) -> None:
        """Prepare the kernels, so that the first call does not and the report says what runs."""
        at = Frame(self._weights(), self._opaques, {})
        if at.device.type != self._device:
            return
        for fused in self.fused:
            fused.ready(at)
