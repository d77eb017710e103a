"""Runs that are killed at random moments and resumed: do they end as if nothing had happened?

    python experiments/interrupts.py              # 30 runs, a quarter of an hour on 2 cores

Each run is sent SIGINT, SIGTERM or SIGKILL, at a moment drawn from the whole of a run, up to twice;
then `--resume auto` takes it to its end. Its metrics (but for seconds), trajectories and weights
must equal those of a run that nobody disturbed, bit for bit, and an end by SIGINT or SIGTERM must
have exit code 130 or 143. The table is written to experiments/interrupts.txt.
"""

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).parents[1]
STEPS = 12
FLAGS = f"--steps {STEPS} --save_every 3 --eval_every 4 --eval_tasks 16 --groups 4 --group_size 4"
FLAGS += " --warm_steps 30 --device cpu --resume auto"
EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}


def start(folder, name):
    """The run as a process, begun or resumed."""
    command = [sys.executable, str(ROOT / "aem.py"), *FLAGS.split()]
    command += ["--out", str(folder), "--name", name, "--cache_dir", str(folder / "cache")]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def count_rows(run):
    file = run / "metrics.jsonl"
    return file.read_text().count("\n") if file.exists() else 0


def outcome(run):
    """What must not depend on interruptions."""
    rows = []
    for line in (run / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        rows.append({name: v for name, v in row.items() if not name.endswith("_seconds")})
    weights = (run / "checkpoint" / "model.safetensors").read_bytes()
    return rows, (run / "trajectories.txt").read_bytes(), weights


def interrupt(folder, name, number, moment):
    """Begin or resume a run, and kill it. Returns: what happened, and whether it ended rightly."""
    before = count_rows(folder / name)
    process = start(folder, name)
    time.sleep(moment)
    process.send_signal(number)
    code = process.wait(timeout=600)
    rows = count_rows(folder / name)
    story = f"{number.name} at {moment:4.1f} s, {rows:2} rows, exit {code}"
    training = before < rows <= STEPS  # before and after that, Python's own handlers answer
    return story, not training or code == EXIT_CODES[number]


def disturbed(folder, name, rng, whole, length):
    """One run, killed once or twice, then taken to its end.

    Returns: a line of the table, and whether all is as it should be.
    """
    stories = []
    good = True
    for _ in range(rng.randint(1, 2)):
        number = rng.choice(list(EXIT_CODES))
        story, right = interrupt(folder, name, number, rng.uniform(0, length))
        stories.append(story)
        good = good and right
    completed = start(folder, name).wait(timeout=600) == 0
    good = good and completed and outcome(folder / name) == whole
    return f"{'same' if good else 'NOT THE SAME':<14}{'; then '.join(stories)}", good


def main():
    """Run all, write the table; exit code 1 if a run was lost."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--runs", type=int, default=30)
    runs = parser.parse_args().runs
    rng = random.Random(0)
    lines = []
    good = 0
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        start(folder, "warm").wait()  # makes the warm start
        began = time.perf_counter()
        if start(folder, "whole").wait() != 0:
            sys.exit("interrupts.py: the undisturbed run failed")
        length = time.perf_counter() - began
        whole = outcome(folder / "whole")
        for i in tqdm(range(runs), unit="run"):
            line, same = disturbed(folder, f"run{i}", rng, whole, length)
            lines.append(line)
            good += same
            tqdm.write(line)
    lines.append(f"{good} of {runs} runs end as the undisturbed one, {runs - good} lost")
    Path(__file__).with_suffix(".txt").write_text("\n".join(lines) + "\n")
    print(lines[-1])
    sys.exit(0 if good == runs else 1)


if __name__ == "__main__":
    main()
