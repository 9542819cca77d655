"""The random beginning of the embedded model: its shape and its tokenizer.

    python experiments/embedded_model/begin.py FOLDER

Writes both into the folder; `recreate.sh` goes on from there.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from mar.answers.prompts import instructions
from mar.answers.tokenizer import load_tokenizer
from mar.learn.demonstrations import SFT_SEED, demonstration_text, draw_demonstration, draw_grammar
from mar.policy.model import Decoder, ModelConfig
from mar.policy.weights import save_model
from mar.records import Example
from mar.tasks import clinic

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

    rng, texts, names = (
        np.random.default_rng(0),
        [],
        [gold.name for example in examples for gold in example.golds],
    )
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


def embedded_config(vocab_size: int) -> ModelConfig:
    """The shape of the embedded model: Qwen3 in small."""
    return ModelConfig.from_hf(
        {
            "architectures": ["Qwen3ForCausalLM"],
            "vocab_size": vocab_size,
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0,
            "max_position_embeddings": 2048,
            "tie_word_embeddings": True,
        }
    )


def main() -> None:
    folder = Path(sys.argv[1])
    torch.manual_seed(0)
    train_tokenizer(clinic.load("train", 4000, SFT_SEED - 1), clinic.NOUN, VOCABULARY, folder)
    save_model(Decoder(embedded_config(len(load_tokenizer(folder)))), folder, torch.float32)


if __name__ == "__main__":
    main()
