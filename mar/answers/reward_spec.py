"""Which reward: its switches and weights."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from mar.errors import UserError


def any_hit(hits: Sequence[float], num_golds: int) -> list[float]:
    """The first hit is worth 1, further ones nothing."""
    covered = np.minimum(np.cumsum(hits), 1.0)
    return np.diff(covered, prepend=0.0).tolist()


# name -> what each answer adds to the coverage [K], given all hits [K] and the number of golds.
# The value of answer k may look at the hits up to k only: it is decided when answer k is
COVERAGES: dict[str, Callable[[Sequence[float], int], Sequence[float]]] = {
    "sum": lambda hits, num_golds: hits,
    "any": any_hit,
    "fraction_golds": lambda hits, num_golds: [hit / max(num_golds, 1) for hit in hits],
    "fraction_answers": lambda hits, num_golds: [hit / len(hits) for hit in hits],
}

BRIERS = ("none", "paper", "released")

DUPLICATES = ("per_slot", "gate")


@dataclass(frozen=True)
class RewardSpec:
    """Which reward. Hashable; raises UserError for names that do not exist."""

    # a key of COVERAGES
    coverage: str = "sum"

    # one of BRIERS
    brier: str = "paper"

    # confidences, `<other>` included, that sum to more than 1 are a format failure. Right where
    # one gold is, wrong where several may be
    sum_rule: bool = False

    # `per_slot`: a repeated answer earns nothing. `gate`: any repeat cancels the coverage of the
    # completion; its Brier term stays, so that repeating is no way out of it
    duplicates: str = "per_slot"

    # a format failure cancels the coverage and is charged the whole Brier term
    gate: bool = True

    # w_1 >= w_2 >= ... on the coverage of each answer, never on its Brier term; empty: all 1
    rank_weights: tuple[float, ...] = ()

    format_weight: float = 0.5
    coverage_weight: float = 1.0
    brier_weight: float = 1.0

    # further terms and their weights, keys of REWARD_TERMS
    terms: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        known = (
            self.coverage in COVERAGES and self.brier in BRIERS and self.duplicates in DUPLICATES
        )
        if not known:
            raise UserError(
                f"{self}: coverage is one of {', '.join(COVERAGES)}, brier of {BRIERS}, "
                f"duplicates of {DUPLICATES}"
            )

    @property
    def weights(self) -> dict[str, float]:
        """The weight of each term that is paid, by its name in REWARD_TERMS."""
        weights = {"format": self.format_weight, "coverage": self.coverage_weight}
        if self.brier != "none":
            weights["brier"] = self.brier_weight
        return weights | dict(self.terms)
