"""moec as an experts implementation of transformers."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from torch import nn

import moec
from moec import MoecError, hf
from tests.hf.agreement import assert_close, run, told
from tests.hf.models import MODELS

NAMES = ["mixtral", "gpt_oss", "deepseek_v3", "qwen3_moe", "olmoe"]


@pytest.fixture(autouse=True)
def registered() -> None:
    moec.register_hf()


def with_moec(name: str) -> Any:
    model = MODELS[name].make()
    model.set_experts_implementation("moec")
    return model


@pytest.mark.parametrize("name", NAMES)
def test_same_as_the_modeling_file(name: str) -> None:
    model, want = with_moec(name), MODELS[name].make()
    for size in ((2, 7), (1, 1), (3, 40)):
        inputs = MODELS[name].inputs(*size, seed=size[1])
        assert_close(run(model, inputs).logits, run(want, inputs).logits)
    layers = hf.reports(model)
    assert len(layers) == sum(kind == "moe" for kind in MODELS[name].layers.values())
    assert all(layer.compiled and layer.max_error is not None and not layer.fallbacks for layer in layers.values())


def test_generates_the_same_tokens() -> None:
    model, want = with_moec("mixtral"), MODELS["mixtral"].make()
    prompt, same = torch.tensor([[5, 9, 4]]), {"max_new_tokens": 12, "do_sample": False}
    assert torch.equal(model.generate(prompt, **same), want.generate(prompt, **same))


def test_router_logits_and_loss() -> None:
    model, want = with_moec("mixtral"), MODELS["mixtral"].make()
    inputs = MODELS["mixtral"].inputs()
    mine, theirs = (run(m, inputs, output_router_logits=True) for m in (model, want))
    assert_close(mine.router_logits, theirs.router_logits)
    assert_close(mine.aux_loss, theirs.aux_loss)


def test_weights_are_live() -> None:
    model, want = with_moec("mixtral"), MODELS["mixtral"].make()
    inputs = MODELS["mixtral"].inputs()
    run(model, inputs)
    state = {name: t * 1.1 for name, t in want.state_dict().items()}
    for assign in (False, True):
        model.load_state_dict({name: t.clone() for name, t in state.items()}, assign=assign)
        want.load_state_dict(state)
        assert_close(run(model, inputs).logits, run(want, inputs).logits)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for p in copied.parameters():
            p.mul_(1.2)
    assert_close(run(model, inputs).logits, run(want, inputs).logits)
    copied.set_experts_implementation("eager")
    theirs = run(copied, inputs).logits
    copied.set_experts_implementation("moec")
    assert_close(run(copied, inputs).logits, theirs)


def test_gradients() -> None:
    model, want = with_moec("mixtral"), MODELS["mixtral"].make()
    inputs = MODELS["mixtral"].inputs()
    mine, theirs = (
        torch.autograd.grad(m(**inputs).logits.square().mean(), list(m.parameters())) for m in (model, want)
    )
    assert_close(mine, theirs, bar=1e-4)


def test_training_mode_runs_the_modeling_file() -> None:
    model = with_moec("mixtral").train()
    with told() as texts:
        run(model, MODELS["mixtral"].inputs())
    assert any("training mode" in text for text in texts)
    assert all(layer.fallbacks == 1 for layer in hf.reports(model).values())


def test_a_whole_graph() -> None:
    model, want = with_moec("mixtral"), MODELS["mixtral"].make()
    inputs = MODELS["mixtral"].inputs()
    run(model, inputs)
    torch._dynamo.reset()
    graph: Any = torch.compile(model, backend="eager", fullgraph=True, dynamic=True)
    assert_close(run(graph, inputs, use_cache=False).logits, run(want, inputs).logits)


def test_threads_that_run_it_first() -> None:
    model, inputs = with_moec("mixtral"), MODELS["mixtral"].inputs()
    want, found = run(MODELS["mixtral"].make(), inputs).logits, []
    threads = [threading.Thread(target=lambda: found.append(run(model, inputs).logits)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 2
    for logits in found:
        assert_close(logits, want)


def test_a_changed_activation_runs_the_modeling_file() -> None:
    model, want = with_moec("mixtral"), MODELS["mixtral"].make()
    inputs = MODELS["mixtral"].inputs()
    run(model, inputs)
    for m in (model, want):
        m.model.layers[0].mlp.experts.act_fn = nn.Tanh()
    with told() as texts:
        assert_close(run(model, inputs).logits, run(want, inputs).logits)
    assert any("act_fn" in text for text in texts)


class Odd(nn.Module):
    """An activation that mixes the rows of a batch."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x - x.mean(0, keepdim=True)


def test_refuses_what_it_cannot_express() -> None:
    model = with_moec("mixtral")
    model.model.layers[1].mlp.experts.act_fn = Odd()
    with pytest.raises(MoecError, match='MixtralExperts cannot run as experts implementation "moec"') as told_:
        run(model, MODELS["mixtral"].inputs())
    assert told_.value.code == "MOEC236"
    model.set_experts_implementation("eager")
    run(model, MODELS["mixtral"].inputs())


def test_refuses_experts_on_several_devices() -> None:
    model = with_moec("mixtral")
    model.model.layers[0].mlp.experts._is_expert_parallel = True
    with pytest.raises(MoecError, match="several devices"):
        run(model, MODELS["mixtral"].inputs())


def test_options() -> None:
    with pytest.raises(MoecError, match="quantise"):
        moec.register_hf(quantise="int8")
    moec.register_hf(backend="reference", quantize="int8")
    model = with_moec("mixtral")
    run(model, MODELS["mixtral"].inputs())
    assert all("quantize-experts" in layer.passes for layer in hf.reports(model).values())


def test_compiling_such_a_model() -> None:
    model, want = with_moec("mixtral"), MODELS["mixtral"].make()
    inputs = MODELS["mixtral"].inputs()
    run(model, inputs)
    fast = moec.compile(model, example_inputs=inputs, strict=True)
    assert_close(run(fast, inputs).logits, run(want, inputs).logits)
    assert_close(run(model, inputs).logits, run(want, inputs).logits)


@pytest.mark.parametrize("again", ["restore", "compile and restore"])
def test_restore_leaves_the_implementation_alone(again: str) -> None:
    model = with_moec("mixtral")
    inputs = MODELS["mixtral"].inputs(2, 5, seed=1)
    want = run(model, inputs).logits
    if again != "restore":
        moec.compile(model, inplace=True)
    moec.restore(model)
    kept = [v for m in model.modules() for v in m.__dict__.values() if isinstance(v, hf.ExpertsMethod)]
    assert kept
    assert not any(method.restored for method in kept)
    assert_close(run(model, inputs).logits, want)
