"""What a corpus entry is: a small module, how to call it, and the only honest answers a compiler may give.

T tokens, B sequences, S tokens a sequence, D model width, K experts a token, E experts, F expert width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

Expect = Literal["compiled", "left alone", "either"]
Kind = Literal["moe", "ffn"]
Layout = Literal["btd", "td"]
Args = tuple[Any, ...]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One module of the corpus.

    `expect` "either" means: compiled and right, or left alone with the reason. `layers` counts the layers of `kind`;
    a compiled layer of another kind (a shared expert beside the experts, say) is allowed up to `others`.
    """

    name: str
    why: str
    build: Callable[[], nn.Module]
    dim: int
    expect: Expect = "either"
    kind: Kind = "moe"
    layers: int = 1
    others: int = 0
    layout: Layout = "btd"
    args: Callable[[Tensor], Args] | None = None  # tokens f32[T, D] -> the positional arguments
    needs_inputs: bool = False  # cannot be observed without example_inputs
    unseen: bool = False  # a report without any such layer is an honest answer too
    long: bool = True  # is called with thousands of tokens, too
    random: bool = False  # draws random numbers in eval
    stateful: bool = False  # outputs depend on the calls before
    mutates_input: bool = False
    reason: tuple[str, ...] = ()  # if refused, the reason must contain one of these words
    decoy: Callable[[Any, Tensor], Tensor] | None = None  # (module, x) -> what a careless reader would compute
    decoy_scale: float = 1.0
    decoy_tokens: int = 33
    decoy_floor: float = 1e-3  # the relative error a careless reading makes at least
    bar: float = 2e-6  # both errors; more only where the original itself is that far from float64
    perturb: Callable[[Any], None] | None = None  # a write to the weights after compiling which must be honoured
    perturb_twin: bool = False  # the write goes to the compiled module, because it is not to a shared tensor
    inline_expect: Expect | None = None  # with all code inside forward, if not as `expect`
    min_experts: int = 2  # experts that 130 random tokens must hit at least
    outside: Callable[[], Any] | None = None  # reads an effect that leaves the module
    tags: frozenset[str] = field(default_factory=frozenset)

    def make(self) -> Any:
        """A fresh nn.Module in eval mode, the same weights every time; Any, as each class has its own attributes."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1234)
            module = self.build()
            fill(module)
        return module.eval()

    def inputs(self, tokens: Tensor) -> Args:
        """Positional arguments of one call for tokens f32[T, D]."""
        return self.args(tokens) if self.args else (as_layout(tokens, self.layout),)


def as_layout(tokens: Tensor, layout: Layout) -> Tensor:
    """tokens f32[T, D] -> [T, D] or [B, S, D], with B the smallest of 2, 3, 5 that divides T (else 1)."""
    if layout == "td":
        return tokens
    count, width = tokens.shape
    batch = next((b for b in (2, 3, 5) if count % b == 0), 1)
    return tokens.reshape(batch, count // batch, width)


def random_tokens(count: int, dim: int, *, scale: float = 1.0, seed: int = 0) -> Tensor:
    """f32[count, dim] of normal noise."""
    generator = torch.Generator().manual_seed(9_000 + seed)
    return torch.randn(count, dim, generator=generator) * scale


def fill(module: nn.Module, seed: int = 7) -> None:
    """Variance-scaled weights, biases that matter, routers that decide: near-uniform routing would hide errors.

    A module may own `fill_(generator)` to finish its own weights (tied rows, dead experts).
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(_noise(name, parameter, generator))
        for part in module.modules():
            finish = getattr(part, "fill_", None)
            if callable(finish):
                finish(generator)


def _noise(name: str, parameter: Tensor, generator: torch.Generator) -> Tensor:
    noise = torch.randn(parameter.shape, generator=generator)
    leaf = name.rsplit(".", 1)[-1]
    if "norm" in name and leaf == "weight":
        return 1 + 0.2 * noise
    if parameter.dim() <= 1 or "bias" in leaf or leaf.startswith("b_") or leaf in {"b1", "b2", "b3"}:
        return 0.4 * noise
    fan_in = parameter.shape[-1] if parameter.dim() == 2 else max(parameter.shape[-2:])
    gain = 2.0 if "router" in name or "gate" in name.split(".") else 1.2
    return noise * gain / math.sqrt(fan_in)


class Registry(dict[str, Case]):
    """Cases by name, in the order they were written."""

    def add(self, case: Case) -> None:
        assert case.name not in self, f"two cases are called {case.name}"
        assert case.why, f"{case.name} does not say what makes it worth having"
        self[case.name] = case

    def case(self, name: str, **fields: Any) -> Callable[[type[nn.Module]], type[nn.Module]]:
        """Class decorator: the class without arguments is the case, its docstring the `why`, its `dim` the width."""

        def register(cls: type[nn.Module]) -> type[nn.Module]:
            why = " ".join((cls.__doc__ or "").split())
            fields.setdefault("dim", getattr(cls, "dim", 16))
            self.add(Case(name=name, why=why, build=cls, **fields))
            return cls

        return register


CASES = Registry()
case = CASES.case
