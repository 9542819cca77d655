"""Three tokenizers of the kinds that checkpoints have, trained here in a moment."""

import json
import string
from collections.abc import Callable
from pathlib import Path

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import PreTrainedTokenizerFast

WORDS = "a patient with fever and a cough what is it flu common cold measles < | > / [ ] INST s end"


def _save(tokenizer: Tokenizer, folder: Path, template: str, **named: str) -> Path:
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named)
    wrapped.chat_template = template
    wrapped.save_pretrained(folder)
    return folder


def byte_level(folder: Path) -> Path:
    """Qwen's kind. The marks of a turn are special, those of a tool call only added."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        [WORDS], trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet)
    )
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision|>"])
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in ("<tool>", "<think>")])
    template = (
        "<tool>none<|im_end|>{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return _save(tokenizer, folder, template, eos_token="<|endoftext|>")


def metaspace(folder: Path) -> Path:
    """Llama 2's kind: spaces are `▁`, bytes a fallback, end tokens lie in the vocabulary itself."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Fuse(), decoders.Metaspace()]
    )
    special = ["<unk>", "<s>", "</s>"]
    tokenizer.train_from_iterator(
        [WORDS], trainers.BpeTrainer(vocab_size=80, special_tokens=special)
    )
    written = json.loads(tokenizer.to_str())
    vocabulary = written["model"]["vocab"]
    for byte in range(256):
        vocabulary[f"<0x{byte:02X}>"] = len(vocabulary)
    tokenizer = Tokenizer.from_str(json.dumps(written))
    template = "<s>[INST] {{ messages[0]['content'] | trim }} [/INST]"
    return _save(tokenizer, folder, template, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def unigram(folder: Path) -> Path:
    """T5's kind, with a normaliser: another spelling of a control token may become one."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    special = ["<unk>", "<|user|>", "<|end|>"]
    tokenizer.train_from_iterator(
        [WORDS],
        trainers.UnigramTrainer(
            vocab_size=140,
            special_tokens=special,
            unk_token="<unk>",
            initial_alphabet=list(string.printable),
        ),
    )
    tokenizer.add_tokens([AddedToken("<|turn|>", special=True, normalized=True)])
    template = "{% for m in messages %}<|turn|><|user|>{{ m['content'] }}<|end|>{% endfor %}"
    return _save(tokenizer, folder, template, eos_token="<|end|>", unk_token="<unk>")


KINDS: dict[str, Callable[[Path], Path]] = {
    "byte_level": byte_level,
    "metaspace": metaspace,
    "unigram": unigram,
}
