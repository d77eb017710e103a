"""What AEM costs: its coefficients, and the entropies it needs, as shares of a training step.

    python experiments/aem_cost.py       # a minute on 2 cores; writes aem_cost.json

The same batch is rolled out with token entropies and without (log-probs only), in turn, so that
both meet the same noise; the entropies' cost is the median of the paired differences. A rollout's
trajectories don't depend on it.
"""

import argparse
import json
import sys
import time
from functools import partial
from pathlib import Path
from statistics import median
from unittest import mock

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
import aem


def log_probs_only(logits, ids):
    """What a trainer without AEM takes while sampling: aem.token_stats without the entropy."""
    logp = logits.gather(-1, ids.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)
    return logp, logp


def timed(function, *args):
    """Returns: (result, seconds)."""
    start = time.perf_counter()
    result = function(*args)
    return result, time.perf_counter() - start


def time_step(policy, optimizer, environments, cfg, step):
    """Seconds of each phase of a step, of the rollout twice."""
    ours = partial(aem.sample_batch, policy, environments, cfg, step)

    def plain():
        with mock.patch.object(aem, "token_stats", log_probs_only):
            return ours()

    rollouts = [("rollout", ours), ("rollout without entropies", plain)]
    if step % 2:
        rollouts.reverse()
    batches = {}
    seconds = {}
    for name, roll_out in rollouts:
        (batches[name], _), seconds[name] = timed(roll_out)
    batch = batches["rollout"]
    advantages, seconds["base advantages"] = timed(aem.assign_credit, batch, cfg)
    alphas, seconds["coefficients"] = timed(aem.modulate, batch, cfg, step)
    for r, advantage in zip(aem.responses_of(batch), (alphas * advantages).tolist()):
        r.advantage = advantage
    _, seconds["update"] = timed(aem.update, policy, optimizer, batch, cfg, step)
    return seconds


def main():
    """Time the phases of a step, with and without entropies, pair by pair."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--pairs", type=int, default=25, help="rollouts with and without entropies")
    pairs = parser.parse_args().pairs
    cfg = aem.Config(device="cpu")
    cfg.check()
    environments = aem.make_environments(cfg)
    policy = aem.load_policy(cfg, aem.warm_start(environments[0], cfg))
    optimizer = torch.optim.SGD(policy.weights, lr=0.0)  # every pair sees the same policy
    rows = []
    for step in tqdm(range(1, pairs + 1), desc="pairs"):
        rows.append(time_step(policy, optimizer, environments, cfg, step))
    medians = {name: median(row[name] for row in rows) for name in rows[0]}
    entropies = median(row["rollout"] - row["rollout without entropies"] for row in rows)
    phases = ("rollout", "base advantages", "coefficients", "update")
    step = sum(medians[name] for name in phases)
    table = {
        "AEM: coefficients": medians["coefficients"],
        "AEM: token entropies while sampling": entropies,
        "rollout, without the entropies": medians["rollout"] - entropies,
        "base advantages": medians["base advantages"],
        "update": medians["update"],
        "step": step,
    }
    for name, seconds in table.items():
        print(f"{name:<38}{seconds * 1000:>9.2f} ms{seconds / step:>9.2%}")
    results = {"median_seconds": table, "pairs": rows}
    Path(__file__).with_suffix(".json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
