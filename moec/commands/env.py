"""Versions, CPU and devices: paste it into a bug report."""

from __future__ import annotations

import argparse

from moec import environment
from moec.jsontext import dumps

HELP = "versions and devices, for a bug report"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """env takes nothing of its own."""


def run(arguments: argparse.Namespace) -> int:
    versions, devices, warnings = environment.versions(), environment.devices(), environment.warnings()
    if arguments.json:
        found = {"machine": environment.machine(), "versions": versions, "devices": devices, "warnings": warnings}
        print(dumps(found))
        return 0
    print(environment.machine())
    print(*(f"{name} {version}" for name, version in versions.items()), sep="\n")
    for device in devices:
        memory = f", {device['memory_bytes'] / 2**30:.0f} GiB" if "memory_bytes" in device else ""
        capability = f", capability {device['capability']}" if "capability" in device else ""
        print(f"{device['device']}: {device['name']}{capability}{memory}")
    if not devices:
        print("no accelerator")
    print(*(f"warning: {warning}" for warning in warnings), sep="\n", end="\n" if warnings else "")
    return 0
