"""How a run measures its policy: one set of answers per held-out prompt, at the training temperature, always the same items and draws; and what it
says of that in the end."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mar.distributed import ALONE, World
from mar.draw import SamplingParams
from mar.grammar import Grammar
from mar.itemstats import estimate, resamples, set_metrics
from mar.log import Display, plain
from mar.metrics import SHOWN_METRICS, gap_closed
from mar.model import Decoder
from mar.records import Prompt, Rollout
from mar.rewards import RewardSpec
from mar.rollout import Decode, judge_groups, judged_only, sample
from mar.tasks import How


@dataclass(frozen=True)
class Protocol:
    """Everything but the policy: what is asked, how it is drawn, how it is judged."""

    prompts: tuple[Prompt, ...]
    grammar: Grammar
    spec: RewardSpec
    verifier: How
    decode: Decode
    params: SamplingParams
    kv_budget_tokens: int
    seed: int


def measure(
    model: Decoder, protocol: Protocol, world: World = ALONE
) -> tuple[dict[str, Any], list[Rollout]]:
    """The metrics of `set_metrics`, with `interval` (metric -> 95 % bootstrap interval over items), and the rollouts they were read from. Draws
    depend on seed and item alone, not on the training step."""
    p = protocol
    groups, _ = sample(
        model, p.prompts, 1, p.params, p.kv_budget_tokens, (p.seed, "eval", 0), world.share
    )
    judged = judge_groups(p.prompts[world.share], groups, p.grammar, p.spec, p.verifier, p.decode)
    rollouts = [group[0] for group in judged_only(world.gather(judged))]
    values, found = set_metrics(rollouts, p.verifier, p.grammar.confident)
    weights = resamples(len(rollouts))
    return {
        **values,
        "interval": {name: estimate(statistic, weights)[1:] for name, statistic in found.items()},
    }, rollouts


def summary(document: Mapping[str, Any], num_answers: int) -> dict[str, Any]:
    """The part of `eval.json` that goes on the last line of stdout: four policies and how much of the gap is closed."""
    key = f"coverage@{num_answers}"
    columns = {name: document.get(name) for name in ("floor", "before", "after", "ceiling")}
    out: dict[str, Any] = {
        name: None if c is None else {k: c.get(k) for k in (key, *SHOWN_METRICS)}
        for name, c in columns.items()
    }
    known = columns["floor"] and columns["ceiling"] and columns["after"]
    out["gap_closed"] = (
        gap_closed(document["after"][key], document["floor"][key], document["ceiling"][key])
        if known
        else None
    )
    return out


def close(
    document: Mapping[str, Any], num_answers: int, folder: Path, display: Display, seconds: float
) -> None:
    """The table that a run ends with, the paths of what it wrote, and one JSON line for programs."""
    end = summary(document, num_answers)
    rows = (f"coverage@{num_answers}", *SHOWN_METRICS)
    display.table(
        f"{document['task']}, {document['num_items']} held-out items",
        {n: end[n] for n in ("floor", "before", "after", "ceiling")},
        rows,
    )
    if end["gap_closed"] is not None:
        display.say(
            f"gap closed: {end['gap_closed']:.3f}  (0: K draws from the posterior, 1: its K most probable answers)"
        )
    if display.mirror:
        display.mirror.close(plain(end), lambda: pictures(folder))
    for name in ("config.yaml", "metrics.jsonl", "completions.jsonl", "eval.json", "checkpoints"):
        display.say(f"  {folder / name}")
    print(
        json.dumps(plain({"run_dir": str(folder), "job_s": round(seconds, 1), **end})), flush=True
    )


def pictures(folder: Path) -> Mapping[str, Path]:
    """The run's figures, as files in its folder."""
    from mar import plots  # matplotlib is an extra

    return plots.save(plots.of_run(folder), folder / "plots")
