"""The summary of the comparison on clinic: intervals by hand, holes stay holes, stale results are
seen.
"""

import json
import re

import numpy as np
import pytest
import torch

from experiments.claims import confidences, probe, run, summary
from experiments.common import commands
from experiments.common.tables import arm_over_seeds
from experiments.report import ROOT
from mar.answers.prompts import build_prompt
from mar.answers.tokenizer import load_tokenizer
from mar.measure.answer_sets import AnswerSet, Item
from mar.policy.packing import pack_groups
from mar.policy.sources import resolve_model
from mar.policy.weights import load_model
from mar.run.compose import compose
from mar.run.console import Display
from mar.run.setup import build_training
from mar.tasks.loading import Source
from mar.tasks.registry import get_task


def log(method: str, seed: int, coverage: list[float], K: int) -> dict:
    k = [K * (i + 1) for i in range(len(coverage))]
    curve = {
        "k": k,
        "tokens": [10.0 * n for n in k],
        "coverage": [[c, c, c] for c in coverage],
        "unique": [[1.0 + c, 1, 2] for c in coverage],
    }
    bars = {
        "k": [1, 2, 3],
        "floor": [0.3, 0.5, 0.6] + [0.7] * 27,
        "ceiling": [0.5, 0.7, 0.8] + [0.9] * 27,
    }
    metrics = {"top1": [0.4 + seed / 10, 0.3, 0.5], "tokens_per_set": [30.0, 29, 31]} | (
        {"ece": [0.1, 0, 0.2]} if K > 1 else {}
    )
    rows = {
        "reliability": [],
        "unique_histogram": {"3": 5, "4": 5 + seed},
        "tokens": [30, 31],
        "num_answers": K,
        "num_sets": len(k),
    }
    return {
        "method": method,
        "seed": seed,
        "bars": bars,
        "metrics": metrics,
        "curve": curve,
        **rows,
    }


def test_numbers_and_intervals_by_hand():
    logs = {
        "multi_rlcr": [log("multi_rlcr", s, [0.7 + s / 100, 0.75], 3) for s in (0, 2)],
        "rlvr_single": [log("rlvr_single", 0, [0.4] * 30, 1)],
    }
    found = summary.results(logs)
    multi, single = found["multi_rlcr"], found["rlvr_single"]
    assert multi["coverage@3"]["mean"] == pytest.approx(0.71) and multi["coverage@3"]["n"] == 2
    half = (
        12.71 * 0.02 / 2**0.5 / 2**0.5
    )  # t of one degree of freedom x standard deviation / sqrt(2)
    assert multi["coverage@3"]["hi"] == pytest.approx(0.71 + half) and multi["coverage@3"][
        "lo"
    ] == pytest.approx(0.71 - half)
    assert (
        multi["gap_closed"]["mean"] == pytest.approx((0.71 - 0.6) / 0.2)
        and multi["coverage@9"]["mean"] is None
    )
    assert (
        single["coverage@30"] == {"mean": pytest.approx(0.4), "lo": None, "hi": None, "n": 1}
        and single["ece"]["mean"] is None
    )
    assert (found["floor"]["gap_closed"]["mean"], found["ceiling"]["gap_closed"]["mean"]) == (
        0.0,
        1.0,
    )
    assert (
        found["ceiling"]["ece"]["mean"] == 0
        and found["floor"]["ece"]["mean"] is None
        and found["floor"]["top1"]["mean"] == 0.3
    )
    line = next(row for row in summary.table(logs).splitlines() if row.startswith("| multi_rlcr"))
    assert (
        line.startswith("| multi_rlcr | 2 | 0.500, 0.600 |") and line.count("–") == 4
    )  # coverage@30, unique@30, q_mse and tv_distance
    assert arm_over_seeds(logs["multi_rlcr"])["unique_histogram"] == {"3": 10, "4": 12}


def test_the_first_page_shows_fewer_columns(tmp_path, monkeypatch):
    monkeypatch.setattr(summary, "HERE", tmp_path)
    (tmp_path / "logs").mkdir()
    file = tmp_path / "logs/multi_rlcr_seed0.json"
    file.write_text(json.dumps(log("multi_rlcr", 0, [0.7, 0.75], 3)))
    head, _, line = summary.short_markdown(["multi_rlcr"]).splitlines()
    assert head.startswith("| method | seeds | coverage@3 |") and "gap_closed" not in head
    assert line.startswith("| multi_rlcr | 1 | 0.700 |")
    assert line.count("|") == head.count("|")


def test_other_logs_make_results_stale(tmp_path, monkeypatch):
    monkeypatch.setattr(summary, "HERE", tmp_path)
    (tmp_path / "logs").mkdir()
    for seed in (0, 1):
        (tmp_path / f"logs/multi_rlcr_seed{seed}.json").write_text(
            json.dumps(log("multi_rlcr", seed, [0.7, 0.75], 3))
        )
    assert summary.stale()
    (tmp_path / "results.json").write_text(
        json.dumps({"logs": summary.fingerprint(), **summary.results(summary.read_logs())})
    )
    assert not summary.stale() and "| multi_rlcr | 2 |" in summary.markdown()
    (tmp_path / "logs/multi_rlcr_seed1.json").write_text(
        json.dumps(log("multi_rlcr", 1, [0.8, 0.85], 3))
    )
    assert summary.stale()


def test_what_is_named_is_trained_anew(tmp_path, monkeypatch):
    called = []

    def command(module, *words):
        folder = tmp_path / "runs/multi_rlvr/seed0"
        folder.mkdir(parents=True, exist_ok=True)
        called.append(module)
        (folder / "eval.json").write_text('{"after": {}}')
        arm = {
            "num_answers": 3,
            "num_sets": 1,
            "metrics": {},
            "curve": {},
            "reliability": [],
            "unique_histogram": {},
            "format_failures": {},
        }
        (folder / "evaluation.json").write_text(
            json.dumps(
                {"num_items": 1, "bars": {}, "arms": {"policy": arm | {"tokens": [len(called)]}}}
            )
        )
        return 1.0

    monkeypatch.setattr(run, "run_module", command)
    monkeypatch.setattr(commands, "run_module", command)
    monkeypatch.setattr(run, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(run, "LOGS", tmp_path / "logs")
    both = ["mar.train", "mar.evaluate"]
    for again, expected in ((False, both), (False, []), (True, both)):
        called.clear()
        run.one("multi_rlvr", 0, again)
        assert called == expected
    (
        tmp_path / "logs/multi_rlvr_seed0.json"
    ).unlink()  # trained, and cut off before it was measured
    called.clear()
    run.one("multi_rlvr", 0, True)
    assert called == both[1:]


def test_cold_draws_are_an_evaluation_of_their_own(tmp_path, monkeypatch):
    asked, written = [], []
    monkeypatch.setattr(run, "run_module", lambda *words: asked.append(words) or 1.0)
    monkeypatch.setattr(run, "read_evaluation", lambda folder: folder.name)
    monkeypatch.setattr(run, "write", lambda *log, words, **_: written.append((*log, words)))
    monkeypatch.setattr(run, "LOGS", tmp_path / "logs")
    run.one("base", 1, again=False)
    run.one("single_cold", 1, again=False)
    assert [log[:4] for log in written] == [
        ("base", 1, "base_seed1", "policy"),
        ("single", 1, "base_seed1", "single"),
        ("prompted_k", 1, "base_seed1", "prompted_k"),
        ("verbalized", 1, "base_seed1", "verbalized"),
        ("base_cold", 1, "base_cold_seed1", "policy"),
        ("single_cold", 1, "base_cold_seed1", "single"),
    ]
    cold = ["algo.temperature=0.3" in log[4] for log in written]
    assert cold == [False] * 4 + [True] * 2
    assert "arms=policy,single" in asked[1]
    for (_, base, *words), log in zip(asked, (written[0], written[4]), strict=True):
        assert base == "base"
        assert [word for word in words if not word.startswith("out=")] == log[4]


def a_set(
    key: str, q: float, p: float, reason: str | None = None, repeated: bool = False
) -> AnswerSet:
    return AnswerSet("", (key,), (q,), (0.0,), (p,), (key,), (repeated,), reason, 9)


def test_error_of_confidences_by_hand():
    """Drawn and expected parts, with a patient's other answers, format failures and answers given
    once set apart.
    """
    sets = (
        a_set("flu", 0.2, 0.5),
        a_set("flu", 0.4, 0.5),
        a_set("cold", 0.9, 0.1),
        a_set("flu", 0.0, 0.0, "unfinished"),
    )
    items = [
        Item("p1", 2, False, 1.0, 9, sets),
        Item("p2", 2, False, 1.0, 9, (a_set("flu", 0.5, 0.9), a_set("flu", 0.5, 0.9))),
    ]
    found = confidences.parts(items, (0,))
    assert found["q_mse"] == pytest.approx((0.09 + 0.01 + 0.64 + 0.16 + 0.16) / 5)
    assert found["drawn"] == pytest.approx((0.02 + 0.0) / 2)  # of 0.2 and 0.4, and of 0.5 twice
    assert found["expected"] == pytest.approx(((0.04 - 0.01) + 0.16) / 2)
    assert found["drawn"] + found["expected"] == pytest.approx(
        (0.09 + 0.01 + 0.16 + 0.16) / 4
    )  # of the answers that came twice
    assert found["constant"] == pytest.approx(np.var([0.5, 0.5, 0.1, 0.9, 0.9]))
    assert confidences.parts([Item("p1", 2, False, 1.0, 9, sets[2:3])], (0,))["drawn"] is None


def test_answers_rated_by_what_the_model_thinks_of_them():
    sets = (
        a_set("flu", 0.2, 0.5),
        a_set("flu", 0.4, 0.0, repeated=True),
        a_set("nonsense", 0.9, 0.0),
        a_set("flu", 0.1, 0.0, "unfinished"),
    )
    rated = confidences.rated(
        [Item("p1", 2, False, 1.0, 9, sets)], [{"The Flu": 0.75, "cold": 0.25}]
    )
    assert [s.confidences for s in rated[0].sets] == [(0.75,), (0.0,), (0.0,), (0.1,)]


def test_tables_of_confidences_and_probes_have_a_cell_for_each_column(tmp_path):
    parts = {"q_mse": 0.02, "drawn": None, "expected": None, "constant": 0.03}
    row = {
        "run": "r/seed0",
        "policy": "as trained",
        **dict.fromkeys(confidences.WHOLE, 0.5),
        "coverage@30": None,
        "parts": parts,
    }
    (tmp_path / "confidences.jsonl").write_text(json.dumps(row | {"slots": [parts]}) + "\n")
    header, _, line = confidences.markdown(tmp_path / "confidences.jsonl").splitlines()
    cells = dict(zip(header.split(" | "), line.split(" | "), strict=True))
    assert (cells["gap_closed"], cells["coverage@30"], cells["drawn"], cells["first slot"]) == (
        "0.500",
        "–",
        "–",
        "0.0200",
    )
    of_places = {"read": 0.2, "read_hidden": 0.3, "confidence": 0.4, "confidence_hidden": 0.5}
    layers = [{"layer": i, "kl": 2.0, "of_drawn": 0.1, **of_places} for i in (0, 1)]
    (tmp_path / "probe.json").write_text(json.dumps({"layers": layers}))
    assert probe.markdown(tmp_path / "probe.json").splitlines()[2:] == [
        "| embedding | 2.000 | 0.100 | 0.200 | 0.300 | 0.400 | 0.500 |",
        "| 1 | 2.000 | 0.100 | 0.200 | 0.300 | 0.400 | 0.500 |",
    ]


def test_states_and_probabilities_are_those_of_the_place():
    """The state before the first answer predicts its first token; the last layer's, normed, gives
    the probability that is returned.
    """
    folder, _ = resolve_model("embedded", "embedded", None)
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    model.norm.weight.data.mul_(
        0.2
    )  # else tags are so certain that one token more or less would not show
    examples = get_task("clinic").load(Source("embedded", "train", 3, 5)).examples
    found, posterior, drawn, said = probe.states(model, tokenizer, "diagnosis", examples)
    assert found.shape[:3] == (3, len(model.blocks) + 1, 3)
    assert torch.allclose(posterior.sum(1), torch.ones(3))
    for i, example in enumerate(examples):
        prompt = list(build_prompt(example, probe.SETS, tokenizer, "diagnosis").ids)
        name, opening = (
            tokenizer(t, add_special_tokens=False)["input_ids"]
            for t in (example.golds[drawn[i]].name, "<answer1>")
        )
        rating = tokenizer("</answer1><confidence1>", add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            logprobs = model(pack_groups([prompt], [[opening + name + rating]]))[0]
            assert said[i].item() == pytest.approx(
                logprobs[len(opening) : len(opening) + len(name)].sum().exp().item(), rel=1e-4
            )
            zero = tokenizer("0", add_special_tokens=False)["input_ids"]
            for place, before, first in (
                (0, opening, name[0]),
                (1, opening + name, rating[0]),
                (2, opening + name + rating, zero[0]),
            ):
                logits = model.norm(found[place, -1, i]) @ model.head_weight.T
                expected = model(pack_groups([prompt], [[[*before, first]]]))[0][-1]
                assert logits.log_softmax(-1)[first].item() == pytest.approx(
                    expected.item(), rel=1e-3
                )


def test_what_the_model_knows_and_the_sets_made_of_it(tmp_path):
    config = compose(["+experiment=clinic", "train.steps=1", "eval.num_items=2"])
    folder, _ = resolve_model("embedded", "embedded", None)
    training, model, tokenizer = (
        build_training(config, folder, Display("plain", 0, 0)),
        load_model(folder),
        load_tokenizer(folder),
    )
    beliefs = confidences.known(training, model, tokenizer)
    assert [sum(belief.values()) for belief in beliefs] == pytest.approx([1.0, 1.0], abs=0.02)
    for prompt, belief, item in zip(
        training.held_out.prompts,
        beliefs,
        confidences.most_probable(training, beliefs),
        strict=True,
    ):
        best = sorted(belief, key=belief.__getitem__, reverse=True)[:3]
        exact = {gold.name: gold.probability for gold in prompt.example.golds}
        assert item.sets[0].answers == tuple(best) and item.sets[0].confidences == pytest.approx(
            [belief[n] for n in best], abs=0.005
        )
        assert item.sets[0].mass == pytest.approx([exact[n] for n in best])
        assert (
            sum(abs(p - exact[name]) for name, p in belief.items()) < 0.7
        )  # the shipped model knows the posterior, roughly

    def different(temperature: float) -> int:
        items = confidences.written(
            training,
            training.learner.policy,
            training.held_out.prompts,
            6,
            "held out",
            0,
            temperature,
        )
        return sum(len({s.text for s in item.sets}) for item in items)

    assert different(1e-6) == 2 and different(1.0) > 6


def test_scripts_that_are_run_by_path_find_the_experiments():
    """`python experiments/x/run.py` has the script's folder on its path, not the repository's,
    which what imports `experiments` needs, or `-m`.
    """
    texts = [
        *ROOT.glob("README.md"),
        *ROOT.glob("experiments/*/README.md"),
        *ROOT.glob("experiments/**/*.py"),
        ROOT / "Makefile",
    ]
    named = {
        name
        for file in texts
        for name in re.findall(
            r"python\S* (experiments/[\w/]+\.py)", file.read_text(encoding="utf-8")
        )
    }
    assert len(named) > 5
    for name in sorted(named):
        source = (ROOT / name).read_text(encoding="utf-8")
        assert "sys.path.insert" in source or not re.search(
            r"^(from|import) experiments", source, re.MULTILINE
        ), name
