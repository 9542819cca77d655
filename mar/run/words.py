"""The words of a command line, the same for every command.

A word is `key=value`, or it stands alone where a command takes a folder, a task or a question. A
key is an option of the command's own (a field of its dataclass) or, where it takes them, a setting
of `conf/`. What is wrong with a word is found here, before anything is loaded, and `-h` prints
what there is from the same declaration.
"""

import re
import typing
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any, Generic, TypeVar

from mar.config import Config
from mar.errors import UserError, exit_code
from mar.files import at_home
from mar.run.fields import field_faults
from mar.run.folder import flatten

CONF_DIR = Path(__file__).resolve().parents[2] / "conf"

# A file of each CHOSEN group is chosen by default; one of an ADDED group is added with a +.
CHOSEN = ("data", "model", "algo", "reward", "sampler", "scale")
ADDED = ("experiment", "sweep", "debug")
# What they hold are names of a registry, not fields.
OPEN = ("reward.terms.", "algo.loss_options.", "hydra.", "hydra/", "reward/for_algo")
# All of their names at once: reward.terms={length: 0.1}
WHOLE = ("reward.terms", "algo.loss_options")

# The flags of Hydra that mar.train has, and what may follow them.
HYDRA_FLAGS: dict[str, tuple[str, ...]] = {
    "-m": (),
    "--multirun": (),
    "--resolve": (),
    "--cfg": ("job", "hydra", "all"),
    "--info": ("defaults", "defaults-tree", "config", "plugins", "searchpath", "all"),
}

ALL_SETTINGS = "`python -m mar.train +experiment=clinic --cfg job` shows all"
MOST_SUGGESTED = 3
FEWEST_SIGNS = 3  # of a name that others may hold
KEY_WIDTH = 26  # columns of the help

SETTING = re.compile(
    r"(?P<sign>\+\+|\+|~|)(?P<key>[A-Za-z_][\w./-]*(@[\w.]+)?)=(?P<value>.*)", re.DOTALL
)

# What the settings are for that a command's help names.
MEANINGS = {
    "train.steps": "updates",
    "algo.prompts_per_step": "questions of an update",
    "algo.group_size": "completions of a question",
    "algo.temperature": "of the draws",
    "reward.num_answers": "answers of a completion",
    "model.path": "a checkpoint's folder or hub id, with model=hf",
    "model.lora_rank": "of adapters; 0: none",
    "model.max_completion_tokens": "where a completion is cut",
    "data.path": "a file of questions, with data.source=path",
    "data.eval_split": "which questions are held out",
    "eval.num_items": "held-out questions",
    "checkpoint.every": "steps between two checkpoints",
    "seed": "of everything that is drawn",
    "name": "a run's folder is out/name/seed<seed>",
    "out": "the folder that runs are kept in",
    "device": "auto, cpu or cuda",
}

# What other programs call a setting.
SYNONYMS = {
    "batch_size": "algo.prompts_per_step",
    "checkpoint": "model.path",
    "dataset": "data",
    "k": "reward.num_answers",
    "learning_rate": "model.lr",
    "limit": "eval.num_items",
    "max_steps": "train.steps",
    "max_tokens": "model.max_completion_tokens",
    "n": "samples",
    "num_steps": "train.steps",
    "output": "out",
    "output_dir": "out",
    "split": "data.eval_split",
}

# What becomes of dashes and quotes in a text processor.
TYPESET = "[\N{EN DASH}\N{EM DASH}\N{LEFT DOUBLE QUOTATION MARK}\N{RIGHT DOUBLE QUOTATION MARK}]"

# How the names of files end that hold rows of data.
ROWS = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".gz")

# What is not asked for: it happens by itself.
NEEDLESS = {
    "resume": "the same command goes on where a run stopped",
    "continue": "the same command goes on where a run stopped",
    "overwrite": "a finished run moves to seed0~1",
}

HELP = {"-h", "--help", "-help"}

Options = TypeVar("Options")


@dataclass
class NoOptions:
    """For a command that has no options of its own."""


@dataclass(frozen=True)
class Command(Generic[Options]):
    """What a command takes, and what its help says."""

    # As in `python -m <name>`.
    name: str
    # What it does: the module's docstring.
    about: str | None
    # Whole words after `python -m <name>`.
    examples: Sequence[str]
    # A dataclass: the options of its own. What one means is in the `help` of its field.
    options: type[Options]
    # They are written <prefix>key=value.
    prefix: str = ""
    # Settings of conf/ that it would not read, by how their keys begin.
    unread: tuple[str, ...] = ()
    # What stands without a key: `RUN`, `RUN [QUESTION]`, `RUN...`
    places: str = ""
    # Keys of MEANINGS that its help names, where it takes the settings of conf/; empty: it takes none.
    settings: Sequence[str] = ()
    # It takes HYDRA_FLAGS.
    flags: bool = False


@dataclass(frozen=True)
class Words(Generic[Options]):
    """A command line in its parts."""

    places: list[str]
    options: Options
    # As `compose` takes them, Hydra's flags among them.
    settings: list[str]
    # The keys of the options that stand there, and are no defaults.
    given: frozenset[str]


def run_command(
    command: Command[Options],
    words: Sequence[str],
    run: Callable[[Words[Options]], object],
    interrupted: str = "interrupted",
) -> int:
    """Print the help, or read the words and run; returns the exit code."""
    if HELP & set(words) or list(words) == ["help"]:
        return exit_code(lambda: print(help_text(command)))
    return exit_code(lambda: run(read_words(command, words)), interrupted)


# ---------------------------------------------------------------------- reading


def read_words(command: Command[Options], words: Sequence[str]) -> Words[Options]:
    """The parts of a command line. Raises UserError with what to write instead."""
    own = [command.prefix + item.name for item in fields(command.options)]  # type: ignore[arg-type]
    places: list[str] = []
    given: dict[str, str] = {}
    settings: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if command.flags and word in HYDRA_FLAGS:
            settings.append(word)
            if HYDRA_FLAGS[word]:
                settings.append(_value_of_flag(word, rest))
        elif _is_flag(word):
            raise UserError(_no_flag(word, rest, own, command))
        elif "=" in word and word.partition("=")[0] in own:
            key, _, value = word.partition("=")
            given[key] = value
        elif command.places and _is_place(word):
            places.append(word)
        else:
            _require_setting(word, own, command)
            settings.append(word)
    _require_places(command, places, own)
    options = _read_options(command, given)
    homes = [str(at_home(place)) if place[:1] == "~" else place for place in places]
    return Words(homes, options, settings, frozenset(given))


def _is_flag(word: str) -> bool:
    return word.startswith("-") and word != "-" and not re.fullmatch(r"-\d.*", word)


def _value_of_flag(flag: str, rest: list[str]) -> str:
    """Take what follows a flag of Hydra from the rest of the words."""
    allowed = HYDRA_FLAGS[flag]
    value = rest.pop(0) if rest else ""
    if value not in allowed:
        raise UserError(f"{flag} {value}".strip() + f": {flag} wants one of {', '.join(allowed)}")
    return value


def _is_place(word: str) -> bool:
    """It has no key. A folder of a sweep has = in its name."""
    found = SETTING.fullmatch(word)
    if not found or at_home(word).exists():
        return True
    group, slash, _ = found["key"].partition("/")
    return bool(slash) and group not in (*CHOSEN, *ADDED, "hydra")


def _require_places(command: Command[Options], places: Sequence[str], own: Collection[str]) -> None:
    """Raises UserError for too few or too many words without a key."""
    names = command.places.split()
    num_needed = sum(not name.startswith("[") for name in names)
    example = f"python -m {command.name} {command.examples[0]}"
    if len(places) < num_needed:
        raise UserError(
            f"{command.name} wants {command.places}: `{example}`, for example (-h says more)"
        )
    if len(places) > len(names) and not command.places.endswith("..."):
        extra = places[len(names)]
        texts = ", texts with spaces in quotes" if "QUESTION" in command.places else ""
        if "data.path" in command.settings and Path(extra).is_file():
            raise UserError(f"{extra!r} is one word too many: did you mean data.path={extra}?")
        if "=" in extra or extra in own or extra in _defaults():
            raise UserError(_without_value(extra, own, command))
        raise UserError(
            f"{extra!r} is one word too many: {command.name} takes {command.places}{texts}, all "
            "else as key=value"
        )


def _read_options(command: Command[Options], given: Mapping[str, str]) -> Options:
    """The command's own options. Raises UserError for a value that does not fit."""
    kinds = typing.get_type_hints(command.options)
    values = {}
    for key, text in given.items():
        name = key.removeprefix(command.prefix)
        values[name] = read_value(key, text, kinds[name])
    options = command.options(**values)
    for fault in field_faults(options, prefix=command.prefix):
        raise UserError(fault)
    return options


def read_value(key: str, text: str, kind: Any) -> Any:
    """The text as a value of that type. Raises UserError."""
    choices = typing.get_args(kind)
    if type(None) in choices:
        if text in ("", "null", "none", "None"):
            return None
        kind = next(choice for choice in choices if choice is not type(None))
    if typing.get_origin(kind) is list:
        inner = typing.get_args(kind)[0]
        parts = [part.strip() for part in text.strip("[]()").split(",")]
        return [read_value(key, part, inner) for part in parts if part]
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise UserError(f"{key}={text} is neither true nor false")
        return text.lower() == "true"
    if kind is Path:
        if not text:
            raise UserError(f"{key}= has no value: name a folder")
        return at_home(text)
    try:
        return kind(text)
    except ValueError:
        what = "whole number" if kind is int else "number"
        raise UserError(f"{key}={text} is no {what}") from None


# ---------------------------------------------------------------------- settings


def check_settings(words: Sequence[str]) -> None:
    """Every word sets something that conf/ has. Raises UserError with what to write instead.

    Values are left to Hydra, but for the names of conf's files.
    """
    for word in words:
        _require_setting(word, (), None)


def spelled(words: Sequence[str], sweep: bool = False) -> list[str]:
    """Words as Hydra reads them: of a path the ~ becomes the home folder, and what signs it has
    are quoted. In a sweep a comma separates values."""
    return [_spelled(word, sweep) for word in words]


def _spelled(word: str, sweep: bool) -> str:
    found = SETTING.fullmatch(word)
    if not found or found["key"] not in _paths():
        return word
    value = found["value"]
    is_several = sweep and "," in value
    if value in ("", "null") or value[0] in "'\"" or "${" in value or is_several:
        return word
    if value[0] == "~":
        value = str(at_home(value))
    return f"{found['sign']}{found['key']}={quoted(value)}"


def without_references(value: Any) -> Any:
    """A value, with what it holds, in which OmegaConf does not take `${` for a reference."""
    if isinstance(value, str):
        # OmegaConf reads a backslash as itself, except before these signs.
        return re.sub(r"(\\*)\$\{", lambda m: 2 * m[1] + "\\${", value)
    if isinstance(value, dict):
        return {key: without_references(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_references(item) for item in value]
    return value


def quoted(value: object) -> str:
    """A value as a word of Hydra's command line, whatever signs it holds."""
    plain = without_references(str(value))
    # Hydra reads a backslash as itself, except before a quote.
    escaped = re.sub(r"(\\*)('|$)", lambda m: 2 * m[1] + (m[2] and "\\'"), plain)
    return f"'{escaped}'"


@cache
def _defaults() -> dict[str, Any]:
    """Every setting with the schema's default."""
    return flatten(Config().to_dict())


def takes_list(key: str) -> bool:
    """Whether a setting's value is a list."""
    kind: Any = Config
    for part in key.split("."):
        if not is_dataclass(kind):
            return False
        kind = typing.get_type_hints(kind).get(part)
    kinds = (kind, *typing.get_args(kind))
    return any(typing.get_origin(one) is list for one in kinds)


@cache
def _paths() -> frozenset[str]:
    """The settings that name a folder or a file."""

    def of(options: Any, prefix: str) -> Iterator[str]:
        for item in fields(options):
            value = getattr(options, item.name)
            if is_dataclass(value):
                yield from of(value, f"{prefix}{item.name}.")
            elif item.metadata.get("is_path"):
                yield prefix + item.name

    return frozenset(of(Config(), ""))


def choices_of(group: str) -> list[str]:
    """The files of a group of conf/."""
    return sorted(file.stem for file in (CONF_DIR / group).glob("*.yaml"))


def _require_setting(word: str, own: Sequence[str], command: Command[Any] | None) -> None:
    found = SETTING.fullmatch(word)
    if not found:
        raise UserError(_without_value(word, own, command))
    sign, key, value = found["sign"], found["key"], found["value"]
    second = re.search(r"^[^'\"\[{]*\s\+?(?P<key>[A-Za-z_][\w.]*)=", value)
    is_key = second and second["key"] in (*CHOSEN, *ADDED, *_defaults())
    if is_key and not at_home(value).exists():
        raise UserError(
            f"{word!r} is several words in one: each stands alone, not in quotes together"
        )
    if command and not command.settings:
        raise UserError(_unknown(word, own, command))
    if sign == "~":
        raise UserError(f"{word}: nothing is removed with ~, every setting has a value: set it")
    if command and key.startswith("hydra") and not command.flags:
        raise UserError(f"{key} is for the sweeps of mar.train: leave it out")
    if command and f"{key}.".startswith(command.unread):
        raise UserError(
            f"{key} is for mar.train, and {command.name} does not read it: leave it out"
        )
    group = key.partition("@")[0]
    if group in (*CHOSEN, *ADDED):
        _require_choice(sign, group, value)
    elif key.startswith(OPEN) or key in WHOLE:
        return
    elif key == "hydra":
        raise UserError("hydra is a section: write hydra.<name>=<value>, a word for each")
    elif key not in _defaults() and not _is_section(key):
        raise UserError(_unknown(word, own, command))
    elif _is_section(key) and value[:1] != "{":
        first = next(known for known in _defaults() if known.startswith(f"{key}."))
        raise UserError(f"{word}: {key} is a section, and its keys are set, such as {first}=...")
    elif sign == "+":
        raise UserError(f"{key} is there already: write {key}={value}, without the +")


def _is_section(key: str) -> bool:
    return any(known.startswith(f"{key}.") for known in _defaults())


def _require_choice(sign: str, group: str, value: str) -> None:
    """A file of conf/: with a + where none is chosen by default, and one that is there."""
    names = choices_of(group)
    if sign == "++":
        meant = f"{_plus(group)}{group}={value}"
        raise UserError(f"++{group}={value}: files of conf/ are chosen without ++, write {meant}")
    if group in ADDED and not sign:
        raise UserError(
            f"{group} is not chosen by default: put a + before it, +{group}={value or names[0]}"
        )
    if group in CHOSEN and sign == "+":
        raise UserError(f"{group} is chosen by default: write {group}={value}, without the +")
    if not value:
        raise UserError(f"{sign}{group}= has no value (there are {', '.join(names)})")
    for name in value.split(","):
        bare = name.strip("[]'\" ")
        as_file = bare.removesuffix(".yaml").rpartition("/")[2]
        if as_file != bare and as_file in names:
            raise UserError(
                f"{sign}{group}={name}: files of conf/{group}/ are chosen by their names, write "
                f"{sign}{group}={as_file}"
            )
        if bare not in names and not re.search(r"[()*{}$]", bare):
            near = [f"{sign}{group}={other}" for other in _near(bare, names)]
            others = _instead_of_choice(group, bare) or " or ".join(near)
            meant = f"; did you mean {others}?" if others else ""
            raise UserError(
                f"{sign}{group}={name}: there is no conf/{group}/{bare}.yaml{meant} "
                f"(there are {', '.join(names)})"
            )


def _instead_of_choice(group: str, name: str) -> str:
    """The words for a file, a run, a checkpoint or a hub id where a file of conf/ is named by
    itself; empty for what is none of them."""
    path = at_home(name)
    if group in ("data", "experiment") and (path.is_file() or name.endswith(ROWS)):
        return f"{_plus(group)}{group}=jsonl data.path={name}"
    if group == "model" and (path / "config.yaml").is_file():
        return f"model=run model.path={name}"
    if group == "model" and (path.is_dir() or is_hub_id(name)):
        return f"model=hf model.path={name}"
    return ""


def known_model(name: str) -> str:
    """The words that choose a model of conf/ or a hub id; empty for what is neither."""
    if name in choices_of("model"):
        return f"model={name}"
    return f"model=hf model.path={name}" if is_hub_id(name) else ""


def is_hub_id(name: str) -> bool:
    """It reads `owner/name`, and there is no folder of the owner's name here."""
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", name)) and not Path(name).parent.exists()


# ---------------------------------------------------------------------- what was meant


def nearest(key: str, known: Collection[str]) -> list[str]:
    """The known keys that a wrong one may stand for, the likeliest first: those with the same
    last part, one of SYNONYMS, else those that are spelt nearly so, whole or in their last part."""
    key = key.replace("-", "_").lower()
    last = key.split(".")[-1]
    same = [name for name in known if name.split(".")[-1] == last]
    if same:
        return same[:MOST_SUGGESTED]
    if SYNONYMS.get(key) in known:
        return [SYNONYMS[key]]
    near = get_close_matches(key, known, n=MOST_SUGGESTED, cutoff=0.8)
    if near:
        return near
    lasts = {name.split(".")[-1] for name in known}
    for part in get_close_matches(last, lasts, n=MOST_SUGGESTED, cutoff=0.75):
        near += [name for name in known if name.split(".")[-1] == part]
    return near[:MOST_SUGGESTED]


def _near(name: str, names: Collection[str]) -> list[str]:
    """The one that is spelt nearly so, else those that hold the name."""

    def fold(text: str) -> str:
        return text.lower().replace("-", "_").replace("+", "p")

    folded = {fold(other): other for other in names}
    wanted = fold(name)
    near = get_close_matches(wanted, folded, n=1, cutoff=0.6)
    if not near and len(wanted) >= FEWEST_SIGNS:
        near = [other for other in folded if wanted in other]
    return [folded[match] for match in near[:MOST_SUGGESTED]]


def _known(own: Collection[str], command: Command[Any] | None) -> list[str]:
    if command is not None and not command.settings:
        return list(own)
    unread = command.unread if command else ()
    settings = [key for key in _defaults() if not key.startswith(unread)]
    return [*own, *CHOSEN, *(f"+{group}" for group in ADDED), *settings]


def _there_is(own: Collection[str], command: Command[Any] | None) -> str:
    """Where all keys are told."""
    if command is None or command.settings:
        return ALL_SETTINGS
    if not own:
        return f"{command.name} has no options"
    return f"{command.name} has {', '.join(own)}"


def _unknown(word: str, own: Sequence[str], command: Command[Any] | None) -> str:
    """What to say of a key that is none."""
    key, _, value = word.lstrip("+").partition("=")
    if command is not None and command.places and key.lower() in _names_of_places(command):
        return f"{key} is written without its name: python -m {command.name} {command.places}"
    if key in NEEDLESS:
        return f"{key} is no setting: leave it out, {NEEDLESS[key]}"
    if command is not None and f"{key}." == command.prefix:
        return f"{word}: {key} is a section, and its keys are set, such as {', '.join(own[:3])}"
    kind = "setting"
    if command is not None and not command.settings:
        kind = f"option of {command.name}"
    near = nearest(key, _known(own, command))
    if not near:
        return f"{key} is no {kind}: {_there_is(own, command)}"
    meant = " or ".join(f"{name}={value}" for name in near)
    return f"{key} is no {kind}; did you mean {meant}? ({_there_is(own, command)})"


def _names_of_places(command: Command[Any]) -> list[str]:
    """What its help calls the words without a key, in lower case."""
    return re.findall(r"\w+", command.places.lower())


def _without_value(word: str, own: Collection[str], command: Command[Any] | None) -> str:
    """What to say of a word that has no key, or no value."""
    bare = word.lstrip("+")
    if bare.startswith("~"):
        return f"{word!r}: nothing is removed with ~, every setting has a value: set it"
    typeset = re.search(TYPESET, word)
    if typeset:
        return (
            f"{word!r} has the sign {typeset[0]}, not that of a keyboard: write - and plain quotes"
        )
    key, colon, value = bare.partition(":")
    if colon and (key in own or key in _defaults()):
        return f"{word!r} has no =: did you mean {key}={value.strip()}?"
    if not re.search("[A-Za-z]", bare) or bare.startswith("="):
        return f"{word!r} stands alone: write key=value in one word, without spaces around ="
    if bare in own or bare in _defaults():
        default = _shown(_defaults().get(bare, ""))
        return f"{bare} has no value: write {bare}={default or '...'}"
    if bare in (*ADDED, *CHOSEN):
        choices = ", ".join(choices_of(bare))
        return f"{word} has no value: write {_plus(bare)}{bare}=... with one of {choices}"
    if command is None or command.settings:
        if Path(bare).is_file():
            return f"{word!r} has no key: words are key=value; did you mean data.path={word}?"
        if command and _is_folder_or_hub_id(bare):
            return _no_folder_wanted(bare, command)
        near = _choice_called(bare)
        if near:
            return f"{word!r} has no key: words are key=value; did you mean {near}?"
    return f"{word!r} has no key: words are key=value, and {_there_is(own, command)}"


def _is_folder_or_hub_id(name: str) -> bool:
    path = at_home(name)
    return path.is_dir() and path.name not in choices_of("experiment") or "/" in name


def _no_folder_wanted(name: str, command: Command[Any]) -> str:
    """What to say of a folder or a hub id where a command takes settings alone."""
    example = command.examples[0].partition("  ")[0]
    meant = _instead_of_choice("model", name)
    start = f"; what starts from it is {meant}" if meant else ""
    return (
        f"{name!r}: {command.name} takes settings and no folder, as in `python -m {command.name} "
        f"{example}`{start}"
    )


def _choice_called(name: str) -> str:
    """The word that chooses the file of conf/ of that name, or of nearly that name; else empty."""
    for group in (*ADDED, *CHOSEN):
        if name in choices_of(group):
            return f"{_plus(group)}{group}={name}"
    for group in ("experiment", "model"):
        near = _near(name, choices_of(group))
        if near:
            return f"{_plus(group)}{group}={near[0]}"
    return ""


def _plus(group: str) -> str:
    return "+" if group in ADDED else ""


def _no_flag(word: str, rest: Sequence[str], own: Collection[str], command: Command[Any]) -> str:
    """What to say of --key value."""
    if word in HYDRA_FLAGS:
        why = "starts a sweep" if word in ("-m", "--multirun") else "shows the settings"
        return f"{word} {why}, and that is for mar.train: leave it out here"
    name, equals, value = word.lstrip("-").partition("=")
    if command.flags and f"--{name}" in HYDRA_FLAGS and value:
        return f"{word}: write --{name} {value}, two words"
    if name in NEEDLESS:
        return f"{word}: leave it out, {NEEDLESS[name]}"
    key = name.replace("-", "_")
    near = nearest(key, _known(own, command))
    if not near:
        return f"{word} is nothing that {command.name} knows: -h shows what it takes"
    if not equals:
        kinds = typing.get_type_hints(command.options)
        is_switch = kinds.get(near[0].removeprefix(command.prefix)) is bool
        follows = next(iter(rest), "...")
        value = "true" if is_switch else follows
        if _is_flag(value) or "=" in value:
            value = "..."
    meant = " or ".join(f"{name}={value}" for name in near)
    return f"{word} is a flag, and words are key=value here: write {meant}"


# ---------------------------------------------------------------------- help


def help_text(command: Command[Any]) -> str:
    """What `-h` prints: what it does, its own options with defaults, settings, examples."""
    usage = [f"python -m {command.name}", command.places]
    own = fields(command.options)
    if own:
        usage.append("[options]")
    if command.settings:
        usage.append("[settings]")
    lines = [" ".join(filter(None, usage)), "", (command.about or "").strip()]
    if own:
        lines += ["", "Options, with their defaults:"]
        lines += [_option_line(item, command.prefix) for item in own]
    if command.settings:
        lines += ["", "Settings, with the defaults that a file of conf/ may change; some of them:"]
        for key in command.settings:
            lines.append(_line(f"{key}={_shown(_defaults()[key])}", MEANINGS[key]))
        lines += ["", "and files of conf/, chosen whole:"]
        for group in (*ADDED, *CHOSEN):
            lines.append(_line(f"{_plus(group)}{group}=", " ".join(choices_of(group))))
        lines.append(f"{ALL_SETTINGS.replace('`', '')} settings with their values.")
    lines += ["", "Examples:"]
    lines += [f"  python -m {command.name} {example}".rstrip() for example in command.examples]
    return "\n".join(lines)


def _option_line(item: "Field[Any]", prefix: str) -> str:
    default = item.default
    if default is MISSING:
        assert item.default_factory is not MISSING
        default = item.default_factory()
    meaning = item.metadata.get("help", "")
    names = item.metadata.get("names")
    if names:
        meaning = f"{meaning} ({', '.join(names)})"
    return _line(f"{prefix}{item.name}={_shown(default)}", meaning)


def _line(key: str, meaning: str) -> str:
    if len(key) > KEY_WIDTH:
        return f"  {key}\n  {'':{KEY_WIDTH}} {meaning}"
    return f"  {key:{KEY_WIDTH}} {meaning}"


def _shown(value: Any) -> str:
    """A default as one would write it; nothing where there is none."""
    if value is None or value in ("", "???") or "${" in str(value):
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    return str(value).replace(" ", "")
