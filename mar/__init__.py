"""mar: multi-answer reinforcement learning of language models, from scratch in PyTorch."""

__version__ = "0.1.0"
