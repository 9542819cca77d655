"""The typed schema of `conf/`, its defaults and each field's names or range. YAML only overrides what stands here.

Hydra composes a command line onto these dataclasses, so a misspelt key or a wrong type fails there; `mar.run.compose` then
refuses what cannot work together. Below `train.main` the dataclasses travel, never a DictConfig.
"""

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, OmegaConf


def one_of(*names: str, default: str | None = None) -> Any:
    """A field that holds one of these names; the first is the default."""
    return field(default=names[0] if default is None else default, metadata={"names": names})


def registered(registry: str, default: str) -> Any:
    """A field that holds a name of a registry; `mar.run.compose` knows the registries."""
    return field(default=default, metadata={"registry": registry})


def number(
    default: Any, low: float = -math.inf, high: float = math.inf, above: bool = False
) -> Any:
    """A number in [low, high], or in (low, high] with `above`. A default `${key}` takes that key's value."""
    return field(default=default, metadata={"low": low, "high": high, "above": above})


@dataclass
class ModelOptions:
    """`conf/model/*.yaml`: a checkpoint and what suits it. Nothing else sets a learning rate or a length."""

    name: str = MISSING
    source: str = one_of("embedded", "folder", "hub", "wheel", default=MISSING)
    path: str | None = None  # a folder, or a hub id
    lr: float = number(MISSING, low=0, above=True)
    trainable: str = ""  # a regular expression that finds the parameters to train; empty: the adapters, without any: all
    lora_rank: int = number(0, low=0)  # of adapters (mar/policy/lora.py); 0: none
    lora_scale: float = number(2.0, low=0, above=True)  # of what they add: alpha / rank elsewhere
    lora_layers: str = ""  # a regular expression that finds the linear layers that get one; empty: all of the blocks
    max_prompt_tokens: int = number(MISSING, low=1)  # a longer prompt is dropped and counted
    max_completion_tokens: int = number(MISSING, low=1)
    thinking: bool = MISSING
    threads: int | None = number(None, low=1)  # CPU threads, null = PyTorch's choice


@dataclass
class DataOptions:
    """`conf/data/*.yaml`: the task and where its examples come from; there is no fall-back."""

    task: str = MISSING
    source: str = one_of("embedded", "hub", "path", default="${scale.data_source}")
    path: str | None = None  # jsonl, for source=path
    hub_id: str | None = None  # for source=hub
    train_split: str = "train"
    eval_split: str = "test"  # tune on data.eval_split=validation
    num_train: int | None = number(None, low=1)  # null = all
    num_eval: int = "${eval.num_items}"  # type: ignore[assignment]
    verifier: str = (
        "auto"  # of answers in words: text, math (mar/tasks VERIFIERS); auto: the task's
    )
    max_gold_words: int = number(
        3, low=1
    )  # a question whose golds are all longer is dropped and counted
    show_options: bool = False
    max_sentences: int | None = number(
        None, low=1
    )  # of a patient's sentences (mediQ) the first so many are shown
    data_seed: int = number(
        0, low=0
    )  # of what a task draws when it builds its questions (hotpotqa), whatever `seed`
    min_prob: float = number(
        0.1, low=0, high=1
    )  # ddxplus: a condition of the differential is a gold from here on
    # what is paid: auto = the drawn label of a distribution, else all golds; ddxplus: set = differential, drawn = pathology
    target: str = one_of("auto", "drawn", "probabilities", "set")


@dataclass
class AlgoOptions:
    """`conf/algo/*.yaml`: from rewards to a gradient."""

    name: str = MISSING
    group_size: int = number(8, low=1)  # completions per prompt
    prompts_per_step: int = number(32, low=1)
    temperature: float = number(1.0, low=0, above=True)
    top_k: int = number(0, low=0)  # 0 = all; these three need importance=truncated
    top_p: float = number(1.0, low=0, high=1, above=True)
    min_p: float = number(0.0, low=0, high=1)
    resample: int = number(
        0, low=0
    )  # times that groups without spread are replaced by other prompts' (dynamic sampling)
    truncated: str = one_of(
        "keep", "mask", "penalise"
    )  # what becomes of completions that hit the length limit
    overlong_tokens: int = number(
        0, low=0
    )  # truncated=penalise grows over so many tokens before the limit
    credit: str = registered("credits", "to_go")
    baseline: str = registered("baselines", "leave_one_out")  # value: a critic
    scale_by: str = registered("scales", "none")
    pass_k: int = number(1, low=1)  # train the best of so many samples (pass@k) instead of the mean
    loss: str = registered("losses", "reinforce")
    clip_low: float = number(0.2, low=0, high=1)  # ratios from 1 - clip_low
    clip_high: float = number(0.2, low=0)  # to 1 + clip_high
    aggregation: str = registered("aggregations", "token_mean")
    epochs: int = number(1, low=1)  # passes over each rollout batch
    minibatches: int = number(1, low=1)  # optimizer steps per pass, on whole groups
    importance: str = registered("importance", "none")  # weights of trainer against sampler
    importance_cap: float = number(2.0, low=1)
    importance_low: float = number(0.5, low=0, high=1)
    importance_high: float = number(5.0, low=1)
    importance_level: str = one_of("token", "sequence")
    loss_options: dict[str, float] = field(default_factory=dict)
    kl: str = registered(
        "kl_estimators", "k3"
    )  # against the first policy: k1 in the reward, k2 and k3 in the loss
    kl_coef: float = number(0.0, low=0)  # 0: no reference model
    entropy_coef: float = number(0.0, low=0)
    entropy_decay: bool = False  # linearly to 0 over train.steps
    gae_lambda: float = number(0.95, low=0, high=1)
    value_clip: float = number(0.2, low=0, above=True)
    critic_lr: float = number(1e-5, low=0, above=True)
    critic_warmup: int = number(0, low=0)  # first steps that train the critic alone
    variance_every: int = number(
        0, low=0
    )  # steps between two measurements of adv/variance_ratio, each two more backward passes; 0: none
    max_skips: int = number(3, low=1)  # steps in a row with a loss or gradient that is not finite


@dataclass
class RewardOptions:
    """`conf/reward/*.yaml`: what a completion must look like and what it earns (mar/answers/grammar.py, mar/answers/rewards.py)."""

    objective: str = one_of("multi_rlcr", "multi_rlvr", "rlcr_single", "rlvr_single")
    num_answers: int = number(3, low=1, high=10)
    layout: str = one_of("interleaved", "split")
    analysis: bool = False  # <analysis> between answers and confidences
    other: bool = False  # <other>: the probability that no answer is right
    coverage: str = registered("coverages", "sum")
    coverage_weight: float = number(1.0, low=0)
    brier: str = one_of("paper", "released")
    brier_weight: float = number(1.0, low=0)
    format_weight: float = number(0.5, low=0)
    gate: bool = True  # a format failure cancels the answer reward
    sum_rule: bool = False  # confidences that sum to more than 1 are paid as a format failure: for single-label tasks only
    duplicates: str = registered(
        "duplicates", "per_slot"
    )  # a repeat earns nothing, or zeroes the whole answer reward
    sandbox: str = one_of(
        "bubblewrap", "unsafe"
    )  # where model-written programs run; unsafe: as you, on this machine
    judge: str | None = (
        None  # a URL up to /v1, OpenAI-compatible: asked about answers that are no gold by their words
    )
    judge_model: str = ""
    judge_timeout_s: float = number(30.0, low=0, above=True)
    rank_weights: list[float] | None = None  # w_1 >= ... >= w_K on the hits

    @property
    def multi(self) -> bool:
        return self.objective.startswith("multi")

    @property
    def confident(self) -> bool:
        return "rlcr" in self.objective

    @property
    def form(self) -> str:
        return f"{'rlcr' if self.confident else 'rlvr'}_{'multi' if self.multi else 'single'}"


@dataclass
class SamplerOptions:
    """`conf/sampler/*.yaml`. The grammar needs no stop strings: a stop token follows its last tag."""

    kv_budget_tokens: int = number(
        "${scale.kv_budget_tokens}", low=1
    )  # tokens that the KV cache holds at once
    stop_strings: list[str] = field(
        default_factory=list
    )  # a completion ends where one of them is complete
    think_budget: int | None = number(
        None, low=1
    )  # `</think>` is put in after so many tokens; null = no limit


@dataclass
class ScaleOptions:
    """`conf/scale/*.yaml`: the machine only. Its file also chooses the default model; `model=` wins."""

    name: str = MISSING
    num_gpus: int = number(0, low=0)
    data_source: str = one_of("embedded", "hub", "path", default=MISSING)
    dtype: str = one_of(
        "float32", "bfloat16", "float64"
    )  # of computation; parameters are float32 at least
    replicas: int = number(
        1, low=1
    )  # copies of the sharded model (HSDP); the processes of each share it
    offload: bool = False  # a sharded model, its gradients and its optimizer live in CPU memory: slower, for GPUs too small for them
    keep_copy: bool = True  # the unsharded copy that a sharded policy is sampled from; false: it is freed while the policy is trained
    kv_budget_tokens: int = number(MISSING, low=1)
    micro_batch_tokens: int = number(MISSING, low=1)


@dataclass
class OptimOptions:
    """AdamW."""

    lr: float = number("${model.lr}", low=0, above=True)
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    eps: float = number(1e-8, low=0, above=True)
    weight_decay: float = number(0.0, low=0)
    warmup_frac: float = number(0.05, low=0, high=1)  # of train.steps
    schedule: str = one_of("linear", "cosine", "constant")
    grad_clip: float = number(1.0, low=0, above=True)


@dataclass
class TrainOptions:
    steps: int = number(300, low=1, high=999_999)
    stop_at: int | None = number(
        None, low=1
    )  # stop after this step as if interrupted; the schedule keeps its length
    micro_batch_tokens: int = number("${scale.micro_batch_tokens}", low=1)
    checkpoint_activations: bool = (
        False  # compute each block again in the backward pass: same gradients, less memory
    )


@dataclass
class EvalOptions:
    every: int = number(0, low=0)  # steps; 0 = before and after only
    num_items: int = number(2000, low=1)


@dataclass
class CheckpointOptions:
    every: int = number(50, low=1)  # steps
    keep: int = number(2, low=1)


@dataclass
class LoggerOptions:
    console: str = one_of("auto", "rich", "plain")
    wandb: str = one_of(
        "off", "offline", "online"
    )  # a mirror of metrics.jsonl; the run never waits for it long


@dataclass
class Config:
    """Everything a run depends on; `config.yaml` in its folder is this tree, resolved."""

    name: str = "run"
    seed: int = number(0, low=0)
    out: str = "runs"
    run_dir: str = "${out}/${name}${variant:}/seed${seed}"
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
        """Plain values, as `config.yaml` and `rundir.prepare` take them."""
        return asdict(self)


def _checkpoint_source(path: str | None) -> str:
    """`folder` for what is, or looks like, a place on this machine; `hub` for owner/name."""
    local = (
        path is None
        or path.startswith((".", "/", "~"))
        or Path(path).exists()
        or path.count("/") != 1
    )
    return "folder" if local else "hub"


OmegaConf.register_new_resolver("checkpoint_source", _checkpoint_source, replace=True)

ConfigStore.instance().store(name="schema", node=Config)
