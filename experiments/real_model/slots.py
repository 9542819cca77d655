"""How far each answer of a set is from the posterior, given those before it: the model, and the prior.

    python -m experiments.real_model.slots ADAPTERS NUM OUT.json +experiment=... model=... ...

The words are those of the warm-up. Of each test question one set of three different draws from the
posterior is written, with confidences if reward.objective has them. Answer k is then a draw from
the posterior without the answers before it. Reported are nats from that distribution to the
model's, and to the prior without the same answers, with 95 % intervals by resampling questions.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from experiments.real_model.summary import over_questions
from experiments.real_model.warmed_up import WarmedUp, open_warmed_up
from mar.errors import UserError, exit_code
from mar.learn.demonstrations import (
    DrawnText,
    Encode,
    Pieces,
    draw_demonstration,
    short_forms,
    soft_targets,
)
from mar.learn.warm_up import pack_sharing
from mar.policy.attention import group_attention
from mar.policy.model import Decoder
from mar.records import Example
from mar.run.console import Display
from mar.run.setup import load_data
from mar.run.warm_up import asking_of, prior_of, without_places

NUM_ANSWERS = 3
AT_ONCE = 16


def answers_of(pieces: Pieces) -> list[DrawnText]:
    """The drawn texts that are answers."""
    drawn = [piece for piece in pieces if isinstance(piece, DrawnText)]
    return [piece for piece in drawn if piece.kind == "answer"]


def slots_of_tokens(pieces: Pieces, encode: Encode) -> list[int]:
    """The answer, from 0, that each token decides; -1 for all others.

    The first token behind an answer belongs to it: it says that the answer ends there.
    """
    slots: list[int] = []
    answers_so_far = 0
    after_answer = False
    for piece in pieces:
        if isinstance(piece, DrawnText):
            after_answer = piece.kind == "answer"
            slot = answers_so_far if after_answer else -1
            slots += [slot] * len(encode(piece.text))
        else:
            of_piece = [-1] * len(encode(piece))
            if after_answer:
                of_piece[0] = answers_so_far
                answers_so_far += 1
            slots += of_piece
            after_answer = False
    return [*slots, -1]  # the stop token


def prior_nats(answers: Sequence[DrawnText], prior: Mapping[str, float]) -> list[float]:
    """Nats from the distribution of each answer to the prior without the answers before it."""
    nats = []
    left = 1.0
    for answer in answers:
        p = np.array(answer.probabilities)
        q = np.array([prior[name] for name in answer.candidates]) / left
        nats.append(float((p * np.log(p / np.maximum(q, 1e-30))).sum()))
        left -= prior[answer.text]
    return nats


def logprobs_of(model: Decoder, batch: Sequence[tuple[list[int], list[int]]]) -> Tensor:
    """Log-probabilities [M, V] of the completions' tokens; `batch` holds (prompt, completion)."""
    packed = pack_sharing([prompt for prompt, _ in batch], [row for _, row in batch])
    states = model.hidden(packed.ids, packed.positions, group_attention(packed))
    return torch.log_softmax((states[packed.predict_from] @ model.head_weight.T).float(), dim=-1)


def token_nats(target: Mapping[int, float], logprobs: Tensor) -> float:
    """KL from a token's distribution {id: probability} to the model's, logprobs [V]."""
    q = logprobs[list(target)].double().numpy()
    p = np.array(list(target.values()))
    return float((p * (np.log(p) - q)).sum())


@torch.no_grad()
def nats_of_answers(
    opened: WarmedUp, examples: Sequence[Example], prior: Mapping[str, float]
) -> dict[str, np.ndarray]:
    """[questions, answers] nats of the model, of the prior, and their difference."""
    config = opened.config
    asking = asking_of(config, opened.tokenizer)
    without, with_confidences = short_forms(NUM_ANSWERS)[2:]
    grammar = with_confidences if config.reward.confident else without
    rng = np.random.default_rng(config.seed)
    stop_id = opened.tokenizer.eos_token_id

    of_model = np.zeros((len(examples), NUM_ANSWERS))
    of_prior = np.zeros((len(examples), NUM_ANSWERS))
    for start in range(0, len(examples), AT_ONCE):
        some = examples[start : start + AT_ONCE]
        demonstrations = [
            draw_demonstration(example, grammar, list(prior), rng) for example in some
        ]
        rows = [soft_targets(pieces, asking.encode, stop_id) for pieces in demonstrations]
        prompts = [asking.prompt_ids(example, grammar) for example in some]
        batch = [(prompt, ids) for prompt, (ids, _) in zip(prompts, rows, strict=True)]
        logprobs = iter(logprobs_of(opened.model, batch))
        for place, (_, targets) in enumerate(rows):
            pieces = demonstrations[place]
            of_prior[start + place] = prior_nats(answers_of(pieces), prior)
            for target, slot in zip(targets, slots_of_tokens(pieces, asking.encode), strict=True):
                of_token = next(logprobs)
                if slot >= 0:
                    of_model[start + place, slot] += token_nats(target, of_token)
    return {"model": of_model, "prior": of_prior, "model - prior": of_model - of_prior}


def run(adapters: str, num: int, out: Path, words: Sequence[str]) -> None:
    opened = open_warmed_up(adapters, words)
    config = opened.config
    display = Display(config.logger.console, 0, 1)
    examples = load_data(config, "test", num, 0, display)
    frequencies = prior_of(config, examples, display)
    if frequencies is None:
        raise UserError(
            f"questions of {config.data.task} do not share their golds: there is no prior"
        )
    names = [gold.name for gold in examples[0].golds]
    prior = dict(zip(names, frequencies.tolist(), strict=True))

    found = {}
    for name, values in nats_of_answers(opened, examples, prior).items():
        mean_low_high = [over_questions(of_slot) for of_slot in values.T]
        found[name] = np.array(mean_low_high, dtype=float).round(3).tolist()
    document = {"questions": len(examples), "words": without_places(words), "answer 1, 2, 3": found}
    out.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(found))


if __name__ == "__main__":
    sys.exit(exit_code(lambda: run(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])))
