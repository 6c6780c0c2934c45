"""The command line: each command is a module of this package with `add_arguments(parser)` and `run(args) -> int`."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence

COMMANDS = {
    "info": "versions, backends, and why a backend is not used",
    "demo": "what is like this patch, and where does SimPool look? On real photographs",
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fastssl", description="fused kernels for self-supervised ViTs")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, text in COMMANDS.items():
        module = importlib.import_module(f"fastssl.cli.{name}")
        module.add_arguments(commands.add_parser(name, help=text, description=text))
    args = parser.parse_args(argv)
    code: int = importlib.import_module(f"fastssl.cli.{args.command}").run(args)
    return code
