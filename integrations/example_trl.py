"""GRPO with AEM in TRL, on a CPU, offline: the household game, played by `aem.py`'s rollout.

    pip install -r requirements.txt -r integrations/requirements-trl.txt
    python integrations/example_trl.py              # 20 steps from the embedded policy
    python integrations/example_trl.py --lam 0      # without AEM

What aem.py samples is handed to TRL token by token by a `rollout_func`: observations have
env_mask 0, so TRL doesn't train on them, and AEM gives each response its own alpha. One process.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # it warns of rollout functions

import datasets  # noqa: E402
import transformers  # noqa: E402
import trl  # noqa: E402
from trl_aem import AEMGRPOTrainer  # noqa: E402

import aem  # noqa: E402

GROUPS = 8
GROUP_SIZE = 8
METRICS = ("reward", "rewards/success/mean", "aem/responses", "aem/h_bar")
METRICS += ("aem/alpha_min", "aem/alpha_max")


def reward(reward, **columns):
    """What the episodes brought: columns are the further fields that `play` returned."""
    return reward


def success(success, **columns):
    return success


def tokens_of(trajectory):
    """Returns: (prompt, completion, 1 for each sampled token of the completion)."""
    start = trajectory.responses[0].start
    mask = [0] * len(trajectory.ids)
    for response in trajectory.responses:
        length = len(response.logp)
        mask[response.start : response.start + length] = [1] * length
    return trajectory.ids[:start], trajectory.ids[start:], mask[start:]


def make_rollout(policy, environments, cfg):
    """TRL's rollout_func: a prompt is the seed of a task, repeated for each of its rollouts."""

    def play(prompts, trainer):
        seeds = [int(prompt) for prompt in prompts]
        stream = f"trl/{trainer.state.global_step}"
        played = aem.rollout(policy, environments, seeds, 1, cfg, stream)
        prompt_ids, completion_ids, env_mask = zip(*map(tokens_of, played))
        return {
            "prompt_ids": list(prompt_ids),
            "completion_ids": list(completion_ids),
            "env_mask": list(env_mask),
            "logprobs": None,  # of another engine, if it samples
            "reward": [t.reward for t in played],
            "success": [float(t.success) for t in played],
        }

    return play


def make_trainer(policy, environments, cfg, steps, lam, folder):
    options = trl.GRPOConfig(
        output_dir=folder,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,  # it and the rollout's key-value cache exclude each other
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=1,
        max_steps=steps,
        learning_rate=7e-4,
        lr_scheduler_type="constant",
        loss_type="grpo",
        num_generations=GROUP_SIZE,
        per_device_train_batch_size=GROUPS * GROUP_SIZE,
        reward_weights=[1.0, 0.0],  # success is only logged
    )
    tasks = datasets.Dataset.from_list([{"prompt": str(seed)} for seed in range(GROUPS * steps)])
    return AEMGRPOTrainer(
        policy.model,
        [reward, success],
        options,
        tasks,
        processing_class=policy.tokenizer,
        rollout_func=make_rollout(policy, environments, cfg),
        lam=lam,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps, a batch each")
    parser.add_argument("--lam", type=float, default=1.0, help="AEM's lambda; 0 turns AEM off")
    args = parser.parse_args()
    cfg = aem.Config(groups=GROUPS, group_size=GROUP_SIZE, device="cpu")
    cfg.check()
    environments = aem.make_environments(cfg)
    policy = aem.load_policy(cfg, aem.warm_start(environments[0], cfg))
    before = aem.evaluate(policy, environments, cfg)[1]["eval_success"]
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(policy, environments, cfg, args.steps, args.lam, folder)
        trainer.remove_callback(transformers.PrinterCallback)  # a table follows
        trainer.train()
    after = aem.evaluate(policy, environments, cfg)[1]["eval_success"]
    print("step", *METRICS, sep="  ")
    for row in trainer.state.log_history[:-1]:
        values = [f"{row[name]:{len(name)}.2f}" for name in METRICS]
        print(f"{row['step']:4}", *values, sep="  ")
    print(f"held-out success: {before:.1%} before, {after:.1%} after, on {cfg.eval_tasks} tasks")


if __name__ == "__main__":
    main()
