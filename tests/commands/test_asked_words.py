"""Every command of one model asks in the same words (model.explain_decimals)."""

from pathlib import Path

import pytest
import yaml

from mar import ask, evaluate, sft
from mar import train as train_command
from mar.answers import prompts
from mar.export import export
from mar.policy.sources import EMBEDDED
from mar.run import warm_up
from mar.run.compose import compose, load_config
from mar.run.folder import find, prepare
from mar.run.words import CONF_DIR
from mar.tasks import __main__ as tasks_command
from mar.tasks import clinic

SMALL = """
+experiment=clinic logger.console=plain train.steps=1 eval.num_items=2 data.num_train=4
algo.prompts_per_step=1 algo.group_size=2
""".split()
SENTENCE = {False: "probability (0 to 1) that", True: "a plain decimal from 0 to 1 such as 0.25,"}
# A warm-up whose single step is the form of sets with confidences, and one of mixed forms.
WARM_UPS = {
    "per_step": "sft.shares=[0,0,0,1] sft.save_every=1 sft.eval_every=1 sft.eval_items=2 sft.batch=2".split(),
    "short": "sft.eval_every=0 sft.batch=16".split(),
}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The text of every question to a model that wants confidences, emptied by the reader."""
    texts: list[str] = []
    encode = prompts.encode_chat

    def listen(tokenizer, content, thinking):
        if "A confidence is" in content:
            texts.append(content)
        return encode(tokenizer, content, thinking)

    monkeypatch.setattr(prompts, "encode_chat", listen)
    return texts


def only_words_of(asked: list[str]) -> bool:
    """Which of both wordings all of these texts have."""
    explained = {SENTENCE[True] in text for text in asked}
    assert len(explained) == 1, f"{len(asked)} texts: none, or both wordings"
    (explains,) = explained
    assert all(SENTENCE[explains] in text for text in asked)
    asked.clear()
    return explains


@pytest.mark.slow
@pytest.mark.parametrize("explain", [True, False])
def test_all_commands_ask_in_the_words_of_the_model(explain, asked, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(warm_up, "NUM_FOR_PRIOR", 50)
    model = ["model=hf", f"model.path={EMBEDDED}", "model.thinking=false"]
    if not explain:
        model.append("model.explain_decimals=false")
    words = [*SMALL, *model, "model.lr=1e-4", f"out={tmp_path}"]
    run = tmp_path / "clinic/seed0"

    def answered(main, *more: str) -> bool:
        assert main(list(more)) == 0, capsys.readouterr()
        return only_words_of(asked)

    for mixture, own in WARM_UPS.items():
        own = [*own, f"sft.mixture={mixture}", "sft.steps=1", "sft.log_every=1"]
        warm = ["+experiment=clinic", *model, *own, f"run_dir={tmp_path / mixture}"]
        assert answered(sft.main, *warm) is explain
        told = capsys.readouterr().out.splitlines()[-1]
        to_go_on = told.partition("go on with: ")[2].split()
        assert compose(["+experiment=clinic", *to_go_on]).model.explain_decimals is explain
    assert answered(tasks_command.main, "clinic", *words[1:-1]) is explain
    assert answered(train_command.main, *words) is explain
    assert answered(evaluate.main, str(run), "k=6", "arms=policy,base,verbalized,K=1") is explain
    assert answered(ask.main, str(run), clinic.load("test", 1)[0].question) is explain
    further = [*SMALL, "model=run", f"model.path={run}", f"out={tmp_path}", "name=further"]
    assert answered(train_command.main, *further) is explain
    card = (export(run, tmp_path / "hf", "float32") / "README.md").read_text()
    assert SENTENCE[explain] in card and SENTENCE[not explain] not in card


def test_only_the_embedded_model_has_the_shorter_words():
    for file in sorted((CONF_DIR / "model").glob("*.yaml")):
        chosen = yaml.safe_load(file.read_text())
        if file.stem != "run":
            assert chosen["explain_decimals"] is (file.stem != "embedded"), file.name


def test_a_run_from_before_the_key_keeps_the_shorter_words(tmp_path: Path):
    config = compose([*SMALL, f"out={tmp_path}", "name=old"]).to_dict()
    folder = prepare(config).path
    saved = yaml.safe_load((folder / "config.yaml").read_text())
    assert saved["model"].pop("explain_decimals") is False
    (folder / "config.yaml").write_text(yaml.safe_dump(saved))
    assert load_config(folder / "config.yaml").model.explain_decimals is False
    further = compose([*SMALL, "model=run", f"model.path={folder}", "name=further"])
    assert further.model.explain_decimals is False
    assert find(config).resume, "the same words: it goes on"
    longer = config | {"model": config["model"] | {"explain_decimals": True}}
    with pytest.raises(Exception, match="differs in model.explain_decimals"):
        find(longer)
