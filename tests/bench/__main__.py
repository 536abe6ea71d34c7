"""Finds the benchmarks and runs one: `python -m tests.bench [NAME [ARGUMENTS]]`.

A module of this package that has a `main(argv: list[str]) -> int` is a benchmark; its
docstring's first line says in the list what it measures. Nothing here knows one by name.
"""

import importlib
import pkgutil
import sys
from types import ModuleType

import tests.bench

OK = 0
USAGE = 2


def benches() -> dict[str, ModuleType]:
    """Returns the benchmarks by name."""
    names = [module.name for module in pkgutil.iter_modules(tests.bench.__path__)]
    modules = {
        name: importlib.import_module(f"tests.bench.{name}") for name in names if name != "__main__"
    }
    return {name: module for name, module in modules.items() if hasattr(module, "main")}


def main(argv: list[str]) -> int:
    """Runs the benchmark named first with the remaining arguments, or lists them all.

    Returns:
        The benchmark's exit code; 2 if there is none of that name.
    """
    found = benches()
    if not argv:
        for name, module in found.items():
            summary = (module.__doc__ or "").strip().partition("\n")[0]
            print(f"{name:<12} {summary}")
        return OK
    name, *arguments = argv
    if name not in found:
        print(f"no bench {name!r}; there are: {', '.join(found)}", file=sys.stderr)
        return USAGE
    code: int = found[name].main(arguments)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
