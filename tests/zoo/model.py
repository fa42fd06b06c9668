"""Tiny models of the zoo's families with random weights, and what to call them with.

B sequences, S tokens a sequence, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import importlib
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moec
from tests.hf.models import VOCABULARY, eager, randomize
from tests.zoo.family import SIZES, Family
from tests.zoo.options import ENTRIES

transformers = pytest.importorskip("transformers")

# The zoo is that of one release: other ones have other families.
RELEASE = "5.23."


def parts(entry: Family) -> tuple[Any, Any]:
    """The class and its configuration."""
    module = importlib.import_module(f"transformers.models.{entry.family}.modeling_{entry.family}")
    cls = getattr(module, entry.cls)
    names = {known.name for known in dataclasses.fields(cls.config_class)}
    sizes = {name: value for name, value in SIZES.items() if name in names and name not in entry.without}
    return cls, cls.config_class(**{**sizes, **entry.settings})


def make(entry: Family, *, experts: str = "eager") -> Any:
    """A model in eval mode, the same weights every time, with the experts of its modeling file."""
    cls, config = parts(entry)
    chosen = {"experts_implementation": experts} if eager(cls) else {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: nn.Module = cls._from_config(config, **chosen)
    randomize(model)
    _fill_buffers(model)
    return model.eval()


def _fill_buffers(model: nn.Module) -> None:
    """Selection biases away from zero, and tables of token ids that choose."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.endswith(("expert_bias", "balancing_biases")):
                buffer.add_(0.3 * torch.randn(buffer.shape, generator=generator))
            if name.endswith("tid2eid"):
                rows = [torch.randperm(SIZES["num_experts"], generator=generator) for _ in range(len(buffer))]
                buffer.copy_(torch.stack(rows)[:, : buffer.shape[1]])


def inputs(entry: Family, batch: int = 2, tokens: int = 7, seed: int = 0) -> dict[str, Tensor]:
    """Keyword arguments of one call."""
    generator = torch.Generator().manual_seed(700 + seed)

    def ids(count: int) -> Tensor:
        return torch.randint(3, VOCABULARY, (batch, count), generator=generator)

    if entry.inputs == "pair":
        return {"input_ids": ids(tokens), "decoder_input_ids": ids(max(1, tokens - 2))}
    if entry.inputs == "image":
        kinds = torch.randint(0, 4, (batch,), generator=generator)
        return {"pixel_values": torch.randn(batch, 3, 32, 32, generator=generator), "dataset_index": kinds}
    if entry.inputs in ("modal", "embedded"):
        given = {"inputs_embeds": torch.randn(batch, tokens, SIZES["hidden_size"], generator=generator)}
        if entry.inputs == "modal":
            given["moe_mm_token_type_ids"] = torch.randint(0, 2, (batch, tokens), generator=generator)
        return given
    return {"input_ids": ids(tokens)}


@cache
def pair(name: str) -> tuple[Any, Any]:
    """(original, compiled), shared by tests that write to neither."""
    entry = ENTRIES[name]
    model = make(entry)
    return model, moec.compile(model, example_inputs=inputs(entry))
