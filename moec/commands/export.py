"""Write a model as an ONNX file whose MoE layers are rewritten, after checking it against the original.

Each layer is checked alone in ONNX Runtime over routings that are easy to get wrong, and then the whole model at sizes
that were not traced. Nothing is written unless every check passes.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from moec.commands.arguments import counts, positive, seconds
from moec.commands.model import add_model_arguments, load
from moec.errors import MoecError
from moec.loading import Loaded

HELP = "write a model as a verified ONNX file"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("--inputs", type=Path, metavar="FILE", help="for an .onnx file: an .npz with its inputs")
    parser.add_argument("-o", "--output", type=Path, metavar="OUT", help="the file to write; default NAME.moec.onnx")
    parser.add_argument(
        "--target",
        choices=["portable", "cpu", "cuda"],
        help="portable uses ONNX's own ops alone, cpu and cuda those that ONNX Runtime has there too; "
        "default cuda where it works, else cpu",
    )
    parser.add_argument("--quantize", choices=["int8", "int4"], help="fewer bits for weights; changes results")
    parser.add_argument("--tokens", type=counts, default=(), metavar="T,T,...", help="time before and after at these")
    parser.add_argument("--tune", action="store_true", help="measure rival ways to write a layer on this machine")
    parser.add_argument("--static", type=positive, metavar="T", help="every size fixed, with T tokens")
    parser.add_argument("--external-data", action="store_true", help="weights in OUT.data, as over 2 GB anyway")
    parser.add_argument("--widen", action="store_true", help="read and write an .onnx file in bf16 as one in fp32")
    parser.add_argument("--seconds", type=seconds, default=1.0, metavar="S", help="time for each pair; default 1.0")


def run(arguments: argparse.Namespace) -> int:
    output = arguments.output or Path(_stem(arguments.model) + ".moec.onnx")
    import moec
    from moec.exporter.files import check_target

    if arguments.model.endswith(".onnx"):
        report = moec.export(
            arguments.model,
            output,
            target=arguments.target,
            quantize=arguments.quantize,
            tokens=arguments.tokens,
            tune=arguments.tune,
            external_data=arguments.external_data or None,
            inputs=arguments.inputs,
            widen=arguments.widen,
            seconds=arguments.seconds,
        )
        print(report.to_json() if arguments.json else report)
        return 0
    check_target(output, None)
    loaded = load(arguments)
    report = moec.export(
        loaded.model,
        output,
        _inputs(loaded, arguments.static or 16),
        target=arguments.target,
        quantize=arguments.quantize,
        tokens=arguments.tokens,
        tune=arguments.tune,
        static=arguments.static is not None,
        external_data=arguments.external_data or None,
        seconds=arguments.seconds,
    )
    report.source = loaded.source
    print(report.to_json() if arguments.json else report)
    return 0


def _stem(model: str) -> str:
    """mine.py:build -> build; folder/config.json -> folder; a folder's name otherwise."""
    file, _, factory = model.rpartition(":")
    if file.endswith(".py"):
        return factory
    path = Path(model)
    if path.suffix == ".onnx":
        return path.stem
    path = path.parent if path.name == "config.json" else path
    return path.resolve().name or "model"


def _inputs(loaded: Loaded, tokens: int) -> Any:
    """The model's arguments; encoders of transformers need their mask when torch.export records them."""
    if loaded.make_inputs is None:
        hint = "let the factory return (model, make_inputs); make_inputs(tokens) gives the arguments"
        raise MoecError("MOEC605", f"cannot guess the inputs of {loaded.source}", hint=hint)
    made = loaded.make_inputs(tokens)
    if isinstance(made, dict) and "decoder_input_ids" in made and "attention_mask" not in made:
        return {**made, "attention_mask": made["input_ids"].new_ones(made["input_ids"].shape)}
    return made
