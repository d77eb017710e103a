"""Tests of the two diffs, each in a checkout that it was applied to:

PYTHONPATH=verl-agent pytest -q integrations/test_diffs.py     # and PYTHONPATH=rllm
"""

import asyncio
import random
import sys
from collections import defaultdict
from importlib.util import find_spec
from pathlib import Path
from statistics import mean, pstdev
from types import SimpleNamespace

import pytest
import torch

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

from test_verl import make_rows, nested, padded, reference, responses_of, same  # noqa: E402

needs_verl_agent = pytest.mark.skipif(
    find_spec("gigpo") is None, reason="no patched checkout of verl-agent in PYTHONPATH"
)
needs_rllm = pytest.mark.skipif(
    find_spec("rllm") is None, reason="no patched checkout of rLLM in PYTHONPATH"
)
ESTIMATORS = ["grpo", "grpo_passk", "rloo", "gigpo", "reinforce_plus_plus"]
ESTIMATORS += ["reinforce_plus_plus_baseline"]


# ------------------------------------------------------------------------------ verl-agent
@needs_verl_agent
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_verl_agent_advantages(estimator, seed):
    import numpy as np
    from verl import DataProto
    from verl.trainer.ppo.ray_trainer import compute_advantage

    rows = make_rows(seed)[:-1]
    random.Random(seed).shuffle(rows)
    for i, row in enumerate(rows):  # a row is a turn
        row["response_mask"] = row["response_mask"].cumprod(0)
        row["token_level_rewards"] = (row["rm_scores"] + i % 3) * row["response_mask"] / 10
    names = ("response_mask", "token_level_rewards")
    columns = {
        "uid": [row["uid"] for row in rows],
        "traj_uid": [row["key"] for row in rows],
        "anchor_obs": [row["uid"] + str(i % 2) for i, row in enumerate(rows)],
    }
    settings = {"gigpo_enable_similarity": False, "gigpo_similarity_thresh": 0.9}
    settings |= {"step_advantage_w": 1.0, "gigpo_mode": "mean_norm"}

    def advantages(**more):
        tensors = {name: padded(rows, name) for name in names}
        tensors["step_rewards"] = torch.arange(len(rows)) % 5 / 5
        extra = {name: np.array(column, dtype=object) for name, column in columns.items()}
        batch = DataProto.from_dict({**tensors, **more}, non_tensors=extra)
        batch = compute_advantage(batch, estimator, **settings)
        assert "entropys" not in batch.batch
        return batch.batch["advantages"]

    alphas = reference(rows, [row["response_mask"] for row in rows])
    found = advantages(entropys=padded(rows, "entropy"))
    base = advantages()
    assert max(alpha.max() for alpha in alphas) > 1.2
    for i, alpha in enumerate(alphas):
        same([found[i, : len(alpha)]], [base[i, : len(alpha)] * alpha])


@needs_verl_agent
def test_verl_agent_dynamic_batching(monkeypatch):
    """Entropies come back in the order of the batch, as log-probs do."""
    from verl import DataProto
    from verl.utils.debug import performance
    from verl.workers.actor.dp_actor import DataParallelPPOActor

    monkeypatch.setattr(performance, "_get_current_mem_info", lambda: (0, 0, 0, 0))
    responses = torch.arange(16).unsqueeze(1).expand(16, 8).contiguous()
    lengths = 8 + torch.arange(16) % 7
    tensors = {
        "responses": responses,
        "input_ids": torch.zeros(16, 16, dtype=torch.long),
        "position_ids": torch.zeros(16, 16, dtype=torch.long),
        "attention_mask": (torch.arange(16) < lengths.unsqueeze(1)).long(),
    }
    batch = DataProto.from_dict(tensors)
    batch.meta_info = {"micro_batch_size": 4, "temperature": 1.0}
    batch.meta_info |= {"use_dynamic_bsz": True, "max_token_len": 40}
    actor = DataParallelPPOActor.__new__(DataParallelPPOActor)
    actor.actor_module = SimpleNamespace(eval=lambda: None)
    actor.ulysses_sequence_parallel_size = 1
    actor._forward_micro_batch = lambda rows, **settings: (
        2 * rows["responses"],
        -rows["responses"],
    )
    logp, entropy = actor.compute_log_prob(batch, calculate_entropy=True)
    assert logp.equal(-responses)
    assert entropy.equal(2 * responses)


# ------------------------------------------------------------------------------ rLLM
def entropy_of(token):
    """What stands for a model: a token's entropy tells which response it is of."""
    return token // 1000 + token % 7 / 10


def make_episode(rng, task, number):
    """An episode of 1 to 4 steps; at times one of them starts from a new context."""
    from rllm.agents.agent import Episode, Step, Trajectory
    from rllm.engine.rollout import ModelOutput

    steps = []
    prompt = [1, 2, task]
    for _ in range(rng.randint(1, 4)):
        if rng.random() < 0.25:
            prompt = [9, 9, task]
        ids = [1000 * rng.randint(0, 2) + rng.randint(10, 999) for _ in range(rng.randint(1, 5))]
        output = ModelOutput(prompt_ids=prompt, completion_ids=ids, logprobs=[-0.1] * len(ids))
        steps.append(Step(prompt_ids=prompt, response_ids=ids, model_output=output, reward=0.0))
        prompt = [*prompt, *ids, 5, 6]
    trajectory = Trajectory(steps=steps, reward=float(rng.randint(0, 2)))
    return Episode(id=f"task{task}:{number}", trajectories=[trajectory], is_correct=True)


class Workers:
    """In place of the model's workers."""

    def compute_log_prob(self, batch):
        from verl.utils import tensordict_utils

        rows = [row.tolist() for row in batch["input_ids"].unbind()]
        entropy = [torch.tensor([float(entropy_of(i)) for i in [*row[1:], 0]]) for row in rows]
        outputs = {"entropy": entropy, "log_probs": [torch.zeros(len(row)) for row in rows]}
        return tensordict_utils.get_tensordict({n: nested(c) for n, c in outputs.items()})


def patched_backend(monkeypatch):
    """rLLM's backend without a cluster, which shuffles a batch in place of balancing it."""
    from omegaconf import OmegaConf
    from rllm.trainer.algorithms.config import AlgorithmConfig
    from rllm.trainer.verl import verl_backend

    def shuffle(batch, workers, **kwargs):
        batch.reorder(torch.randperm(len(batch)))

    monkeypatch.setattr(verl_backend, "balance_batch", shuffle)
    monkeypatch.setattr(verl_backend, "calculate_debug_metrics_compat", lambda batch: {})
    backend = verl_backend.VerlBackend.__new__(verl_backend.VerlBackend)
    backend.actor_rollout_wg = Workers()
    backend.use_reference_policy = False
    backend.use_prefix_grouper = False
    backend._get_aggregate_dp_size = lambda: 7  # so that most batches are filled with rows
    backend.algorithm_config = AlgorithmConfig()
    actor = {"loss_agg_mode": "token-mean", "ppo_mini_batch_size": 3}
    settings = {"actor_rollout_ref": {"rollout": {"n": 4, "temperature": 1.0}, "actor": actor}}
    settings |= {"data": {"train_batch_size": 3}, "trainer": {"balance_batch": True}, "rllm": {}}
    backend.config = backend.full_config = OmegaConf.create(settings)
    return backend


def expected_advantages(episodes):
    """(trajectory, ids, advantage) of every step, by loops."""
    rewards = defaultdict(list)
    for episode in episodes:
        rewards[episode.id.split(":")[0]].append(episode.trajectories[0].reward)
    base = {}
    steps = []
    for episode in episodes:
        task = episode.id.split(":")[0]
        trajectory = episode.trajectories[0]
        spread = pstdev(rewards[task]) + 1e-6
        base[trajectory.uid] = (trajectory.reward - mean(rewards[task])) / spread
        for step in trajectory.steps:
            entropy = torch.tensor([float(entropy_of(i)) for i in step.response_ids])
            row = {"uid": task, "entropy": entropy, "response_mask": torch.ones(len(entropy))}
            steps.append({**row, "trajectory": trajectory.uid, "ids": step.response_ids})
    alphas = reference(steps, [step["response_mask"] for step in steps])
    return [
        (step["trajectory"], step["ids"], alpha[0].item() * base[step["trajectory"]])
        for step, alpha in zip(steps, alphas)
    ]


@needs_rllm
@pytest.mark.parametrize("seed", range(5))
def test_rllm(seed, monkeypatch):
    from rllm.trainer.algorithms import config, transform
    from rllm.trainer.verl.transform import transform_episodes_to_dataproto

    rng = random.Random(seed)
    episodes = [make_episode(rng, task, number) for task in range(3) for number in range(4)]
    groups, _ = transform.transform_episodes_to_trajectory_groups(
        episodes, config.TransformConfig(), config.CompactFilteringConfig(enable=False)
    )
    engine = SimpleNamespace(tokenizer=SimpleNamespace(pad_token_id=0), processor=None)
    batch = transform_episodes_to_dataproto(episodes, engine, 64, 64)
    backend = patched_backend(monkeypatch)
    state = SimpleNamespace(backend_batch=batch, metrics={}, timing_dict={}, episodes=episodes)
    state.trajectory_groups = groups
    asyncio.run(backend.process_backend_batch(state))
    asyncio.run(backend.compute_advantages(state, backend.algorithm_config))

    data = state.backend_batch.batch
    assert "entropys" not in data
    found = []
    for i, uid in enumerate(state.backend_batch.non_tensor_batch["step_ids"]):
        mask = data["response_mask"][i]
        for at in responses_of(mask, mask):
            advantages = data["advantages"][i][at]
            assert advantages.unique().numel() == 1
            found.append((uid, data["responses"][i][at].tolist(), advantages[0].item()))
    for one, other in zip(sorted(found), sorted(expected_advantages(episodes)), strict=True):
        assert one[:2] == other[:2]
        assert one[2] == pytest.approx(other[2], abs=1e-6)
