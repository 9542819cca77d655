"""The schema of `conf/`: every key of a configuration, its type, default, and names or range.

The classes follow conf's groups. YAML only overrides what stands here. Hydra composes a command
line onto these dataclasses, so a misspelt key or a wrong type fails there; `mar.run.compose` then
checks names and ranges, and refuses settings that cannot work together. Below `train.main` these
dataclasses travel, never a DictConfig.
"""

import math
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, OmegaConf

from mar.files import at_home


def one_of(*names: str, default: str | None = None, help: str = "") -> Any:
    """A field that holds one of these names; the first is the default. `help`: what a command's -h
    says of it."""
    metadata = {"names": names, "help": help}
    return field(default=names[0] if default is None else default, metadata=metadata)


def option(default: Any, help: str) -> Any:
    """A field of a command's own options that may hold anything of its type."""
    return field(default=default, metadata={"help": help})


def listed(default: list[Any], help: str) -> Any:
    """A field of a command's own options that holds several values."""
    return field(default_factory=lambda: list(default), metadata={"help": help})


def location(default: str | None) -> Any:
    """A field that names a folder or a file, in which ~ is the home folder."""
    return field(default=default, metadata={"is_path": True})


def registered(registry: str, default: str) -> Any:
    """A field that holds a name of a registry; `mar.run.compose` knows the registries."""
    return field(default=default, metadata={"registry": registry})


def number(
    default: Any,
    low: float = -math.inf,
    high: float = math.inf,
    above: bool = False,
    help: str = "",
) -> Any:
    """A number in [low, high], or in (low, high] with `above`.

    A default `${key}` takes that key's value.
    """
    metadata = {"low": low, "high": high, "above": above, "help": help}
    return field(default=default, metadata=metadata)


# ---------------------------------------------------------------------- conf's groups


@dataclass
class ModelOptions:
    """`conf/model/*.yaml`: a checkpoint and what suits it.

    Nothing else sets a learning rate or a length.
    """

    name: str = MISSING
    source: str = one_of("embedded", "folder", "hub", "wheel", "run", default=MISSING)
    # A folder, or a hub id; for source=run the folder of a run, `@` and which checkpoint of it.
    path: str | None = location(None)
    lr: float = number(MISSING, low=0, above=True)
    # A regular expression that finds the parameters to train. Empty: the adapters, and without
    # adapters all parameters.
    trainable: str = ""
    # Rank of the adapters (mar/policy/lora.py); 0: no adapters.
    lora_rank: int = number(0, low=0)
    # What the adapters add is multiplied by this (alpha / rank elsewhere).
    lora_scale: float = number(2.0, low=0, above=True)
    # What the weights below adapters are kept and multiplied in; bfloat16 is faster on a CPU with
    # AMX.
    lora_base: str = one_of("as_stored", "bfloat16")
    # A regular expression that finds the linear layers with an adapter. Empty: all of the blocks.
    lora_layers: str = ""
    # A longer prompt is dropped and counted.
    max_prompt_tokens: int = number(MISSING, low=1)
    max_completion_tokens: int = number(MISSING, low=1)
    thinking: bool = MISSING
    # The request says which decimals a confidence may be (mar/answers/prompts.py). false: the
    # shorter words that the embedded model was trained on, and all models before there was a choice.
    explain_decimals: bool = False
    # CPU threads; null: PyTorch's choice.
    threads: int | None = number(None, low=1)


@dataclass
class DataOptions:
    """`conf/data/*.yaml`: the task and where its examples come from; there is no fall-back."""

    task: str = MISSING
    source: str = one_of("embedded", "hub", "path", default="${scale.data_source}")
    # A file of rows, for source=path. It is cut into train, validation and test by the rows' ids.
    path: str | None = location(None)
    # Two files instead of one: neither is cut.
    train_path: str | None = location(None)
    eval_path: str | None = location(None)
    # owner/name or owner/name:configuration, for source=hub.
    hub_id: str | None = None
    train_split: str = "train"
    # Tune on data.eval_split=validation.
    eval_split: str = "test"
    # null: all.
    num_train: int | None = number(None, low=1)
    num_eval: int = "${eval.num_items}"  # type: ignore[assignment]
    # How answers in words are compared with golds: text, math (mar/verify/verifiers.py), or auto,
    # which is the task's own.
    verifier: str = "auto"
    # A question whose golds are all longer is dropped and counted.
    max_gold_words: int = number(3, low=1)
    show_options: bool = False
    # Of a patient's sentences (mediQ) only the first so many are shown.
    max_sentences: int | None = number(None, low=1)
    # Seed of what a task draws when it builds its questions (hotpotqa), whatever `seed` is.
    data_seed: int = number(0, low=0)
    # ddxplus: a condition of the differential is a gold from this probability on.
    min_prob: float = number(0.1, low=0, high=1)
    # ddxplus_bayes: findings as questions with yes or no, or in short in two lists, those present
    # and those absent.
    findings: str = one_of("questions", "lists")
    # ddxplus_bayes: how many findings are asked for, each number equally often.
    num_asked: list[int] = field(default_factory=lambda: [8, 12, 20])
    # The request stands above the question: the prompts of a task then begin alike.
    request_first: bool = False
    # What is paid. auto: the drawn label where the golds form a distribution, else all golds.
    # ddxplus: set is the differential, drawn the pathology.
    target: str = one_of("auto", "drawn", "probabilities", "set")


@dataclass
class AlgoOptions:
    """`conf/algo/*.yaml`: from rewards to a gradient."""

    name: str = MISSING

    # The batch: completions per prompt, prompts per step.
    group_size: int = number(8, low=1)
    prompts_per_step: int = number(32, low=1)

    # Sampling. top_k (0: all), top_p and min_p need importance=truncated.
    temperature: float = number(1.0, low=0, above=True)
    top_k: int = number(0, low=0)
    top_p: float = number(1.0, low=0, high=1, above=True)
    min_p: float = number(0.0, low=0, high=1)
    # Rollouts are sampled from the weights of so many steps ago: staleness, as where sampling and
    # training run side by side. Ratios or importance weights then have something to correct.
    lag: int = number(0, low=0)
    # How many times groups without spread are replaced by groups of newly drawn prompts
    # (dynamic sampling).
    resample: int = number(0, low=0)
    # What becomes of completions that hit the length limit.
    truncated: str = one_of("keep", "mask", "penalise")
    # The penalty of truncated=penalise grows over so many tokens before the limit.
    overlong_tokens: int = number(0, low=0)

    # Advantages: CREDITS, BASELINES, SCALES and STEP_SCALES of mar/learn/advantages.py.
    # baseline=value is a critic.
    credit: str = registered("credits", "to_go")
    baseline: str = registered("baselines", "leave_one_out")
    scale_by: str = registered("scales", "none")
    # Train the best of so many samples (pass@k) instead of the mean.
    pass_k: int = number(1, low=1)

    # The loss. Ratios are clipped to [1 - clip_low, 1 + clip_high].
    loss: str = registered("losses", "reinforce")
    clip_low: float = number(0.2, low=0, high=1)
    clip_high: float = number(0.2, low=0)
    aggregation: str = registered("aggregations", "token_mean")
    # Passes over each rollout batch, and optimizer steps per pass, on whole groups.
    epochs: int = number(1, low=1)
    minibatches: int = number(1, low=1)
    # Hyper-parameters of the chosen loss alone: {name: value} (mar/learn/losses.py, `options`).
    loss_options: dict[str, float] = field(default_factory=dict)
    # Importance weights of the trainer against the sampler: truncated cuts them at the cap, masked
    # drops tokens (or, with level=sequence, completions) outside [low, high].
    importance: str = registered("importance", "none")
    importance_cap: float = number(2.0, low=1)
    importance_low: float = number(0.5, low=0, high=1)
    importance_high: float = number(5.0, low=1)
    importance_level: str = one_of("token", "sequence")

    # KL to the first policy: k1 in the reward, k2 and k3 in the loss. At kl_coef=0 there is no
    # reference model.
    kl: str = registered("kl_estimators", "k3")
    kl_coef: float = number(0.0, low=0)
    entropy_coef: float = number(0.0, low=0)
    # Linearly to 0 over train.steps.
    entropy_decay: bool = False
    # Whose entropy the bonus raises: all tokens', or that of confidences alone (a form without
    # confidences then has none).
    entropy_of: str = one_of("tokens", "confidences")

    # The critic, for baseline=value.
    gae_lambda: float = number(0.95, low=0, high=1)
    value_clip: float = number(0.2, low=0, above=True)
    critic_lr: float = number(1e-5, low=0, above=True)
    # So many first steps train the critic alone.
    critic_warmup: int = number(0, low=0)

    # Steps between two measurements of adv/variance_ratio, each two more backward passes; 0: none.
    variance_every: int = number(0, low=0)
    # Stop after so many steps in a row whose loss or gradient is not finite.
    max_skips: int = number(3, low=1)


@dataclass
class RewardOptions:
    """`conf/reward/*.yaml`: what a completion must look like and what it earns.

    Code: mar/answers/grammar.py, rewards.py and reward_terms.py.
    """

    objective: str = one_of("multi_rlcr", "multi_rlvr", "rlcr_single", "rlvr_single")

    # The form of a completion.
    num_answers: int = number(3, low=1, high=10)
    layout: str = one_of("interleaved", "split")
    # <analysis> between answers and confidences.
    analysis: bool = False
    # <other>: the probability that no answer is right.
    other: bool = False

    # What it earns.
    coverage: str = registered("coverages", "sum")
    coverage_weight: float = number(1.0, low=0)
    brier: str = one_of("paper", "released")
    brier_weight: float = number(1.0, low=0)
    format_weight: float = number(0.5, low=0)
    # Further terms and their weights, {name: weight} (REWARD_TERMS of mar/answers/reward_terms.py).
    terms: dict[str, float] = field(default_factory=dict)
    # A format failure cancels the answer reward.
    gate: bool = True
    # Confidences that sum to more than 1 are paid as a format failure: for single-label tasks only.
    sum_rule: bool = False
    # A repeated answer earns nothing, or zeroes the whole answer reward.
    duplicates: str = registered("duplicates", "per_slot")

    # How answers are checked. Model-written programs run in a sandbox, or with `unsafe` as you, on
    # this machine.
    sandbox: str = one_of("bubblewrap", "unsafe")
    # An OpenAI-compatible URL up to /v1, asked about answers that are no gold by their words.
    judge: str | None = None
    judge_model: str = ""
    judge_timeout_s: float = number(30.0, low=0, above=True)

    # Weights w_1 >= ... >= w_K on the hits of the ranked answers.
    rank_weights: list[float] | None = None

    @property
    def multi(self) -> bool:
        return self.objective.startswith("multi")

    @property
    def confident(self) -> bool:
        return "rlcr" in self.objective

    @property
    def form(self) -> str:
        """The name of the grammar's form, a key of `mar.answers.grammar.FORMS`."""
        kind = "rlcr" if self.confident else "rlvr"
        count = "multi" if self.multi else "single"
        return f"{kind}_{count}"


@dataclass
class SamplerOptions:
    """`conf/sampler/*.yaml`.

    The grammar needs no stop strings: a stop token follows its last tag.
    """

    # Tokens that the KV cache holds at once.
    kv_budget_tokens: int = number("${scale.kv_budget_tokens}", low=1)
    # A completion ends where one of them is complete.
    stop_strings: list[str] = field(default_factory=list)
    # `</think>` is put in after so many tokens; null: no limit.
    think_budget: int | None = number(None, low=1)


@dataclass
class ScaleOptions:
    """`conf/scale/*.yaml`: the machine only.

    Its file also chooses the default model; `model=` wins.
    """

    name: str = MISSING
    num_gpus: int = number(0, low=0)
    data_source: str = one_of("embedded", "hub", "path", default=MISSING)
    # Of computation; parameters are float32 at least.
    dtype: str = one_of("float32", "bfloat16", "float64")
    # Copies of the sharded model (HSDP); the processes of each copy share it.
    replicas: int = number(1, low=1)
    # A sharded model, its gradients and its optimizer live in CPU memory: slower, for GPUs too
    # small for them.
    offload: bool = False
    # Keep the unsharded copy that a sharded policy is sampled from. false: it is freed while the
    # policy is trained.
    keep_copy: bool = True
    kv_budget_tokens: int = number(MISSING, low=1)
    micro_batch_tokens: int = number(MISSING, low=1)


# ---------------------------------------------------------------------- sections without files


@dataclass
class OptimOptions:
    """AdamW."""

    lr: float = number("${model.lr}", low=0, above=True)
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    eps: float = number(1e-8, low=0, above=True)
    weight_decay: float = number(0.0, low=0)
    # Of train.steps.
    warmup_frac: float = number(0.05, low=0, high=1)
    schedule: str = one_of("linear", "cosine", "constant")
    grad_clip: float = number(1.0, low=0, above=True)


@dataclass
class TrainOptions:
    """The length of a run, and how an update is cut."""

    steps: int = number(300, low=1, high=999_999)
    # Stop after this step as if interrupted; the schedule keeps its length.
    stop_at: int | None = number(None, low=1)
    micro_batch_tokens: int = number("${scale.micro_batch_tokens}", low=1)
    # Compute each block again in the backward pass: the same gradients with less memory.
    checkpoint_activations: bool = False


@dataclass
class EvalOptions:
    """Evaluation on held-out items."""

    # Steps between two evaluations; 0: before and after training only.
    every: int = number(0, low=0)
    num_items: int = number(2000, low=1)


@dataclass
class CheckpointOptions:
    """Checkpoints that a run resumes from."""

    # Steps between two of them, and how many are kept.
    every: int = number(50, low=1)
    keep: int = number(2, low=1)


@dataclass
class LoggerOptions:
    """Where a run shows itself, beside its own files."""

    console: str = one_of("auto", "rich", "plain")
    # A mirror of metrics.jsonl; the run never waits for it long.
    wandb: str = one_of("off", "offline", "online")


@dataclass
class Config:
    """Everything a run depends on; `config.yaml` in its folder is this tree, resolved."""

    name: str = "run"
    seed: int = number(0, low=0)
    out: str = location("runs")
    run_dir: str = location("${out}/${name}${variant:}/seed${seed}")
    device: str = one_of("auto", "cpu", "cuda")
    model: ModelOptions = field(default_factory=ModelOptions)
    data: DataOptions = field(default_factory=DataOptions)
    algo: AlgoOptions = field(default_factory=AlgoOptions)
    reward: RewardOptions = field(default_factory=RewardOptions)
    sampler: SamplerOptions = field(default_factory=SamplerOptions)
    scale: ScaleOptions = field(default_factory=ScaleOptions)
    optim: OptimOptions = field(default_factory=OptimOptions)
    train: TrainOptions = field(default_factory=TrainOptions)
    eval: EvalOptions = field(default_factory=EvalOptions)
    checkpoint: CheckpointOptions = field(default_factory=CheckpointOptions)
    logger: LoggerOptions = field(default_factory=LoggerOptions)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as they are written to `config.yaml`."""
        return asdict(self)


# ---------------------------------------------------------------------- for Hydra


def _checkpoint_source(path: str | None) -> str:
    """`hub` for what can only be owner/name; `folder` for all other paths, and for none."""
    if path is None:
        return "folder"
    looks_like_a_folder = path.startswith((".", "/", "~")) or path.count("/") != 1
    if looks_like_a_folder or Path(path).exists():
        return "folder"
    return "hub"


OmegaConf.register_new_resolver("checkpoint_source", _checkpoint_source, replace=True)

# The end of a `model.path` that says which checkpoint of a run it is: step and hash.
RUN_PIN = r"@\d+-[0-9a-f]{12}$"

# What conf/model/run.yaml takes where there is no such run; the config is then refused.
WITHOUT_RUN = {
    "lr": 1e-6,
    "max_prompt_tokens": 3072,
    "max_completion_tokens": 1024,
    "thinking": True,
}


def run_of_path(path: str) -> Path:
    """The folder of the run that a `model.path` names."""
    return at_home(re.sub(RUN_PIN, "", path))


def _of_run(path: str | None, key: str) -> Any:
    """A key of the model section of a run's config."""
    default = WITHOUT_RUN.get(key, getattr(ModelOptions, key, None))
    if path is None:
        return default
    try:
        saved = yaml.safe_load((run_of_path(path) / "config.yaml").read_text(encoding="utf-8"))
        return saved["model"].get(key, default)
    except (OSError, yaml.YAMLError, KeyError, TypeError, AttributeError, ValueError):
        return default


OmegaConf.register_new_resolver("of_run", _of_run, replace=True)

SCHEMA = OmegaConf.structured(Config)
# Their keys are names of a registry, not fields: they need no + on the command line.
OmegaConf.set_struct(SCHEMA.reward.terms, False)
OmegaConf.set_struct(SCHEMA.algo.loss_options, False)
ConfigStore.instance().store(name="schema", node=SCHEMA)
