"""Which prompts a step asks: all of them once an epoch, by the seed and the step alone."""

import threading
from types import SimpleNamespace

import numpy as np
import pytest

from mar.errors import UserError
from mar.sample.prompt_order import GIVE_WAY_S, PromptOrder, order_of_epoch


def test_every_epoch_asks_all_prompts_once_in_an_order_of_its_own():
    asked = PromptOrder(prompts=range(10), per_step=4, seed=3)
    epochs = [p for step in range(5) for p in asked.of_step(step)]
    first, second = epochs[:10], epochs[10:]
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second
    assert asked.of_step(2) == epochs[8:12]  # across the border of an epoch
    assert asked.of_step(2) == PromptOrder(range(10), 4, 3).of_step(2)
    assert asked.of_step(2) != PromptOrder(range(10), 4, 4).of_step(2)


def test_a_step_of_a_million_prompts_does_not_order_all_of_them_again(monkeypatch):
    counts = []

    class Counted:
        def __init__(self, seed):
            self.rng = np.random.default_rng(seed)

        def permutation(self, count):
            counts.append(count)
            return self.rng.permutation(count)

    random = SimpleNamespace(default_rng=Counted)
    monkeypatch.setattr("mar.sample.prompt_order.np", SimpleNamespace(random=random))
    asked = PromptOrder(prompts=range(1_000_000), per_step=48, seed=20)
    for step in range(11):
        asked.of_step(step)
    # 528 prompts were asked for. One order would do, but threads of other tests may push it out of
    # the cache
    assert 1 <= counts.count(1_000_000) < 10


def test_prompts_out_of_turn_depend_on_the_attempt():
    asked = PromptOrder(prompts=range(50), per_step=4, seed=3)
    assert asked.out_of_turn(1, 1, 4) == asked.out_of_turn(1, 1, 4) != asked.out_of_turn(1, 2, 4)
    assert len(PromptOrder(range(2), 4, 3).out_of_turn(1, 1, 4)) == 4


class Slow:
    """Ten prompts that are made when they are asked for, one of which cannot be."""

    def __init__(self):
        self.makers = []

    def __len__(self):
        return 10

    def __getitem__(self, index):
        self.makers.append(threading.current_thread())
        if index == 7:
            raise UserError("no. 7")
        return int(index)


def test_the_prompts_of_the_next_step_are_made_meanwhile():
    prompts = Slow()
    asked = PromptOrder(prompts, per_step=2, seed=3)
    order = order_of_epoch(3, 0, 10).tolist()
    bad = order.index(7) // 2
    for step in range(bad):
        assert asked.of_step(step) == order[2 * step : 2 * step + 2]
    here = threading.current_thread()
    assert [maker is here for maker in prompts.makers[: 2 * bad]] == [True] * 2 + [False] * (
        2 * bad - 2
    )
    assert len(set(prompts.makers)) == 2  # one thread for all steps
    with pytest.raises(UserError, match="no. 7"):
        asked.of_step(bad)
    after = bad + 1
    assert asked.of_step(after) == order[2 * after : 2 * after + 2]


def test_prompts_out_of_turn_are_made_as_far_as_they_are_needed():
    prompts = Slow()
    asked = PromptOrder(prompts, per_step=4, seed=5)
    first = asked.out_of_turn(0, 1, 1)
    assert len(prompts.makers) == 1
    assert first == PromptOrder(range(10), 4, 5).out_of_turn(0, 1, 4)[:1]


def test_the_thread_does_not_begin_while_a_step_is_asked_for(monkeypatch):
    slept = []
    returned = threading.Event()

    def sleep(seconds):
        slept.append(seconds)
        assert returned.wait(10)

    monkeypatch.setattr("mar.sample.prompt_order.time", SimpleNamespace(sleep=sleep))
    prompts = Slow()
    asked = PromptOrder(prompts, per_step=2, seed=3)
    asked.of_step(0)
    assert set(prompts.makers) == {threading.current_thread()}
    returned.set()
    asked.of_step(1)
    assert slept[0] == GIVE_WAY_S
