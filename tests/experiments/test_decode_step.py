"""What two more layers cost: which work is timed, and what the ratio is of."""

import sys

import pytest

from experiments.embedded_model import decode_step


def test_the_prompts_are_left_out_of_a_step(monkeypatch):
    prompts_s, token_s = 3.0, 0.25
    monkeypatch.setattr(
        decode_step, "run_seconds", lambda model, max_tokens, seed: prompts_s + max_tokens * token_s
    )
    assert decode_step.step_seconds(None, seed=0) == pytest.approx(token_s)


def test_a_run_is_128_rows_of_the_asked_length(monkeypatch):
    cases = []
    monkeypatch.setattr(decode_step, "run_ours", lambda model, case, seed: cases.append(case))
    decode_step.run_seconds(None, 8, seed=0)
    (case,) = cases
    assert (case.num_rows, case.max_tokens) == (128, 8)
    assert case.limits is None and case.stop_id is None


def test_the_ratio_is_of_the_model_that_ships_to_the_one_before(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["decode_step", "--runs", "2"])
    found = iter([9.0, 1.0, 0.003, 0.002, 0.005, 0.002])  # the first two warm up
    monkeypatch.setattr(decode_step, "step_seconds", lambda model, seed: next(found))
    decode_step.main()
    printed = capsys.readouterr().out.splitlines()[-3:]
    assert [line.split() for line in printed[:2]] == [
        ["ships", "4.00", "ms", "a", "step"],
        ["four_layers", "2.00", "ms", "a", "step"],
    ]
    assert printed[2].split() == ["ratio", "2.00", "(1.50", "to", "2.50)"]
