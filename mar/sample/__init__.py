"""The sampler: completions of prompts, with the log-probabilities they were drawn with.

Read `rollout.py` first (`sample`, and how completions become rollouts), then `engine.py`
(`generate`, a loop of four calls). `rows.py` and `kv_cache.py` hold its tensors, `draws.py` the
random numbers and the distribution that tokens are drawn from.
"""
