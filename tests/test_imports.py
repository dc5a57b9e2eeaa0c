"""The import graph of the three packages, read from their source.

An import counts wherever it stands, inside functions too. `from package import name` is an import
of the module package.name if there is one, else of the package. That a module's parent packages run
before it does not count: it holds for every module. Under TYPE_CHECKING nothing runs: such an
import makes no circle, but it is an arrow between rooms like any other.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# From the bottom up: a module imports from its own room and from rows below (docs/architecture.md).
ROOMS = [
    ["tw_kernels"],
    [
        "threadweaver",
        "threadweaver.device",
        "threadweaver.json_file",
        "threadweaver.lock",
        "threadweaver.output",
        "threadweaver.ranks",
        "threadweaver.unheard_interrupts",
        "threadweaver.whole_file",
    ],
    ["threadweaver.command", "threadweaver.progress", "threadweaver.shared"],
    ["threadweaver.rank_errors", "threadweaver.trajectory"],
    ["threadweaver.data", "threadweaver.grading"],
    ["threadweaver.model"],
    ["threadweaver.generate", "threadweaver.add_tags"],
    ["threadweaver.tasks"],
    ["threadweaver.evaluate"],
    ["threadweaver.annotate", "threadweaver.train", "threadweaver.view", "threadweaver.eval"],
    ["threadweaver.__main__"],
    ["bench"],
]
FLOOR = {room: floor for floor, rooms in enumerate(ROOMS) for room in rooms}
FILES = {
    ".".join(parts[:-1] if parts[-1] == "__init__" else parts): path
    for package in ("tw_kernels", "threadweaver", "bench")
    for path in sorted((ROOT / package).rglob("*.py*"))
    if path.suffix in (".py", ".pyi")
    for parts in [path.relative_to(ROOT).with_suffix("").parts]
}


def imports(module: str, of_types: bool) -> set[str]:
    """Modules of ours that one imports; with `of_types` under TYPE_CHECKING too."""
    found: set[str] = set()
    nodes: list[ast.AST] = [ast.parse(FILES[module].read_text(encoding="utf-8"))]
    for node in nodes:
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module and not node.level, f"{module} imports relatively"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found.update(name if name in FILES else node.module for name in names)
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            nodes += [*(node.body if of_types else []), *node.orelse]
        else:
            nodes += ast.iter_child_nodes(node)
    return found & FILES.keys()


def room(module: str) -> str:
    """In `threadweaver` the part of the name up to its second dot, else the package."""
    package, *rest = module.split(".")
    found = f"{package}.{rest[0]}" if package == "threadweaver" and rest else package
    assert found in FLOOR, f"{module} has no room: give it one in ROOMS"
    return found


@pytest.mark.parametrize("module", FILES)
def test_a_module_imports_from_its_own_room_and_from_rows_below(module):
    own = room(module)
    others = {room(other) for other in imports(module, of_types=True)}
    assert {other for other in others - {own} if FLOOR[other] >= FLOOR[own]} == set()


def test_no_imports_run_in_a_circle():
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            for other in sorted(imports(module, of_types=False)):
                visit(other, (*path, module))
            done.add(module)

    for module in FILES:
        visit(module, ())


def test_the_kernels_import_neither_the_trainer_nor_triton():
    code = "import sys, tw_kernels; print(*{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    loaded = set(done.stdout.split())
    assert "tw_kernels" in loaded
    assert not loaded & {"threadweaver", "transformers", "triton"}
