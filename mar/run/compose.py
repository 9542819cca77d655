"""From a command line to a checked config.

Hydra composes it; then every value is checked against its field, and every set of values that must
fit together against the rules below. All faults are found before a model or a file is opened. Names
of tasks are checked by `mar.tasks`.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.override_parser.overrides_parser import (
    OverrideParseException,
    OverridesParser,
)
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException

from mar.answers.reward_spec import COVERAGES, DUPLICATES
from mar.answers.reward_terms import REWARD_TERMS
from mar.answers.rewards import term_faults
from mar.config import (
    RUN_PIN,
    AlgoOptions,
    Config,
    DataOptions,
    ModelOptions,
    RewardOptions,
    run_of_path,
)
from mar.errors import UserError, one_line
from mar.files import at_home
from mar.learn.advantages import BASELINES, CREDITS, SCALES, STEP_SCALES
from mar.learn.losses import AGGREGATIONS, IMPORTANCE, KL_ESTIMATORS, LOSSES, options_of
from mar.run import folder as rundir
from mar.run.fields import Registries, field_faults, range_faults
from mar.run.words import (
    ADDED,
    ALL_SETTINGS,
    CHOSEN,
    CONF_DIR,
    SETTING,
    check_settings,
    choices_of,
    spelled,
    takes_list,
    without_references,
)
from mar.tasks.registry import get_task

REGISTRIES: Registries = {
    "credits": lambda: CREDITS,
    "baselines": lambda: [*BASELINES, "value"],
    "scales": lambda: [*SCALES, *STEP_SCALES],
    "importance": lambda: IMPORTANCE,
    "losses": lambda: LOSSES,
    "aggregations": lambda: AGGREGATIONS,
    "kl_estimators": lambda: KL_ESTIMATORS,
    "coverages": lambda: COVERAGES,
    "duplicates": lambda: DUPLICATES,
}

# A range of so many values is written as a list.
MOST_LISTED = 10

# Rules, in the order in which they are checked: (is it broken?, what to say then).
Rules = list[tuple[bool, str]]


# --------------------------------------------------------------------------- values that must fit


def _source_rules(model: ModelOptions, data: DataOptions) -> Rules:
    """Where the model and the data come from."""
    no_checkpoint = model.source in ("folder", "hub") and not model.path
    no_folder = model.source == "folder" and not at_home(str(model.path)).is_dir()
    is_pinned = bool(re.search(RUN_PIN, str(model.path)))
    config_of_run = run_of_path(str(model.path)) / "config.yaml"
    no_run = model.source == "run" and not is_pinned and not config_of_run.is_file()
    why_no_run = ""
    if no_run and model.path:
        why_no_run = rundir.no_run(run_of_path(str(model.path)))
    of_own_kind = "add model=hf"
    if config_of_run.is_file():
        of_own_kind = "a run's policy is model=run"
    other_wheel = model.source == "wheel" and model.name != "smollm2-135m"
    files = {
        f"data.{key}": getattr(data, key)
        for key in ("path", "train_path", "eval_path")
        if getattr(data, key) is not None
    }
    two_files = {"data.train_path", "data.eval_path"}
    half_a_pair = len(two_files & files.keys()) == 1
    return [
        (
            model.lora_base != "as_stored" and not model.lora_rank,
            f"model.lora_base={model.lora_base} is of the weights below adapters and there are "
            "none: set model.lora_rank, or drop it",
        ),
        (
            no_checkpoint,
            f"model={model.name} needs a checkpoint: add model.path=<folder or hub id>",
        ),
        (
            no_folder,
            f"model.path={model.path} is no folder here: give one with config.json and "
            "*.safetensors, or a hub id",
        ),
        (
            no_run and not model.path,
            f"model={model.name} starts from another run's policy: add model.path=<its folder>, "
            "such as runs/medqa/seed0",
        ),
        (
            no_run,
            f"model.path={model.path}: {why_no_run} (a checkpoint is model=hf)",
        ),
        (
            model.source == "embedded" and model.path is not None,
            f"model.path={model.path} is set but model={model.name} does not read it: "
            f"{of_own_kind}",
        ),
        (
            other_wheel,
            f"model.source=wheel is for model=smollm2-135m, not {model.name}: use "
            "model.source=hub or folder",
        ),
        (
            data.num_eval < 1,
            f"data.num_eval={data.num_eval} is out of range: it must be at least 1",
        ),
        (
            not data.num_asked or min(data.num_asked) < 1,
            f"data.num_asked={data.num_asked} is out of range: give one or more numbers of "
            "findings, each at least 1",
        ),
        (
            data.source == "path" and not any(files.values()),
            "data.source=path needs a file: add data.path=<file.jsonl>, or data.train_path and "
            "data.eval_path",
        ),
        (
            half_a_pair,
            f"{' and '.join(files)}: two files are data.train_path and data.eval_path, give both; "
            "one file that is cut is data.path",
        ),
        (
            two_files < files.keys(),
            "data.path is one file that is cut, data.train_path and data.eval_path are two that "
            "are not: give one or the other",
        ),
        (
            data.train_path is not None and data.train_path == data.eval_path,
            f"data.train_path and data.eval_path are both {data.train_path}: what is trained on "
            "cannot be held out; give data.path to have it cut",
        ),
        (
            data.source == "hub" and not data.hub_id,
            f"data.task={data.task} is not on the hub: use data.source=embedded or path, or give "
            "data.hub_id",
        ),
        (
            data.source != "path" and bool(files),
            f"{' and '.join(files)}: set, but data.source={data.source} reads no file: rows of "
            f"your own are +experiment=jsonl; else add data.source=path, if {data.task} reads one",
        ),
    ]


def _reward_rules(reward: RewardOptions) -> Rules:
    """The form of a completion and what is paid."""
    K = reward.num_answers
    weights = reward.rank_weights or []
    rising = weights != sorted(weights, reverse=True)
    negative = any(weight < 0 for weight in weights)
    rules: Rules = [
        (
            not reward.multi and K != 1,
            f"reward.objective={reward.objective} has one answer: set reward.num_answers=1 or "
            "choose a multi_ objective",
        ),
        (
            reward.analysis and reward.multi and reward.layout != "split",
            "reward.analysis=true stands between answers and confidences: set "
            "reward.layout=split, or analysis=false",
        ),
    ]
    for key in ("analysis", "other", "sum_rule"):
        rules += [
            (
                getattr(reward, key) and not reward.confident,
                f"reward.{key}=true needs confidences, {reward.objective} has none: set it to "
                "false or take rlcr",
            )
        ]
    rules += [
        (
            reward.rank_weights is not None and len(weights) != K,
            f"reward.rank_weights has {len(weights)} values for {K} answers: give {K}",
        ),
        (
            rising or negative,
            f"reward.rank_weights={weights} must not rise from rank to rank nor fall below 0: "
            "sort them",
        ),
    ]
    return rules


def _group_rules(algo: AlgoOptions, num_answers: int) -> Rules:
    """What a group of completions is compared with, and how many that takes."""
    alone = algo.group_size == 1
    of_single_answers = num_answers == 1 and algo.credit == "set" and algo.scale_by == "none"
    pass_k_fits = of_single_answers and algo.baseline in ("leave_one_out", "matched")
    return [
        (
            alone and algo.baseline in ("leave_one_out", "matched", "mean"),
            f"algo.group_size=1 leaves algo.baseline={algo.baseline} nothing to compare with: "
            "take 2 or baseline=none",
        ),
        (
            alone and algo.scale_by in ("group_std", "term_std"),
            f"algo.group_size=1 has no spread for algo.scale_by={algo.scale_by}: take 2 or more, "
            "or scale_by=none",
        ),
        (
            alone and algo.resample > 0,
            f"algo.group_size=1 never has spread, so algo.resample={algo.resample} would replace "
            "everything: set it to 0",
        ),
        (
            algo.pass_k > algo.group_size,
            f"algo.pass_k={algo.pass_k} needs as many completions: "
            f"algo.group_size={algo.group_size}",
        ),
        (
            algo.pass_k > 1 and not pass_k_fits,
            f"algo.pass_k={algo.pass_k} has a baseline of its own, for single answers: set "
            "reward.num_answers=1, algo.credit=set, algo.baseline=leave_one_out and "
            "algo.scale_by=none",
        ),
    ]


def _loss_option_faults(algo: AlgoOptions) -> Iterator[str]:
    """Each of algo.loss_options against what the loss declares."""
    declared = options_of(LOSSES[algo.loss])
    for name, value in algo.loss_options.items():
        key = f"algo.loss_options.{name}"
        if name not in declared:
            known = ", ".join(declared) or "none"
            yield f"{key} is no option of algo.loss={algo.loss}: it has {known}"
        else:
            option = declared[name]
            bounds = {"low": option.low, "high": option.high, "above": False}
            yield from range_faults(key, value, bounds)


def _algo_rules(algo: AlgoOptions, max_completion_tokens: int, steps: int) -> Rules:
    """Sampling, the update and the critic."""
    draws_from_part = (algo.top_k, algo.top_p, algo.min_p) != (0, 1.0, 0.0)
    several_updates = algo.epochs * algo.minibatches > 1
    divides = algo.scale_by not in ("none", "whiten")
    kl_in_reward = algo.kl == "k1" and algo.kl_coef != 0
    costs_beside_terms = kl_in_reward or algo.truncated == "penalise"
    ratio_losses = [name for name in LOSSES if name != "reinforce"]
    return [
        (
            draws_from_part and algo.importance == "none",
            "algo.top_k, top_p and min_p draw from another distribution than is trained: set "
            "algo.importance=truncated",
        ),
        (
            several_updates and algo.loss == "reinforce",
            "algo.loss=reinforce takes one update per batch: set algo.epochs=1 and "
            f"algo.minibatches=1, or loss={' or '.join(ratio_losses)}",
        ),
        (
            algo.lag > 0 and algo.variance_every > 0,
            f"algo.variance_every={algo.variance_every} measures the gradient of the policy that "
            f"sampled and algo.lag={algo.lag} samples from an older one: set one of them to 0",
        ),
        (
            algo.minibatches > algo.prompts_per_step,
            f"algo.minibatches={algo.minibatches} are cut from "
            f"algo.prompts_per_step={algo.prompts_per_step} whole groups: lower it",
        ),
        (
            algo.overlong_tokens > 0 and algo.truncated != "penalise",
            f"algo.overlong_tokens={algo.overlong_tokens} belongs to algo.truncated=penalise: "
            "set both or neither",
        ),
        (
            algo.overlong_tokens > max_completion_tokens,
            f"algo.overlong_tokens={algo.overlong_tokens} is above "
            f"model.max_completion_tokens={max_completion_tokens}: lower it",
        ),
        (
            algo.name == "ppo" and algo.baseline != "value",
            f"algo=ppo is PPO with a critic and algo.baseline={algo.baseline} has none: set it to "
            "value, or take algo=grpo",
        ),
        (
            algo.baseline == "value" and algo.credit not in ("to_go", "set"),
            f"algo.baseline=value goes with algo.credit=to_go or set, not {algo.credit}: take "
            "algo.baseline=matched",
        ),
        (
            algo.baseline in ("value", "matched") and divides,
            f"algo.baseline={algo.baseline} goes with algo.scale_by=none or whiten, not "
            f"{algo.scale_by}: take algo.baseline=leave_one_out",
        ),
        (
            algo.scale_by == "group_mean" and algo.baseline != "mean",
            "algo.scale_by=group_mean is (reward - mean) / mean: set algo.baseline=mean",
        ),
        (
            algo.scale_by == "term_std" and costs_beside_terms,
            "algo.scale_by=term_std divides the terms of the reward, and neither algo.kl=k1 nor "
            "algo.truncated=penalise is one: take algo.kl=k3, and reward.terms.length for "
            "truncated=keep",
        ),
        (
            algo.critic_warmup > 0 and algo.baseline != "value",
            f"algo.critic_warmup={algo.critic_warmup} needs a critic: set algo.baseline=value",
        ),
        (
            algo.critic_warmup >= steps,
            f"algo.critic_warmup={algo.critic_warmup} leaves no step for the policy: "
            f"train.steps={steps}",
        ),
    ]


def _run_rules(config: Config) -> Rules:
    """The run's folder, its length and its optimizer."""
    name, optim = config.name, config.optim
    steps, stop_at = config.train.steps, config.train.stop_at
    folders = {"out": config.out, "run_dir": config.run_dir}
    two_betas = len(optim.betas) == 2 and all(0 <= beta < 1 for beta in optim.betas)
    return [
        *(
            (not folder, f"{key}= has no value: name a folder, or leave it out")
            for key, folder in folders.items()
        ),
        (
            not re.fullmatch(r"\w[\w.+-]*", name),
            f"name={name!r} becomes a folder: use letters, digits and . _ + - only",
        ),
        (
            stop_at is not None and stop_at > steps,
            f"train.stop_at={stop_at} lies after train.steps={steps}: lower it or drop it",
        ),
        (
            not two_betas,
            f"optim.betas={optim.betas} is wrong: give two numbers from 0 to below 1",
        ),
    ]


def _negative_reward_faults(config: Config) -> Iterator[str]:
    """What a mean reward can be lowered below 0 by, where it is a divisor."""
    algo, reward = config.algo, config.reward
    lowered_by = [f"reward.terms.{name}" for name in reward.terms]
    if reward.confident:
        lowered_by.append(f"reward.objective={reward.objective}")
    if algo.truncated == "penalise":
        lowered_by.append("algo.truncated=penalise")
    if algo.kl == "k1" and algo.kl_coef:
        lowered_by.append("algo.kl=k1")
    if algo.scale_by == "group_mean" and lowered_by:
        yield (
            "algo.scale_by=group_mean divides by the mean reward of a group, which "
            f"{lowered_by[0]} can lower below 0: take an rlvr objective without costs, or another "
            "algo.scale_by"
        )


def _credit_faults(config: Config) -> Iterator[str]:
    """What parts answers from confidences, against the form."""
    reward = config.reward
    if config.algo.credit == "decoupled" and not reward.confident:
        yield (
            f"algo.credit=decoupled parts answers from confidences and reward.objective="
            f"{reward.objective} has none: take algo.credit=to_go, or an rlcr objective"
        )


def _term_faults(reward: RewardOptions, group_size: int) -> Iterator[str]:
    """The further terms of the reward against the form and the group."""
    yield from term_faults(reward.terms, reward.confident, reward.other)
    for name, weight in reward.terms.items():
        if group_size == 1 and "group" in REWARD_TERMS[name].needs:
            yield (
                f"reward.terms.{name}={weight} compares the completions of a group and "
                "algo.group_size=1 has one: take 2 or more, or leave the term out"
            )


def _pattern_faults(model: ModelOptions) -> Iterator[str]:
    """The regular expressions that choose parameters and layers."""
    for key in ("trainable", "lora_layers"):
        pattern = getattr(model, key)
        try:
            re.compile(pattern)
        except re.error as error:
            yield f"model.{key}={pattern!r} is no regular expression: {error}"


def _faults(config: Config) -> Iterator[str]:
    """Everything that is wrong with a config. Rules are read only where the fields are right."""
    yield from field_faults(config, registries=REGISTRIES)
    rules = [
        *_source_rules(config.model, config.data),
        *_reward_rules(config.reward),
        *_group_rules(config.algo, config.reward.num_answers),
        *_algo_rules(config.algo, config.model.max_completion_tokens, config.train.steps),
        *_run_rules(config),
    ]
    for broken, sentence in rules:
        if broken:
            yield sentence
    yield from _negative_reward_faults(config)
    yield from _credit_faults(config)
    yield from _term_faults(config.reward, config.algo.group_size)
    yield from _loss_option_faults(config.algo)
    yield from _pattern_faults(config.model)


def validate(config: Config) -> Config:
    """The same config, or a UserError: one sentence with the key, its value and what to change."""
    for fault in _faults(config):
        raise UserError(fault)
    return config


# --------------------------------------------------------------------------- from words and files


def from_omegaconf(config: Any) -> Config:
    """Hydra's DictConfig, resolved, as dataclasses; not yet validated.

    Raises UserError for a missing or an added key.
    """
    try:
        tree = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        if isinstance(error, InterpolationResolutionError):
            reason += " (${key} in a value is the value of that key; \\${ is the sign itself)"
        raise UserError(f"the configuration cannot be resolved: {reason}") from None
    assert isinstance(tree, Config)
    known = rundir.flatten(tree.to_dict())
    given = rundir.flatten(dict(config))
    added = [key for key in given if key not in known]
    if added:
        raise UserError(f"{', '.join(added)}: no such key in the schema ({ALL_SETTINGS})")
    return tree


def load_config(file: Path, overrides: Sequence[str] = ()) -> Config:
    """The config that a run wrote, with `key=value` words over it.

    Raises UserError where another version of the schema wrote it.
    """
    for word in overrides:
        _require_single_key(word, file.parent)
    check_settings(overrides)
    try:
        saved = without_references(dict(yaml.safe_load(file.read_text(encoding="utf-8"))))
        saved.pop("provenance", None)
        if saved["data"]["num_eval"] == saved["eval"]["num_items"]:
            del saved["data"]["num_eval"]  # it followed the other
        trained = OmegaConf.merge(OmegaConf.structured(Config), saved)
        OmegaConf.to_object(trained)
    except OSError:
        raise UserError(f"{file} cannot be read: name a folder that mar.train wrote") from None
    except (OmegaConfBaseException, yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{file} is damaged or of another version of mar: {one_line(error)}"
        ) from None
    try:
        words = OmegaConf.from_dotlist(spelled([word.lstrip("+") for word in overrides]))
        tree = OmegaConf.to_object(OmegaConf.merge(trained, words))
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise UserError(_in_a_sentence(error)) from None
    assert isinstance(tree, Config)
    return validate(tree)


def _require_single_key(word: str, run: Path) -> None:
    """Raises UserError for a word that chooses a file of conf/: a run has made its choices."""
    found = SETTING.fullmatch(word)
    if found and found["key"] in (*CHOSEN, *ADDED):
        raise UserError(
            f"{word} chooses for a new run, and {run} keeps what it was trained with: leave it "
            "out, or set single keys such as eval.num_items=500"
        )


def compose(overrides: Sequence[str] = (), check: bool = True) -> Config:
    """The config of a command line such as `["+experiment=medqa", "model.lr=1e-6"]`.

    Raises UserError for what is no setting or no value of it and, with `check`, for what `validate`,
    `require_language` and `require_confidences` refuse.
    """
    check_settings(overrides)
    _require_once(overrides)
    try:
        with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
            tree = from_omegaconf(hydra_compose("config", spelled(overrides)))
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(_in_a_sentence(error)) from None
    if check:
        require_language(tree, overrides)
        require_confidences(tree, overrides)
        validate(tree)
    return tree


def _require_once(words: Sequence[str]) -> None:
    """Raises UserError where two words choose files of one group of conf/: Hydra takes one."""
    chosen: dict[str, str] = {}
    for word in words:
        found = SETTING.fullmatch(word)
        if not found or found["key"] not in (*CHOSEN, *ADDED):
            continue
        other = chosen.get(found["key"])
        if other:
            raise UserError(
                f"{other} and {word}: one of the two can be chosen, leave the other out"
            )
        chosen[found["key"]] = word


CLOSING = {"(": ")", "[": "]", "{": "}"}


def _open_bracket(text: str) -> str:
    """The last bracket that is not closed; empty where all are. What stands in quotes is text."""
    opened: list[str] = []
    for sign in re.sub(r"'[^']*'|\"[^\"]*\"", "", text):
        if sign in CLOSING:
            opened.append(sign)
        elif opened and sign == CLOSING[opened[-1]]:
            opened.pop()
    return opened[-1] if opened else ""


def _unreadable(word: str) -> str:
    """What to say of a word that is not in Hydra's grammar."""
    key, _, value = word.partition("=")
    bracket = _open_bracket(value)
    if bracket:
        whole = f"{word}{CLOSING[bracket]}"
        return f'{word}: the {bracket} is not closed: write "{whole}", in quotes for the shell'
    if re.fullmatch(r"\(.*\)", value):
        return f'{word}: a list is written in square brackets, "{key}=[{value[1:-1]}]"'
    return (
        f"{word}: Hydra cannot read that; signs, and letters beyond a-z, want "
        "quotes: \"key='value'\""
    )


def _in_a_sentence(error: Exception) -> str:
    """What Hydra says of a wrong value, as one sentence without its internals."""
    text = " ".join(f"{error} {error.__cause__ or ''}".split())
    if isinstance(error, OverrideParseException):
        return _unreadable(error.override)
    several = re.match("Ambiguous value for argument '(.*?)'", text)
    if several:
        return (
            f"{several[1]}: one value is wanted, with a decimal point; a list is written "
            "key=[first,second]"
        )
    launcher = re.search(r"Could not find 'hydra/(launcher|sweeper)/(\w+)'", text)
    if launcher:
        return (
            f"hydra/{launcher[1]}={launcher[2]} is not installed: pip install .[sweep] has joblib, "
            "and without the word jobs run one after another"
        )
    key = getattr(error, "full_key", None)
    if key and text.startswith("Value "):
        sentence = f"{key}: the value {text.removeprefix('Value ')}".partition(" full_key:")[0]
    else:
        noise = " (Config search path|full_key:|See https).*|^Error merging override "
        sentence = re.sub(noise, "", text)
        sentence = re.sub(r"^([^\s=]+=.*?) Value '", r"\1: the value '", sentence)
    wrong = re.match(
        r"\+*([\w.]+).*: the value '(.*)' (?:of type '\w+' could not be converted to|is not a valid) (\w+)",
        sentence,
    )
    return f"{sentence}: {_value_instead(*wrong.groups())}" if wrong else sentence


def _value_instead(key: str, value: str, kind: str) -> str:
    """What to write for a value that is none of this kind, a type of OmegaConf."""
    several = re.fullmatch(r"(\d+)(?:\.\.+|-|:)(\d+)", value)
    if several and kind == "Integer":
        first, last = map(int, several.groups())
        listed = f"range({first},{last + 1})"
        if last < first + MOST_LISTED:
            listed = ",".join(map(str, range(first, last + 1)))
        return f'several runs are a sweep, -m ... "{key}={listed}"'
    if kind == "Integer":
        exponent = re.fullmatch(r"(\d+)(?:\.0*)?(?:[eE]\+?(\d))?", value)
        if exponent:
            return f"write {key}={int(exponent[1]) * 10 ** int(exponent[2] or 0)}"
        return "a whole number is wanted"
    wanted = {"Float": "a number is wanted", "bool": "write true or false"}
    return wanted.get(kind, "another kind of value is wanted")


# --------------------------------------------------------------------------- what was chosen


def require_choice(words: Sequence[str]) -> None:
    """Raises UserError where the words name nothing to train on."""
    keys = {word.lstrip("+").partition("=")[0] for word in words}
    if not keys & {"experiment", "data", "data.task"}:
        others = ", ".join(name for name in choices_of("experiment") if name != "medqa")
        raise UserError(
            "choose an experiment: +experiment=medqa (without a GPU a rehearsal of minutes, with "
            f"scale=h100x1 the real one), or one of {others}; -h has examples"
        )


def require_language(config: Config, words: Sequence[str]) -> None:
    """The model that ships with mar knows the clinic alone. Raises UserError where the words choose
    another task, and not that model by its name."""
    if config.model.source != "embedded" or "model=embedded" in words:
        return
    task = config.data.task
    source = config.data.source
    is_rehearsal = task == "medqa" and source == "embedded"
    if task == "clinic" or is_rehearsal:
        return
    rows = ""
    if source == "embedded" and not get_task(task).embedded:
        rows = " and data.source=hub (or data.source=path data.path=<file>)"
    raise UserError(
        f"the embedded model knows the clinic alone, not {task}: add model=smollm2-135m (once: "
        f"python -m mar.fetch smollm2-135m) or model=hf model.path=<folder or hub id>{rows}; "
        "model=embedded takes it all the same"
    )


def require_confidences(config: Config, words: Sequence[str]) -> None:
    """Raises UserError where the words are about confidences and the form has none."""
    reward = config.reward
    if "algo.entropy_of=confidences" in words and not reward.confident:
        raise UserError(
            f"algo.entropy_of=confidences: reward.objective={reward.objective} has none; take "
            "algo.entropy_of=tokens, or an rlcr objective"
        )
    is_weighed = any(word.startswith("reward.brier_weight=") for word in words)
    if is_weighed and reward.brier_weight and not reward.confident:
        raise UserError(
            f"reward.brier_weight={reward.brier_weight:g} weighs the errors of confidences and "
            f"reward.objective={reward.objective} has none: leave it out, or take an rlcr objective"
        )


# --------------------------------------------------------------------------- several runs


def require_one_run(words: Sequence[str]) -> None:
    """Raises UserError for words that ask for several runs, which -m starts."""
    for word in words:
        if word.startswith(("hydra.", "hydra/")):
            raise UserError(f"{word} is for sweeps: put -m before the words, or leave it out")
        if word.startswith("+sweep=") or len(_values_of(word)) > 1:
            key, _, value = word.partition("=")
            if takes_list(key.lstrip("+")):
                raise UserError(f'{word}: a list is written in brackets, "{key}=[{value}]"')
            raise UserError(
                f"{word} is several runs: put -m before the words to start them; a single number "
                "is written with a point, or without the comma"
            )


def check_sweep(words: Sequence[str]) -> None:
    """Compose every value that a sweep goes over, the others at their first value.

    Raises UserError, before the first job starts, for a word, a value or a file that cannot be
    read. What does not fit together is refused job by job.
    """
    first: list[str] = []
    swept: list[tuple[int, str]] = []
    for word in [*words, *_words_of_sweeps(words)]:
        if word.startswith("+sweep="):
            check_settings([word])
            continue
        values = _values_of(word)
        swept += [(len(first), value) for value in values[1:]]
        first.append(values[0])
    compose(first, check=False)
    for position, value in swept:
        compose([*first[:position], value, *first[position + 1 :]], check=False)


def _words_of_sweeps(words: Sequence[str]) -> list[str]:
    """What the chosen files of conf/sweep go over, as words."""
    found: list[str] = []
    for word in words:
        file = CONF_DIR / "sweep" / f"{word.removeprefix('+sweep=')}.yaml"
        if word.startswith("+sweep=") and file.is_file():
            params = yaml.safe_load(file.read_text())["hydra"]["sweeper"]["params"]
            found += [f"{key}={value}" for key, value in params.items()]
    return found


def _values_of(word: str) -> list[str]:
    """The word once for each of its values."""
    check_settings([word])
    try:
        override = OverridesParser.create().parse_override(spelled([word], sweep=True)[0])
    except HydraException:
        raise UserError(_unreadable(word)) from None
    if not override.is_sweep_override():
        return [word]
    key = word.partition("=")[0]
    return [f"{key}={value}" for value in override.sweep_string_iterator()]
