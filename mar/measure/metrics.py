"""Every metric of answer sets: one function and one entry in METRICS each.

To add a metric, write a function from `AnswerArrays` to a `Statistic` and enter it in METRICS: it
is then logged at every training step (`train/...`), in `eval.json` with its interval, and by
`mar.evaluate`. The first paragraph of its docstring is its line in README.md, which `make report`
writes.

Shapes: P prompts (the items), G sets of each item, K answers in a set. A format failure counts as
wrong. A metric that the answers cannot have (calibration without confidences) is left out, never 0.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import pairwise, permutations

import numpy as np

from mar.answers.grammar import RESERVED_TAG
from mar.measure.answer_sets import AnswerSet, Item, item_of_rollouts
from mar.measure.bootstrap import Statistic, divide_or_nan, mean_of, point_estimate
from mar.records import Rollout
from mar.verify.matching import matching_increments

NUM_BINS = 10  # of confidence, equally wide
NUM_ORDERS = 64  # of the sets of an item, where their union has to be matched


# ---- The sets of all items as arrays ----


@dataclass(frozen=True)
class AnswerArrays:
    """What every metric is computed from. `confident`: the answer form has confidences."""

    items: Sequence[Item]
    confident: bool

    @property
    def num_answers(self) -> int:
        """K answers in a set."""
        return len(self.items[0].sets[0].answers)

    @property
    def num_sets(self) -> int:
        """G sets of each item."""
        return len(self.items[0].sets)

    @cached_property
    def known(self) -> np.ndarray:
        """[P] the posterior of the item is known."""
        return np.array([item.best_value is not None for item in self.items])

    @cached_property
    def written(self) -> np.ndarray:
        """[P, G, K] an answer was written."""
        return self._of_sets(lambda s: [answer is not None for answer in s.answers]) > 0

    @property
    def multi_label(self) -> bool:
        return any(item.multi_label for item in self.items)

    @cached_property
    def mass(self) -> np.ndarray:
        """[P, G, K] exact probability of each answer where it is known, else its hit."""
        return self._of_sets(lambda s: s.mass)

    @cached_property
    def hits(self) -> np.ndarray:
        """[P, G, K] 1 for an answer that the reward pays for."""
        return self._of_sets(lambda s: s.hits)

    @cached_property
    def repeated(self) -> np.ndarray:
        """[P, G, K] 1 for an answer that an earlier slot of its set gave."""
        return self._of_sets(lambda s: s.repeated)

    @cached_property
    def readable(self) -> np.ndarray:
        """[P, G] the set follows the format."""
        return np.array([[s.reason is None for s in item.sets] for item in self.items])

    @cached_property
    def confidence(self) -> np.ndarray:
        """[P, G, K] nan where none was written or the set breaks the format."""
        confidence = self._of_sets(_confidences_or_nan)
        confidence[~self.readable] = np.nan
        return confidence

    @cached_property
    def tokens(self) -> np.ndarray:
        """[P, G] length of each completion."""
        return np.array([[s.tokens for s in item.sets] for item in self.items])

    @cached_property
    def coverage_curve(self) -> np.ndarray:
        """[P, G] mass that the union of m = 1..G sets covers."""
        curves = self._union_curves(_covered)
        for row, item in zip(curves, self.items, strict=True):
            if item.gold_worth:
                row[:] = matched_union_curve(item)
        return curves

    @cached_property
    def unique_curve(self) -> np.ndarray:
        """[P, G] how many answers of m = 1..G sets mean different things."""
        return self._union_curves(_meanings)

    @cached_property
    def pass_curve(self) -> np.ndarray:
        """[P, G] whether any answer of m = 1..G sets is right."""
        return self._union_curves(_any_hit)

    @cached_property
    def successive_words(self) -> list[list[tuple[list[str], list[str]]]]:
        """[P][G - 1] the words of each set and of the next."""
        words = [[plain_words(s.text) for s in item.sets] for item in self.items]
        return [list(pairwise(sets)) for sets in words]

    def _of_sets(self, read: Callable[[AnswerSet], Sequence[float]]) -> np.ndarray:
        """[P, G, K] what `read` finds in each set."""
        return np.array([[read(s) for s in item.sets] for item in self.items], float)

    def _union_curves(self, outcomes: Callable[[AnswerSet], Mapping[str, float]]) -> np.ndarray:
        """[P, G] the union curves of the outcomes, each with its worth, that a set shows."""
        return np.array([_union_curve_of(item, outcomes) for item in self.items])


def _confidences_or_nan(s: AnswerSet) -> list[float]:
    return [np.nan if q is None else q for q in s.confidences]


# The outcomes that a set shows, and what each is worth.


def _covered(s: AnswerSet) -> dict[str, float]:
    return {str(key): mass for key, mass in zip(s.keys, s.mass, strict=True) if mass > 0}


def _meanings(s: AnswerSet) -> dict[str, float]:
    return {key: 1.0 for key in s.keys if key is not None}


def _any_hit(s: AnswerSet) -> dict[str, float]:
    return {"hit": min(1.0, sum(s.hits))} if any(s.hits) else {}


def _union_curve_of(item: Item, outcomes: Callable[[AnswerSet], Mapping[str, float]]) -> np.ndarray:
    """[G] the union curve of one item."""
    shown = [outcomes(s) for s in item.sets]
    worth: dict[str, float] = {}
    for of_set in shown:
        worth |= of_set
    seen = np.zeros((len(shown), len(worth)), bool)
    for row, of_set in zip(seen, shown, strict=True):
        row[:] = [outcome in of_set for outcome in worth]
    return union_curve(seen, np.array(list(worth.values())))


def matched_union_curve(item: Item) -> np.ndarray:
    """[G] what m = 1..G sets cover together where an answer can be more than one gold.

    The worth of the golds in a maximum matching with all answers of the m sets, on average over
    NUM_ORDERS random orders of the sets (all orders where there are no more).
    """
    num_sets = len(item.sets)
    if math.factorial(num_sets) <= NUM_ORDERS:
        orders = list(permutations(range(num_sets)))
    else:
        rng = np.random.default_rng(0)
        orders = [tuple(rng.permutation(num_sets)) for _ in range(NUM_ORDERS)]
    total = np.zeros(num_sets)
    for order in orders:
        total += _worth_of_prefixes([item.sets[i] for i in order], item.gold_worth)
    return total / len(orders)


def _worth_of_prefixes(sets: Sequence[AnswerSet], gold_worth: Sequence[float]) -> np.ndarray:
    """[G] worth of the golds that the answers of the first m = 1..G sets take."""
    answers: list[str] = []
    golds_of: dict[str, tuple[int, ...]] = {}
    worth = []
    for one in sets:
        for key, golds in zip(one.keys, one.fits, strict=True):
            if key is not None and key not in golds_of:
                golds_of[key] = golds
                answers.append(key)
        _, taken = match_keys(answers, golds_of)
        worth.append(sum(gold_worth[gold] for gold in taken if gold is not None))
    return np.array(worth)


def match_keys(
    answers: Sequence[str], golds_of: Mapping[str, tuple[int, ...]]
) -> tuple[tuple[float, ...], tuple[int | None, ...]]:
    """`matching_increments` of answers whose golds are known already."""
    return matching_increments(answers, (), lambda key, _: golds_of[key], key=str)


def union_curve(seen: np.ndarray, worth: np.ndarray) -> np.ndarray:
    """[G] expected worth of what m = 1..G of the G sets show together, over all choices of m.

    seen [G, outcomes]: does a set show an outcome; worth [outcomes]. With one outcome this is the
    unbiased pass@k estimator, 1 - C(G - c, m) / C(G, m) (Chen et al. 2021).
    """
    num_sets = len(seen)
    counts = seen.sum(0)
    curve = np.empty(num_sets)
    missed = np.ones(len(worth))  # C(G - c, m) / C(G, m), for m = 0 at first
    for m in range(num_sets):
        missed = missed * np.maximum(num_sets - counts - m, 0) / (num_sets - m)
        curve[m] = worth @ (1 - missed)
    return curve


# ---- Right answers ----


def coverage(a: AnswerArrays) -> Statistic:
    """Mean number of distinct golds that the K answers hit; where the posterior is known, their exact
    probability mass."""
    return mean_of(a.mass.sum(-1))


def top1(a: AnswerArrays) -> Statistic:
    """Coverage of the first answer alone."""
    return mean_of(a.mass[..., 0])


def recall(a: AnswerArrays) -> Statistic:
    """Share of the golds hit, of the label that the reward pays for."""
    num_golds = np.array([item.num_golds for item in a.items])
    return mean_of(a.hits.sum(-1) / num_golds[:, None])


def precision(a: AnswerArrays) -> Statistic:
    """Share of the answers written that are right, by the label that the reward pays for."""
    return mean_of(np.where(a.written, a.hits, np.nan))


def pass_of_one_set(a: AnswerArrays) -> Statistic:
    """Whether any answer is right, of the label that the reward pays for."""
    return mean_of(a.pass_curve[:, 0])


def coverage_of_all_sets(a: AnswerArrays) -> Statistic:
    """Golds, or mass, that all answers of k cover together."""
    return mean_of(a.coverage_curve[:, -1])


def pass_of_all_sets(a: AnswerArrays) -> Statistic:
    """Whether any of k answers is right."""
    return mean_of(a.pass_curve[:, -1])


def unique_of_all_sets(a: AnswerArrays) -> Statistic:
    """How many of k answers differ."""
    return mean_of(a.unique_curve[:, -1])


# ---- How alike the sets of one item are ----

Words = Sequence[str]


def overlap(a: AnswerArrays, similarity: Callable[[Words, Words], float]) -> Statistic:
    """Mean similarity of each set of an item with the next."""
    pairs = a.successive_words
    return mean_of(np.array([[similarity(*pair) for pair in of_item] for of_item in pairs]))


def overlap_3gram(a: AnswerArrays) -> Statistic:
    """How many runs of three words successive sets of one item share (Jaccard)."""
    return overlap(a, partial(ngram_jaccard, n=3))


def overlap_4gram(a: AnswerArrays) -> Statistic:
    """How many runs of four words successive sets of one item share (Jaccard)."""
    return overlap(a, partial(ngram_jaccard, n=4))


def overlap_jaccard(a: AnswerArrays) -> Statistic:
    """How many words successive sets of one item share (Jaccard)."""
    return overlap(a, ngram_jaccard)


def overlap_rouge_l(a: AnswerArrays) -> Statistic:
    """How long the common subsequence of successive sets of one item is (ROUGE-L, F1)."""
    return overlap(a, rouge_l)


def plain_words(text: str) -> list[str]:
    """Lower-case words and numbers of a completion without its tags, as rouge-score cuts them."""
    return re.findall("[a-z0-9]+", RESERVED_TAG.sub(" ", text).lower())


def ngram_jaccard(a: Words, b: Words, n: int = 1) -> float:
    """|A and B| / |A or B| of the sets of n-grams; nan where neither text has any."""
    first = _ngrams(a, n)
    second = _ngrams(b, n)
    union = first | second
    return len(first & second) / len(union) if union else np.nan


def _ngrams(words: Words, n: int) -> set[tuple[str, ...]]:
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}


def rouge_l(a: Words, b: Words) -> float:
    """F1 of the longest common subsequence (Lin 2004); 0 where either is empty."""
    # row[j]: length of the longest common subsequence of the words of a so far and b[:j].
    row = [0] * (len(b) + 1)
    for x in a:
        before = row
        row = [0]
        for j, y in enumerate(b):
            row.append(before[j] + 1 if x == y else max(before[j + 1], row[j]))
    longest = row[-1]
    return 2 * longest / (len(a) + len(b)) if longest else 0.0


# ---- Confidences ----


def top1_conf(a: AnswerArrays) -> Statistic:
    """Coverage of the answer with the highest confidence.

    The first of the most confident slots; the first slot where there is no confidence.
    """
    most_confident = np.nan_to_num(a.confidence, nan=-1.0).argmax(-1)[..., None]
    return mean_of(np.take_along_axis(a.mass, most_confident, -1))


def brier(a: AnswerArrays) -> Statistic:
    """Mean (q - y)^2 over slots, its expectation where the posterior is known; a missing or unreadable
    slot is charged 1."""
    return mean_of(brier_loss(a.mass, a.confidence))


def ece(a: AnswerArrays) -> Statistic:
    """Expected calibration error over slots with a confidence, in 10 equal bins."""
    return calibration_error(a.mass, a.confidence)


def auroc(a: AnswerArrays) -> Statistic:
    """Chance that a right answer has a higher confidence than a wrong one."""
    return ranking_quality(a.mass, a.confidence)


def ece_top1(a: AnswerArrays) -> Statistic:
    """Calibration error of the first answer alone."""
    return calibration_error(a.mass[..., 0], a.confidence[..., 0])


def set_ece(a: AnswerArrays) -> Statistic:
    """Calibration error of the set: the sum of its confidences against whether it holds the answer
    (with several labels: the means of both).

    One label: min(1, sum of q) against whether the set holds it. Several: means of both over K.
    """
    K = a.num_answers
    expected = a.mass.sum(-1)
    said = a.confidence.sum(-1)
    if a.multi_label:
        return calibration_error(expected / K, said / K)
    return calibration_error(np.minimum(expected, 1.0), np.minimum(said, 1.0))


def brier_loss(mass: np.ndarray, confidence: np.ndarray) -> np.ndarray:
    """E(q - y)^2 of each slot, where y = 1 with probability `mass`; 1 without a confidence."""
    loss = mass * (confidence - 1) ** 2 + (1 - mass) * confidence**2
    return np.where(np.isnan(confidence), 1.0, loss)


def calibration_bins(mass: np.ndarray, confidence: np.ndarray) -> np.ndarray:
    """[P, 3, NUM_BINS]: of each bin the number of slots, the sum of q, and the sum of y.

    mass and confidence [P, ...]; slots without a confidence (nan) are left out.
    """
    bins = np.zeros((len(confidence), 3, NUM_BINS))
    has_confidence = ~np.isnan(confidence)
    item = np.nonzero(has_confidence)[0]
    q = confidence[has_confidence]
    y = mass[has_confidence]
    bin_of_slot = np.minimum((q * NUM_BINS).astype(int), NUM_BINS - 1)
    np.add.at(bins[:, 0], (item, bin_of_slot), np.ones_like(q))
    np.add.at(bins[:, 1], (item, bin_of_slot), q)
    np.add.at(bins[:, 2], (item, bin_of_slot), y)
    return bins


def calibration_error(mass: np.ndarray, confidence: np.ndarray) -> Statistic:
    """Expected calibration error over slots with a confidence (Naeini et al. 2015).

    Sum over bins of |mean q - mean y|, weighted by the share of slots in the bin.
    """

    def error(sums: np.ndarray) -> np.ndarray:
        bins = sums.reshape(*sums.shape[:-1], 3, NUM_BINS)
        count, q, y = np.moveaxis(bins, -2, 0)
        return divide_or_nan(np.abs(q - y).sum(-1), count.sum(-1))

    bins = calibration_bins(mass, confidence)
    return Statistic(bins.reshape(len(bins), -1), error)


def ranking_quality(mass: np.ndarray, confidence: np.ndarray) -> Statistic:
    """AUROC: P(a right answer has the higher confidence than a wrong one), ties counting one half.

    Over slots with a confidence. An exact mass counts as that share of a right answer and the rest
    of a wrong one. nan where all are right or all are wrong.
    """
    has_confidence = ~np.isnan(confidence)
    item = np.nonzero(has_confidence)[0]
    y = mass[has_confidence]
    levels, level_of_slot = np.unique(confidence[has_confidence], return_inverse=True)
    columns = np.zeros((len(confidence), 2, len(levels)))
    np.add.at(columns[:, 0], (item, level_of_slot), y)
    np.add.at(columns[:, 1], (item, level_of_slot), 1 - y)

    def probability(sums: np.ndarray) -> np.ndarray:
        # [..., levels] right and wrong answers at each confidence, in rising order
        right, wrong = np.split(sums, 2, axis=-1)
        wrong_below = wrong.cumsum(-1) - wrong / 2
        return divide_or_nan((right * wrong_below).sum(-1), right.sum(-1) * wrong.sum(-1))

    return Statistic(columns.reshape(len(confidence), -1), probability)


# ---- Against a known posterior: of the items that have one ----


def _where_known(a: AnswerArrays, values: np.ndarray) -> np.ndarray:
    """values [P, ...] with nan, which no mean counts, for items without a known posterior."""
    known = a.known.reshape(-1, *(1,) * (values.ndim - 1))
    return np.where(known, values, np.nan)


def q_mse(a: AnswerArrays) -> Statistic:
    """Mean (q - p)^2 (known posterior only).

    Over slots with a confidence.
    """
    return mean_of(_where_known(a, (a.confidence - a.mass) ** 2))


def total_variation(a: AnswerArrays) -> Statistic:
    """Total variation distance between what a set says and the posterior; "none of these" is one
    outcome (known posterior only)."""
    return mean_of(_where_known(a, tv_distance(a.mass, a.confidence)))


def value(a: AnswerArrays) -> Statistic:
    """E[sum y - mean (q - y)^2] of a set (known posterior only)."""
    return mean_of(_where_known(a, set_value(a.mass, a.confidence)))


def regret(a: AnswerArrays) -> Statistic:
    """How much smaller `value` is than that of the best possible set (known posterior only)."""
    best = np.array([item.best_value for item in a.items], float)[:, None]
    return mean_of(best - set_value(a.mass, a.confidence))


def set_value(mass: np.ndarray, confidence: np.ndarray) -> np.ndarray:
    """[..., K] -> [...] value of a set: E[sum y - mean (q - y)^2]."""
    return mass.sum(-1) - brier_loss(mass, confidence).mean(-1)


def tv_distance(mass: np.ndarray, confidence: np.ndarray) -> np.ndarray:
    """[..., K] -> [...] total variation between what a set says and the posterior.

    (sum |q - p| + |sum q - sum p|) / 2: everything outside the set is one outcome. nan where a slot
    has no confidence.
    """
    error = confidence - mass
    return (np.abs(error).sum(-1) + np.abs(error.sum(-1))) / 2


# ---- Form and length ----


def format_rate(a: AnswerArrays) -> Statistic:
    """Share of completions that follow the grammar exactly; the sum rule is not part of it (see
    `reward/sum_rule_breach`)."""
    return mean_of(a.readable)


def repeats_per_set(a: AnswerArrays) -> Statistic:
    """Answers that repeat an earlier one of their set."""
    return mean_of(a.repeated.sum(-1))


def tokens_per_set(a: AnswerArrays) -> Statistic:
    """Mean length of completions, in tokens."""
    return mean_of(a.tokens)


def prompt_tokens(a: AnswerArrays) -> Statistic:
    """Mean length of prompts, in tokens."""
    return mean_of(np.array([item.prompt_tokens for item in a.items]))


# ---- All of them ----


def always(a: AnswerArrays) -> bool:
    return True


def has_several_sets(a: AnswerArrays) -> bool:
    return a.num_sets > 1


def has_confidences(a: AnswerArrays) -> bool:
    return a.confident


def knows_posterior(a: AnswerArrays) -> bool:
    return bool(a.known.any()) and a.confident


@dataclass(frozen=True)
class Metric:
    """`compute` gives the metric of answers for which `applies` holds; its docstring says what it
    is."""

    compute: Callable[[AnswerArrays], Statistic]
    applies: Callable[[AnswerArrays], bool] = always


# {K} stands for the number of answers in a set, {all} for those in all sets of an item.
METRICS: dict[str, Metric] = {
    "coverage@{K}": Metric(coverage),
    "top1": Metric(top1),
    "recall@{K}": Metric(recall),
    "precision": Metric(precision),
    "pass@{K}": Metric(pass_of_one_set),
    "coverage@{all}": Metric(coverage_of_all_sets, has_several_sets),
    "pass@{all}": Metric(pass_of_all_sets, has_several_sets),
    "unique@{all}": Metric(unique_of_all_sets, has_several_sets),
    "overlap_3gram": Metric(overlap_3gram, has_several_sets),
    "overlap_4gram": Metric(overlap_4gram, has_several_sets),
    "overlap_jaccard": Metric(overlap_jaccard, has_several_sets),
    "overlap_rouge_l": Metric(overlap_rouge_l, has_several_sets),
    "top1_conf": Metric(top1_conf, has_confidences),
    "brier": Metric(brier, has_confidences),
    "ece": Metric(ece, has_confidences),
    "auroc": Metric(auroc, has_confidences),
    "ece_top1": Metric(ece_top1, has_confidences),
    "set_ece": Metric(set_ece, has_confidences),
    "q_mse": Metric(q_mse, knows_posterior),
    "tv_distance": Metric(total_variation, knows_posterior),
    "value": Metric(value, knows_posterior),
    "regret": Metric(regret, knows_posterior),
    "format_rate": Metric(format_rate),
    "repeats_per_set": Metric(repeats_per_set),
    "tokens_per_set": Metric(tokens_per_set),
    "prompt_tokens": Metric(prompt_tokens),
}


def compute_metrics(arrays: AnswerArrays) -> dict[str, Statistic]:
    """Every metric that applies to these answers, by name."""
    K = arrays.num_answers
    numbers = {"K": K, "all": arrays.num_sets * K}
    return {
        name.format(**numbers): metric.compute(arrays)
        for name, metric in METRICS.items()
        if metric.applies(arrays)
    }


def set_metrics(
    rollouts: Sequence[Rollout], confident: bool
) -> tuple[dict[str, float | None], dict[str, Statistic]]:
    """Every metric of rollouts, one set each: values (None where undefined) and statistics."""
    items = [item_of_rollouts(rollout.prompt, [rollout]) for rollout in rollouts]
    statistics = compute_metrics(AnswerArrays(items, confident))
    values = {name: point_estimate(statistic) for name, statistic in statistics.items()}
    return values, statistics
