"""What the model is asked, in our own words, and the chat template around it.

The wording asks for what the reward pays: exactly K different answers, the bare answer inside its
tag, confidences that are probabilities. With `model.explain_decimals` it says which decimals are
read: any plain one (`grammar.py`). Without, only the 0.5 in the form shows it. The embedded model
was trained on those words and keeps them; so do runs from before the choice.
"""

import re
from dataclasses import replace
from typing import Any

import numpy as np

from mar.answers.grammar import Element, Grammar
from mar.answers.tokenizer import encode_chat, most_tokens, render_chat, tokens_around
from mar.records import Example, Prompt

# How a set of answers is asked for. `ranked` is the method; `prompted_k` and `verbalized`
# (verbalised sampling) are baselines that change nothing but these words.
STYLES = {
    "ranked": "Give exactly {count}, most likely first.",
    "prompted_k": "Give {count}.",
    "verbalized": (
        "Draw {count} at random from all that you think possible, each with its probability."
    ),
}


def _count(grammar: Grammar, noun: str) -> str:
    """`1 diagnosis`, or `3 different diagnoses`."""
    if grammar.num_answers == 1:
        return f"1 {noun}"
    plural = noun[:-2] + "es" if noun.endswith("is") else noun + "s"
    return f"{grammar.num_answers} different {plural}"


def _example_of(element: Element) -> str:
    """The element with a placeholder inside."""
    is_number = element.kind in ("confidence", "other")
    placeholder = "0.5" if is_number else "..."
    return element.opening + placeholder + element.closing


def _form(grammar: Grammar) -> str:
    """The tags in order; of many answers the first and the last are shown."""
    dots = " and so on to "
    last = grammar.num_answers - 1
    form = ""
    for element in grammar.elements:
        between = 0 < element.slot < last
        if not between:
            form += _example_of(element)
        elif not form.endswith(dots):
            form += dots
    return form


# What is asked of a confidence, by `explain_decimals`.
CONFIDENCE = {
    False: (
        "A confidence is the probability (0 to 1) that its answer is right, judged by its accuracy."
    ),
    True: (
        "A confidence is the probability that its answer is right, a plain decimal from 0 to 1 "
        "such as 0.25, judged by its accuracy."
    ),
}
OTHER = {
    False: "In <other> give the probability that none is right.",
    True: "In <other> give the probability that none is right, also as a plain decimal.",
}


def instructions(
    grammar: Grammar, noun: str, style: str = "ranked", explain_decimals: bool = False
) -> str:
    """The request below the question.

    `noun` is what the task calls one answer (`diagnosis`), `style` a key of STYLES.
    """
    sentences = []
    if grammar.thinking:
        sentences.append("Think first.")
    if grammar.multi:
        sentences.append(STYLES[style].format(count=_count(grammar, noun)))
    else:
        sentences.append(f"Give the most likely {noun}.")
    if grammar.analysis:
        sentences.append("Then analyse how sure you can be.")
    if grammar.confident:
        sentences.append(CONFIDENCE[explain_decimals])
    if grammar.other:
        sentences.append(OTHER[explain_decimals])
    sentences.append(f"Write the bare {noun} in an answer tag and nothing outside the tags:")
    return " ".join(sentences) + "\n" + _form(grammar)


def think_state(rendered: str) -> str:
    """What the chat template has already written of the thoughts at the end of the prompt.

    `open`: the opening tag, `closed`: an empty block, `none`: nothing.
    """
    if re.search(r"<think>\s*$", rendered):
        return "open"
    if re.search(r"</think>\s*$", rendered):
        return "closed"
    return "none"


def fit_grammar(grammar: Grammar, tokenizer: Any) -> Grammar:
    """The grammar that a completion can follow under this chat template.

    A template that opens `<think>` makes thoughts a part of the completion, one that closes an
    empty block takes them out.
    """
    state = think_state(render_chat(tokenizer, "?", grammar.thinking))
    if state == "none":
        return grammar
    return replace(grammar, thinking=state == "open")


def tokens_beside_question(
    grammar: Grammar, tokenizer: Any, noun: str, style: str, explain_decimals: bool = False
) -> int | None:
    """The most tokens that a prompt can have beside those of its question; None: nobody knows."""
    around = tokens_around(tokenizer, grammar.thinking)
    if around is None:
        return None
    request = instructions(grammar, noun, style, explain_decimals)
    return around + most_tokens(request + "\n")


def build_prompt(
    example: Example,
    grammar: Grammar,
    tokenizer: Any,
    noun: str,
    style: str = "ranked",
    request_first: bool = False,
    explain_decimals: bool = False,
) -> Prompt:
    """Question, request and chat template as token ids. `request_first`: the request above.

    `grammar` is one that `fit_grammar` returned for this tokenizer.
    """
    parts = [example.question, instructions(grammar, noun, style, explain_decimals)]
    if request_first:
        parts.reverse()
    content = "\n".join(parts)
    text, ids = encode_chat(tokenizer, content, grammar.thinking)
    think_open = think_state(text) == "open"
    return Prompt(example=example, text=text, ids=np.array(ids, np.int32), think_open=think_open)
