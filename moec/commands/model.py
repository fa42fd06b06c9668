"""What inspect and bench share: the MODEL argument and what to say when nothing in it is a layer."""

from __future__ import annotations

import argparse

from moec.errors import MoecError
from moec.loading import DTYPES, Loaded, load_model

_SHORT = {"fp32": "float32", "f32": "float32", "bf16": "bfloat16", "fp16": "float16", "f16": "float16"}


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a transformers config or checkpoint folder (random weights where there are none), or module.py:factory; "
        "the factory returns a model, or (model, make_inputs) where make_inputs(tokens) gives its arguments",
    )
    parser.add_argument("--dtype", type=_dtype, metavar="DTYPE", help="float32, bfloat16 or float16; default: as it is")


def _dtype(text: str) -> str:
    name = _SHORT.get(text, text)
    if name not in DTYPES:
        raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(DTYPES)}")
    return name


def load(arguments: argparse.Namespace) -> Loaded:
    return load_model(arguments.model, dtype=arguments.dtype)


def nothing_found(loaded: Loaded) -> MoecError:
    return MoecError(
        "MOEC606",
        f"{loaded.source}: no MoE or FFN layer found in this {type(loaded.model).__name__}",
        hint="moec looks for lists or stacks of expert weights, and for linear layers around an activation",
    )
