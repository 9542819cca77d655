"""How a run's settings become the sampler's."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from mar.answers.grammar import Grammar, grammar_of
from mar.answers.tokenizer import load_tokenizer
from mar.errors import UserError
from mar.policy.distributed import World
from mar.policy.packing import pack_groups
from mar.policy.sources import EMBEDDED, environment
from mar.records import Example, Gold
from mar.run import asking, checkpoint
from mar.run.answering import Target, load_weights
from mar.run.asking import open_policy
from mar.run.checkpoint import CheckpointWriter
from mar.run.compose import compose
from mar.run.console import Display
from mar.run.evaluations import Evaluations
from mar.run.setup import (
    announce,
    answer_tokens,
    build_learner,
    build_training,
    sampling_params,
    say_sum_rule,
)


def test_a_machine_without_git_has_no_commit(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert environment()["commit"] is None


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(EMBEDDED)


def params(tokenizer, *overrides, thinking=True):
    config = compose(["+experiment=clinic", *overrides])
    return sampling_params(config, Grammar(thinking=thinking), tokenizer, EMBEDDED)


def test_a_thinking_budget_becomes_tokens_that_close_the_thoughts(tokenizer):
    p = params(tokenizer, "sampler.think_budget=20", "sampler.stop_strings=[END]")
    assert (p.max_tokens, p.think_budget, p.stop_strings) == (96, 20, ("END",))
    assert tokenizer.decode(p.think_close) == "</think>" and p.stop_ids == (tokenizer.eos_token_id,)
    assert params(tokenizer).think_close == () and params(tokenizer).think_budget is None


def test_a_thinking_budget_keeps_room_for_the_answers(tokenizer):
    params(tokenizer, "sampler.think_budget=50")
    with pytest.raises(
        UserError, match=r"think_budget=90 leaves 6 tokens and 3 answers need about \d\d"
    ):
        params(tokenizer, "sampler.think_budget=90")
    with pytest.raises(UserError, match="model.thinking=true"):
        params(tokenizer, "sampler.think_budget=20", thinking=False)


# --- options of the real model -----------------------------------------------------------------


def test_the_request_stands_above_the_question_wherever_a_run_asks():
    words = ["+experiment=clinic", "data.request_first=true", "data.num_train=2", "data.num_eval=2"]
    training = build_training(compose(words), EMBEDDED, Display("plain", 0, 1))
    for prompt in (*training.prompt_order.prompts, *training.held_out.prompts):
        assert prompt.text.index("<answer1>") < prompt.text.index(prompt.example.question)


def test_a_question_from_the_keyboard_is_asked_as_in_training(monkeypatch):
    asked = []
    monkeypatch.setattr(asking, "build_prompt", lambda *_, **told: asked.append(told) or 1 / 0)
    policy = open_policy("embedded", ["data.request_first=true"])
    with pytest.raises(ZeroDivisionError):
        policy.ask("Cough?", 1, 0)
    assert asked == [{"request_first": True, "explain_decimals": False}]


def test_weights_in_bfloat16_are_not_sharded():
    config = compose(["+experiment=clinic", "model.lora_rank=2", "model.lora_base=bfloat16"])
    policy = build_learner(config, EMBEDDED, World()).policy
    narrow = [name for name, p in policy.named_parameters() if p.dtype == torch.bfloat16]
    assert narrow and not any("lora_" in name for name in narrow)
    with pytest.raises(UserError, match="for one process on a CPU"):
        build_learner(config, EMBEDDED, World(size=2))


def test_the_reference_is_rounded_as_the_policy_is():
    words = ["model.lora_rank=2", "model.lora_base=bfloat16", "algo.kl=k3", "algo.kl_coef=0.1"]
    config = compose(["+experiment=clinic", *words])
    learner = build_learner(config, EMBEDDED, World())
    packed = pack_groups([[5, 6, 7]], [[[8, 9], [10]]])
    with torch.no_grad():
        assert torch.equal(learner.reference(packed)[0], learner.policy(packed)[0])
    assert not any(parameter.requires_grad for parameter in learner.reference.parameters())


def test_rounded_weights_are_not_trained():
    words = ["model.lora_rank=2", "model.lora_base=bfloat16", "model.trainable=norm|qkv"]
    with pytest.raises(UserError, match="small updates would not move"):
        build_learner(compose(["+experiment=clinic", *words]), EMBEDDED, World())


def test_the_sum_rule_is_questioned_where_several_answers_are_right():
    display = Display("plain", 0, 0)
    one = Example("a", "words", "?", (Gold("x"), Gold("y")))
    several = replace(one, multi_label=True)
    config = compose(["+experiment=clinic", "reward.sum_rule=true"])
    with display.console.capture() as said:
        say_sum_rule(config, [one, one], display)
        say_sum_rule(compose(["+experiment=clinic"]), [several], display)
    assert said.get() == ""
    with display.console.capture() as said:
        say_sum_rule(config, [one, several], display)
    assert "1 of 2 held-out questions" in said.get()


def test_bfloat16_is_called_slow_on_a_processor_with_avx2_alone(monkeypatch):
    words = ["+experiment=clinic", "model.lora_rank=2"]
    said = {}
    for capability in ("AVX2", "AVX512"):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda c=capability: c)
        for lora_base in ("bfloat16", "as_stored"):
            display = Display("plain", 0, 0)
            with display.console.capture() as shown:
                announce(compose([*words, f"model.lora_base={lora_base}"]), display)
            said[capability, lora_base] = shown.get()
    assert "(model.lora_base=as_stored)" in said.pop(("AVX2", "bfloat16"))
    assert set(said.values()) == {""}


def test_the_untrained_model_is_measured_as_training_begins_from_it():
    words = ["+experiment=clinic", "model.lora_rank=2", "model.lora_base=bfloat16"]
    config = compose(words)
    begun = build_learner(config, EMBEDDED, World()).policy
    target = Target("x", config, EMBEDDED, {}, None, EMBEDDED)
    _, untrained = load_weights(target, torch.device("cpu"))
    measured = dict(untrained.named_parameters())
    for name, parameter in begun.named_parameters():
        assert measured[name].dtype == parameter.dtype
        assert torch.equal(measured[name], parameter)


# --- checkpoints from elsewhere ----------------------------------------------------------------


@pytest.fixture
def padded(tmp_path) -> Path:
    """The embedded model with 100 rows that are no tokens, and a second end token (3)."""
    folder = Path(shutil.copytree(EMBEDDED, tmp_path / "padded"))
    weights = load_file(folder / "model.safetensors")
    embedding = weights["model.embed_tokens.weight"]
    weights["model.embed_tokens.weight"] = torch.cat((embedding, embedding[:100]))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | {"vocab_size": 1280}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 3]}')
    return folder


def test_every_model_and_the_sampler_know_the_checkpoints_tokens(padded):
    words = ["model=hf", f"model.path={padded}", "model.lr=1e-4", "model.thinking=false"]
    config = compose(["+experiment=clinic", "algo.kl_coef=0.1", "eval.num_items=2", *words])
    training = build_training(config, padded, Display("plain", 0, 0))
    learner = training.learner
    for model in (learner.policy, learner.reference):
        assert model.head_weight.shape[0] == 1180 and len(model.embed.weight) == 1280
    assert training.params.stop_ids == training.held_out.params.stop_ids == (1, 3)
    target = Target("x", config, padded, {}, None, padded)
    policy, untrained = load_weights(target, torch.device("cpu"))
    assert policy.config.num_tokens == untrained.config.num_tokens == 1180
    asked = open_policy(str(padded), ["+experiment=clinic", "model.thinking=false"])
    assert asked.policy.config.num_tokens == 1180 and asked.params.stop_ids == (1, 3)


def test_a_trained_policy_is_measured_over_the_tokens_alone(padded, tmp_path):
    """Both models that `mar.evaluate` loads for a run, the trained and the untrained one."""
    words = ["model=hf", f"model.path={padded}", "model.lr=1e-4", "model.thinking=false"]
    config = compose(["+experiment=clinic", "eval.num_items=2", *words])
    training = build_training(config, padded, Display("plain", 0, 0))
    writer = CheckpointWriter(tmp_path / "checkpoints", training.learner, 1, print)
    writer.save(1)
    writer.finish()
    found = checkpoint.newest(tmp_path / "checkpoints")
    target = Target("x", config, padded, {}, found, padded)
    policy, untrained = load_weights(target, torch.device("cpu"))
    assert policy is not untrained
    assert policy.config.num_tokens == untrained.config.num_tokens == 1180


def test_a_model_that_knows_no_form_is_warmed_up_and_one_without_room_gets_it(tokenizer):
    """What the first evaluation says where no completion has the right form."""
    config = compose(["+experiment=clinic"])
    needed = answer_tokens(config, grammar_of(config), tokenizer)
    assert 30 < needed < config.model.max_completion_tokens
    for limit, remedy in ((needed - 1, "cuts them: raise it"), (needed, "python -m mar.sft")):
        options = replace(config.model, max_completion_tokens=limit)
        training = SimpleNamespace(config=replace(config, model=options), answer_tokens=needed)
        said = Evaluations(training, None, None, {})._why_no_form()
        assert said.startswith("no completion has the right form") and remedy in said
