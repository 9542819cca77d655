"""What the recipe's model knows of an answer: the places that are read, found in the text instead."""

import re

import pytest
import torch

from experiments.embedded_model import looked_up
from experiments.embedded_model.recipe import STAGES, Teacher, states_after
from mar.answers.tokenizer import copy_tokenizer
from mar.policy.attention import group_attention
from mar.policy.sources import EMBEDDED
from mar.policy.weights import load_model
from mar.tasks import clinic


@torch.no_grad()
def test_what_is_said_is_read_where_the_text_says_it(tmp_path, monkeypatch):
    patient = clinic.load("validation", 1)
    monkeypatch.setattr(clinic, "load", lambda *_: patient)
    monkeypatch.setattr(looked_up, "PATIENTS", 1)
    model = load_model(EMBEDDED)
    Teacher(tmp_path, EMBEDDED, model, 0, STAGES).save()
    copy_tokenizer(EMBEDDED, tmp_path / "tokenizer")

    teacher = looked_up.open_teacher(tmp_path)
    found = looked_up.said_of_answers(teacher)
    assert found

    # The same row, token by token.
    (lesson,) = teacher.lessons(teacher.stages[looked_up.TRUTH])
    packed = lesson.batch.packed
    with states_after(model, looked_up.LOOKED_UP) as states:
        hidden = model.hidden(packed.ids, packed.positions, group_attention(packed))
    tokenizer = teacher.tokenizer
    ids = packed.ids.tolist()

    def place_after(text: str) -> int:
        """Of the last token of `text`; the request for a form may have it, too, further up."""
        ends = range(1, len(ids) + 1)
        return max(end for end in ends if tokenizer.decode(ids[:end]).endswith(text)) - 1

    written = tokenizer.decode([*ids, packed.targets[-1].item()]).rpartition("<|assistant|>")[2]
    probability = {gold.name: gold.probability for gold in patient[0].golds}
    for slot, (said,) in found.items():
        number = slot + 1
        answer = re.search(f"<answer{number}>(.*?)</answer{number}>", written)[1]
        assert said.truth == pytest.approx(probability[answer], abs=1e-6)

        read = place_after(f"<answer{number}>{answer}")
        state = model.norm(states[0][read])
        right, wrong = (model.head_weight[tokenizer.convert_tokens_to_ids(x)] for x in "10")
        logit = state @ right - state @ wrong
        assert said.looked_up == pytest.approx(torch.sigmoid(logit).item(), abs=1e-5)

        digit = place_after(f"<confidence{number}>0.")
        rows = torch.stack(
            [model.head_weight[tokenizer.convert_tokens_to_ids(d)] for d in "0123456789"]
        )
        chances = torch.softmax(rows @ hidden[digit], dim=0)
        mean = sum(p.item() * (d / 10 + 0.045) for d, p in enumerate(chances))
        assert said.mean == pytest.approx(mean, abs=1e-5)
        variance = sum(p.item() * (d / 10 + 0.045 - mean) ** 2 for d, p in enumerate(chances))
        assert said.variance == pytest.approx(variance, abs=1e-5)
