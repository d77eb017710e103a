"""Everything that a GPU must show about this project, the most useful first, in minutes.

    python experiments/gpu.py                  # at most 8 minutes: all but `training`
    python experiments/gpu.py --parts decode --shape 7B --minutes 2   # no room for its AdamW
    python experiments/gpu.py --parts training --model FOLDER --minutes 9   # again: it goes on
    python experiments/gpu.py --device cpu     # the same code on a tiny model: shows no speed

    agreement   does a rollout in float32 sample on the GPU what it samples on a CPU?
    decode      a token of all rows: time and kernels against memory bandwidth; attention's kernels
    step        rollout and update of many turns: time against what the device can do
    lengths     peak memory of rollout, `SlotCache.keep` and update by length
    compiled    `step` of a model of four layers, without --compile and with it
    trl         a training step against TRL's, if it is installed
    training    imitation and RL of a real model (SmolLM2-135M-Instruct, say), AEM on and off

Each result is appended to --out/results.jsonl at once, a line each. A part that needs more than
what is left of --minutes is skipped, one that fails leaves its error; the next goes on. But for
`agreement` and `training`, models have random weights, in bfloat16 by autocast, as in training.
"""

import argparse
import contextlib
import copy
import datetime
import functools
import gc
import json
import re
import shutil
import signal
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean, median

import torch
import transformers
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
import bench
import memory
import real_model

import aem
import envs

RESULTS = Path(__file__).with_suffix("")
SHAPES = {"tiny": bench.TINY, "1.5B": bench.QWEN_1_5B, "7B": bench.QWEN_7B}
SAVING = 20  # seconds that are kept back, for a training run to end its step and save
TRAINING = real_model.SETTINGS | real_model.IMITATION  # the CPU's study, but for its machine
TRAINING |= {"eval_every": 20, "save_every": 20}
TRAINING |= {"micro_batch_tokens": aem.Config.micro_batch_tokens}


@dataclass
class Plan:
    """What is measured, on what, and how much of it."""

    device: str
    shape: str  # of SHAPES
    out: Path
    model: str = ""  # folder of a real one
    rows: int = 128
    turns: int = 4
    tokens: int = 128  # of a response
    prompt: int = 512  # tokens before those whose decoding is timed
    decoded: int = 16
    rounds: int = 3
    lengths: tuple = (1000, 4000)
    budgets: tuple = (aem.Config.micro_batch_tokens, 32768)  # --micro_batch_tokens
    warm_steps: int = 50  # of the embedded policy in `agreement`
    household_turns: int = 12  # and its turns
    backend: str = "inductor"
    steps: tuple = (20, 40, 60)  # of training: both arms go as far before one goes further
    training: dict = field(default_factory=TRAINING.copy)


SMALL_TRAINING = {"warm_steps": 2, "groups": 2, "group_size": 2, "eval_tasks": 4}
SMALL_TRAINING |= {"max_turns": 2, "max_response_tokens": 8}
SMALL = {  # on a CPU, in seconds
    "rows": 8,
    "turns": 2,
    "tokens": 4,
    "prompt": 64,
    "decoded": 4,
    "rounds": 1,
    "lengths": (64, 96),
    "budgets": (8192,),
    "warm_steps": 0,
    "household_turns": 3,
    "backend": "eager",  # needs no C++ compiler
    "steps": (1, 2),
    "training": TRAINING | SMALL_TRAINING,
}


# ------------------------------------------------------------------------------ measuring
def free():
    """Give back the memory of what nobody refers to any more."""
    gc.collect()  # policies refer to themselves
    if torch.cuda.is_available():
        with contextlib.suppress(RuntimeError):  # after an error that no later call gets over
            torch.cuda.empty_cache()


def measured(function, alone=False):
    """Returns: (what it returned, {seconds, and peak memory in GB, on a GPU}).

    `gb` is what tensors took, `retries` how often torch had to give back pieces of memory in which
    nothing fitted. If `alone`, no leftovers are there at first, and `reserved_gb` is what it held:
    near all there is where a cache has grown, as its earlier pieces are too small for a later one.
    """
    on_gpu = torch.cuda.is_available()
    if alone:
        free()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        retries = torch.cuda.memory_stats()["num_alloc_retries"]
    start = bench.now()
    result = function()
    found = {"seconds": bench.now() - start}
    if on_gpu:
        found["gb"] = torch.cuda.max_memory_allocated() / 1e9
        found["retries"] = torch.cuda.memory_stats()["num_alloc_retries"] - retries
        if alone:
            found["reserved_gb"] = torch.cuda.max_memory_reserved() / 1e9
    return result, found


@functools.cache
def rates(device):
    """What the device can do: FLOP/s of a bfloat16 matrix product, bytes/s of its memory.

    The bytes are those of a sum, or of a copy (read and written), whichever is faster.
    """
    flops, reading = bench.measured_rates(device, torch.bfloat16)
    source = torch.ones(2**24 if device == "cpu" else 2**30, device=device)
    target = torch.empty_like(source)
    copies = [measured(partial(target.copy_, source))[1]["seconds"] for _ in range(5)]
    return flops, max(reading, 2 * source.nbytes / median(copies))


def built(plan, compiled=False, **shape):
    """A policy of random weights that never ends a response, as aem.load_policy leaves it."""
    made = bench.policy(SHAPES[plan.shape] | shape, None, plan.device, "bfloat16")
    aem.checkpoint_layers(made.model)
    torch.backends.cuda.enable_cudnn_sdp(False)
    if compiled:
        torch.compiler.config.recompile_limit = 64
        made.body.compile(dynamic=True, backend=plan.backend)
    return made


def update_flops(made, trajectories):
    """What an update must multiply and add: forward and backward, nothing computed again."""
    body, head = bench.matrices(made)
    tokens = sum(len(t.ids) for t in trajectories)
    sampled = sum(len(r.logp) for r in aem.responses_of(trajectories))
    shape = made.model.config
    pairs = sum(len(t.ids) ** 2 for t in trajectories) / 2  # a token attends to those before it
    attention = 4 * shape.num_hidden_layers * shape.hidden_size * pairs
    forward = 2 * (body * tokens + head * sampled) + attention
    return 3 * forward


def measured_update(made, optimizer, trajectories, plan, budget, alone=False):
    """An optimizer step on these trajectories: seconds, memory, tokens/s, FLOPs utilisation."""
    cfg = bench.settings(micro_batch_tokens=budget)
    work = partial(aem.update, made, optimizer, trajectories, cfg, 1)
    metrics, found = measured(work, alone)
    tokens = sum(len(t.ids) for t in trajectories)
    found["tokens_per_second"] = tokens / found["seconds"]
    rate = update_flops(made, trajectories) / found["seconds"]
    found["utilisation"] = rate / rates(plan.device)[0]  # of the rate of a large matrix product
    return found | {"logp_gap": metrics.get("logp_gap"), "micro_batch_tokens": budget}


# ------------------------------------------------------------------------------ agreement
def first_difference(ids, others):
    """Position of the first id that is not the same, or the length of the shorter list."""
    for i, (x, y) in enumerate(zip(ids, others)):
        if x != y:
            return i
    return min(len(ids), len(others))


def compared(ours, theirs):
    """How far two rollouts of the same seeds agree, up to where the first token differs."""
    equal = 0
    logp_gaps = [0.0]
    entropy_gaps = [0.0]
    for t, other in zip(ours, theirs):
        same = first_difference(t.ids, other.ids)
        equal += same
        for r, s in zip(t.responses, other.responses):
            known = max(0, same - r.start)  # its tokens that both sampled
            logp_gaps += [abs(x - y) for x, y in zip(r.logp[:known], s.logp[:known])]
            entropy_gaps += [abs(x - y) for x, y in zip(r.entropy[:known], s.entropy[:known])]
    longest = sum(max(len(t.ids), len(other.ids)) for t, other in zip(ours, theirs))
    return {
        "equal_ids": equal / longest,
        "equal_trajectories": fmean(t.ids == other.ids for t, other in zip(ours, theirs)),
        "compared_tokens": len(logp_gaps) - 1,
        "logp_gap": max(logp_gaps),
        "entropy_gap": max(entropy_gaps),
    }


def agreement(plan):
    """The embedded policy in float32, the same seeds: rollouts, and gradients of one of them."""
    model, tokenizer = envs.embedded_policy(envs.Household(), plan.warm_steps, 0.35)
    limits = {"max_turns": plan.household_turns, "max_response_tokens": None}  # None: the game's
    cfg = bench.settings(groups=plan.rows // 8, **limits)
    rollouts, gradients = [], []
    for device in ("cpu", plan.device):
        made = aem.Policy(copy.deepcopy(model).to(device), tokenizer)
        aem.checkpoint_layers(made.model)
        environments = aem.make_environments(cfg)
        tasks = range(cfg.groups)
        played = aem.rollout(made, environments, tasks, cfg.group_size, cfg, "agreement")
        rollouts.append(played)
        batch = rollouts[0]
        bench.give_advantages(batch, cfg)
        aem.accumulate_gradients(made, batch, cfg)
        gradients.append(torch.cat([p.grad.flatten().cpu() for p in made.weights]))
    reference, other = gradients
    found = compared(*rollouts)
    found["gradient_difference"] = ((other - reference).norm() / reference.norm()).item()
    found["matmul_precision"] = torch.get_float32_matmul_precision()  # 'highest': no TF32
    yield found


# ------------------------------------------------------------------------------ decode
def profiled(made, function):
    """What torch's profiler saw of a call, as `counted` has it."""
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities, record_shapes=True) as recorded:
        measured(function)
    shapes = {tuple(p.shape) for p in made.weights if p.ndim == 2}
    return counted(recorded.events(), shapes)


def counted(events, shapes):
    """Kernels, their milliseconds, casts of weights of these shapes; which attention ran.

    `cudnn` counts what cuDNN ran: aem.load_policy turns its attention off.
    """
    found = {"kernels": 0, "kernel_ms": 0.0, "weight_casts": 0, "cudnn": 0}
    attention = Counter()
    largest = Counter()
    for event in events:
        name = event.name[:80]
        if re.search("attention|fmha|flash|cudnn", event.name, re.IGNORECASE):
            attention[name] += 1
            found["cudnn"] += "cudnn" in event.name.lower()
        if event.device_type == DeviceType.CUDA:
            took = event.time_range.elapsed_us() / 1000
            found["kernels"] += 1
            found["kernel_ms"] += took
            largest[name] += took
        elif event.name == "aten::_to_copy" and event.input_shapes:
            found["weight_casts"] += tuple(event.input_shapes[0]) in shapes
    return found | {"attention": dict(attention), "largest_ms": dict(largest.most_common(10))}


def decode(plan):
    """One more token for all rows. What a response costs once, its first token, is taken off."""
    made = built(plan)
    batch = bench.random_trajectories(made, plan.rows, plan.prompt)
    cache = aem.SlotCache()

    def respond(tokens):
        aem.respond(made, cache, batch, bench.settings(max_response_tokens=tokens))

    respond(1)  # encodes the prompts
    first = partial(respond, 1)
    works = {"first": first, "all": partial(respond, 1 + plan.decoded)}
    times = bench.take_turns(works, plan.rounds)
    attended = sum(len(t.ids) for t in batch)
    read = bench.decode_bytes(made, [(plan.rows, attended)], width=2)
    found = {"of": "a token", "rows": plan.rows, "cached": attended / plan.rows}
    found["ms"] = 1000 * (times["all"] - times["first"]) / plan.decoded
    found["first_token_ms"] = 1000 * times["first"]
    found["floor_ms"] = 1000 * read / rates(plan.device)[1]
    once = profiled(made, first)
    whole = profiled(made, partial(respond, 1 + plan.decoded))
    for name in ("kernels", "kernel_ms", "weight_casts"):
        found[name] = (whole.pop(name) - once[name]) / plan.decoded
    found["profiled_tokens"] = 1 + plan.decoded  # what follows is of all of them
    yield found | whole
    cache.layers.clear()
    batch = bench.random_trajectories(made, 4, plan.prompt)
    work = partial(aem.accumulate_gradients, made, batch, bench.settings())
    work()
    yield {"of": "an update of 4 rows"} | profiled(made, work)


# ------------------------------------------------------------------------------ time and memory
def step(plan, compiled=False, **shape):
    """Rollout and update, twice: in the first, kernels are loaded, or compiled."""
    made = built(plan, compiled, **shape)
    optimizer = torch.optim.AdamW(made.weights, lr=0.0)
    sampled = plan.rows * plan.turns * plan.tokens
    for call in ("first", "second"):
        with bench.recorded_forwards() as forwards:
            work = partial(bench.ours, made, plan.rows, plan.turns, plan.tokens)
            played, found = measured(work)
        found["ms_per_forward"] = 1000 * found["seconds"] / len(forwards)
        found["sampled_per_second"] = sampled / found["seconds"]
        read = bench.decode_bytes(made, forwards, width=2)
        found["floor_seconds"] = read / rates(plan.device)[1]
        yield {"of": "rollout", "call": call} | found
        bench.give_advantages(played, bench.settings())
        for budget in plan.budgets:
            found = measured_update(made, optimizer, played, plan, budget)
            yield {"of": "update", "call": call} | found


def lengths(plan):
    """Peak memory by length, AdamW's state included, next to what memory.py computes."""
    made = built(plan)
    optimizer = torch.optim.AdamW(made.weights, lr=0.0)
    batch = bench.random_trajectories(made, 4, 64)
    aem.update(made, optimizer, batch, bench.settings(), 1)  # now AdamW's state is there
    del batch
    for length in plan.lengths:
        tokens = min(8, length // 8)
        playing = bench.random_trajectories(made, plan.rows, length - tokens)
        cache = aem.SlotCache()
        cfg = bench.settings(max_response_tokens=tokens, max_length=length)
        _, found = measured(partial(aem.respond, made, cache, playing, cfg), alone=True)
        yield {"of": "rollout", "length": length} | found
        _, found = measured(partial(cache.keep, list(range(plan.rows - 1))))
        yield {"of": "keep", "length": length} | found
        del cache
        batch = bench.random_trajectories(made, plan.rows, length)
        budget = aem.Config.micro_batch_tokens
        found = measured_update(made, optimizer, batch, plan, budget, alone=True)
        del found["logp_gap"]  # these tokens were not sampled
        yield {"of": "update", "length": length} | found
    computed = memory.peak_of_all_weights(made.model) / 1e9
    yield {"of": "memory.py", "rows": 128, "length": memory.LENGTH, "computed_gb": computed}


def compiled(plan):
    """`step` of a shallow model, plain and compiled: all layers would take minutes to compile.

    And whether whole models became graphs: all frames, then.
    """
    shallow = {"num_hidden_layers": min(4, SHAPES[plan.shape]["num_hidden_layers"])}
    counters = torch._dynamo.utils.counters
    counters.clear()
    try:
        for with_graphs in (False, True):
            for result in step(plan, with_graphs, **shallow):
                yield {"compiled": with_graphs} | shallow | result
            free()
        graphs = counters["stats"]["unique_graphs"]
        yield {"of": "graphs", "graphs": graphs, **counters["frames"]}
    finally:
        torch.compiler.reset()


# ------------------------------------------------------------------------------ against TRL
def our_steps(plan, turns, tokens):
    """Seconds of a training step of 128 rows, the median without the first; peak memory."""
    made = built(plan)
    optimizer = torch.optim.AdamW(made.weights, lr=0.0)
    work = partial(bench.our_step, made, optimizer, turns, tokens)
    steps = [measured(work)[1] for _ in range(1 + plan.rounds)]
    return steps[-1] | {"seconds": median(found["seconds"] for found in steps[1:])}


def trl_steps(plan, turns, tokens):
    """The same of TRL's, with gradient checkpointing, as ours on a GPU."""
    made = bench.policy(SHAPES[plan.shape], None, plan.device, "bfloat16")
    # 16 rows at a time: its logits of 128 would not fit
    trainer = bench.trl_trainer(made, turns, tokens, checkpointing=True, rows=min(16, plan.rows))
    clock = bench.Clock()
    trainer.add_callback(clock)
    with contextlib.redirect_stdout(None):  # its own log
        for _ in range(1 + plan.rounds):
            _, found = measured(trainer.train)
    return found | {"seconds": median(clock.steps[1:])}


def trl(plan):
    """A step of one turn, by TRL's own generation, and one of many turns, by a `rollout_func`."""
    if find_spec("trl") is None:
        yield {"skipped": "TRL is not installed: pip install trl==1.16.0 accelerate"}
        return
    for turns, tokens in ((1, 64), (16, 8)):
        for of, steps in (("ours", our_steps), ("TRL", trl_steps)):
            yield {"of": of, "turns": turns, "tokens": tokens} | steps(plan, turns, tokens)
            free()


# ------------------------------------------------------------------------------ a real model
def training(plan):
    """Imitation, then RL with and without AEM, in turns; goes on where an earlier call stopped."""
    if not plan.model:
        yield {"skipped": "it needs a --model"}
        return
    for steps in plan.steps:
        for arm in ("aem", "plain"):
            flags = plan.training | {"model": plan.model, "device": plan.device}
            flags |= {"aem": arm == "aem", "steps": steps, "name": f"gpu-{arm}"}
            cfg = aem.Config(**flags, resume="auto")
            try:
                rows, found = measured(partial(aem.train, cfg))
            finally:  # time may be up
                metrics = Path(cfg.out) / cfg.name / "metrics.jsonl"
                if metrics.exists():
                    shutil.copy(metrics, plan.out / f"metrics-{arm}.jsonl")
            del found["seconds"]  # of this call: imitation, too, or only what was left
            yield {"of": arm, "model": Path(plan.model).name} | found | summary(rows)
            free()


def summary(rows):
    """What the rows of metrics.jsonl come to."""
    evaluated = [row["eval_success"] for row in rows if "eval_success" in row]
    found = {"steps": rows[-1]["step"], "imitated": evaluated[0], "success": evaluated[-1]}
    found["entropies"] = [rows[0]["token_entropy"], rows[-1]["token_entropy"]]
    found["alphas"] = [min(r["alpha_min"] for r in rows), max(r["alpha_max"] for r in rows)]
    found["logp_gap"] = max(row.get("logp_gap", 0.0) for row in rows)  # rounding of bfloat16
    for name in ("invalid_share", "rollout_seconds", "update_seconds"):
        found[name] = median(row[name] for row in rows)
    return found


# ------------------------------------------------------------------------------ the run
PARTS = {  # with the seconds that they may need: guesses, for the shape of 1.5 B
    agreement: 30,
    decode: 40,
    step: 60,
    lengths: 100,
    compiled: 100,
    trl: 100,
    training: 120,
}
NAMES = {part.__name__: part for part in PARTS}


def rounded(value):
    """Numbers with four digits, in dicts and lists too."""
    if isinstance(value, dict):
        return {name: rounded(item) for name, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def record(plan, part, result):
    """Append a result to the file, and print it."""
    name = "CPU" if plan.device == "cpu" else torch.cuda.get_device_name(plan.device)
    row = {"part": part, "device": name, "torch": torch.__version__}
    row["transformers"] = transformers.__version__
    if part not in ("agreement", "training"):  # which have models of their own
        row["shape"] = plan.shape
    row["time"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    result = rounded(result)
    with open(plan.out / "results.jsonl", "a") as file:
        file.write(json.dumps(row | result) + "\n")
    print(f"{part}: {result.get('of', '')}")
    for key, value in result.items():
        if isinstance(value, dict):
            print(f"  {key}")
            for inner, number in value.items():
                print(f"    {number:>10} {inner}")
        elif key != "of":
            print(f"  {key:<20} {value}")
    sys.stdout.flush()


def attempt(plan, part, deadline):
    """Run a part and record its results, or why there are none.

    Raises KeyboardInterrupt or SystemExit if that came before the deadline: from the user.
    """
    left = deadline - time.monotonic()
    if left < PARTS[part]:
        why = f"it may need {PARTS[part]} s, and {max(left, 0):.0f} s of --minutes are left"
        record(plan, part.__name__, {"skipped": why})
        return
    try:
        for result in part(plan):
            record(plan, part.__name__, result)
    except (KeyboardInterrupt, SystemExit):
        if time.monotonic() < deadline:
            raise
        record(plan, part.__name__, {"stopped": "--minutes are over"})
    except Exception as error:  # out of memory, a missing feature: that, too, is a result
        text = " ".join(f"{type(error).__name__}: {error}".split())
        record(plan, part.__name__, {"error": text[:1000]})
    free()


def parse():
    """The command line. Returns: (Plan, parts to run, minutes)."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--minutes", type=float, default=8.0, help="at most, in all")
    parser.add_argument("--parts", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--shape", choices=SHAPES, help="by default 1.5B; tiny on a CPU")
    parser.add_argument("--model", default="", help="folder of a model, for the part `training`")
    parser.add_argument("--device", default="cuda", help="'cpu': everything in a small form")
    parser.add_argument("--out", type=Path, help="by default experiments/gpu; runs/gpu on a CPU")
    args = parser.parse_args()
    on_cpu = args.device == "cpu"
    if not on_cpu and not torch.cuda.is_available():
        parser.error("torch sees no GPU; --device cpu shows that this script runs")
    if args.model and not Path(args.model).is_dir():
        parser.error(f"--model {args.model}: there is no such folder")
    shape = args.shape or ("tiny" if on_cpu else "1.5B")
    out = args.out or (Path("runs/gpu") if on_cpu else RESULTS)
    plan = Plan(args.device, shape, out, args.model, **(SMALL if on_cpu else {}))
    return plan, [NAMES[name] for name in args.parts], args.minutes


def main():
    """Run the parts. When time is up, an alarm does what Ctrl-C does: a training run saves."""
    plan, parts, minutes = parse()
    plan.out.mkdir(parents=True, exist_ok=True)
    seconds = max(1.0, 60 * minutes - SAVING)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job would ignore it
    signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
    deadline = time.monotonic() + seconds
    signal.setitimer(signal.ITIMER_REAL, seconds, SAVING)  # again, should the first be lost
    try:
        for part in parts:
            attempt(plan, part, deadline)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    print(f"the results are in {plan.out / 'results.jsonl'}")


if __name__ == "__main__":
    main()
