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
from matplotlib.backends.backend_agg import FigureCanvasAgg

from mar import evaluate, show
from mar import report as report_command
from mar.errors import UserError
from mar.figures import plots
from mar.figures.curves import curves_of_task
from mar.figures.page import fill_template, write_report
from mar.figures.runs import Run, group_by_setting, group_by_task, over_seeds, read_run, short_names
from mar.figures.tables import settings_table, settings_that_differ
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
    (section,) = data["tasks"]
    arms = ("policy", "base", "single", "prompted_k", "verbalized")
    assert set(section["figures"]) == {
        "reward terms",
        "coverage at equal answers",
        "coverage at equal tokens",
        *(f"reliability of {arm}" for arm in arms),
        "coverage of one set",
        "tokens of one set",
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
    (side,) = rollouts["sides"]
    assert side["components"] == [
        "coverage1",
        "brier1",
        "coverage2",
        "brier2",
        "coverage3",
        "brier3",
        "end",
    ]
    groups = [(group, *group["sides"]) for group in rollouts["groups"]]
    assert [len(rows) for _, rows in groups] == [3] * 6
    assert {group["step"] for group in rollouts["groups"]} == {1, 2, 3}
    for _, rows in groups:
        totals = [sum(row["components"]) for row in rows]
        for row, total in zip(rows, totals, strict=True):
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
    (section,) = pair["tasks"]
    assert "coverage at equal tokens" in section["figures"]
    settings = section["curves"]["settings"]
    # Full names; what makes the runs differ and no more.
    assert [setting["name"] for setting in settings] == [
        "eval.every=2, reward.objective=multi_rlcr",
        "eval.every=0, reward.objective=multi_rlvr",
    ]


def test_rollouts_of_a_pair_stand_side_by_side(runs: list[Path], tmp_path: Path) -> None:
    rollouts = data_of(write_report([runs[0], runs[2]], tmp_path / "pair.html"))["rollouts"]
    assert [side["run"] for side in rollouts["sides"]] == list(
        short_names(read_run(runs[0]), read_run(runs[2]))
    )
    # Each reward has its own components.
    assert "brier1" in rollouts["sides"][0]["components"]
    assert "brier1" not in rollouts["sides"][1]["components"]
    stages = [(group["stage"], group["step"]) for group in rollouts["groups"]]
    # The same seed asks the same questions: all training groups, and the last held-out questions.
    assert stages.count(("eval", 3)) == 6 and stages[:6] == [("eval", 3)] * 6
    assert len(stages) == 6 + 3 * 2
    stored = []
    for run_folder in (runs[0], runs[2]):
        text = (run_folder / "completions.jsonl").read_text()
        lines = [line for line in text.splitlines() if line.endswith("}")]
        stored.append([json.loads(line) for line in lines])
    for group in rollouts["groups"]:
        for rows, all_rows in zip(group["sides"], stored, strict=True):
            expected = [
                row["text"]
                for row in all_rows
                if (row["stage"], row["step"], row["id"])
                == (group["stage"], group["step"], group["id"])
            ]
            assert [row["text"] for row in rows] == expected


def seeds_of_settings(folder: Path, out: Path) -> list[int]:
    """The number of finished seeds of each setting in the report of a folder."""
    settings = table(data_of(write_report([folder], out)), "Settings (clinic)")
    return [row[settings["columns"].index("n")] for row in settings["rows"]]


def test_a_folder_of_runs_has_a_line_for_each_setting(runs: list[Path], tmp_path: Path) -> None:
    # All three differ: eval.every is not the same in the two seeds.
    assert seeds_of_settings(runs[1].parents[2], tmp_path / "sweep.html") == [1, 1, 1]


def test_several_runs_are_as_a_folder_of_them(runs: list[Path], tmp_path: Path) -> None:
    data = data_of(write_report([*runs, runs[0].parent], tmp_path / "several.html"))
    settings = table(data, "Settings (clinic)")
    assert len(data["configs"]) == len(set(runs)) == 3
    assert [row[settings["columns"].index("n")] for row in settings["rows"]] == [1, 1, 1]


def test_names_of_two_runs_leave_out_what_is_above_both() -> None:
    def names(a: str, b: str) -> tuple[str, str]:
        return short_names(Run(Path(a), {}, [], {}, {}, []), Run(Path(b), {}, [], {}, {}, []))

    assert names("runs/a/long/seed0", "runs/a/long/seed1") == ("seed0", "seed1")
    assert names("runs/a/seed0", "runs/b/seed0") == ("a/seed0", "b/seed0")
    assert names("seed0", "/runs/seed0") == ("seed0", "/runs/seed0")
    assert names("runs", "runs/seed0") == ("runs", "runs/seed0")


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
    # A rate is between 0 and 1, a count is not below 0, and so are their intervals.
    rates = [Run(Path(), {}, [], {"after": {"format_rate": x}}, {}, []) for x in (0.98, 1.0)]
    assert over_seeds(rates, "format_rate")[1:] == pytest.approx([0.99 - 0.127, 1.0], abs=1e-3)
    counts = [Run(Path(), {}, [], {"after": {"repeats_per_set": x}}, {}, []) for x in (0.0, 2.0)]
    assert over_seeds(counts, "repeats_per_set")[1:] == pytest.approx([0.0, 1 + 12.71])
    # Of several right golds each counts.
    sums = [Run(Path(), {}, [], {"after": {"coverage@3": x}}, {}, []) for x in (1.8, 1.9)]
    assert over_seeds(sums, "coverage@3") == pytest.approx(
        [1.85, 1.85 - 0.635, 1.85 + 0.635], abs=1e-3
    )
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
  const panels = count('figure.curve');
  const box = document.querySelector('.chooser input[value="policy/entropy"]');
  box.click();
  seen.push('panels:' + panels + ':' + count('figure.curve') + ':' + count('.chooser input'));
  const steps = [...document.querySelectorAll('text.step')].map((text) => text.textContent);
  seen.push('steps:' + [...new Set(steps)].sort().join(','));
  seen.push('dots:' + (count('circle.dot') > 0) + ':' + (count('circle.held-out') > 0));
  seen.push('key:' + document.querySelector('.legend').textContent.includes('held-out questions'));
  find.value = 'zzz';
  find.dispatchEvent(new Event('input'));
  look('none');
  document.querySelectorAll('details').forEach((details) => { details.open = true; });
  const images = [...document.images];
  const drawn = images.filter((image) => image.naturalWidth > 100);
  seen.push('images:' + images.length + ':' + drawn.length);
  seen.push('title:' + document.title);
  const wide = [document.documentElement, ...document.querySelectorAll('section, .scroll, pre')];
  seen.push('wide:' + wide.filter((e) => e.scrollWidth > e.clientWidth + 1).length);
  const shrunk = drawn.map((image) => image.clientWidth / image.naturalWidth);
  seen.push('scale:' + Math.min(...shrunk));
  parent.postMessage(seen.join(' | '), '*');
});
</script>"""


# A window has 500 pixels at least; a frame in it can be as narrow as a telephone.
FRAME = """<!doctype html><script>
addEventListener('message', (event) => {{ document.body.dataset.seen = event.data; }});
</script><body><iframe src="{uri}" style="width: {width}px; height: 900px; border: 0"></iframe>"""


@pytest.mark.parametrize("width", [1280, 400])
def test_in_a_browser(width: int, page: Path, tmp_path: Path) -> None:
    if CHROMIUM is None:
        pytest.skip("no chromium here: apt-get install chromium")
    file = tmp_path / "report.html"
    file.write_text(
        page.read_text(encoding="utf-8").replace("</body>", CLICKS + "</body>"), encoding="utf-8"
    )
    frame = tmp_path / "frame.html"
    frame.write_text(FRAME.format(uri=file.as_uri(), width=width))
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--virtual-time-budget=8000",
        "--enable-logging=stderr",
        "--window-size=1400,900",
    ]
    done = subprocess.run(
        [
            CHROMIUM,
            *options,
            f"--user-data-dir={tmp_path / 'profile'}",
            "--dump-dom",
            frame.as_uri(),
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
    assert found["images"] == "12:12"
    assert found["title"].startswith("mar: ")
    # Every logged metric can be chosen, and is drawn when it is.
    shown, then, boxes = map(int, found["panels"].split(":"))
    logged = data_of(page)["tasks"][0]["curves"]["metrics"]
    assert (then, boxes) == (shown + 1, len(logged))
    assert found["steps"] == "0,1,2,3"
    assert found["dots"] == "true:true"
    assert found["key"] == "true"
    # Nothing scrolls sideways, and no figure is shrunk until it cannot be read.
    assert found["wide"] == "0"
    assert float(found["scale"]) > 0.8


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
    for name in ("empty", "young", "damaged", "deep", "stepless", "old", "history", "half"):
        (tmp_path / name).mkdir()
    for name in ("young", "damaged", "deep", "stepless", "history", "half"):
        (tmp_path / name / "config.yaml").write_text((good / "config.yaml").read_text())
    (tmp_path / "old/config.yaml").write_text("K: 3\n")
    shutil.copy(good / "metrics.jsonl", tmp_path / "damaged")
    (tmp_path / "damaged/eval.json").write_text("{")
    for name in ("deep", "history", "half"):
        shutil.copy(good / "metrics.jsonl", tmp_path / name)
    (tmp_path / "history/eval.json").write_text('{"history": [{"top1": 0.5}]}')
    (tmp_path / "half/evaluation.json").write_text('{"arms": {}}')
    (tmp_path / "deep/eval.json").write_text("[" * 100_000)
    (tmp_path / "stepless/metrics.jsonl").write_text('{"step": 1}\n{"note": 1}\n')
    return {
        "nowhere": ([tmp_path / "nowhere"], "is not there"),
        "empty": ([tmp_path / "empty"], "holds no run"),
        "pair with nothing": ([good, tmp_path / "empty"], "no config.yaml"),
        "no step": ([tmp_path / "young"], "not finished a step"),
        "half a document": ([tmp_path / "damaged"], "damaged"),
        "a measurement of no step": ([tmp_path / "history"], "an entry of its history has no step"),
        "half an evaluation": ([tmp_path / "half"], "has no num_items, equal_tokens, paired"),
        "a deep document": ([tmp_path / "deep"], "damaged"),
        "a row without its step": ([tmp_path / "stepless"], "a row without the number of its step"),
        "another version": ([tmp_path / "old"], "another version"),
        "one run three times": ([good, good, good], "is named twice"),
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


def test_a_damaged_run_does_not_stop_the_report_of_its_folder(
    tmp_path: Path, runs: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("good", "broken", "without a seed", "half an end"):
        (tmp_path / name).mkdir()
        for file in ("config.yaml", "metrics.jsonl"):
            shutil.copy(runs[0] / file, tmp_path / name)
    (tmp_path / "broken/config.yaml").write_text("{{{")
    kept = (runs[0] / "config.yaml").read_text().replace("seed:", "sead:")
    (tmp_path / "without a seed/config.yaml").write_text(kept)
    (tmp_path / "half an end/eval.json").write_text("[")
    assert report_command.main([str(tmp_path)]) == 0
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 3
    for name, line in zip(
        ("broken/config", "half an end/eval", "without a seed"), said, strict=True
    ):
        assert line.startswith(f"left out: {tmp_path}/{name}"), line
    assert list(data_of(tmp_path / "report.html")["configs"]) == [str(tmp_path / "good")]


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
        (["step=9"], "there are 0, 1, 2, 3"),
        (["step=3", "prompt=nobody"], "'nobody'"),
    ):
        assert show.main([str(runs[1]), *words]) == 2
        assert expected in capsys.readouterr().err
    assert show.main([str(runs[1].parent)]) == 2
    assert "runs: name one of them" in capsys.readouterr().err


def test_show_of_a_damaged_file_is_one_sentence(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "seed0"
    folder.mkdir()
    shutil.copy(runs[1] / "config.yaml", folder)
    row = (runs[1] / "completions.jsonl").read_text().splitlines()[0]
    for content, expected in (
        (f'{row}\n{{"a": 1}}\n', "a row has no answers"),
        ("", "holds no completion"),
    ):
        (folder / "completions.jsonl").write_text(content)
        assert show.main([str(folder)]) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ") and said.count("\n") == 1 and expected in said


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


def test_every_logged_metric_is_in_the_curves(runs: list[Path], page: Path) -> None:
    (section,) = data_of(page)["tasks"]
    curves = section["curves"]
    rows = [json.loads(line) for line in (runs[0] / "metrics.jsonl").read_text().splitlines()]
    logged = {key for row in rows for key, value in row.items() if value is not None} - {"step"}
    assert set(curves["metrics"]) == logged
    (setting,) = curves["settings"]
    assert set(setting["curves"]) == logged
    total = setting["curves"]["reward/total"]
    assert total["steps"] == [1, 2, 3]
    assert total["single"] == pytest.approx([row["reward/total"] for row in rows], rel=1e-5)
    # Held-out points with their intervals, as eval.json has them.
    history = json.loads((runs[0] / "eval.json").read_text())["history"]
    expected = [
        [entry["step"], entry["coverage@3"], *entry["interval"]["coverage@3"]] for entry in history
    ]
    assert setting["points"]["train/coverage@3"] == expected
    assert curves["ranges"]["train/coverage@3"] == [0, 1]


def run_of(folder: str, steps: list[int], seed: int = 0, **changes: object) -> Run:
    """A run with one metric that is its step, plus 10 for each seed."""
    config = {"name": "x", "seed": seed, "data": {"task": "clinic"}, "algo": {"name": "own"}}
    config |= {"train": {"steps": 9}, "reward": {"num_answers": 3}}
    config |= changes
    rows = [{"step": step, "reward/total": step + 10.0 * seed} for step in steps]
    return Run(Path(folder), config, rows, {}, {}, [])


def test_curves_of_several_seeds_are_aligned_by_step() -> None:
    # A broken line of one seed is left out of all.
    group = [run_of("b", [1, 2, 3], seed=1), run_of("a", [1, 3, 4])]
    curves = curves_of_task("clinic", {"x": group})
    curve = curves["settings"][0]["curves"]["reward/total"]
    assert curve == {"steps": [1, 3], "mean": [6, 8], "low": [1, 3], "high": [11, 13]}


def test_a_long_curve_is_thinned_and_a_rare_metric_is_not_lost() -> None:
    run = run_of("a", list(range(1, 5001)))
    run.metrics[123]["adv/variance_ratio"] = 0.5
    curves = curves_of_task("clinic", {"x": [run]})["settings"][0]["curves"]
    steps = curves["reward/total"]["steps"]
    assert len(steps) == 400 and (steps[0], steps[-1]) == (1, 5000)
    assert curves["adv/variance_ratio"]["steps"] == [124]
    assert curves["adv/variance_ratio"]["single"] == [0.5]


def test_two_tasks_share_no_axis_and_no_table() -> None:
    other = {"task": "medqa"}
    runs = [run_of("a", [1]), run_of("b", [1], data=other), run_of("c", [1], seed=1)]
    assert {task: len(group) for task, group in group_by_task(runs).items()} == {
        "clinic": 2,
        "medqa": 1,
    }


def test_a_setting_has_its_full_name_and_what_a_preset_brings_along_is_not_repeated() -> None:
    grpo = {"name": "grpo", "kl_coef": 0.04}
    runs = [
        run_of("a", [1], algo={"name": "own", "kl_coef": 0.0}),
        run_of("b", [1], algo=grpo),
        run_of("c", [1], algo=grpo, optim={"lr": 0.1}),
    ]
    runs[0].config["optim"] = runs[1].config["optim"] = {"lr": 0.2}
    assert list(group_by_setting(runs)) == [
        "algo.name=own, optim.lr=0.2",
        "algo.name=grpo, optim.lr=0.2",
        "algo.name=grpo, optim.lr=0.1",
    ]
    table = settings_that_differ("clinic", group_by_setting(runs))
    assert ["algo.kl_coef", "0.0", "0.04", "0.04"] in table["rows"]
    # Chosen by hand beside the preset, it is named.
    runs[2].config["algo"] = {"name": "grpo", "kl_coef": 0.1}
    assert "algo.kl_coef=0.1" in list(group_by_setting(runs))[2]


def test_every_seed_has_a_row_under_its_mean(runs: list[Path]) -> None:
    one, other = read_run(runs[1]), read_run(runs[1])
    other.config["seed"] = 7
    settings = settings_table("clinic", group_by_setting([other, one]))
    assert [row[0] for row in settings["rows"]] == ["clinic", "seed 1", "seed 7"]
    assert settings["seed_rows"] == [1, 2] and settings["rows"][0][1] == 2
    stored = one.document["after"]
    column = settings["columns"].index("top1")
    assert settings["rows"][1][column] == [stored["top1"], *stored["interval"]["top1"]]


LONG = ", ".join(f"algo.some_setting_{i}=a_long_value_{i}" for i in range(6))


def clipped(figure: object) -> list[str]:
    """The texts of a figure that reach beyond its edge."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    edge = figure.bbox.padded(1)
    texts = [text for legend in figure.legends for text in legend.get_texts()]
    texts += [axes.title for axes in figure.axes]
    texts += [axes._left_title for axes in figure.axes]
    for axes in figure.axes:
        low, high = sorted(axes.get_ylim())
        texts += [
            label for label in axes.get_yticklabels() if low <= label.get_position()[1] <= high
        ]
    shown = [text for text in texts if text.get_text() and text.get_visible()]
    boxes = [(text.get_text(), text.get_window_extent()) for text in shown]
    return [
        text
        for text, box in boxes
        if not (edge.contains(box.x0, box.y0) and edge.contains(box.x1, box.y1))
    ]


def test_no_legend_is_cut_however_long_the_names(runs: list[Path]) -> None:
    document = json.loads((runs[0] / "evaluation.json").read_text())
    policy = document["arms"]["policy"]
    arms = {LONG: policy, f"{LONG}, algo.last=1": policy}
    figures = plots.of_arms(arms, document["bars"])
    figures["tokens"] = plots.tokens_per_answer(arms)
    rows = [{"step": step, "reward/total": 1.0, f"reward/{'x' * 60}": 2.0} for step in (1, 2)]
    figures["terms"] = plots.components(rows)
    figures["curves"] = plots.learning_curves(
        {LONG: [rows], "b": [rows]}, {LONG: []}, ["reward/total"], {}
    )
    for name, figure in figures.items():
        assert not clipped(figure), name
        # What is left for the panel itself.
        assert min(axes.get_window_extent().height for axes in figure.axes) > 40, name


def test_a_single_point_is_seen_and_ticks_are_whole_steps() -> None:
    rows = [{"step": 1, "reward/total": 1.0}]
    figure = plots.learning_curves({"a": [rows]}, {"a": []}, ["reward/total"], {})
    (axes,) = figure.axes
    drawn = [line for line in axes.get_lines() if len(line.get_xdata())]
    markers = [line for line in drawn if line.get_marker() == "o"]
    assert [list(line.get_xdata()) for line in markers] == [[1]]
    for last in (1, 2, 3, 17, 200):
        rows = [{"step": step, "reward/total": 1.0} for step in range(1, last + 1)]
        for figure in (
            plots.learning_curves({"a": [rows]}, {"a": []}, ["reward/total"], {}),
            plots.components(rows),
        ):
            FigureCanvasAgg(figure).draw()
            assert all(float(tick).is_integer() for tick in figure.axes[0].get_xticks())


def test_held_out_points_have_a_key() -> None:
    rows = [{"step": 1, "train/top1": 0.5}, {"step": 2, "train/top1": 0.5}]
    history = [{"step": 1, "top1": 0.4, "interval": {"top1": [0.3, 0.5]}}]
    figure = plots.learning_curves({"a": [rows]}, {"a": history}, ["train/top1"], {})
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["held-out questions, with 95 % interval"]
