"""From router logits to chosen experts, where a proof by values allows to name what the user's router computes.

T tokens, E experts, K experts per token, C places of an expert.
"""

from dataclasses import KW_ONLY, dataclass

from moec.ir.core import Op, Value, op, require
from moec.ir.rules import (
    require_at_least,
    require_choice,
    require_float,
    require_positive,
    require_rank,
    require_shape,
)
from moec.ir.types import Dim, Tensor

SCORES = ("softmax", "softmax_chosen", "sigmoid", "sqrt_softplus", "identity")
NORMALIZATIONS = ("none", "sum", "clamped_sum", "norm")


@op("route")
@dataclass(frozen=True)
class Route(Op):
    """logits[T, E], bias[E]?, noise[T, E]? -> weights f32[T, K], experts i32[T, K]: each token chooses k experts.

    In fp32 and in this order:
    1. z = logits + noise, and + bias with bias_on="logits". Noise is an operand, so that the op itself is a function.
    2. s = score(z): softmax over the E experts, sigmoid, sqrt_softplus sqrt(log(1+e^z)), identity; softmax_chosen
       is identity here and a softmax over the chosen k in step 5.
    3. c = s, and + bias with bias_on="scores" (the default): such a bias moves the choice and not the weights.
       With groups > 1 the experts are that many equal parts in order; a part's worth is the largest c in it
       (group_score="max") or the sum of its two largest (group_score="top2"); all but the `kept_groups` best parts
       have their c replaced by -inf (group_fill="minus_inf") or by 0 (group_fill="zero").
    4. experts[t] = the k largest c, largest first; among equals the lower expert (or part) first.
    5. weights[t] = s (not c) of the chosen; with softmax_chosen their softmax.
    6. normalize: "none"; "sum" w / (sum w + eps); "clamped_sum" w / max(sum w, eps); "norm" w / (sum |w|^p)^(1/p).
    7. times `scale`.
    """

    logits: Value
    _: KW_ONLY
    bias: Value | None = None
    noise: Value | None = None
    k: int
    score: str = "softmax"
    bias_on: str = "scores"
    groups: int = 1
    kept_groups: int = 1
    group_score: str = "max"
    group_fill: str = "minus_inf"
    normalize: str = "none"
    eps: float = 0.0
    p: float = 1.0
    scale: float = 1.0

    def infer(self) -> tuple[Tensor, ...]:
        require_rank("logits", self.logits, 2)
        require_float("logits", self.logits)
        tokens, experts = self.logits.type.shape
        most = experts.constant
        fits = self.k >= 1 and (most is None or self.k <= most)
        require(fits, "MOEC102", f"k={self.k} must be in 1..{experts}", hint="set k to the router's top-k")
        require_choice("score", self.score, SCORES)
        require_choice("bias_on", self.bias_on, ("scores", "logits"))
        require(self.bias is not None or self.bias_on == "scores", "MOEC106", 'bias_on="logits" needs bias')
        if self.bias is not None:
            require_float("bias", self.bias)
            require_shape("bias", self.bias, (experts,), f"for logits {self.logits.type}")
        if self.noise is not None:
            require_float("noise", self.noise)
            require_shape("noise", self.noise, (tokens, experts), "like logits")
        self._check_groups(experts)
        self._check_weights()
        return Tensor("f32", (tokens, Dim.of(self.k))), Tensor("i32", (tokens, Dim.of(self.k)))

    def _check_groups(self, experts: Dim) -> None:
        require_at_least("groups", self.groups, 1)
        most = experts.constant
        divides = most is None or most % self.groups == 0
        require(divides, "MOEC102", f"groups={self.groups} must divide the {experts} experts")
        kept = 1 <= self.kept_groups <= self.groups
        require(kept, "MOEC102", f"kept_groups={self.kept_groups} must be in 1..{self.groups}")
        require_choice("group_score", self.group_score, ("max", "top2"))
        require_choice("group_fill", self.group_fill, ("minus_inf", "zero"))
        if most is not None and self.group_fill == "minus_inf":
            left = most // self.groups * self.kept_groups
            message = f"k={self.k} must be at most {left}, the experts of {self.kept_groups} of {self.groups} groups"
            require(self.k <= left, "MOEC102", message)

    def _check_weights(self) -> None:
        require_choice("normalize", self.normalize, NORMALIZATIONS)
        require(self.eps >= 0, "MOEC102", f"eps={self.eps} must be at least 0")
        sums = self.normalize in ("sum", "clamped_sum")
        require(sums or self.eps == 0, "MOEC106", f'eps={self.eps} goes with normalize="sum" or "clamped_sum"')
        require(self.p > 0, "MOEC102", f"p={self.p} must be above 0")
        require(self.normalize == "norm" or self.p == 1, "MOEC106", f'p={self.p} goes with normalize="norm"')


@op("route_experts")
@dataclass(frozen=True)
class RouteExperts(Op):
    """logits[T, E] -> weights f32[E, C], tokens i32[E, C]: each expert chooses `capacity` = C tokens (expert choice).

    In fp32: s = score(logits): "softmax" over the E experts of a token, "softmax_tokens" over the T tokens of an
    expert, "sigmoid" or "identity". tokens[e] = the C largest s[:, e], largest first, among equals the lower token
    first; weights[e] = their s. Where C > T the places left have token -1 and weight 0. `group` {by="expert"} takes
    `tokens`.
    """

    logits: Value
    _: KW_ONLY
    capacity: Dim
    score: str = "softmax"

    def infer(self) -> tuple[Tensor, ...]:
        require_rank("logits", self.logits, 2)
        require_float("logits", self.logits)
        require_positive("capacity", self.capacity)
        require_choice("score", self.score, ("softmax", "softmax_tokens", "sigmoid", "identity"))
        shape = (self.logits.type.shape[1], self.capacity)
        return Tensor("f32", shape), Tensor("i32", shape)
