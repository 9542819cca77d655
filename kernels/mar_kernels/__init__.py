"""The operations that are worth a kernel. `reference.py` is their specification, in plain PyTorch, and what a CPU runs."""

from .reference import answer_advantages, linear_logprobs, selected_logprobs

__all__ = ["answer_advantages", "linear_logprobs", "selected_logprobs"]
