"""Benchmarks. Every claim is a ratio of medians, measured in one run in which the alternatives take turns.

    python experiments/bench.py               # all but TRL
    python experiments/bench.py trl           # a training step against TRL's; needs `pip install trl==1.16.0 accelerate`
    python experiments/bench.py rollout       # many turns: against transformers' generate; scaling with turns, rows, vocabulary
    python experiments/bench.py update        # against a full log-softmax, vocabulary 151,936: time and memory; 20 minutes
    python experiments/bench.py step          # where the time of a default training step goes, and its floor
    python experiments/bench.py sandbox       # evaluations per second, cost of a test

Results go to experiments/bench/NAME.json. Models have random weights: nothing is downloaded.
"""

import functools
import json
import os
import platform
import random
import resource
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

import torch
import transformers

sys.path.insert(0, str(Path(__file__).parents[1]))
import aem
import envs

HERE = Path(__file__).with_suffix("")
TINY = dict(hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4)
MEDIUM = dict(hidden_size=256, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=4)
LARGE = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, num_key_value_heads=12)


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


# ---------------------------------------------------------------- a world in which nothing happens, at a given length
class Walk:
    """`turns` observations of the same length, then a reward at random."""

    def __init__(self, turns):
        self.turns = turns

    def reset(self, *, seed=None):
        self.left = self.turns
        return "You are in the kitchen. You see fridge, sinkbasin, countertop, microwave.", {}

    def step(self, text):
        self.left -= 1
        reward = 0.0 if self.left else float(random.random() < 0.5)
        return "You see apple, egg, mug, plate.", reward, not self.left, False, {}


@functools.cache
def tokenizer():
    """The household's: every word is a token."""
    return envs.embedded_policy(envs.Household(), 0, 0.35)[1]


def policy(shape=TINY, vocabulary=None):
    """A policy of random weights that never ends a response by itself, so that all responses have the same length."""
    torch.manual_seed(0)
    config = transformers.Qwen2Config(vocab_size=vocabulary or len(tokenizer()), tie_word_embeddings=True, **shape)
    made = aem.Policy(transformers.Qwen2ForCausalLM(config), tokenizer())
    made.end, made.ends = -1, set()
    return made


def settings(**changes):
    """Settings of a run: plain GRPO, one optimizer step."""
    cfg = aem.Config(**{"device": "cpu", "minibatches": 1, "max_turns": 16, "max_response_tokens": 8} | changes)
    cfg.check()
    return cfg


def ours(made, rows, turns, tokens):
    """The rollout of this repository, log-probs and entropies included."""
    cfg = settings(max_turns=turns, max_response_tokens=tokens)
    return aem.rollout(made, [Walk(turns) for _ in range(rows)], list(range(rows)), 1, cfg, "bench")


@torch.no_grad()
def regenerate(made, rows, turns, tokens):
    """The common alternative: in each turn `generate` encodes the whole conversation again. No log-probs, no entropies."""
    made.model.eval()
    worlds = [Walk(turns) for _ in range(rows)]
    ids = [made.opening("", world.reset(seed=i)[0]) for i, world in enumerate(worlds)]
    for _ in range(turns):
        inputs = torch.tensor(ids)  # all of the same length: no padding
        sizes = dict(max_new_tokens=tokens, min_new_tokens=tokens, do_sample=True, top_k=0, pad_token_id=0)
        new = made.model.generate(inputs, attention_mask=torch.ones_like(inputs), **sizes)[:, inputs.shape[1] :].tolist()
        said = [world.step(made.tokenizer.decode(row))[0] for world, row in zip(worlds, new)]
        ids = [old + row + made.answer(text, False) for old, row, text in zip(ids, new, said)]
    return ids


def rollout():
    """Rollout: scaling with turns against `generate`, and alone with rows, vocabulary and model."""
    found, made = {"against generate": {}, "alone": {}}, policy()
    for turns in (4, 8, 16, 32, 64):
        alternatives = {"ours": ours, "generate": regenerate}
        times = take_turns({name: functools.partial(f, made, 32, turns, 8) for name, f in alternatives.items()}, 5)
        found["against generate"][turns] = {name: round(value, 3) for name, value in times.items()}
        print(f"{turns:>3} turns, 32 rows: {times['ours']:.2f} s, generate {times['generate']:.2f} s, ", end="")
        print(f"{times['generate'] / times['ours']:.1f} times as long", flush=True)
    growth = found["against generate"][64]["ours"] / found["against generate"][8]["ours"]
    print(f"from 8 to 64 turns our rollout takes {growth:.1f} times as long")
    variants = {f"{rows} rows": (policy(), rows) for rows in (8, 32, 128)}
    variants |= {f"vocabulary {v}": (policy(TINY, v), 32) for v in (8192, 151936)}
    variants |= {"7 M parameters": (policy(MEDIUM, 8192), 32)}
    times = take_turns({name: lambda made=made, rows=rows: ours(made, rows, 8, 8) for name, (made, rows) in variants.items()}, 5)
    for name, value in times.items():
        rows = variants[name][1]
        found["alone"][name] = {"seconds": round(value, 3), "tokens_per_second": round(rows * 64 / value)}
        print(f"8 turns, {name:<20}{value:>7.2f} s{rows * 64 / value:>9.0f} sampled tokens/s")
    return found | {"growth_8_to_64": round(growth, 2)}


# ---------------------------------------------------------------- a training step against TRL's
def our_step(made, optimizer, turns, tokens):
    """A training step of 16 groups of 8."""
    cfg = settings(max_turns=turns, max_response_tokens=tokens)
    aem.train_step(made, optimizer, [Walk(turns) for _ in range(128)], cfg, 1)


def trl_trainer(made, turns, tokens):
    """TRL's GRPOTrainer on the same model, prompts, and number of tokens; over several turns by the `rollout_func` it offers."""
    try:
        import datasets
        from trl import GRPOConfig, GRPOTrainer
    except ImportError as error:
        sys.exit(f"bench.py: this compares with TRL, which is not installed ({error}): pip install trl==1.16.0 accelerate")
    prompt = made.tokenizer.decode(made.opening("", Walk(1).reset(seed=0)[0]))
    rows = datasets.Dataset.from_list([{"prompt": prompt}] * 16)

    def conversations(prompts, trainer):
        """What TRL asks of a `rollout_func`."""
        made.model = trainer.accelerator.unwrap_model(trainer.model)
        whole = regenerate(made, len(prompts), turns, tokens)
        start = len(made.opening("", Walk(1).reset(seed=0)[0]))
        mask = ([1] * tokens + [0] * ((len(whole[0]) - start) // turns - tokens)) * turns
        ids = [row[start:] for row in whole]
        trainer.model.train()
        prompts = [row[:start] for row in whole]
        return {"prompt_ids": prompts, "completion_ids": ids, "logprobs": None, "env_mask": [mask] * len(ids)}

    sizes = dict(per_device_train_batch_size=128, num_generations=8, max_completion_length=turns * (tokens + 20))
    quiet = dict(report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True, output_dir="/tmp/trl-bench")
    off = dict(beta=0.0, use_cpu=True, bf16=False, gradient_checkpointing=False, temperature=1.0, learning_rate=0.0)
    length = dict(max_completion_length=tokens, generation_kwargs={"min_new_tokens": tokens}) if turns == 1 else {}
    config = GRPOConfig(max_steps=1, **(sizes | quiet | off | length))
    options = {"rollout_func": conversations} if turns > 1 else {}
    reward = lambda completions, **_: [float(random.random() < 0.5) for _ in completions]  # noqa: E731
    return GRPOTrainer(made.model, reward, config, rows, processing_class=made.tokenizer, **options)


def timed_steps(trainer):
    """Seconds of the steps that a TRL trainer takes in `train`, without what surrounds them: a list that grows."""
    found = []

    class Clock(transformers.TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            self.start = time.perf_counter()

        def on_step_end(self, *args, **kwargs):
            found.append(time.perf_counter() - self.start)

    trainer.add_callback(Clock())
    return found


def trl(rounds=12):
    """A training step against TRL's, the same model, prompts and tokens: one turn of 64 tokens, 16 turns of 8."""
    os.environ["TRL_EXPERIMENTAL_SILENCE"], found = "1", {}
    for turns, tokens in ((1, 64), (16, 8)):
        made = policy()
        trainer, optimizer = trl_trainer(policy(), turns, tokens), torch.optim.AdamW(made.model.parameters(), lr=0.0)
        theirs, mine = timed_steps(trainer), []
        for _ in range(rounds):
            trainer.train()
            mine.append(seconds(lambda: our_step(made, optimizer, turns, tokens)))
        mine, theirs = median(mine[1:]), median(theirs[1:])
        name, ratio = f"{turns} turns of {tokens} tokens", theirs / mine
        found[name] = {"ours": round(mine, 3), "trl": round(theirs, 3), "ratio": round(ratio, 2)}
        print(f"{name}, 128 rows: {mine:.2f} s, TRL {theirs:.2f} s, {ratio:.1f} times as long", flush=True)
    return found


# ---------------------------------------------------------------- the update, with a large vocabulary
def trajectories(made, lengths):
    """One trajectory of each length, in which every second response-sized stretch of 16 tokens was sampled."""
    rng, found = random.Random(0), []
    for number, length in enumerate(lengths):
        ids = [rng.randrange(made.head.out_features) for _ in range(length)]
        spans = range(16, length - 16, 32)
        responses = [aem.Response(at, [-1.0] * 16, [1.0] * 16, advantage=rng.choice([-1.0, 1.0])) for at in spans]
        found.append(aem.Trajectory(number, None, rng, ids, responses))
    return found


def dense_gradients(made, batch):
    """The update's loss by the plain way: log-probs of the whole vocabulary at all positions, in one piece."""
    ids = torch.tensor([t.ids for t in batch])
    logp = (made.model(ids, use_cache=False).logits / made.temperature).log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]  # (B, T - 1)
    loss = 0.0
    for row, t in enumerate(batch):
        tokens = sum(len(r.logp) for r in t.responses)
        for r in t.responses:
            now = logp[row, r.start - 1 : r.start - 1 + len(r.logp)]
            losses, _ = aem.clipped_loss(now, torch.tensor(r.logp), torch.tensor(r.advantage), 0.2, 0.2)
            loss = loss + losses.sum() / (len(batch) * tokens)
    loss.backward()


def body_gradients(made, batch):
    """The body alone, forward and backward: what no head can go below."""
    made.hidden(torch.tensor([t.ids for t in batch]), use_cache=False).square().mean().backward()


def one_update(kind):
    """In a process of its own: one update of 4 x 1024 tokens, vocabulary 151,936. Prints seconds and peak memory in MB."""
    made = policy(LARGE, 151936)
    batch, cfg = trajectories(made, [1024] * 4), settings(micro_batch_tokens=4096)
    for p in made.model.parameters():
        p.grad = torch.zeros_like(p)  # gradients are there in any case
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run = {"body": body_gradients, "dense": dense_gradients, "ours": lambda m, b: aem.accumulate_gradients(m, b, cfg)}[kind]
    spent = seconds(lambda: run(made, batch))
    grads = [p.grad for p in made.model.parameters()]
    if kind != "body":  # the two must agree: a few numbers of each, and the norm
        torch.save([torch.cat([g.flatten()[:1000] for g in grads]), torch.stack([g.norm() for g in grads])], HERE / f"{kind}.pt")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"seconds": spent, "mb": (peak - before) / 1024}))


def update(rounds=5):
    """Time and memory of an update: body alone, head in chunks at sampled positions (ours), full log-softmax (dense)."""
    measured = {"body": [], "ours": [], "dense": []}
    for _ in range(rounds):
        for kind in measured:
            command = [sys.executable, __file__, "--one-update", kind]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            measured[kind].append(json.loads(done.stdout.splitlines()[-1]))
            print(kind, {name: round(value, 1) for name, value in measured[kind][-1].items()}, flush=True)
    found = {kind: {name: round(median(m[name] for m in rows), 1) for name in rows[0]} for kind, rows in measured.items()}
    (a, norm), (b, other) = (torch.load(HERE / f"{kind}.pt") for kind in ("ours", "dense"))
    found["difference"] = max(float((a - b).abs().max() / b.abs().max()), float(((norm - other) / other).abs().max()))
    for kind in ("ours", "dense"):
        (HERE / f"{kind}.pt").unlink()
    made, rng = policy(), random.Random(0)
    spread = trajectories(made, [rng.randint(100, 1000) for _ in range(128)])
    sums = aem.accumulate_gradients(made, spread, settings(micro_batch_tokens=8192))
    found["padding"] = round(sums["padding"] / sums["positions"], 4)
    for kind in ("body", "ours", "dense"):
        print(f"{kind:<8}{found[kind]['seconds']:>8.1f} s{found[kind]['mb']:>9.0f} MB above weights and gradients")
    print(f"ours takes {found['ours']['seconds'] / found['dense']['seconds']:.2f} of dense's time; ", end="")
    print(f"gradients differ by {found['difference']:.1e}; padding {found['padding']:.1%} on lengths of 100 to 1000")
    return found


# ---------------------------------------------------------------- where a step's time goes
def step(rounds=5):
    """Shares of a default training step, and the floor of its update: FLOPs over the measured matmul rate."""
    cfg = aem.Config(warm_steps=100, device="cpu")
    cfg.check()
    environments = aem.make_environments(cfg)
    made = aem.load_policy(cfg, aem.warm_start(environments[0], cfg))
    optimizer, rows = torch.optim.AdamW(made.model.parameters(), lr=0.0), []
    matrix = torch.randn(1024, 1024)
    rate = 2 * 1024**3 / take_turns({"": lambda: matrix @ matrix}, 20)[""]  # FLOP per second
    for number in range(rounds + 1):
        played, row = aem.train_step(made, optimizer, environments, cfg, number + 1)
        rows.append(row | {"tokens": sum(len(t.ids) for t in played)})
    spent = {name: median(row[name] for row in rows[1:]) for name in ("rollout_seconds", "update_seconds", "tokens")}
    weights = sum(p.numel() for p in made.model.parameters())
    floor = 6 * weights * spent["tokens"] / rate
    print(f"rollout {spent['rollout_seconds']:.2f} s, update {spent['update_seconds']:.2f} s a step; ", end="")
    print(f"update's floor {floor:.2f} s: {6 * weights * spent['tokens'] / 1e9:.0f} GFLOP at {rate / 1e9:.0f} GFLOP/s")
    spent |= {"update_floor_seconds": floor, "gflops": rate / 1e9}
    return {name: round(value, 3) for name, value in spent.items()}


# ---------------------------------------------------------------- the sandbox
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
            "fresh interpreter, 2 threads": lambda: list(two.map(in_a_fresh_interpreter, *zip(*[(code, "f", tests)] * batch))),
            "1 test": lambda: [box.grade(code, "f", few) for _ in range(batch)],
            "201 tests": lambda: [box.grade(code, "f", many) for _ in range(batch)],
        })  # fmt: skip
    a_test = (times.pop("201 tests") - times.pop("1 test")) / batch / 200
    rates = {name: round(batch / value, 1) for name, value in times.items()}
    for name, rate in rates.items():
        print(f"{name:<40}{rate:>8.0f} evaluations/s")
    print(f"{'a further test':<40}{a_test * 1e6:>8.1f} microseconds")
    return {"evaluations_per_second": rates, "microseconds_per_further_test": round(a_test * 1e6, 1)}


BENCHMARKS = {"rollout": rollout, "update": update, "step": step, "trl": trl, "sandbox": sandbox}


def main():
    """Run the benchmarks that the command line names, or all but TRL's."""
    if sys.argv[1:2] == ["--one-update"]:
        return one_update(sys.argv[2])
    unknown = set(sys.argv[1:]) - set(BENCHMARKS)
    if unknown:
        sys.exit(f"bench.py: unknown benchmark {unknown.pop()}: use one of {', '.join(BENCHMARKS)}")
    for name in sys.argv[1:] or [name for name in BENCHMARKS if name != "trl"]:
        machine = {"machine": platform.machine(), "cores": os.cpu_count(), "torch": torch.__version__}
        (HERE / f"{name}.json").write_text(json.dumps(machine | BENCHMARKS[name](), indent=1) + "\n")


if __name__ == "__main__":
    main()
