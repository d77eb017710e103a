"""Does AEM do here what the paper says, and when does it not? A replication study of arms x seeds, by `aem.train`.

    python experiments/replicate.py            # all of it, hours on 2 cores; can be stopped and started again at any time
    python experiments/replicate.py --quick    # two arms, two seeds, in minutes
    python experiments/replicate.py --report > experiments/results/report.md   # all tables, and the figures there

Each finished run is one line of experiments/results/runs.jsonl, never run again. Learning rates are chosen on TUNING seeds, the
map of regimes has MAPPED ones; what is reported runs on SEEDS, paired by seed, and so do the map's cells where AEM looked best.
All runs of one world start from the same warm start, and all arms of a seed see the same tasks.
"""

import argparse
import contextlib
import io
import itertools
import json
import math
import multiprocessing
import os
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from statistics import fmean, stdev

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
import torch
from matplotlib.figure import Figure
from tqdm import tqdm

import aem
import diagnose

RESULTS, DEFAULTS = Path(__file__).parent / "results", vars(aem.Config())
SEEDS, TUNING, MAPPED = tuple(range(1, 9)), (101, 102), (101, 102, 103)
QUICK = dict(steps=20, eval_every=20, eval_tasks=256)
T = {1: 12.71, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365}  # Student's t, 97.5 %, by degrees of freedom
RATES = (2e-4, 4e-4, 8e-4, 1.6e-3)
WORLDS = {"household": dict(steps=60, eval_every=60), "code": dict(steps=40, eval_every=40)}  # code is learned sooner
ESTIMATORS = ("grpo", "dapo", "gspo", "grpo++", "gigpo")
ARMS = {e + " + AEM" * with_aem: dict(estimator=e, aem=with_aem) for e in ESTIMATORS for with_aem in (False, True)}
PAIR = ("grpo", "grpo + AEM")
VARIANTS = {  # of GRPO + AEM
    "reversed": dict(aem_direction="reverse"),
    "shuffled": dict(aem_direction="shuffle"),
    "scope trajectory": dict(aem_scope="trajectory"),
    "scope batch": dict(aem_scope="batch"),
    "lambda 0.5": dict(lam=0.5),
    "lambda 2": dict(lam=2.0),
    "no gate": dict(min_range=0.0),
    "only what should raise entropy": dict(mask_drift="raise"),
    "only what should lower entropy": dict(mask_drift="lower"),
    "lr 1e-4": dict(lr=1e-4),  # smaller steps, as the theorem is about small ones
    "lr 1e-4, only what should raise entropy": dict(lr=1e-4, mask_drift="raise"),
    "lr 1e-4, only what should lower entropy": dict(lr=1e-4, mask_drift="lower"),
}
REGIMES = {  # rows of the map: what differs from the main setting in household
    "as in the main table": dict(),
    "start 20 %": dict(warm_steps=400),  # success of the starting policy hangs on how long it has imitated
    "start 10 %": dict(warm_steps=250),
    "start 5 %": dict(warm_steps=175),
    "4 epochs a batch": dict(epochs=4),
    "8 turns": dict(max_turns=8),
    "120 steps": dict(steps=120, eval_every=120),
}
CELLS = {f"{name}, {lr:g}": dict(more, env="household", lr=lr) for name, more in REGIMES.items() for lr in RATES}
KEPT = ("success", "reward", "response_entropy", "negative", "turns", "alpha_min", "alpha_max", "grad_norm", "clip_fraction")


# ---------------------------------------------------------------- runs
def finished():
    """All results: {key: line}, with held-out success at the end and the area under the curve (mean of all steps), in %."""
    file = RESULTS / "runs.jsonl"
    runs = {key(run["flags"], run["seed"]): run for run in map(json.loads, open(file) if file.exists() else ())}
    return {k: run | dict(end=100 * run["after"]["all"], area=100 * fmean(run["curves"]["success"])) for k, run in runs.items()}


def key(flags, seed):
    """What makes a run: its flags, but for defaults, in a fixed order, and its seed."""
    return json.dumps([sorted((k, v) for k, v in flags.items() if v != DEFAULTS[k]), seed])


def run(flags, seed):
    """Train once, on one core, in a process of its own. Returns: the line of runs.jsonl."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(io.StringIO()):
        try:
            rows, ended = aem.train(aem.Config(**flags, seed=seed, out=out, name="run")), ""
        except aem.UsageError as error:  # dynamic sampling finds no group that varies any more: the policy has collapsed
            rows, ended = [json.loads(line) for line in open(Path(out) / "run" / "metrics.jsonl")], str(error)
            last = aem.train(aem.Config(**flags | dict(steps=0, seed=seed, model=f"{out}/run", out=out, name="last")))[0]
            rows[-1] |= {name: value for name, value in last.items() if name.startswith("eval_")}
    seconds = sum(row["rollout_seconds"] + row["update_seconds"] for row in rows)
    rows += rows[-1:] * (flags["steps"] + 1 - len(rows))  # a run that has ended stays where it was
    curves = {name: [float(f"{row[name]:.4g}") for row in rows] for name in KEPT}
    ends = {when: {"all": row["eval_success"], **row["eval_by_type"]} for when, row in (("before", rows[0]), ("after", rows[-1]))}
    return {"flags": flags, "seed": seed, **ends, "curves": curves, "seconds": round(seconds, 1), "ended": ended}


def run_all(wanted, workers, bar):
    """Run what has no result yet, `workers` at a time; each result is written down at once."""
    known = finished()
    missing = {key(*pair): pair for pair in wanted if key(*pair) not in known}
    for flags, _ in missing.values():
        cfg = aem.Config(**flags)
        cfg.check()
        aem.warm_start(aem.make_environments(cfg, 1)[0], cfg)  # once, before several processes want it
    os.environ["TQDM_DISABLE"] = "1"  # in the workers: their bars
    bar.update(len(wanted) - len(missing))
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        for future in as_completed([pool.submit(run, *pair) for pair in missing.values()]):
            with open(RESULTS / "runs.jsonl", "a") as file:
                file.write(json.dumps(future.result()) + "\n")
            bar.update()


# ---------------------------------------------------------------- the study: which runs
def setting(env, arm, **more):
    return dict(eval_tasks=512, env=env) | WORLDS[env] | (ARMS.get(arm) or ARMS["grpo + AEM"] | VARIANTS[arm]) | more


def tuned(known, world):
    """Mean success at the end over the tuning seeds, by arm and learning rate, where all of them have run: {arm: {rate: %}}."""
    found = {arm: {lr: [run["end"] for run in lines(known, setting(world, arm, lr=lr), TUNING)] for lr in RATES} for arm in ARMS}
    return {arm: {lr: fmean(ends) for lr, ends in by.items() if len(ends) == len(TUNING)} for arm, by in found.items()}


def reported(known, world):
    """The runs of the main table and of the ablations, each arm at its own best learning rate: {name: flags}."""
    arms = {a: setting(world, a, lr=max(e, key=e.get)) for a, e in tuned(known, world).items() if len(e) == len(RATES)}
    if world == "household" and "grpo + AEM" in arms:
        arms |= {name: arms["grpo + AEM"] | flags for name, flags in VARIANTS.items()}
    return arms


def study(workers):
    """Everything, in an order in which each stage has what it needs."""
    total = len(WORLDS) * len(ARMS) * (len(TUNING) * len(RATES) + len(SEEDS)) + len(VARIANTS) * len(SEEDS)
    bar = tqdm(total=total + len(PAIR) * len(CELLS) * len(MAPPED), desc="runs", unit="run")
    for world in WORLDS:
        run_all([(setting(world, arm, lr=lr), s) for s in TUNING for lr in RATES for arm in ARMS], workers, bar)
        run_all([(flags, s) for flags in reported(finished(), world).values() for s in SEEDS], workers, bar)
    mechanism(reported(finished(), "household")["grpo + AEM"])
    run_all([(setting(arm=arm, **cell), s) for cell in CELLS.values() for s in MAPPED for arm in PAIR], workers, bar)
    again = [(flags, s) for arms in promising(finished()).values() for s in SEEDS for flags in arms]
    bar.total += len(again)
    run_all(again, workers, bar)


def mapped(known):
    """Cells of the map that are complete: {name: (runs without AEM, runs with it, the latter's leads in area)}."""
    pairs = {name: [lines(known, setting(arm=arm, **cell), MAPPED) for arm in PAIR] for name, cell in CELLS.items()}
    return {n: (*p, [b["area"] - a["area"] for a, b in zip(*p)]) for n, p in pairs.items() if min(map(len, p)) == len(MAPPED)}


def promising(known):
    """Cells in which AEM leads by two points, or by more than the interval: {name: flags: plain, AEM, shuffled AEM}."""
    chosen = [name for name, (_, _, leads) in mapped(known).items() if fmean(leads) > min(2, interval(leads))]
    return {name: [setting(arm=arm, **CELLS[name]) for arm in (*PAIR, "shuffled")] for name in chosen}


def mechanism(flags, states=64, samples=64, updates=4):
    """Diagnose the run of the first seed at its start, in its middle and at its end: results/mechanism-*.json."""
    for when, steps in (("start", 0), ("middle", flags["steps"] // 2), ("end", flags["steps"])):
        path = RESULTS / f"mechanism-{when}.json"
        if path.exists():
            continue
        with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(io.StringIO()):
            aem.train(aem.Config(**flags | dict(steps=steps), seed=SEEDS[0], out=out, name="run"))
            found = diagnose.diagnose(*diagnose.load(Path(out) / "run", when == "start"), states, samples, updates)
            diagnose.save(path, *found, states=states, samples=samples, updates=updates)


def quick(workers):
    """Two arms, two seeds, at the default learning rate: is everything in order?"""
    arms = [setting("household", arm, lr=7e-4) | QUICK for arm in PAIR]
    run_all([(flags, s) for s in SEEDS[:2] for flags in arms], workers, tqdm(total=4, desc="runs", unit="run"))
    contrasts(finished(), "household, quick: without AEM, with AEM", {"grpo": arms})


# ---------------------------------------------------------------- the report
def lines(known, flags, seeds):
    return [known[key(flags, s)] for s in seeds if key(flags, s) in known]


def interval(values):
    """Half of the 95 % interval of a mean, by Student's t."""
    return T[len(values) - 1] * stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def paired(a, b):
    """Text: mean of b - a, its 95 % interval, and p of the exact paired permutation test (all 2^n signs)."""
    d = [y - x for x, y in zip(a, b, strict=True)]
    p = fmean(abs(sum(map(math.prod, zip(signs, d)))) > abs(sum(d)) - 1e-9 for signs in itertools.product((1, -1), repeat=len(d)))
    return f"{fmean(d):+.1f} ± {interval(d):.1f}, p = {p:.2f}"


def table(title, head, rows):
    """Print a table of Markdown, of what is not empty; rows: {name: cells}."""
    text = [f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items() if any(cells)]
    if text:
        print(f"\n**{title}**\n\n| | {' | '.join(head)} |\n|{'---|' * (len(head) + 1)}", *text, sep="\n")


def contrasts(known, title, pairs, a="without", b="with"):
    """Print success at the end and area under the curve, %, of pairs of arms, and their difference; pairs: {name: two flags}."""
    rows = {}
    for name, pair in pairs.items():
        seeds = [s for s in SEEDS if all(key(flags, s) in known for flags in pair)]
        rows[name] = [f"{pair[0]['lr']:g}, {pair[1]['lr']:g}", str(len(seeds))]
        for measure in ("end", "area") if len(seeds) > 1 else ():
            values = [[run[measure] for run in lines(known, flags, seeds)] for flags in pair]
            rows[name] += [f"{fmean(v):.1f} ± {interval(v):.1f}" for v in values] + [paired(*values)]
    columns = [f"{measure}: {which}" for measure in ("end", "area") for which in (a, b, "difference")]
    table(title, ["learning rates", "seeds", *columns], rows)


def tables(known):
    """Print what there are results for."""
    for world in WORLDS:
        rows = {arm: [f"{ends[lr]:.1f}" if lr in ends else "" for lr in RATES] for arm, ends in tuned(known, world).items()}
        table(f"{world}: success at the end by learning rate, tuning seeds, %", [f"{lr:g}" for lr in RATES], rows)
        tried = {arm: [x for lr in RATES for x in lines(known, setting(world, arm, lr=lr), TUNING)] for arm in ARMS}
        arms = reported(known, world)
        full = [(e, e + " + AEM") for e in ESTIMATORS if {e, e + " + AEM"} <= set(arms)]
        rows = {e: [paired(*([run[m] for run in tried[arm]] for arm in (e, ours))) for m in ("end", "area")] for e, ours in full}
        table(f"{world}: with AEM - without at equal learning rates, all 4 rates, tuning seeds", ["end", "area"], rows)
        contrasts(known, f"{world}: without AEM, with AEM", {e: (arms[e], arms[ours]) for e, ours in full})
        varied = {name: (arms["grpo + AEM"], arms[name]) for name in VARIANTS if name in arms}
        contrasts(known, f"{world}: GRPO + AEM, and variants of it", varied, "AEM", "variant")
        ends = {arm: [line["after"] for line in lines(known, arms[arm], SEEDS)] for arm in ARMS if arm in arms}
        kinds = list(next((found[0] for found in ends.values() if found), ()))
        rows = {arm: [f"{100 * fmean(end[kind] for end in found):.1f}" for kind in kinds] for arm, found in ends.items() if found}
        table(f"{world}: success at the end by type of task, %", kinds, rows)
    again, cells = promising(known).items(), "household: cells of the map where AEM looked best, on other seeds"
    contrasts(known, f"{cells}: without AEM, with AEM", {name: arms[:2] for name, arms in again})
    contrasts(known, f"{cells}: with AEM, shuffled", {name: arms[1:] for name, arms in again}, "AEM", "shuffled")
    ended = sum(bool(run.get("ended")) for run in known.values())
    print(f"\n{len(known)} runs; {ended} of them ended early, as dynamic sampling found no group that varies any more")


def dynamics(known, file, arms):
    """Success and the share of negative advantages, and response entropy, over the training steps; arms: {label: flags}."""
    runs = {label: lines(known, flags, SEEDS) for label, flags in arms.items()}
    if min(map(len, runs.values())) < 2:
        return
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    drawn = ((left, "success", "-"), (left, "negative", "--"), (right, "response_entropy", "-"))
    for (i, (label, found)), (axis, name, dashes) in itertools.product(enumerate(runs.items()), drawn):
        steps = list(zip(*(line["curves"][name] for line in found)))
        mean, half = [fmean(v) for v in steps], [interval(v) for v in steps]
        text = {"success": "success", "negative": "responses with A < 0"}.get(name, f"mean of {len(found)} seeds")
        axis.plot(mean, dashes, color=f"C{i}", label=f"{label}: {text}")
        low, high = ([m + sign * h for m, h in zip(mean, half)] for sign in (-1, 1))
        axis.set_xlabel("training step; band: 95 % interval of the mean")
        axis.fill_between(range(len(mean)), low, high, alpha=0.15, color=f"C{i}")
    left.set(title="Success, and responses of negative advantage", ylabel="share of trajectories, of responses", ylim=(0, 1))
    right.set(title="Response entropy", ylabel="response entropy (nats)", ylim=(0, None))
    figure.legend(fontsize=8, loc="outside lower center", ncols=3)
    figure.savefig(RESULTS / f"{file}.png", dpi=120)


def regime_map(known):
    """GRPO + AEM against GRPO: rows REGIMES, columns RATES."""
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axis, grid = figure.subplots(), [[math.nan] * len(RATES) for _ in REGIMES]
    for name, (plain, ours, leads) in mapped(known).items():
        y, x = divmod(list(CELLS).index(name), len(RATES))
        grid[y][x], ends = fmean(leads), [fmean(run["end"] for run in runs) for runs in (plain, ours)]
        text = f"end {ends[0]:.0f} → {ends[1]:.0f}\narea {grid[y][x]:+.1f} ± {interval(leads):.1f}"
        axis.text(x, y, text, ha="center", va="center", fontsize=9)
    image = axis.imshow(grid, cmap="RdBu", vmin=-12, vmax=12, aspect="auto", alpha=0.8)
    figure.colorbar(image, label="area under the curve: with AEM - without (points)")
    axis.set(xticks=range(len(RATES)), xticklabels=RATES, yticks=range(len(REGIMES)), yticklabels=REGIMES, xlabel="learning rate")
    axis.set_title(f"GRPO → GRPO + AEM: held-out success at the end (%), difference in area; {len(MAPPED)} seeds", fontsize=10)
    figure.savefig(RESULTS / "regimes.png", dpi=120)


def report(_):
    """Print every table, draw every figure."""
    known = finished()
    tables(known)
    arms = reported(known, "household")
    dynamics(known, "dynamics", {arm: arms.get(arm, {}) for arm in PAIR})
    for file, prefix, base in (("drift", "", "grpo + AEM"), ("drift-small", "lr 1e-4, ", "lr 1e-4")):
        dynamics(known, file, {base: arms.get(base, {})} | {v: arms.get(prefix + v, {}) for v in VARIANTS if v[:4] == "only"})
    dynamics(known, "epochs", {arm: setting(arm=arm, **CELLS["4 epochs a batch, 0.0008"]) for arm in (*PAIR, "shuffled")})
    regime_map(known)
    if (RESULTS / "mechanism-end.json").exists():
        diagnose.plot([RESULTS / f"mechanism-{when}.json" for when in ("start", "middle", "end")], RESULTS / "mechanism.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="runs at a time, each on one core")
    parser.add_argument("--quick", dest="what", action="store_const", const=quick, default=study, help="two arms, two seeds")
    parser.add_argument("--report", dest="what", action="store_const", const=report, help="print and draw what the results say")
    args = parser.parse_args()
    args.what(args.workers)
