"""All commands read their words in one place, and say what they take."""

import importlib
import re
import shlex
from dataclasses import dataclass, fields
from pathlib import Path

import pytest

from mar.__main__ import COMMANDS
from mar.__main__ import run as list_commands
from mar.config import listed, number, option
from mar.errors import UserError
from mar.run.compose import compose
from mar.run.words import (
    MEANINGS,
    Command,
    check_settings,
    help_text,
    nearest,
    read_words,
    spelled,
)

ROOT = Path(__file__).resolve().parents[2]
NAMES = sorted({file.stem for file in ROOT.glob("mar/*.py")} & COMMANDS.keys() | {"tasks"})


def command_of(name: str) -> Command:
    file = "mar.tasks.__main__" if name == "tasks" else f"mar.{name}"
    return importlib.import_module(file).COMMAND


def test_every_command_is_listed_in_the_order_of_use(capsys: pytest.CaptureFixture[str]) -> None:
    assert set(NAMES) == COMMANDS.keys()
    list_commands([])
    said = capsys.readouterr().out
    places = [said.index(f"mar.{name} ") for name in COMMANDS]
    assert places == sorted(places)
    with pytest.raises(UserError, match=r"write python -m mar\.train \.\.\."):
        list_commands(["train", "+experiment=medqa"])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("word", ["-h", "--help"])
def test_help_has_options_with_defaults_and_three_examples(
    name: str, word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = command_of(name)
    file = "mar.tasks.__main__" if name == "tasks" else f"mar.{name}"
    assert importlib.import_module(file).main([word]) == 0
    said = capsys.readouterr().out
    assert said == help_text(command) + "\n" and said.startswith(f"python -m mar.{name}")
    for item in fields(command.options):
        assert f"  {command.prefix}{item.name}=" in said and item.metadata["help"]
    assert said.count(f"\n  python -m mar.{name}") >= 3
    assert set(command.settings) <= MEANINGS.keys()


@pytest.mark.parametrize("name", NAMES)
def test_the_examples_of_a_command_are_words_that_it_takes(name: str) -> None:
    command = command_of(name)
    for example in command.examples:
        line = re.sub(r"<[^>]*>", "owner/name", example).partition("#")[0].partition(" < ")[0]
        read_words(command, shlex.split(line))


@dataclass
class Own:
    many: list[int] = listed([1], help="numbers")
    rate: float | None = number(None, low=0, high=1, help="a number")
    place: Path | None = option(None, help="a folder")
    sure: bool = option(False, help="yes or no")


OWN = Command(name="mar.own", about="", examples=("x",), options=Own, places="RUN [MORE]")


def test_values_are_of_their_type() -> None:
    words = ["x", "many=[3,4]", "rate=1e-1", "place=~/p", "sure=True"]
    read = read_words(OWN, words)
    assert read.options == Own([3, 4], 0.1, Path.home() / "p", True)
    assert read.given == {"many", "rate", "place", "sure"} and read.places == ["x"]
    assert read_words(OWN, ["x", "rate=null", "many=", "place="]).options == Own(many=[])
    for word, sentence in (
        ("many=a", "many=a is no whole"),
        ("rate=2", "rate=2.0 is out of range"),
    ):
        with pytest.raises(UserError, match=sentence):
            read_words(OWN, ["x", word])


def test_a_folder_with_a_sign_of_equality_is_a_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("algo.credit=own/seed0").mkdir(parents=True)
    Path("rate=1").mkdir()
    read = read_words(OWN, ["algo.credit=own/seed0", "runs/a=b/seed1", "rate=1"])
    assert read.places == ["algo.credit=own/seed0", "runs/a=b/seed1"]
    assert read.options.rate == 1, "an option comes before a folder of its name"


@pytest.mark.parametrize(
    "name", ["a b", "it's", "x=1,y=2", "ü", "(1)", "[1]", "50%", "a\\b", "a'\\"]
)
def test_a_path_needs_no_quotes_for_hydra(name: str, tmp_path: Path) -> None:
    words = ["data=jsonl", "model=smollm2-135m", f"data.path={tmp_path}/{name}", f"out=~/{name}"]
    config = compose(words)
    assert config.data.path == f"{tmp_path}/{name}"
    assert config.run_dir == f"{Path.home()}/{name}/run/seed0"


def test_what_is_quoted_or_empty_or_swept_stays() -> None:
    words = ["out='a b'", "data.path=null", "run_dir=${out}/x", "data.path=", "name=~"]
    assert spelled(words) == words
    assert spelled(["data.path=a,b"], sweep=True) == ["data.path=a,b"]
    assert spelled(["data.path=a,b"]) == ["data.path='a,b'"]


def test_the_nearest_keys() -> None:
    known = ["eval.num_items", "train.steps", "optim.lr", "model.lr", "k"]
    assert nearest("lr", known) == ["optim.lr", "model.lr"]
    assert nearest("num_item", known) == ["eval.num_items"]
    assert nearest("Train.Step", known) == ["train.steps"]
    assert nearest("max_steps", known) == ["train.steps"]
    assert nearest("zebra", known) == []


def test_terms_and_options_may_be_given_by_name_or_all_at_once() -> None:
    check_settings(["reward.terms.length=0.1", "reward.terms={length: 0.1}"])
    check_settings(["algo.loss_options.penalty=1", "algo.loss_options={penalty: 1}"])
    with pytest.raises(UserError, match="reward.term is no setting"):
        check_settings(["reward.term={length: 0.1}"])
