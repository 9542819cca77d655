"""What single answers of a warmed-up model cover on test questions, from its whole distribution.

    python -m experiments.real_model.measure ADAPTERS NUM OUT.json +experiment=... model=... ...

The words are those of the warm-up; ADAPTERS `none` is the untouched model. Means over questions
with 95 % intervals by resampling them; a difference is taken on the same questions. Beside the
model stand the best constant answers and the posterior.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from experiments.real_model.summary import over_questions
from experiments.real_model.warmed_up import open_warmed_up
from mar.errors import exit_code
from mar.learn.warm_up import answer_masses
from mar.measure.single_answers import bars_of, coverage_of, gold_probabilities, means
from mar.run.console import Display
from mar.run.setup import load_data
from mar.run.warm_up import asking_of, prior_of, without_places

WAYS = ("drawn@1", "best@1", "different@3", "best@3")


def run(adapters: str, num: int, out: Path, words: Sequence[str]) -> None:
    opened = open_warmed_up(adapters, words)
    config = opened.config
    display = Display(config.logger.console, 0, 1)
    examples = load_data(config, "test", num, 0, display)
    p, prior = gold_probabilities(examples), prior_of(config, examples, display)
    asking = asking_of(config, opened.tokenizer)
    q = answer_masses(opened.model, examples, asking)
    told = bars_of(p, prior) | coverage_of(q, p, closed=prior is not None)
    if prior is not None:
        for way in WAYS:
            told[f"{way} - 2 x constant"] = told[way] - 2 * told[f"constant@{way[-1]}"]

    rows = {}
    for name, values in told.items():
        rows[name] = np.array(over_questions(values), dtype=float).round(4).tolist()
    strata = {}
    for stratum in sorted({example.stratum for example in examples}):
        chosen = np.array([example.stratum == stratum for example in examples])
        values_of_stratum = means({name: value[chosen] for name, value in told.items()})
        strata[stratum] = {"questions": int(chosen.sum()), **values_of_stratum}
    document = {"questions": len(examples), "words": without_places(words), "mean_low_high": rows}
    out.write_text(json.dumps(document | {"strata": strata}, indent=1) + "\n")
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    sys.exit(exit_code(lambda: run(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])))
