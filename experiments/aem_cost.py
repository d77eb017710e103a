"""What AEM costs: its coefficients, and the entropies that it needs, as shares of a training step.

    python experiments/aem_cost.py       # a minute on 2 cores; writes aem_cost.json next to this file

The same batch is rolled out with token entropies recorded and without (log-probs only), in turn, so that both meet the same
noise; the entropies' cost is the median of the paired differences. A rollout's trajectories don't depend on it.
"""

import json
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import aem

PAIRS = 25


def log_probs_only(logits, ids):
    """What a trainer without AEM takes while sampling: aem.token_stats without the entropy."""
    logp = logits.gather(-1, ids.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)
    return logp, logp


def timed(function, *args):
    start = time.perf_counter()
    result = function(*args)
    return result, time.perf_counter() - start


def main():
    """Time the phases of a step, with and without entropies, pair by pair."""
    cfg, with_entropy = aem.Config(device="cpu"), aem.token_stats
    cfg.check()
    environments = aem.make_environments(cfg)
    policy = aem.load_policy(cfg, aem.warm_start(environments[0], cfg))
    optimizer = torch.optim.SGD(policy.model.parameters(), lr=0.0)  # the weights stay: every pair sees the same policy
    rows = []
    for pair in aem.tqdm(range(PAIRS), desc="pairs"):
        seconds = {}
        for name, stats in [("rollout", with_entropy), ("rollout without entropies", log_probs_only)][:: 1 if pair % 2 else -1]:
            aem.token_stats = stats
            (trajectories, _), seconds[name] = timed(aem.sample_batch, policy, environments, cfg, pair + 1)
            if stats is with_entropy:
                kept = trajectories
        aem.token_stats = with_entropy
        _, seconds["base advantages"] = timed(aem.assign_credit, kept, cfg)
        _, seconds["coefficients"] = timed(aem.modulate, kept, cfg, pair + 1)
        _, seconds["update"] = timed(aem.update, policy, optimizer, kept, cfg, pair + 1)
        rows.append(seconds)
    median = {name: statistics.median(row[name] for row in rows) for name in rows[0]}
    entropies = statistics.median(row["rollout"] - row["rollout without entropies"] for row in rows)
    step = median["rollout"] + median["base advantages"] + median["coefficients"] + median["update"]
    table = {
        "AEM: coefficients (aem_seconds)": median["coefficients"], "AEM: token entropies while sampling": entropies,
        "rollout, without the entropies": median["rollout"] - entropies, "base advantages": median["base advantages"],
        "update": median["update"], "step": step,
    }  # fmt: skip
    for name, seconds in table.items():
        print(f"{name:<38}{seconds * 1000:>9.2f} ms{seconds / step:>9.2%}")
    Path(__file__).with_suffix(".json").write_text(json.dumps({"median_seconds": table, "pairs": rows}, indent=1))


if __name__ == "__main__":
    main()
