"""The shape of the embedded model, and its tokenizer."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mar.answers.prompts import instructions
from mar.learn.demonstrations import demonstration_text, draw_demonstration, draw_grammar
from mar.policy.model import ModelConfig
from mar.records import Example

VOCABULARY = 2048  # at most
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def train_tokenizer(examples: Sequence[Example], noun: str, vocab_size: int, folder: Path) -> None:
    """A byte-level BPE tokenizer with a chat template.

    A confidence is written in digits, tags and most names are several tokens, and a token may cross
    the border between two tags, as in large models.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    rng = np.random.default_rng(0)
    texts = []
    names = [gold.name for example in examples for gold in example.golds]
    for example in examples:
        grammar, style = draw_grammar(rng)
        texts += [
            example.question,
            instructions(grammar, noun, style),
            demonstration_text(draw_demonstration(example, grammar, names, rng)),
        ]
    tokenizer = Tokenizer(models.BPE())
    pieces = Regex(
        r"[0-9]+>(?:</?[a-z]+)?|>?</?[a-z]+|0?\.(?=[0-9])|[0-9]| ?[A-Za-z]+|\n| ?[^\sA-Za-z0-9<>]+|\s|."
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pieces, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=special,
            initial_alphabet=alphabet,
            show_progress=False,
        ),
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|pad|>"
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)


def embedded_config(vocab_size: int, layers: int = 6, wide: int = 256) -> ModelConfig:
    """Qwen3 in small. `wide`: units inside a block."""
    return ModelConfig.from_hf(
        {
            "architectures": ["Qwen3ForCausalLM"],
            "vocab_size": vocab_size,
            "hidden_size": 128,
            "intermediate_size": wide,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0,
            "max_position_embeddings": 2048,
            "tie_word_embeddings": True,
        }
    )
