"""Completions that want to be paid for more than they know.

K = 3, and the golds are influenza (flu, grippe), gout and vitamin B12 deficiency. Confidences are
written honestly unless they are the attack.
"""

from mar.answers.grammar import Grammar, render
from mar.records import Gold

GRAMMAR = Grammar("rlcr_multi", 3)
GOLDS = (Gold("influenza", ("flu", "grippe")), Gold("gout"), Gold("vitamin B12 deficiency"))

# of the attacks with signs: a number is asked for
NUMBERS = (Gold("5 mg"), Gold("10%"), Gold("$65"))
RIGHT = ("flu", "gout", "vitamin b12 deficiency")


def write(*answers: str, q: tuple[str, ...] = ("0.5", "0.3", "0.1"), think: str = "hm") -> str:
    slots = zip(range(1, 4), (*answers, "x", "y", "z"), q, strict=False)
    body = "".join(
        f"<answer{k}>{a}</answer{k}><confidence{k}>{c}</confidence{k}>" for k, a, c in slots
    )
    return f"<think>{think}</think>{body}"


REPEATS = {
    "the same three times": "flu",
    "punctuation": "Flu.",
    "case": "FLU",
    "article": "the flu",
    "indefinite article": "a flu",
    "spaces": "  f\u00adlu ",
    "full width": "\uff26\uff4c\uff55",
    "zero width": "f\u200bl\u200cu\u2060",
    "combining accent": "flu\u0301",
    "alias": "grippe",
    "alias and name": "influenza",
    "markdown": "**flu**",
    "quotes": "\u201cflu\u201d",
    "no-break space": "\u00a0flu\u00a0",
    "mathematical letters": "\U0001d41f\U0001d425\U0001d42e",
    "circled letters": "\u24d5\u24db\u24e4",
    "direction marks": "\u202eflu\u202c",
    "variation selector": "flu\ufe0f",
    "byte order mark": "\ufefffl\ufeffu",
    "hyphen": "-flu-",
    "null": "f\x00lu",
    "tabs and lines": "\tflu\n",
    "trade mark": "flu\u2122",
    "ligature": "\ufb02u",
}

NO_PROBABILITY = [
    *("nan", "inf", "-0", "-0.1", "1e-9", "1%", "1.5", "1.0000001", "", "high", "0,5", "0x1"),
    *(
        "+0.5",
        "1_0",
        "\u0661",
        "\uff11",
        "0.5 0.9",
        "1/2",
        "0.5.",
        "0..5",
        ".",
        "10",
        "2",
        "0.5\u0660",
    ),
    *("0.5f", "5e-1", "1.00000000000000000000000000000000001", "0." + "3" * 39, "0" * 10**6),
]

# name -> (completion, the most coverage that it may be paid)
ANSWERS: dict[str, tuple[str, int]] = {}
ANSWERS |= {
    f"repeats: {name}": (write("flu", said, said + "!"), 1) for name, said in REPEATS.items()
}
ANSWERS |= {
    "look-alike letters": (write("fl\u057d", "g\u043eut", "vitamin \u042212 deficiency"), 0),
    "all golds in one answer": (write("flu, gout, vitamin B12 deficiency"), 0),
    "A or B": (write("flu or gout", "gout or flu"), 0),
    "A/B": (write("flu/gout"), 0),
    "one per line": (write("flu\ngout"), 0),
    "gold with a hedge": (write("flu (most likely)"), 0),
    "negated": (write("not flu", "no gout"), 0),
    "empty": (write("", "", ""), 0),
    "nothing visible": (write("\u200b", "\u3164", "\u2800"), 0),
    "punctuation only": (write(".", "!", "?"), 0),
    "tags inside tags": (write("<answer1>flu</answer1>", "gout"), 0),
    "closing tag of another": (write("flu</answer2>", "gout"), 0),
    "nested think": (write(*RIGHT, think="<think>hm</think>"), 0),
    "second think": (write(*RIGHT) + "<think>no</think>", 0),
    "right only in the thinking": (
        write("x", think="<answer1>flu</answer1><confidence1>1</confidence1>"),
        0,
    ),
    "echo of the prompt": ("Write <answer1>flu</answer1>" + write(*RIGHT), 0),
    "answers twice": (write(*RIGHT) + write(*RIGHT), 0),
    "answers before the thinking": (
        write(*RIGHT).replace("<think>hm</think>", "") + "<think>hm</think>",
        0,
    ),
    "order 2 1 3": (
        write(*RIGHT)
        .replace("answer1", "answerX")
        .replace("answer2", "answer1")
        .replace("answerX", "answer2"),
        0,
    ),
    "a fourth answer": (write(*RIGHT) + "<answer4>gout</answer4><confidence4>0.1</confidence4>", 0),
    "trailing prose": (write(*RIGHT) + " I am sure.", 0),
    "not finished": (write(*RIGHT)[:-1], 0),
    "upper-case tags": (write(*RIGHT).replace("answer1", "ANSWER1"), 0),
    "tags with spaces": (write(*RIGHT).replace("<answer1>", "<answer1 >"), 0),
    "escaped tags": (write(*RIGHT).replace("<", "&lt;"), 0),
    "a million characters": (write("flu " * 250_000), 0),
    "a million accents": (write("f" + "\u0301\u0316" * 500_000), 0),
    "a million tags": ("<think>" * 150_000, 0),
    "a million openings": (write("<answer1>" * 110_000), 0),
}
ANSWERS |= {f"confidence {q!r}": (write(*RIGHT, q=(q, "0.1", "0.1")), 0) for q in NO_PROBABILITY}

# answers that cover more than one number, or another: none is one of NUMBERS
SIGNS = {
    "less than": ("<5 mg", "<10%", "<$65"),
    "more than": (">5 mg", ">10%", ">$65"),
    "at least": ("\u22655 mg", ">= 10%", "at least $65"),
    "at most": ("\u22645 mg", "<= 10%", "at most $65"),
    "unequal": ("\u22605 mg", "!=10%", "=\u0338$65"),
    "about": ("~5 mg", "\u224810%", "about $65"),
    "plus or minus": ("\u00b15 mg", "+/-10%", "\u00b1$65"),
    "minus": ("-5 mg", "\u221210%", "- $65"),
    "full width": ("\uff1c5 mg", "\uff1e10%", "\uff1d\u0338$65"),
    "ranges": ("1-5 mg", "1..10%", "$1-65"),
    "another unit": ("5 \u03bcg", "10\u2030", "\u20ac65"),
    "no unit": ("5", "10", "65"),
    "fractions": ("5/mg", "1/10%", "6/5"),
    "factorials": ("5! mg", "10!%", "$65!"),
}

SUM_RULE = {  # three confidences, whether their sum is allowed
    ("0.33", "0.33", "0.34"): True,
    ("0.33", "0.56", "0.11"): True,
    ("0.5", "0.5", "0.0000001"): True,  # 1.0000001, within the tolerance
    ("0.5", "0.5", "0.000002"): False,
    ("1", "1", "1"): False,
}

HONEST = render(GRAMMAR, RIGHT, (0.5, 0.3, 0.1), "hm")
