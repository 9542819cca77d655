"""The comparison on a real language model: its words, what a log keeps, and what its tables say."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from experiments.real_model import known, questions, row, shift, slots, summary, teach
from experiments.real_model.warmed_up import WarmedUp
from mar.answers.tokenizer import load_tokenizer
from mar.errors import UserError
from mar.learn.demonstrations import DrawnText
from mar.measure.answer_sets import AnswerSet, Item
from mar.policy.sources import resolve_model
from mar.policy.weights import load_model
from mar.records import Example, Gold
from mar.run.compose import compose
from mar.run.console import Display
from mar.run.setup import load_data
from mar.run.warm_up import check_options, prior_of
from mar.run.words import read_words
from mar.sft import COMMAND


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """The words for a model folder and a data folder."""
    folder, _ = resolve_model("embedded", "embedded", None)
    return [f"model.path={folder}", f"data.path={tmp_path_factory.mktemp('data')}"]


@pytest.mark.slow
def test_every_method_is_a_config_that_sees_as_many_steps(places):
    for name, words in (row.METHODS | row.WARM_UPS).items():
        config = compose([*row.ASKED, *words, *row.TRAINED, *places])
        assert config.algo.temperature == (0.3 if name.startswith("cold_") else 1.0)
        assert config.train.steps == 200
        # The prompt is the one that the warm-up was taught.
        assert config.data.findings == "lists"
        assert config.data.request_first
        assert not config.model.explain_decimals


@pytest.mark.parametrize("method", row.METHODS)
def test_a_method_is_compared_with_the_warm_up_in_its_own_form(method, places):
    ours = compose([*row.ASKED, *row.METHODS[method], *places])
    words = row.WARM_UPS[row.warm_up_of(method)]
    warm_up = compose([*row.ASKED, *words, *places])
    assert warm_up.reward.objective == ours.reward.objective
    assert warm_up.reward.num_answers == ours.reward.num_answers


def a_log(method, seed, coverage, tokens, K):
    """Of two questions; `coverage` [2, sets]."""
    covered = np.array(coverage)
    sets = covered.shape[1]
    mean = covered.mean(axis=0)
    return {
        "method": method,
        "seed": seed,
        "curve": {
            "k": [K * (i + 1) for i in range(sets)],
            "tokens": [tokens * (i + 1) for i in range(sets)],
            "coverage": [[c, c - 0.1, c + 0.1] for c in mean],
            "unique": [[1.0, 1.0, 1.0]] * sets,
        },
        "coverage_of_questions": coverage,
        "metrics": {"top1": [0.25, 0.2, 0.3]},
        "reliability": [],
        "bars": {"floor": [0.5] * 15, "ceiling": [0.75] * 15},
        "paired": {"num_items": 2, "top1": [0.125, 0.1, 0.15]},
    }


@pytest.fixture
def logs(tmp_path, monkeypatch):
    found = [
        a_log("multi_rlvr", 0, [[0.5, 0.6], [0.7, 0.8]], 30.0, 3),
        # Three answers of it cover 0.3 and 0.5; 30 tokens are 4 answers, 0.4 and 0.5.
        a_log("rlvr_single", 0, [[0.1, 0.2, 0.3, 0.4], [0.5, 0.5, 0.5, 0.5]], 7.5, 1),
        a_log("warm_up_rlvr_single", 0, [[0.1, 0.1, 0.2], [0.2, 0.2, 0.2]], 7.5, 1),
        a_log("warm_up_multi_rlvr", 0, [[0.25], [0.25]], 30.0, 3),
        a_log("cold_multi_rlvr", 0, [[0.5], [0.5]], 30.0, 3),
    ]
    (tmp_path / "rows").mkdir()
    for log in found:
        file = tmp_path / "rows" / f"{log['method']}_seed{log['seed']}.json"
        file.write_text(json.dumps(log))
    constant = {"coverage_of_questions": [[0.1] * 15, [0.3] * 15]}
    (tmp_path / "constant.json").write_text(json.dumps(constant))
    monkeypatch.setattr(summary, "LOGS", tmp_path)
    return found


def cells_of(table):
    lines = table.splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_a_set_is_compared_with_three_single_answers_and_with_as_many_tokens(logs):
    of_rlvr, of_warm_up = cells_of(summary.paired_table())
    assert of_rlvr[:4] == ["multi_rlvr", "0", "rlvr_single", "0"]
    assert of_rlvr[4].startswith("0.200 (")
    assert of_rlvr[5].startswith("0.150 (")
    assert of_rlvr[6] == "4.0"
    # Its three answers have fewer tokens than a set: what four cover was not sampled.
    assert of_warm_up[:4] == ["multi_rlvr", "0", "warm_up_rlvr_single", "0"]
    assert of_warm_up[4].startswith("0.400 (")
    assert of_warm_up[5] == "–"


def test_coverage_between_two_numbers_of_answers_is_interpolated(logs):
    single = logs[1]
    assert summary.at_tokens(single, 3.75) == pytest.approx([0.05, 0.25])
    assert summary.at_tokens(single, 11.25) == pytest.approx([0.15, 0.5])
    assert summary.at_tokens(single, 30.0) == pytest.approx([0.4, 0.5])
    assert summary.at_tokens(single, 30.1) is None


def test_each_seed_is_a_line_and_bounds_stand_below(logs):
    lines = summary.coverage_table().splitlines()[2:]
    names = [line.split("|")[1].strip() for line in lines]
    warm_ups = ["warm_up_rlvr_single", "warm_up_multi_rlvr", "cold_multi_rlvr"]
    assert names == [*warm_ups, "rlvr_single", "multi_rlvr", "constant answers", "floor", "ceiling"]
    # Two sets of three do not add up to nine.
    assert lines[4].split("|")[3].strip() == "0.600 (0.500 to 0.700)"
    assert lines[4].split("|")[4].strip() == "–"


def test_the_first_page_shows_the_chosen_methods_in_their_order(logs):
    logs[0]["metrics"] |= {"ece": [0.0234, 0.02, 0.03], "auroc": [None, None, None]}
    logs[0]["curve"] |= {"k": [3, 9], "unique": [[2.5, 2.0, 3.0], [4.256, 4.0, 5.0]]}
    (summary.LOGS / "rows" / "multi_rlvr_seed0.json").write_text(json.dumps(logs[0]))
    sets, single = cells_of(summary.short_table(["multi_rlvr", "rlvr_single"]))
    assert sets == ["multi_rlvr", "0", "0.600", "–", "4.3", "0.023", "–"]
    assert single == ["rlvr_single", "0", "0.400", "–", "–", "–", "–"]


def test_the_change_is_from_the_warm_up_in_the_same_form(logs):
    single, sets = cells_of(summary.change_table())
    assert single[:3] == ["rlvr_single", "0", "0.125 (0.100 to 0.150)"]
    assert single[3].startswith("0.200 (")  # of three answers, 0.3 and 0.5 less 0.2 and 0.2
    assert sets[:2] == ["multi_rlvr", "0"]
    assert sets[3].startswith("0.350 (")
    assert sets[4] == "–"  # two sets are no fifteen answers


def test_sets_are_compared_with_cold_sets_and_what_has_none_is_left_out(logs):
    (sets,) = cells_of(summary.cold_table())
    assert sets[:3] == ["multi_rlvr", "0", "cold_multi_rlvr"]
    assert sets[3].startswith("0.100 (")
    assert sets[4] == "–"


def test_words_that_would_make_a_row_unlike_the_others_are_refused():
    out, words = row.out_and_words(["out=here", "data.path=x", "model.threads=2"])
    assert (str(out), words) == ("here", ["data.path=x", "model.threads=2"])
    for other in ("model.lr=1e-4", "model.lora_base=float64"):
        with pytest.raises(UserError, match=f"{other}: all rows are made with the same settings"):
            row.out_and_words([other])


def test_a_log_says_what_was_multiplied_in(tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(row, "start_of", lambda out, words: out / "start")
    monkeypatch.setattr(row, "run_module", lambda *_: 0.0)
    monkeypatch.setattr(row, "write", lambda *_, **more: written.append(more))
    row.Rows(tmp_path, []).measure_warm_up("warm_up_multi_rlvr", 0)
    _, words = row.out_and_words(["model.lora_base=as_stored"])
    row.Rows(tmp_path, words).measure_warm_up("warm_up_multi_rlvr", 0)
    assert [log["multiplied_in"] for log in written] == ["bfloat16", "float32"]


def test_a_run_that_stopped_early_is_not_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(row, "start_of", lambda out, words: out / "start")
    monkeypatch.setattr(row, "train_unless_finished", lambda run, *words: 0.0)
    asked = []
    monkeypatch.setattr(row, "run_module", lambda *words: asked.append(words))
    warm_up = tmp_path / "warm_up_rlvr_single" / "seed0"
    run = tmp_path / "rlvr_single" / "seed0"
    for folder in (warm_up, run):
        folder.mkdir(parents=True)
    (warm_up / "evaluation.json").write_text("{}")
    (run / "eval.json").write_text(json.dumps({"before": {}}))
    with pytest.raises(UserError, match="stopped before its last step: the same command goes on"):
        row.Rows(tmp_path, []).make("rlvr_single", 0)
    assert not asked


# ---------------------------------------------------------------------- the warm-up taught on


def test_it_is_taught_in_the_words_of_the_rows(places):
    words = read_words(COMMAND, [*teach.WORDS, *places])
    taught = compose(words.settings)
    check_options(words.options, taught, words.settings)
    of_rows = compose([*row.ASKED, *row.WARM_UPS["taught_multi_rlcr"], *places])
    assert taught.reward.objective == of_rows.reward.objective
    assert taught.data.findings == of_rows.data.findings
    assert taught.data.request_first == of_rows.data.request_first
    assert taught.model.explain_decimals == of_rows.model.explain_decimals
    assert taught.model.thinking == of_rows.model.thinking


def test_it_is_taught_once(tmp_path, monkeypatch):
    asked = []

    def pretend(module, *words):
        asked.append([word for word in words if word.startswith(("model.path=", "run_dir="))])
        (tmp_path / "out").mkdir()
        (tmp_path / "out/config.json").write_text("{}")

    monkeypatch.setattr(teach, "run_module", pretend)
    for _ in range(2):
        assert teach.taught_from(tmp_path / "start", tmp_path / "out", []) == tmp_path / "out"
    assert asked == [[f"model.path={tmp_path / 'start'}", f"run_dir={tmp_path / 'out'}"]]


def test_a_row_of_the_taught_starts_there_and_is_compared_with_it(tmp_path, monkeypatch):
    monkeypatch.setattr(row, "start_of", lambda out, words: out / "start")
    made = []
    monkeypatch.setattr(row, "taught_from", lambda *asked: made.append(asked))
    rows = row.Rows(tmp_path, ["data.path=here", "model.threads=2"])
    for name in row.FROM_TAUGHT:
        assert f"model.path={tmp_path / 'taught'}" in rows.settings(name, 0)
    assert f"model.path={tmp_path / 'start'}" in rows.settings("multi_rlcr_own", 0)
    for name in ("multi_rlcr_own", "warm_up_multi_rlcr", *row.FROM_TAUGHT):
        rows.prepare(name)
    assert made == [(tmp_path / "start", tmp_path / "taught", ["data.path=here"])] * 2
    assert row.warm_up_of("multi_rlcr_own_taught") == "taught_multi_rlcr"
    assert row.warm_up_of("multi_rlcr_own") == "warm_up_multi_rlcr"


# ---------------------------------------------------------------------- questions to read


def a_set(answers, confidences=(), reason=None):
    keys = () if reason else tuple(answer.lower() for answer in answers)
    nothing = (0.0,) * len(answers)
    again = (False,) * len(answers)
    return AnswerSet(
        "", answers, confidences, nothing, (0.25,) * len(answers), keys, again, reason, 9
    )


def test_answers_are_read_over_as_many_sets_as_they_need():
    singles = tuple(a_set((answer,)) for answer in ("Flu", "flu", "gout", "never shown"))
    item = Item("1", 1, False, None, 9, singles)
    assert questions.answers_of(item) == "Flu (0.25), ~~flu~~, gout (0.25)"


def test_what_a_model_wrote_is_shown_as_it_is():
    text = "a|b <b>*c*</b> [x](http://e)\n`d`"
    shown = r"a\|b &lt;b&gt;\*c\*&lt;/b&gt; \[x\](http://e) \`d\`"
    assert questions.plain(text) == shown


def test_confidences_are_shown_and_a_broken_form_is_named():
    whole = a_set(("flu", "cold", "gout"), (0.5, 0.25, 0.0))
    broken = a_set(("flu", None, None), (None,) * 3, reason="no_answer")
    shown = questions.answers_of(Item("1", 1, False, None, 9, (whole,)))
    assert shown == "flu 0.5 (0.25), cold 0.25 (0.25), gout 0 (0.25)"
    assert "broken form: no_answer" in questions.answers_of(Item("1", 1, False, None, 9, (broken,)))


def test_a_page_names_every_row_that_answered():
    example = Example(
        "1", "x", "Present: pain", (Gold("flu", probability=0.75), Gold("cold", probability=0.25))
    )
    items = {"1": Item("1", 1, False, None, 9, (a_set(("Flu",)),))}
    text = questions.page([example], {"rlvr_single": items, "rlcr_single": {}})
    assert "> Present: pain" in text
    assert "| most probable | flu (0.75), cold (0.25) |" in text
    assert "| rlvr_single | Flu (0.25) |" in text
    assert "rlcr_single |" not in text


# ---------------------------------------------------------------------- other questions


@pytest.mark.parametrize("name", shift.SHIFTS)
def test_every_shift_is_a_config(name, places, tmp_path):
    place, words = shift.SHIFTS[name]
    here = [word for word in places if not word.startswith("data.path=")]
    asked = [*row.ASKED, *row.OWN, *here, f"data.path={tmp_path / place}", *words]
    config = compose(asked)
    assert config.reward.objective == "multi_rlcr"
    assert config.model.max_prompt_tokens >= 256


def test_a_policy_is_asked_by_its_run_and_a_warm_up_by_its_words(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(row, "start_of", lambda out, words: out / "start")
    monkeypatch.setattr(shift, "LOGS", tmp_path)
    monkeypatch.setattr(shift, "run_module", lambda *words: asked.append(words) or 1.0)
    evaluation = {"num_items": 2, "bars": None, "arms": {"policy": None}}
    monkeypatch.setattr(shift, "read_evaluation", lambda folder: evaluation)
    monkeypatch.setattr(shift, "kept_of_arm", lambda arm: {})
    rows = row.Rows(tmp_path, [row.IN_FLOAT32])
    for method in ("warm_up_multi_rlcr", "multi_rlcr_own"):
        shift.measure(rows, method, 0, "4 asked", tmp_path)
    for words in asked:
        assert words[0] == "mar.evaluate" and "data.num_asked=[4]" in words
    assert asked[0][1] == "base" and "reward=multi_rlcr" in asked[0]
    assert asked[1][1] == str(tmp_path / "multi_rlcr_own" / "seed0")
    log = json.loads((tmp_path / "4_asked_warm_up_multi_rlcr_seed0.json").read_text())
    assert (log["method"], log["multiplied_in"]) == ("warm_up_multi_rlcr", "float32")


def test_a_shift_is_a_line_with_the_most_that_is_possible(tmp_path, monkeypatch):
    log = a_log("multi_rlcr_own", 0, [[0.5], [0.7]], 30.0, 3) | {"shift": "4 asked", "num_items": 2}
    unknown = log | {"shift": "protoqa", "bars": None}
    for number, one in enumerate((log, unknown)):
        (tmp_path / f"{number}.json").write_text(json.dumps(one))
    monkeypatch.setattr(shift, "LOGS", tmp_path)
    lines = shift.markdown().splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0][:6] == [
        "4 asked",
        "multi_rlcr_own",
        "0",
        "2",
        "0.750",
        "0.600 (0.500 to 0.700)",
    ]
    assert cells[1][:5] == ["protoqa", "multi_rlcr_own", "0", "2", "–"]


# ---------------------------------------------------------------------- slots


def test_the_token_behind_an_answer_belongs_to_it():
    letters = list
    confidence = DrawnText(["0.50"], [1.0], 0, kind="confidence")
    pieces = ["<a>", DrawnText(["flu"], [1.0], 0, kind="answer"), "</a>", confidence, "<b>"]
    pieces += [DrawnText(["cold"], [1.0], 0, kind="answer"), "</b>"]
    of_first = [-1] * 3 + [0] * 3 + [0, -1, -1, -1] + [-1] * 4
    of_second = [-1] * 3 + [1] * 4 + [1, -1, -1, -1]
    assert slots.slots_of_tokens(pieces, letters) == [*of_first, *of_second, -1]


def test_the_prior_leaves_out_what_was_said():
    prior = {"flu": 0.5, "cold": 0.25, "gout": 0.25}
    first = DrawnText(["flu", "cold", "gout"], [0.5, 0.25, 0.25], 0)
    second = DrawnText(["cold", "gout"], [0.75, 0.25], 0)
    nats = slots.prior_nats([first, second], prior)
    expected = 0.75 * np.log(0.75 / 0.5) + 0.25 * np.log(0.25 / 0.5)
    assert nats == pytest.approx([0.0, expected])


def test_slots_of_the_embedded_model_are_nearer_to_the_posterior_than_the_prior_is():
    config = compose(["+experiment=clinic"])
    folder, _ = resolve_model(config.model.source, config.model.name, config.model.path)
    opened = WarmedUp(config, folder, load_tokenizer(folder), load_model(folder))
    display = Display("plain", 0, 1)
    examples = load_data(config, "test", 8, 0, display)
    frequencies = prior_of(config, examples, display)
    assert frequencies is not None
    names = [gold.name for gold in examples[0].golds]
    prior = dict(zip(names, frequencies.tolist(), strict=True))
    torch.manual_seed(0)
    found = slots.nats_of_answers(opened, examples, prior)
    assert found["model"].shape == (8, 3)
    assert (found["model"].mean(axis=0) < 0.5 * found["prior"].mean(axis=0)).all()
    np.testing.assert_allclose(found["model"] - found["prior"], found["model - prior"])


# ---------------------------------------------------------------------- what the model knows


def rated_sets():
    """Of two questions a set each, whose confidences say nothing of the masses; the last is a repeat."""
    sets = []
    for masses in ((0.8, 0.1, 0.0), (0.1, 0.8, 0.0)):
        whole = a_set(("flu", "cold", "flu"), (0.5, 0.5, 0.5))
        sets.append(replace(whole, mass=masses, repeated=(False, False, True)))
    return [Item(str(i), 1, False, 0.9, 9, (one,)) for i, one in enumerate(sets)]


def test_exact_ratings_are_the_masses_and_a_repeat_is_worth_nothing():
    exact = known.rated_exactly(rated_sets())
    assert [item.sets[0].confidences for item in exact] == [(0.8, 0.1, 0.0), (0.1, 0.8, 0.0)]
    broken = Item("1", 1, False, 0.9, 9, (a_set(("flu",), (None,), reason="no_answer"),))
    assert known.rated_exactly([broken]) == [broken]


def test_a_repeat_and_what_is_no_condition_are_worth_nothing_by_name():
    # A condition counts whatever its probability is.
    item = rated_sets()[0]
    whole = replace(item.sets[0], mass=(0.0, 0.1, 0.0))
    (by_name,) = known.rated_by_name([replace(item, sets=(whole,))], ["Flu", "gout"])
    assert by_name.sets[0].confidences == (0.5, 0.0, 0.0)


def test_the_mean_confidence_is_of_whole_sets():
    whole = a_set(("flu", "cold"), (0.5, 0.25))
    broken = a_set(("flu", None), (0.9, None), reason="no_answer")
    assert known.mean_confidence([Item("1", 1, False, None, 9, (whole, broken))]) == 0.375


def test_the_spread_is_about_the_mean_of_each_slot():
    """One number a slot has none, however far the slots lie apart."""
    alike = [Item("1", 1, False, None, 9, (a_set(("flu", "cold"), (0.5, 0.25)),)) for _ in range(2)]
    assert known.spread_in_slots(alike) == 0.0
    other = Item("2", 1, False, None, 9, (a_set(("flu", "cold"), (0.7, 0.25)),))
    # Variances 0.01 and 0.
    assert known.spread_in_slots([alike[0], other]) == pytest.approx(0.005**0.5)


def test_ratings_are_compared_with_the_confidences_as_written():
    written = rated_sets()
    exact = known.rated_exactly(written)
    found = known.compared({known.WRITTEN: written, known.EXACT: exact})
    assert found[known.WRITTEN]["auroc"][0] == pytest.approx(0.5)
    assert found[known.EXACT]["ece"][0] == pytest.approx(0.0)
    gain = found[known.EXACT]["auroc"][0] - 0.5
    assert gain > 0.2
    assert found[known.EXACT]["auroc - written"][0] == pytest.approx(gain)
    assert "auroc - written" not in found[known.WRITTEN]
