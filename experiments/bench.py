"""Benchmarks. Every claim is a ratio of medians, measured in one run in which the alternatives take turns.

    python experiments/bench.py sandbox      # evaluations per second, cost of a test; a minute

Results go to experiments/bench/NAME.json.
"""

import json
import os
import platform
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parents[1]))
import envs


def seconds(function):
    """Wall time of a call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def take_turns(alternatives, rounds=7):
    """{name: function} -> {name: median seconds}. Each round calls all of them, after one round that doesn't count."""
    measured = {name: [] for name in alternatives}
    for number in range(rounds + 1):
        for name, function in alternatives.items():
            measured[name] += [seconds(function)] if number else [function()][:0]
    return {name: median(values) for name, values in measured.items()}


def in_a_fresh_interpreter(code, entry, tests):
    """The common alternative: a new Python, asserts in the child, no protection. Returns whether it exits with 0."""
    asserts = "\n".join(f"assert {entry}(*{arguments!r}) == {value!r}" for arguments, value in tests)
    return subprocess.run([sys.executable, "-I", "-S", "-c", f"{code}\n{asserts}"], capture_output=True).returncode == 0


def sandbox():
    """The sandbox: throughput against a fresh interpreter per program, and what a further test costs."""
    box, code, tests = envs.Sandbox(workers=2), "def f(x):\n    return 2 * x", [([i], 2 * i) for i in range(4)]
    many, few, batch = [([i], 2 * i) for i in range(201)], tests[:1], 40
    with ThreadPoolExecutor(8) as eight, ThreadPoolExecutor(2) as two:
        times = take_turns({
            "sandbox, one after the other": lambda: [box.grade(code, "f", tests) for _ in range(batch)],
            "sandbox, 2 workers, 8 threads": lambda: list(eight.map(lambda _: box.grade(code, "f", tests), range(batch))),
            "fresh interpreter, one after the other": lambda: [in_a_fresh_interpreter(code, "f", tests) for _ in range(batch)],
            "fresh interpreter, 2 threads": lambda: list(two.map(lambda _: in_a_fresh_interpreter(code, "f", tests), range(batch))),
            "1 test": lambda: [box.grade(code, "f", few) for _ in range(batch)],
            "201 tests": lambda: [box.grade(code, "f", many) for _ in range(batch)],
        })  # fmt: skip
    a_test = (times.pop("201 tests") - times.pop("1 test")) / batch / 200
    rates = {name: round(batch / value, 1) for name, value in times.items()}
    for name, rate in rates.items():
        print(f"{name:<40}{rate:>8.0f} evaluations/s")
    print(f"{'a further test':<40}{a_test * 1e6:>8.1f} microseconds")
    return {"evaluations_per_second": rates, "microseconds_per_further_test": round(a_test * 1e6, 1)}


BENCHMARKS = {"sandbox": sandbox}


def main():
    """Run the benchmarks that the command line names, or all."""
    unknown = set(sys.argv[1:]) - set(BENCHMARKS)
    if unknown:
        sys.exit(f"bench.py: unknown benchmark {unknown.pop()}: use one of {', '.join(BENCHMARKS)}")
    for name in sys.argv[1:] or BENCHMARKS:
        machine = {"machine": platform.machine(), "cores": os.cpu_count(), "python": platform.python_version()}
        path = Path(__file__).with_suffix("") / f"{name}.json"
        path.write_text(json.dumps(machine | BENCHMARKS[name](), indent=1) + "\n")


if __name__ == "__main__":
    main()
