"""The house: commands and ground files on top, one folder per part, imports in the order in which
the data flow."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

GROUND = ["errors", "records", "files", "config"]
FOLDERS = "answers verify tasks policy sample learn measure run figures".split()
COMMANDS = set("train sft evaluate report ask show runs export plan fetch".split())
# A part imports only what stands before it. All commands stand at the end.
ORDER = [*GROUND, "mar_kernels", *FOLDERS]
TEXT_SIDE = {*GROUND, "answers", "verify", "tasks"}
MAY_SEE_HYDRA = {"config.py", "train.py", "run/compose.py", "run/folder.py", "run/sweep.py"}


def source_files() -> list[Path]:
    return sorted([*ROOT.glob("mar/**/*.py"), *ROOT.glob("kernels/mar_kernels/**/*.py")])


def part_of(file: Path) -> str:
    """The folder, ground file or command that a file belongs to; "" for mar/__init__.py."""
    parts = file.relative_to(ROOT).parts
    if parts[0] == "kernels":
        return "mar_kernels"
    if file.stem == "__main__":  # `python -m mar` and `python -m mar.tasks`
        return "command"
    name = parts[1].removesuffix(".py").replace("__init__", "")
    return "command" if name in COMMANDS else name


def imports(file: Path) -> Iterator[str]:
    """Dotted names of everything a file imports, inside functions too."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = ".".join(file.relative_to(ROOT).parts[:-1]) if node.level else ""
            base = ".".join(filter(None, [package.removeprefix("kernels."), node.module]))
            yield from (f"{base}.{alias.name}" for alias in node.names)


def imported_part(name: str) -> str | None:
    """The part that an imported name points to, None for other packages."""
    parts = name.split(".")
    if parts[0] == "mar_kernels":
        return "mar_kernels"
    if parts[0] != "mar" or len(parts) < 2 or parts[1] == "__version__":
        return None
    return "command" if parts[1] in COMMANDS else parts[1]


@pytest.mark.parametrize("file", source_files(), ids=lambda f: str(f.relative_to(ROOT)))
def test_a_part_imports_only_what_stands_before_it(file: Path) -> None:
    here = part_of(file)
    if not here:
        return
    order = [*ORDER, "command"]
    assert here in order, f"{file.name} is no command: put it into a folder, or name it in COMMANDS"
    for name in imports(file):
        there = imported_part(name)
        if there is None or there == here != "command":
            continue
        assert there in ORDER, f"{file} imports {name}, which is a command or has no place in ORDER"
        assert order.index(there) < order.index(here), f"{here} imports {name}, which comes later"


def test_no_module_imports_itself_in_a_circle() -> None:
    """Inside a folder too: following the imports from any module never leads back to it."""
    files = {".".join(f.relative_to(ROOT).with_suffix("").parts): f for f in source_files()}
    graph: dict[str, set[str]] = {}
    for module, file in files.items():
        names = set(imports(file))
        graph[module] = {
            m for m in files if m != module and any(n == m or n.startswith(f"{m}.") for n in names)
        }
        graph[module] = {m for m in graph[module] if not module.startswith(f"{m}.")}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path, module])
        if module not in done:
            for other in sorted(graph[module]):
                visit(other, (*path, module))
            done.add(module)

    for module in graph:
        if not module.endswith("__init__"):
            visit(module, ())


def test_the_top_holds_commands_ground_files_and_folders() -> None:
    files = {f.stem for f in (ROOT / "mar").glob("*.py")} - {"__init__", "__main__"}
    assert files == COMMANDS | set(GROUND)
    folders = {f.parent.name for f in (ROOT / "mar").glob("*/__init__.py")}
    assert folders == set(FOLDERS)


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_says_what_it_is_for(folder: str) -> None:
    text = (ROOT / "mar" / folder / "__init__.py").read_text(encoding="utf-8")
    assert ast.get_docstring(ast.parse(text)), "what is this part for, and what to read first"
    assert len(text.splitlines()) <= 7, "five lines and the quotes"


def test_kernels_import_nothing_from_mar() -> None:
    names = [n for f in ROOT.glob("kernels/**/*.py") for n in imports(f)]
    assert not [n for n in names if n.split(".")[0] == "mar"]


def test_kernels_is_no_package() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists(), (
        "it would shadow Hugging Face's package `kernels`"
    )


def test_text_side_imports_no_torch() -> None:
    for file in source_files():
        if part_of(file) in TEXT_SIDE:
            heavy = ("torch", "triton", "mar_kernels")
            assert not [n for n in imports(file) if n.split(".")[0] in heavy], file


def test_only_train_and_config_see_hydra() -> None:
    for file in source_files():
        if str(file).removeprefix(f"{ROOT}/mar/") in MAY_SEE_HYDRA:
            continue
        assert not [n for n in imports(file) if n.split(".")[0] in ("hydra", "omegaconf")], file
        assert "DictConfig" not in file.read_text(encoding="utf-8"), file
