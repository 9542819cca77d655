"""The one door to a checkpoint's tokenizer and chat template.

`load_tokenizer` finds all that can be wrong with them before anything else is loaded, and says it
in one sentence. The other functions are what the rest needs to know: which ids are tokens, which
end a completion, and how a question becomes ids without becoming a command.
"""

import re
import shutil
from collections.abc import Sequence
from datetime import datetime
from functools import cache, lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mar.errors import UserError, one_line
from mar.files import read_json_object, write_json

# Any one of these holds a vocabulary.
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "tekken.json", "vocab.json", "vocab.txt")

# All that may describe a tokenizer: an export has the source's.
TOKENIZER_FILES = (
    *VOCABULARIES,
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)
NAMED_TEMPLATES = "additional_chat_templates"

# How a tokenizer was loaded is no property of it.
LOAD_OPTIONS = ("is_local", "local_files_only", "name_or_path")

# Chat templates end a turn with these, beside what the checkpoint declares.
STOP_TOKENS = ("<|im_end|>", "<|eot_id|>")

# The grammar's own tags. Some tokenizers have a token for each; no turn ends or begins with them.
THINK_TAGS = ("<think>", "</think>")

# The date that a chat template is told when it asks for today's: prompts must not depend on the
# day, or a resumed run would ask in other words. (Llama 3's own templates fall back on this one.)
CLOCK = datetime(2024, 7, 26)
CLOCK_READER = "strftime_now"
DIRECTIVES = "aAbBcdDeFfGHIjklmMnprRsStTuUVwWxXyYzZ"

# What Jinja draws at random.
DRAWS = re.compile(r"\|\s*random\b|\blipsum\b")

# Stands for a question where only the template around it matters.
PLACEHOLDER = "What is it?"

# Of one character in any of Unicode's normal forms: U+FDFA is 18 characters in NFKC.
MOST_BYTES = 33

# A question in which a template that changes what it is told (escapes it, say) changes something.
DELICATE = "a \"b\" \\ 'c' <d> & {e}\n\n\u00e9 \u20ac"


def load_tokenizer(folder: str | Path) -> Any:
    """The tokenizer of a Hugging Face model folder.

    Raises UserError where there is none, it cannot be read, it has no end token, its ids do not fit
    the model's embedding, or its chat template cannot be applied.
    """
    from transformers import AutoTokenizer

    folder = Path(folder)
    if not any((folder / name).is_file() for name in VOCABULARIES):
        raise UserError(
            f"{folder} has no tokenizer: put the tokenizer.json of the model into the folder"
        )
    declared_ends(folder)
    _require_files(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
        # Some values of tokenizer_config.json are read with the first text.
        can_write = any(map(str.isalpha, tokenizer.decode(tokenizer(PLACEHOLDER)["input_ids"])))
    except Exception as error:  # many kinds: the tokenizers package raises plain Exceptions
        if "StrictDataclass" in type(error).__name__:
            # transformers 5 reads config.json on the way, and checks the type of every value
            raise UserError(f"{folder / 'config.json'}: {one_line(error)}") from None
        raise UserError(
            f"{folder}: this version of the libraries (transformers {version('transformers')}, "
            f"tokenizers {version('tokenizers')}) cannot read tokenizer.json and the files beside "
            f"it ({one_line(error)}): mend what it names, fetch them again, or upgrade"
        ) from None
    if not tokenizer.get_vocab() or not can_write:
        raise UserError(
            f"{folder} has no tokenizer: its vocabulary holds no words, fetch tokenizer.json again"
        )
    _require_rows(folder, num_tokens(tokenizer))
    stops = stop_ids(tokenizer, folder)
    if not stops:
        raise UserError(
            f"{folder}: the tokenizer has no end token: add eos_token to tokenizer_config.json"
        )
    if tokenizer.eos_token_id is None:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(stops[0])
    if not tokenizer.chat_template:
        tokenizer.chat_template = _template_beside(folder)
    for thinking in (False, True):
        if PLACEHOLDER not in render_chat(tokenizer, PLACEHOLDER, thinking):
            raise UserError(f"{folder}: the chat template leaves out what the user says: mend it")
    return tokenizer


def _require_files(folder: Path) -> None:
    """Raises UserError where a folder has the name of a template: no template would be read."""
    for name in ("chat_template.jinja", "chat_template.json"):
        if (folder / name).is_dir():
            raise UserError(f"{folder / name} is a folder and no chat template: move it away")


# --- ids -------------------------------------------------------------------------------------


def num_tokens(tokenizer: Any) -> int:
    """How many ids are tokens: 0 to this number, without it. A model may have more rows.

    Raises UserError where some id below has no token: it could be drawn.
    """
    ids = set(tokenizer.get_vocab().values())
    count = max(ids) + 1
    if len(ids) < count:
        missing = next(id for id in range(count) if id not in ids)
        raise UserError(
            f"{tokenizer.name_or_path}: the tokenizer has ids up to {count - 1}, but no token for "
            f"{missing} ({count - len(ids)} are missing): fill the gaps in tokenizer.json"
        )
    return count


def _require_rows(folder: Path, count: int) -> None:
    """Every token needs a row of the embedding."""
    path = folder / "config.json"
    if not path.is_file():
        return
    rows = read_json_object(path).get("vocab_size")
    if isinstance(rows, int) and count > rows:
        raise UserError(
            f"{folder}: the tokenizer has ids up to {count - 1}, beyond the model's {rows} rows "
            "(vocab_size in config.json): take the tokenizer that belongs to the model"
        )


def stop_ids(tokenizer: Any, folder: str | Path) -> tuple[int, ...]:
    """The tokens that end a completion: all that the checkpoint in `folder` declares.

    generation_config.json, config.json and the tokenizer may each name others (Qwen3 and Llama 3
    have several). An id without a token cannot be drawn and is left out.
    """
    vocabulary = tokenizer.get_vocab()
    stops = {vocabulary[token] for token in STOP_TOKENS if token in vocabulary}
    if tokenizer.eos_token_id is not None:
        stops.add(tokenizer.eos_token_id)
    stops |= declared_ends(Path(folder))
    return tuple(sorted(stops & set(vocabulary.values())))


def declared_ends(folder: Path) -> set[int]:
    """All that `eos_token_id` says in generation_config.json and in config.json."""
    ends: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        if (folder / name).exists():
            ends.update(_ends_of_file(folder / name))
    return ends


def _ends_of_file(path: Path) -> Sequence[int]:
    """`eos_token_id` of one of the checkpoint's files: an id, a list of them, or nothing."""
    value = read_json_object(path).get("eos_token_id")
    if value is None:
        return ()
    ids = value if isinstance(value, list) else [value]
    if any(type(id) is not int for id in ids):
        raise UserError(f"{path}: eos_token_id={value!r} must be a token id, or a list of them")
    return ids


def most_tokens(text: str) -> int:
    """A number of tokens that no tokenizer exceeds on this text, found without one.

    A token stands for one byte at least of the text as the tokenizer has normalised it, and no
    character becomes more bytes than MOST_BYTES in that (NFKC, the most drastic form). ASCII text
    stays as it is.
    """
    if text.isascii():
        return len(text)
    num_ascii = len(text.encode("ascii", "ignore"))
    return num_ascii + MOST_BYTES * (len(text) - num_ascii)


# --- the chat template -----------------------------------------------------------------------


def _template_beside(folder: Path) -> Any:
    """What chat_template.json says, which transformers reads for models of images alone."""
    path = folder / "chat_template.json"
    return read_json_object(path).get("chat_template") if path.is_file() else None


def render_chat(tokenizer: Any, content: str, thinking: bool) -> str:
    """`content` as a user's turn, up to where the assistant begins.

    Raises UserError with the template's own words where it cannot be applied.
    """
    template = tokenizer.chat_template
    folder = tokenizer.name_or_path
    if not template:
        return content + "\n"
    if isinstance(template, dict) and "default" not in template:
        raise UserError(
            f"{folder} has several chat templates ({', '.join(sorted(template))}) and none is "
            "called default: keep the one to train with, in chat_template.jinja"
        )
    if isinstance(template, dict):
        template = template["default"]
    if not isinstance(template, str):
        raise UserError(
            f"{folder}: chat_template in tokenizer_config.json is {template!r} and must be a text"
        )
    if drawn := DRAWS.search(template):
        raise UserError(
            f"{folder}: the chat template draws at random ({drawn[0].strip()}), so that a resumed "
            "run would ask in other words: mend chat_template.jinja"
        )
    if CLOCK_READER in template:
        template = _clock_macro() + template
    messages = [{"role": "user", "content": content}]
    try:
        return tokenizer.apply_chat_template(
            messages,
            chat_template=template,
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=thinking,
        )
    except Exception as error:  # many kinds: syntax, raise_exception, any expression in it
        raise UserError(
            f"{folder}: the chat template cannot be applied to a user's turn ({one_line(error)}): "
            "mend chat_template.jinja"
        ) from None


def tokens_around(tokenizer: Any, thinking: bool) -> int | None:
    """The most tokens that a chat template adds to what the user says; None: it changes that, and
    nothing can be said.
    """
    text = render_chat(tokenizer, DELICATE, thinking)
    before, found, after = text.partition(DELICATE)
    if not found or DELICATE in after:
        return None
    # and those that a tokenizer puts around every text or every piece of it
    return most_tokens(before) + most_tokens(after) + len(_template_ids(tokenizer, thinking))


def reads_clock(tokenizer: Any) -> bool:
    """Whether the chat template asks for the date, which is then CLOCK."""
    return CLOCK_READER in str(tokenizer.chat_template)


@cache
def _clock_macro() -> str:
    """A macro in the place of the function that tells a template the time.

    transformers lets no function into a template, so the macro replaces each directive itself. It
    ends with a line end, which Jinja drops: the template after it is read as before.
    """
    expression = "format.replace('%%', '\\0')"
    for letter in DIRECTIVES:
        for directive in (f"%{letter}", f"%-{letter}"):
            expression += f".replace({directive!r}, {CLOCK.strftime(directive)!r})"
    expression += ".replace('\\0', '%')"
    return f"{{% macro {CLOCK_READER}(format) %}}{{{{ {expression} }}}}{{% endmacro %}}\n"


# --- text as text ----------------------------------------------------------------------------


@lru_cache(maxsize=8)
def _template_ids(tokenizer: Any, thinking: bool) -> tuple[int, ...]:
    """The ids of the chat template around a question without control tokens."""
    text = render_chat(tokenizer, PLACEHOLDER, thinking)
    return _plain_ids(tokenizer, text, not tokenizer.chat_template)


@lru_cache(maxsize=8)
def control_ids(tokenizer: Any) -> frozenset[int]:
    """The tokens that are commands and no text: special ones, and those of the chat template."""
    used = {*_template_ids(tokenizer, False), *_template_ids(tokenizer, True)}
    controls = set(tokenizer.all_special_ids)
    for id, token in tokenizer.added_tokens_decoder.items():
        if token.special or id in used:
            controls.add(id)
    vocabulary = tokenizer.get_vocab()
    return frozenset(controls - {vocabulary[tag] for tag in THINK_TAGS if tag in vocabulary})


def _plain_ids(tokenizer: Any, text: str, add_special_tokens: bool) -> tuple[int, ...]:
    return tuple(tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"])


def encode_chat(tokenizer: Any, content: str, thinking: bool) -> tuple[str, tuple[int, ...]]:
    """`content` as a user's turn, as text and as token ids.

    Every control token among the ids is the template's own: a question that holds the text of one
    (`<|im_end|>`) cannot end its turn. Ordinary questions are encoded together with the template.
    """
    text = render_chat(tokenizer, content, thinking)
    # A chat template writes the special tokens itself.
    bare = not tokenizer.chat_template
    ids = _plain_ids(tokenizer, text, bare)
    if _num_controls(tokenizer, ids) == _num_controls(
        tokenizer, _template_ids(tokenizer, thinking)
    ):
        return text, ids
    if bare:
        return text, encode_text(tokenizer, text, add_special_tokens=True)
    parts = render_chat(tokenizer, PLACEHOLDER, thinking).split(PLACEHOLDER)
    before, after = parts[0], parts[-1]
    said = text[len(before) : len(text) - len(after)]
    if len(parts) != 2 or before + said + after != text:
        raise UserError(
            f"{tokenizer.name_or_path}: the chat template changes what the user says, and "
            f"{content[:60]!r}... holds a control token: remove it from the data"
        )
    around = [_plain_ids(tokenizer, part, add_special_tokens=False) for part in (before, after)]
    return text, (*around[0], *encode_text(tokenizer, said), *around[1])


def encode_text(tokenizer: Any, text: str, add_special_tokens: bool = False) -> tuple[int, ...]:
    """Token ids of a text in which nothing is a command: the text of a control token is spelt out.

    `add_special_tokens` adds what the tokenizer puts around every text. Raises UserError where the
    tokenizer cannot spell one out.
    """
    ids = _plain_ids(tokenizer, text, add_special_tokens)
    allowed = _num_controls(tokenizer, _plain_ids(tokenizer, "", add_special_tokens))
    if _num_controls(tokenizer, ids) == allowed:
        return ids
    tokens = tokenizer.convert_ids_to_tokens(sorted(control_ids(tokenizer)))
    ids = tuple(
        tokenizer(text, add_special_tokens=add_special_tokens, split_special_tokens=True)[
            "input_ids"
        ]
    )
    if _num_controls(tokenizer, ids) > allowed:
        # Tokens that are commands but not declared special: cut each behind its first character.
        starts = "|".join(f"(?={re.escape(token)})" for token in tokens)
        cuts = [0, *(match.start() + 1 for match in re.finditer(starts, text)), len(text)]
        pieces = [text[start:end] for start, end in zip(cuts, cuts[1:], strict=False)]
        spelt = tokenizer(pieces, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        ids = tuple(id for piece in spelt for id in piece)
        allowed = 0
    # An unknown character is no command.
    known = [id for id in ids if id != tokenizer.unk_token_id]
    if _num_controls(tokenizer, known) > allowed:
        raise UserError(
            f"{tokenizer.name_or_path} cannot write the control token in {text[:60]!r}... as text: "
            "remove it from the data"
        )
    return ids


def _num_controls(tokenizer: Any, ids: Sequence[int]) -> int:
    return sum(map(control_ids(tokenizer).__contains__, ids))


# --- export ----------------------------------------------------------------------------------


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy the tokenizer's files as they are, but for how transformers 5 loaded them.

    Its name for a tokenizer.json without a class of its own (`TokenizersBackend`) is unknown to
    transformers 4, which both call PreTrainedTokenizerFast.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if folder.samefile(source):
        return
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    if (source / NAMED_TEMPLATES).is_dir():
        shutil.copytree(source / NAMED_TEMPLATES, folder / NAMED_TEMPLATES, dirs_exist_ok=True)
    template = _template_beside(source)
    if template and not (folder / "chat_template.jinja").exists():
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return
    options = read_json_object(path)
    changed = {key: value for key, value in options.items() if key not in LOAD_OPTIONS}
    if changed.get("tokenizer_class") == "TokenizersBackend":
        changed["tokenizer_class"] = "PreTrainedTokenizerFast"
        changed.pop("backend", None)
    if changed != options:
        write_json(path, changed)
