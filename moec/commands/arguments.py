"""Types of command-line arguments that several commands take; a wrong value ends with exit status 2."""

from __future__ import annotations

import argparse


def counts(text: str) -> tuple[int, ...]:
    """1,8,64 -> (1, 8, 64); in the given order, each once."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of positive numbers like 1,8,64,512")
    return tuple(dict.fromkeys(int(part) for part in parts))


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 3600:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds from 0 to 3600")
    return value
