"""What the model is asked, in our own words, and the chat template around it.

The wording asks for what the reward pays: exactly K different answers, the bare answer inside its tag, confidences that are probabilities.
"""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from mar.answers.grammar import Element, Grammar
from mar.errors import UserError
from mar.records import Example, Prompt

# How a set of answers is asked for. `ranked` is the method; `prompted_k` and `verbalized` (verbalised sampling) are baselines
# that change nothing but these words.
STYLES = {
    "ranked": "Give exactly {count}, most likely first.",
    "prompted_k": "Give {count}.",
    "verbalized": "Draw {count} at random from all that you think possible, each with its probability.",
}


def _count(grammar: Grammar, noun: str) -> str:
    if grammar.num_answers == 1:
        return f"1 {noun}"
    plural = noun[:-2] + "es" if noun.endswith("is") else noun + "s"
    return f"{grammar.num_answers} different {plural}"


def _show(element: Element) -> str:
    return f"{element.opening}{'0.5' if element.kind in ('confidence', 'other') else '...'}{element.closing}"


def _form(grammar: Grammar) -> str:
    """The tags in order; of many slots the first and the last are shown."""
    last, out = grammar.num_answers - 1, ""
    for element in grammar.elements:
        if 0 < element.slot < last:
            dots = " and so on to "
            out += "" if out.endswith(dots) else dots
        else:
            out += _show(element)
    return out


def instructions(grammar: Grammar, noun: str, style: str = "ranked") -> str:
    """The request below the question. `noun` names one answer of the task; `style` is a key of STYLES."""
    parts = []
    if grammar.thinking:
        parts.append("Think first.")
    parts.append(
        STYLES[style].format(count=_count(grammar, noun))
        if grammar.multi
        else f"Give the most likely {noun}."
    )
    if grammar.analysis:
        parts.append("Then analyse how sure you can be.")
    if grammar.confident:
        parts.append(
            "A confidence is the probability (0 to 1) that its answer is right, judged by its accuracy."
        )
    if grammar.other:
        parts.append("In <other> give the probability that none is right.")
    parts.append(f"Write the bare {noun} in an answer tag and nothing outside the tags:")
    return " ".join(parts) + "\n" + _form(grammar)


def render_chat(tokenizer: Any, content: str, thinking: bool) -> str:
    """`content` as a user's turn, up to where the assistant begins."""
    if not tokenizer.chat_template:
        return content + "\n"
    messages = [{"role": "user", "content": content}]
    return tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, enable_thinking=thinking
    )


def think_state(rendered: str) -> str:
    """What a chat template has already written of the thoughts: `open`, `closed` (an empty block), or `none`."""
    if re.search(r"<think>\s*$", rendered):
        return "open"
    return "closed" if re.search(r"</think>\s*$", rendered) else "none"


def fit_grammar(grammar: Grammar, tokenizer: Any) -> Grammar:
    """The grammar that a completion can follow under this chat template: one that opens `<think>` makes thoughts part of it, one that
    closes an empty block takes them out."""
    state = think_state(render_chat(tokenizer, "?", grammar.thinking))
    return grammar if state == "none" else replace(grammar, thinking=state == "open")


def build_prompt(
    example: Example, grammar: Grammar, tokenizer: Any, noun: str, style: str = "ranked"
) -> Prompt:
    """Question, request and chat template as token ids. `grammar` is one that `fit_grammar` returned."""
    text = render_chat(
        tokenizer, f"{example.question}\n{instructions(grammar, noun, style)}", grammar.thinking
    )
    ids = tokenizer(text, add_special_tokens=not tokenizer.chat_template)["input_ids"]
    return Prompt(
        example=example, text=text, ids=tuple(ids), think_open=think_state(text) == "open"
    )


def load_tokenizer(folder: str | Path) -> Any:
    """The tokenizer of a Hugging Face model folder."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder} has no readable tokenizer ({' '.join(str(error).split())[:120]}): it needs tokenizer.json"
        ) from None
