"""What a person sees of a run: lines that fit, a bar for whatever takes long, and last lines that say
what to do next."""

import io
import json
import os
import re
from pathlib import Path

import pytest
from rich.console import Console

from mar.run import console, summary
from mar.run.console import Display, clock, folded, hint_where_busy, progress_line

METRICS = {
    "reward": "0.542",
    "coverage": "0.609",
    "ece": "0.163",
    "format": "0.992",
    "tok/s": "2,027",
}


def line(width: int) -> str:
    return progress_line("step 120/200", METRICS, "0:31 left", width, done=0.6)


@pytest.mark.parametrize("width", range(12, 130))
def test_a_line_fits_and_nothing_in_it_is_cut(width: int) -> None:
    said = line(width)
    assert len(said) <= width
    whole = {"step 120/200", "0:31 left", *(f"{name} {value}" for name, value in METRICS.items())}
    parts = said.split("  ")
    assert parts[0] == "step 120/200"
    assert all(part in whole or set(part) <= set("━╌") for part in parts)


def test_what_matters_most_is_left_out_last() -> None:
    order = ["reward", "coverage", "left", "ece", "format", "tok/s"]
    first_width = []
    for word in order:
        first_width.append(min(width for width in range(12, 140) if word in line(width)))
    assert first_width == sorted(first_width) and len(set(first_width)) == len(order)
    # At 80 columns, and at 60, the four that matter are there.
    for width in (80, 60):
        assert all(word in line(width) for word in ("step", "reward", "coverage", "0:31 left"))
    # The time left stands last, wherever it is said.
    assert line(60).endswith("0:31 left") and line(200).endswith("0:31 left")


EVAL = "eval after (40 items, 1 s)  coverage@3 0.685  top1 0.415  ece 0.208  format_rate 1.000"
GAP_LINE = "gap closed: 0.053  (0: K draws from the posterior, 1: its K most probable answers)"
COMMAND = (
    "  python -m mar.report runs/a/long/name/of/a/folder   # one HTML file: curves, completions"
)
PROSE = "clinic: 96 training and 40 held-out prompts; writing to /a/long-path/without/a/space/in-it"


@pytest.mark.parametrize("width", [60, 80, 200])
@pytest.mark.parametrize("text", [EVAL, GAP_LINE, COMMAND, PROSE])
def test_a_line_that_is_said_is_folded_between_its_parts(text: str, width: int) -> None:
    lines = folded(text, width).split("\n")
    assert all(len(line) <= width for line in lines)
    assert " ".join(folded(text, width).split()) == " ".join(text.split())
    assert all(line.startswith("  ") for line in lines[1:])
    for whole in ("coverage@3 0.685", "format_rate 1.000", COMMAND.split("   ")[0], "# one HTML"):
        assert (whole in text) == any(whole in line for line in lines)


def test_what_a_person_copies_is_never_broken() -> None:
    command = "  python -m mar.ask runs/" + 60 * "x"
    assert folded(f"{command}   # ask it", 60) == f"{command}\n    # ask it"
    assert folded("wrote " + 80 * "x", 60) == "wrote\n  " + 80 * "x"


def test_the_bar_shows_the_share() -> None:
    said = progress_line("eval 5/10", {}, "", 60, done=0.5)
    assert said.count("━") == said.count("╌") == 20


def test_times() -> None:
    assert [clock(s) for s in (0, 59.6, 65, 7265)] == ["0:00", "1:00", "1:05", "2:01:05"]


def live_display(width: int) -> tuple[Display, io.StringIO]:
    display = Display("rich", 0, 4)
    out = io.StringIO()
    display.console = Console(file=out, force_terminal=True, width=width)
    return display, out


def test_phases_have_a_bar_alone_and_beside_the_steps() -> None:
    display, out = live_display(60)
    with display.counting("eval before", 3) as tick:
        for _ in range(3):
            tick("whatever", "comes")
    assert "eval before 0/3" in out.getvalue()
    with display.counting("nothing left", 0):
        pass
    assert "nothing left" not in out.getvalue()
    with display:
        display.step(1, {"reward/total": 0.25})
        with display.counting("eval step 1", 2) as tick:
            tick()
            assert display.progress is not None
            display.progress.refresh()
        assert [task.description for task in display.progress.tasks] == ["step"]
    said = out.getvalue()
    assert "eval step 1 1/2" in said and "left" in said and "step 1/4" in said


def test_plain_output_has_no_bar(capsys: pytest.CaptureFixture[str]) -> None:
    display = Display("plain", 0, 4)
    with display.counting("eval before", 3) as tick:
        tick()
    assert capsys.readouterr().out == ""


DOCUMENT = {"task": "clinic", "num_items": 4, "before": {"top1": 0.5}, "after": {"top1": 0.6}}


@pytest.mark.parametrize("terminal", [True, False])
def test_the_last_line_is_a_document_or_on_a_terminal_its_file(
    terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(summary.sys.stdout, "isatty", lambda: terminal, raising=False)
    folder = Path("runs/a b/seed0")
    summary.close(DOCUMENT, 3, folder, Display("plain", 0, 1), 1.0, lambda _: {})
    lines = capsys.readouterr().out.splitlines()
    if terminal:
        assert lines[-1].endswith(str(folder / "eval.json"))
        assert not any(line.startswith("{") for line in lines)
    else:
        assert json.loads(lines[-1])["after"]["top1"] == 0.6
    # Commands that a shell takes as they stand.
    for command in ("ask", "show", "report"):
        assert any(f"python -m mar.{command} 'runs/a b/seed0'" in line for line in lines)


def test_a_busy_machine_gets_one_hint(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(console.os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    display = Display("plain", 0, 1)

    def said(load: float, device: str = "cpu", threads: int | None = None) -> str:
        monkeypatch.setattr(console.os, "getloadavg", lambda: (load, 0.0, 0.0))
        hint_where_busy(display, device, threads)
        return capsys.readouterr().out

    assert said(3.5) == (
        "this machine is busy (load 3.5 on 2 cores): model.threads=1 may be faster\n"
    )
    assert said(1.9) == said(3.5, "cuda") == said(3.5, threads=1) == ""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert said(3.5) == ""
    assert os.environ["OMP_NUM_THREADS"] == "1"


def test_a_table_fits_and_is_whole_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    columns = {name: {"repeats_per_set": [0.5, 0.4, 0.6]} for name in ("policy", "base", "single")}
    columns |= dict.fromkeys(("prompted_k", "verbalized"), columns["base"])
    display, out = live_display(80)
    display.table("end", columns, ["repeats_per_set"])
    lines = out.getvalue().splitlines()
    # One line for each row, with every number beside its interval.
    assert len(lines) == 3 and lines[2].count("0.500 ±0.100") == 5
    Display("plain", 0, 0).table("end", columns, ["repeats_per_set"])
    assert capsys.readouterr().out.count("0.500 ±0.100") == 5


@pytest.mark.parametrize(("width", "num_tables"), [(60, 1), (40, 2), (26, 4)])
def test_the_names_of_a_narrow_table_stay_whole(width: int, num_tables: int) -> None:
    arms = ("policy", "base", "single", "prompted_k", "verbalized")
    display, out = live_display(width)
    display.table("end", {arm: {"coverage@3": [0.7, 0.6, 0.8]} for arm in arms}, ["coverage@3"])
    lines = re.sub(r"\x1b\[\d+m", "", out.getvalue()).splitlines()
    words = [word for line in lines for word in line.split()]
    assert all(words.count(arm) == 1 for arm in arms)
    assert words.count("coverage@3") == num_tables and words.count("0.700") == len(arms)
    assert all(len(line.rstrip()) <= width for line in lines)
