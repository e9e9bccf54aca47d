"""Names of a package that load on use: naming the package loads none of its modules."""

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any


def names_on_use(package: str, modules: Mapping[str, Sequence[str]]) -> Callable[[str], Any]:
    """Makes the `__getattr__` of a package (PEP 562). modules: the names that each of its modules gives."""
    homes = {name: module for module, names in modules.items() for name in names}

    def load(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f"{package}.{homes[name]}"), name)

    return load
