"""The import graph: rooms import downwards only, no two modules import each other."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# From the bottom up; those in one row do not import each other.
ROOMS = [
    ["tw_kernels"],
    ["threadweaver", "threadweaver.command", "threadweaver.device", "threadweaver.progress"],
    ["threadweaver.trajectory", "threadweaver.data"],
    ["threadweaver.model"],
    ["threadweaver.generate", "threadweaver.add_tags"],
    ["threadweaver.tasks"],
    ["threadweaver.evaluate"],
    ["threadweaver.eval", "threadweaver.train"],
    ["bench"],
]
FLOORS = {room: floor for floor, rooms in enumerate(ROOMS) for room in rooms}


def modules() -> dict[str, Path]:
    found = {}
    for package in ("tw_kernels", "threadweaver", "bench"):
        for path in (ROOT / package).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports(module: str) -> set[str]:
    """Our modules that a module imports anywhere in its text, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= inner & MODULES.keys()
            if inner - MODULES.keys():
                found.add(node.module)
    return (found & MODULES.keys()) - {module}


def room(module: str) -> str:
    return next(
        name
        for name in sorted(FLOORS, key=len, reverse=True)
        if module == name or module.startswith(f"{name}.")
    )


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_from_its_own_room_and_lower_floors(module):
    for other in imports(module):
        assert room(other) == room(module) or FLOORS[room(other)] < FLOORS[room(module)], other


def test_no_modules_import_each_other_in_a_circle():
    done, path = set(), []

    def visit(module: str) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            path.append(module)
            for other in sorted(imports(module)):
                # A name that a package exports comes from one of its own modules.
                if not module.startswith(f"{other}."):
                    visit(other)
            done.add(path.pop())

    for module in MODULES:
        visit(module)
