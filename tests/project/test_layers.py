"""The layers of the package: imports run downwards, no circle of any size, and the method needs few packages."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def imports() -> dict[str, set[str]]:
    """Each module of the package, and those of it that it imports: for types alone and within functions too."""
    files = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in (ROOT / "tokentune").rglob("*.py")
    }
    found: dict[str, set[str]] = {}
    for module, path in files.items():
        names = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}: a relative import"
                names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
        found[module] = {name for name in names if name in files and name != module}
    return found


def circle(graph: dict[str, set[str]]) -> list[str]:
    """The modules of a circle, in order; none where there is no circle."""
    done: set[str] = set()

    def visit(module: str, way: list[str]) -> list[str]:
        if module in way:
            return way[way.index(module) :]
        if module in done:
            return []
        for imported in sorted(graph[module]):
            if found := visit(imported, [*way, module]):
                return found
        done.add(module)
        return []

    return next((found for module in sorted(graph) if (found := visit(module, []))), [])


def test_no_circle_of_imports() -> None:
    graph = imports()
    # A package's own file is imported with each module of it, and imports some of them: that is no arrow of theirs.
    graph = {module: {name for name in names if name != "tokentune"} for module, names in graph.items()}
    assert circle(graph) == []


def test_a_circle_is_found() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_every_folder_says_what_belongs_there() -> None:
    for path in (ROOT / "tokentune").rglob("__init__.py"):
        assert (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").endswith("."), path


def test_contracts_of_the_layers() -> None:
    pytest.importorskip("importlinter")
    code = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    command = [sys.executable, "-c", code, "--no-cache"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout


@pytest.mark.parametrize("name", ["patching", "data.chat_templates", "data.conversations"])
def test_old_paths_work_and_say_where_to_go(name: str) -> None:
    sys.modules.pop(f"tokentune.{name}", None)
    with pytest.warns(DeprecationWarning, match=f"tokentune.{name} is now tokentune"):
        module = importlib.import_module(f"tokentune.{name}")
    assert all(hasattr(module, public) for public in module.__all__)
