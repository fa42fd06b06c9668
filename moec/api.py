"""compile, explain, restore, refresh: the story in a page."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from moec.errors import MoecError
from moec.freeing import gather_layer
from moec.frontends.torch.install import drop_own_methods, install, installed, uninstall
from moec.frontends.torch.method import CompiledMethod
from moec.frontends.torch.remade import Remade
from moec.frontends.torch.twin import closures_over, make_twin
from moec.graphmodules import compile_graph, is_graph
from moec.modules import compile_modules, probe_of
from moec.options import Options
from moec.report import Report
from moec.undisturbed import undisturbed

Example = tuple[Any, ...] | Mapping[str, Any] | None


class Handle:
    """What a compiled model carries as `.moec`: its report, and the options it was compiled with."""

    def __init__(self, report: Report, options: Options, example: Remade) -> None:
        self.report, self.options, self.example = report, options, example
        # The parameters shared with the original, to notice when load_state_dict(assign=True) replaces them.
        self.shared: dict[str, int] = {}
        self.watch: Any = None

    def __repr__(self) -> str:
        return f"<moec: {len(self.report.compiled)} of {len(self.report.layers)} layers compiled>"

    def __reduce__(self) -> tuple[Any, ...]:
        # A pickled model is the original again; what it was compiled into is said, not kept.
        report = Report(
            notes=["this model was pickled: its layers run their original code until moec.compile is called again"]
        )
        return Handle, (report, self.options, Remade(None))

    def __deepcopy__(self, memo: dict[int, Any]) -> Handle:
        copied = Handle(self.report, self.options, self.example)
        memo[id(self)] = copied
        return copied


@undisturbed()
def compile(model: Any, *, example_inputs: Example = None, **options: Any) -> Any:
    """Compile the MoE and FFN layers of `model` and return a twin of it that shares all its tensors.

    `example_inputs` is a tuple of positional or a dict of keyword arguments of the model's forward; without it, probes
    are made from the parameters' sizes. Options are the fields of moec.Options. The result has the class of the model,
    and `.moec.report`.

    Raises MoecError: MOEC501-503 for options, MOEC209 for what is no module, MOEC210 for a module that cannot be copied
    (pass inplace=True), MOEC211 when the model does not run on example_inputs, MOEC220/221 under strict.
    """
    if isinstance(model, str | Path) and str(model).endswith(".onnx"):
        return _compile_file(Path(model), options)
    chosen = Options.make(**options)
    if is_graph(model):
        return compile_graph(model, _example(example_inputs), chosen)
    model = _module(model)
    example = _example(example_inputs)
    start = time.perf_counter()
    target = model if chosen.inplace else make_twin(model)
    drop_own_methods(target)
    older = installed(target)
    try:
        for method in older:
            uninstall(method)
        with probe_of(target, chosen) as probe:
            report, layers = compile_modules(probe, example, chosen)
        methods = [layer.method_for(target) for layer in layers if layer.layer.compiled]
        for method, layer in zip(methods, [layer for layer in layers if layer.layer.compiled], strict=True):
            if chosen.free_original:  # what is small was the probe's own so far
                gather_layer(target, method.module, layer.lifted.views)
            method.ready()
    except BaseException:
        for method in older:
            install(method)
        raise
    report.seconds = time.perf_counter() - start
    report.notes += _sharing_notes(model, target)
    for method in methods:
        install(method)
    handle = target.__dict__["moec"] = Handle(report, chosen, Remade(example_inputs))
    if target is not model:
        handle.shared = {name: id(p) for name, p in target.named_parameters()}
        handle.watch = target.register_load_state_dict_post_hook(_note_assignment)
    report.measurer = _measurer(weakref.ref(target), handle.example, report)
    if chosen.measure:
        report.measure()
    return target


def _compile_file(path: Path, options: dict[str, Any]) -> Any:
    """Something to call in ONNX Runtime; of the options a file takes backend and quantize."""
    from moec.exporter.compiled_file import compile_file

    Options.make(**options)  # a wrong value is told as for any model
    more = sorted(set(options) - {"backend", "quantize"})
    if more:
        raise MoecError("MOEC503", f"{more[0]}: an ONNX file takes backend and quantize", hint=f"leave {more[0]} out")
    return compile_file(path, **options)


@undisturbed()
def explain(model: Any, example_inputs: Example = None, **options: Any) -> Report:
    """The report that compile would give, without changing anything."""
    Options.make(**options)
    chosen = Options.make(**{**options, "inplace": False, "strict": False, "free_original": False})
    if is_graph(model):
        found: Report = compile_graph(model, _example(example_inputs), chosen).moec.report
        return found
    model, example = _module(model), _example(example_inputs)
    start = time.perf_counter()
    twin = make_twin(model)
    drop_own_methods(twin)
    for method in installed(twin):
        uninstall(method)
    with probe_of(twin, chosen) as probe:
        report, _ = compile_modules(probe, example, chosen)
    report.seconds = time.perf_counter() - start
    return report


def compiled_methods(model: nn.Module) -> list[CompiledMethod]:
    """What stands in the compiled layers of a model."""
    return installed(model)


def restore(model: nn.Module) -> nn.Module:
    """Give every compiled layer of `model` its original forward back; returns the model."""
    for method in installed(_module(model)):
        uninstall(method)
    handle = model.__dict__.pop("moec", None)
    if isinstance(handle, Handle) and handle.watch is not None:
        handle.watch.remove()
    return model


def _note_assignment(model: nn.Module, _: Any) -> None:
    """After load_state_dict: with assign=True the twin has parameters of its own from now on."""
    handle = model.__dict__.get("moec")
    if not isinstance(handle, Handle):
        return
    own = [name for name, p in model.named_parameters() if handle.shared.get(name, id(p)) != id(p)]
    if own:
        count = f"{len(own)} parameters, {own[0]!r} first" if len(own) > 1 else repr(own[0])
        handle.report.notes.append(f"load_state_dict(assign=True) ended the sharing with the original: {count}")
        handle.shared = {name: id(p) for name, p in model.named_parameters()}


def refresh(model: nn.Module) -> nn.Module:
    """Read weights again that were written behind our back; returns the model.

    After a change of dtype, device or modules it is compiled again in place. Raises MOEC212 for a model not compiled.
    """
    handle = _module(model).__dict__.get("moec")
    methods = installed(model)
    if not isinstance(handle, Handle):
        raise MoecError("MOEC212", "the model was not compiled by moec", hint="call moec.compile(model) first")
    if all(_unchanged(method) for method in methods):
        for method in methods:
            method.ready().refresh()  # type: ignore[attr-defined]
        return model
    options = {**{k: getattr(handle.options, k) for k in Options.__dataclass_fields__}, "inplace": True}
    compile(model, example_inputs=handle.example.make(), **options)
    return model


def _unchanged(method: CompiledMethod) -> bool:
    dtypes = {p.dtype for p in method.module.parameters() if p.is_floating_point()}
    return not method.moved() and dtypes == {method.call.dtype}


def _module(model: Any) -> nn.Module:
    if isinstance(model, nn.Module):
        return model
    what = f"a {type(model).__name__}" if not isinstance(model, type) else f"the class {model.__name__}"
    hint = "pass an instance of torch.nn.Module"
    if isinstance(model, str):
        hint = "of files, .onnx can be compiled; else load the model and pass the nn.Module"
    raise MoecError("MOEC209", f"moec compiles an nn.Module, not {what}", hint=hint)


def _example(given: Example) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    if given is None:
        return None
    if isinstance(given, Mapping):
        return (), dict(given)
    if isinstance(given, tuple):
        return given, {}
    raise MoecError(
        "MOEC213",
        f"example_inputs is a {type(given).__name__}",
        hint="pass a tuple of positional or a dict of keyword arguments",
    )


def _sharing_notes(model: nn.Module, target: nn.Module) -> list[str]:
    if target is model:
        return []
    return [
        f"{name}: a hook holds on to the original model's modules and acts on those" for name in closures_over(model)
    ]


def _measurer(
    target: Callable[[], nn.Module | None], example: Remade, report: Report
) -> Callable[[Sequence[int]], None]:
    def measure(tokens: Sequence[int]) -> None:
        from moec.bench import measure_report

        after = target()
        if after is None:
            raise MoecError("MOEC504", "the compiled model is gone", hint="keep the model that moec.compile returned")
        before = restore(make_twin(after))
        measure_report(before, after, report, tokens, example.make())

    return measure
