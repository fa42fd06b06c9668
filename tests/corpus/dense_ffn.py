"""Dense feed-forward layers that must compile, as the big architectures write them.

T tokens, D model width, F inner width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.corpus.case import case


class Intermediate(nn.Module):
    """[T, D] -> [T, F]: the first half of a split feed-forward layer."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(16, 40)
        self.activation = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.activation(self.dense(x))
        return out


class Output(nn.Module):
    """[T, F], [T, D] -> [T, D]: the second half, with dropout, residual and norm."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(40, 16)
        self.norm = nn.LayerNorm(16)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        out: Tensor = self.norm(self.dropout(self.dense(x)) + residual)
        return out


@case("ffn.split_in_two", expect="compiled", kind="ffn")
class SplitInTwo(nn.Module):
    """BERT-like: Linear and GELU in one module, Linear, dropout, residual and norm in another."""

    dim = 16

    def __init__(self) -> None:
        super().__init__()
        self.intermediate = Intermediate()
        self.output = Output()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.output(self.intermediate(x), x)
        return out


@case("ffn.swiglu", expect="compiled", kind="ffn")
class DenseSwiglu(nn.Module):
    """LLaMA-like: down(silu(gate) * up), no biases."""

    dim = 16

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(16, 44, bias=False)
        self.up_proj = nn.Linear(16, 44, bias=False)
        self.down_proj = nn.Linear(44, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


@case("ffn.fused_swiglu", expect="compiled", kind="ffn")
class FusedSwiglu(nn.Module):
    """Gate and up in one Linear, chunked: up first, gate second."""

    dim = 16

    def __init__(self) -> None:
        super().__init__()
        self.fc_in = nn.Linear(16, 60)
        self.fc_out = nn.Linear(30, 16)

    def forward(self, x: Tensor) -> Tensor:
        up, gate = self.fc_in(x).chunk(2, dim=-1)
        out: Tensor = self.fc_out(up * F.silu(gate))
        return out


@case("ffn.gated_gelu", expect="compiled", kind="ffn")
class GatedGelu(nn.Module):
    """T5-like: wo(dropout(gelu_tanh(wi_0 x) * wi_1 x))."""

    dim = 16

    def __init__(self) -> None:
        super().__init__()
        self.wi_0 = nn.Linear(16, 36, bias=False)
        self.wi_1 = nn.Linear(16, 36, bias=False)
        self.wo = nn.Linear(36, 16, bias=False)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.wo(self.dropout(F.gelu(self.wi_0(x), approximate="tanh") * self.wi_1(x)))
        return out


@case("ffn.hand_gelu", expect="compiled", kind="ffn")
class HandWrittenGelu(nn.Module):
    """GPT-2-like: GELU written out with tanh and pow, weights stored [D, F] and used with addmm."""

    dim = 16

    def __init__(self) -> None:
        super().__init__()
        self.w_in, self.b_in = nn.Parameter(torch.empty(16, 50)), nn.Parameter(torch.empty(50))
        self.w_out, self.b_out = nn.Parameter(torch.empty(50, 16)), nn.Parameter(torch.empty(16))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.addmm(self.b_in, x.view(-1, 16), self.w_in)
        h = 0.5 * h * (1.0 + torch.tanh(0.7978845608028654 * (h + 0.044715 * torch.pow(h, 3.0))))
        return torch.addmm(self.b_out, h, self.w_out).view(x.shape)


@case("ffn.sequential", expect="compiled", kind="ffn")
class PlainSequential(nn.Sequential):
    """The whole model is Sequential(Linear, ReLU, Linear)."""

    dim = 16

    def __init__(self) -> None:
        super().__init__(nn.Linear(16, 33), nn.ReLU(), nn.Linear(33, 16))


@case("ffn.widening", expect="either", kind="ffn", unseen=True)
class Widening(nn.Module):
    """The output is wider than the input: a head rather than a feed-forward layer, but the same arithmetic."""

    dim = 16

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(16, 32)
        self.fc2 = nn.Linear(32, 20)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(torch.relu(self.fc1(x)))
        return out


@case("ffn.encoder_layer", expect="either", kind="ffn", unseen=True)
class EncoderLayer(nn.TransformerEncoderLayer):
    """linear1 and linear2 inside a bigger block, with an inference fast path that skips `forward` of the parts."""

    dim = 16

    def __init__(self) -> None:
        super().__init__(16, 4, 40, batch_first=True)


@case("ffn.tied", expect="either", kind="ffn", unseen=True)
class TiedFfn(nn.Module):
    """The second projection is the first one transposed: one parameter, two roles."""

    dim = 16

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(16, 40)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.gelu(self.proj(x)), self.proj.weight.t())


@case("ffn.clamp_at_50", expect="either", kind="ffn", unseen=True)
class ClampedFfn(nn.Module):
    """A clamp that bites only where |h| > 50: invisible at unit scale."""

    dim = 16

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(16, 40)
        self.fc2 = nn.Linear(40, 16)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(x)).clamp(max=50.0))
        return out


@case("ffn.norm_inside", expect="either", kind="ffn", unseen=True)
class NormInside(nn.Module):
    """A LayerNorm between activation and second projection."""

    dim = 16

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(16, 40)
        self.inner_norm = nn.LayerNorm(40)
        self.fc2 = nn.Linear(40, 16)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(self.inner_norm(F.gelu(self.fc1(x))))
        return out
