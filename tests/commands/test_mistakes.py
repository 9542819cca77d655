"""What a new user types wrongly: every command answers with one sentence that has the remedy."""

import importlib
import json
from pathlib import Path

import pytest
import torch

from mar.run.compose import compose
from mar.train import run

RUN = "{runs}/clinic/seed0"
CLINIC = "+experiment=clinic"

# (command, its words, a part of the sentence). {runs} holds runs, {here} files of this test.
MISTAKES = [
    # a key that is misspelt, or of another section: in every command alike
    ("evaluate", f"{RUN} num_items=4", "num_items is no setting; did you mean eval.num_items=4?"),
    ("evaluate", f"{RUN} eval.num_item=4", "did you mean eval.num_items=4?"),
    ("evaluate", f"{RUN} num_answer=3", "did you mean num_answers=3"),
    ("ask", f"{RUN} hello sample=3", "did you mean samples=3"),
    ("ask", f"{RUN} hello temperature=0.5", "did you mean algo.temperature=0.5?"),
    ("train", f"{CLINIC} steps=3", "did you mean train.steps=3?"),
    ("train", f"{CLINIC} lr=1e-3", "did you mean model.lr=1e-3 or optim.lr=1e-3?"),
    ("train", f"{CLINIC} train.step=3", "did you mean train.steps=3?"),
    ("train", f"{CLINIC} algo.prompt_per_step=2", "did you mean algo.prompts_per_step=2?"),
    ("train", f"{CLINIC} eval.steps=3", "did you mean train.steps=3?"),
    ("train", f"{CLINIC} output=x", "output is no setting; did you mean out=x?"),
    ("train", f"{CLINIC} batch_size=8", "did you mean algo.prompts_per_step=8?"),
    ("train", f"{CLINIC} K=5", "did you mean reward.num_answers=5?"),
    ("train", f"{CLINIC} Train.Steps=3", "did you mean train.steps=3?"),
    ("train", f"{CLINIC} train/steps=3", "did you mean train.steps=3?"),
    ("train", f"{CLINIC} wandb=online", "did you mean logger.wandb=online?"),
    ("train", f"{CLINIC} +debug", "+debug has no value: write +debug=... with one of on"),
    ("train", f"{CLINIC} model.path={{here}}", "model=embedded does not read it: add model=hf"),
    ("sft", "+experiment=mbpp model=embedded", "mbpp has no embedded data"),
    ("plan", f"{CLINIC} scale=h100x1 group_size=4", "did you mean algo.group_size=4?"),
    ("sft", f"{CLINIC} sft.step=4", "did you mean sft.steps=4? ("),
    ("sft", f"{CLINIC} steps=4", "did you mean sft.steps=4 or train.steps=4?"),
    ("sft", f"{CLINIC} train.steps=4", "write sft.steps=4"),
    ("tasks", "clinic num_train=4", "did you mean data.num_train=4?"),
    ("show", f"{RUN} steps=1", "did you mean step=1?"),
    ("show", f"{RUN} eval.num_items=4", "mar.show has step, prompt"),
    ("report", f"{RUN} file=x.html", "mar.report has out"),
    ("export", f"{RUN} type=float32", "did you mean dtype=float32?"),
    ("fetch", "smollm2-135m sourc=hub", "did you mean source=hub?"),
    # a file of conf/ that is not there, with a + too many or too few
    ("train", "+experiment=medqaa", "did you mean +experiment=medqa?"),
    ("train", "experiment=medqa", "put a + before it, +experiment=medqa"),
    ("train", f"{CLINIC} +model=hf", "write model=hf, without the +"),
    ("train", f"{CLINIC} +train.steps=3", "write train.steps=3, without the +"),
    ("train", f"{CLINIC} model=qwen3-1.7", "did you mean model=qwen3-1.7b?"),
    ("train", f"{CLINIC} model=llama", "there are embedded, hf, "),
    ("train", f"{CLINIC} model=", "there are embedded, hf, "),
    ("train", f"{CLINIC} algo=GRPO", "did you mean algo=grpo?"),
    ("train", "+task=clinic", "did you mean data.task=clinic?"),
    # nothing chosen, words without a key or a value, flags
    ("train", "", "choose an experiment: +experiment=medqa"),
    ("train", "train.steps=3", "choose an experiment: +experiment=medqa"),
    ("plan", "", "choose an experiment"),
    ("sft", "", "choose an experiment"),
    ("tasks", "", "choose an experiment"),
    ("train", "medqa", "did you mean +experiment=medqa?"),
    ("train", f"{CLINIC} hf", "did you mean model=hf?"),
    ("train", f"{CLINIC} train.steps", "train.steps has no value: write train.steps=300"),
    ("train", f"{CLINIC} train.steps = 3", "train.steps has no value"),
    ("train", f"{CLINIC} seed= 3", "'3' stands alone: write key=value in one word"),
    ("train", f"{CLINIC} --steps 3", "write train.steps=3"),
    ("train", f"{CLINIC} --train.steps=3", "write train.steps=3"),
    ("train", f"{CLINIC} --epochs 3", "write algo.epochs=3"),
    ("train", "--experiment medqa", "write +experiment=medqa"),
    ("train", f"{CLINIC} --cfg jobs", "--cfg wants one of job, hydra, all"),
    ("train", f"{CLINIC} -x", "-h shows what it takes"),
    ("evaluate", f"{RUN} --k 3", "write k=3"),
    ("evaluate", f"{RUN} k 3", "k has no value: write k="),
    ("evaluate", f"-m {RUN}", "-m starts a sweep, and that is for mar.train"),
    ("ask", f"{RUN} --json", "write json=true"),
    ("ask", f"{RUN} --samples 3", "write samples=3"),
    ("show", f"{RUN} --step 1", "write step=1"),
    ("show", f"{RUN} 1", "'1' is one word too many"),
    ("export", f"{RUN} --dtype float32", "write dtype=float32"),
    ("export", f"{RUN} elsewhere", "'elsewhere' is one word too many: mar.export takes RUN"),
    ("report", f"{RUN} --out x", "write out=x"),
    ("fetch", "smollm2-135m --source wheel", "write source=wheel"),
    ("sft", "--model embedded", "write model=embedded"),
    ("sft", "--task clinic", "write data.task=clinic"),
    ("tasks", "--path x.jsonl", "write model.path=x.jsonl or data.path=x.jsonl"),
    # values
    ("train", f"{CLINIC} train.steps=many", "could not be converted to Integer"),
    ("train", f"{CLINIC} train.steps=0", "train.steps=0 is out of range"),
    ("evaluate", f"{RUN} eval.num_items=many", "to Integer: a whole number is wanted"),
    ("evaluate", f"{RUN} k=three", "k=three is no whole number"),
    ("show", f"{RUN} step=last", "step=last is no whole number"),
    ("export", f"{RUN} dtype=float16", "dtype=float16 is unknown: choose one of bfloat16, float32"),
    ("ask", f"{RUN} hello json=yes", "json=yes is neither true nor false"),
    ("report", f"{RUN} out=x.html", "name the folder in which report.html is written"),
    # folders
    (
        "plan",
        RUN,
        "takes settings and no folder, as in `python -m mar.plan +experiment=paper scale",
    ),
    ("plan", RUN, "what starts from it is model=run model.path={runs}/clinic/seed0"),
    ("train", "some/where", "takes settings and no folder, as in `python -m mar.train +experiment"),
    ("plan", "owner_/name", "what starts from it is model=hf model.path=owner_/name"),
    ("evaluate", "{runs}/clinic", "is a folder of 2 runs: name one of them, {runs}/clinic/seed0"),
    ("ask", "{runs}/clinic", "is a folder of 2 runs: name one of them, {runs}/clinic/seed0"),
    ("show", "{runs}/clinic", "is a folder of 2 runs: name one of them, {runs}/clinic/seed0"),
    ("export", "{runs}/clinic", "is a folder of 2 runs: name one of them, {runs}/clinic/seed0"),
    ("show", "{runs}/clinik", "is not there: name a run (a folder with config.yaml); did you"),
    ("report", "{runs}/clinic/sead0", "did you mean {runs}/clinic/seed0?"),
    ("show", f"{RUN}/eval.json", "eval.json is a file: name a run"),
    ("export", "{here}", "is no run: name a run"),
    ("show", "", "mar.show wants RUN: `python -m mar.show runs/medqa/seed0`"),
    ("fetch", "", "mar.fetch wants MODEL"),
    ("runs", "{runs} {runs}", "one word too many"),
    ("runs", "{runs}/clinik", "is no folder"),
    ("runs", "jsn=true", "did you mean json=true?"),
    ("ask", f"{RUN} what is it", "texts with spaces in quotes"),
    ("evaluate", f"{RUN} +experiment=clinic", "keeps what it was trained with"),
    ("ask", f"{RUN} hello model=hf", "keeps what it was trained with"),
    # the machine
    ("train", f"{CLINIC} device=cuda", "PyTorch sees no GPU here: take device=cpu"),
    ("evaluate", f"{RUN} device=cuda out={{here}}/e", "take device=cpu or device=auto"),
    ("train", f"{CLINIC} scale=h100x1", "scale=h100x1 wants 1 GPU(s)"),
    ("train", "+experiment=medqa scale=h100x8", "and PyTorch sees none here: leave it out"),
    # sweeps
    ("train", f"-m {CLINIC} seed=0,x", "seed=x: the value 'x'"),
    ("train", f"-m {CLINIC} +sweep=foo", "there is no conf/sweep/foo.yaml"),
    ("train", f"-m {CLINIC} sweep=seeds", "put a + before it, +sweep=seeds"),
    ("train", f"-m {CLINIC} sed=0,1", "did you mean seed=0,1?"),
    ("train", f"-m {CLINIC} algo=own,reinforced", "did you mean algo=reinforce?"),
    ("train", "-m seed=0,1", "choose an experiment"),
    ("train", f"{CLINIC} +sweep=seeds", "put -m before the words"),
    ("train", f"{CLINIC} seed=0,1", "seed=0,1 is several runs: put -m before the words"),
    # models
    ("train", "+experiment=jsonl data.path={here}/own.jsonl", "knows the clinic alone, not jsonl"),
    ("train", "+experiment=ddxplus", "add model=smollm2-135m"),
    ("tasks", "jsonl data.path={here}/own.jsonl", "knows the clinic alone, not jsonl"),
    ("sft", "+experiment=jsonl data.path={here}/own.jsonl", "knows the clinic alone"),
    ("train", f"{CLINIC} model=hf", "add model.path=<folder or hub id>"),
    ("fetch", "qwen3-1.7", "did you mean qwen3-1.7b?"),
    ("fetch", "embedded", "ships with mar"),
    ("fetch", "hf", "name a hub id (owner/name)"),
    ("fetch", "run", "name a hub id (owner/name)"),
    ("fetch", "qwen3-1.7b source=wheel", "cannot come from wheel"),
    # files
    ("tasks", "jsonl model=embedded data.path={here}/med.jsonl", "rows of medqa: take that task"),
    ("tasks", "medqa model=embedded data.source=path data.path={here}/own.jsonl", "rows of jsonl"),
    (
        "tasks",
        "jsonl model=embedded data.path={here}/table.jsonl",
        "a table wants a name that ends",
    ),
    ("tasks", "jsonl model=embedded data.path=~/none.jsonl", "/none.jsonl is not there"),
    ("tasks", "medkqa", "unknown task 'medkqa'"),
    ("train", "+experiment=jsonl model=embedded data.path={here}/it's=ü.jsonl", "ü.jsonl is not"),
    ("evaluate", f"completions={{here}}/no_text.jsonl {CLINIC}", "no_text.jsonl:1 (1 of the rows)"),
    ("evaluate", f"completions={{here}}/others.jsonl {CLINIC}", "ids look like clinic-test-000000"),
    ("evaluate", f"completions={{here}}/table.jsonl {CLINIC}", "one JSON object a line"),
    ("evaluate", f"completions={{here}}/none.jsonl {CLINIC}", "there is no such file"),
    ("evaluate", f"completions= {CLINIC}", "name one thing to measure"),
    ("evaluate", "base", "choose an experiment"),
    # how words are written
    ("train", f"{CLINIC} train.steps:3", "has no =: did you mean train.steps=3?"),
    ("train", f"{CLINIC} \N{EM DASH}seed=3", "not that of a keyboard"),
    ("train", f"{CLINIC} --cfg=job", "write --cfg job, two words"),
    ("train", f"{CLINIC} --resume", "the same command goes on where a run stopped"),
    ("train", f"{CLINIC} resume=true", "leave it out, the same command goes on"),
    ("train", f"{CLINIC} model.trainable='^norm", "Hydra cannot read that"),
    ("train", f"{CLINIC} model.lr=", "model.lr=: the value '' of type"),
    ("train", f"{CLINIC} train=3", "train is a section, and its keys are set, such as train."),
    ("train", f"{CLINIC} +experiment=medqa", "one of the two can be chosen"),
    ("train", "++experiment=clinic", "are chosen without ++, write +experiment=clinic"),
    ("train", "+experiment=clinic.yaml", "are chosen by their names, write +experiment=clinic"),
    (
        "train",
        "+experiment=conf/experiment/clinic.yaml",
        "by their names, write +experiment=clinic",
    ),
    ("train", f"{CLINIC} model=models/llama", "there is no conf/model/models/llama.yaml"),
    ("train", f"{CLINIC} own.jsonl", "did you mean data.path=own.jsonl?"),
    ("ask", f"{RUN} hello question=what", "question is written without its name"),
    ("ask", "embedded hello algo.temperature=0,7", "one value is wanted, with a decimal point"),
    ("ask", "embedded hello +experiment=medqa", "embedded knows the clinic alone"),
    ("evaluate", f"{RUN} seed=0,1", "seed: the value '0,1' of type"),
    ("evaluate", f"{RUN} completions=x.jsonl", "are two: name one thing to measure"),
    ("show", f"{RUN} step=9", "no completion is of step=9; there are 0, 1"),
    ("show", f"{RUN} prompt=nobody", "has 'nobody' in its id: without prompt= some are shown"),
    # a folder where a file is wanted, and the other way round
    ("train", f"{CLINIC} out=", "out= has no value: name a folder, or leave it out"),
    ("train", f"{CLINIC} run_dir=", "run_dir= has no value"),
    ("train", f"{CLINIC} out=own.jsonl", "own.jsonl is a file: choose another out="),
    ("train", f"{CLINIC} run_dir=own.jsonl", "cannot be a run's folder, it is a file"),
    ("sft", f"{CLINIC} run_dir=own.jsonl", "cannot be a run's folder, it is a file"),
    ("report", f"{RUN} out=own.jsonl", "nothing can be written into own.jsonl"),
    ("report", f"{RUN} {RUN}", "is named twice"),
    ("evaluate", f"{RUN}/checkpoints", "did you mean {runs}/clinic/seed0?"),
    ("show", f"{RUN}/eval.json", "did you mean {runs}/clinic/seed0?"),
    ("evaluate", f"completions={{here}} {CLINIC}", "is a folder: name a file in it"),
    ("tasks", "own.jsonl model=embedded", "did you mean jsonl data.path=own.jsonl?"),
    ("tasks", "jsonl own.jsonl model=embedded", "did you mean data.path=own.jsonl?"),
    # a file's name, rows and columns
    ("tasks", "jsonl model=embedded data.path=owns.jsonl", "did you mean own.jsonl?"),
    ("tasks", "jsonl model=embedded data.path=*.parquet", "is not there: name one file"),
    ("tasks", "jsonl model=embedded data.path=array.jsonl", "wants a name that ends in .json"),
    ("tasks", "jsonl model=embedded data.path=other.csv", "(it has Question, answer)"),
    ("tasks", "jsonl model=embedded data.path=latin.csv", "save it in UTF-8"),
    ("tasks", "jsonl model=embedded data.path=empty.jsonl", "empty.jsonl holds no rows"),
    ("train", f"{CLINIC} data.train_split=test", "what is trained on cannot be held out"),
    ("fetch", "smollm2", "did you mean smollm2-135m?"),
    ("fetch", "https://huggingface.co/Qwen/Qwen3-0.6B", "name the hub id, Qwen/Qwen3-0.6B"),
    ("fetch", "./qwen", "is a folder: it needs no fetching"),
    ("fetch", "model=smollm2-135m", "model is written without its name"),
    (
        "train",
        "+experiment=jsonl model=embedded data.path=own.jsonl data.train_split=trian",
        "no split 'trian': it has train, validation, test",
    ),
    # ranges, lists and brackets
    ("train", f"{CLINIC} seed=0..2", 'several runs are a sweep, -m ... "seed=0,1,2"'),
    ("train", f"-m {CLINIC} seed=0-99", '-m ... "seed=range(0,100)"'),
    ("train", f"-m {CLINIC} seed=0:2", '-m ... "seed=0,1,2"'),
    ("train", f"-m {CLINIC} seed=range(0,3", 'the ( is not closed: write "seed=range(0,3)"'),
    ("train", f"-m {CLINIC} seed=[0,1", 'the [ is not closed: write "seed=[0,1]"'),
    ("train", f"{CLINIC} reward.terms={{{{length:1", 'write "reward.terms={{length:1}}"'),
    ("train", f"{CLINIC} optim.betas=0.9,0.99", '"optim.betas=[0.9,0.99]"'),
    ("train", f"{CLINIC} optim.betas=(0.9,0.99)", 'square brackets, "optim.betas=[0.9,0.99]"'),
    ("train", f"{CLINIC} train.steps=1,000", "or without the comma"),
    ("train", f"{CLINIC} train.steps=1e3", "write train.steps=1000"),
    ("train", f"{CLINIC} seed=1.5", "a whole number is wanted"),
    ("train", f"{CLINIC} model.lr=1e-3x", "a number is wanted"),
    ("train", f"{CLINIC} reward.analysis=maybe", "write true or false"),
    ("train", f"-m {CLINIC} seed=0,1 --cfg job", "-m and --cfg: one of the two"),
    ("train", f"{CLINIC} hydra.run.dir=here", "is for sweeps: put -m before the words"),
    ("train", f"-m {CLINIC} seed=0,1 hydra/launcher=slurm", "is not installed"),
    ("train", f"{CLINIC} hydra=x", "write hydra.<name>=<value>"),
    ("train", f"{CLINIC} ~algo", "nothing is removed with ~"),
    ("train", f"{CLINIC} ~train.steps=300", "nothing is removed with ~"),
    # a file, a run, a checkpoint or a hub id where a file of conf/ is named
    ("train", f"{CLINIC} model=Qwen/Qwen3-0.6B", "model=hf model.path=Qwen/Qwen3-0.6B?"),
    ("train", f"{CLINIC} model={RUN}", f"model=run model.path={RUN}?"),
    ("train", f"{CLINIC} model={{here}}", "model=hf model.path={here}?"),
    ("train", f"{CLINIC} data=own.jsonl", "did you mean data=jsonl data.path=own.jsonl?"),
    ("train", "+experiment=none.csv", "did you mean +experiment=jsonl data.path=none.csv?"),
    ("train", f"{CLINIC} data.path=own.jsonl", "rows of your own are +experiment=jsonl"),
    ("train", f"{CLINIC} reward=rlcr", "reward=multi_rlcr or reward=rlcr_single?"),
    ("train", f"{CLINIC} algo=reinforce++", "did you mean algo=reinforce_pp?"),
    ("train", "+experiment=", "+experiment= has no value"),
    ("train", f"{CLINIC} model.path={RUN}", "a run's policy is model=run"),
    ("train", f"{CLINIC} model=run model.path={{runs}}/clinic", "name one of them, {runs}/clinic/"),
    ("train", f"{CLINIC} model=run model.path={{runs}}/clinic/sed0", "did you mean {runs}/clinic/"),
    ("train", f"{CLINIC} model=run model.path={RUN}/checkpoints", f"did you mean {RUN}?"),
    ("evaluate", f"smollm2-135m {CLINIC}", "write base model=smollm2-135m"),
    ("evaluate", f"Qwen/Qwen3-0.6B {CLINIC}", "write base model=hf model.path=Qwen/Qwen3-0.6B"),
    ("ask", "qwen3-1.7b hello", "get it by python -m mar.fetch qwen3-1.7b"),
    ("fetch", RUN, f"is a run: it needs no fetching, take model=run model.path={RUN}"),
    ("fetch", "Qwen/Qwen3-0.6B/", "name the hub id, Qwen/Qwen3-0.6B"),
    ("fetch", "Qwen/", "is no hub id (owner/name)"),
    # what another command reads
    ("evaluate", f"{RUN} train.steps=4", "train.steps is for mar.train"),
    ("evaluate", f"{RUN} checkpoint=2", "mar.evaluate does not read it"),
    ("evaluate", f"{RUN} step=1", "step is no setting: "),
    ("evaluate", f"{RUN} limit=4", "did you mean eval.num_items=4?"),
    ("evaluate", f"{RUN} hydra.verbose=true", "is for the sweeps of mar.train"),
    ("evaluate", f"{RUN} against={{runs}}/clinic", "name one of them, {runs}/clinic/seed0"),
    ("evaluate", f"{RUN} against={{runs}}/clinik", "is not there: name a run"),
    ("ask", f"{RUN} hello eval.num_items=3", "mar.ask does not read it"),
    ("ask", f"{RUN} hello n=3", "did you mean samples=3?"),
    ("ask", f"{RUN} hello samples=999999", "samples=999999 is out of range"),
    ("export", f"{RUN} {RUN}", "mar.export takes RUN, all else as key=value"),
    ("sft", f"{CLINIC} sft=short", "sft is a section, and its keys are set, such as sft.steps"),
    # folders that cannot be made: of a system's own, or with a name that is too long
    ("report", f"{RUN} out=/proc/none", "out=/proc/none cannot be made"),
    ("evaluate", f"{RUN} k=3 num_answers= arms=policy out=/proc/none", "cannot be made"),
    ("export", f"{RUN} out=/proc/none", "out=/proc/none cannot be made"),
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two small runs."""
    out = tmp_path_factory.mktemp("runs")
    size = ["train.steps=1", "algo.prompts_per_step=2", "algo.group_size=2", "eval.num_items=2"]
    for seed in range(2):
        words = [CLINIC, *size, f"seed={seed}", f"out={out}", "logger.console=plain"]
        assert run(compose([*words, "model.max_completion_tokens=8"])) == 0
    return out


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    rows = {
        "own": {"question": "Name a planet?", "golds": ["Mars"]},
        "med": {
            "question": "A man coughs. What is the diagnosis?",
            "options": {"A": "flu", "B": "cold"},
            "answer": "flu",
            "answer_idx": "A",
        },
        "no_text": {"id": "clinic-test-000000"},
        "others": {"id": "nobody", "text": "<answer1>flu</answer1>"},
    }
    for name, row in rows.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "table.jsonl").write_text("question,golds\nName a planet,Mars\n")
    (tmp_path / "array.jsonl").write_text(json.dumps([rows["own"]]))
    (tmp_path / "other.csv").write_text("Question,answer\nName a planet,Mars\n")
    (tmp_path / "latin.csv").write_text("question,golds\nK\xe4se?,ja\n", encoding="latin-1")
    (tmp_path / "empty.jsonl").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return tmp_path


@pytest.mark.parametrize(
    ("command", "words", "sentence"), MISTAKES, ids=[f"{c} {w}" for c, w, _ in MISTAKES]
)
def test_a_mistake_is_one_sentence_with_its_remedy(
    command: str,
    words: str,
    sentence: str,
    runs: Path,
    here: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = sorted(runs.rglob("*"))
    places = {"runs": str(runs), "here": str(here)}
    module = importlib.import_module(
        "mar.tasks.__main__" if command == "tasks" else f"mar.{command}"
    )
    assert module.main(words.format(**places).split()) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: ") and said.err.count("\n") == 1
    assert sentence.format(**places) in said.err
    assert sorted(runs.rglob("*")) == before and not (here / "runs").exists()


@pytest.mark.parametrize(
    ("command", "words", "sentence"),
    [
        ("train", [CLINIC, "train.steps=3 seed=1"], "several words in one: each stands alone"),
        ("ask", ["embedded", " "], "the question is empty"),
        ("ask", ["what is it?", "embedded"], "is no policy: first the run"),
    ],
)
def test_spaces(
    command: str, words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert importlib.import_module(f"mar.{command}").main(words) == 2
    assert sentence in capsys.readouterr().err


def test_a_look_at_own_rows_shows_how_their_golds_were_read(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["a", "b", "c", "d", "e", "f"]
    rows = [
        {"question": "Which one?", "golds": [{"name": "a", "aliases": ["A.", "alpha"]}]},
        {"question": "Heads?", "golds": [{"name": n, "probability": 1 / 6} for n in names]},
        {"question": "Not a list?", "golds": ["dog|cat"]},
    ]
    for name, some in (("rows", rows), ("held", [{"question": "Other?", "golds": ["x"]}])):
        lines = [json.dumps(row) + "\n" for row in some]
        (here / f"{name}.jsonl").write_text("".join(lines))
    words = "jsonl model=embedded data.train_path=rows.jsonl data.eval_path=held.jsonl"
    assert importlib.import_module("mar.tasks.__main__").main(words.split()) == 0
    said = capsys.readouterr().out
    assert "golds: a (also A., alpha)\n" in said and "golds: dog|cat\n" in said
    assert "golds: a 0.17; b 0.17; c 0.17; d 0.17; e 0.17; and 1 more\n" in said
