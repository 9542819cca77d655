"""The steps of `mar.evaluate`: find what is measured, prepare its questions, let every arm answer.

All of them can be repeated: an interrupted command goes on where it stopped, and ends with the same
files to the last byte.
"""

import time
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from mar.answers.tokenizer import load_tokenizer, num_tokens
from mar.config import Config
from mar.errors import UserError
from mar.files import append_jsonl, jsonable, read_jsonl, skipped_lines, stable_hash, write_jsonl
from mar.measure.answer_sets import Item
from mar.measure.baselines import Arm, sample_items
from mar.measure.given_texts import items_of_file
from mar.policy.distributed import compute_device
from mar.policy.lora import adapted
from mar.policy.model import Decoder
from mar.policy.weights import load_model, read_config
from mar.records import Example, Prompt
from mar.run import checkpoint
from mar.run.asked_as import asked_as
from mar.run.compose import compose, load_config
from mar.run.console import Display
from mar.run.evaluation_folder import ITEMS_FILE, find_earlier
from mar.run.folder import no_run
from mar.run.from_run import model_of
from mar.run.setup import (
    announce,
    load_data,
    make_prompts,
    require_positions,
    sampling_params,
    verifier_of,
)
from mar.run.words import known_model
from mar.sample.draws import SamplingParams
from mar.sample.rollout import Decode, make_decode
from mar.verify.programs import ProgramRunner
from mar.verify.verifiers import AnswerChecker

# Completions that are sampled between two writes.
COMPLETIONS_PER_WRITE = 512

# ---- What is measured ----


@dataclass(frozen=True)
class Target:
    """What is measured: a run, a checkpoint folder, or the model that the config names."""

    name: str
    config: Config  # of its questions
    model_folder: Path
    provenance: dict[str, Any]
    run: checkpoint.Found | None  # the checkpoint of a run; None: the weights in model_folder
    out: Path  # where the results go

    @property
    def step(self) -> int | None:
        """The step of a run's checkpoint."""
        return self.run.step if self.run else None


def find_target(
    name: str,
    settings: Sequence[str],
    out: Path | None,
    completions: Path | None,
    display: Display,
) -> Target:
    """What a command line names. `completions`: a file, where there is no name.

    Raises UserError for what is neither a run nor a checkpoint, and for a run without a checkpoint.
    """
    folder = Path(name)
    run = None
    if name and (folder / "config.yaml").is_file():
        config = load_config(folder / "config.yaml", settings)
        run = _newest_checkpoint(folder, config, display)
        default_out = folder
    elif name and name != "base":
        if not (folder / "config.json").is_file():
            model = known_model(name)
            if model and not folder.exists():
                raise UserError(f"{name} is a model, untrained: write base {model} +experiment=...")
            raise UserError(no_run(folder, ", a checkpoint (config.json) or base"))
        words = asked_as(folder, settings)
        composed = compose(["model=hf", f"model.path={folder.resolve()}", *words, *settings])
        config = announce(composed, display)
        default_out = Path("runs/evaluation") / folder.resolve().name
    else:
        config = announce(compose(settings), display)
        result = completions.stem if completions else f"base-{config.model.name}"
        default_out = Path("runs/evaluation") / result
    model_folder, provenance = model_of(config.model)
    if completions and completions.is_dir():
        raise UserError(f"completions={completions} is a folder: name a file in it")
    if completions and not completions.is_file():
        raise UserError(f"completions={completions}: there is no such file")
    return Target(
        name=str(Path(name)) if name else str(completions),
        config=config,
        model_folder=model_folder,
        provenance=provenance,
        run=run,
        out=out or default_out,
    )


def _newest_checkpoint(folder: Path, config: Config, display: Display) -> checkpoint.Found:
    found = checkpoint.require_newest(folder, config)
    if found.step < config.train.steps:
        display.say(f"{folder} is unfinished: measuring step {found.step} of {config.train.steps}")
    return found


def load_weights(target: Target, device: torch.device) -> tuple[Decoder, Decoder]:
    """(the policy, the untrained model); one object where they are the same."""
    dtype = getattr(torch, target.config.scale.dtype)
    ids = num_tokens(load_tokenizer(target.model_folder))
    untrained = load_model(target.model_folder, dtype=dtype, device=device, num_tokens=ids)
    if target.config.model.lora_base != "as_stored":
        # Training begins from weights that are rounded so.
        untrained = adapted(untrained, target.config.model)
    if target.run is None:
        return untrained, untrained
    copy = load_model(target.model_folder, dtype=dtype, device=device, num_tokens=ids)
    policy = adapted(copy, target.config.model)
    checkpoint.restore_weights(target.run, policy)
    return policy, untrained


# ---- The questions ----


@dataclass(frozen=True)
class Questions:
    """The held-out questions, as each arm asks them and as their answers are judged."""

    examples: list[Example]
    prompts: dict[str, list[Prompt]]  # by the arm's name, in the order of `examples`
    verifier: AnswerChecker
    tokenizer: Any
    decode: Decode


def prepare_questions(
    config: Config, arms: Sequence[Arm], tokenizer: Any, display: Display
) -> Questions:
    """Load the held-out examples. An item that is too long for one arm is asked of none."""
    split = config.data.eval_split
    verifier = verifier_of(config)
    examples = load_data(config, split, config.data.num_eval, 0, display)
    if not examples:
        raise UserError(
            "the evaluation set is empty: "
            f"data.eval_split={split} of {config.data.task} has no rows"
        )
    asked: dict[str, dict[str, Prompt]] = {}
    for arm in arms:
        prompts = make_prompts(
            config=config,
            examples=examples,
            grammar=arm.grammar,
            tokenizer=tokenizer,
            split=f"{arm.name}: {split}",
            display=display,
            style=arm.style,
        )
        asked[arm.name] = {prompt.id: prompt for prompt in prompts}
    kept = [e for e in examples if all(e.id in prompts for prompts in asked.values())]
    return Questions(
        examples=kept,
        prompts={name: [prompts[e.id] for e in kept] for name, prompts in asked.items()},
        verifier=verifier,
        tokenizer=tokenizer,
        decode=make_decode(tokenizer),
    )


# ---- The answers ----


@dataclass(frozen=True)
class Models:
    """The weights that answer, and how each arm draws from them."""

    policy: Decoder
    untrained: Decoder
    params: dict[str, SamplingParams]  # by the arm's name


def prepare_models(target: Target, arms: Sequence[Arm], questions: Questions) -> Models:
    """Load the weights. Raises UserError for what cannot answer the questions."""
    config = target.config
    params = {arm.name: _sampling_params(target, arm, questions) for arm in arms}
    policy, untrained = load_weights(target, compute_device(config.device))
    return Models(policy, untrained, params)


def answer_questions(
    target: Target,
    arms: Sequence[Arm],
    questions: Questions,
    models: Models,
    protocol: Mapping[str, Any],
    display: Display,
) -> dict[str, list[Item]]:
    """Every arm's items, written to `eval_items.jsonl` as they come.

    What an earlier, interrupted command has written there is kept and not asked again.
    """
    config = target.config
    ids = [example.id for example in questions.examples]
    path = target.out / ITEMS_FILE
    # Items of each arm that are sampled together.
    chunks = {arm.name: max(1, COMPLETIONS_PER_WRITE // arm.num_sets) for arm in arms}
    done = _resume(path, protocol, chunks, ids, display)
    for arm in arms:
        began = time.perf_counter()
        items = done.setdefault(arm.name, [])
        chunk = chunks[arm.name]
        num_left = (len(ids) - len(items)) * arm.num_sets
        with display.counting(arm.name, num_left) as tick:
            for start in range(len(items), len(ids), chunk):
                sampled = sample_items(
                    arm=arm,
                    prompts=questions.prompts[arm.name][start : start + chunk],
                    model=models.policy if arm.trained else models.untrained,
                    params=models.params[arm.name],
                    kv_budget_tokens=config.sampler.kv_budget_tokens,
                    seed=config.seed,
                    verifier=questions.verifier,
                    decode=questions.decode,
                    on_completion=tick,
                )
                rows = [_as_written(item) for item in sampled]
                append_jsonl(path, [{"arm": arm.name, **row} for row in rows])
                items += map(Item.from_row, rows)
        seconds = time.perf_counter() - began
        display.say(
            f"{arm.name}: {len(ids)} items x {arm.num_sets} ({seconds:.0f} s), {arm.description}"
        )
    return done


def _sampling_params(target: Target, arm: Arm, questions: Questions) -> SamplingParams:
    """As in training; more answers than in training get room in proportion, as far as the model has
    positions. Raises UserError where it has none for as much as in training."""
    config = target.config
    params = sampling_params(config, arm.grammar, questions.tokenizer, target.model_folder)
    longest = max(len(prompt.ids) for prompt in questions.prompts[arm.name])
    require_positions(config, target.model_folder, longest, params.max_tokens)
    room = max(1.0, arm.grammar.num_answers / config.reward.num_answers)
    most = read_config(target.model_folder).max_positions - longest
    return replace(params, max_tokens=min(int(params.max_tokens * room), most))


def _as_written(item: Item) -> dict[str, Any]:
    """The item's row, with its numbers rounded as a file holds them.

    A resumed command reads these, so an uninterrupted one computes with them too.
    """
    row: dict[str, Any] = jsonable(asdict(item))
    return row


def protocol_of(
    target: Target,
    arms: Sequence[Arm],
    examples: Sequence[Example],
    num_items: int,
    texts: str = "",
) -> dict[str, Any]:
    """What must be equal for an evaluation to go on where another one stopped.

    `examples`: the held-out questions, whose file may have changed in between. `texts`: the hash of
    given texts, empty for a model's.
    """
    manifest = (target.run.path / checkpoint.MANIFEST).read_text() if target.run else ""
    config = replace(target.config, out="", run_dir="")
    settings = stable_hash(f"{config} {target.provenance} {manifest}")
    protocol = {
        # a run is the same one by whatever path it is named
        "target": "run" if target.run else target.name,
        "step": target.step,
        "seed": config.seed,
        "settings": f"{settings:016x}",
        "questions": f"{stable_hash(str(list(examples))):016x}",
        "num_items": num_items,
        "arms": [[arm.name, str(arm.grammar), arm.num_sets, arm.style] for arm in arms],
    }
    if texts:
        protocol["texts"] = texts
    return protocol


def _resume(
    path: Path,
    protocol: Mapping[str, Any],
    chunks: Mapping[str, int],
    ids: Sequence[str],
    display: Display,
) -> dict[str, list[Item]]:
    """What an interrupted command with this protocol has already measured, by the arm's name; the
    rest is dropped.

    Only whole chunks are kept, so that what follows is sampled together with the same items.
    """
    done: dict[str, list[Item]] = defaultdict(list)
    rows, broken = read_jsonl(path) if path.exists() else ([], [])
    if broken:
        display.say(skipped_lines(broken))
    num_damaged = 0
    for row in rows[1:]:
        name = row.pop("arm", None)
        item = _item_of_row(row)
        if item is None or name not in chunks:
            num_damaged += 1
            continue
        items = done[name]
        position = len(items)
        # After a lost line the arm's other rows are no longer in order.
        if position < len(ids) and item.id == ids[position]:
            items.append(item)
    if num_damaged:
        display.say(f"{path} has {num_damaged} damaged rows: what is missing is asked again")
    for name, items in done.items():
        if len(items) < len(ids):
            num_whole = len(items) // chunks[name] * chunks[name]
            del items[num_whole:]
    _write_items(path, protocol, done)
    return done


def _item_of_row(row: Mapping[str, Any]) -> Item | None:
    """None: it is no row of an item."""
    try:
        return Item.from_row(row)
    except (KeyError, TypeError, AttributeError):
        return None


def _write_items(
    path: Path, protocol: Mapping[str, Any], items_of: Mapping[str, Sequence[Item]]
) -> None:
    rows = [{"arm": name, **asdict(item)} for name, items in items_of.items() for item in items]
    write_jsonl(path, [{"protocol": protocol}, *rows])


# ---- Texts of others, other evaluations ----


def read_given_texts(
    target: Target, file: Path, arm: Arm, questions: Questions, display: Display
) -> tuple[Arm, list[Item]]:
    """Texts from a file as an arm and its items."""
    task = target.config.data.task
    if isinstance(questions.verifier, ProgramRunner):
        raise UserError(
            f"completions=<file> takes answers in words, and those of {task} are programs"
        )
    read = items_of_file(
        file=file,
        prompts=questions.prompts[arm.name],
        grammar=arm.grammar,
        verifier=questions.verifier,
        tokenizer=questions.tokenizer,
        task=task,
        say=display.say,
    )
    items = [Item.from_row(_as_written(item)) for item in read]
    num_sets = len(items[0].sets)
    description = f"{num_sets} texts a question from {file.name}"
    return replace(arm, description=description, num_sets=num_sets), items


def write_given_texts(
    folder: Path, protocol: Mapping[str, Any], arm: Arm, items: Sequence[Item]
) -> None:
    """The items of given texts, as `eval_items.jsonl`."""
    _write_items(folder / ITEMS_FILE, protocol, {arm.name: items})


def read_other(folder: Path, out: Path) -> list[Item]:
    """The policy's items of another evaluation, which was written to `folder`; `out` is ours.

    Raises UserError where there is none that can be read.
    """
    path = folder / ITEMS_FILE
    is_run = (folder / "config.yaml").is_file()
    if not path.is_file() and not is_run:
        raise UserError(f"against={no_run(folder, ' or the folder of an evaluation')}")
    if not path.is_file():
        raise UserError(f"{path} does not exist: run python -m mar.evaluate {folder} first")
    if folder.resolve() == out.resolve():
        raise UserError(
            f"against={folder} is where this evaluation goes: choose another out=, or one of its "
            f"earlier evaluations, against={folder}/evaluation~1"
        )
    rows, _ = read_jsonl(path)
    try:
        items = [
            Item.from_row({key: row[key] for key in row if key != "arm"})
            for row in rows
            if row.get("arm") == "policy"
        ]
    except (KeyError, TypeError, AttributeError):
        raise UserError(
            f"{path} is damaged, or of another version of mar: evaluate again"
        ) from None
    if not items:
        raise UserError(
            f"{path} has no answers yet: run python -m mar.evaluate {folder} to its end"
        )
    return items


def require_another(folder: Path, out: Path, protocol: Mapping[str, Any]) -> None:
    """Raises UserError where the other evaluation is this one, which moved aside and comes back."""
    earlier = find_earlier(out, protocol)
    if earlier is not None and earlier.resolve() == folder.resolve():
        raise UserError(
            f"against={folder} is an evaluation with the same settings, which comes back to {out}: "
            "leave against= out, or choose another out="
        )


def require_common(folder: Path, others: Sequence[Item], ids: Collection[str]) -> None:
    """Raises UserError where another evaluation has none of these questions."""
    if not {item.id for item in others} & set(ids):
        raise UserError(
            f"{folder / ITEMS_FILE} holds other questions: "
            "a paired comparison needs the same task, split and eval.num_items"
        )
