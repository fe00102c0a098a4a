"""Tools around the scripts: many runs, their report, speed, a look at a policy. `python -m tools.benchmark --help`."""

import importlib
from functools import cache
from pathlib import Path
from types import ModuleType

from common import check

ROOT = Path(__file__).parent.parent


@cache
def methods() -> tuple[str, ...]:
    """The scripts beside this folder that define `Args`, `main` and `load_policy`: DTQL first, the others by name."""
    needed = ("class Args(", "def main(", "def load_policy(")
    found = [file.stem for file in ROOT.glob("*.py") if all(name in file.read_text() for name in needed)]
    return tuple(sorted((name for name in found if name != "common"), key=lambda name: (name != "dtql_continuous", name)))


def import_method(name: str) -> ModuleType:
    """The module of a method. Raises UserError if there is none of that name."""
    check(name in methods(), f"unknown method {name}: there are {', '.join(methods())}")
    return importlib.import_module(name)
