"""Every combination composes, and everything that cannot work is refused by a sentence that says what to change."""

import inspect
import json
from dataclasses import fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from omegaconf import OmegaConf

from mar.answers import grammar, reward_spec
from mar.config import AlgoOptions, Config, RewardOptions
from mar.errors import UserError
from mar.run.compose import CONF_DIR, compose, from_omegaconf, load_config, validate
from mar.run.words import quoted
from mar.train import run

LR = {"embedded": 1.5e-1, "smollm2-135m": 1e-5, "qwen3-1.7b": 2e-6, "qwen3-8b": 1e-6, "hf": 1e-6}
LR["run"] = 1e-6  # of a run that is not there
MODEL_SOURCE = {"embedded": "embedded", "hf": "hub", "run": "run"}
PATHS = {"hf": ["model.path=owner/name"], "run": ["model.path=nowhere@1-0123456789ab"]}
SCALE_MODEL = {"laptop": "embedded", "h100x1": "qwen3-1.7b", "h100x8": "qwen3-8b"}
SCALE_SOURCE = {"laptop": "embedded", "h100x1": "hub", "h100x8": "hub"}


def options(group: str) -> list[str]:
    return sorted(file.stem for file in (CONF_DIR / group).glob("*.yaml"))


def test_tables_cover_the_files() -> None:
    assert options("model") == sorted(LR)
    assert options("scale") == sorted(SCALE_MODEL)


QUICK = ("medqa", "clinic", "paper")


@pytest.mark.parametrize(
    "experiment",
    [e if e == "medqa" else pytest.param(e, marks=pytest.mark.slow) for e in options("experiment")],
)
@pytest.mark.parametrize("scale", options("scale"))
def test_every_experiment_on_every_scale_with_every_model(experiment: str, scale: str) -> None:
    task_source = {"clinic": "embedded", "ddxplus_bayes": "path", "jsonl": "path"}.get(
        experiment, SCALE_SOURCE[scale]
    )
    task = {"paper": "ddxplus"}.get(experiment, experiment)
    words = [f"+experiment={experiment}", f"scale={scale}"]
    default = compose(words, check=False)
    assert (default.model.name, default.optim.lr) == (SCALE_MODEL[scale], LR[SCALE_MODEL[scale]])
    assert (default.name, default.data.task, default.data.source) == (experiment, task, task_source)
    for model, lr in LR.items():
        chosen = compose(
            [*words, f"model={model}", *PATHS.get(model, [])],
            check=False,
        )
        assert (chosen.model.name, chosen.model.lr, chosen.optim.lr) == (model, lr, lr)
        assert (chosen.model.trainable == "") == (model != "embedded")
        assert chosen.model.source == MODEL_SOURCE.get(model, "hub")
        assert chosen.data == default.data
        assert (chosen.algo, chosen.reward, chosen.train) == (
            default.algo,
            default.reward,
            default.train,
        )
        if chosen.scale.num_gpus <= 1 and task_source != "path":  # which needs a file
            validate(chosen)


# credit, baseline, scale_by, loss, aggregation, kl where there is one
PRESETS = {
    "reinforce": ("to_go", "matched", "none", "reinforce", "token_mean", None),
    "own": ("own", "matched", "none", "reinforce", "token_mean", None),
    "rloo": ("set", "leave_one_out", "none", "reinforce", "constant", None),
    "grpo": ("set", "mean", "group_std", "ppo", "sequence_mean", "k3"),
    "dr_grpo": ("set", "mean", "none", "ppo", "constant", None),
    "dapo": ("set", "mean", "group_std", "ppo", "token_mean", None),
    "gdpo": ("set", "mean", "term_std", "ppo", "sequence_mean", None),
    "gspo": ("set", "mean", "group_std", "gspo", "sequence_mean", None),
    "cispo": ("set", "mean", "group_std", "cispo", "token_mean", None),
    "reinforce_pp": ("set", "none", "whiten", "ppo", "token_mean", "k1"),
    "ppo": ("to_go", "value", "whiten", "ppo", "token_mean", "k1"),
    "paper": ("set", "mean", "none", "ppo", "token_mean", None),
}


@pytest.mark.parametrize("K", [1, 3, 5])
def test_own_pays_each_confidence_its_whole_error_for_any_number_of_answers(K: int) -> None:
    words = ["reward=rlcr_single"] if K == 1 else [f"reward.num_answers={K}"]
    assert compose(["+experiment=clinic", *words]).reward.brier_weight == K
    assert compose(["+experiment=clinic", "algo=reinforce", *words]).reward.brier_weight == 1


def test_what_an_algorithm_asks_of_the_reward_is_in_a_file_of_its_name() -> None:
    """`optional` in config.yaml would pass over a misspelt one without a word."""
    assert set(options("reward/for_algo")) <= set(options("algo"))
    for preset in options("algo"):
        tree = OmegaConf.load(CONF_DIR / "algo" / f"{preset}.yaml")
        assert tree.name == preset and set(tree) <= {item.name for item in fields(AlgoOptions)}


@pytest.mark.parametrize("experiment", options("experiment"))
def test_debug_takes_two_steps_of_any_experiment(experiment: str) -> None:
    config = compose([f"+experiment={experiment}", "+debug=on"], check=False)
    assert (config.train.steps, config.eval.num_items, config.data.num_eval) == (2, 16, 16)
    assert (config.algo.group_size, config.algo.prompts_per_step) == (4, 8)
    assert config.run_dir == f"runs/debug/{experiment}/seed{config.seed}"


def test_debug_works_with_every_algorithm() -> None:
    for preset in options("algo"):
        compose(["+experiment=medqa", f"algo={preset}", "+debug=on"])


def test_debug_runs(tmp_path: Path) -> None:
    words = ["+experiment=medqa", "+debug=on", "model.max_completion_tokens=8"]
    assert run(compose([*words, f"out={tmp_path}", "logger.console=plain"])) == 0
    document = json.loads((tmp_path / "medqa/seed0/eval.json").read_text())
    assert document["num_items"] == 16 and "after" in document


@pytest.mark.parametrize(
    "file", sorted(CONF_DIR.glob("*/*.yaml")), ids=lambda f: f"{f.parent.name}/{f.stem}"
)
def test_an_option_is_headed_by_the_command_that_chooses_it(file: Path) -> None:
    lines = [line for line in file.read_text().splitlines() if not line.startswith("# @")]
    assert "-m mar.train " in lines[0] and f"{file.parent.name}={file.stem}" in lines[0]


@pytest.mark.parametrize("preset", options("algo"))
def test_a_preset_is_what_its_name_says_in_an_experiment(preset: str) -> None:
    for experiment in ([], *[[f"+experiment={e}"] for e in QUICK]):
        a = compose([*experiment, f"algo={preset}"], check=False).algo
        kl = a.kl if a.kl_coef else None
        assert (a.name, (a.credit, a.baseline, a.scale_by, a.loss, a.aggregation, kl)) == (
            preset,
            PRESETS[preset],
        )


@pytest.mark.parametrize("scale", options("scale"))
def test_a_scale_is_the_machine_only(scale: str) -> None:
    laptop, other = (
        compose(["+experiment=medqa"]),
        compose(["+experiment=medqa", f"scale={scale}"], check=False),
    )
    assert (other.algo, other.reward, other.eval) == (laptop.algo, laptop.reward, laptop.eval)
    assert replace(other.data, source="") == replace(laptop.data, source="")


@pytest.mark.parametrize("words", [["scale=h100x1"], []])
def test_the_command_line_wins_over_the_scale(words: list[str]) -> None:
    file = ["data.source=path", "data.path=x.jsonl"]
    for order in ([*words, "model=smollm2-135m", *file], ["model=smollm2-135m", *file, *words]):
        config = compose(["+experiment=medqa", *order])
        assert (config.model.name, config.data.source, config.data.path) == (
            "smollm2-135m",
            "path",
            "x.jsonl",
        )


def test_an_experiment_says_nothing_of_model_or_machine() -> None:
    for name in options("experiment"):
        tree = OmegaConf.load(CONF_DIR / "experiment" / f"{name}.yaml")
        assert not {"model", "scale", "optim", "sampler", "device"} & set(tree)
        assert not {"source", "path"} & set(tree.get("data", {}))


def test_the_rehearsal_is_the_same_job() -> None:
    medqa, clinic = (
        compose(["+experiment=medqa"]).to_dict(),
        compose(["+experiment=clinic"]).to_dict(),
    )
    differing = {key for key in medqa if medqa[key] != clinic[key]}
    assert differing == {"name", "run_dir", "data"}
    assert {key for key in medqa["data"] if medqa["data"][key] != clinic["data"][key]} == {
        "task",
        "hub_id",
    }


def test_hf_takes_a_hub_id_or_a_folder(tmp_path: Path) -> None:
    assert compose(["model=hf", "model.path=owner/name"]).model.source == "hub"
    assert compose(["model=hf", f"model.path={tmp_path}"]).model.source == "folder"
    for name in (
        "lr=1,bs=2",
        "it's",
        'a "b" {c} [d]',
        "a\\b",
        "a\\",
        "a\\'b",
        "é ~:",
        "${x}",
        "a\\${b",
    ):
        folder = tmp_path / name
        folder.mkdir()
        config = compose(["model=hf", f"model.path={quoted(folder)}"])
        assert config.model.path == str(folder)
        file = tmp_path / "config.yaml"
        file.write_text(yaml.safe_dump(config.to_dict()))
        assert load_config(file).model.path == str(folder)  # as the run wrote it
    with pytest.raises(UserError, match=r"Interpolation key 'x' not found .*\\\$\{ is the sign"):
        compose(["model=hf", f"model.path={tmp_path}/${{x}}"])


@pytest.mark.parametrize("reward", options("reward"))
def test_every_reward_has_a_grammar_and_an_objective(reward: str) -> None:
    r = compose([f"reward={reward}"]).reward
    assert r.objective == reward
    assert (
        grammar.Grammar(r.form, r.num_answers, r.layout, True, r.analysis, r.other).confident
        == r.confident
    )


def test_the_schema_knows_the_names_that_the_code_knows() -> None:
    names = {
        item.name: set(item.metadata["names"])
        for item in fields(RewardOptions)
        if "names" in item.metadata
    }
    assert names["brier"] == set(reward_spec.BRIERS) - {"none"}
    assert names["layout"] == set(grammar.LAYOUTS)
    assert names["objective"] == set(options("reward"))
    spec = {item.name: item.default for item in fields(reward_spec.RewardSpec)}
    ours = {item.name: item.default for item in fields(RewardOptions)}
    for key in spec.keys() & ours.keys() - {"rank_weights", "terms"}:
        assert ours[key] == spec[key], f"reward.{key} has two defaults"


def test_the_schema_knows_the_names_of_the_learning_side() -> None:
    from mar.config import OptimOptions
    from mar.learn import optim

    schedule = next(item for item in fields(OptimOptions) if item.name == "schedule")
    assert set(schedule.metadata["names"]) == set(optim.SCHEDULES)


REFUSED = [
    ("reward.num_answers=0", "reward.num_answers=0"),
    ("reward.num_answers=11", "at most 10"),
    ("reward.objective=rlcr_single", "reward.num_answers=1"),
    ("reward.analysis=true", "layout=split"),
    ("reward=multi_rlvr reward.other=true", "reward.other=true needs confidences"),
    ("reward=multi_rlvr reward.sum_rule=true", "reward.sum_rule=true needs confidences"),
    ("reward=rlvr_single reward.analysis=true", "reward.analysis=true needs confidences"),
    ("reward.rank_weights=[1,1]", "2 values for 3 answers"),
    ("reward.rank_weights=[]", "0 values for 3 answers"),
    ("reward.rank_weights=[1,2,1]", "must not rise"),
    ("reward.rank_weights=[1,0,-1]", "nor fall below 0"),
    ("reward.coverage=most", "reward.coverage=most is unknown: choose one of sum"),
    ("reward.format_weight=-1", "reward.format_weight=-1.0 is out of range"),
    ("algo.group_size=0", "algo.group_size=0"),
    ("algo.group_size=1", "algo.baseline=matched"),
    ("algo.group_size=1 algo.baseline=mean", "algo.baseline=mean"),
    ("algo.group_size=1 algo.baseline=none algo.scale_by=group_std", "scale_by=none"),
    ("algo.group_size=1 algo.baseline=none algo.scale_by=term_std", "scale_by=term_std: take 2"),
    (
        "algo.loss=ppo algo.loss_options.delta_high=0.3",
        "algo.loss_options.delta_high is no option of algo.loss=ppo: it has none",
    ),
    ("algo.lag=-1", "algo.lag=-1 is out of range: it must be at least 0"),
    ("algo.lag=1 algo.variance_every=5", "algo.lag=1 samples from an older one"),
    ("algo.scale_by=group_mean algo.baseline=mean", "reward.objective=multi_rlcr can lower"),
    (
        "reward=rlvr_single algo.scale_by=group_mean algo.baseline=mean algo.truncated=penalise",
        "algo.truncated=penalise can lower below 0",
    ),
    ("algo=gdpo algo.truncated=penalise", "algo.scale_by=term_std divides the terms"),
    ("algo=gdpo algo.kl=k1 algo.kl_coef=0.1", "neither algo.kl=k1 nor"),
    ("algo.scale_by=term_std", "algo.baseline=matched goes with algo.scale_by=none or whiten"),
    ("reward=multi_rlvr algo.credit=decoupled", "reward.objective=multi_rlvr has none"),
    ("algo.prompts_per_step=0", "algo.prompts_per_step=0"),
    ("algo.temperature=0", "algo.temperature=0.0 is out of range: it must be above 0"),
    ("algo.credit=shapley", "algo.credit=shapley is unknown: choose one of to_go"),
    ("algo.top_p=0.9", "algo.importance=truncated"),
    ("algo.top_k=5", "algo.importance=truncated"),
    ("algo.min_p=0.1", "algo.importance=truncated"),
    ("algo.epochs=2", "algo.loss=reinforce takes one update"),
    ("algo=grpo algo.minibatches=33", "algo.prompts_per_step=32"),
    ("algo.overlong_tokens=5", "algo.truncated=penalise"),
    ("algo.truncated=penalise algo.overlong_tokens=97", "model.max_completion_tokens=96"),
    ("algo=ppo algo.baseline=mean", "take algo=grpo"),
    ("algo.baseline=value algo.credit=own", "not own"),
    ("algo.baseline=value algo.scale_by=group_std", "not group_std"),
    ("algo.baseline=matched algo.scale_by=batch_std", "take algo.baseline=leave_one_out"),
    ("algo.critic_warmup=1", "algo.baseline=value"),
    ("algo=ppo algo.critic_warmup=300", "leaves no step"),
    (
        "algo.group_size=1 algo.baseline=none algo.resample=1",
        "algo.resample=1 would replace everything",
    ),
    ("algo.pass_k=9", "algo.group_size=8"),
    ("algo.pass_k=4 algo.credit=set", "reward.num_answers=1"),
    ("reward=rlvr_single algo.pass_k=4", "algo.credit=set"),
    ("algo.importance_cap=0.5", "at least 1"),
    ("optim.lr=0", "optim.lr=0.0"),
    ("optim.lr=nan", "optim.lr=nan"),
    ('model.trainable="*norm"', "no regular expression"),
    ("optim.betas=[0.9]", "two numbers"),
    ("optim.betas=[0.9,1.0]", "two numbers"),
    ("optim.warmup_frac=2", "at most 1"),
    ("train.steps=0", "train.steps=0 is out of range: it must be at least 1"),
    ("train.steps=5 train.stop_at=6", "train.stop_at=6 lies after train.steps=5"),
    ("eval.num_items=0", "eval.num_items=0"),
    ("data.num_eval=0", "data.num_eval=0"),
    ("data.num_asked=[]", "one or more numbers of findings"),
    ("data.num_asked=[8,0]", "each at least 1"),
    ("data.findings=tables", "choose one of questions, lists"),
    ("model.lora_rank=0 model.lora_base=bfloat16", "set model.lora_rank, or drop it"),
    ("checkpoint.keep=0", "checkpoint.keep=0"),
    ("seed=-1", "seed=-1"),
    ("name=a/b", "becomes a folder"),
    ("name=..", "becomes a folder"),
    ("device=tpu", "device=tpu is unknown"),
    ("data.source=path", "data.path=<file.jsonl>"),
    ("data=jsonl", "data.path=<file.jsonl>"),
    ("data.path=x.jsonl", "add data.source=path"),
    ("data=clinic data.source=hub", "not on the hub"),
    ("data.source=internet", "choose one of embedded, hub, path"),
    ("model=hf", "model.path=<folder or hub id>"),
    ("model=hf model.path=./nowhere", "no folder here"),
    ("model=run", "model.path=<its folder>"),
    ("model=run model.path=nowhere", "nowhere is not there: name a run"),
    ("model.source=wheel", "model=smollm2-135m"),
]


REFUSED_BY_HYDRA = [
    ("experiment=paper", "put a + before it, +experiment="),
    ("name=ünï", "name=ünï: Hydra cannot read that"),
    ("name=[rows", "name=[rows: the [ is not closed"),
    ("model.lr=fast", "model.lr=fast: the value 'fast' of type"),
    ("model=gpt5", "there is no conf/model/gpt5.yaml"),
    ("data=medqaa", "did you mean data=medqa?"),
    ("+experiment=medqaa", "did you mean +experiment=medqa?"),
    ("reward.num_answer=3", "reward.num_answer is no setting; did you mean reward.num_answers=3?"),
    ("+reward.num_answer=3", "reward.num_answer is no setting; did you mean"),
    ("train.steps=many", "could not be converted to Integer"),
    ("reward.analysis=maybe", "not a valid bool"),
]


@cache
def composed(groups: tuple[str, ...]) -> Any:
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        return hydra_compose("config", list(groups))


def configured(words: str) -> Config:
    """What `compose` gives, quicker: Hydra runs once for each choice of groups."""
    groups = tuple(word for word in words.split() if "." not in word.partition("=")[0])
    values = [word for word in words.split() if word not in groups]
    return validate(
        from_omegaconf(OmegaConf.merge(composed(groups), OmegaConf.from_dotlist(values)))
    )


@pytest.mark.parametrize(("words", "sentence"), REFUSED, ids=[words for words, _ in REFUSED])
def test_refused(words: str, sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        configured(words)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("words", "sentence"), REFUSED_BY_HYDRA, ids=[words for words, _ in REFUSED_BY_HYDRA]
)
def test_refused_by_hydra(words: str, sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        compose(words.split())
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


ACCEPTED = [
    "reward.num_answers=1",
    "reward.num_answers=10 reward.layout=split reward.analysis=true reward.other=true",
    "reward=rlcr_single reward.analysis=true reward.other=true",
    "reward.sum_rule=true reward.rank_weights=[1,0.5,0]",
    "algo.group_size=1 algo.baseline=none",
    "algo.top_p=0.9 algo.top_k=50 algo.min_p=0.01 algo.importance=truncated",
    "algo=ppo algo.credit=set algo.scale_by=none algo.group_size=1",
    "reward=rlvr_single algo.pass_k=8 algo.credit=set",
    "train.steps=6 train.stop_at=6",
    "data=jsonl data.path=questions.jsonl",
    "model=smollm2-135m model.source=wheel",
]


@pytest.mark.parametrize("words", ACCEPTED)
def test_accepted(words: str) -> None:
    configured(words)


def test_every_field_with_a_rule_holds_its_default() -> None:
    """A name or a number that the schema itself would refuse."""
    validate(compose())


def test_no_field_is_left_unused() -> None:
    """An option that no code reads is a promise that nothing keeps."""
    root = CONF_DIR.parent
    code = "".join(
        f.read_text() for f in root.glob("mar/**/*.py") if f.name not in ("config.py", "folder.py")
    )
    indirect = {"data_source", "lr", "num_items"}  # read by other keys

    def names(kind: Any) -> list[str]:
        found = []
        for item in fields(kind):
            inner = item.default_factory if inspect.isclass(item.default_factory) else None
            found += names(inner) if inner is not None and is_dataclass(inner) else [item.name]
        return found

    used_here = {"out", "num_gpus", "objective"}
    assert [n for n in names(Config) if f".{n}" not in code and n not in indirect | used_here] == []


def test_a_weight_of_confidences_is_refused_where_there_are_none():
    words = ["+experiment=clinic", "reward=multi_rlvr"]
    with pytest.raises(UserError, match="reward.brier_weight=0.5 weighs .* has none"):
        compose([*words, "reward.brier_weight=0.5"])
    assert compose([*words, "reward.brier_weight=0"]).reward.objective == "multi_rlvr"
    with pytest.raises(UserError, match="entropy_of=confidences: reward.objective=multi_rlvr has"):
        compose([*words, "algo.entropy_of=confidences"])
    # That of an experiment or a preset is not asked for.
    assert compose(words).algo.entropy_of == "confidences"
    paper = ["+experiment=paper", "model=embedded", "data.source=path", "data.path=x"]
    assert compose([*paper, "reward=multi_rlvr"]).reward.brier_weight == 0.5
