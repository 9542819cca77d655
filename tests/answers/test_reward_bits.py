"""The rewards of the paper keep every bit, whatever terms are added beside them."""

import itertools
import struct
from collections.abc import Iterator
from hashlib import sha256

from mar.answers.grammar import Grammar, parse, render
from mar.answers.reward_spec import BRIERS, COVERAGES, DUPLICATES, RewardSpec
from mar.answers.rewards import reward
from mar.records import Gold
from mar.verify.matching import expected_hits, matching_increments, repeats

GOLDS = (Gold("flu", ("influenza",), probability=0.37), Gold("cold", probability=0.21))
WEIGHTS = [(0.5, 1.0, 1.0, ()), (0.3, 0.7, 3.0, (0.9, 0.7, 0.1))]
DIGEST = "1e67e6b0cbd9a3fcab81306a7cb2e36eeeb98dd0c81cc9691f9c20172b4be88f"


def texts(grammar: Grammar) -> Iterator[str]:
    """Right ones, a repeat, confidences that break the sum rule, and texts that break off."""
    confidences = [(0.6, 0.3, 0.05), (0.7, 0.7, 0.7)]
    for answers in [("flu", "lupus", "cold"), ("flu", "Influenza", "gout")]:
        for said in confidences:
            text = render(grammar, answers, said, thinking="hm", other=0.05)
            yield from (text, text + " bye", text[:70], text[: len(text) // 2], "")
            yield text.replace("0.30", "30%")


def specs(grammar: Grammar) -> Iterator[RewardSpec]:
    switches = itertools.product(COVERAGES, BRIERS, (False, True), DUPLICATES, (False, True))
    for coverage, brier, sum_rule, duplicates, gate in switches:
        if not grammar.confident and (brier != "none" or sum_rule):
            continue
        for form, cover, error, ranks in WEIGHTS:
            yield RewardSpec(
                coverage=coverage,
                brier=brier,
                sum_rule=sum_rule,
                duplicates=duplicates,
                gate=gate,
                rank_weights=ranks,
                format_weight=form,
                coverage_weight=cover,
                brier_weight=error,
            )


def test_every_bit_of_the_rewards_of_the_paper_stays() -> None:
    digest = sha256()
    grammars = [
        Grammar("rlcr_multi", 3),
        Grammar("rlcr_multi", 3, layout="split", other=True),
        Grammar("rlvr_multi", 3),
    ]
    for grammar in grammars:
        for text, spec in itertools.product(texts(grammar), specs(grammar)):
            parsed = parse(text, grammar)
            drawn, _ = matching_increments(parsed.answers, GOLDS)
            for hits in (drawn, expected_hits(parsed.answers, GOLDS)):
                repeated = repeats(parsed.answers, GOLDS)
                earned = reward(parsed, hits, repeated, len(GOLDS), grammar, spec)
                numbers = [*earned.components, earned.total, *earned.parts.values()]
                digest.update(struct.pack(f"<{len(numbers)}d", *numbers))
    assert digest.hexdigest() == DIGEST
