"""Does this answer mean that gold, and how many golds does a list of answers hit?

A maximum matching of answers and golds, whose spellings `normaliser.py` compares.
"""

from collections.abc import Callable, Hashable, Sequence
from functools import lru_cache

from mar.records import Gold
from mar.verify.normaliser import normalise

# (an answer, golds) -> the indices of the golds that the answer may take
Verifier = Callable[[str, Sequence[Gold]], tuple[int, ...]]

# what makes two answers the same
Key = Callable[[str], Hashable]

# None: not written
Answers = Sequence[str | None]

# normalised answer -> the indices of golds
Index = dict[str, tuple[int, ...]]

MANY_GOLDS = 8
MOST_INDICES = 1 << 12


@lru_cache(maxsize=1 << 16)
def _accepted(name: str, aliases: tuple[str, ...]) -> frozenset[str]:
    """The normalised answers that are a gold; never "" (nothing visible)."""
    return frozenset(normalise(one) for one in (name, *aliases)) - {""}


# Of many golds each answer would be compared with all. Kept by identity, because to hash the golds
# takes longer than to compare; the golds are kept too, so that no others come to have their id.
_indices: dict[int, tuple[Sequence[Gold], Index]] = {}


def _index(golds: Sequence[Gold]) -> Index:
    """Normalised answer -> the golds that it is."""
    kept = _indices.get(id(golds))
    if kept is not None:
        return kept[1]
    positions: dict[str, list[int]] = {}
    for position, gold in enumerate(golds):
        for name in _accepted(gold.name, gold.aliases):
            positions.setdefault(name, []).append(position)
    index = {name: tuple(found) for name, found in positions.items()}
    if len(_indices) >= MOST_INDICES:
        _indices.clear()
    _indices[id(golds)] = (golds, index)
    return index


def text_verifier(answer: str, golds: Sequence[Gold]) -> tuple[int, ...]:
    """The golds whose name or one of whose aliases the answer is."""
    wanted = normalise(answer)
    # what can change is no key, and of a few golds an index saves nothing
    if isinstance(golds, tuple) and len(golds) >= MANY_GOLDS:
        return _index(golds).get(wanted, ())
    return tuple(i for i, gold in enumerate(golds) if wanted in _accepted(gold.name, gold.aliases))


def matching_increments(
    answers: Answers,
    golds: Sequence[Gold],
    verifier: Verifier = text_verifier,
    key: Key = normalise,
) -> tuple[tuple[float, ...], tuple[int | None, ...]]:
    """The hits y_k of K answers [K], and the gold that each has in the final matching [K].

        y_k = M(a_1..a_k) - M(a_1..a_k-1)

    M is the size of the maximum matching of the distinct answers (by `key`) with the golds: an
    answer takes at most one gold, and a gold at most one answer. It grows by augmenting paths
    (Berge 1957): answer k may push an earlier one on to another of its golds, but never out. So
    y_k is 0 or 1 and depends on a_1..a_k alone.
    """
    candidates: list[tuple[int, ...]] = []
    seen: set[Hashable] = set()
    for answer in answers:
        mark = None if answer is None else key(answer)
        if answer is None or mark in seen:
            candidates.append(())
        else:
            seen.add(mark)
            candidates.append(verifier(answer, golds))

    slot_of: dict[int, int] = {}  # gold -> the answer that has it

    def augment(slot: int, visited: set[int]) -> bool:
        """Give the answer a gold, moving others on where needed; False: there is no way."""
        for gold in candidates[slot]:
            if gold in visited:
                continue
            visited.add(gold)
            if gold not in slot_of or augment(slot_of[gold], visited):
                slot_of[gold] = slot
                return True
        return False

    hits = tuple(float(augment(slot, set())) for slot in range(len(candidates)))
    gold_of = {slot: gold for gold, slot in slot_of.items()}
    taken = tuple(gold_of.get(slot) for slot in range(len(candidates)))
    return hits, taken


def expected_hits(
    answers: Answers, golds: Sequence[Gold], verifier: Verifier = text_verifier
) -> tuple[float, ...]:
    """[K] the probability that each answer hits, where one gold is right with its probability.

    That is the mass of the golds that no earlier answer had: the expectation of
    `matching_increments` over drawn labels. Like it, decided by a_1..a_k alone.
    """
    covered: set[int] = set()
    hits = []
    for answer in answers:
        candidates = set() if answer is None else set(verifier(answer, golds))
        new = candidates - covered
        covered |= new
        # sorted: a sum of floats depends on its order
        hits.append(float(sum(golds[gold].probability or 0.0 for gold in sorted(new))))
    return tuple(hits)


def repeats(
    answers: Answers,
    golds: Sequence[Gold] = (),
    verifier: Verifier = text_verifier,
    key: Key = normalise,
) -> tuple[bool, ...]:
    """[K] whether an earlier answer is the same by `key`, or means the same gold.

    The latter are two aliases of one gold. An answer that may be several golds does not count
    there: it is not known which of them is meant.
    """
    repeated = []
    seen_keys: set[Hashable] = set()
    seen_golds: set[int] = set()
    for answer in answers:
        if answer is None:
            repeated.append(False)
            continue
        mark = key(answer)
        candidates = verifier(answer, golds)
        meant = set(candidates) if len(candidates) == 1 else set()
        repeated.append(mark in seen_keys or not meant.isdisjoint(seen_golds))
        seen_keys.add(mark)
        seen_golds |= meant
    return tuple(repeated)


def exact_masses(
    answers: Answers, golds: Sequence[Gold], verifier: Verifier = text_verifier
) -> tuple[float, ...]:
    """[K] the probability of the gold that each answer takes in the maximum matching, else 0."""
    _, taken = matching_increments(answers, golds, verifier)
    return tuple(0.0 if gold is None else golds[gold].probability or 0.0 for gold in taken)


def meanings(
    answers: Answers, golds: Sequence[Gold], verifier: Verifier = text_verifier
) -> tuple[str | None, ...]:
    """[K] equal for answers that mean the same: the name of the one gold that an answer can be, or
    the answer itself, normalised. None where nothing was written."""
    keys: list[str | None] = []
    for answer in answers:
        if answer is None:
            keys.append(None)
            continue
        candidates = verifier(answer, golds)
        name = golds[candidates[0]].name if len(candidates) == 1 else answer
        keys.append(normalise(name))
    return tuple(keys)


def candidates(
    answers: Answers, golds: Sequence[Gold], verifier: Verifier = text_verifier
) -> tuple[tuple[int, ...], ...]:
    """[K] the golds, by index, that each answer can be."""
    return tuple(() if answer is None else verifier(answer, golds) for answer in answers)


def remembering(verifier: Verifier) -> Verifier:
    """The same verifier of one example, asked once about each answer.

    It compares with all golds or with the targets: their number tells the two apart.
    """
    known: dict[tuple[str, int], tuple[int, ...]] = {}

    def verify(answer: str, golds: Sequence[Gold]) -> tuple[int, ...]:
        question = (answer, len(golds))
        if question not in known:
            known[question] = verifier(answer, golds)
        return known[question]

    return verify
