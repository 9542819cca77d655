"""One learning curve of ours or of TRL's GRPOTrainer on the same job.

    python -m experiments.peers.run ours|trl SEED

The job is the clinic's, with the embedded model. Both sides have the same weights, prompts in the
same order, rewards (judged by the same code), group size, learning rate, AdamW, clipping of
gradients, temperature and length limit; Dr. GRPO (credit `set`, the group's mean as baseline, no
division by its spread, every token 1 / the longest allowed length), one update a batch, all
parameters, one thread. What differs is the random draws and the code. TRL needs
`pip install -e '.[bench]'`. Writes logs/<side>_seed<SEED>.json.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from experiments.common.commands import write_log
from mar.answers.tokenizer import load_tokenizer
from mar.files import jsonable
from mar.measure.held_out import measure
from mar.policy.sources import EMBEDDED, environment
from mar.policy.weights import load_model
from mar.records import Completion, Prompt
from mar.run.compose import compose
from mar.run.console import Display
from mar.run.setup import Training, build_training
from mar.sample.rollout import judge_groups
from mar.train import train_step

HERE = Path(__file__).parent
STEPS = 60
LR = 4e-4
WORDS = (
    "+experiment=clinic",
    "algo=dr_grpo",
    "algo.entropy_coef=0",
    "model.trainable=",
    "model.lora_rank=0",
    f"model.lr={LR}",
    "optim.schedule=constant",
    "optim.warmup_frac=0",
    f"train.steps={STEPS}",
    "eval.num_items=500",
)
# Mean reward and seconds of each step.
Curve = tuple[list[float], list[float]]


def ours(training: Training) -> Curve:
    rewards = []
    seconds = []
    for step in range(STEPS):
        began = time.perf_counter()
        rewards.append(train_step(training, step).metrics["reward/total"])
        seconds.append(time.perf_counter() - began)
    return rewards, seconds


def judged(ids: list[int], prompt: Prompt, training: Training) -> float:
    """The reward of one completion of TRL's."""
    stopped = bool(ids) and ids[-1] in training.held_out.params.stop_ids
    no_logprobs = np.zeros(len(ids), np.float32)
    finish_reason = "stop" if stopped else "length"
    completion = Completion(0, np.array(ids), no_logprobs, no_logprobs, finish_reason)
    groups = judge_groups([prompt], [[completion]], training.held_out.scorer)
    return groups[0][0].total


def trl(training: Training, out: Path) -> Curve:
    """TRL with the same numbers.

    Its policy is left in `training.learner.policy`, to be measured as ours is.
    """
    import datasets
    import transformers
    from trl import GRPOConfig, GRPOTrainer

    algo = training.config.algo
    max_tokens = training.held_out.params.max_tokens
    asked = [prompt for step in range(STEPS) for prompt in training.prompt_order.of_step(step)]
    rewards: list[float] = []
    seconds: list[float] = []
    clock: list[float] = []

    def reward(completion_ids: list[list[int]], index: list[int], **_: Any) -> list[float]:
        found = []
        for ids, i in zip(completion_ids, index, strict=True):
            found.append(judged(ids, asked[i], training))
        rewards.append(float(np.mean(found)))
        return found

    class Clock(transformers.TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            clock.append(time.perf_counter())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seconds.append(time.perf_counter() - clock[-1])

    options = GRPOConfig(
        output_dir=str(out),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        beta=0.0,
        num_iterations=1,
        loss_type="dr_grpo",
        num_generations=algo.group_size,
        per_device_train_batch_size=algo.prompts_per_step * algo.group_size,
        gradient_accumulation_steps=1,
        max_steps=STEPS,
        max_completion_length=max_tokens,
        temperature=algo.temperature,
        top_k=0,
        top_p=1.0,
        scale_rewards="none",
        shuffle_dataset=False,
        learning_rate=LR,
        adam_beta1=0.9,
        adam_beta2=0.999,
        weight_decay=0.0,
        max_grad_norm=1.0,
        lr_scheduler_type="constant",
        seed=training.config.seed,
        save_strategy="no",
        report_to="none",
        logging_strategy="no",
        disable_tqdm=True,
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(EMBEDDED, dtype=torch.float32)
    data = datasets.Dataset.from_dict(
        {"prompt": [prompt.text for prompt in asked], "index": list(range(len(asked)))}
    )
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=options,
        train_dataset=data,
        processing_class=load_tokenizer(EMBEDDED),
        callbacks=[Clock()],
    )
    trainer.train()
    model.save_pretrained(out / "trained")
    training.learner.policy.load_state_dict(load_model(out / "trained").state_dict())
    return rewards, seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("side", choices=("ours", "trl"))
    parser.add_argument("seed", type=int)
    args = parser.parse_args()
    torch.set_num_threads(1)
    config = compose([*WORDS, f"seed={args.seed}"])
    training = build_training(config, EMBEDDED, Display("plain", 0, STEPS))
    with tempfile.TemporaryDirectory() as folder:
        if args.side == "ours":
            rewards, seconds = ours(training)
        else:
            rewards, seconds = trl(training, Path(folder))
    with training.learner.sampling_policy() as policy:
        after, _ = measure(policy, training.held_out)
    document = {
        "side": args.side,
        "seed": args.seed,
        **environment(),
        "rewards": rewards,
        "seconds": seconds,
        "after": after,
    }
    if args.side == "trl":
        from importlib.metadata import version

        document["trl"] = version("trl")
    log = HERE / "logs" / f"{args.side}_seed{args.seed}.json"
    write_log(log, jsonable(document))
    first, last = np.mean(rewards[:10]), np.mean(rewards[-10:])
    step_s = np.median(seconds)
    print(f"{args.side} {args.seed}: {last:.3f} after {first:.3f}, {step_s:.2f} s a step")


if __name__ == "__main__":
    main()
