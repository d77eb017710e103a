"""The paper's mechanism analysis on a run of yours: does 1 - alpha stand for relative surprisal, and does entropy follow?

    python experiments/diagnose.py runs/<name>            # the trained policy: a table, diagnosis.json and diagnosis.png there
    python experiments/diagnose.py runs/<name> --start    # the policy that the run started from: diagnosis-start.*

For each of `--updates` batches of new training tasks it takes `--states` responses at random and compares
- 1 - alpha, what AEM acts on, with S - H_resp, by Monte Carlo from `--samples` fresh continuations of each response's state;
- the drift that the theorem predicts there, the sum of A alpha (S - H), with the measured change of H_resp after one update on
  the whole batch by the run's own optimizer; and the same for the advantages without AEM, from the same weights.
The theorem is about a natural-gradient step at each state on its own; the update is AdamW on weights that all states share. So
signs and correlations can agree, sizes can't be compared.
"""

import argparse
import copy
import json
import math
import random
import sys
from pathlib import Path
from statistics import fmean

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import aem


def load(run, start):
    """The run's settings, its trained policy or the one it started from, and its environments. Raises UsageError."""
    try:
        settings = json.loads((run / "config.json").read_text())
        cfg = aem.Config(**settings | {"max_resample": 0, "device": "auto"})  # groups without variation are part of the picture
    except (OSError, ValueError, TypeError) as error:
        raise aem.UsageError(f"{run} is not the folder of a run of aem.py ({error})") from None
    cfg.check()
    environments = aem.make_environments(cfg)
    source = run if not start else aem.warm_start(environments[0], cfg) if cfg.model == "tiny" else cfg.model
    return cfg, aem.load_policy(cfg, source), environments


@torch.no_grad()
def relative_surprisal(policy, states, samples, cfg, seed=0):
    """How much more surprising each response was than a typical one at its state: S - H_resp, by Monte Carlo.

    H_resp is estimated from fresh continuations, by their summed token entropies (chain rule; less variance than surprisals).
    Args: states, n pairs (trajectory, response) that `policy` sampled. Returns: (S - H_resp, H_resp), two (n,), in nats.
    """
    policy.model.eval()
    surprisal, entropy = [], []
    for i, (t, r) in enumerate(states):
        rngs, cache = [random.Random(f"{seed}/{i}/{k}") for k in range(samples)], aem.SlotCache(samples)
        fresh = [aem.Trajectory(i, None, rng, t.ids[: r.start], [aem.Response(r.start)], waits=False) for rng in rngs]
        while not all(f.waits for f in fresh):
            aem.sample_tokens(policy, cache, range(samples), fresh, cfg)
        surprisal.append(-sum(r.logp))
        entropy.append(fmean(sum(f.responses[0].entropy) for f in fresh))
    return torch.tensor(surprisal) - torch.tensor(entropy), torch.tensor(entropy)


def entropy_change(policy, trajectories, states, before, samples, cfg, seed):
    """Change of H_resp at each state (n,) by one update of a copy of the policy, with the same random numbers as before it."""
    moved = aem.Policy(copy.deepcopy(policy.model), policy.tokenizer, cfg.temperature)
    optimizer = torch.optim.AdamW(moved.model.parameters(), lr=cfg.lr, weight_decay=0.0)
    aem.update(moved, optimizer, trajectories, cfg, 0)
    return relative_surprisal(moved, states, samples, cfg, seed)[1] - before


def diagnose_batch(policy, environments, cfg, number, states, samples):
    """One batch, one update with AEM and one without. Returns: columns, one value per state."""
    cfg.aem, cfg.kl_coef = True, 0.0
    step = -1 - number  # tasks of its own: no training step has a negative number
    trajectories, _ = aem.sample_batch(policy, environments, cfg, step)
    aem.assign_credit(trajectories, cfg)
    pairs = [(t, r) for t in trajectories for r in t.responses]
    base = [r.advantage for _, r in pairs]
    aem.modulate(trajectories, cfg, step)
    usable = [i for i, (t, _) in enumerate(pairs) if not t.masked]
    chosen = random.Random(f"{cfg.seed}/states/{number}").sample(usable, min(states, len(usable)))
    chosen_pairs = [pairs[i] for i in chosen]
    relative, entropy = relative_surprisal(policy, chosen_pairs, samples, cfg, number)
    alpha, advantage = torch.tensor([r.alpha for _, r in chosen_pairs]), torch.tensor([base[i] for i in chosen])
    with_aem = entropy_change(policy, trajectories, chosen_pairs, entropy, samples, cfg, number)
    for (_, r), a in zip(pairs, base):
        r.advantage = a
    without = entropy_change(policy, trajectories, chosen_pairs, entropy, samples, cfg, number)
    return {
        "relative_surprisal": relative, "one_minus_alpha": 1 - alpha, "h_resp": entropy, "advantage": advantage,
        "predicted": advantage * alpha * relative, "measured": with_aem,
        "predicted_without_aem": advantage * relative, "measured_without_aem": without,
    }  # fmt: skip


def correlation(x, y):
    return torch.corrcoef(torch.stack([x, y]))[0, 1].item() if len(x) > 2 and x.std() > 0 and y.std() > 0 else math.nan


def agreement(x, y):
    """Share of equal signs, among the states where neither is 0."""
    known = (x != 0) & (y != 0)
    return (x[known].sign() == y[known].sign()).double().mean().item()


def with_interval(statistic, x, y, draws=2000):
    """A statistic and its 95 % interval: the percentiles over bootstrap resamples of the states."""
    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(len(x), (draws, len(x)), generator=generator)
    values = torch.tensor([statistic(x[i], y[i]) for i in picks], dtype=torch.float64)
    ends = torch.tensor([0.025, 0.975], dtype=torch.float64)
    low, high = values.nanquantile(ends).tolist()  # NaN, if nothing varies in any of the resamples
    return {"value": statistic(x, y), "low": low, "high": high}


PANELS = {  # of a summary: columns x and y, axis labels
    "mechanism": ("relative_surprisal", "one_minus_alpha", "relative surprisal $S - H_{resp}$ (nats)", "$1 - \\alpha$"),
    "drift": ("predicted", "measured", "predicted drift $A\\,\\alpha\\,(S - H_{resp})$ (nats per unit step)",
              "measured change of $H_{resp}$ (nats)"),
}  # fmt: skip


def plot(files, path):
    """A row per diagnosis on disk: what AEM acts on against relative surprisal, predicted against measured change of entropy."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.4 * len(files)), layout="constrained")
    for axes, file in zip(figure.subplots(len(files), 2, squeeze=False), files):
        found = json.loads(file.read_text())
        columns = {name: torch.tensor(column) for name, column in found["states"].items()}
        for axis, (name, (x, y, x_label, y_label)) in zip(axes, PANELS.items()):
            good = columns["advantage"] > 0
            for chosen, colour, label in ((good, "tab:green", "$A > 0$"), (~good, "tab:red", "$A \\leq 0$")):
                axis.scatter(columns[x][chosen], columns[y][chosen], s=14, alpha=0.6, color=colour, label=label, linewidths=0)
            axis.axhline(0, color="grey", linewidth=0.6)
            axis.axvline(0, color="grey", linewidth=0.6)
            r, signs = found[name]["correlation"], found[name]["sign_agreement"]
            title = f"r = {r['value']:.2f} [{r['low']:.2f}, {r['high']:.2f}], signs agree in {signs['value']:.0%}"
            when = f"{file.stem.split('-')[1]}: " if len(files) > 1 else ""
            axis.set(xlabel=x_label, ylabel=y_label, title=f"{when}{title} of {len(columns[x])}")
            axis.legend()
    figure.savefig(path, dpi=120)


def diagnose(cfg, policy, environments, states, samples, updates):
    """All batches. Returns: columns {name: (states in all,)} and the summary of what they say."""
    numbers = aem.tqdm(range(updates), desc="diagnosis", unit="update")
    batches = [diagnose_batch(policy, environments, cfg, number, states, samples) for number in numbers]
    columns = {name: torch.cat([b[name] for b in batches]).double() for name in batches[0]}
    pairs = {name: (x, y) for name, (x, y, *_) in PANELS.items()}
    pairs["drift_without_aem"] = ("predicted_without_aem", "measured_without_aem")
    summary = {}
    for name, (x, y) in pairs.items():
        statistics = {"correlation": correlation, "sign_agreement": agreement}
        summary[name] = {label: with_interval(f, columns[x], columns[y]) for label, f in statistics.items()}
    summary["updates"] = [{name: b[name].sum().item() for name in list(b)[4:]} for b in batches]
    return columns, summary


def save(path, columns, summary, **settings):
    """Write summary and raw numbers as JSON."""
    raw = {name: [round(v, 5) for v in column.tolist()] for name, column in columns.items()}
    path.write_text(json.dumps({"settings": settings, **summary, "states": raw}))


def main():
    """Diagnose the run that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], usage="diagnose.py runs/<name> [--flag value]")
    parser.add_argument("run", type=Path, help="folder of a run of aem.py")
    parser.add_argument("--start", action="store_true", help="take the policy that the run started from")
    parser.add_argument("--states", type=int, default=64, help="states per batch")
    parser.add_argument("--samples", type=int, default=64, help="fresh continuations of each state")
    parser.add_argument("--updates", type=int, default=4, help="batches, each with its own update")
    args = parser.parse_args()
    try:
        if min(args.states, args.samples, args.updates) < 1:
            raise aem.UsageError("--states, --samples and --updates must be at least 1")
        cfg, policy, environments = load(args.run, args.start)
    except (aem.UsageError, ValueError) as error:
        print(f"diagnose.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    path = args.run / f"diagnosis{'-start' * args.start}"
    settings = {"states": args.states, "samples": args.samples, "updates": args.updates}
    columns, summary = diagnose(cfg, policy, environments, **settings)
    save(path.with_suffix(".json"), columns, summary, **settings, start=args.start)
    plot([path.with_suffix(".json")], path.with_suffix(".png"))
    print_table(summary, len(columns["advantage"]))
    print(f"look at {path}.png; raw numbers are in {path}.json")


def print_table(summary, states):
    """Print the correlations, and predicted and measured sums, update by update."""
    labels = {
        "mechanism": "1 - alpha and S - H_resp",
        "drift": "predicted and measured change of H_resp, with AEM",
        "drift_without_aem": "predicted and measured change of H_resp, without",
    }
    print(f"{f'over {states} states':<52}{'correlation r':>22}{'signs agree':>22}")
    for name, label in labels.items():
        cells = [f"{s['value']:.2f} [{s['low']:.2f}, {s['high']:.2f}]" for s in summary[name].values()]
        print(f"{label:<52}{cells[0]:>22}{cells[1]:>22}")
    columns = f"{'predicted':>11}{'measured':>10}{'| without AEM: predicted':>26}{'measured':>10}"
    print(f"\n{'sums over the states of a batch':<32}{columns}")
    for i, row in enumerate(summary["updates"]):
        predicted, measured, plain, plain_measured = row.values()
        print(f"{f'update {i + 1}':<32}{predicted:>+11.1f}{measured:>+10.2f}{plain:>+26.1f}{plain_measured:>+10.2f}")


if __name__ == "__main__":
    main()
