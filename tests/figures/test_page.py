"""The report, in a real browser where there is one: every view works, no console error, no word
of a model becomes markup. Then `mar.show`."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

pytest.importorskip("matplotlib", reason="figures need matplotlib: pip install 'mar[eval]'")
from mar import evaluate, show
from mar import report as report_command
from mar.errors import UserError
from mar.figures import plots
from mar.figures.page import fill_template, write_report
from mar.figures.runs import Run, over_seeds, read_run
from mar.run.compose import compose
from mar.run.console import Display
from mar.train import run

CHROMIUM = next(
    (
        found
        for name in ("chromium", "chromium-browser", "google-chrome")
        if (found := shutil.which(name))
    ),
    None,
)
EVIL = (
    "</script><script>document.title='owned'</script>"
    "<img src=x onerror=document.title='owned'>\u2028<!--"
)


def train(out: Path, *more: str) -> Path:
    words = [
        "+experiment=clinic",
        "train.steps=3",
        "algo=rloo",
        "algo.group_size=3",
        "algo.prompts_per_step=2",
        "eval.num_items=6",
        "checkpoint.every=3",
    ]
    config = compose([*words, f"out={out}", "logger.console=plain", *more])
    assert run(config) == 0
    return Path(config.run_dir)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A run with an evaluation and two wicked completions, another seed, and another setting."""
    out = tmp_path_factory.mktemp("runs")
    first = train(out / "a", "eval.every=2")
    evaluate.run(
        [str(first), "eval.num_items=6", "k=6", "num_answers=1..2"], Display("plain", 0, 0)
    )
    rows = [json.loads(line) for line in (first / "completions.jsonl").read_text().splitlines()]
    wicked = [i for i, row in enumerate(rows) if row["stage"] == "train" and row["step"] == 3][:2]
    for i, reason in zip(wicked, (None, "trailing_text"), strict=True):
        rows[i] |= {
            "text": f"<answer1>{EVIL}</answer1>",
            "answers": [EVIL, EVIL, None],
            "confidences": [0.9, 0.1, None],
            "reason": reason,
        }
        rows[i] |= {
            "hits": [0, 0, 0],
            "repeated": [False, True, False],
            "question": EVIL,
            "targets": [EVIL],
        }
    (first / "completions.jsonl").write_text(
        "".join(json.dumps(r) + "\n" for r in rows) + '{"step": 3, "te'
    )
    return [first, train(out / "a", "seed=1"), train(out / "b", "reward=multi_rlvr")]


@pytest.fixture(scope="module")
def page(runs: list[Path]) -> Path:
    return write_report([runs[0]], None)


def data_of(file: Path) -> dict:
    text = file.read_text(encoding="utf-8")
    return json.loads(
        re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)[1]
    )


def table(data: dict, title: str) -> dict:
    return next(t for t in data["tables"] if t["title"] == title)


class Scripts(HTMLParser):
    """Counts elements as a browser would: a script that the data opened would be one more."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for key, value in attrs if key in ("src", "href")]


def test_a_run_is_one_file_that_needs_nothing_else(runs: list[Path], page: Path) -> None:
    elements, data = Scripts(page.read_text(encoding="utf-8")), data_of(page)
    assert elements.tags.count("script") == 2 and "img" not in elements.tags
    assert all(link.startswith(("#", "data:")) for link in elements.links)
    assert any("Skipped 1 broken line(s)" in note for note in data["notes"])
    assert set(data["figures"]) == {
        "learning curves",
        "reward components",
        "coverage",
        "reliability",
        "sizes",
        "unique_answers",
        "tokens",
    }
    head = table(data, "Headline")
    assert head["columns"] == ["", "floor", "before", "after", "ceiling"]
    stored = json.loads((runs[0] / "eval.json").read_text())
    cover = dict(zip(head["columns"], head["rows"][0], strict=True))
    assert cover["after"] == [
        stored["after"]["coverage@3"],
        *stored["after"]["interval"]["coverage@3"],
    ]
    assert cover["floor"] == [stored["floor"]["coverage@3"], None, None]
    assert cover["after"][1] < cover["after"][2]
    assert table(data, "Evaluation")["columns"][1:] == [
        "policy",
        "base",
        "single",
        "prompted_k",
        "verbalized",
    ]
    paired = [name for name, *_ in table(data, "Paired differences")["rows"]]
    assert len(paired) > 10
    assert "num_items" not in paired
    assert len(table(data, "Coverage at equal tokens")["rows"]) == 2
    assert "commit" in data["provenance"]
    assert "num_answers: 3" in data["configs"][str(runs[0])]


def test_rollouts_carry_advantages_and_named_components(page: Path) -> None:
    rollouts = data_of(page)["rollouts"]
    assert rollouts["components"] == [
        "coverage1",
        "brier1",
        "coverage2",
        "brier2",
        "coverage3",
        "brier3",
        "end",
    ]
    assert [len(group["rows"]) for group in rollouts["groups"]] == [3] * 6
    assert {group["step"] for group in rollouts["groups"]} == {1, 2, 3}
    for group in rollouts["groups"]:
        totals = [sum(row["components"]) for row in group["rows"]]
        for row, total in zip(group["rows"], totals, strict=True):
            assert row["reward"] == pytest.approx(total, abs=1e-4)
            starts = [start for start, _ in row["advantages"]]
            assert starts == sorted(set(starts)) and starts[0] == 0
            # The first token is credited with everything, against the mean of the other two rows.
            others = (sum(totals) - total) / 2
            first_advantage = row["advantages"][0][1]
            # Three digits are kept.
            assert first_advantage == pytest.approx(total - others, abs=2e-3, rel=5e-3)


def test_a_pair_shows_what_differs(runs: list[Path], tmp_path: Path) -> None:
    pair = data_of(write_report([runs[0], runs[2]], tmp_path / "pair.html"))
    assert table(pair, "What differs")["rows"] == [
        ["eval.every", "2", "0"],
        ["reward.objective", "multi_rlcr", "multi_rlvr"],
    ]
    assert set(pair["figures"]) >= {"learning curves", "coverage"}
    assert pair["rollouts"] is None


def seeds_of_settings(folder: Path, out: Path) -> list[int]:
    """The number of finished seeds of each setting in the report of a folder."""
    settings = table(data_of(write_report([folder], out)), "Settings")
    return [row[settings["columns"].index("n")] for row in settings["rows"]]


def test_a_folder_of_runs_has_a_line_for_each_setting(runs: list[Path], tmp_path: Path) -> None:
    # All three differ: eval.every is not the same in the two seeds.
    assert seeds_of_settings(runs[1].parents[2], tmp_path / "sweep.html") == [1, 1, 1]


def test_a_seed_counts_once(runs: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / "again"
    report = tmp_path / "again.html"
    shutil.copytree(runs[1], folder / "seed1")
    shutil.copytree(runs[1], folder / "seed1~1")
    assert seeds_of_settings(folder, report) == [1]
    # A run that has just begun, and what wandb keeps below a run.
    for other in ("seed2", "seed1/wandb/files"):
        (folder / other).mkdir(parents=True)
        (folder / other / "config.yaml").write_text("wandb: 1\n")
    assert seeds_of_settings(folder, report) == [1]
    # Of an unfinished and a finished run of one seed, the finished one counts.
    (folder / "seed1/eval.json").unlink()
    assert seeds_of_settings(folder, report) == [1]


def finished(x: float) -> Run:
    return Run(Path(), {}, [], {"after": {"x": x}}, {}, [])


def test_the_interval_over_seeds_is_students(runs: list[Path]) -> None:
    same = [read_run(folder) for folder in (runs[1], runs[1])]
    mean, low, high = over_seeds(same, "top1")
    assert mean == low == high == same[0].document["after"]["top1"]
    # Two seeds: t = 12.71, standard error 1. Twenty-one: t = 2.086, standard error 1.354.
    two = [finished(x) for x in (1.0, 3.0)]
    assert over_seeds(two, "x") == pytest.approx([2, 2 - 12.71, 2 + 12.71])
    many = [finished(float(x)) for x in range(21)]
    half = 2.086 * 1.354
    assert over_seeds(many, "x") == pytest.approx([10, 10 - half, 10 + half], abs=0.01)


# What a person does on the page; what is seen after each click goes into an attribute of the body.
CLICKS = """<script>
addEventListener('load', () => {
  const seen = [];
  const count = (what) => document.querySelectorAll(what).length;
  const look = (name) => seen.push(name + ':' + count('#prompts button') + ':' + count('.card'));
  look('all');
  for (const id of ['failed', 'repeats', 'over']) {
    const box = document.getElementById(id);
    box.click();
    look(id);
    box.click();
  }
  const find = document.getElementById('find');
  find.value = 'onerror';
  find.dispatchEvent(new Event('input'));
  look('find');
  document.querySelectorAll('#prompts button')[0].click();
  seen.push('marks:' + count('pre .wrong') + ':' + count('li .repeated'));
  const shaded = [...document.querySelectorAll('pre span')].filter(
    (span) => span.style.background && span.title.includes('coverage1'));
  seen.push('shades:' + shaded.length);
  find.value = 'zzz';
  find.dispatchEvent(new Event('input'));
  look('none');
  document.querySelectorAll('details').forEach((details) => { details.open = true; });
  const images = [...document.images];
  const drawn = images.filter((image) => image.naturalWidth > 100);
  seen.push('images:' + images.length + ':' + drawn.length);
  seen.push('title:' + document.title);
  const root = document.documentElement;
  seen.push('wide:' + (root.scrollWidth - root.clientWidth));
  document.body.dataset.seen = seen.join(' | ');
});
</script>"""


@pytest.mark.parametrize("width", [1280, 500])
def test_in_a_browser(width: int, page: Path, tmp_path: Path) -> None:
    if CHROMIUM is None:
        pytest.skip("no chromium here: apt-get install chromium")
    file = tmp_path / "report.html"
    file.write_text(
        page.read_text(encoding="utf-8").replace("</body>", CLICKS + "</body>"), encoding="utf-8"
    )
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--virtual-time-budget=8000",
        "--enable-logging=stderr",
        f"--window-size={width},900",
    ]
    done = subprocess.run(
        [
            CHROMIUM,
            *options,
            f"--user-data-dir={tmp_path / 'profile'}",
            "--dump-dom",
            file.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert "CONSOLE" not in done.stderr, re.findall(r".*CONSOLE.*", done.stderr)
    seen = re.search(r'data-seen="([^"]*)"', done.stdout)[1].split(" | ")
    found = dict(step.split(":", 1) for step in seen)
    assert found["all"] == "6:3"
    assert found["failed"] == "1:3"
    assert int(found["repeats"].split(":")[0]) >= 1
    assert int(found["over"].split(":")[0]) >= 1
    assert found["find"] == "1:3"
    assert "0" not in found["marks"].split(":")
    assert int(found["shades"]) >= 7
    assert found["none"] == "0:0"
    assert found["images"] == "7:7"
    assert found["title"].startswith("mar: ")
    assert found["wide"] == "0"


@pytest.mark.parametrize("name", ["script", "quote"])
def test_no_text_leaves_its_element(name: str, tmp_path: Path) -> None:
    text = {"script": "</SCRIPT >", "quote": "\"'`${x}&lt;\ud800"}[name]
    fill_template({"title": text}, tmp_path / "r.html")
    written = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert Scripts(written).tags.count("script") == 2 and "</SCRIPT" not in written
    assert data_of(tmp_path / "r.html")["title"] == text.replace("\ud800", "?")


def test_figures_are_files_that_open(runs: list[Path], tmp_path: Path) -> None:
    from PIL import Image

    document = json.loads((runs[0] / "evaluation.json").read_text())
    figures = {
        "tokens": plots.tokens_per_answer(document["arms"]),
        "components": plots.of_run(runs[0])["components"],
    }
    figures["reliability"] = plots.reliability({"policy": document["arms"]["policy"]})
    plots.save(figures, tmp_path)
    # All are drawn in one style.
    all_axes = [axes for figure in figures.values() for axes in figure.axes]
    assert not any(axes.spines["top"].get_visible() for axes in all_axes)
    for name in figures:
        ElementTree.parse(tmp_path / f"{name}.svg")
        with Image.open(tmp_path / f"{name}.png") as image:
            assert len(image.convert("L").resize((40, 40)).getcolors() or []) > 1
    before = (tmp_path / "tokens.svg").read_bytes()
    plots.save({"tokens": plots.tokens_per_answer(document["arms"])}, tmp_path)
    assert (tmp_path / "tokens.svg").read_bytes() == before  # the same figure is the same file
    document["arms"]["policy"]["tokens"][0] += 10
    plots.save({"tokens": plots.tokens_per_answer(document["arms"])}, tmp_path)
    assert (tmp_path / "tokens.svg").read_bytes() != before


def test_running_mean() -> None:
    values = np.array([1.0, np.nan, 3.0] + [5.0] * 17)
    assert plots.smoothed(values)[:5].tolist() == [1, 1, 3, 4, 5]
    assert np.isnan(plots.smoothed(np.array([np.nan, 2.0]))[0])


def faults(tmp_path: Path, good: Path) -> dict[str, tuple[list[Path], str]]:
    for name in ("empty", "young", "damaged", "old"):
        (tmp_path / name).mkdir()
    for name in ("young", "damaged"):
        (tmp_path / name / "config.yaml").write_text((good / "config.yaml").read_text())
    (tmp_path / "old/config.yaml").write_text("K: 3\n")
    shutil.copy(good / "metrics.jsonl", tmp_path / "damaged")
    (tmp_path / "damaged/eval.json").write_text("{")
    return {
        "nowhere": ([tmp_path / "nowhere"], "is not there"),
        "empty": ([tmp_path / "empty"], "holds no run"),
        "pair with nothing": ([good, tmp_path / "empty"], "no config.yaml"),
        "no step": ([tmp_path / "young"], "not finished a step"),
        "half a document": ([tmp_path / "damaged"], "damaged"),
        "another version": ([tmp_path / "old"], "another version"),
        "three": ([good, good, good], "one run, one folder"),
    }


def test_mistakes_are_one_sentence(
    tmp_path: Path, runs: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    for name, (paths, expected) in faults(tmp_path, runs[0]).items():
        assert report_command.main([*map(str, paths), f"out={tmp_path}"]) == 2, name
        said = capsys.readouterr().err
        assert said.startswith("error: ") and said.count("\n") == 1 and expected in said, (
            name,
            said,
        )
    assert not (tmp_path / "r.html").exists()


def test_an_unfinished_run_says_so(tmp_path: Path) -> None:
    folder = train(tmp_path, "train.stop_at=2", "eval.every=1")
    data = data_of(write_report([folder], None))
    assert any("unfinished: step 2 of 3" in note for note in data["notes"])
    assert table(data, "Headline")["columns"] == ["", "floor", "before", "latest", "ceiling"]


def test_sizes_beyond_the_known_bars_are_drawn_without_them() -> None:
    arms = {
        f"K={k}": {
            "num_answers": k,
            "metrics": {f"coverage@{k}": [0.5, 0.4, 0.6], "tokens_per_set": [9.0, 8, 10]},
        }
        for k in (1, 2, 6)
    }
    figure = plots.size_sweep(arms, {"k": [1, 2], "floor": [0.1, 0.2], "ceiling": [0.8, 0.9]})
    floor = next(line for line in figure.axes[0].get_lines() if line.get_label() == "floor")
    known = list(floor.get_ydata())
    assert known[:2] == [0.1, 0.2] and np.isnan(known[2])


def test_every_arm_has_a_look_of_its_own() -> None:
    names = (
        "policy",
        "base",
        "single",
        "prompted_k",
        "verbalized",
        "sampled_k",
        "K=2",
        "multi_rlcr",
    )
    looks = {name: look for name, _, look in plots._with_looks(dict.fromkeys(names, {}))}
    assert len({tuple(sorted(look.items())) for look in looks.values()}) == len(names)
    alone = {name: look for name, _, look in plots._with_looks({"single": {}, "multi_rlcr": {}})}
    assert all(looks[name] == alone[name] for name in alone), (
        "a method looks the same in every figure"
    )


def test_show(runs: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    rows = [json.loads(line) for line in (runs[1] / "completions.jsonl").read_text().splitlines()]
    last = [row for row in rows if row["step"] == 3 and row["stage"] == "train"]
    assert show.main([str(runs[1])]) == 0
    said = capsys.readouterr().out
    assert (
        all(row["id"] in said for row in last)
        and said.count("reward ") == len(last)
        and "coverage +" in said
    )
    assert said.endswith(
        f"others: python -m mar.show {runs[1]} step=... prompt=..., up to step 3\n"
    )
    assert show.main([str(runs[1]), "step=0", "prompt=000004"]) == 0
    said = capsys.readouterr().out
    assert "clinic-test-000004" in said and "clinic-test-000003" not in said
    assert show.main([str(runs[0]), "step=3"]) == 0
    said = capsys.readouterr().out
    assert (
        "\\x2028" in said
        and "\u2028" not in said
        and "Skipped 1 broken line(s)" in " ".join(said.split())
    )
    for words, expected in (
        (["step=9"], "steps [0] to [3]"),
        (["step=3", "prompt=nobody"], "'nobody'"),
    ):
        assert show.main([str(runs[1]), *words]) == 2
        assert expected in capsys.readouterr().err
    assert show.main([str(runs[1].parent)]) == 2
    assert "runs: name one of them" in capsys.readouterr().err


def test_show_marks_what_is_right(tmp_path: Path) -> None:
    row = {
        "answers": ["flu", "flu", "\x1b[31mx"],
        "hits": [1, 0, 0],
        "repeated": [False, True, False],
        "confidences": [0.5, None, 0.25],
    }
    row |= {
        "reason": None,
        "text": "<think>a\x1b</think><answer1>",
        "reward": 1.0,
        "parts": {"format": 0.5},
        "sample": 0,
    }
    text = show.render_completion(row)
    assert [show.verdict(row, k) for k in range(3)] == ["right", "repeated", "wrong"]
    assert (
        "\x1b" not in text.plain
        and "a\\x1b" in text.plain
        and {"not bold bold green", "not bold red", "not bold magenta"}
        <= {s.style for s in text.spans}
    )
    assert show.verdict(row | {"reason": "unfinished"}, 0) == "wrong"
    (tmp_path / "completions.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(UserError, match="another version"):
        show.show(tmp_path, None, "", None)


def test_every_logged_reward_term_is_drawn_without_being_listed() -> None:
    rows = [
        {"step": 1, "policy/loss": 0.1, "reward/total": 1.0, "reward/format": 0.5},
        {"step": 2, "reward/total": 1.2, "reward/mine": 0.2, "reward/repeats": 0.0},
    ]
    labels = [text.get_text() for text in plots.components(rows).legends[0].get_texts()]
    assert labels == ["reward/total", "reward/format", "reward/mine"]
