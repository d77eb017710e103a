"""Compares what verl's updates saw with plain loops: python check.py FOLDER, after run.sh's run.

Advantages with GRPO's times AEM's alpha, from the recorded rewards and entropies, by loops over
rows, runs of 1s and tokens. Entropies of the first step with a forward of the policy in float64,
row by row. Nothing here is taken from the adapter. Fails if they differ, or nothing was tested.
"""

import math
import sys
from collections import Counter, defaultdict
from pathlib import Path
from statistics import mean, stdev

import torch
from transformers import AutoModelForCausalLM

LAM = 0.7  # as run.sh sets it, and so the temperature
TEMPERATURE = 0.8
MIN_RANGE = 0.1  # the default
ADVANTAGE_TOLERANCE = 1e-6
ENTROPY_TOLERANCE = 1e-4  # nats per token, float32 against float64


def responses_of(mask):
    """The positions of each response, a run of 1s."""
    responses = []
    previous = 0
    for position, sampled in enumerate(mask.tolist()):
        if sampled and not previous:
            responses.append([])
        if sampled:
            responses[-1].append(position)
        previous = sampled
    return responses


def alphas_of(h_bar):
    """AEM's alpha of each response of a group."""
    low = min(h_bar)
    high = max(h_bar)
    if high - low < MIN_RANGE:
        return [1.0] * len(h_bar)
    weights = [math.exp(-LAM * (h - low) / (high - low)) for h in h_bar]
    return [w / mean(weights) for w in weights]


def check_step(record):
    """Worst difference of the advantages, and what there was to see."""
    members = defaultdict(list)
    for row, uid in enumerate(record["uid"]):
        members[uid].append(row)
    differences = []
    seen = Counter()
    for rows in members.values():
        rewards = [record["rm_scores"][row].sum().item() for row in rows]
        advantage = {
            row: (reward - mean(rewards)) / (stdev(rewards) + 1e-6)
            for row, reward in zip(rows, rewards)
        }
        responses = [(row, at) for row in rows for at in responses_of(record["response_mask"][row])]
        h_bar = [mean(record["entropy"][row][at].double().tolist()) for row, at in responses]
        alphas = alphas_of(h_bar)
        for (row, at), alpha in zip(responses, alphas):
            found = record["advantages"][row][at].double()
            differences.append(found - advantage[row] * alpha)
            seen["advantages that AEM changed"] += abs(advantage[row] * (alpha - 1)) > 0.01
        seen["responses"] += len(responses)
        seen["groups"] += 1
        seen["rows"] += len(rows)
        turns = Counter(row for row, _ in responses)
        seen["rows with several responses"] += sum(count > 1 for count in turns.values())
    return torch.cat(differences).abs().max().item(), seen


@torch.no_grad()
def entropy_difference(record, folder):
    """Worst difference per token of the entropies to a forward of the policy in float64."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    differences = []
    for row, ids in enumerate(record["input_ids"]):
        mask = record["response_mask"][row].bool()
        logits = model(ids.unsqueeze(0)).logits[0, -len(mask) - 1 : -1]  # one position before
        log_p = (logits / TEMPERATURE).log_softmax(-1)
        entropy = -(log_p.exp() * log_p).sum(-1)
        differences.append((entropy - record["entropy"][row])[mask])
    return torch.cat(differences).abs().max().item()


def main(folder):
    files = sorted((folder / "record").glob("step-*.pt"))
    if len(files) < 2:
        sys.exit(f"{folder / 'record'}: {len(files)} steps, 2 are needed")
    failed = False
    for file in files:
        record = torch.load(file)
        worst, seen = check_step(record)
        print(f"{file.stem}:", ", ".join(f"{count} {what}" for what, count in seen.items()))
        print(f"{file.stem}: advantages differ from the loops by {worst:.1e} at most")
        failed |= not worst <= ADVANTAGE_TOLERANCE  # NaN fails too
        failed |= min(seen.values()) == 0
    worst = entropy_difference(torch.load(files[0]), folder / "policy")
    print(f"step-1: entropies differ from a float64 forward by {worst:.1e} nats at most")
    failed |= not worst <= ENTROPY_TOLERANCE
    print("FAILED" if failed else "as they should be")
    sys.exit(failed)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
