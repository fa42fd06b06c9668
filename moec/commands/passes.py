"""The passes that are registered, with their options and whether they change results."""

from __future__ import annotations

import argparse
from typing import Any

from moec import pipeline
from moec.jsontext import dumps
from moec.passbase import Option

HELP = "the passes that are registered"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """passes takes nothing of its own."""


def run(arguments: argparse.Namespace) -> int:
    listed = pipeline.list_passes()
    if arguments.json:
        print(dumps([_as_dict(info) for info in listed]))
        return 0
    for info in listed:
        print(f"{info.name}{'  (changes results, so it runs only when asked for)' if info.changes_numerics else ''}")
        print(f"    {info.summary}")
        for option in info.options:
            default = "required" if option.required else f"default {option.default!r}"
            print(f"    {option.name}: {option.type_text}, {default}")
    return 0


def _as_dict(info: pipeline.PassInfo) -> dict[str, Any]:
    return {
        "name": info.name,
        "summary": info.summary,
        "changes_numerics": info.changes_numerics,
        "before": list(info.before),
        "options": [_option(option) for option in info.options],
    }


def _option(option: Option) -> dict[str, Any]:
    described = {"name": option.name, "type": option.type_text, "required": option.required}
    return described if option.required else {**described, "default": option.default}
