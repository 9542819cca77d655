"""Modules import only what lies upstream of them; the text side knows no tensors; a DictConfig stops at train."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# The one order of the code, upstream first. A new module takes the place at which the data reaches it.
ORDER = """
    records rundir grammar rewards losses config compose metrics verify tasks prompts mar_kernels
    attention model weights lora distributed draw cache sampler rollout batch advantages critic optim checkpoint
    itemstats mirror log plots protocol fetch lessons sft job update variance __main__ train arms evaluate export plan report show
""".split()
TEXT_SIDE = {
    "records",
    "rundir",
    "config",
    "compose",
    "grammar",
    "metrics",
    "tasks",
    "prompts",
    "verify",
    "rewards",
}
MAY_SEE_HYDRA = {"rundir", "config", "compose", "train"}


def source_files() -> list[Path]:
    return sorted([*ROOT.glob("mar/**/*.py"), *ROOT.glob("kernels/mar_kernels/**/*.py")])


def module_of(file: Path) -> str:
    """The entry of ORDER that a file belongs to; "" for mar/__init__.py."""
    parts = file.relative_to(ROOT).parts
    if parts[0] == "kernels":
        return "mar_kernels"
    if file.stem == "__main__":  # a command of the package, not what others import
        return "__main__"
    return parts[1] if len(parts) > 2 else file.stem.replace("__init__", "")


def imports(file: Path) -> Iterator[str]:
    """Dotted names of everything a file imports, inside functions too; not what is for type checkers only."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = ".".join(file.relative_to(ROOT).parts[:-1]) if node.level else ""
            base = ".".join(filter(None, [package.removeprefix("kernels."), node.module]))
            yield from (f"{base}.{alias.name}" for alias in node.names)


def own_module(name: str) -> str | None:
    """The entry of ORDER that an imported name points to, None for other packages."""
    parts = name.split(".")
    if parts[0] == "mar_kernels":
        return "mar_kernels"
    return parts[1] if parts[0] == "mar" and len(parts) > 1 and parts[1] != "__version__" else None


@pytest.mark.parametrize("file", source_files(), ids=lambda f: str(f.relative_to(ROOT)))
def test_imports_only_upstream(file: Path) -> None:
    here = module_of(file)
    if not here:
        return
    assert here in ORDER, f"give {here} its place in ORDER"
    for name in imports(file):
        there = own_module(name)
        if there is not None and there != here:
            assert there in ORDER, f"{file} imports {name}, which has no place in ORDER"
            assert ORDER.index(there) < ORDER.index(here), (
                f"{here} imports {name}, which is downstream of it"
            )


def test_kernels_import_nothing_from_mar() -> None:
    names = [n for f in ROOT.glob("kernels/**/*.py") for n in imports(f)]
    assert not [n for n in names if n.split(".")[0] == "mar"]


def test_kernels_is_no_package() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists(), (
        "it would shadow Hugging Face's package `kernels`"
    )


def test_text_side_imports_no_torch() -> None:
    for file in source_files():
        if module_of(file) in TEXT_SIDE:
            assert not [
                n for n in imports(file) if n.split(".")[0] in ("torch", "triton", "mar_kernels")
            ], file


def test_only_train_and_config_see_hydra() -> None:
    for file in source_files():
        if module_of(file) not in MAY_SEE_HYDRA:
            assert not [n for n in imports(file) if n.split(".")[0] in ("hydra", "omegaconf")], file
            assert "DictConfig" not in file.read_text(encoding="utf-8"), file
