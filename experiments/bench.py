"""Benchmarks. Every claim is a ratio of medians, measured in one run in which the alternatives take turns.

    python experiments/bench.py               # all that need neither TRL nor a GPU, then the figure
    python experiments/bench.py rollout       # many turns: against transformers' generate; scaling with turns, groups, vocabulary
    python experiments/bench.py lengths       # responses of skewed lengths: against waiting for the longest of each turn
    python experiments/bench.py update        # against a full log-softmax, vocabulary 151,936: time and memory; 15 minutes
    python experiments/bench.py step          # where the time of a default training step goes, and its floors
    python experiments/bench.py compile       # --compile true against the default; needs a C++ compiler
    python experiments/bench.py sandbox       # evaluations per second, cost of a test
    python experiments/bench.py trl           # a training step against TRL's; needs `pip install trl==1.16.0 accelerate`
    python experiments/bench.py gpu           # on a GPU: shapes of Qwen2.5-1.5B and 7B, against their floors
    python experiments/bench.py figure        # draw experiments/bench/bench.png from the results

Results go to experiments/bench/NAME.json. Models have random weights: nothing is downloaded.
"""

import contextlib
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
from statistics import fmean, median

import torch
import transformers

sys.path.insert(0, str(Path(__file__).parents[1]))
import aem
import envs

HERE = Path(__file__).with_suffix("")
TINY = dict(hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4)
MEDIUM = dict(hidden_size=256, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=4)
QWEN = dict(vocab_size=151936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12)
QWEN_1_5B = QWEN | dict(num_key_value_heads=2, tie_word_embeddings=True)
QWEN_7B = QWEN | dict(vocab_size=152064, tie_word_embeddings=False, hidden_size=3584, intermediate_size=18944)
QWEN_7B |= dict(num_attention_heads=28, num_key_value_heads=4)
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


def policy(shape=TINY, vocabulary=None, device="cpu", dtype="float32"):
    """A policy of random weights that never ends a response by itself, so that all responses have the same length."""
    torch.manual_seed(0)
    sizes = {"vocab_size": vocabulary or len(tokenizer()), "tie_word_embeddings": True} | shape
    with torch.device(device):
        model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**sizes))
    made = aem.Policy(model, tokenizer(), dtype=dtype)
    made.end, made.ends = -1, set()
    return made


def settings(**changes):
    """Settings of a run: plain GRPO, one optimizer step."""
    cfg = aem.Config(**{"device": "cpu", "minibatches": 1, "max_turns": 16, "max_response_tokens": 8} | changes)
    cfg.check()
    return cfg


def ours(made, rows, turns, tokens, group_size=1):
    """The rollout of this repository, log-probs and entropies included."""
    cfg = settings(max_turns=turns, max_response_tokens=tokens)
    return aem.rollout(made, [Walk(turns) for _ in range(rows)], list(range(rows // group_size)), group_size, cfg, "bench")


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
    variants = {f"4 groups of {size}": (policy(), 4 * size, size) for size in (2, 8, 32)}
    variants |= {f"4 groups of 8, vocabulary {v}": (policy(TINY, v), 32, 8) for v in (8192, 151936)}
    variants |= {"4 groups of 8, 7 M parameters": (policy(MEDIUM, 8192), 32, 8)}
    calls = {name: functools.partial(ours, made, rows, 8, 8, size) for name, (made, rows, size) in variants.items()}
    for name, value in take_turns(calls, 5).items():
        rate = variants[name][1] * 64 / value
        found["alone"][name] = {"seconds": round(value, 3), "tokens_per_second": round(rate)}
        print(f"8 turns, {name:<36}{value:>7.2f} s{rate:>9.0f} sampled tokens/s")
    return found | {"growth_8_to_64": round(growth, 2)}


def lockstep(made, rows, turns, cfg):
    """The simple alternative: in each turn all wait for the longest response."""
    playing = [aem.Trajectory(i, Walk(turns), random.Random(f"{cfg.seed}/bench/{i}")) for i in range(rows)]
    played, cache = playing, aem.SlotCache(rows)
    with torch.inference_mode():
        while playing:
            aem.observe(made, playing, range(rows), cfg)
            playing = [t for t in playing if not t.done]
            while not all(t.waits for t in playing):
                aem.sample_tokens(made, cache, range(rows), playing, cfg)
    return played


def lengths():
    """Responses of skewed lengths: about a twentieth of all tokens ends one, and 64 is the limit."""
    made, cfg = policy(), settings(max_turns=8, max_response_tokens=64)
    made.end = tokenizer().eos_token_id
    made.ends = {made.end, *range(20, 20 + len(tokenizer()) // 20)}
    played = ours(made, 64, 8, 64)
    assert [t.ids for t in played] == [t.ids for t in lockstep(made, 64, 8, cfg)]
    counts = [len(r.logp) for t in played for r in t.responses]
    times = take_turns({"ours": lambda: ours(made, 64, 8, 64), "lockstep": lambda: lockstep(made, 64, 8, cfg)}, 5)
    found = {name: round(value, 3) for name, value in times.items()}
    found |= {"mean_tokens": round(fmean(counts), 1), "most": max(counts)}
    print(f"responses of {found['mean_tokens']} tokens on average, {max(counts)} at most, 8 turns, 64 rows: ", end="")
    print(f"{times['ours']:.2f} s, in lockstep {times['lockstep']:.2f} s, {times['lockstep'] / times['ours']:.1f} times as long")
    return found


# ---------------------------------------------------------------- a training step against TRL's
def our_step(made, optimizer, turns, tokens):
    """A training step of 16 groups of 8."""
    cfg = settings(max_turns=turns, max_response_tokens=tokens)
    aem.train_step(made, optimizer, [Walk(turns) for _ in range(128)], cfg, 1)


def model_alone(made, turns, tokens):
    """Seconds of such a step that are the model's body: the forwards of a rollout, forward and backward of the update."""
    spent, plain = [], made.hidden
    made.hidden = lambda *args, **kwargs: (found := [], spent.append(seconds(lambda: found.append(plain(*args, **kwargs)))))[0][0]
    played = ours(made, 128, turns, tokens)
    made.hidden = plain
    made.model.train()
    batches = list(aem.micro_batches(played, aem.Config.micro_batch_tokens))
    spent.append(seconds(lambda: [aem.sampled_hidden(made, batch)[0].sum().backward() for batch in batches]))
    return sum(spent)


def trl_trainer(made, turns, tokens, checkpointing):
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
    off = dict(beta=0.0, use_cpu=True, bf16=False, gradient_checkpointing=checkpointing, learning_rate=0.0)
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


def trl(rounds=8):
    """A training step against TRL's, the same model, prompts and tokens: one turn of 64 tokens, 16 turns of 8."""
    os.environ["TRL_EXPERIMENTAL_SILENCE"], found = "1", {}
    for turns, tokens in ((1, 64), (16, 8)):
        made, name, ours_took, alone = policy(), f"{turns} turns of {tokens} tokens", [], []
        optimizer = torch.optim.AdamW(made.model.parameters(), lr=0.0)
        trainers = {"trl": trl_trainer(policy(), turns, tokens, False), "trl_default": trl_trainer(policy(), turns, tokens, True)}
        clocks = {kind: timed_steps(trainer) for kind, trainer in trainers.items()}
        for _ in range(rounds):
            for trainer in trainers.values():
                with contextlib.redirect_stdout(None):  # its own log
                    trainer.train()
            ours_took.append(seconds(lambda: our_step(made, optimizer, turns, tokens)))
            alone.append(model_alone(made, turns, tokens))
        times = {"ours": median(ours_took[1:]), "model_alone": median(alone[1:])} | {kind: median(clock[1:]) for kind, clock in clocks.items()}
        ratios = {f"ratio_{kind}": round(times[kind] / times["ours"], 2) for kind in trainers}
        found[name] = {kind: round(value, 3) for kind, value in times.items()} | ratios
        print(f"{name}, 128 rows: {times['ours']:.2f} s; TRL {times['trl']:.2f} s, {ratios['ratio_trl']} times as long; ", end="")
        print(f"with gradient checkpointing, its default: {times['trl_default']:.2f} s,", ratios["ratio_trl_default"])
        print(f"  of ours, the model's own forwards and backward take {times['model_alone']:.2f} s: ", end="")
        print(f"TRL's step is {times['trl'] / times['model_alone']:.1f} times as long as these alone", flush=True)
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
    logp = made.model(ids, use_cache=False).logits.log_softmax(-1)  # (B, T, V)
    logp = logp[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]  # (B, T - 1)
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
            exact = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1048576"}  # glibc gives tensors back at once: no peak of leftovers
            done = subprocess.run(command, capture_output=True, text=True, check=True, env=exact)
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
def measured_rates(device="cpu", dtype=torch.float32):
    """What the machine can do: FLOP per second of a matrix product, bytes per second of reading memory."""
    size, wait = (1024, lambda: None) if device == "cpu" else (8192, torch.cuda.synchronize)
    matrix, large = torch.randn(size, size, device=device, dtype=dtype), torch.ones(size * 2**16, device=device)
    times = take_turns({"product": lambda: (matrix @ matrix, wait()), "sum": lambda: (large.sum(), wait())}, 20)
    return 2 * size**3 / times["product"], 4 * large.numel() / times["sum"]


def decode_bytes(made, forwards, width=4):
    """Bytes that forwards have to read, at `width` bytes a number: weights, keys and values of the tokens in `forwards`."""
    shape = made.model.config
    head_size = getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads
    a_token = 2 * shape.num_hidden_layers * shape.num_key_value_heads * head_size
    return sum(width * (made.model.num_parameters() + tokens * a_token) for tokens in forwards)


@contextlib.contextmanager
def noted_forwards():
    """Inside, every forward of a rollout adds to this list how many tokens it attends to."""
    forwards, plain = [], aem.next_logits

    def noting(made, cache, rows, trajectories):
        forwards.append(sum(len(t.ids) for t in trajectories))
        return plain(made, cache, rows, trajectories)

    aem.next_logits = noting
    yield forwards
    aem.next_logits = plain


def step(rounds=5):
    """Shares of a default training step, and the floors of rollout and update on this machine."""
    cfg = aem.Config(warm_steps=100, device="cpu")
    cfg.check()
    environments = aem.make_environments(cfg)
    made = aem.load_policy(cfg, aem.warm_start(environments[0], cfg))
    optimizer, rows = torch.optim.AdamW(made.model.parameters(), lr=0.0), []
    rate, bandwidth = measured_rates()
    for number in range(rounds + 1):
        with noted_forwards() as forwards:
            played, row = aem.train_step(made, optimizer, environments, cfg, number + 1)
        rows.append(row | {"tokens": sum(len(t.ids) for t in played), "bytes": decode_bytes(made, forwards)})
    names = ("rollout_seconds", "update_seconds", "aem_seconds", "tokens", "bytes")
    spent = {name: median(row[name] for row in rows[1:]) for name in names}
    flops = 2 * sum(p.numel() for p in made.model.parameters()) * spent["tokens"]  # of a forward; an update is three
    floors = {"rollout_floor": max(flops / rate, spent.pop("bytes") / bandwidth), "update_floor": 3 * flops / rate}
    for name in ("rollout", "update"):
        print(f"{name:<8}{spent[name + '_seconds']:>7.2f} s a step; floor {floors[name + '_floor']:.3f} s")
    print(f"AEM's coefficients {1000 * spent['aem_seconds']:.1f} ms; ", end="")
    print(f"the machine: {rate / 1e9:.0f} GFLOP/s, {bandwidth / 1e9:.0f} GB/s")
    return {name: round(value, 4) for name, value in (spent | floors).items()} | {"gflops": rate / 1e9, "gbytes": bandwidth / 1e9}


def compiled():
    """Rollout and update with `--compile true` against the default."""
    plain, fast, found = policy(), policy(), {}
    torch.compiler.config.recompile_limit = 64
    fast.model.get_decoder().compile(dynamic=True)
    for rows in (8, 32, 128):
        played = ours(plain, rows, 8, 8)
        for t in played:
            t.group = 0
        cfg = settings(max_turns=8, max_response_tokens=8)
        aem.assign_credit(played, cfg)
        runs = {"rollout": lambda m: ours(m, rows, 8, 8), "update": lambda m: aem.accumulate_gradients(m, played, cfg)}
        for name, run in runs.items():
            for made in (plain, fast):
                made.model.train(name == "update")
            first = seconds(lambda: run(fast))
            times = take_turns({"plain": lambda: run(plain), "compiled": lambda: run(fast)}, 7)
            ratio = times["plain"] / times["compiled"]
            found[f"{name}, {rows} rows"] = {k: round(v, 3) for k, v in times.items()} | {"first_call": round(first, 1)}
            print(f"{name}, {rows:>3} rows: {times['plain']:.3f} s, compiled {times['compiled']:.3f} s, ", end="")
            print(f"{ratio:.2f} times faster; first call {first:.0f} s", flush=True)
    return found


# ---------------------------------------------------------------- a GPU
def against_floors(shape, rows=128, turns=4, tokens=128, device="cuda", dtype="bfloat16"):
    """Rollout and update of one model, next to what the machine's bandwidth and matrix products allow. Returns: a dict."""
    rate, bandwidth = measured_rates(device, getattr(torch, dtype))
    made, played = policy(shape, None, device, dtype), []
    if device != "cpu":
        made.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    ours(made, rows, 1, 4)  # kernels and workspaces
    with noted_forwards() as forwards:
        spent = {"rollout_seconds": seconds(lambda: played.extend(ours(made, rows, turns, tokens)))}
    cfg = settings(max_turns=turns, max_response_tokens=tokens, micro_batch_tokens=32768, device=device)
    for i, t in enumerate(played):
        t.group, t.reward = 0, float(i % 2)
    aem.assign_credit(played, cfg)
    made.model.train()
    spent["update_seconds"] = seconds(lambda: spent.update(aem.accumulate_gradients(made, played, cfg)))
    body = sum(p.numel() for p in made.body.parameters()) - made.model.get_input_embeddings().weight.numel()
    flops = 6 * body * sum(len(t.ids) for t in played) + 6 * made.head.weight.numel() * rows * turns * tokens
    spent |= {"rollout_floor": decode_bytes(made, forwards, 2) / bandwidth, "update_floor": flops / rate}
    spent |= {"logp_gap": spent["gap"] / spent["tokens"], "tflops": rate / 1e12, "gbytes": bandwidth / 1e9}
    spent["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9 if device != "cpu" else 0.0
    for name in ("rollout", "update"):
        took, floor = spent[name + "_seconds"], spent[name + "_floor"]
        print(f"{name:<8}{took:>8.2f} s, floor {floor:.2f} s: {floor / took:.0%} of what the machine allows")
    return {name: round(value, 5) for name, value in spent.items()}


def gpu():
    """The shapes of Qwen2.5-1.5B and 7B with random weights, 128 trajectories, bf16."""
    if not torch.cuda.is_available():
        sys.exit("bench.py: `gpu` needs a GPU, and torch sees none")
    print(torch.cuda.get_device_name())
    found = {name: against_floors(shape) for name, shape in (("1.5B", QWEN_1_5B), ("7B", QWEN_7B))}
    return found | {"gpu": torch.cuda.get_device_name()}


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


def figure():
    """Draw bench.png from the results."""
    from matplotlib.figure import Figure

    found = {path.stem: json.loads(path.read_text()) for path in HERE.glob("*.json")}
    drawn = Figure(figsize=(13, 3.8), layout="constrained")
    turns, memory, step = drawn.subplots(1, 3)
    for name, label in (("generate", "generate on the whole conversation"), ("ours", "ours: cache carried over turns")):
        rows = found["rollout"]["against generate"]
        turns.plot([int(n) for n in rows], [row[name] for row in rows.values()], "o-", label=label)
    turns.set(title="Rollout, 32 rows", xlabel="turns", ylabel="seconds", xscale="log", yscale="log")
    turns.set_xticks([int(n) for n in rows], list(rows))
    turns.minorticks_off()
    turns.legend()
    kinds, update = ("body", "ours", "dense"), found["update"]
    memory.bar(["body alone", "ours: head\nin chunks", "full\nlog-softmax"], [update[k]["mb"] / 1024 for k in kinds])
    for i, k in enumerate(kinds):
        memory.text(i, update[k]["mb"] / 1024, f"{update[k]['seconds']:.0f} s", ha="center", va="bottom")
    memory.set(title="Update, vocabulary 151,936, 4 x 1024 tokens", ylabel="peak memory above weights (GiB)")
    memory.margins(y=0.12)
    rows = found["trl"]
    names = [name for name in rows if "turns" in name]
    kinds = {"ours": "ours", "trl": "TRL 1.16", "trl_default": "TRL, gradient checkpointing (its default)"}
    for offset, (k, label) in enumerate(kinds.items()):
        step.bar([i + 0.27 * offset - 0.27 for i in range(len(names))], [rows[n][k] for n in names], 0.27, label=label)
    step.set_xticks(range(len(names)), ["1 turn of 64 tokens", "16 turns of 8 tokens"])
    step.set(title="Training step, 128 rows", ylabel="seconds")
    step.legend(loc="upper left", fontsize="small")
    step.margins(y=0.3)
    drawn.savefig(HERE / "bench.png", dpi=110)


BENCHMARKS = {"rollout": rollout, "lengths": lengths, "update": update, "step": step, "compile": compiled, "sandbox": sandbox}
MORE = {"trl": trl, "gpu": gpu}  # need more than this repository


def main():
    """Run the benchmarks that the command line names, or all that run anywhere."""
    if sys.argv[1:2] == ["--one-update"]:
        return one_update(sys.argv[2])
    known = BENCHMARKS | MORE
    unknown = set(sys.argv[1:]) - {*known, "figure"}
    if unknown:
        sys.exit(f"bench.py: unknown benchmark {unknown.pop()}: use one of {', '.join(known)}, figure")
    HERE.mkdir(exist_ok=True)
    for name in sys.argv[1:] or [*BENCHMARKS, "figure"]:
        if name == "figure":
            figure()
            continue
        machine = {"machine": platform.machine(), "cores": os.cpu_count(), "torch": torch.__version__}
        (HERE / f"{name}.json").write_text(json.dumps(machine | known[name](), indent=1) + "\n")


if __name__ == "__main__":
    main()
