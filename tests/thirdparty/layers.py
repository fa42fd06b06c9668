"""The layers: how each package builds one, what it is called with, and the honest answer.

B sequences, S tokens a sequence, T tokens, D width 16.
"""

from __future__ import annotations

import functools
import os
import sys
import tempfile
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

D = 16
Args = tuple[Any, ...]


@dataclass(frozen=True)
class Layer:
    """`compiled` counts mixtures; `reason` is a part of why the others are left alone.

    `form` is a part of the evidence: how rows reach the experts. `random`: its gate draws numbers in eval, too.
    `others` counts the dense FFNs beside it that are compiled.
    """

    name: str
    style: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int, int], Args]
    compiled: int = 1
    form: str = ""
    reason: str = ""
    random: bool = False
    others: int = 0
    inplace: bool = False


def sequences(batch: int, length: int) -> Args:
    return (torch.randn(batch, length, D, generator=torch.Generator().manual_seed(batch * length)),)


def rows(batch: int, length: int) -> Args:
    return (sequences(batch, length)[0].reshape(-1, D),)


def fours(batch: int, length: int) -> Args:
    """Four sequences at a time."""
    return sequences(4 * batch, length)


def features(batch: int, length: int) -> Args:
    """One sparse feature of ten values and three dense ones."""
    generator = torch.Generator().manual_seed(batch * length)
    sparse = torch.randint(0, 10, (batch * length, 1), generator=generator)
    return (torch.cat([sparse.float(), torch.randn(batch * length, 3, generator=generator)], 1),)


def mlp(hidden: int = 24) -> nn.Module:
    return nn.Sequential(nn.Linear(D, hidden), nn.ReLU(), nn.Linear(hidden, D))


@functools.cache
def alone() -> None:
    """A process group of this process, which fairscale and deepspeed ask for."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    handle, name = tempfile.mkstemp()
    os.close(handle)
    torch.distributed.init_process_group("gloo", init_method=f"file://{name}", rank=0, world_size=1)


@functools.cache
def einops_loaded() -> None:
    """einops remembers which frameworks it met in a global, which would be an effect of the first call."""
    from einops import rearrange

    rearrange(torch.zeros(1, 2), "a b -> b a")


def spread(layer: nn.Module) -> nn.Module:
    """Vectors that start as ones or zeros would hide what they do."""
    with torch.no_grad():
        for parameter in layer.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape) / 2)
    return layer


def mixture_of_experts(policy: str) -> nn.Module:
    from mixture_of_experts import MoE

    layer: nn.Module = MoE(dim=D, num_experts=4, hidden_dim=24, second_policy_eval=policy)
    return layer


def hierarchical() -> nn.Module:
    from mixture_of_experts import HeirarchicalMoE

    layer: nn.Module = HeirarchicalMoE(dim=D, num_experts=(3, 4), hidden_dim=24, second_policy_eval="all")
    return layer


def st_moe() -> nn.Module:
    einops_loaded()
    from st_moe_pytorch import MoE

    layer: nn.Module = MoE(dim=D, num_experts=4)
    return spread(layer)


def st_moe_block() -> nn.Module:
    from st_moe_pytorch import SparseMoEBlock

    layer: nn.Module = SparseMoEBlock(st_moe(), add_ff_before=True)
    return spread(layer)


def soft_moe() -> nn.Module:
    einops_loaded()
    from soft_moe_pytorch import SoftMoE

    layer: nn.Module = SoftMoE(dim=D, seq_len=20, num_experts=4)
    return layer


def soft_moe_dynamic() -> nn.Module:
    einops_loaded()
    from soft_moe_pytorch import DynamicSlotsSoftMoE

    layer: nn.Module = DynamicSlotsSoftMoE(dim=D, num_experts=4)
    return layer


def peer() -> nn.Module:
    einops_loaded()
    from PEER_pytorch import PEER

    layer: nn.Module = PEER(dim=D, heads=2, num_experts=64, num_experts_per_head=4, dim_key=8)
    return layer


def fairscale() -> nn.Module:
    from fairscale.nn import MOELayer, Top2Gate

    alone()
    layer: nn.Module = MOELayer(Top2Gate(D, 4), nn.ModuleList(mlp() for _ in range(4)))
    return layer


def deepspeed(**options: Any) -> nn.Module:
    alone()
    from deepspeed import comm

    if not comm.is_initialized():
        comm.init_distributed("gloo", auto_mpi_discovery=False, rank=0, world_size=1)
    from deepspeed.moe.layer import MoE

    layer: nn.Module = MoE(D, mlp(), num_experts=4, **options)
    layer.set_deepspeed_parallelism()  # type: ignore[operator]
    return layer


def deepctr(name: str, **options: Any) -> nn.Module:
    from deepctr_torch.inputs import DenseFeat, SparseFeat
    from deepctr_torch.models import multitask

    columns = [SparseFeat("a", 10, embedding_dim=4), DenseFeat("b", 3)]
    layer: nn.Module = getattr(multitask, name)(
        columns, gate_dnn_hidden_units=(), tower_dnn_hidden_units=(), task_types=["binary", "regression"],
        task_names=["x", "y"], **{"expert_dnn_hidden_units": (24, 8), **options},
    )  # fmt: skip
    return filled(layer)


def filled(model: nn.Module) -> nn.Module:
    """The model with weights that matter and statistics as if it had been trained: some packages start near zero."""
    for name, tensor in model.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 2.0)
        elif tensor.is_floating_point():
            tensor.normal_().mul_(0.3 if tensor.dim() < 2 else tensor.shape[-1] ** -0.5)
    return model


class ByName(nn.Module):
    """torch-rechub takes features by name; here column i is feature i."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.model({f"f{i}": x[:, i] for i in range(D)})
        return out


def rechub(name: str, *counts: int) -> nn.Module:
    from torch_rechub.basic.features import DenseFeature
    from torch_rechub.models import multi_task

    towers = [{"dims": [8]}, {"dims": [8]}]
    given = [DenseFeature(f"f{i}") for i in range(D)]
    tasks = ["classification", "regression"]
    return filled(ByName(getattr(multi_task, name)(given, tasks, *counts, {"dims": [24, 8]}, towers)))


def mixtures(name: str) -> nn.Module:
    import pytorch_mixtures

    config = pytorch_mixtures.MoEConfig(
        hidden_dim=D, intermediate_dim=24, num_experts=4, expert_fn="ff", expert_act="silu", router_fn="topk",
        capacity_factor=1.5, topk=2, dtype=torch.float32,
    )  # fmt: skip
    layer: nn.Module = getattr(pytorch_mixtures, name)(config)
    return layer


def switch() -> nn.Module:
    """It imports a feed-forward of another package, which brings a hundred more: a stand-in serves."""

    class FeedForward(nn.Sequential):
        def __init__(self, dim: int, dim_out: int, mult: int = 4) -> None:
            super().__init__(nn.Linear(dim, dim * mult), nn.GELU(), nn.Linear(dim * mult, dim_out))

    if "zeta" not in sys.modules:
        stand_in: Any = types.ModuleType("zeta.nn")
        stand_in.FeedForward, stand_in.MultiQueryAttention = FeedForward, nn.Identity
        sys.modules.update({"zeta": types.ModuleType("zeta"), "zeta.nn": stand_in})
    from switch_transformers import SwitchMoE

    layer: nn.Module = SwitchMoE(D, 24, D, 4)
    return layer


def litgpt() -> nn.Module:
    from litgpt.config import Config
    from litgpt.model import LLaMAMoE

    layer: nn.Module = LLaMAMoE(
        Config(
            n_embd=D, n_head=2, n_layer=1, intermediate_size=24, moe_intermediate_size=24, n_expert=4,
            n_expert_per_token=2, mlp_class_name="LLaMAMoE", bias=False, padded_vocab_size=32,
        )
    )  # fmt: skip
    return layer


class Gathered(nn.Module):
    """The style of gpt-fast, in our own words: weights gathered for each token, all products in einsums."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(D, 4, bias=False)
        self.w1, self.w2, self.w3 = (nn.Parameter(torch.randn(4, *s) / 4) for s in ((24, D), (D, 24), (24, D)))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.view(-1, D)
        weights, chosen = self.gate(flat).softmax(-1).topk(2)
        weights = weights / weights.sum(-1, keepdim=True)
        gate = nn.functional.silu(torch.einsum("td,tkfd->tkf", flat, self.w1[chosen]))
        up = torch.einsum("td,tkfd->tkf", flat, self.w3[chosen])
        each = torch.einsum("tkf,tkdf->tkd", gate * up, self.w2[chosen])
        return torch.einsum("tkd,tk->td", each, weights).view_as(x)
