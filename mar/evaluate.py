"""Measure a policy, or texts from anywhere, with every metric and its interval:

    python -m mar.evaluate runs/medqa/seed0                            the newest checkpoint of a run, and baselines of its untrained model
    python -m mar.evaluate <folder with config.json> +experiment=clinic        a Hugging Face checkpoint
    python -m mar.evaluate base +experiment=clinic                     the model that the config names, untrained
    python -m mar.evaluate completions=file.jsonl +experiment=clinic   rows of {id, text}; several rows of one id are several samples

Words: k=30 (answers per question, in sets of K), num_answers=1..6 (sets of other sizes), arms=policy,base,... (default: all), out=<folder>,
against=<folder> (a paired comparison with another evaluation); all others are settings, e.g. eval.num_items=500. Writes `eval_items.jsonl`, one line
per arm and item, and `evaluation.json`. The same command goes on where it was interrupted; draws depend on seed and item alone.
"""

import re
import sys
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from mar.answers.grammar import grammar_of
from mar.answers.prompts import fit_grammar, load_tokenizer
from mar.answers.rewards import RewardSpec
from mar.config import Config
from mar.errors import UserError, exit_code
from mar.files import (
    append_jsonl,
    jsonable,
    read_jsonl,
    skipped_lines,
    stable_hash,
    write_json,
    write_jsonl,
)
from mar.measure.answer_sets import Item, item_of, read_item
from mar.measure.baselines import Arm, arms_of, compared, document_of
from mar.policy.model import Decoder
from mar.policy.sources import resolve_model
from mar.policy.weights import load_model
from mar.records import Prompt
from mar.run import checkpoint
from mar.run.compose import compose, load_config
from mar.run.console import Display
from mar.run.setup import adapted, announce, load_data, make_prompts, sampling_params, verifier_of
from mar.run.summary import show
from mar.sample.rollout import Scorer, judge_groups, make_decode, sample
from mar.verify.programs import ProgramRunner

OPTIONS = {
    "k": "30",
    "num_answers": "1..6",
    "arms": "",
    "completions": "",
    "against": "",
    "out": "",
}

ROWS_AT_ONCE = 512  # completions between two writes


@dataclass(frozen=True)
class Target:
    """What is measured: the config of its questions, its weights (`step` of a run, None: as they were loaded), where the results go."""

    name: str
    config: Config
    model_folder: Path
    provenance: dict[str, Any]
    run: checkpoint.Found | None
    out: Path


def split_words(words: Sequence[str]) -> tuple[str, dict[str, str], list[str]]:
    """(target, our options, settings) of a command line."""
    targets = [
        w for w in words if "=" not in w or Path(w).exists()
    ]  # the folders of a sweep have = in their names
    options = {key: value for key, _, value in (w.partition("=") for w in words) if key in OPTIONS}
    settings = [w for w in words if w not in targets and w.partition("=")[0] not in OPTIONS]
    if len(targets) + bool(options.get("completions")) != 1:
        raise UserError(
            f"name one thing to measure: a run, a checkpoint folder, base or completions=<file>, not {targets or 'nothing'}"
        )
    return (targets or [""])[0], {**OPTIONS, **options}, settings


def sizes_of(text: str) -> list[int]:
    """`1..6` or `2,4` as numbers from 1 to 10; empty for none."""
    if not re.fullmatch(r"(\d+\.\.\d+|\d+(,\d+)*)?", text):
        raise UserError(f"num_answers={text} is no list of sizes: write 1..6 or 2,4")
    first, _, last = text.partition("..")
    sizes = (
        list(range(int(first), int(last) + 1)) if last else [int(n) for n in text.split(",") if n]
    )
    if not all(1 <= n <= 10 for n in sizes):
        raise UserError(f"num_answers={text}: a set has 1 to 10 answers")
    return sizes


def find_target(
    name: str, settings: Sequence[str], out: str, completions: str, display: Display
) -> Target:
    """UserError for what is neither a run nor a checkpoint, and for a run without a checkpoint."""
    folder, run = Path(name), None
    if name and (folder / "config.yaml").is_file():
        config = load_config(folder / "config.yaml", settings)
        run = checkpoint.newest(folder / "checkpoints")
        if run is None:
            raise UserError(
                f"{folder} has no readable checkpoint: let the run reach checkpoint.every={config.checkpoint.every} steps"
            )
        if run.step < config.train.steps:
            display.say(
                f"{folder} is unfinished: measuring step {run.step} of {config.train.steps}"
            )
        place = folder
    elif name and name != "base":
        if not (folder / "config.json").is_file():
            raise UserError(
                f"{name} is neither a run (config.yaml), nor a checkpoint (config.json), nor base"
            )
        config = announce(
            compose(["model=hf", f"model.path={folder.resolve()}", *settings]), display
        )
        place = Path("runs/evaluation") / folder.resolve().name
    else:
        config = announce(compose(settings), display)
        place = Path("runs/evaluation") / (
            Path(completions).stem if completions else f"base-{config.model.name}"
        )
    model_folder, provenance = resolve_model(
        config.model.source, config.model.name, config.model.path
    )
    return Target(
        name or completions, config, model_folder, provenance, run, Path(out) if out else place
    )


class Questions:
    """The held-out questions as each arm asks them; an item that is too long for one arm is asked of none."""

    def __init__(
        self, target: Target, arms: Sequence[Arm], tokenizer: Any, display: Display
    ) -> None:
        config = target.config
        self.config, self.tokenizer, self.decode = config, tokenizer, make_decode(tokenizer)
        self.verifier = verifier_of(config)
        self.examples = load_data(config, config.data.eval_split, config.data.num_eval, 0, display)
        if not self.examples:
            raise UserError(
                f"the evaluation set is empty: data.eval_split={config.data.eval_split} of {config.data.task} has no rows"
            )
        asked: dict[str, dict[str, Prompt]] = {}
        for a in arms:
            split = f"{a.name}: {config.data.eval_split}"
            asked[a.name] = {
                p.id: p
                for p in make_prompts(
                    config, self.examples, a.grammar, tokenizer, split, display, a.style
                )
            }
        self.examples = [
            e for e in self.examples if all(e.id in prompts for prompts in asked.values())
        ]
        self.prompts = {
            name: [prompts[e.id] for e in self.examples] for name, prompts in asked.items()
        }

    def sampled(self, arm: Arm, prompts: Sequence[Prompt], model: Decoder) -> list[Item]:
        """The arm's sets for some of its prompts. More answers than in training get room in proportion."""
        params = sampling_params(self.config, arm.grammar, self.tokenizer, self.decode)
        room = max(1.0, arm.grammar.num_answers / self.config.reward.num_answers)
        params = replace(params, max_tokens=int(params.max_tokens * room))
        identity = (self.config.seed, "eval", 0)
        groups, _ = sample(
            model, prompts, arm.num_sets, params, self.config.sampler.kv_budget_tokens, identity
        )
        spec = RewardSpec(
            brier="paper" if arm.grammar.confident else "none"
        )  # what an answer earns is not looked at
        rollouts = judge_groups(
            prompts, groups, Scorer(arm.grammar, spec, self.verifier, self.decode)
        )
        if broken := sum(r.unjudged > 0 for group in rollouts for r in group):
            raise UserError(
                f"{broken} completions could not be judged, the sandbox or judge has stopped working: the same command goes on"
            )
        return [
            item_of(p, [(r, r.text, len(r.completion.ids)) for r in g], self.verifier)
            for p, g in zip(prompts, rollouts, strict=True)
        ]


def kept_rows(
    path: Path,
    protocol: Mapping[str, Any],
    chunk: Mapping[str, int],
    ids: Sequence[str],
    display: Display,
) -> dict[str, list[Item]]:
    """What an interrupted command has already measured, in whole chunks, so that what follows is drawn in the same company; the rest is dropped."""
    done: dict[str, list[Item]] = defaultdict(list)
    rows, broken = read_jsonl(path) if path.exists() else ([], [])
    if broken:
        display.say(skipped_lines(broken))
    if rows and rows[0] == {"protocol": protocol}:
        for row in rows[1:]:
            items = done[row.pop("arm")]
            if (
                len(items) < len(ids) and row["id"] == ids[len(items)]
            ):  # else a line before it was lost
                items.append(Item.from_row(row))
    elif rows:
        display.say(f"{path} belongs to another evaluation and is written anew")
    for name, items in done.items():
        del items[
            len(items) if len(items) == len(ids) else len(items) // chunk[name] * chunk[name] :
        ]
    write_jsonl(
        path,
        [
            {"protocol": protocol},
            *({"arm": name, **asdict(i)} for name in done for i in done[name]),
        ],
    )
    return done


def load_weights(target: Target, device: str) -> tuple[Decoder, Decoder]:
    """(the policy, the untrained model); one object where they are the same."""
    dtype = getattr(torch, target.config.scale.dtype)
    base = load_model(target.model_folder, dtype=dtype, device=device)
    if target.run is None:
        return base, base
    policy = adapted(
        load_model(target.model_folder, dtype=dtype, device=device), target.config.model
    )
    checkpoint.restore_weights(target.run, policy)
    return policy, base


def answer_all(
    target: Target, arms: Sequence[Arm], questions: Questions, display: Display
) -> dict[str, list[Item]]:
    """Every arm's items, those of an earlier, interrupted command included."""
    config, path, ids = (
        target.config,
        target.out / "eval_items.jsonl",
        [e.id for e in questions.examples],
    )
    asked = [[a.name, str(a.grammar), a.num_sets, a.style] for a in arms]
    weights = (target.run.path / checkpoint.MANIFEST).read_text() if target.run else ""
    settings = stable_hash(f"{replace(config, out='', run_dir='')} {target.provenance} {weights}")
    protocol: dict[str, Any] = {
        "target": target.name,
        "step": target.run.step if target.run else None,
        "seed": config.seed,
    }
    protocol |= {"settings": f"{settings:016x}", "num_items": len(ids), "arms": asked}
    chunk = {a.name: max(1, ROWS_AT_ONCE // a.num_sets) for a in arms}
    target.out.mkdir(parents=True, exist_ok=True)
    done = kept_rows(path, protocol, chunk, ids, display)
    gpu = config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available())
    policy, base = load_weights(target, "cuda" if gpu else "cpu")
    for arm in arms:
        began, items = time.perf_counter(), done.setdefault(arm.name, [])
        for start in range(len(items), len(ids), chunk[arm.name]):
            prompts = questions.prompts[arm.name][start : start + chunk[arm.name]]
            rows = [
                jsonable(asdict(i))
                for i in questions.sampled(arm, prompts, policy if arm.trained else base)
            ]
            append_jsonl(path, [{"arm": arm.name, **row} for row in rows])
            items += map(Item.from_row, rows)  # what a resumed command reads
        display.say(
            f"{arm.name}: {len(ids)} items x {arm.num_sets} ({time.perf_counter() - began:.0f} s), {arm.says}"
        )
    return done


def read_completions(
    file: Path, arm: Arm, questions: Questions, display: Display
) -> tuple[Arm, list[Item]]:
    """Texts written elsewhere, judged like our own. Every item keeps as many samples as the one with the fewest."""
    if not file.is_file():
        raise UserError(f"completions={file}: there is no such file")
    if isinstance(questions.verifier, ProgramRunner):
        raise UserError(
            f"completions=<file> takes answers in words, and those of {questions.config.data.task} are programs"
        )
    rows, broken = read_jsonl(file)
    if broken:
        display.say(skipped_lines(broken))
    if not rows or any(not isinstance(row.get("text"), str) or "id" not in row for row in rows):
        raise UserError(
            f"{file} needs the keys id and text in every row: id is that of the question, e.g. {questions.examples[0].id}"
        )
    texts: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        texts[str(row["id"])].append(row)
    prompts = [p for p in questions.prompts[arm.name] if p.id in texts]
    if not prompts:
        raise UserError(
            f"no id of {file} is a question of {questions.config.data.task}: ids look like {questions.examples[0].id}"
        )
    num_sets = min(len(texts[p.id]) for p in prompts)
    used = num_sets * len(prompts)
    display.say(
        f"{file}: {used} of {len(rows)} texts: {num_sets} for each of {len(prompts)} of {len(questions.examples)} questions"
    )

    def counted(row: Mapping[str, Any]) -> tuple[str, int]:
        given = row.get("num_tokens")
        return row["text"], given if isinstance(given, int) else len(
            questions.tokenizer.tokenize(row["text"])
        )

    read = ([counted(row) for row in texts[p.id][:num_sets]] for p in prompts)
    judged = (
        read_item(p, t, arm.grammar, questions.verifier) for p, t in zip(prompts, read, strict=True)
    )
    items = [Item.from_row(jsonable(asdict(item))) for item in judged]
    return replace(
        arm, says=f"{num_sets} texts a question from {file.name}", num_sets=num_sets
    ), items


def compare_with(other: Path, items: Sequence[Item], confident: bool) -> dict[str, Any]:
    """The paired differences between this policy and that of another evaluation."""
    path = other / "eval_items.jsonl"
    if not path.is_file():
        raise UserError(f"{path} does not exist: run python -m mar.evaluate {other} first")
    rows, _ = read_jsonl(path)
    theirs = [
        Item.from_row({k: v for k, v in row.items() if k != "arm"})
        for row in rows
        if row.get("arm") == "policy"
    ]
    if not {i.id for i in items} & {i.id for i in theirs}:
        raise UserError(
            f"{path} holds other questions: a paired comparison needs the same task, split and eval.num_items"
        )
    return compared(items, theirs, confident)


def run(words: Sequence[str], display: Display) -> Path:
    """Measure what the words name; returns the folder with the results."""
    name, options, settings = split_words(words)
    target = find_target(name, settings, options["out"], options["completions"], display)
    if not re.fullmatch(r"[1-9]\d{0,3}", options["k"]):
        raise UserError(f"k={options['k']} is no whole number from 1 to 9999")
    k = int(options["k"])
    tokenizer = load_tokenizer(target.model_folder)
    grammar = fit_grammar(grammar_of(target.config), tokenizer)
    arms = arms_of(grammar, k, sizes_of(options["num_answers"]), target.run is not None)
    chosen = options["arms"].split(",") if options["arms"] else [a.name for a in arms]
    if unknown := sorted(set(chosen) - {a.name for a in arms}):
        raise UserError(
            f"arms={','.join(unknown)} is unknown here: choose of {','.join(a.name for a in arms)}"
        )
    arms = (
        arms[:1] if options["completions"] else [a for a in arms if a.name in {"policy", *chosen}]
    )
    questions = Questions(target, arms, tokenizer, display)
    if options["completions"]:
        arm, read = read_completions(Path(options["completions"]), arms[0], questions, display)
        arms, items = [arm], {"policy": read}
        target.out.mkdir(parents=True, exist_ok=True)
        write_jsonl(target.out / "eval_items.jsonl", [{"arm": "policy", **asdict(i)} for i in read])
    else:
        items = answer_all(target, arms, questions, display)
    document: dict[str, Any] = {
        "task": target.config.data.task,
        "target": target.name,
        "step": target.run.step if target.run else None,
    }
    document |= document_of(arms, items, questions.examples, k)
    if options["against"]:
        document["paired"][f"policy - {options['against']}"] = compare_with(
            Path(options["against"]), items["policy"], grammar.confident
        )
    write_json(target.out / "evaluation.json", document)
    show(document, display)
    display.say(f"wrote {target.out / 'evaluation.json'} and eval_items.jsonl")
    return target.out


def main(words: Sequence[str]) -> int:
    if {"-h", "--help"} & set(words):
        print(__doc__)
        return 0
    return exit_code(
        lambda: run(words, Display("plain", 0, 0)), "interrupted: the same command goes on"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
