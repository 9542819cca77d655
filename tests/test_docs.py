"""The texts keep their promises: links lead somewhere, commands parse, files that are named exist."""

import re
import shlex
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

from mar.errors import UserError
from mar.run.compose import check_sweep, compose
from mar.run.words import read_words
from mar.tasks.__main__ import words_of_training

ROOT = Path(__file__).resolve().parents[1]
README_BYTES = 10 * 1024
FENCE = re.compile(r"^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?P<target>[^)\s]+)\)")
# Files of the repository that a text names, outside of a link too.
NAMED = re.compile(
    r"(?<![\w/.-])(?:mar|kernels|experiments|conf|tests)/[\w/.-]*\.(?:py|yaml|sh|md)"
)
# Made by the command beside which they are named.
MADE = {"experiments/gpu/TESTED_ON.md"}


def texts() -> list[Path]:
    """README, CONTRIBUTING, CHANGELOG, and the pages of every folder."""
    folders = ("conf", "experiments", "kernels", "mar")
    pages = [file for folder in folders for file in ROOT.glob(f"{folder}/**/*.md")]
    top = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
    return [*top, *sorted(pages)]


def sources() -> list[Path]:
    """Code and settings, whose comments name files, too."""
    folders = ("mar", "kernels", "experiments", "conf")
    found = [file for folder in folders for file in ROOT.glob(f"{folder}/**/*.*")]
    return [ROOT / "Makefile", *(f for f in found if f.suffix in (".py", ".yaml", ".sh"))]


def name_of(file: Path) -> str:
    return str(file.relative_to(ROOT))


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, made as GitHub makes them."""
    without_code = FENCE.sub("", text)
    found = set()
    for heading in re.findall(r"^#+ +(.+)$", without_code, re.MULTILINE):
        words = re.sub(r"[^\w\- ]", "", heading.lower())
        found.add(words.replace(" ", "-"))
    return found


def ragged_rows(text: str) -> list[str]:
    """The rows of a page's tables that have more or fewer cells than their heading.

    A bar within a cell ends it, also between backticks; `\\|` does not.
    """
    ragged = []
    num_bars = None
    for line in FENCE.sub("", text).splitlines():
        if not line.startswith("|"):
            num_bars = None
            continue
        found = len(re.findall(r"(?<!\\)\|", line))
        num_bars = num_bars or found
        if found != num_bars:
            ragged.append(line)
    return ragged


def broken_links(file: Path, text: str) -> list[str]:
    """The links of a page that lead to no file, or to no heading of it."""
    broken = []
    for target in LINK.findall(FENCE.sub("", text)):
        if re.match(r"https?:", target):
            continue
        path, _, anchor = target.partition("#")
        page = (file.parent / path).resolve() if path else file
        if not page.exists() or (anchor and anchor not in anchors(page.read_text("utf-8"))):
            broken.append(target)
    return broken


def commands(text: str) -> list[str]:
    """The lines of the fenced blocks of a shell, continued lines joined, comments left out."""
    found = []
    for block in FENCE.finditer(text):
        if block["language"] != "bash":
            continue
        for line in block["text"].replace("\\\n", " ").splitlines():
            command = re.sub(r"(^|\s)#.*$", "", line).strip()
            if command:
                found.append(command)
    return found


def words_of(command: str) -> list[str]:
    """The words of a command; a placeholder such as <your file> is one word, environment is not."""
    words = shlex.split(re.sub(r"<[^>]*>", "owner/name", command))
    while words and re.match(r"[A-Z_]+=", words[0]):
        words = words[1:]
    return words


def check_module(module: str, words: list[str]) -> None:
    """The module exists, and if it is a command of ours it takes these words."""
    assert find_spec(module) is not None, f"no module {module}"
    file = f"{module}.__main__" if module == "mar.tasks" else module
    command = getattr(import_module(file), "COMMAND", None)
    if command is None:
        return
    # $W stands for words that are elsewhere.
    read = read_words(command, [word for word in words if not word.startswith("$")])
    # The run that another one starts from is not at hand. Named with its checkpoint, it need not be.
    named = [re.sub("^(model.path=runs/.*)", r"\1@1-000000000000", word) for word in read.settings]
    settings = [word for word in named if word not in ("-m", "--cfg", "job")]
    names_a_run = module in ("mar.evaluate", "mar.ask") and read.places not in ([], ["base"])
    if module == "mar.tasks":
        compose(words_of_training(read))
    elif "-m" in words:
        check_sweep(settings)
    elif command.settings and not names_a_run:
        compose(settings)


def check_command(command: str) -> None:
    """Modules, scripts and make targets exist; settings compose."""
    words = words_of(command)
    program = words[0]
    if program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
        for word in words[1:]:
            assert "=" in word or word in targets, f"no target {word} in the Makefile"
    elif program in ("python", "torchrun") and "-m" in words:
        start = words.index("-m") + 1
        check_module(words[start], words[start + 1 :])
    elif program in ("python", "bash", "sbatch"):
        assert (ROOT / words[1]).is_file(), f"no file {words[1]}"


@pytest.mark.parametrize("file", texts(), ids=name_of)
def test_every_link_leads_somewhere(file):
    assert not broken_links(file, file.read_text("utf-8"))


@pytest.mark.parametrize("file", texts(), ids=name_of)
def test_every_row_of_a_table_has_the_cells_of_its_heading(file):
    assert not ragged_rows(file.read_text(encoding="utf-8"))


@pytest.mark.parametrize("file", texts(), ids=name_of)
def test_every_file_that_is_named_exists(file):
    text = file.read_text("utf-8")
    missing = [name for name in NAMED.findall(text) if not (ROOT / name).exists()]
    assert not set(missing) - MADE


@pytest.mark.parametrize("file", texts(), ids=name_of)
def test_every_command_parses(file):
    for command in commands(file.read_text("utf-8")):
        try:
            check_command(command)
        except (AssertionError, UserError) as error:
            pytest.fail(f"{command}: {error}")


def test_every_file_that_a_comment_names_exists():
    missing = []
    for file in sources():
        names = NAMED.findall(file.read_text("utf-8"))
        missing += [f"{name_of(file)}: {name}" for name in names if not (ROOT / name).exists()]
    assert not missing


def test_the_readme_is_short():
    assert (ROOT / "README.md").stat().st_size <= README_BYTES


def test_every_experiment_stands_in_the_index():
    index = (ROOT / "experiments/README.md").read_text("utf-8")
    folders = {file.parent.name for file in ROOT.glob("experiments/*/README.md")}
    assert not [folder for folder in sorted(folders) if f"]({folder}/README.md)" not in index]


def test_a_bar_that_ends_a_cell_is_seen():
    table = ["| recipe | words |", "| --- | --- |", r"| a | `x\|y` |"]
    assert not ragged_rows("\n".join(table))
    broken = "| b | `x|y` |"
    assert ragged_rows("\n".join([*table, broken])) == [broken]
    assert not ragged_rows("\n".join([*table, "", "| another | table | here |"]))


def test_what_is_broken_is_seen(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A heading, twice\n")
    text = "[a](page.md#a-heading-twice) [b](page.md#nowhere) [c](gone.md) [d](https://x.y)"
    assert broken_links(tmp_path / "other.md", text) == ["page.md#nowhere", "gone.md"]
    assert NAMED.findall("see `mar/job.py`, ../mar/x.py and mar/learn/losses.py.") == [
        "mar/job.py",
        "mar/learn/losses.py",
    ]
    assert commands("```bash\nmake a \\\n  b  # why\n# all\n```\n```\nmar/ x\n```\n") == [
        "make a    b"
    ]
    for wrong in (
        "make nothing",
        "python -m mar.trian +experiment=medqa",
        "python -m mar.train +experiment=medqa trian.steps=3",
        "python -m mar.train +experiment=nothing",
        "python -m mar.train -m +experiment=clinic +sweep=nothing",
        "python -m mar.show runs/medqa/seed0 5",
        "python -m mar.export --dtype float32 runs/medqa/seed0",
        "python -m mar.tasks jsonl data.path=x",
        "python experiments/gone.py",
    ):
        with pytest.raises((AssertionError, UserError)):
            check_command(wrong)
