"""Tests of aem.py, in its order: numbers by hand, slow obvious twins, a run that must learn.

pytest -q          # offline, on a CPU, about four minutes
"""

import collections
import contextlib
import copy
import dataclasses
import doctest
import enum
import functools
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
import weakref
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from statistics import fmean, stdev

import numpy
import pytest
import safetensors.torch
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

import aem
import envs

HERE = Path(__file__).parent
torch.set_num_threads(1)  # as in the tests' further processes: the same sums to the last bit
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a background job ignores


class Echo:
    """The task names a word; saying it solves the task. A wrong word is answered at some length."""

    words = ["red", "green", "blue", "black"]

    def __init__(self, limit=3):
        self.limit = limit

    def reset(self, *, seed=None):
        self.seed = seed
        self.turns = 0
        self.word = random.Random(seed).choice(self.words)
        return f"Say {self.word}.", {"task_type": self.word}

    def step(self, text):
        self.turns += 1
        success = text.strip() == self.word
        answer = "No." + " Try again." * (len(text) % 4)
        info = {"success": success, "invalid": not text.strip()}
        return answer, 10.0 * success, success, self.turns >= self.limit and not success, info

    def demonstration(self, seed, noise):
        """Words at random: what to say is left to learn."""
        rng = random.Random(f"words {seed}")
        observation, turns = self.reset(seed=seed)[0], []
        for _ in range(self.limit):
            turns.append((observation, rng.choice(self.words)))
            observation = self.step(turns[-1][1])[0]
        return turns


class Crashing(Echo):
    """Crashes at its second step in odd tasks, and on opening every seventh."""

    def reset(self, *, seed=None):
        if seed % 7 == 0:
            raise OSError("no such task")
        return super().reset(seed=seed)

    def step(self, text):
        if self.turns == 1 and self.seed % 2:
            raise SystemExit("boom")
        return super().step(text)


class Broken(Echo):
    """In odd tasks an Echo; in even ones it answers rubbish, a kind each; in task 99 it hangs."""

    rubbish = [None, 3.5, ("No.",), (None, 0.0, False, False, {}), (b"No.", 0.0, False, False, {})]
    rubbish += [("No.", "much", False, False, {}), ("No.", 7.0, True, False, None)]
    rubbish += [("No.", math.nan, False, False, {}), ("No.", math.inf, True, False, {})]
    rubbish += [("\ud800", 0.0, False, False, {})]

    def step(self, text):
        if self.seed == 99:
            time.sleep(5)
        return super().step(text) if self.seed % 2 else self.rubbish[self.seed // 2]


class Lottery(Echo):
    """One turn. In odd tasks every second agent wins, in even ones all do or none."""

    def __init__(self, lucky):
        self.lucky = lucky

    def step(self, text):
        won = self.lucky if self.seed % 2 else self.seed % 4 == 2
        return "Over.", 10.0 * won, True, False, {"success": won}


class Alike(Echo):
    """No rewards: no group ever varies."""

    def step(self, text):
        answer, _, *rest = super().step(text)
        return answer, 0.0, *rest


class NoDemonstrations(Echo):
    demonstration = property()


TINY = {"device": "cpu", "groups": 4, "group_size": 4, "max_turns": 3, "max_response_tokens": 6}


def config(**changes):
    cfg = aem.Config(**TINY | changes)
    cfg.check()
    return cfg


def household(max_turns):
    env = envs.Household()
    env.max_turns = max_turns
    return env


def play(policy, environment, seeds, group_size, cfg, stream="test"):
    """A rollout, each trajectory in an environment of its own."""
    environments = [environment() for _ in range(len(seeds) * group_size)]
    return aem.rollout(policy, environments, seeds, group_size, cfg, stream)


def clone(policy, noise=0.0, double=False, **options):
    """A copy of a policy, its weights moved by some noise."""
    model = copy.deepcopy(policy.model)
    if double:
        model.double()
    generator = torch.Generator().manual_seed(2)
    for p in model.parameters():
        p.data += noise * torch.randn(p.shape, generator=generator)
    return aem.Policy(model, policy.tokenizer, **options)


def change_row(monkeypatch, estimator, **changes):
    row = dataclasses.replace(aem.ESTIMATORS[estimator], **changes)
    monkeypatch.setitem(aem.ESTIMATORS, estimator, row)


def credit(trajectories, cfg, step=1):
    """As in `train_step`: alpha, and A_AEM = alpha A."""
    advantages = aem.assign_credit(trajectories, cfg).tolist()
    alphas = aem.modulate(trajectories, cfg, step).tolist()
    for r, advantage, alpha in zip(aem.responses_of(trajectories), advantages, alphas, strict=True):
        r.alpha = alpha
        r.advantage = alpha * advantage


def old_logps(trajectories):
    return [x for r in aem.responses_of(trajectories) for x in r.logp]


def gradient_of(policy):
    grads = [p.grad for p in policy.model.parameters() if p.grad is not None]
    flat = torch.cat([g.flatten() for g in grads])
    policy.model.zero_grad()
    return flat


def gradients(policy, trajectories, cfg):
    policy.model.zero_grad()
    sums = aem.accumulate_gradients(policy, trajectories, cfg)
    return sums, gradient_of(policy)


def sampled(t):
    """(response, position, old log-prob) of each sampled token of a trajectory."""
    return [(r, r.start + i, old) for r in t.responses for i, old in enumerate(r.logp)]


def dense_logps(policy, t):
    """Log-probs (n,) of a trajectory's sampled tokens by one whole forward, alone and unpadded."""
    logits = policy.model(torch.tensor([t.ids])).logits[0] / policy.temperature
    logps = logits.log_softmax(-1)  # (T, V)
    return torch.stack([logps[at - 1, t.ids[at]] for _, at, _ in sampled(t)])


@pytest.fixture(scope="session")
def tiny():
    """A policy that has hardly begun: its responses have all lengths, some run into the limit."""
    return aem.Policy(*envs.embedded_policy(envs.Household(), 30, 0.2, batch=10))


@pytest.fixture(scope="session")
def played_once(tiny):
    trajectories = play(tiny, lambda: household(3), [1, 2, 3, 4], 4, config())
    rng = random.Random(0)
    for t in trajectories:
        t.reward = rng.choice([0.0, 10.0])
    credit(trajectories, config())
    return trajectories


@pytest.fixture
def played(played_once):
    """A batch with credit assigned; rewards are random, so that advantages vary."""
    return copy.deepcopy(played_once)


@pytest.fixture(scope="session")
def mixed_once(tiny):
    trajectories = play(tiny, lambda: household(3), [1, 2, 3], 6, config(), "mixed")
    rng = random.Random(1)
    for t in trajectories:
        for r in t.responses:
            r.reward = rng.choice([0.0, -0.1])
        t.responses[-1].reward += rng.choice([0.0, 10.0])
        t.reward = sum(r.reward for r in t.responses)
        t.penalty = rng.choice([0.0, 0.5])
        t.truncated = rng.random() < 0.4
    trajectories[4].error = "boom"
    return trajectories


@pytest.fixture
def mixed(mixed_once):
    """What estimators look at: rewards per turn, penalties, limits, equal observations, a crash."""
    return copy.deepcopy(mixed_once)


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """Trains on Echo: a function of the flags that change, and the folder of the runs."""
    folder = tmp_path_factory.mktemp("runs")

    def run(**changes):
        return aem.train(aem.Config(**run_flags(folder, **changes)))

    return run, folder


def run_flags(folder, **changes):
    flags = {"env": "test_aem:Echo", "out": str(folder), "cache_dir": f"{folder}/cache"}
    flags |= {"steps": 40, "lr": 3e-3, "eval_every": 20, "eval_tasks": 64}
    if "model" not in changes:
        flags["warm_steps"] = 30
    return TINY | flags | {"groups": 8, "group_size": 8} | changes


def without_times(rows):
    return [{k: v for k, v in row.items() if not k.endswith("_seconds")} for row in rows]


def python(code, *arguments, **options):
    """A process of its own that runs `code` where this file can be imported."""
    path = os.pathsep.join([str(HERE), *sys.path])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=HERE, env=environment, **pipes | options)


# ------------------------------------------------------------------------------ 1. the method
def test_docstring_examples_run():
    result = doctest.testmod(aem)
    assert result.attempted >= 4 and not result.failed


@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0, 1e30])
def test_token_stats_equals_float64_brute_force(scale):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(7, 5, 11, generator=generator) * scale
    logits[..., 3] = -math.inf
    ids = torch.randint(0, 3, (7, 5), generator=generator)
    p = torch.softmax(logits.double(), -1)
    slow_entropy = -torch.where(p > 0, p * torch.log(p), 0.0).sum(-1)
    slow_logp = torch.log_softmax(logits.double(), -1).gather(-1, ids[..., None])[..., 0]
    logp, entropy = aem.token_stats(logits, ids)
    assert logp.dtype == entropy.dtype == torch.float32
    assert logp.shape == entropy.shape == (7, 5)
    assert torch.allclose(entropy.double(), slow_entropy, atol=1e-5)
    assert torch.allclose(logp.double(), slow_logp, rtol=1e-5, atol=1e-5)
    assert (entropy >= 0).all() and (entropy <= math.log(10) + 1e-5).all()


def test_token_stats_edges():
    logits = torch.full((3, 4), -math.inf)
    logits[:, 1] = 5.0  # one possible token
    logp, entropy = aem.token_stats(logits, torch.tensor([1, 0, 1]))
    assert logp.tolist() == [0.0, -math.inf, 0.0]
    assert entropy.tolist() == [0.0] * 3
    half = torch.randn(6, 9).bfloat16()
    assert aem.token_stats(half, torch.zeros(6).long())[1].dtype == torch.float32
    x = torch.randn(5, 8, requires_grad=True)
    logp, entropy = aem.token_stats(x, torch.arange(5))
    logp.sum().backward(retain_graph=True)
    assert torch.allclose(x.grad, torch.eye(5, 8) - x.softmax(-1).detach(), atol=1e-6)
    gradient = torch.autograd.grad(entropy.sum(), x)[0]
    p = x.detach().softmax(-1)
    assert torch.allclose(gradient, -p * (p.log() + entropy.detach()[:, None]), atol=1e-6)
    logits.requires_grad_()
    impossible = torch.autograd.grad(aem.token_stats(logits, torch.ones(3).long())[1].sum(), logits)
    assert impossible[0].isfinite().all()
    far = torch.randn(50, 8, generator=torch.Generator().manual_seed(0)) + 1e5  # far from zero
    p = torch.softmax(far.double(), -1)
    entropy = aem.token_stats(far, p.argmax(-1))[1]
    assert torch.allclose(entropy.double(), -(p * p.log()).sum(-1), atol=1e-5)


def slow_alpha(h_bar, group, lam=1.0, min_range=0.1):
    alpha = []
    for h, g in zip(h_bar, group):
        members = [x for x, other in zip(h_bar, group) if other == g]
        low, high = min(members), max(members)
        if high - low < min_range or high == low:
            alpha.append(1.0)
        else:
            weights = [math.exp(-lam * (x - low) / (high - low)) for x in members]
            own = math.exp(-lam * (h - low) / (high - low))
            alpha.append(own / (sum(weights) / len(weights)))
    return alpha


@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0, 2.0])
def test_alpha_equals_a_slow_loop_and_has_its_properties(lam):
    generator = torch.Generator().manual_seed(1)
    h_bar = torch.rand(200, generator=generator, dtype=torch.float64) * 2
    group = torch.randint(-3, 20, (200,), generator=generator)
    alpha = aem.aem_coefficients(h_bar, group, lam)
    slow = slow_alpha(h_bar.tolist(), group.tolist(), lam)
    assert alpha.tolist() == pytest.approx(slow, abs=1e-9)
    for g in group.unique():
        a = alpha[group == g]
        assert abs(a.mean() - 1) < 1e-9  # self-calibrating
        assert a.max() / a.min() <= math.exp(lam) + 1e-9
        order = h_bar[group == g].argsort()
        assert lam == 0 or (a[order].diff() < 0).all()  # order-reversing
    assert (alpha > 0).all()  # the sign of A is kept
    for same in (h_bar + 3, h_bar * 7):  # shift and scale of H_bar do not matter
        assert torch.allclose(aem.aem_coefficients(same, group, lam), alpha)
    order = torch.randperm(200, generator=generator)
    assert torch.allclose(aem.aem_coefficients(h_bar[order], group[order], lam), alpha[order])


def test_alpha_edges():
    def alpha(*h_bar, **options):
        return aem.aem_coefficients(torch.tensor(h_bar), torch.zeros(len(h_bar)), **options)

    assert alpha(0.50, 0.55, 0.59).tolist() == [1.0] * 3  # below the gate
    assert alpha(0.50, 0.55, 0.59, min_range=0.05).max() > 1
    assert alpha(0.5, min_range=0.0).tolist() == [1.0]
    assert alpha(0.5, 0.5, 0.5, min_range=0.0).tolist() == [1.0] * 3
    assert alpha(0.1, 2.0, 0.3, lam=0.0).tolist() == [1.0] * 3
    assert alpha().shape == (0,)
    by_hand = [2 / (1 + 1 / math.e), 2 / (1 + math.e)]  # 1 and 1/e, over their mean
    assert alpha(0.0, 1.0).tolist() == pytest.approx(by_hand, abs=1e-6)
    moved = alpha(0.0, 1.0) * torch.tensor([1.0, -1.0])
    assert abs(moved.sum()) > 0.5  # the sum of advantages over a group is not preserved


def test_ablations_of_alpha():
    h_bar = torch.rand(60, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    group = torch.arange(60) % 5
    normal = aem.aem_coefficients(h_bar, group)
    reverse = aem.aem_coefficients(h_bar, group, direction="reverse")
    slow = slow_alpha((-h_bar).tolist(), group.tolist())  # H~ -> 1 - H~ turns the order round
    assert reverse.tolist() == pytest.approx(slow, abs=1e-12)

    def shuffle(seed):
        generator = torch.Generator().manual_seed(seed)
        return aem.aem_coefficients(h_bar, group, direction="shuffle", generator=generator)

    assert torch.equal(shuffle(0), shuffle(0)) and not torch.equal(shuffle(0), shuffle(1))
    for g in range(5):
        alphas = shuffle(0)[group == g]
        assert torch.allclose(alphas.sort().values, normal[group == g].sort().values)
        assert not torch.allclose(alphas, normal[group == g])


ADVANTAGES = ["standardised", "centred", "leave-one-out"]


def test_golden_numbers_of_every_advantage():
    golden = {"standardised": (1.499997, -0.499999), "centred": (0.75, -0.25)}
    golden["leave-one-out"] = (1, -1 / 3)
    for kind, (winner, loser) in golden.items():
        found = aem.group_advantages(torch.tensor([0.0, 1.0, 0.0, 0.0]), torch.zeros(4), kind)
        assert found.tolist() == pytest.approx([loser, winner, loser, loser], abs=1e-6)
    rewards = torch.tensor([1.0, 0, 0, 0, 0, 10, 10, 10])
    found = aem.group_advantages(rewards, torch.tensor([5, 5, 5, 5, 2, 2, 2, 2]))
    expected = [1.499997, -0.499999, -0.499999, -0.499999, -1.5, 0.5, 0.5, 0.5]
    assert found.tolist() == pytest.approx(expected, abs=1e-6)
    # a two-turn win against a ten-turn loss: statistics run over trajectories, turns do not enter
    pair = aem.group_advantages(torch.tensor([1.0, 0.0]), torch.zeros(2))
    assert pair.tolist() == pytest.approx([0.707106, -0.707106], abs=2e-6)
    alone = aem.group_advantages(torch.tensor([5.0, 0.0, 1.0]), torch.tensor([1, 0, 0]))
    assert alone[0] == 0  # nothing to compare with


def slow_advantage(rewards, kind):
    mean = sum(rewards) / len(rewards)
    if max(rewards) == min(rewards):
        return [0.0] * len(rewards)
    if kind == "standardised":
        std = math.sqrt(sum((r - mean) ** 2 for r in rewards) / (len(rewards) - 1))
        return [(r - mean) / (std + 1e-6) for r in rewards]
    if kind == "centred":
        return [r - mean for r in rewards]
    return [r - (sum(rewards) - r) / (len(rewards) - 1) for r in rewards]  # the mean of the others


@pytest.mark.parametrize("kind", ADVANTAGES)
def test_advantages_equal_a_slow_loop(kind):
    rng = random.Random(0)
    rewards = torch.tensor([rng.choice([0.0, -0.1, 9.8, 10.0]) for _ in range(200)]).double()
    group = torch.tensor([rng.randrange(-9, 30) for _ in range(200)])
    fast = aem.group_advantages(rewards, group, kind)
    for g in group.unique():
        slow = slow_advantage(rewards[group == g].tolist(), kind)
        assert fast[group == g].tolist() == pytest.approx(slow, abs=1e-9)


@pytest.mark.parametrize("kind", ADVANTAGES)
def test_equal_rewards_give_exactly_zero(kind):
    for reward in (0.0, 0.1, 0.7, 9.9, 1e6):
        for size in range(2, 65):
            for dtype in (torch.float32, torch.float64):
                rewards = torch.full((size,), reward, dtype=dtype)
                found = aem.group_advantages(rewards, torch.zeros(size), kind)
                assert (found == 0).all(), (reward, size)
    rounding = [[0.1 + 0.2, 0.3], [9.7, 10 - 0.1 - 0.1 - 0.1], [1e6, 1e6 + 1e-6]]
    for rewards in rounding:
        rewards = torch.tensor(rewards, dtype=torch.float64)
        assert rewards[0] != rewards[1] and not aem.vary(rewards)
        assert (aem.group_advantages(rewards, torch.zeros(2), kind) == 0).all()
    small = torch.tensor([0.0, 1e-6], dtype=torch.float64)
    assert (aem.group_advantages(small, torch.zeros(2), kind) != 0).all()


def test_clipped_loss_by_hand():
    ratio = torch.tensor([1.0, 1.5, 0.5, 1.5, 0.5, 1.1])
    advantage = torch.tensor([2.0, 2.0, 2.0, -2.0, -2.0, -2.0])
    loss, clipped = aem.clipped_loss(ratio.log(), torch.zeros(6), advantage, 0.2, 0.2)
    assert loss.tolist() == pytest.approx([-2.0, -2.4, -1.0, 3.0, 1.6, 2.2], abs=1e-5)
    assert clipped.tolist() == [False, True, False, False, True, False]
    loss, _ = aem.clipped_loss(ratio.log(), torch.zeros(6), advantage, 0.2, 0.28)
    assert loss[1].item() == pytest.approx(-2.56, abs=1e-5)


SPECIFIED = {  # advantage, mean of the loss, clip low, clip high, one ratio per sequence
    "grpo": ("standardised", "trajectory", 0.2, 0.2, "token"),
    "dr_grpo": ("centred", "constant", 0.2, 0.2, "token"),
    "rloo": ("leave-one-out", "token", 0.2, 0.2, "token"),
    "dapo": ("standardised", "token", 0.2, 0.28, "token"),
    "gspo": ("standardised", "trajectory", 3e-4, 4e-4, "trajectory"),
    "grpo++": ("leave-one-out", "constant", 0.2, 0.28, "token"),
    "gigpo": ("standardised", "token", 0.2, 0.2, "token"),
}


def test_the_table_of_estimators_is_as_specified():
    columns = ("advantage", "loss_mean", "clip_low", "clip_high", "ratio")
    rows = aem.ESTIMATORS.items()
    assert {name: tuple(getattr(row, c) for c in columns) for name, row in rows} == SPECIFIED
    owners = {"dynamic_sampling": "dapo", "overlong": "dapo", "compact_filtering": "grpo++"}
    for feature, owner in (owners | {"step_weight": "gigpo"}).items():
        assert [name for name, row in rows if getattr(row, feature)] == [owner]
    assert aem.ESTIMATORS["dapo"].overlong == 0.2
    for row in aem.ESTIMATORS.values():  # what only recipes have
        assert (row.kl, row.entropy_bonus, row.dual_clip) == (0, 0, math.inf)
        assert (row.statistics, row.task_order) == ("trajectories", False)
    assert (aem.ESTIMATORS["gigpo"].step_weight, aem.ESTIMATORS["gigpo"].gamma) == (1.0, 0.95)


# the theory: how entropy moves


def distributions(count):
    """Logits of random distributions over 2..9 responses, with advantages; a third has one peak."""
    generator = torch.Generator().manual_seed(0)
    for i in range(count):
        size = int(torch.randint(2, 10, (1,), generator=generator))
        logits = torch.randn(size, generator=generator, dtype=torch.float64)
        logits *= (0.3, 2.0, 1.0)[i % 3]
        logits[0] += (0.0, 0.0, 9.0)[i % 3]
        yield logits, torch.randn(size, generator=generator, dtype=torch.float64)


def change_of_entropy(logits, direction):
    """Derivative of the entropy along a direction, by central differences of fourth order."""

    def entropy(z):
        p = z.softmax(0)
        return -(p * p.log()).sum()

    step = 1e-3 / direction.abs().max() * direction
    near = entropy(logits + step) - entropy(logits - step)
    far = (entropy(logits + 2 * step) - entropy(logits - 2 * step)) / 2
    return (4 * near - far) / 6 * direction.abs().max() / 1e-3


def test_entropy_drift_is_that_of_a_natural_gradient_step():
    peaks = 0
    for logits, advantages in distributions(150):
        p = logits.softmax(0)
        peaks += bool(p.max() > 0.99)
        fisher = torch.diag(p) - torch.outer(p, p)
        inverse = torch.linalg.pinv(fisher, atol=1e-12, rtol=0.0, hermitian=True)
        scores = torch.eye(len(p), dtype=torch.float64) - p  # row a: grad log pi(a) = e_a - p
        drift, expected = aem.entropy_drift(logits, advantages)
        for a in range(len(p)):
            measured = change_of_entropy(logits, inverse @ scores[a] * advantages[a])
            assert measured == pytest.approx(drift[a].item(), rel=1e-5), (logits, a)
        centred = advantages - (p * advantages).sum()
        measured = change_of_entropy(logits, inverse @ (scores.T @ (p * centred)))
        with_baseline = aem.entropy_drift(logits, centred)[1].item()
        assert measured == pytest.approx(with_baseline, rel=1e-5)
        assert expected == pytest.approx(with_baseline, abs=1e-12)  # as E[S - H] = 0
    assert peaks > 30


def all_responses(table, limit):
    """Every response of a bigram model of `table` (V, V) that begins after token 1; 0 ends one.

    Returns: probabilities, surprisals, and sums of H_tok.
    """
    complete = []
    growing = [(torch.tensor(1.0, dtype=torch.float64), 0.0, 0.0, 1, 0)]
    while growing:
        p, surprisal, entropies, last, length = growing.pop()
        for token in range(len(table)):
            logp, entropy = aem.token_stats(table[last], torch.tensor(token))
            sums = (p * logp.exp(), surprisal - logp, entropies + entropy)
            if token == 0 or length + 1 == limit:
                complete.append(torch.stack(sums))
            else:
                growing.append((*sums, token, length + 1))
    return torch.stack(complete).T


def test_response_entropy_is_the_expected_sum_of_token_entropies():
    generator = torch.Generator().manual_seed(0)
    for i in range(25):
        table = torch.randn(4, 4, generator=generator, dtype=torch.float64) * (1 + i % 5)
        p, surprisal, entropies = all_responses(table, limit=4)
        assert len(p) == 1 + 3 + 9 + 27 * 4 and p.sum() == pytest.approx(1, abs=1e-12)
        h_resp = (p * surprisal).sum()
        assert (p * entropies).sum() == pytest.approx(h_resp.item(), abs=1e-12)  # the chain rule
        noise = (p * (surprisal - h_resp) ** 2).sum()
        assert (p * (entropies - h_resp) ** 2).sum() < noise


# ------------------------------------------------------------------------------ 2. settings
def test_what_is_none_or_auto_is_settled(monkeypatch, tmp_path):
    assert config().env_timeout == 0 and config(env="test_aem:Echo").env_timeout == 60
    assert config(env_timeout=2.0).env_timeout == 2
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for model, settled in (("tiny", ("cpu", "float32")), ("own/model", ("cuda", "bfloat16"))):
        cfg = config(model=model, device="auto")
        assert (cfg.device, cfg.dtype, cfg.model) == (*settled, model)
    monkeypatch.setenv("HOME", str(tmp_path))
    cfg = config(out="~/x", model="~", cache_dir="~/y")
    home = str(tmp_path)
    assert (cfg.out, cfg.model, cfg.cache_dir) == (f"{home}/x", home, f"{home}/y")
    limits = config(max_turns=None, max_response_tokens=None)
    aem.make_environments(limits)
    assert (limits.max_turns, limits.max_response_tokens) == (12, 16)  # Household's
    monkeypatch.setattr(Echo, "max_turns", None, raising=False)
    limits = config(env="test_aem:Echo", max_turns=None, max_response_tokens=None)
    aem.make_environments(limits, 1)
    assert aem.make_environments(config(max_turns=5), 1)[0].max_turns == 5  # not the household's
    assert (limits.max_turns, limits.max_response_tokens) == (12, 16)  # where there is none


def test_numbers_that_can_not_work_are_refused():
    ones = "groups max_turns max_response_tokens max_length epochs minibatches eval_every"
    ones += " micro_batch_tokens eval_tasks save_every"
    bad = [(name, 0) for name in ones.split()]
    bad += [(name, -1) for name in ("lam", "steps", "kl_coef", "env_timeout", "lora_rank")]
    bad += [("group_size", 1), ("temperature", 0.0), ("max_grad_norm", 0.0)]
    bad += [("lr", math.inf), ("lam", math.nan)]
    for name, value in bad:
        with pytest.raises(aem.UsageError, match=f"--{name} must be at least"):
            config(**{name: value})


# ------------------------------------------------------------------------------ 3. the policy
CHATML = """{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content | trim }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}{% if add_generation_prompt %}"
    "<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}{% for m in messages %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
QWEN3 = (  # drops the reasoning of earlier turns
    "{% set ns = namespace(last=0) %}{% for m in messages if m.role == 'user' %}"
    "{% set ns.last = loop.length %}{% endfor %}{% set ns.seen = 0 %}{% for m in messages %}"
    "<|im_start|>{{ m.role }}\n{% if m.role == 'user' %}{% set ns.seen = ns.seen + 1 %}{% endif %}"
    "{% if m.role == 'assistant' and '</think>' in m.content and ns.seen < ns.last %}"
    "{{ m.content.split('</think>')[-1].lstrip() }}{% else %}{{ m.content }}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
UNMARKED = (  # its role markers are no special tokens; it passes over the system message
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<|User|>{{ m.content }}"
    "{% elif m.role == 'assistant' %}<|Assistant|>{{ m.content }}<|eos|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|Assistant|>{% endif %}"
)
WORDS = ["<filename>", "<repo_name>", "<s>"]  # special tokens of every family, which none uses
FAMILIES = {  # template, end of turn, end of text
    "qwen2": (CHATML, "<|im_end|>", "<|endoftext|>"),
    "qwen3": (QWEN3, "<|im_end|>", "<|im_end|>"),
    "llama3": (LLAMA3, "<|eot_id|>", "<|end_of_text|>"),
    "gemma": (GEMMA, "<end_of_turn>", "<eos>"),
    "unmarked": (UNMARKED, "<|eos|>", "<|eos|>"),
    "embedded": (envs.TEMPLATE, "<|end|>", "<|end|>"),
}


@functools.cache
def family_policy(family):
    """A byte-level BPE tokenizer with a family's special tokens and template, and a tiny model."""
    template, end, eos = FAMILIES[family]
    found = {*re.findall(r"<\|?\w+\|?>", template)}
    roles = found & {"<|User|>", "<|Assistant|>"}
    special = {*found, *WORDS, end, eos, "<bos>"} - {"<think>"} - roles
    texts = [" ".join(turn) for i in range(200) for turn in envs.Household().demonstration(i, 0.3)]
    options = {"new_special_tokens": sorted(special), "show_progress": False}
    tokenizer = transformers.Qwen2Tokenizer().train_new_from_iterator(texts, 600, **options)
    tokenizer.add_tokens(sorted(roles))
    tokenizer.eos_token = eos
    tokenizer.bos_token = "<bos>"
    tokenizer.chat_template = template
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    shape |= {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": len(tokenizer)}
    return aem.Policy(transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**shape)), tokenizer)


def conversations(family, count):
    """Random conversations: (system prompt, messages, which responses the token limit cut off)."""
    rng = random.Random(family)
    words = "go to drawer mug\n \n  You see: ähm 17 , . <b> {x} look".split(" ")

    def text(most):
        return " ".join(rng.choices(words, k=rng.randint(1, most)))

    for _ in range(count):
        messages = [{"role": "user", "content": text(6)}]  # blanks at both ends, too
        cut = []
        for _ in range(rng.randint(1, 4)):
            response = text(5).strip()
            if family == "qwen3" and rng.random() < 0.5:
                response = f"<think>\n{text(4)}\n</think>\n\n{response}"
            messages.append({"role": "assistant", "content": response})
            messages.append({"role": "user", "content": text(5)})
            cut.append(rng.random() < 0.3)
        yield rng.choice(["", "You are a robot."]), messages, cut


@pytest.mark.parametrize("family", FAMILIES)
def test_appended_ids_equal_the_whole_conversation_rendered(family):
    policy = family_policy(family)
    tokenizer = policy.tokenizer
    assert tokenizer.decode([policy.end]) == FAMILIES[family][1]
    assert policy.ends == {policy.end, tokenizer.eos_token_id}
    with_thoughts = 0
    for system, messages, cut in conversations(family, 200):
        ids = policy.opening_ids(system, messages[0]["content"])
        for i, was_cut in enumerate(cut):
            before = list(ids)
            ids += policy.encode(messages[2 * i + 1]["content"])
            if not was_cut:
                ids.append(policy.end)
            ids += policy.observation_ids(messages[2 * i + 2]["content"], not was_cut)
            assert ids[: len(before)] == before  # what was there stays
        whole = messages
        if system and family in ("gemma", "unmarked"):  # its text comes before the task
            first = {"role": "user", "content": f"{system}\n\n{messages[0]['content']}"}
            whole = [first, *messages[1:]]
        elif system:
            whole = [{"role": "system", "content": system}, *messages]
        options = {"add_generation_prompt": True, "tokenize": False}
        text = tokenizer.apply_chat_template(whole, **options)
        if any("</think>" in m["content"] for m in messages):  # rewritten: the trajectory keeps it
            with_thoughts += 1
            assert "</think>" not in text and "</think>" in tokenizer.decode(ids)
            keeping = CHATML.replace(" | trim", "")
            text = tokenizer.apply_chat_template(whole, chat_template=keeping, **options)
        assert tokenizer.decode(ids) == text
        # whatever a response's last token and the template's first text might merge to
        assert ids == tokenizer(text, add_special_tokens=False).input_ids
    assert (with_thoughts > 20) == (family == "qwen3")


@pytest.mark.parametrize("family", FAMILIES)
def test_an_observation_cannot_open_or_end_a_turn(family):
    policy = family_policy(family)
    added = {i: token.content for i, token in policy.tokenizer.added_tokens_decoder.items()}
    used = {*policy.opening_ids("", ""), *policy.observation_ids("", False), *policy.ends}
    roles = [added[i] for i in added if i in used]
    nested = "".join(f" a {word}b{word[:3]}{word}{word[3:]}c" for word in roles)
    kept = "You see" + "".join(f" a {word}b{word}." for word in {*added.values()} - {*roles})
    assert len(roles) > 1 and all(word in kept for word in WORDS)

    def markers(text):
        opening = policy.opening_ids("", text)
        appended = [policy.observation_ids(text, ended) for ended in (True, False)]
        for ids in (opening, *appended):
            assert text == nested or text in policy.tokenizer.decode(ids)
        return [[i for i in ids if i in added] for ids in (opening, *appended)]

    assert markers("plain") == markers(nested) == markers(kept)


def test_the_pattern_of_what_ends_a_turn_stays_small():
    policy = family_policy("gemma")
    tokenizer = copy.deepcopy(policy.tokenizer)
    unused = [f"<unused{i}>" for i in range(300)]  # Gemma 3 has 6,000 of them
    tokenizer.add_special_tokens({"additional_special_tokens": unused})
    assert len(tokenizer) == len(policy.tokenizer) + 300
    assert aem.Policy(policy.model, tokenizer).control == policy.control
    assert len(policy.control.pattern) < 100


DATED = "{{ strftime_now('%d %b %Y') }}" + envs.TEMPLATE


def test_a_template_prints_the_date_of_the_run(tiny):
    tokenizer = copy.deepcopy(tiny.tokenizer)
    tokenizer.chat_template = DATED
    for day, printed in (("2024-07-26", "26 Jul 2024"), ("1999-12-01", "01 Dec 1999")):
        policy = aem.Policy(tiny.model, tokenizer, date=day)
        for instructions in ("", "Be good."):
            assert tokenizer.decode(policy.opening_ids(instructions, "Go.")).startswith(printed)


SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.5}


def test_a_model_that_a_cached_rollout_would_get_wrong_is_refused(tiny, tmp_path, capsys):
    shape = SHAPE | {"vocab_size": len(tiny.tokenizer), "tie_word_embeddings": True}
    shape |= {"max_position_embeddings": 4096}
    few = shape | {"max_position_embeddings": 512}
    turning = {"rope_type": "dynamic", "factor": 8.0, "rope_theta": 10000.0}
    turning |= {"original_max_position_embeddings": 1024}
    window = {"head_dim": 8, "sliding_window": 64}
    capped = {"head_dim": 8, "final_logit_softcapping": 0.5}
    kinds = {"layer_types": ["conv", "full_attention"]}
    made = {
        "fine": (transformers.GraniteConfig(**shape), None),
        "scaled": (transformers.GraniteConfig(**shape, logits_scaling=8.0), "its probabilities"),
        "short": (transformers.MistralConfig(**shape, sliding_window=64), "sees 64 tokens"),
        "long": (transformers.MistralConfig(**shape, sliding_window=4096), None),
        "mixed": (transformers.Gemma3TextConfig(**shape, **window), "sees 64 tokens"),
        "capped": (transformers.Gemma2Config(**shape, **capped), "its probabilities"),
        "few": (transformers.LlamaConfig(**few), "sees 512 tokens"),
        "turning": (transformers.LlamaConfig(**shape, rope_parameters=turning), "sees 1024 tokens"),
        "hybrid": (transformers.Lfm2Config(**shape, **kinds), "cannot use --model"),
    }
    for name, (settings, message) in made.items():
        torch.manual_seed(0)
        transformers.AutoModelForCausalLM.from_config(settings).save_pretrained(tmp_path / name)
        tiny.tokenizer.save_pretrained(tmp_path / name)
        refused = contextlib.nullcontext()
        if message:
            refused = pytest.raises(aem.UsageError, match=message)
        with refused:  # a limit that was asked for; the default one adapts
            aem.load_policy(config(max_length=4000), str(tmp_path / name))
    cfg = config()
    aem.load_policy(cfg, str(tmp_path / "few"))
    assert cfg.max_length == 512 and "--max_length is 512" in capsys.readouterr().err


@pytest.mark.parametrize(
    "bad, name",
    [
        (math.nan, "model.norm.weight"),
        (math.inf, "lm_head.weight"),
        (math.nan, "model.embed_tokens.weight"),
    ],
)
def test_weights_that_are_not_finite_are_refused(bad, name, tmp_path):
    policy = clone(family_policy("qwen2"))
    policy.model.get_parameter(name).data[-1] = bad
    for part in (policy.model, policy.tokenizer):
        part.save_pretrained(tmp_path)
    with pytest.raises(aem.UsageError, match="not finite"):
        aem.load_policy(config(), str(tmp_path))


def test_a_policy_is_loaded_as_its_settings_say(tmp_path):
    policy = clone(family_policy("qwen2"))
    policy.model.bfloat16()
    aem.export(tmp_path, policy)
    cfg = config(temperature=0.7, dtype="bfloat16", date="1999-12-01")
    loaded = aem.load_policy(cfg, tmp_path)
    assert (loaded.temperature, loaded.dtype, loaded.date) == (0.7, "bfloat16", "1999-12-01")
    assert {p.dtype for p in loaded.weights} == {torch.float32}  # master weights


def random_policy(family, tiny, **options):
    """A model of a family with random weights, that ends its responses now and then."""
    shape = SHAPE | {"vocab_size": len(tiny.tokenizer), "num_hidden_layers": 3}
    shape |= {"initializer_range": 0.3, "attention_dropout": 0.5}
    settings = {
        "qwen2": transformers.Qwen2Config(**shape),
        "qwen3": transformers.Qwen3Config(head_dim=8, **shape),
        "llama": transformers.LlamaConfig(**shape),
        "eager attention": transformers.Qwen2Config(**shape, attn_implementation="eager"),
        "doge": transformers.DogeConfig(**shape, hidden_dropout=0.5),
    }[family]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(settings)
    model.get_output_embeddings().weight.data[tiny.end] *= 4
    return aem.Policy(model, tiny.tokenizer, **options)


class OwnDropout(torch.nn.Dropout):
    pass


class Noisy(torch.nn.Module):
    """Dropout in three ways round a module of a layer."""

    def __init__(self, module):
        super().__init__()
        self.module = module
        self.dropout = OwnDropout(0.5)

    def forward(self, x):
        x = torch.nn.functional.dropout(self.module(x), 0.5, self.training)
        return self.dropout(x)


@pytest.mark.parametrize("family", ["qwen2", "eager attention", "doge"])  # doge: in its layers
def test_no_dropout_parts_rollout_and_update(family, tiny):
    policy = random_policy(family, tiny)
    for layer in policy.body.layers:
        layer.mlp = Noisy(layer.mlp)
    policy = aem.Policy(policy.model.train(), tiny.tokenizer)
    trajectories = play(policy, Echo, [1, 2], 4, config(), "dropout")
    now = aem.sampled_stats(policy, trajectories)[0].tolist()
    assert now == pytest.approx(old_logps(trajectories), abs=1e-4)
    for r in aem.responses_of(trajectories):
        r.advantage = 1.0
    _, plain = gradients(policy, trajectories, config())
    aem.checkpoint_layers(policy.model)  # as on a GPU
    optimizer = torch.optim.SGD(policy.weights, lr=0.0)
    metrics = aem.update(policy, optimizer, trajectories, config(), 1)
    assert metrics["logp_gap"] < 1e-4 and metrics["updates"] == 2
    assert torch.allclose(gradients(policy, trajectories, config())[1], plain, atol=1e-6)


def test_activations_are_recomputed_in_updates_only(tiny, played):
    policy = clone(tiny)
    aem.checkpoint_layers(policy.model)
    forwards = Counter()
    layer = policy.body.layers[0]
    layer.mlp.register_forward_pre_hook(lambda *args: forwards.update(["mlp"]))
    optimizer = torch.optim.SGD(policy.weights, lr=0.0)
    aem.update(policy, optimizer, played, config(minibatches=1), 1)
    assert forwards["mlp"] == 2  # of one micro-batch: forward, and again in backward
    batches = [play(p, Echo, [1, 2], 2, config()) for p in (policy, tiny)]  # with its cache
    assert [t.ids for t in batches[0]] == [t.ids for t in batches[1]]
    assert not any(module.training for module in policy.model.modules())


class CastCounter(TorchDispatchMode):
    """Counts how often each tensor is cast to another type."""

    def __init__(self):
        super().__init__()
        self.casts = Counter()

    def __torch_dispatch__(self, function, _, args=(), kwargs=None):
        if function is torch.ops.aten._to_copy.default:
            self.casts[args[0].data_ptr()] += 1
        return function(*args, **kwargs or {})


def test_a_response_rounds_each_weight_to_bfloat16_once(tiny):
    policy = clone(tiny, dtype="bfloat16")
    weights = {p.data_ptr() for p in policy.weights if p.dim() == 2}
    stored = set()

    def look(module, args, kwargs, output):
        stored.update(x.dtype for pair in kwargs["past_key_values"].layers for x in pair)

    policy.body.register_forward_hook(look, with_kwargs=True)
    with CastCounter() as counter:
        trajectories = play(policy, Echo, [1, 2], 2, config(max_turns=1))
    assert max(len(r.logp) for t in trajectories for r in t.responses) > 2
    found = [counter.casts[w] for w in weights]
    assert max(found) == 1 and sum(found) > len(found) / 2
    assert stored == {torch.bfloat16}  # the cache holds what attention reads


@pytest.mark.parametrize("estimator", ["grpo", "gspo"])
def test_bfloat16_computes_from_fp32_weights_and_stays_close(tiny, played, estimator, monkeypatch):
    change_row(monkeypatch, estimator, clip_low=0.9, clip_high=9.0)
    cfg = config(estimator=estimator, kl_coef=0.1)
    found = {}
    for dtype in ("float32", "bfloat16"):
        policy = clone(tiny, dtype=dtype)
        aem.record_logps(clone(tiny, dtype=dtype), played, cfg, "reference")
        _, found[dtype] = gradients(policy, played, cfg)
        assert all(p.dtype == torch.float32 for p in policy.model.parameters())
        assert found[dtype].dtype == torch.float32
        rolled = play(policy, Echo, range(4), 4, config(), "bf16")
        old = torch.tensor(old_logps(rolled))
        gap = (aem.sampled_stats(policy, rolled)[0] - old).abs().mean()  # the same rounded weights
        rounding = (aem.sampled_stats(tiny, rolled)[0] - old).abs().mean()
        assert gap < 1e-5 if dtype == "float32" else gap < 0.3 * rounding < 0.01
    difference = (found["bfloat16"] - found["float32"]).norm() / found["float32"].norm()
    assert 1e-4 < difference < 0.1


def test_a_compiled_model_computes_the_same(monkeypatch, tmp_path):
    for part in (family_policy("qwen2").model, family_policy("qwen2").tokenizer):
        part.save_pretrained(tmp_path)
    graphs = []

    def backend(graph, inputs):  # in place of a compiler, which is slow and needs C++
        graphs.append(len(inputs))
        return graph.forward

    uncompiled = torch.nn.Module.compile
    replaced = functools.partialmethod(uncompiled, backend=backend)
    monkeypatch.setattr(torch.nn.Module, "compile", replaced)
    torch.compiler.reset()
    cfg = config(compile=True)
    policies = aem.load_policy(cfg, tmp_path), aem.load_policy(config(), tmp_path)
    counts = []
    for limit, count in ((3, 6), (4, 4)):
        cfg = config(max_turns=limit)
        fast, slow = (play(p, lambda n=limit: Echo(n), range(count), 1, cfg) for p in policies)
        assert [t.ids for t in fast] == [t.ids for t in slow]
        assert old_logps(fast) == pytest.approx(old_logps(slow), abs=1e-5)
        counts.append(len(graphs))
    assert 0 < counts[0] < 12 and counts[1] < counts[0] + 6  # other sizes: (nearly) the same graphs
    for r in aem.responses_of(slow):
        r.advantage = 1.0
    (sums, fast), (expected, slow) = (gradients(p, slow, config()) for p in policies)
    assert sums["loss"] == pytest.approx(expected["loss"], abs=1e-6)
    assert torch.allclose(fast, slow, atol=1e-6) and len(graphs) > counts[1]
    torch.compiler.reset()


def test_the_warm_start_is_reused_and_its_key_covers_its_flags(tmp_path, monkeypatch):
    def folder(**changes):
        flags = {"env": "test_aem:Echo", "cache_dir": str(tmp_path), "warm_steps": 2}
        return aem.warm_start(Echo(), config(**flags | changes))

    first = folder()
    times = {file: file.stat().st_mtime_ns for file in first.iterdir()}
    assert folder(seed=9) == first
    assert times == {file: file.stat().st_mtime_ns for file in first.iterdir()}
    whole = {file: file.read_bytes() for file in first.iterdir()}
    cuts = [("tokenizer.json", lambda file: os.truncate(file, 100))]
    cuts += [("tokenizer.json", Path.unlink), ("sizes.json", lambda file: os.truncate(file, 10))]
    for name, damage in cuts:
        damage(first / name)
        assert folder() == first and whole == {file: file.read_bytes() for file in first.iterdir()}
    others = [{"warm_steps": 3}, {"warm_noise": 0.1}, {"max_turns": 2}]
    assert len({first, *(folder(**flags) for flags in others)}) == 4
    assert len(list(tmp_path.iterdir())) == 4
    other_source = types.SimpleNamespace(getmodule=str, getsource=str)
    monkeypatch.setattr(aem, "inspect", other_source)
    assert folder() != first


class Obedient(Echo):
    """Demonstrates what the task asks for, and goes on to another one."""

    def demonstration(self, seed, noise):
        rng = random.Random(seed)
        tasks = [rng.choice(self.words) for _ in range(3)]
        return [(f"Say {word}.", word) for word in tasks]


def imitated(tiny, tmp_path, **changes):
    """(policy, config): as for --model X, where X is the tiny policy as it lies in a folder."""
    if not (tmp_path / "X").exists():
        tiny.model.save_pretrained(tmp_path / "X")
        tiny.tokenizer.save_pretrained(tmp_path / "X")
    flags = {"model": str(tmp_path / "X"), "env": "test_aem:Obedient", "groups": 2, "group_size": 4}
    cfg = config(**flags | {"cache_dir": str(tmp_path / "cache"), "warm_steps": 1} | changes)
    return aem.load_policy(cfg, aem.warm_start(Obedient(), cfg)), cfg


@pytest.mark.parametrize("tag", ["", "say"])
def test_a_step_of_imitation_is_one_of_cross_entropy_on_the_actions(tag, tiny, tmp_path):
    flags = {"action_tag": tag, "max_response_tokens": 20, "micro_batch_tokens": 100}
    found, cfg = imitated(tiny, tmp_path, warm_lr=1e-3, **flags)
    slow = aem.load_policy(cfg, cfg.model)
    rng = random.Random("demonstrations")
    losses = []
    for _ in range(8):
        ids, actions = [], []
        for observation, word in Obedient().demonstration(rng.randrange(2**30), 0):
            ids += slow.encode(f"<|user|>{observation}<|end|><|assistant|>")
            answer = slow.encode(f"<say>{word}</say>" if tag else word) + [slow.end]
            actions += range(len(ids), len(ids) + len(answer))
            ids += answer
        logps = slow.model(torch.tensor([ids])).logits[0].log_softmax(-1)
        losses += [-logps[at - 1, ids[at]] for at in actions]
    loss = torch.stack(losses).mean()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(slow.weights, 1.0)
    torch.optim.AdamW(slow.weights, lr=1e-3, weight_decay=0.0).step()
    for ours, expected in zip(found.weights, slow.weights, strict=True):
        assert torch.allclose(ours, expected, atol=1e-4)
    moved = zip(found.weights, aem.load_policy(cfg, cfg.model).weights)
    assert max((a - b).abs().max().item() for a, b in moved) > 9e-4  # Adam's first step: lr


class Talkative(Obedient):
    def demonstration(self, seed, noise):
        return super().demonstration(seed, noise) * 20


class NoDemonstration(Obedient):
    def demonstration(self, seed, noise):
        return [][0]


def test_demonstrations_stay_within_the_limits_of_a_rollout(tiny):
    cfg = config(max_length=100, max_turns=50)
    t = aem.demonstrated(tiny, Talkative(), 3, cfg)
    assert 90 < len(t.ids) <= 100 and t.ids[-1] == tiny.end and len(t.responses) > 5
    assert len(aem.demonstrated(tiny, Talkative(), 3, config(max_turns=4)).responses) == 4
    with pytest.raises(aem.UsageError, match="raise --max_response_tokens"):
        aem.demonstrated(tiny, Talkative(), 3, config(max_response_tokens=1))
    with pytest.raises(aem.UsageError, match="(?s)its demonstration 3 failed.*IndexError"):
        aem.demonstrated(tiny, NoDemonstration(), 3, config())


def test_imitation_begins_anew_where_the_model_has_changed(tiny, tmp_path):
    _, cfg = imitated(tiny, tmp_path)
    kept = aem.warm_start(Obedient(), cfg)
    times = {file: file.stat().st_mtime_ns for file in kept.iterdir()}
    assert kept == aem.warm_start(Obedient(), cfg)
    assert times == {file: file.stat().st_mtime_ns for file in kept.iterdir()}
    os.utime(tmp_path / "X" / "model.safetensors", ns=(1, 1))  # other weights of the same size
    assert kept != aem.warm_start(Obedient(), cfg)
    assert aem.source_of(tmp_path) == tmp_path
    (tmp_path / "checkpoint").mkdir()
    assert aem.source_of(tmp_path) == tmp_path / "checkpoint"


def test_an_imitation_that_stops_leaves_nothing_behind(tiny, tmp_path, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    _, cfg = imitated(tiny, tmp_path)
    cfg.warm_steps = 2
    monkeypatch.setattr(aem, "imitate", interrupted)
    monkeypatch.setattr(aem.inspect, "getsource", str)  # of this `imitate`, too
    with pytest.raises(KeyboardInterrupt):
        aem.warm_start(Obedient(), cfg)
    assert len(list((tmp_path / "cache").iterdir())) == 1
    cfg.out, cfg.name = str(tmp_path / "out"), "run"
    with pytest.raises(KeyboardInterrupt):
        aem.set_up(cfg)
    assert not (tmp_path / "out" / "run").exists()


def test_imitation_teaches_a_model_and_is_kept(tiny, tmp_path):
    def success(policy):
        played = play(policy, Obedient, range(40), 1, cfg)
        return fmean(t.success for t in played)

    policy, cfg = imitated(tiny, tmp_path, warm_steps=40, warm_lr=3e-3)
    assert success(aem.load_policy(cfg, cfg.model)) < 0.5 < success(policy)
    imitated(tiny, tmp_path, warm_steps=1, warm_lr=3e-3)
    assert len(list((tmp_path / "cache").iterdir())) == 2


# ------------------------------------------------------------------------------ 4. rollout
class Uneven(Echo):
    """Every third task is long, and over after its first turn: the longest rows leave first."""

    def reset(self, *, seed=None):
        observation, info = super().reset(seed=seed)
        self.limit = 1 if seed % 3 == 0 else 5
        return observation + " Try again." * (60 if seed % 3 == 0 else seed), info


def check_against_full_forwards(policy, trajectories):
    """Recorded log-probs and entropies, held against a forward of each trajectory alone."""
    for t in trajectories:
        with torch.no_grad():
            logits = policy.model(torch.tensor([t.ids])).logits[0] / policy.temperature
        for r in t.responses:
            span = slice(r.start, r.start + len(r.logp))
            before = slice(r.start - 1, r.start + len(r.logp) - 1)
            logp, entropy = aem.token_stats(logits[before], torch.tensor(t.ids[span]))
            assert r.logp == pytest.approx(logp.tolist(), abs=1e-4)
            assert r.entropy == pytest.approx(entropy.tolist(), abs=1e-4)


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama", "eager attention"])
def test_cached_rollout_and_padded_update_equal_a_full_forward(family, tiny):
    policy = random_policy(family, tiny, temperature=0.7)
    cfg = config(max_turns=6, max_response_tokens=7)
    trajectories = play(policy, lambda: Echo(6), [1, 2], 4, cfg, family)
    uneven = play(policy, Uneven, range(9), 1, cfg, family)
    lengths = [len(t.ids) for t in uneven]
    assert min(lengths[::3]) > 64 + max(lengths[1::3] + lengths[2::3])  # they need less capacity
    assert {len(t.responses) for t in uneven[::3]} == {1} < {len(t.responses) for t in uneven}
    trajectories += uneven
    assert len({len(t.ids) for t in trajectories}) > 6  # ragged
    check_against_full_forwards(policy, trajectories)
    now = aem.sampled_stats(policy, trajectories)[0].tolist()
    assert now == pytest.approx(old_logps(trajectories), abs=1e-4)


def test_a_trajectory_does_not_depend_on_its_batch(tiny):
    cfg = config(max_turns=4)
    seeds = [1, 2, 3]

    def ids(seeds, size=2, cfg=cfg, stream="x"):
        return [t.ids for t in play(tiny, lambda: household(4), seeds, size, cfg, stream)]

    together = ids(seeds)
    assert ids(seeds[:1]) == together[:2]
    assert together[0] != together[1] and ids(seeds, stream="y") != together
    assert ids(seeds, cfg=config(max_turns=4, seed=1)) != together
    for stream in "abcd":
        assert ids(seeds[:1], 1, stream=stream)[0] == ids(seeds, stream=stream)[0]
    little = config(max_turns=4, micro_batch_tokens=60)  # prompts go in by parts
    sizes = []

    def look(module, args, kwargs):
        sizes.append(kwargs["input_ids"].numel())

    hook = tiny.body.register_forward_pre_hook(look, with_kwargs=True)
    assert ids(seeds, cfg=little) == together and len(together[0]) > 60
    hook.remove()
    assert max(sizes) <= 60


def test_a_rollout_has_few_shapes(tiny):
    policy = clone(tiny)
    shapes = set()

    def look(module, args, kwargs):
        shapes.add(kwargs["attention_mask"].shape[2:])

    policy.body.register_forward_pre_hook(look, with_kwargs=True)
    cfg = config(max_turns=12, max_response_tokens=16)  # the default run's
    trajectories = play(policy, envs.Household, range(16), 1, cfg)
    assert max(len(t.ids) for t in trajectories) > 128
    assert len([shape for shape in shapes if shape[0] == 1]) <= 8, shapes


def test_the_cache_grows_without_losing_anything():
    torch.manual_seed(0)
    cache = aem.SlotCache()
    whole = torch.randn(2, 2, 3, 700, 4)  # keys and values of 2 rows, 3 heads, 700 tokens
    for start, end in ((0, 5), (5, 6), (6, 200), (200, 201), (201, 700)):
        cache.prepare(torch.arange(start, end).expand(2, -1), end)
        keys, values = cache.update(*whole[:, :, :, start:end], 0)
        assert torch.equal(keys[:, :, :end], whole[0, :, :, :end])
        assert torch.equal(values[:, :, :end], whole[1, :, :, :end])


class MemoryMeter(TorchDispatchMode):
    """The most bytes that the results of operations, and the `given` tensors, held at once."""

    def __init__(self, given):
        super().__init__()
        self.alive = [weakref.ref(x) for x in given]
        self.peak = 0

    def __torch_dispatch__(self, function, _, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        self.alive.append(weakref.ref(result))
        storages = {}
        for reference in self.alive:
            tensor = reference()
            if tensor is not None:
                storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        self.peak = max(self.peak, sum(storages.values()))
        return result


def test_dropping_rows_never_holds_two_caches():
    cache = aem.SlotCache()
    cache.prepare(torch.arange(5).expand(8, -1), 5)
    for layer in range(10):
        cache.update(torch.randn(8, 2, 5, 4), torch.randn(8, 2, 5, 4), layer)
    stored = [x for pair in cache.layers for x in pair]
    whole = sum(x.nbytes for x in stored)
    meter = MemoryMeter(stored)
    del stored
    with meter:
        cache.keep([0, 1, 2, 3, 4, 5, 6])
    assert 0 < meter.peak <= whole * 1.1 and len(cache.layers[0][0]) == 7


@pytest.mark.parametrize("family", FAMILIES)
def test_responses_cover_exactly_the_sampled_tokens(family, tiny):
    policy = clone(tiny) if family == "embedded" else family_policy(family)
    (word,) = policy.encode("." if family == "embedded" else "b")
    policy.model.generation_config.eos_token_id = [policy.end, word]  # either ends a response
    policy = aem.Policy(policy.model, policy.tokenizer)
    outcomes = Counter()
    for t in play(policy, lambda: household(3), [1, 2, 3, 4], 4, config()):
        ids = policy.opening_ids(envs.Household.instructions, t.prompt)
        for r in t.responses:  # prompt + response + observation + ..., and nothing else
            assert r.start == len(ids) and len(r.logp) == len(r.entropy) > 0
            response = t.ids[r.start : r.start + len(r.logp)]
            assert not {policy.end, word} & set(response[:-1])  # the end is a part of the response
            assert len(response) == 6 or response[-1] in policy.ends
            assert policy.tokenizer.decode(response, skip_special_tokens=True) == r.text
            ended = response[-1] == policy.end
            outcomes[response[-1]] += 1
            ids += response
            if r is not t.responses[-1]:
                ids += policy.observation_ids(r.observation, ended)
                if not ended:  # cut off, or by another end: the template ends the turn
                    assert ids[len(response) + r.start] == policy.end
        assert ids == t.ids
    assert family != "embedded" or min(outcomes[policy.end], outcomes[word]) > 3


@pytest.mark.parametrize(
    "text, action",
    [
        ("<think>x</think><action>go to bed</action>", "go to bed"),
        ("<action>a</action> no: <action>\nb\n</action>", "\nb\n"),
        ("go to bed", ""),
        ("<action>go to bed", ""),
        ("go to bed</action>", ""),
        ("<action></action>", ""),
    ],
)
def test_the_environment_gets_the_action_only(text, action, tiny, monkeypatch):
    assert aem.action_in(text, "action") == action and aem.action_in(text, "") == text
    heard = []

    def step(self, action):
        heard.append(action)
        return "Over.", 0.0, True, False, {}

    monkeypatch.setattr(Echo, "step", step)
    monkeypatch.setattr(tiny.tokenizer, "decode", lambda *args, **options: text)
    (t,) = play(tiny, Echo, [5], 1, config(action_tag="action"))
    assert heard == [action] and t.responses[0].invalid == (not action.strip())


@pytest.mark.parametrize(
    "end, success",
    [((1.0, True, False), True), ((0.0, True, False), False), ((1.0, True, True), False)],
)
def test_success_by_default_is_an_end_that_pays(end, success, tiny, monkeypatch):
    monkeypatch.setattr(Echo, "step", lambda self, text: ("Over.", *end, {}))
    assert play(tiny, Echo, [5], 1, config())[0].success == success


def test_the_system_prompt_says_what_to_do(tiny, monkeypatch):
    prompts = []
    monkeypatch.setattr(tiny, "opening_ids", lambda system, _: prompts.append(system) or [1])
    for flags in ({}, {"action_tag": "do"}):
        play(tiny, envs.Household, [5], 1, config(**flags))
    instructions = envs.Household.instructions
    assert prompts[0] == instructions
    assert prompts[1].startswith(instructions) and "<do>" in prompts[1]


def test_sampling_is_the_inverse_cdf():
    p = [0.2, 0.0, 0.5, 0.3, 0.0]
    logits = torch.tensor([p]).log()
    points = torch.tensor([0.0, 0.19, 0.21, 0.69, 0.71, 1 - 1e-12], dtype=torch.float64)
    assert aem.sample(logits.expand(6, -1), points).tolist() == [0, 0, 2, 2, 3, 3]
    assert aem.sample(torch.tensor([[-math.inf, 0.0, 0.0]]), points[:1]).tolist() == [1]
    uniform = torch.rand(20000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    counts = aem.sample(logits.expand(20000, -1), uniform).bincount(minlength=5)
    assert (counts / 20000).tolist() == pytest.approx(p, abs=0.015)


@pytest.mark.parametrize("seconds", [0.0, 30.0])  # in the main thread, in others
def test_a_crashing_environment_fails_only_its_own_trajectories(tiny, seconds):
    cfg = config(env="test_aem:Crashing", env_timeout=seconds)
    before = [Crashing() for _ in range(16)]
    environments = list(before)
    trajectories = aem.rollout(tiny, environments, [2, 3, 4, 7], 4, cfg, "crash")
    for t, old, new in zip(trajectories, before, environments, strict=True):
        assert (old is new) == (not t.error) and isinstance(new, Crashing)
    failed = [t for t in trajectories if t.error]
    assert [t.group for t in failed].count(3) == 4 and {t.group for t in failed} == {1, 3}
    for t in failed:
        assert t.done and t.reward == 0 and not t.success
        assert "boom" in t.error if t.group == 1 else "no such task" in t.error and not t.ids
    trajectories[0].reward = 10.0
    credit(trajectories, config())
    assert all(r.advantage == 0 for r in aem.responses_of(failed))
    optimizer = torch.optim.SGD(tiny.weights, lr=0.0)
    assert aem.update(tiny, optimizer, trajectories, config(), 1)["updates"] >= 1


def test_rubbish_fails_only_its_own_trajectory(tiny, tmp_path):
    for kind, rubbish in enumerate(Broken.rubbish):
        bad, good = play(tiny, Broken, [2 * kind, 1], 1, config(), f"rubbish {kind}")
        assert bad.error and bad.reward == 0 and not bad.success and bad.done, rubbish
        assert not good.error and len(good.responses) >= 1
        aem.record(tmp_path, {"step": 0, "eval_success": 0.0}, [bad, good], config())
    assert "NoneType" in (tmp_path / "env_error.txt").read_text()  # the first stays


class Kind(enum.Enum):
    WARM = 1


@pytest.mark.parametrize(
    "kind, name, reward",
    [
        (None, None, int),
        (7, "7", Fraction),
        (numpy.int64(3), "3", numpy.float32),
        (Kind.WARM, "Kind.WARM", torch.tensor),
        (0, "0", bool),
    ],
)
def test_kinds_of_tasks_and_rewards_may_have_other_types(kind, name, reward, tiny, tmp_path):
    class Odd(Echo):
        instructions = None

        def reset(self, *, seed=None):
            observation, info = super().reset(seed=seed)
            return observation, {"task_type": kind} if seed % 2 else info

        def step(self, text):
            answer, _, ended, cut, info = super().step(text)
            return answer, reward(1), int(ended), numpy.bool_(cut), info

    cfg = config(eval_tasks=16, action_tag="do")  # which is added to the instructions
    played, row = aem.evaluate(tiny, [Odd() for _ in range(16)], cfg)
    assert [t.reward for t in played] == [len(t.responses) for t in played]
    assert all(type(t.reward) is float and not t.error for t in played)
    assert set(row["eval_by_type"]) - set(Echo.words) == {name} - {None}
    aem.record(tmp_path, {"step": 0} | row, played, cfg)


@pytest.mark.parametrize("parallel, hung", [(False, 1), (True, 12)])
def test_environments_that_hang_are_left_behind(tiny, monkeypatch, parallel, hung):
    monkeypatch.setattr(Broken, "parallel", parallel, raising=False)
    cfg = config(env="test_aem:Broken", env_timeout=0.4)
    before = [Broken() for _ in range(3 + hung)]
    environments = list(before)
    start = time.perf_counter()
    trajectories = aem.rollout(tiny, environments, [1, *[99] * hung, 3, 5], 1, cfg, "hang")
    assert time.perf_counter() - start < 4  # one deadline for all: twelve would be 4.8
    hangs = [False, *[True] * hung, False, False]
    assert [t.error != "" for t in trajectories] == hangs
    assert all("TimeoutError" in t.error for t in trajectories if t.error)
    replaced = [old is not new for old, new in zip(before, environments)]
    assert replaced == hangs  # the old ones still sleep
    timed, untimed = (play(tiny, Broken, [1, 7, 3, 5], 1, c) for c in (cfg, config()))
    assert [t.ids for t in timed] == [t.ids for t in untimed]


def test_a_batch_that_mostly_crashes_stops_the_run(tiny, monkeypatch):
    monkeypatch.setattr(Crashing, "step", lambda self, text: 1 / 0)
    with pytest.raises(aem.UsageError, match="crashed in 16 of 16(.|\n)*ZeroDivisionError"):
        aem.train_step(tiny, None, [Crashing() for _ in range(16)], config(), 1)


def test_one_crash_among_many_stops_nothing(tiny, monkeypatch):
    monkeypatch.setattr(Crashing, "step", Echo.step)
    monkeypatch.setattr(envs, "HELD_OUT", 3)  # tasks 3 ... 7, of which the last one crashes
    cfg = config(groups=2, group_size=2, eval_tasks=5)
    evaluated, row = aem.evaluate(tiny, [Crashing() for _ in range(4)], cfg)  # a batch of its own
    assert [bool(t.error) for t in evaluated] == [False] * 4 + [True]
    assert row["eval_tasks"] == 5


def test_trajectories_end_at_the_length_limit(tiny):
    cfg = config(max_turns=50, max_length=90)
    for t in play(tiny, lambda: household(50), [1, 2], 2, cfg, "long"):
        assert 1 < len(t.responses) < 50 and len(t.ids) <= 90
        assert t.done and t.truncated and not t.success
    with pytest.raises(aem.UsageError, match="raise --max_length"):
        aem.train_step(tiny, None, [Echo() for _ in range(16)], config(max_length=10), 1)


def lottery():
    return [Lottery(i % 2 == 0) for i in range(16)]  # in each group of four, two are lucky


def test_dynamic_sampling_fills_the_batch_with_groups_that_vary(tiny, monkeypatch):
    change_row(monkeypatch, "dapo", overlong=0.0)
    cfg = config(estimator="dapo")
    tasks, streams = [], []
    rollout = aem.rollout

    def watched(policy, environments, seeds, group_size, cfg, stream):
        tasks.extend(seeds)
        streams.append(stream)
        return rollout(policy, environments, seeds, group_size, cfg, stream)

    monkeypatch.setattr(aem, "rollout", watched)
    kept, drawn = aem.sample_batch(tiny, lottery(), cfg, 1)
    assert len(set(tasks)) == len(tasks) == len(drawn) // 4  # tasks of its own for every draw
    assert len(set(streams)) == len(streams) > 1
    assert len(kept) == 16 < len(drawn)
    kept_ids = set(map(id, kept))
    assert kept_ids <= set(map(id, drawn))
    for g in {t.group for t in drawn}:
        members = [t for t in drawn if t.group == g]
        varies = len({t.reward for t in members}) > 1
        assert len(members) == 4 and len({t.prompt for t in members}) == 1
        assert all((id(t) in kept_ids) == varies for t in members)
    every = config(estimator="dapo", max_resample=0)
    for other, step in ((every, 1), (config(), 1), (cfg, 0)):  # step 0 only measures
        kept, drawn = aem.sample_batch(tiny, lottery(), other, step)
        assert kept == drawn and len(kept) == 16


def test_dynamic_sampling_is_bounded(tiny):
    cfg = config(estimator="dapo", max_resample=2)
    with pytest.raises(aem.UsageError, match="vary in only 0 of 12 groups(.|\n)*--max_resample"):
        aem.sample_batch(tiny, [Alike() for _ in range(16)], cfg, 1)


def invented(lengths, **changes):
    """A trajectory whose responses have these lengths."""
    t = aem.Trajectory(0, None, None)
    t.responses = [aem.Response(0, [-1.0] * n, [0.5] * n) for n in lengths]
    vars(t).update(changes)
    return t


def test_crashes_and_rounding_do_not_make_a_group_vary(tiny, monkeypatch):
    cfg = config(estimator="dapo", groups=1, group_size=3, max_resample=1, max_response_tokens=20)
    crash = {"error": "boom"}
    alike = [[{"reward": 10.0}, {"reward": 10.0}, crash], [{"reward": 0.1 + 0.2}, {"reward": 0.3}]]
    for changes in alike:
        drawn = [invented([2], **c) for c in changes]
        monkeypatch.setattr(aem, "rollout", lambda *args, drawn=drawn: drawn)
        with pytest.raises(aem.UsageError, match="vary in only 0"):
            aem.sample_batch(tiny, None, cfg, 1)


def test_every_step_and_seed_has_tasks_and_random_numbers_of_its_own(tiny, monkeypatch):
    drawn = []

    def rollout(policy, environments, seeds, size, cfg, stream):
        drawn.append((tuple(seeds), stream))
        return [invented([1]) for _ in range(len(seeds) * size)]

    monkeypatch.setattr(aem, "rollout", rollout)
    for seed, step in ((0, 1), (0, 2), (1, 1), (0, 1)):
        aem.sample_batch(tiny, None, config(seed=seed), step)
    tasks, streams = zip(*drawn)
    assert drawn[0] == drawn[3] and len(set(tasks)) == 3 and streams[0] != streams[1]
    assert max(map(max, tasks)) < envs.HELD_OUT


def test_soft_overlong_penalty_by_hand(monkeypatch, tiny):
    lengths = [[3], [16], [17], [19], [20], [20, 2], [1, 18], []]
    expected = [0, 0, 0.25, 0.75, 1, 1, 0.5, 0]  # over the last 4 of 20 tokens
    drawn = [invented(n, reward=10.0) for n in lengths]
    monkeypatch.setattr(aem, "rollout", lambda *args: drawn)
    sizes = {"groups": 1, "group_size": 8, "max_response_tokens": 20}
    aem.sample_batch(tiny, None, config(**sizes), 1)
    assert all(t.penalty == 0 for t in drawn)  # GRPO has none
    cfg = config(estimator="dapo", **sizes)
    kept, _ = aem.sample_batch(tiny, None, cfg, 1)
    assert [t.penalty for t in kept] == pytest.approx(expected)
    assert all(t.reward == 10 for t in kept)
    credit(kept, cfg)
    advantages = slow_advantage([10 - p for p in expected], "standardised")
    found = [t.responses[0].advantage for t in kept[:7]]
    assert found == pytest.approx(advantages[:7])


# ------------------------------------------------------------------------------ 5. update
def advantages_of(rewards, cfg):
    """Base advantages of trajectories of one response each; a reward of None is a crash."""
    trajectories = []
    for reward in rewards:
        crash = {"error": "boom"} if reward is None else {"reward": reward}
        trajectories.append(invented([2], **crash))
    return aem.assign_credit(trajectories, cfg).tolist()


@pytest.mark.parametrize("estimator", list(aem.ESTIMATORS))
def test_a_crash_is_missing_from_the_baseline(estimator):
    cfg = config(estimator=estimator)
    assert advantages_of([10.0] * 7 + [None], cfg) == [0.0] * 8
    without = advantages_of([10.0, 0.0, 0.0], cfg)
    assert advantages_of([10.0, 0.0, 0.0, None], cfg) == [*without, 0.0]
    assert without[0] > 0 > without[1]
    assert advantages_of([10.0, None, None], cfg) == [0.0] * 3
    assert advantages_of([0.1 + 0.2, 0.3], cfg) == [0.0] * 2  # equal but for rounding


def test_scopes_of_the_normalisation(mixed):
    keys = {"group": lambda t: t.group, "trajectory": id, "batch": lambda t: 0}
    for scope, key in keys.items():
        cfg = config(aem_scope=scope, lam=0.7)
        credit(mixed, cfg)
        used = [(t, r) for t in mixed if not t.error for r in t.responses]  # no crashed one
        h_bar = [sum(r.entropy) / len(r.entropy) for _, r in used]
        expected = slow_alpha(h_bar, [key(t) for t, _ in used], 0.7)
        assert [r.alpha for _, r in used] == pytest.approx(expected, abs=1e-9)
        assert all(r.alpha == 1 and r.advantage == 0 for r in mixed[4].responses)
    assert set(aem.modulate(mixed, config(aem=False), 1).tolist()) == {1.0}


def test_every_step_shuffles_anew(mixed):
    def alphas(step, seed=0):
        return aem.modulate(mixed, config(aem_direction="shuffle", seed=seed), step).tolist()

    assert alphas(1) == alphas(1)
    assert alphas(1) != alphas(2) and alphas(1) != alphas(1, seed=1)


def test_the_readme_line_for_other_trainers_does_what_ours_does(played, monkeypatch):
    """`played` as a dense batch, base advantages 1: what comes out is each token's alpha."""
    monkeypatch.syspath_prepend(HERE / "integrations")
    from aem_tokens import token_alphas

    readme = (HERE / "README.md").read_text()
    line = re.search("    (advantage .*)  # ", readme)[1]
    shape = (len(played), max(len(t.ids) for t in played))
    names = {"entropy": torch.zeros(shape), "advantage": torch.ones(shape)}
    names |= {"sampled": torch.zeros(shape).bool(), "group": [t.group for t in played]}
    spans = []
    for row, t in enumerate(played):
        for r in t.responses:
            span = row, slice(r.start, r.start + len(r.logp))
            spans.append(span)
            names["entropy"][span] = torch.tensor(r.entropy)
            names["sampled"][span] = True
    names |= {"trained": names["sampled"], "token_alphas": token_alphas}
    exec(line, names)
    for span, r in zip(spans, aem.responses_of(played)):
        assert names["advantage"][span].tolist() == pytest.approx([r.alpha] * len(r.logp), abs=1e-5)
    assert (names["advantage"][~names["sampled"]] == 1).all()


def test_micro_batches_hold_everything_within_the_budget(played):
    for budget in (1, 100, 500, 10**6):
        batches = list(aem.micro_batches(played, budget))
        assert sorted(id(t) for b in batches for t in b) == sorted(map(id, played))
        for batch in batches:
            assert len(batch) == 1 or len(batch) * max(len(t.ids) for t in batch) <= budget
    rng = random.Random(0)
    many = [aem.Trajectory(0, None, None, [5] * rng.randint(100, 1000)) for _ in range(128)]
    batches = list(aem.micro_batches(many, 8192))
    padded = sum(len(b) * max(len(t.ids) for t in b) for b in batches)
    assert padded < 1.1 * sum(len(t.ids) for t in many)  # of like length: little padding


def test_micro_batches_order_and_padding_change_nothing(tiny, played):
    policy = clone(tiny)
    sums, whole = gradients(policy, played, config(micro_batch_tokens=10**6))
    assert whole.norm() > 0.01
    for budget, batch in ((1, played), (150, played), (400, played), (10**6, played[::-1])):
        other, grads = gradients(policy, batch, config(micro_batch_tokens=budget))
        assert other["loss"] == pytest.approx(sums["loss"], abs=1e-6)
        assert torch.allclose(grads, whole, atol=1e-6)


@pytest.mark.parametrize("at_once", [1, 6000, 10**9])  # a position at a time, some 13, all
def test_logps_in_chunks_equal_dense_ones_in_value_and_gradient(tiny, played, monkeypatch, at_once):
    monkeypatch.setattr(aem, "LOGITS_AT_ONCE", at_once)
    policy = clone(tiny, double=True, temperature=0.7)
    heights = []
    hook = policy.head.register_forward_pre_hook(lambda _, args: heights.append(len(args[0])))
    fast = aem.sampled_stats(policy, played)[0]
    hook.remove()
    assert sum(heights) == len(fast)  # sampled positions only
    assert max(heights) <= max(1, at_once // len(tiny.tokenizer))
    slow = torch.cat([dense_logps(policy, t) for t in played])
    assert torch.allclose(fast, slow, rtol=0, atol=1e-12) and len(fast) == len(old_logps(played))
    weights = torch.randn(len(slow), generator=torch.Generator().manual_seed(0))
    (weights * slow).sum().backward()
    expected = gradient_of(policy)
    (weights * fast).sum().backward()
    assert torch.allclose(gradient_of(policy), expected, rtol=0, atol=1e-10)
    assert expected.norm() > 0.01


class Bigram(torch.nn.Module):
    """A tabular policy: the last token chooses a row of a table, the logits of the next one."""

    def __init__(self, size):
        super().__init__()
        self.table = torch.nn.Embedding(size, size)
        self.head = torch.nn.Linear(size, size, bias=False)
        self.head.weight = torch.nn.Parameter(torch.eye(size), requires_grad=False)
        self.device, self.dtype = torch.device("cpu"), torch.float32
        self.generation_config = transformers.GenerationConfig()

    def get_output_embeddings(self):
        return self.head

    def get_decoder(self):
        output = transformers.modeling_outputs.BaseModelOutput
        return lambda input_ids, **kwargs: output(last_hidden_state=self.table(input_ids))


def test_gradient_of_a_tabular_policy_by_hand(tiny, played):
    size = len(tiny.tokenizer)
    policy = aem.Policy(Bigram(size), tiny.tokenizer)
    p = policy.model.table.weight.detach().softmax(-1)
    expected = torch.zeros(size, size)
    for t in played:
        length = len(sampled(t))
        for r, at, _ in sampled(t):
            state, token = t.ids[at - 1], t.ids[at]
            r.logp[at - r.start] = p[state, token].log().item()  # on-policy: the ratio is 1
            score = torch.nn.functional.one_hot(torch.tensor(token), size) - p[state]
            expected[state] -= r.advantage * score / length / len(played)
    aem.accumulate_gradients(policy, played, config())
    assert torch.allclose(policy.model.table.weight.grad, expected, atol=1e-6)
    assert expected.norm() > 0.01


def test_old_log_probs_can_be_recomputed(tiny, played):
    policy = clone(tiny, noise=0.01)
    for r in aem.responses_of(played):
        r.logp = [x + 0.25 for x in r.logp]  # what was recorded is off
    truth = torch.cat([dense_logps(policy, t) for t in played]).tolist()
    learner = copy.deepcopy(policy)
    optimizer = torch.optim.AdamW(learner.model.parameters(), lr=1e-4)
    cfg = config(recompute_old_logps=True, minibatches=2)
    metrics = aem.update(learner, optimizer, played, cfg, 1)
    assert old_logps(played) == pytest.approx(truth, abs=1e-5)  # of before the first step
    assert metrics["logp_gap"] < 1e-5


def test_update_counts_and_skips(tiny, played):
    policy = clone(tiny)
    optimizer = torch.optim.SGD(policy.weights, lr=0.1)

    def update(trajectories, **flags):
        metrics = aem.update(policy, optimizer, trajectories, config(**flags), 1)
        pairs = zip(policy.model.parameters(), tiny.model.parameters())
        return metrics, any(not torch.equal(a, b) for a, b in pairs)

    flat = copy.deepcopy(played)
    for t in flat:
        t.reward = 0.1
    credit(flat, config())
    assert update(flat) == ({"updates": 0, "skipped_updates": 0}, False)  # and nothing measured
    broken = copy.deepcopy(played)
    broken[0].responses[0].logp[0] = math.nan
    metrics, moved = update(broken, minibatches=1)
    assert (metrics["updates"], metrics["skipped_updates"], moved) == (0, 1, False)
    json.dumps(metrics, allow_nan=False)  # what is not finite stays out
    metrics, moved = update(played, epochs=2, minibatches=3)
    assert (metrics["updates"], metrics["skipped_updates"], moved) == (6, 0, True)
    assert metrics["logp_gap"] < 1e-5  # before the first step; later minibatches are off-policy
    assert {"loss", "grad_norm", "clip_fraction"} < set(metrics)
    for estimator in ("dr_grpo", "grpo++"):  # more minibatches than trajectories: some hold nothing
        metrics, _ = update(played, estimator=estimator, minibatches=20)
        assert 0 < metrics["updates"] <= 16 and metrics["skipped_updates"] == 0


def test_gradients_are_clipped_to_the_norm(tiny, played):
    policy = clone(tiny, double=True)
    before = torch.cat([p.detach().flatten() for p in policy.weights])
    optimizer = torch.optim.SGD(policy.weights, lr=1.0)
    cfg = config(minibatches=1, max_grad_norm=1e-3)
    metrics = aem.update(policy, optimizer, played, cfg, 1)
    moved = torch.cat([p.detach().flatten() for p in policy.weights]) - before
    assert moved.norm().item() == pytest.approx(1e-3, rel=0.01)
    assert metrics["grad_norm"] > 1e-3  # of the gradient itself


def slow_step_advantage(group, t, i, rule):
    """GiGPO's step advantage of response i of t: its return against those after the same text."""

    def anchor(u, j):
        return u.prompt if j == 0 else u.responses[j - 1].observation

    def discounted(u, j):
        return sum(0.95 ** (k - j) * u.responses[k].reward for k in range(j, len(u.responses)))

    same = [(u, j) for u in group for j in range(len(u.responses)) if anchor(u, j) == anchor(t, i)]
    own = [u is t and j == i for u, j in same].index(True)
    return slow_advantage([discounted(u, j) for u, j in same], rule)[own]


def slow_modulated(name, trajectories, with_aem):
    """{(trajectory, response): advantage}, by loops over everything."""
    rule, result = SPECIFIED[name][0], {}
    crash_free = [t for t in trajectories if not t.error]
    trained = [t for t in crash_free if not (name == "grpo++" and t.truncated)]
    for t in trained:
        group = [u for u in crash_free if u.group == t.group]  # filtered ones stay in the baseline
        own = [u is t for u in group].index(True)
        episode = slow_advantage([u.reward - u.penalty for u in group], rule)[own]
        for i in range(len(t.responses)):
            result[id(t), i] = episode
            if name == "gigpo":
                result[id(t), i] += slow_step_advantage(group, t, i, rule)
    if with_aem:
        rows = [(t, i, r) for t in trained for i, r in enumerate(t.responses)]
        h_bar = [sum(r.entropy) / len(r.entropy) for _, _, r in rows]
        alphas = slow_alpha(h_bar, [t.group for t, _, _ in rows])
        for (t, i, _), alpha in zip(rows, alphas):
            result[id(t), i] *= alpha
    return result


def slow_estimator_loss(name, policy, trajectories, with_aem, cfg):
    """(loss, tokens clipped above, below, not at all): a forward per trajectory, token by token."""
    _, mean, low, high, ratio_of = SPECIFIED[name]
    by_sequence = ratio_of == "trajectory"
    advantages = slow_modulated(name, trajectories, with_aem)
    losses, seen = [], Counter(above=0, below=0, inside=0)
    for t in trajectories:
        if (id(t), 0) not in advantages:
            continue
        logps = dense_logps(policy, t)
        olds = torch.tensor([old for _, _, old in sampled(t)], dtype=torch.float64)
        sequence = torch.exp((logps - olds).mean())
        number = {id(r): i for i, r in enumerate(t.responses)}
        losses.append([])
        for logp, (r, _, old) in zip(logps, sampled(t)):
            a = advantages[id(t), number[id(r)]]
            ratio = torch.exp(logp - old)
            if by_sequence and with_aem:  # each token of its own advantage, and gradient
                ratio = sequence.detach() * torch.exp(logp - logp.detach())
            elif by_sequence:  # GSPO's own form: one ratio for all
                ratio = sequence
            inside = min(max(ratio, torch.tensor(1 - low)), torch.tensor(1 + high))
            losses[-1].append(-min(ratio * a, inside * a))
            if a > 0 and ratio > 1 + high:
                seen["above"] += 1
            elif a < 0 and ratio < 1 - low:
                seen["below"] += 1
            else:
                seen["inside"] += 1
    sums, lengths = [sum(x) for x in losses], [len(x) for x in losses]
    if mean == "trajectory":
        return sum(x / n for x, n in zip(sums, lengths)) / len(losses), seen
    if mean == "token":
        return sum(sums) / sum(lengths), seen
    return sum(sums) / (len(trajectories) * cfg.max_turns * cfg.max_response_tokens), seen


@pytest.mark.parametrize("with_aem", [False, True])
@pytest.mark.parametrize("name", list(aem.ESTIMATORS))
def test_every_estimator_equals_a_slow_one(name, with_aem, tiny, mixed):
    cfg = config(estimator=name, aem=with_aem, groups=3, group_size=6)
    policy = clone(tiny, double=True)
    credit(mixed, cfg)
    expected = slow_modulated(name, mixed, with_aem)
    for t in mixed:
        for i, r in enumerate(t.responses):
            assert r.advantage == pytest.approx(expected.get((id(t), i), 0.0), abs=1e-9)
    aem.record_logps(policy, mixed, cfg, "logp")  # on-policy
    for noise in (0.0, 1e-4 if name == "gspo" else 0.02):  # then off-policy: both clips act
        moved = clone(policy, noise)
        sums, fast = gradients(moved, mixed, cfg)
        loss, seen = slow_estimator_loss(name, moved, mixed, with_aem, cfg)
        loss.backward()
        slow = gradient_of(moved)
        assert sums["loss"] == pytest.approx(loss.item(), abs=1e-6)
        assert sums["clip_fraction"] == seen["above"] + seen["below"]
        assert (fast - slow).abs().max() <= 1e-6 * max(1, slow.abs().max()) and slow.norm() > 0.01
        assert all(n > 0 for n in seen.values()) == (noise > 0)
    assert fast.dtype == torch.float64


# verl-agent's recipe
@pytest.mark.parametrize(
    "wins, failures, invalid, expected",  # turns of episodes that win; that fail; invalid ones
    [
        ([10], [50] * 7, 0, (5.91, -0.169)),
        ([20] * 4, [50] * 4, 0, (1.58, -0.631)),
        ([], [50] * 8, 20, (0.229, -4.35)),  # a turn that was valid; one that was not
    ],
)
def test_statistics_over_turns_by_hand(wins, failures, invalid, expected):
    trajectories = [invented([1] * turns) for turns in wins + failures]
    for t in trajectories[: len(wins)]:
        t.responses[-1].reward = 10.0
    for r in trajectories[-1].responses[:invalid]:
        r.invalid = True
        r.reward = -0.1
    for t in trajectories:
        t.reward = sum(r.reward for r in t.responses)
    cfg = config(recipe="verl_agent")
    found = aem.assign_credit(trajectories, cfg).tolist()
    best, worst = max(found), min(found)
    assert (float(f"{best:.3g}"), float(f"{worst:.3g}")) == expected
    assert sum(found) == pytest.approx(0, abs=1e-9)  # over turns: no trajectory counts more
    assert len(set(found)) == 2


def slow_recipe_advantages(trajectories, with_aem):
    """{(trajectory, response): advantage}: mean and std over a group's turns, by loops."""
    rows = []  # (trajectory, number of the response, response, what it earned)
    for t in trajectories:
        if t.error:
            continue
        earned = -t.penalty
        for r in t.responses:
            earned += 0 if r.invalid else r.reward
        for i, r in enumerate(t.responses):
            rows.append((t, i, r, earned + (r.reward if r.invalid else 0)))
    alphas = [1.0] * len(rows)
    if with_aem:
        h_bar = [sum(r.entropy) / len(r.entropy) for _, _, r, _ in rows]
        alphas = slow_alpha(h_bar, [t.group for t, _, _, _ in rows])
    result = {}
    for (t, i, _, earned), alpha in zip(rows, alphas):
        group = [x for u, _, _, x in rows if u.group == t.group]
        result[id(t), i] = alpha * (earned - fmean(group)) / (stdev(group) + 1e-6)
    return result


def slow_recipe_loss(name, policy, reference, trajectories, with_aem):
    """(loss, how often each bound acted): token by token, a forward per trajectory."""
    low, high = {"grpo": (0.2, 0.2), "dapo": (0.2, 0.28), "gspo": (3e-4, 4e-4)}[name]
    advantages = slow_recipe_advantages(trajectories, with_aem)
    losses, seen = [], Counter(above=0, below=0, dual=0)  # losses: a list per response
    for t in trajectories:
        if t.error:
            continue
        logits = policy.model(torch.tensor([t.ids])).logits[0]
        anchor = reference.model(torch.tensor([t.ids])).logits[0].detach()
        for i, r in enumerate(t.responses):
            a = advantages[id(t), i]
            before = range(r.start - 1, r.start - 1 + len(r.logp))
            logps = [logits[k].log_softmax(-1)[t.ids[k + 1]] for k in before]
            mean_gap = sum(x - old for x, old in zip(logps, r.logp)) / len(r.logp)
            losses.append([])
            for k, logp, old in zip(before, logps, r.logp):
                ratio = torch.exp(logp - old)
                if name == "gspo":
                    ratio = torch.exp(mean_gap).detach() * torch.exp(logp - logp.detach())
                inside = min(max(ratio, torch.tensor(1 - low)), torch.tensor(1 + high))
                loss = -min(ratio * a, inside * a)
                seen["above"] += bool(a > 0 and ratio > 1 + high)
                seen["below"] += bool(a < 0 and ratio < 1 - low)
                if a < 0 and name != "gspo" and loss > -3 * a:
                    loss = torch.tensor(-3.0 * a, dtype=torch.float64)
                    seen["dual"] += 1
                d = anchor[k].log_softmax(-1)[t.ids[k + 1]] - logp
                p = logits[k].softmax(-1)
                entropy = -sum(p * p.log())
                losses[-1].append(loss + 0.01 * (torch.exp(d) - d - 1) - 0.001 * entropy)
    if name == "gspo":  # a mean over responses
        return sum(sum(x) / len(x) for x in losses) / len(losses), seen
    return sum(sum(x) for x in losses) / sum(len(x) for x in losses), seen


@pytest.mark.parametrize("with_aem", [False, True])
@pytest.mark.parametrize("name", ["grpo", "dapo", "gspo"])
def test_verl_agents_recipe_equals_a_slow_one(name, with_aem, tiny, mixed, monkeypatch):
    monkeypatch.setattr(aem, "LOGITS_AT_ONCE", 6000)  # several chunks of the head
    for r in aem.responses_of(mixed):
        r.invalid = r.reward in (-0.1, 9.9)
    cfg = config(estimator=name, aem=with_aem, recipe="verl_agent")
    reference = clone(tiny, double=True)
    aem.record_logps(reference, mixed, cfg, "logp")
    aem.record_logps(reference, mixed, cfg, "reference")
    credit(mixed, cfg)
    for r in mixed[0].responses:  # far off-policy: for the dual clip
        r.logp = [x - 2 for x in r.logp]
    policy = clone(reference, noise=1e-4 if name == "gspo" else 0.02)
    sums, fast = gradients(policy, mixed, cfg)
    loss, seen = slow_recipe_loss(name, policy, reference, mixed, with_aem)
    loss.backward()
    slow = gradient_of(policy)
    assert sums["loss"] == pytest.approx(loss.item(), abs=1e-6)
    assert (fast - slow).abs().max() <= 1e-6 * max(1, slow.abs().max()) and slow.norm() > 0.01
    assert seen["above"] > 0 and seen["below"] > 0 and (seen["dual"] > 0) == (name != "gspo")


def test_minibatches_in_task_order_are_neighbours():
    trajectories = [invented([1], group=i // 8) for i in range(128)]
    rule = config(recipe="verl_agent").rule
    parts = aem.split_minibatches(trajectories, rule, random.Random(0))
    assert [[t.group for t in part] for part in parts] == [[i] * 8 for i in range(16)]
    rule = config(recipe="verl_agent", minibatches=3).rule
    parts = aem.split_minibatches(trajectories, rule, random.Random(0))
    assert [t for part in parts for t in part] == trajectories and len(parts) == 3
    for rule in (config(minibatches=3).rule, config(minibatches=200).rule):
        parts = aem.split_minibatches(trajectories, rule, random.Random(0))
        assert sorted(id(t) for part in parts for t in part) == sorted(map(id, trajectories))
        assert parts[0] != trajectories[: len(parts[0])]


def test_the_recipe_draws_anew_by_rewards_without_penalties(tiny, monkeypatch):
    drawn = [invented([2, 2], group=i // 4) for i in range(8)]
    for t, penalties in zip(drawn, (0, 1, 2, 0, 0, 0, 0, 0)):
        for r in t.responses[:penalties]:
            r.invalid, r.reward = True, -0.1
        t.reward = sum(r.reward for r in t.responses)
    drawn[4].responses[1].reward = drawn[4].reward = 10.0
    monkeypatch.setattr(aem, "rollout", lambda *args: drawn)
    flags = {"estimator": "dapo", "groups": 2, "group_size": 4, "max_resample": 1}
    kept, _ = aem.sample_batch(tiny, None, config(**flags), 1)
    assert len(kept) == 8  # penalties make a group vary, by themselves
    for t in drawn:
        t.group %= 2
    with pytest.raises(aem.UsageError, match="vary in only 2 of 4 groups.*--warm_steps"):
        aem.sample_batch(tiny, None, config(**flags | {"groups": 3}, recipe="verl_agent"), 1)


def test_flags_go_before_the_recipe():
    assert config(recipe="verl_agent").rule.kl == 0.01 and config().rule.kl == 0
    settled = config(recipe="verl_agent")
    assert (settled.kl_coef, settled.minibatches) == (0.01, 16)  # as config.json has them
    assert config(recipe="verl_agent", kl_coef=0.0).rule.kl == 0
    assert config(recipe="verl_agent", minibatches=4).rule.minibatches == 4
    dapo = config(recipe="verl_agent", estimator="dapo").rule
    assert (dapo.clip_high, dapo.dynamic_sampling, dapo.overlong) == (0.28, True, 0)


def test_metrics_show_the_regime(tiny, played):
    cfg = config(recipe="verl_agent", epochs=2, minibatches=1)
    policy = clone(tiny)
    policy.reference = tiny
    optimizer = torch.optim.SGD(policy.weights, lr=0.1)
    credit(played, cfg)
    metrics = aem.update(policy, optimizer, played, cfg, 1)
    assert metrics["updates"] == 2
    assert metrics["logp_gap"] < 1e-5 < 0.01 < metrics["last_log_ratio"]
    half = metrics["last_clip_fraction"] / 2  # of the first step it is 0
    assert metrics["clip_fraction"] == pytest.approx(half) and half > 0
    sums = aem.batch_metrics(played, played, cfg)
    values = [r.advantage for r in aem.responses_of(played)]
    lost = sum(-x for x in values if x < 0)
    assert sums["negative_mass"] == pytest.approx(lost / sum(map(abs, values)))
    assert 0 < sums["negative_mass"] < 1 and sums["gated_groups"] == 0
    for r in aem.responses_of([t for t in played if t.group == 0]):
        r.entropy = [0.5] * len(r.entropy)
        r.advantage = 0.0
    groups = len({t.group for t in played})
    learners = {t.group for t in played for r in t.responses if r.advantage != 0}
    sums = aem.batch_metrics(played, played, cfg)
    assert sums["gated_groups"] == pytest.approx(1 / groups)
    assert sums["equal_groups"] == pytest.approx(1 - len(learners) / groups) and learners
    for r in aem.responses_of(played):
        r.advantage = 0.0
    assert "negative_mass" not in aem.batch_metrics(played, played, cfg)  # not 0: there is none
    assert aem.update(policy, optimizer, played, cfg, 1) == {"updates": 0, "skipped_updates": 0}


def test_kl_is_k3_to_the_reference(tiny, played):
    cfg = config(kl_coef=0.5)
    reference = clone(tiny, double=True)
    aem.record_logps(reference, played, cfg, "reference")
    for r in played[3].responses:
        r.advantage = 0.0  # nothing to learn here: only the KL pulls
    assert gradients(reference, played, cfg)[0]["kl"] == 0  # at the start there is no distance
    policy = clone(reference, noise=0.02)
    sums, fast = gradients(policy, played, cfg)
    without, base = gradients(policy, played, config())
    loss = summed = 0.0
    for t in played:
        d = dense_logps(reference, t).detach() - dense_logps(policy, t)
        k3 = torch.exp(d) - d - 1
        loss = loss + 0.5 * k3.mean() / len(played)
        summed += k3.sum().item()
    loss.backward()
    pull = gradient_of(policy)
    assert sums["tokens"] == len(old_logps(played))
    assert sums["loss"] - without["loss"] == pytest.approx(loss.item(), abs=1e-6)
    assert sums["kl"] == pytest.approx(summed, rel=1e-6) and summed > 0
    assert torch.allclose(fast - base, pull, atol=1e-8) and pull.norm() > 1e-4


def test_without_a_kl_term_a_collapsed_log_prob_is_no_nan(tiny, played):
    for r in aem.responses_of(played):
        r.logp = [x + 100 for x in r.logp]  # e^100 is more than a float32 holds
    sums, grads = gradients(clone(tiny), played, config())
    assert math.isfinite(sums["loss"]) and sums["kl"] == 0 and grads.isfinite().all()


# ------------------------------------------------------------------------------ 6. training
def frozen(policy):
    return torch.optim.SGD(copy.deepcopy(policy.model).parameters(), lr=0.0)


def test_success_counts_everything_that_was_sampled(tiny, monkeypatch):
    change_row(monkeypatch, "dapo", overlong=0.0)
    cfg = config(estimator="dapo")
    trained, metrics = aem.train_step(tiny, frozen(tiny), lottery(), cfg, 1)
    _, drawn = aem.sample_batch(tiny, lottery(), cfg, 1)
    assert metrics["success"] == sum(t.success for t in drawn) / len(drawn)
    assert metrics["reward"] == pytest.approx(sum(t.reward for t in drawn) / len(drawn))
    assert metrics["groups"] == len(drawn) // 4
    assert metrics["dropped_groups"] == metrics["groups"] - 4 > 0
    assert len(trained) == 16 and sum(t.success for t in trained) == 8


def test_limits_are_seen_and_counted(tiny, monkeypatch):
    cfg = config(estimator="grpo++", max_turns=2)
    environments = [Echo() for _ in range(16)]
    trajectories, metrics = aem.train_step(tiny, frozen(tiny), environments, cfg, 1)
    assert all(t.truncated and t.masked for t in trajectories)
    assert metrics["truncated"] == metrics["masked"] == 16
    assert metrics["updates"] == metrics["overlong"] == 0
    change_row(monkeypatch, "grpo", overlong=0.9)
    _, metrics = aem.train_step(tiny, frozen(tiny), lottery(), config(max_turns=1), 1)
    assert metrics["truncated"] == metrics["masked"] == 0
    assert metrics["updates"] > 0 and metrics["overlong"] > 0


def test_a_step_shows_a_alpha_and_their_product(tiny):
    trajectories, metrics = aem.train_step(tiny, frozen(tiny), lottery(), config(), 0)
    base = aem.assign_credit(trajectories, config()).tolist()
    alphas = aem.modulate(trajectories, config(), 0).tolist()
    responses = aem.responses_of(trajectories)
    assert [r.alpha for r in responses] == alphas and any(base)
    assert [r.advantage for r in responses] == [a * alpha for a, alpha in zip(base, alphas)]
    assert metrics["alpha_max"] == max(alphas) and metrics["alpha_min"] == min(alphas)
    negative = sum(a < 0 for a in base) / len(base)
    assert metrics["negative"] == pytest.approx(negative)
    tokens = [h for r in responses for h in r.entropy]
    assert metrics["response_entropy"] == pytest.approx(sum(tokens) / len(responses))
    assert metrics["token_entropy"] == pytest.approx(fmean(tokens))
    assert metrics["response_tokens"] == len(tokens) / len(responses) and metrics["turns"] == 1
    measured_in_updates = {"updates", "loss", "grad_norm", "clip_fraction", "kl", "logp_gap"}
    assert not measured_in_updates & set(metrics)  # step 0 has none: no zeros that nobody measured


def test_an_evaluation_does_not_depend_on_the_size_of_a_batch(tiny, monkeypatch):
    def evaluated(groups, group_size, tasks=7):
        cfg = config(groups=groups, group_size=group_size, eval_tasks=tasks)
        played, row = aem.evaluate(tiny, [Echo() for _ in range(groups * group_size)], cfg)
        assert row["eval_tasks"] == len(played)
        return [t.ids for t in played]

    first = evaluated(1, 2)
    assert evaluated(2, 2) == evaluated(5, 4) == first and len(first) == 7
    assert evaluated(2, 2, tasks=3) == first[:3]
    monkeypatch.setattr(Echo, "evaluation_tasks", 5, raising=False)  # there are no more: each once
    assert evaluated(1, 2) == evaluated(4, 4) == first[:5]


def test_success_by_kind_of_task(tiny):
    played, row = aem.evaluate(tiny, lottery(), config(eval_tasks=16))
    kinds = {k: [t.success for t in played if t.task_type == k] for k in Echo.words}
    assert row["eval_by_type"] == {k: fmean(v) for k, v in kinds.items()}
    assert len(set(row["eval_by_type"].values())) > 1


def test_a_trajectory_as_text():
    t = invented([2, 1], task_type="two")
    t.responses[0].text = "take mug\nthen go"
    text = aem.readable([t], 3)  # once, though it is the best and the worst
    assert text.count("===") == 1 and text.startswith("=== step 3, two task, failure, reward 0.0")
    assert re.search(r"^  > take mug +H_bar 0.50  alpha 1.00 .*\n    then go$", text, re.M)
    others = [invented([1], group=1, task_type="pick") for _ in range(2)]
    others[0].responses[0].alpha = 2.0  # the largest: of this group
    assert "two task" not in aem.readable([t, t, *others], 3)


def test_the_report_bears_a_kind_of_task_that_was_not_there_before(capsys):
    first = {"eval_success": 0.5, "eval_by_type": {"a": 0.5}, "eval_tasks": 8}
    last = {"eval_success": 0.75, "eval_by_type": {"a": 1.0, "b": 0.5}, "eval_tasks": 8}
    aem.report(Path("runs/x"), [first, {}, last, {}], 1, True)
    assert re.search(r"\nb +nan% +50.0%\n", capsys.readouterr().out)


# ------------------------------------------------------------------------------ 7. the run
def folder_rows(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def check_same_run(a, b):
    """Two runs' folders hold the same, to the last bit: metrics but for seconds, texts, weights."""
    assert without_times(folder_rows(a)) == without_times(folder_rows(b))
    for name in ("trajectories.txt", "checkpoint/model.safetensors"):
        assert (a / name).read_bytes() == (b / name).read_bytes(), name


def echo_model(folder):
    """The warm start of the runs on Echo."""
    flags = {"env": "test_aem:Echo", "cache_dir": f"{folder}/cache", "warm_steps": 30}
    return str(aem.warm_start(Echo(), config(**flags)))


def test_a_tiny_run_learns_and_leaves_everything_behind(runs):
    run, folder = runs
    rows = run(name="first", steps=30)
    assert rows[0]["eval_success"] < 0.7 and rows[-1]["eval_success"] > 0.8
    assert rows[-1]["response_entropy"] < rows[0]["response_entropy"]
    assert [row["step"] for row in rows] == list(range(31))
    assert [row["step"] for row in rows if "eval_success" in row] == [0, 20, 30]
    assert rows == folder_rows(folder / "first")
    wanted = {"step", "success", "reward", "response_entropy", "token_entropy", "alpha_min"}
    wanted |= {"alpha_max", "turns", "response_tokens", "invalid_actions", "rollout_seconds"}
    assert all(isinstance(row[name], (int, float)) for row in rows for name in wanted)
    assert "loss" not in rows[0]  # step 0 has no update: nothing is written that nobody measured
    assert {"loss", "grad_norm", "clip_fraction", "update_seconds"} < set(rows[1])
    assert set(rows[-1]["eval_by_type"]) == set(Echo.words)
    assert json.loads((folder / "first" / "config.json").read_text())["name"] == "first"
    assert (folder / "first" / "curves.png").read_bytes()[:4] == b"\x89PNG"
    text = (folder / "first" / "trajectories.txt").read_text()
    assert all(word in text for word in ("H_bar", "alpha", "advantage", "step 30"))
    again = run(model=str(folder / "first"), steps=0, name="evaluated")
    assert again[0]["eval_success"] == rows[-1]["eval_success"]  # it is the trained policy


WHOLE = {"steps": 7, "save_every": 2, "eval_every": 2, "resume": "auto", "kl_coef": 0.01}
WHOLE |= {"eval_tasks": 16}


@pytest.fixture(scope="session")
def whole(runs):
    """The folder of a run that nothing interrupts."""
    run, folder = runs
    run(name="whole", **WHOLE)
    return folder / "whole"


@pytest.mark.parametrize("killed", [1, 3, 6])  # before the first checkpoint, after one, after two
def test_a_resumed_run_equals_an_uninterrupted_one(runs, whole, monkeypatch, killed):
    run, folder = runs
    train_step = aem.train_step

    def step_or_die(*args):
        if args[-1] == killed:
            raise RuntimeError("killed")  # nothing is saved any more
        return train_step(*args)

    monkeypatch.setattr(aem, "train_step", step_or_die)
    with pytest.raises(RuntimeError):
        run(name=f"killed{killed}", **WHOLE)
    monkeypatch.setattr(aem, "train_step", train_step)
    run(name=f"killed{killed}", **WHOLE)
    check_same_run(whole, folder / f"killed{killed}")
    saved = sorted(p.name for p in (folder / f"killed{killed}" / "checkpoints").iterdir())
    assert saved == ["step-000006.pt", "step-000007.pt"]  # the newest two, no partial one


def test_a_run_is_resumed_with_its_own_settings_only(runs):
    run, folder = runs
    flags = {"name": "own", "groups": 2, "lr": 1e-3, "eval_tasks": 8}
    run(steps=1, date="2001-02-03", **flags)
    with pytest.raises(aem.UsageError, match="--lam, --lr"):
        run(steps=2, resume="auto", **flags | {"lr": 2e-3, "lam": 0.5})
    assert len(run(steps=2, eval_every=1, resume="auto", **flags)) == 3  # these may change
    assert len(run(steps=2, resume="auto", **flags)) == 3  # it had come to its end
    today = time.strftime("%Y-%m-%d")
    assert len(run(name="not there", steps=0, resume="auto")) == 1  # a new run
    file = folder / "own" / "config.json"
    then = json.loads(file.read_text())
    file.write_text(json.dumps({k: v for k, v in then.items() if k != "recipe"}))  # an older one
    assert len(run(steps=3, resume="auto", **flags)) == 4
    file.write_text(json.dumps({k: v for k, v in then.items() if k != "recipe"}))
    with pytest.raises(aem.UsageError, match="another --recipe, --kl_coef, --minibatches"):
        run(steps=3, recipe="verl_agent", resume="auto", **flags)
    files = [folder / name / "config.json" for name in ("own", "not there")]
    dates = [json.loads(file.read_text())["date"] for file in files]
    assert dates[0] == "2001-02-03" and dates[1] in (today, time.strftime("%Y-%m-%d"))
    then = {k: v for k, v in then.items() if k != "date"} | {"wandb": "a project"}
    files[0].write_text(json.dumps(then))  # older still, and by somebody who has that package
    assert len(run(steps=4, resume="auto", **flags)) == 5


def test_a_broken_file_of_a_run_is_named_and_the_rest_goes_on(runs, whole):
    run, folder = runs
    flags = WHOLE | {"name": "damaged"}
    damaged = Path(shutil.copytree(whole, folder / "damaged"))
    own = [damaged / "checkpoints" / name for name in ("step-backup.pt", "best/x", "z-000001.pt")]
    for path in own:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    torch.save({"step": 7}, folder / "half")
    for file in (damaged / "config.json", damaged / "checkpoints" / "step-000007.pt"):
        content = file.read_bytes()
        for damage in (content[:500], b"", b"something else", (folder / "half").read_bytes()):
            file.write_bytes(damage)
            with pytest.raises(aem.UsageError, match=f"{file} (can't be read|is broken)"):
                run(**flags)
        file.unlink()
        if file.name == "config.json":
            with pytest.raises(aem.UsageError, match="config.json can't be read"):
                run(**flags)
            file.write_bytes(content)
    for size in (50, 0):  # from the checkpoint before, then from its own last
        os.truncate(damaged / "metrics.jsonl", size)
        run(**flags)
        check_same_run(whole, damaged)
    assert [path.read_text() for path in own] == ["mine"] * 3


def test_an_environment_may_change_folder(runs, monkeypatch, tmp_path):
    run, folder = runs
    model = echo_model(folder)
    reset = Echo.reset

    def wander(self, *, seed=None):
        os.chdir("/")
        return reset(self, seed=seed)

    monkeypatch.setattr(Echo, "reset", wander)
    monkeypatch.chdir(tmp_path)
    run(out="here", name="x", model=model, steps=1, groups=2, eval_tasks=8)
    files = {"config.json", "metrics.jsonl", "trajectories.txt", "curves.png"}
    assert {f.name for f in (tmp_path / "here" / "x").iterdir()} == {
        *files,
        "checkpoints",
        "checkpoint",
    }


def test_logits_that_are_not_finite_any_more_stop_the_run(runs, monkeypatch):
    run, folder = runs
    update = aem.update

    def spoil(policy, *args):
        metrics = update(policy, *args)
        policy.weights[-1].data.fill_(math.nan)
        return metrics

    monkeypatch.setattr(aem, "update", spoil)
    flags = {"model": echo_model(folder), "steps": 3, "groups": 2, "eval_tasks": 8}
    with pytest.raises(aem.UsageError, match="not finite any more"):
        run(name="spoiled", **flags)
    assert [row["step"] for row in folder_rows(folder / "spoiled")] == [0, 1]
    assert "NaN" not in (folder / "spoiled" / "metrics.jsonl").read_text()
    assert not (folder / "spoiled" / "checkpoint").exists()


def test_a_run_that_stops_keeps_what_was_learned(runs, monkeypatch):
    run, folder = runs
    sample_batch = aem.sample_batch

    def stop(*args):
        if args[-1] == 2:
            raise aem.UsageError("enough")
        return sample_batch(*args)

    monkeypatch.setattr(aem, "sample_batch", stop)
    with pytest.raises(aem.UsageError, match="enough"):
        run(name="stopped", model=echo_model(folder), steps=3, groups=2, eval_tasks=8)
    assert (folder / "stopped" / "checkpoint" / "model.safetensors").exists()


def test_a_picture_that_can_not_be_drawn_costs_no_policy(runs, monkeypatch):
    def fail(*args):
        raise OSError("no space left")

    run, folder = runs
    monkeypatch.setattr(aem, "plot_curves", fail)
    with pytest.raises(OSError):
        run(name="undrawn", model=echo_model(folder), steps=1, groups=2, eval_tasks=8)
    assert (folder / "undrawn" / "checkpoint" / "config.json").exists()


def test_a_run_begins_with_its_starting_policy_and_a_learning_rate(runs, tmp_path, monkeypatch):
    model = echo_model(runs[1])
    cfg = config(model=model, env="test_aem:Echo", out=str(tmp_path), kl_coef=0.1)
    policy = aem.set_up(cfg)[2]
    for ours, start in zip(policy.weights, policy.reference.weights, strict=True):
        assert torch.equal(ours, start) and ours.data_ptr() != start.data_ptr()
    assert cfg.lr == 7e-4
    monkeypatch.setattr(type(policy.model), "num_parameters", lambda self: 10**7)
    cfg.lr = None
    aem.set_up(cfg)
    assert cfg.lr == 1e-6


def test_a_checkpoint_keeps_the_logs_byte_by_byte(tiny, tmp_path):
    for name in aem.LOGS:
        (tmp_path / name).write_bytes(b"said:\r\nnothing\rmore\n\xc3\xa4")
    aem.save_checkpoint(tmp_path, tiny, frozen(tiny), 1)
    for name in aem.LOGS:
        (tmp_path / name).write_text("written later")
    assert aem.load_checkpoint(tmp_path, tiny, frozen(tiny)) == 2
    for name in aem.LOGS:
        assert (tmp_path / name).read_bytes() == b"said:\r\nnothing\rmore\n\xc3\xa4"


def test_a_run_without_a_name_resumes_its_newest(runs):
    run, folder = runs
    flags = {"resume": "auto", "groups": 2, "eval_tasks": 8, "out": str(folder / "mine")}
    run(steps=1, **flags)
    (first,) = (folder / "mine").iterdir()
    run(**flags | {"steps": 1, "resume": ""})
    (second,) = set((folder / "mine").iterdir()) - {first}
    assert len(run(steps=2, **flags)) == 3
    found = [(r / "checkpoints" / "step-000002.pt").exists() for r in (first, second)]
    assert found == [False, True]
    run(steps=1, name="a[1]", **flags)
    assert len(run(steps=2, name="a[1]", **flags)) == 3


def test_a_checkpoint_holds_a_tied_head_once(whole):
    state = torch.load(whole / "checkpoints" / "step-000007.pt")
    assert "lm_head.weight" not in state["weights"]
    assert "model.embed_tokens.weight" in state["weights"]
    numbers = sum(p.numel() for p in state["weights"].values())
    size = (whole / "checkpoints" / "step-000007.pt").stat().st_size
    assert 3 * 4 * numbers < size < 3.5 * 4 * numbers  # weights and AdamW's two moments
    (group,) = state["optimizer"]["param_groups"]
    assert (group["lr"], group["weight_decay"]) == (3e-3, 0)
    assert len(group["params"]) == len(state["weights"])


def arguments(flags):
    return [f"--{name}={value}" for name, value in flags.items()]


MAIN = "import sys, aem; sys.argv = ['aem.py', *sys.argv[1:]]; aem.main()"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_after_its_step(runs, whole, number, monkeypatch, capsys):
    run, folder = runs
    one_step = aem.one_step

    def signalled(*args):
        if args[-1] == 3:
            os.kill(os.getpid(), number)
        return one_step(*args)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(aem, "one_step", signalled)
        run(name=f"signal{number}", **WHOLE)
    assert stop.value.code == 128 + number and "--resume auto" in capsys.readouterr().err
    assert len(folder_rows(folder / f"signal{number}")) == 4  # its step, and no further one
    run(name=f"signal{number}", **WHOLE)
    check_same_run(whole, folder / f"signal{number}")


SLEEPING = """
import signal, time, aem
def step(*args):
    print("ready", flush=True)
    while signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        time.sleep(0.01)
    print("waits", flush=True)
    time.sleep(60)
aem.one_step = step
"""


@pytest.mark.parametrize("second, code", [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)])
def test_a_second_signal_ends_the_run_at_once(runs, second, code):
    _, folder = runs
    flags = run_flags(folder, name=f"twice{second}", model=echo_model(folder))
    process = python(SLEEPING + MAIN, *arguments(flags))
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "waits\n"  # the first one is for after the step
    process.send_signal(second)
    _, errors = process.communicate(timeout=8)
    assert process.returncode == code and "Traceback" not in errors


def test_the_first_crash_is_kept_and_counted(runs, monkeypatch):
    run, folder = runs
    monkeypatch.setattr(Crashing, "step", Echo.step)
    flags = {"model": echo_model(folder), "env": "test_aem:Crashing", "groups": 16}
    rows = run(name="crashes", steps=2, group_size=2, **flags)
    assert sum(row["env_errors"] for row in rows) > 0
    text = (folder / "crashes" / "env_error.txt").read_text()
    assert text.startswith("Traceback") and "no such task" in text


FULL = """
import resource, aem
save = aem.save_checkpoint
def save_or_fail(run, policy, optimizer, step):
    if step == 6:
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, resource.RLIM_INFINITY))
    save(run, policy, optimizer, step)
aem.save_checkpoint = save_or_fail
"""


def test_a_full_disk_ends_the_run_with_a_sentence_and_its_last_checkpoint(runs, whole):
    run, folder = runs
    flags = WHOLE | {"name": "full"}
    process = python(FULL + MAIN, *arguments(run_flags(folder, **flags)))
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2 and "Traceback" not in errors, errors
    assert "aem.py: error: " in errors.splitlines()[-1]
    saved = sorted(p.name for p in (folder / "full" / "checkpoints").glob("*.pt"))
    assert saved == ["step-000002.pt", "step-000004.pt"]
    run(**flags)
    check_same_run(whole, folder / "full")


def test_steps_0_is_pure_evaluation(runs, monkeypatch, capsys):
    run, folder = runs
    monkeypatch.setattr(aem, "train_step", lambda *args: pytest.fail("trained"))
    flags = {"model": echo_model(folder), "steps": 0}
    (row,) = run(name="evaluation", eval_tasks=100, **flags)
    printed = capsys.readouterr().out
    assert "evaluation success " in printed  # of other seeds of the same tasks
    n, p = 100, row["eval_success"]
    found = re.search(r"95 % interval.*?([\d.]+)% to ([\d.]+)% \(100 tasks\)", printed)
    low, high = (float(x) / 100 for x in found.groups())
    for bound in (low, high):  # Wilson's: (p - bound)^2 = 1.96^2 bound (1 - bound) / n
        assert (p - bound) ** 2 == pytest.approx(1.96**2 * bound * (1 - bound) / n, abs=2e-4)
    assert low < p < high
    files = {"config.json", "metrics.jsonl", "trajectories.txt", "curves.png"}
    assert {file.name for file in (folder / "evaluation").iterdir()} <= files
    text = (folder / "evaluation" / "trajectories.txt").read_text()
    assert re.findall(r"=== step 0, \w+ task, (\w+), ", text) == ["success", "failure"]
    monkeypatch.setattr(Echo, "held_out", True, raising=False)
    run(name="held out", eval_tasks=8, **flags)
    assert "held-out success " in capsys.readouterr().out


PARTS = {"epochs": 2, "kl_coef": 0.01, "recompute_old_logps": True}
DISTRIBUTED = {  # groups that no two processes share evenly, responses of all lengths
    "grpo": PARTS,
    "gspo": {"estimator": "gspo"},
    "dapo": {"estimator": "dapo", "max_resample": 50},
    # a single micro-batch: one process has nothing to learn from
    "idle": {"groups": 1, "group_size": 6, "minibatches": 1, "micro_batch_tokens": 10**6},
}
SMALL = {"groups": 5, "group_size": 3, "steps": 2, "eval_every": 2, "eval_tasks": 23}
SMALL |= {"micro_batch_tokens": 150, "lr": 1e-4}
TWO = """
import pathlib, sys, torch, aem, test_aem
torch.set_num_threads(1)
out, cache = sys.argv[1:]
for name, flags in test_aem.DISTRIBUTED.items():
    flags = test_aem.SMALL | flags | {"out": out, "cache_dir": cache, "name": name}
    aem.train(aem.Config(**test_aem.run_flags(out, **flags)))
    assert pathlib.Path(out, name, "curves.png").exists()  # the first process wrote it,
    assert pathlib.Path(out, name, "checkpoint", "tokenizer.json").exists()  # and this after all
torch.distributed.destroy_process_group()
"""


def test_two_processes_equal_one(runs, tmp_path):
    run, folder = runs
    echo_model(folder)
    (tmp_path / "two.py").write_text(TWO)
    start = "from torch.distributed.run import main; main()"
    two = ["--nproc_per_node", "2", tmp_path / "two.py", tmp_path, folder / "cache"]
    process = python(start, *two)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-3000:]
    updates = 0
    for name, flags in DISTRIBUTED.items():
        flags = SMALL | flags
        rows = run(name=f"one process, {name}", **flags)
        weights = []
        for path in (folder / f"one process, {name}", tmp_path / name):
            model = transformers.AutoModelForCausalLM.from_pretrained(path / "checkpoint")
            weights.append(torch.cat([p.flatten() for p in model.parameters()]))
        assert torch.allclose(*weights, atol=1e-5), name
        pairs = zip(without_times(rows), without_times(folder_rows(tmp_path / name)), strict=True)
        for one, other in pairs:
            one |= one.pop("eval_by_type", {})
            other |= other.pop("eval_by_type", {})
            assert one == pytest.approx(other, abs=1e-5), name
            updates += one.get("updates", 0)
    assert updates > 10
    flags = SMALL | DISTRIBUTED["gspo"] | {"steps": 3, "resume": "auto"}
    expected = run(name="one process, gspo", **flags)
    grown = run(name="gspo", **flags | {"out": str(tmp_path)})  # begun by two, ended by one
    entropies = [[row["response_entropy"] for row in rows] for rows in (expected, grown)]
    assert entropies[0] == pytest.approx(entropies[1], abs=1e-5) and len(grown) == 4


def test_adapters_train_alone(runs):
    pytest.importorskip("peft", reason="LoRA needs peft")
    run, folder = runs
    flags = {"model": echo_model(folder), "lora_rank": 4, "resume": "auto", "save_every": 2}
    flags |= {"kl_coef": 0.01, "groups": 4}
    rows = run(name="adapters", steps=4, **flags)
    assert rows[-1]["updates"] == 2 and rows[1]["kl"] < 0.1
    run(name="in two parts", steps=2, **flags)
    again = run(name="in two parts", steps=4, **flags)
    assert without_times(again)[-1] == without_times(rows)[-1]
    state = torch.load(folder / "adapters" / "checkpoints" / "step-000004.pt")
    assert state["weights"] and all("lora_" in name for name in state["weights"])
    adapters = folder / "adapters" / "checkpoint" / "adapter_model.safetensors"
    assert adapters.exists() and not (adapters.parent / "model.safetensors").exists()
    (evaluated,) = run(name="adapted", model=str(folder / "adapters"), steps=0)
    assert evaluated["eval_success"] == rows[-1]["eval_success"]
    with pytest.raises(aem.UsageError, match="its adapters have rank"):
        run(name="other", model=str(folder / "adapters"), lora_rank=8)
    more = run(name="more", model=str(folder / "adapters"), steps=1, lr=None)
    assert more[0]["eval_success"] == rows[-1]["eval_success"] and more[1]["updates"]
    assert json.loads((folder / "more" / "config.json").read_text())["lr"] == 1e-5
    before, after = (
        aem.load_policy(config(dtype="bfloat16"), folder / name).model.state_dict()
        for name in ("adapters", "more")
    )
    for name, saved in safetensors.torch.load_file(adapters).items():
        loaded = before[
            name.removeprefix("base_model.model.").replace(".weight", ".default.weight")
        ]
        assert loaded.dtype == torch.float32 and torch.equal(loaded, saved)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and all("lora_" in name for name in moved)


def test_adapters_are_checked_before_weights_are_rounded(tmp_path, monkeypatch):
    """SmolLM2 in bfloat16, with cache and without: probabilities that differ by 0.08 in sum."""
    pytest.importorskip("peft", reason="LoRA needs peft")
    check = aem.check_model
    checked = []

    def look(policy, cfg):
        checked.extend(p.dtype for p in policy.model.parameters())
        check(policy, cfg)

    monkeypatch.setattr(aem, "check_model", look)
    aem.export(tmp_path, family_policy("qwen2"))
    loaded = aem.load_policy(config(dtype="bfloat16", lora_rank=4), tmp_path)
    assert loaded.head.weight.dtype == torch.bfloat16 and set(checked) == {torch.float32}


def test_environments_of_gem(tiny, monkeypatch):
    pytest.importorskip("gem", reason="needs gem-llm")
    with pytest.raises(ValueError, match="game:Nothing-v0"):
        envs.make("gem:game:Nothing-v0")
    cfg = config(env="gem:game:GuessTheNumber-v0-easy", max_turns=None)
    environments = aem.make_environments(cfg)
    assert cfg.max_turns == environments[0].max_turns and cfg.env_timeout == 60
    trajectories = aem.rollout(tiny, environments, [1, 2], 4, cfg, "gem")
    assert all("boxed" in t.prompt and t.responses and not t.error for t in trajectories)


def test_metrics_are_sent_to_wandb(runs, monkeypatch):
    run, _ = runs
    inits, logged = [], []

    def log(row, step):
        logged.append((row["step"], step))

    stand_in = types.SimpleNamespace(init=lambda **options: inits.append(options), log=log)
    stand_in.__spec__ = "is there"
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    run(name="tracked", steps=1, groups=2, wandb="my project")
    (options,) = inits
    assert options["project"] == "my project" and options["config"]["steps"] == 1
    assert logged == [(0, 0), (1, 1)]


def test_a_step_without_update_is_said(runs, capsys, monkeypatch):
    run, folder = runs
    flags = {"steps": 1, "groups": 1, "group_size": 2, "eval_tasks": 8}
    flags |= {"model": echo_model(folder)}
    short = {"max_response_tokens": 1, "max_turns": 1}  # nobody can end a word: all fail
    policy_loss = aem.policy_loss

    def overflowing(*args):
        loss, sums = policy_loss(*args)
        return loss * math.inf, sums

    assert run(**flags | short)[1]["updates"] == 0
    said = capsys.readouterr().out
    assert "step 1: no update, as no advantage differs from 0" in said
    assert "all advantages are 0 in 100% of the groups" in said and "--warm_steps" in said
    monkeypatch.setattr(aem, "policy_loss", overflowing)
    assert run(**flags | {"groups": 4, "group_size": 4})[1]["updates"] == 0
    said = capsys.readouterr().out
    assert "step 1: no update, as no gradient is finite" in said and "--warm_steps" not in said


def test_a_policy_that_does_not_know_the_format_is_told_of(tmp_path, capsys):
    rows = [{"equal_groups": 0.0, "invalid_share": 0.9, "success": 0.0}, {"eval_success": 0.0}]
    for share, warned in ((0.9, True), (0.89, False)):
        rows[0]["invalid_share"] = share
        (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
        aem.warn_without_signal(tmp_path)
        assert ("90% of the actions are invalid" in capsys.readouterr().out) == warned
    rows[0] = {"equal_groups": 1.0, "invalid_share": 0.0, "success": 1.0}  # it knows it all
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    aem.warn_without_signal(tmp_path)
    assert capsys.readouterr().out == ""


# ------------------------------------------------------------------------------ environments


def test_household_expert_solves_every_task():
    env = envs.make("household")
    kinds = set()
    for seed in range(500):
        kind = env.reset(seed=seed)[1]["task_type"]
        kinds.add(kind)
        turns = env.demonstration(seed)
        assert len(turns) <= 12 and env.success, seed
        puts = sum(action.startswith("put") for _, action in turns)
        assert puts == {"two": 2, "examine": 0}.get(kind, 1)
    assert kinds == set(envs.TASKS)
    noisy = [env.demonstration(seed, 0.5) and env.success for seed in range(200)]
    assert 0.2 < sum(noisy) / 200 < 0.8  # demonstrations that are sometimes right


def episode(seed):
    """A random episode: what `reset` and each `step` return."""
    env = envs.Household()
    rng = random.Random(seed)
    log = [env.reset(seed=seed)]
    while not env.done:
        log.append(env.step(rng.choice([*env.admissible(), "dance"])))
    return log


def test_household_is_deterministic_and_rewards_as_it_says():
    assert all(episode(seed) == episode(seed) for seed in range(50))
    assert len({str(episode(seed)[0]) for seed in range(50)}) > 45
    for seed in range(200):
        *steps, last = episode(seed)[1:]
        for observation, reward, terminated, truncated, info in steps:
            assert reward == -0.1 * info["invalid"] and not terminated and not truncated
            assert (observation == "Nothing happens.") == info["invalid"]
        _, reward, terminated, truncated, info = last
        assert terminated != truncated and terminated == info["success"]
        assert reward == pytest.approx(10 * terminated - 0.1 * info["invalid"])


def test_household_survives_rubbish():
    env = envs.Household()
    rng = random.Random(0)
    words = (
        "go to take put in from clean with use the desklamp fridge '\"` \x00 é 漢 <|end|> {} [0]"
    )
    env.reset(seed=0)
    for i in range(10000):
        text = " ".join(rng.choices(words.split(), k=rng.randint(0, 6)))
        if i % 2:
            text = "".join(map(chr, rng.choices(range(1, 0x2FFF), k=9)))
        observation, reward, terminated, truncated, _ = env.step(text)
        assert isinstance(observation, str) and reward in (0.0, -0.1, 10.0, 9.9)
        if terminated or truncated:
            assert env.step("look")[1] == 0.0  # after the end: still an observation
            env.reset(seed=i)


def test_household_reads_actions_as_a_person_writes_them():
    env = envs.Household()
    env.reset(seed=1)
    place = env.places[0]
    observation, *_, info = env.step(f"  Go to the {place.upper()}. ")
    assert not info["invalid"] and observation == env.step("look")[0]
    assert f"go to {place}" not in env.admissible() and env.step("go to the moon")[4]["invalid"]


def test_the_guided_household_lists_actions_and_reads_the_first_it_finds():
    env, plain = envs.GuidedHousehold(), envs.Household()
    for seed in range(30):
        actions = [action for _, action in envs.Household().demonstration(seed, 0.3)]
        said, twin = env.reset(seed=seed)[0], plain.reset(seed=seed)[0]
        for action in actions:
            assert said == f"{twin}\nAdmissible actions: {', '.join(plain.admissible())}."
            said, *ours = env.step(f"Let me see.\nThe {action.upper()}, and look.\ngo to nowhere")
            twin, *theirs = plain.step(action)
            assert ours == theirs
    env.reset(seed=1)
    here, other = env.places[:2]
    assert env.step(f"I go.\nGo to the {here}, then go to {other}.\nlook")[4]["invalid"] is False
    assert env.here == here
    for rubbish in ("", "I would go to sofa", "go", f"go to {here}s", "Nobody's walking"):
        observation, reward, *_, info = env.step(rubbish)
        assert info["invalid"] and reward == -0.1
        assert (
            observation == f"Nothing happens.\nAdmissible actions: {', '.join(env.admissible())}."
        )
    turns = env.demonstration(3)
    assert env.success and all("Admissible actions: look" in said for said, _ in turns)


def test_a_task_is_solved_only_as_asked():
    env = envs.Household()
    seed = next(s for s in range(1000) if env.reset(seed=s)[1]["task_type"] == "heat")
    *_, (_, put) = env.demonstration(seed)
    _, name, _, target = put.split()
    env.reset(seed=seed)
    source = next(item.place for item in env.items if item.name == name)
    cold = [f"go to {source}", f"take {name} from {source}", f"go to {target}", put]
    heat = ["go to microwave", f"heat {name} with microwave", f"go to {target}"]
    for action in [*cold, f"take {name} from {target}", *heat]:
        info = env.step(action)[4]
        assert not info["invalid"] and not info["success"]  # at first in place, but cold
    assert env.step(put)[1:3] == (10.0, True)


def test_training_and_evaluation_tasks_do_not_overlap():
    env = envs.Household()

    def tasks(seeds):
        found = set()
        for seed in seeds:
            prompt, _ = env.reset(seed=seed)
            found.add((prompt, str(env.items), env.lamp))
        return found

    held_out = tasks(range(envs.HELD_OUT, envs.HELD_OUT + 1000))
    trained = tasks(random.Random(0).sample(range(envs.HELD_OUT), 10000))
    assert len(held_out) > 700 and len(trained) > 4000
    assert not held_out & trained  # not only other seeds: other worlds


def test_a_task_of_the_wrong_side_is_never_handed_out():
    class Fixed(envs.TextEnv):
        def _draw(self):
            return "A task.", "", "A task."

    env = Fixed.__new__(Fixed)
    evaluation = envs.is_held_out("A task.")
    seeds = {False: 0, True: envs.HELD_OUT}
    assert env.reset(seed=seeds[evaluation])[0] == "A task."
    with pytest.raises(LookupError, match="1,000 draws of Fixed gave no task for"):
        env.reset(seed=seeds[not evaluation])


def test_make_names_what_is_wrong(tmp_path, monkeypatch):
    assert isinstance(envs.make(f"{__name__}:Echo"), Echo)
    for name in ("nowhere", "no_such_module:Env", "envs:Nothing"):
        with pytest.raises(ValueError, match=name):
            envs.make(name)
    (tmp_path / "my_world.py").write_text("class World:\n  def __init__(self, x): self.x = 1 / x")
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path)  # not the folder of aem.py
    assert envs.make("my_world:World", x=2).x == 0.5
    with pytest.raises(ValueError, match="(?s)my_world:World.*line 2.*ZeroDivision") as error:
        envs.make("my_world:World", x=0)
    assert isinstance(error.value.__cause__, ZeroDivisionError)
    (tmp_path / "bare.py").write_text("class World:\n  def __init__(self): open('no.jsonl')")
    with pytest.raises(ValueError, match="^cannot make environment 'bare:World': .*no.jsonl'$"):
        envs.make("bare:World")


class Scripted:
    """An environment of GEM that returns what it is told to."""

    def __init__(self, result, **limits):
        self.result = result
        vars(self).update(limits)

    def reset(self, seed=None):
        return f"Question {seed}.", {}

    def step(self, action):
        return "The end.", *self.result


@pytest.mark.parametrize(
    ("result", "limits", "ends", "success"),
    [  # what gem-llm 0.1.0 returns after the observation, and what is made of it
        ((1.0, True, True, {"correct": True}), {}, [True, False], True),  # mathematics: one turn
        ((0, True, True, {"correct": False}), {}, [True, False], False),
        ((1.0, True, True, {}), {}, [True, False], True),  # code, reasoning-gym: one turn
        ((0.5, True, True, {}), {}, [True, False], False),
        ((1.0, True, False, {"suffix": ""}), {"max_turns": 4}, [True, False], True),  # won
        ((1.0, True, True, {"suffix": ""}), {"max_turns": 4}, [True, False], True),
        ((0.9, True, True, {"suffix": ""}), {"max_turns": 4}, [False, True], False),  # out of turns
        ((-0.1, True, False, {"suffix": ""}), {"max_turns": 4}, [True, False], False),  # lost
        ((0.0, False, False, {"suffix": ""}), {"max_turns": 4}, [False, False], False),
    ],
)
def test_what_gem_leaves_unsaid(result, limits, ends, success, monkeypatch):
    gem = types.SimpleNamespace(make=lambda name, **options: Scripted(result, **options))
    monkeypatch.setitem(sys.modules, "gem", gem)
    env = envs.make("gem:game:Some-v0", **limits)
    assert env.reset(seed=3) == ("Question 3.", {})
    observation, reward, *seen, info = env.step("\\boxed{7}")
    assert (observation, reward) == ("The end.", result[0])
    assert seen == ends and info == {**result[3], "success": success}
    assert getattr(env, "max_turns", None) == limits.get("max_turns")
    assert not getattr(env, "held_out", False)


def test_a_missing_package_is_named(monkeypatch):
    def make(name):
        raise ImportError("Could not import gem.envs.math_env. Error: No module named 'pandas'")

    monkeypatch.setitem(sys.modules, "gem", types.SimpleNamespace(make=make))
    with pytest.raises(ValueError, match="No module named 'pandas'") as error:
        envs.make("gem:math:Some")
    assert "gem-llm" not in str(error.value)


# ------------------------------------------------------------------------------ the sandbox
contained = sys.platform == "linux" and envs.ctypes.CDLL(None).syscall(444, None, 0, 1) > 0
needs_sandbox = pytest.mark.skipif(not contained, reason="this kernel has no Landlock")


@pytest.fixture(scope="module")
def sandbox():
    sandbox = envs.Sandbox(cpu_seconds=1)
    yield sandbox
    sandbox.close()


def equal(a, b):
    """What `grade` does to an expected value and a reply that went through JSON."""
    return envs.same(envs.encode(a), json.loads(json.dumps(envs.encode(b))))


class Liar(int):
    def __eq__(self, other):
        return True

    __hash__ = None


class Mapping(dict):
    def __eq__(self, other):
        return True

    __hash__ = None


ALIKE = """1, 1; 1, 1.0; 0.1 + 0.2, 0.3; 10**400, 10**400; inf, inf; "é", "é"; b"a", b"a"; {}, {}
2j, 2j; [1, (2.0, None)], [1, (2, None)]; {1, 2}, {2, 1}
{"a": [1], 2: ()}, {2: (), "a": [1]}; [1.0], [1]
{"a": 1}, Counter("a"); {"a": 1}, OrderedDict(a=1); {}, defaultdict(int); {1}, frozenset({1})
0.3 + 1j, 0.1 + 0.2 + 1j; 1e16, 10**16; 2000001, 2000001.0; 2e6, 2000001"""
DIFFERENT = """1, True; 0, False; 1, "1"; [1], (1,); [1], [1, 1]; {1}, [1]; None, 0; nan, nan
"", None; 10**400, 1.0; 1.0, 10**400; 1.0, 1.001; 10**400, 10**400 + 1; b"a", b"b"; "a", "b"; {}, []
{}, [()]; {"a": 1}, {"a": 2}; {"a": 1}, {"b": 1}; {1: "a"}, {"1": "a"}; ["tuple", 1], (1,)
2j, [0.0, 2.0]; 4, Liar(4); Liar(4), 4; {}, Mapping(); 0.3 + 1j, 0.4 + 1j; 2000001, 2000002.0
[3000000], [3000001.0]"""


@pytest.mark.parametrize(("pairs", "alike"), [(ALIKE, True), (DIFFERENT, False)])
def test_replies_are_compared_strictly(pairs, alike):
    names = vars(collections) | globals() | {"inf": float("inf"), "nan": float("nan")}
    for pair in pairs.replace("\n", "; ").split("; "):  # an expected value, a reply
        assert equal(*eval(pair, names)) == alike, pair


@needs_sandbox
def test_the_sandbox_answers_and_judges(sandbox):
    code = """print('noise')
def f(x, y=0):
  if x < 0: raise ValueError('<|end|> \u202e no')
  return (x, [y, 'é'])"""
    replies = sandbox.run(code, "f", [[1], [2, 3], [-1], [4]])
    shown = [reply.get("shown") for reply in replies]
    assert shown == ["(1, [0, 'é'])", "(2, [3, 'é'])", None, "(4, [0, 'é'])"]
    assert replies[2]["error"].startswith("ValueError") and sandbox.run(code, "f", []) == []
    verdict = sandbox.grade(code, "f", [([1], (1, [0, "é"])), ([2], [2, [0, "é"]]), ([-1], 0)])
    feedback = r"f(2) returned (2, [0, '\xe9']), expected [2, [0, '\xe9']]"
    assert verdict == ([True, False, False], "failed", feedback)
    raised = sandbox.grade(code, "f", [([-1], 0)])  # no special token, nothing that isn't printed
    feedback = r"f(-1) failed (ValueError: |end| \u202e no), expected 0"
    assert raised == ([False], "error", feedback)
    hidden = envs.describe("f('<|a|>')", {"shown": "'<<||im_end||>>'"}, "\n<\u00e9|b|>")
    assert "<|" not in hidden and "|>" not in hidden and "\n" not in hidden
    wrong = {
        "def f(x) return x": "SyntaxError",
        "def g(x): 0": "'f' is not defined",
        "f = 3": "callable",
    }
    for program, words in wrong.items():
        assert words in sandbox.grade(program, "f", [([1], 1)]).feedback
    with pytest.raises(ValueError, match="no tests"):
        sandbox.grade(code, "f", [])
    with pytest.raises(ValueError, match="unmarshallable"):  # the caller's mistake: it lives on
        sandbox.run(code, "f", [[object()]])
    assert sandbox.run(code, "f", [[1]])[0]["shown"] == "(1, [0, 'é'])"


@needs_sandbox
def test_all_workers_judge_a_program_alike(sandbox):
    program = "def f(text): return hash(text)"
    other = envs.Sandbox(workers=1, hash_seed=1)
    first, again, different = [
        box.run(program, "f", [["text"]])[0]["shown"] for box in (sandbox, sandbox, other)
    ]
    other.close()
    assert first == again != different


@needs_sandbox
def test_a_program_is_a_module(sandbox):
    program = """from __future__ import annotations
import dataclasses, sys
@dataclasses.dataclass
class Point:
  x: int
  y: int = 0
def f(x): return Point(x).x if sys.modules[__name__].f is f else None"""
    assert sandbox.grade(program, "f", [([1], 1)]).passed == [True]


@needs_sandbox
@pytest.mark.parametrize(
    ("status", "program"),
    [
        ("passed", "import time\nwhile time.process_time() < 0.5: pass\ndef f(x): return x"),
        ("timeout", "def f(x):\n  while True: pass"),
        ("crashed", "import os\ndef f(x): os._exit(3)"),
        ("flood", "def f(x): return 'x' * 2**21"),
        ("error", "def f(x): return bytearray(2**30)"),
    ],
)
def test_the_sandbox_says_how_a_program_ended(status, program, sandbox):
    assert sandbox.grade(program, "f", [([1], 1)]).status == status


@needs_sandbox
def test_tests_before_a_timeout_count(sandbox):
    program = "def f(x):\n  while x > 1: pass\n  return x"
    verdict = sandbox.grade(program, "f", [([1], 1), ([2], 2), ([1], 1)])
    assert verdict == ([True, False, False], "timeout", "f(2) failed (timeout), expected 2")


@needs_sandbox
def test_many_threads_get_their_own_verdicts_and_leave_nothing(sandbox):
    def trace():
        thread = f"/proc/{os.getpid()}/task/{threading.get_native_id()}"
        return len(os.listdir("/proc/self/fd")), Path(thread, "children").read_text()

    def one(i):
        wrong = i % 3 == 0
        program = f"def f(x): return x * {i} + {int(wrong)}"
        return (
            sandbox.grade(program, "f", [([k], k * i) for k in range(4)]).passed == [not wrong] * 4
        )

    before = trace()
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(one, range(400)))
    assert trace() == before


@needs_sandbox
def test_a_sandbox_that_breaks_is_no_verdict():
    sandbox = envs.Sandbox(workers=1)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(sandbox.grade, "import time\ntime.sleep(9)", "f", [([1], 1)])
        time.sleep(0.3)
        tasks = Path(f"/proc/{os.getpid()}/task").glob("*/children")
        os.kill(int(next(tasks).read_text().split()[-1]), 9)
        assert isinstance(running.exception(), envs.SandboxError)
    with pytest.raises(envs.SandboxError, match="died"):
        sandbox.run("", "f", [[1]])
    sandbox.close()


@needs_sandbox
def test_an_interrupted_answer_is_never_taken_for_the_next_one(monkeypatch):
    def interrupted(text):
        raise KeyboardInterrupt

    sandbox = envs.Sandbox(workers=1)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(envs.json, "loads", interrupted)
        sandbox.run("def f(x): return 1", "f", [[1]])
    with pytest.raises(envs.SandboxError):
        sandbox.run("def f(x): return 2", "f", [[1]])
    sandbox.close()


WITHOUT = """
import ctypes, platform, struct, sys
libc = ctypes.CDLL(None)
prctl = {"x86_64": 157, "aarch64": 167}[platform.machine()]
load, allow = (32, 0, 0, 0), (6, 0, 0, 0x7FFF0000)
if sys.argv[1] == "Landlock":  # an old kernel: ENOSYS
    code = [load, (53, 0, 2, 444), (37, 1, 0, 446), (6, 0, 0, 0x50026), allow]
else:  # a kernel without seccomp filters: EINVAL
    code = [load, (21, 0, 3, prctl), (32, 0, 0, 16), (21, 0, 1, 22), (6, 0, 0, 0x50016), allow]
data = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in code))
libc.prctl(38, 1, 0, 0, 0)
assert libc.prctl(22, 2, (ctypes.c_uint64 * 2)(len(code), ctypes.addressof(data)), 0, 0) == 0
sys.path.insert(0, sys.argv[2])
import envs
print(len(envs.make("household").demonstration(1)) > 1)
try:
    envs.make("code")
except envs.SandboxError as error:
    print(error)
"""


@needs_sandbox
@pytest.mark.parametrize("layer", ["Landlock", "seccomp"])
def test_where_a_layer_is_missing_coding_is_refused_and_household_works(layer):
    command = [sys.executable, "-c", WITHOUT, layer, str(HERE)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    why = f"programs can't be contained here, missing or forbidden: ['{layer}']"
    assert done.stdout.splitlines() == ["True", why] and not done.stderr


def test_other_platforms_are_refused(monkeypatch):
    monkeypatch.setattr(envs.sys, "platform", "darwin")
    with pytest.raises(envs.SandboxError, match="Linux"):
        envs.Sandbox()
    assert envs.make("household").reset(seed=1)


@needs_sandbox
@pytest.mark.parametrize("user", [[], ["--user"]])
def test_hostile_programs_are_contained(user):
    command = [sys.executable, HERE / "experiments" / "hostile.py", *user]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r", 0 not contained", done.stdout) or (user and "skipped" in done.stdout)


TASK = {
    "prompt": "Write middle(items): the middle item, or the mean of the two.",
    "entry_point": "middle",
    "tests": [
        "assert middle([3, 1, 2]) == 2",
        "assert middle([4, 1, 2, 3]) == 2.5",
        "assert middle([1]) == 1",
        "assert middle([5, 1]) == 3",
        "assert middle([9, 8, 7]) == 8",
        "assert middle([0, 0]) == 0.0",
    ],
}


@pytest.fixture
def code(tmp_path):
    """A coding environment with the tasks of some rows."""

    def make(*rows):
        path = tmp_path / f"tasks{len(list(tmp_path.iterdir()))}.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)))
        return envs.Code(dataset=str(path))

    return make


@needs_sandbox
def test_a_conversation_in_which_the_agent_mends_its_program(code):
    env = code(TASK)
    env.max_turns = 4
    prompt, _ = env.reset(seed=0)
    assert prompt == TASK["prompt"] + "\nA test: middle([3, 1, 2]) == 2"
    assert len(env.public) == 2 and len(env.hidden) == 4
    draft = "In the middle.\n```python\nx = 'not this one'\n```\nRather:\n```python\n{}\n```\nDone."
    nothing = env.step("Thought: I have to think about middle first.")
    assert nothing[1:] == (-0.1, False, False, {"success": False, "invalid": True})
    program = "def middle(items): return items[len(items) // 2]"
    observation, reward, terminated, _, info = env.step(draft.format(program))
    assert observation == "middle([3, 1, 2]) returned 1, expected 2"
    assert reward == 0 and not terminated and not info["invalid"]
    program = "def middle(items): return sorted(items)[len(items) // 2]"
    assert env.step(draft.format(program))[0] == "middle([4, 1, 2, 3]) returned 3, expected 2.5"
    good = "import statistics\ndef middle(items):\n  return statistics.median(items)"
    cut_off = draft.format(good)[: -len("\n```\nDone.")]  # at the token limit, in its block
    observation, *end, info = env.step(cut_off)
    assert (observation, end) == ("The tests pass.", [10.0, True, False]) and info["success"]
    assert env.step(good)[1:4] == (0.0, True, False)  # it is over, as it ended


@needs_sandbox
def test_the_hidden_tests_decide_and_are_never_shown(code):
    env = code(TASK)
    env.reset(seed=0)
    public_only = "def middle(items): return 2.5 if len(items) == 4 else 2"
    observation, reward, terminated, _, info = env.step(public_only)
    assert (observation, reward, terminated) == ("The tests pass.", 0.0, True)
    assert not info["success"]
    env.reset(seed=0)
    shown = "".join(env.step(f"def middle(items): return {i}")[0] for i in range(3))
    assert env.done and "[9, 8, 7]" not in shown and "[5, 1]" not in shown


ADD = {
    "prompt": "Write add(a, b).",
    "entry_point": "add",
    "tests": ["assert add(1, 2) == 3", "assert add(0, 0) == 0", "assert add(-1, 5) == 4"],
}
PROGRAM = "```python\ndef add(a, b):\n    return a + b\n```\n"
FENCE = 'def add(a, b):\n    """Add.\n\n    ```\n    add(1, 2)\n    ```\n    """\n    return a + b'


@needs_sandbox
@pytest.mark.parametrize(
    "response",
    [
        f"```python\ndef add(a, b):\n    return a - b\n```\nNo:\n{PROGRAM}",
        f"{PROGRAM}Output:\n```\n3\n```",
        f"{PROGRAM}Usage:\n```python\nprint(add(1, 2) == 3)\nresult = add(1, 2)\n```",
        f"{PROGRAM}Run it:\n```bash\npython add.py  # add = 1\n```",
        f"{PROGRAM}Tests:\n```python\nassert add(1, 2) == 3\n```",
        f"{PROGRAM}In Ruby:\n```ruby\ndef add(a, b)\n  a + b\nend\n```",
        f"```python\n{FENCE}\n```",
        FENCE,
        "1. Add them:\n   ```py\n   def add(a, b):\n       return a + b\n   ```\n2. Done.",
        "```\nadd = lambda a, b: a + b\n```",
        "```Python\nfrom operator import add as add\n```",
        "```python\ndef add(a, b):\n    return a + b",
    ],
)
def test_the_program_in_a_response(response, code):
    env = code(ADD)
    env.reset(seed=0)
    assert env.step(response)[:2] == ("The tests pass.", 10.0)


@needs_sandbox
@pytest.mark.parametrize("response", ["```python\nprint(add(1, 2) == 3)\n```", "Now I add.", ""])
def test_a_response_without_a_program_is_invalid(response, code):
    env = code(ADD)
    env.reset(seed=0)
    assert env.step(response)[:2] == ("There is no program that defines add.", -0.1)


@pytest.mark.parametrize(
    "piece", ["f ", "f = = ", "```", "```f", "```\n", "   ", "def ", "f(", "#\n"]
)
def test_no_response_takes_long_to_read(piece):
    start = time.monotonic()
    envs.program_in(piece * 20000, "f")
    envs.program_in("```" + piece * 20000, "f")
    assert time.monotonic() - start < 2


@needs_sandbox
@pytest.mark.parametrize("first", ["", "from __future__ import annotations\n"])
def test_a_program_may_use_what_its_prompt_provides(first, code):
    row = {
        "prompt": "import math\nfrom typing import List\n\ndef half(x):\n    return x / 2\n\n"
        "import not_here\n\ndef halves(xs: List[int]) -> List[float]:\n    'Halve each.'\n",
        "entry_point": "halves",
        "tests": ["assert halves([1]) == [0.5]", "assert halves([]) == []"],
    }
    env = code(row)
    env.reset(seed=0)
    program = "def halves(xs: List[int]): return [math.fsum([half(x)]) for x in xs]"
    assert env.step(first + program)[1] == 10.0


def test_a_prompt_in_words_provides_nothing():
    for prompt in ("Write def f(x), please.", "Write f.", "def f(x): 0", "Say\ndef f(x): 0"):
        assert envs.preamble_of(prompt, "f") == ""


def test_a_prompt_is_the_same_in_all_processes():
    row = {"prompt": "x", "entry_point": "f", "tests": ["assert f('a') == {'a', 'b', 'c', 'd'}"]}
    program = f"import envs; print(envs.coding_task({row}))"
    found = set()
    for seed in "012":
        command = [sys.executable, "-c", program]
        environment = os.environ | {"PYTHONHASHSEED": seed}
        output = subprocess.check_output(command, text=True, cwd=HERE, env=environment)
        found.add(output.split("[")[0])
    (prompt,) = found
    assert "A test: f('a') == {'a', 'b', 'c', 'd'}" in prompt


@needs_sandbox
def test_embedded_coding_tasks():
    env = envs.make("code")
    lengths = []
    for seed in range(300):
        ((observation, program),) = env.demonstration(seed)  # the first attempt is right
        assert observation == env.reset(seed=seed)[0] == env.reset(seed=seed)[0]
        tries = env.demonstration(seed, 0.5)
        lengths.append(len(tries))
        if seed < 20:
            assert env.step(program)[1:3] == (10.0, True)
            env.reset(seed=seed)
            said = [env.step(attempt)[0] for _, attempt in tries]
            assert said[:-1] == [observation for observation, _ in tries[1:]]
    assert 20 < lengths.count(1) < 200 and lengths.count(2) > 10


@needs_sandbox
def test_embedded_tasks_of_training_and_evaluation_do_not_overlap():
    env = envs.make("code")
    trained = {env.reset(seed=seed)[0] for seed in range(3000)}
    held_out = {env.reset(seed=envs.HELD_OUT + seed)[0] for seed in range(3000)}
    assert len(trained) > 1000 and len(held_out) > 200 and not trained & held_out


@needs_sandbox
def test_code_survives_rubbish():
    env = envs.make("code")
    rng = random.Random(0)
    words = (
        "def f(x): return x + 3 ``` ```python\n \n ( ) \x00 é 漢 \ud800 <|end|> f = lambda import"
    )
    for i in range(200):
        env.reset(seed=i)
        response = " ".join(rng.choices(words.split(" "), k=rng.randint(0, 12)))
        observation, reward, *_ = env.step(response)
        assert observation.isprintable() and len(observation) < 2100
        assert reward in (0.0, -0.1, 10.0)


HUMANEVAL = {
    "task_id": "HumanEval/0",
    "prompt": 'def double(x: int) -> int:\n    """ Twice x. """\n',
    "canonical_solution": "...",
    "test": "METADATA = {}\n\ndef check(candidate):\n    assert candidate(1) == 2, 'message'\n"
    "    assert candidate(-3) == -6\n    assert abs(candidate(2) - 4) < 1e-6\n    assert True\n",
    "entry_point": "double",
}
MBPP = {
    "task_id": 601,
    "text": "Write a function to sort a list of tuples.",
    "code": "...",
    "test_setup_code": "",
    "test_list": [
        "assert order([('b', 1), ('a', 2)]) == [('a', 2), ('b', 1)]",
        "assert order([]) == []",
        "assert len(order([])) == 0",
    ],
    "challenge_test_list": [],
}


@pytest.mark.parametrize(
    ("row", "task", "left_out"),
    [
        (HUMANEVAL, ("double", [([1], 2), ([-3], -6)]), "2 tests of another form"),
        (
            MBPP,
            ("order", [([[("b", 1), ("a", 2)]], [("a", 2), ("b", 1)]), ([[]], [])]),
            "1 tests of another form",
        ),
    ],
)
def test_data_sets_become_inputs_and_expected_values(row, task, left_out, tmp_path, capsys):
    (tmp_path / "test.jsonl").write_text(json.dumps(row) + "\n")  # a folder, as a download has it
    ((prompt, entry, tests),) = envs.load_tasks(str(tmp_path))
    tests = [tuple(test) for test in tests]
    assert prompt.startswith(row.get("text") or "def double") and (entry, tests) == task
    said = capsys.readouterr().out
    assert "1 of 1 tasks" in said and left_out in said


@pytest.mark.parametrize(
    ("test", "value"),
    [("f(1)", True), ("not f(1)", False), ("f(1) is True", True), ("f(1) is None", None)],
)
def test_forms_of_asserts(test, value):
    (_, _, tests), left_out = envs.coding_task(
        {"text": "x", "test_list": [f"assert {test}, 'why'"]}
    )
    assert tests == [([1], value)] and tests[0][1] is value and left_out == 0


def test_other_forms_of_asserts_are_left_out():
    others = "f(1) > 0; f(x); f(x=1); f(1) != 2; True; m.f(1) == 2; not f; f(1) in [2]; f(1) == y"
    asserts = [f"assert {other}" for other in others.split("; ")]
    task, left_out = envs.coding_task({"prompt": "x", "entry_point": "f", "tests": asserts})
    assert task == ("x", "f", []) and left_out == len(asserts)


@pytest.mark.parametrize(
    "form", ["{0}\n\n{1}\n   \n", "[{0}, {1}]", "[\n{0},\n{1}\n]\n", "{0}\r\n{1}"]
)
def test_forms_of_files(form, tmp_path, monkeypatch):
    path = tmp_path / "tasks.json"
    prompts = ["Überschuß\u2028 1", "Überschuß\u2028 2"]
    rows = [json.dumps(ADD | {"prompt": prompt}, ensure_ascii=False) for prompt in prompts]
    path.write_bytes(form.format(*rows).encode())
    monkeypatch.setenv("HOME", str(tmp_path))
    found = [prompt.partition("\n")[0] for prompt, *_ in envs.load_tasks("~/tasks.json")]
    assert found == prompts
    say = "import envs, sys; print([ord(task[0][0]) for task in envs.load_tasks(sys.argv[1])])"
    old = os.environ | {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}
    command = [sys.executable, "-c", say, str(path)]
    done = subprocess.run(command, cwd=HERE, env=old, capture_output=True, text=True, check=True)
    assert done.stdout.endswith(f"{[ord('Ü')] * 2}\n")


def test_tests_that_repeat_each_other_count_once(tmp_path):
    path = tmp_path / "tasks.jsonl"
    same = ADD | {"tests": ADD["tests"][:1] * 3}
    twice = ADD | {"tests": ADD["tests"][:2] * 2}
    path.write_text(json.dumps(same) + "\n" + json.dumps(twice))
    assert [tests for *_, tests in envs.load_tasks(str(path))] == [[([1, 2], 3), ([0, 0], 0)]]


@needs_sandbox
@pytest.mark.parametrize(("count", "held_out"), [(2, False), (40, True)])
def test_evaluation_tasks_come_once_each(count, held_out, code, capsys):
    rows = [ADD | {"prompt": f"Task {i}: write add(a, b)."} for i in range(count)]
    env = code(*rows, *rows)  # each row twice
    said = capsys.readouterr().out
    trained = {env.reset(seed=seed)[0] for seed in range(300)}
    number = env.evaluation_tasks
    evaluated = [env.reset(seed=envs.HELD_OUT + i)[0] for i in range(number)]
    assert len(set(evaluated)) == number and env.held_out == held_out
    assert env.reset(seed=envs.HELD_OUT + number)[0] == evaluated[0]
    assert len(trained | set(evaluated)) == count
    assert trained.isdisjoint(evaluated) == held_out
    assert ("evaluation is on tasks that are trained on" in said) != held_out
    assert (envs.Code.held_out, envs.Code.evaluation_tasks) == (True, None)  # the embedded family


def test_a_data_set_is_parsed_and_never_run(tmp_path):
    act = f"assert middle(open({str(tmp_path / 'run')!r}, 'w')) == 1"
    evil = TASK | {"tests": [*TASK["tests"], act, "import os\nos.abort()"]}
    path = tmp_path / "own.jsonl"
    path.write_text(json.dumps(TASK) + "\n" + json.dumps(evil) + "\n")
    assert [len(tests) for _, _, tests in envs.load_tasks(str(path))] == [6, 6]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (json.dumps(TASK) + '\n{"prompt": "half', "row 2: Unterminated string"),
        ('{"prompt": 3, "tests": ["assert f(1) == 1"]}', 'row 1: it needs a text "prompt"'),
        (
            json.dumps(TASK) + "\n" + json.dumps(TASK | {"tests": "assert"}),
            "row 2: it needs a text",
        ),
        (json.dumps(TASK | {"tests": [3]}), "row 1: it needs a text"),
        (json.dumps(TASK | {"tests": ["assert middle(1 == 2"]}), "row 1: '(' was never closed"),
        (json.dumps(TASK | {"entry_point": 3}), "row 1: it needs a text"),
        (json.dumps(TASK | {"entry_point": "Middle().of"}), "row 1: it needs a text"),
        (json.dumps(TASK | {"entry_point": "middle("}), "row 1: it needs a text"),
        ("[1, 2]", "row 1: "),
        (json.dumps(TASK | {"tests": TASK["tests"][:1]}), "0 of 1 tasks"),
        ("", "0 of 0 tasks"),
        (None, "No such file"),
    ],
)
def test_a_malformed_data_set_is_one_sentence(text, words, tmp_path):
    path = tmp_path / "tasks.jsonl"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError) as error:
        envs.load_tasks(str(path))
    sentence = str(error.value)
    assert sentence.startswith(f"cannot use --dataset {path}") and words in sentence
    assert "\n" not in sentence


@needs_sandbox
def test_code_trains_in_threads_as_without(tmp_path, monkeypatch):
    def train():
        sizes = {"groups": 2, "group_size": 8, "steps": 2, "warm_steps": 40, "eval_tasks": 8}
        folders = {"out": str(tmp_path), "cache_dir": str(tmp_path / "cache")}
        cfg = aem.Config(env="code", device="cpu", **sizes, **folders)
        return without_times(aem.train(cfg)), cfg

    rows, cfg = train()
    assert rows[0]["env_errors"] == 0 and rows[0]["turns"] > 1
    assert (cfg.max_turns, cfg.max_response_tokens) == (3, 24)
    monkeypatch.setattr(envs.Code, "parallel", False)
    assert train()[0] == rows


@pytest.mark.parametrize("parallel", [True, False])
def test_a_sandbox_that_breaks_stops_the_run(parallel, tmp_path, monkeypatch, capsys):
    def step(self, text):
        raise envs.SandboxError("its server has died")

    monkeypatch.setattr(Echo, "step", step)
    monkeypatch.setattr(Echo, "parallel", parallel, raising=False)
    folders = ["--out", str(tmp_path), "--cache_dir", str(tmp_path / "cache")]
    flags = ["--env", f"{__name__}:Echo", "--warm_steps", "0", "--device", "cpu", *folders]
    assert run_main(monkeypatch, *flags) == 2
    assert capsys.readouterr().err.strip().endswith("aem.py: error: its server has died")


# ------------------------------------------------------------------------------ the command line
def run_main(monkeypatch, *flags):
    """The exit code of `python aem.py` with these flags."""
    monkeypatch.setattr(sys, "argv", ["aem.py", *flags])
    with pytest.raises(SystemExit) as stop:
        aem.main()
    return stop.value.code


def test_the_readmes_environment_and_flags_are_real(tiny):
    text = (HERE / "README.md").read_text()
    ours = re.sub(r"(pip install|python experiments/\w+\.py) --\S+", "", text)
    flags = {*re.findall(r"(?<![\w-])--(\w+)", ours)} - {"help", "nproc_per_node"}
    assert flags <= {f.name for f in dataclasses.fields(aem.Config)}
    (source,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names = {}
    exec(source, names)
    (t,) = play(tiny, names["MyEnv"], [3], 1, config(max_turns=2))
    assert t.prompt == "Guess a digit." and t.task_type == "digits" and not t.error


def test_every_field_is_a_flag_with_help(monkeypatch, capsys):
    assert run_main(monkeypatch, "--help") == 0
    text = capsys.readouterr().out
    for f in dataclasses.fields(aem.Config):
        assert f"--{f.name}" in text and f.metadata["help"]


def test_gpu_out_of_memory_names_the_flags_that_help(monkeypatch, capsys):
    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    monkeypatch.setattr(aem, "train", full)
    assert run_main(monkeypatch) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert all(word in error for word in ("--micro_batch_tokens", "--lora_rank", "2 GiB"))
    monkeypatch.setattr(aem.transformers.AutoTokenizer, "from_pretrained", full)
    with pytest.raises(torch.OutOfMemoryError):  # while the model is loaded, too
        aem.load_policy(config(), "some/model")


@pytest.fixture(scope="session")
def models(tiny, tmp_path_factory):
    """Folders with a model: as it should be, without a chat template, without weights."""
    folder = tmp_path_factory.mktemp("models")
    for name in ("whole", "bare", "empty"):
        tiny.model.save_pretrained(folder / name)
        tiny.tokenizer.save_pretrained(folder / name)
    (folder / "bare" / "chat_template.jinja").unlink()
    (folder / "empty" / "model.safetensors").unlink()
    return folder


ROWS = '{"prompt": "f", "entry_point": "f", "tests": ["assert f(1) == 1"]}\n{"prompt": 7}\n'
TO_RESUME = {"env": "household", "lr": 0.5, "groups": 16, "group_size": 8}
TO_RESUME |= {"max_turns": 12, "max_response_tokens": 16}
BAD = [  # flags, and what the message must hold; words in capitals stand for folders and files
    ("--colour red", "--colour"),
    ("--step 3", "--step"),
    ("--env nowhere", "nowhere"),
    ("--env no_such_module:Env", "no_such_module"),
    ("--estimator magic", "magic"),
    ("--group_size 1", "--group_size must be at least 2"),
    ("--groups 0", "--groups must be at least 1"),
    ("--epochs 0", "--epochs must be at least 1"),
    ("--lam -1", "--lam must be at least 0"),
    ("--steps -5", "--steps must be at least 0"),
    ("--aem_direction up", "--aem_direction"),
    ("--aem_scope world", "--aem_scope"),
    ("--kl_coef -1", "--kl_coef must be at least 0 and finite"),
    ("--lam nan", "--lam must be at least 0 and finite"),
    ("--lr inf", "--lr"),
    ("--steps many", "--steps"),
    ("--max_turns 0", "--max_turns"),
    ("--temperature 0", "--temperature"),
    ("--aem perhaps", "Truthy"),
    ("--device abacus --model WHOLE", "abacus"),
    ("--model ./no/such/folder", "--model ./no/such/folder"),
    ("--model BARE", "chat template"),
    ("--model EMPTY", "--model"),
    ("--env test_aem:NoDemonstrations", "--model"),
    ("--env test_aem:Echo.words", "test_aem:Echo.words"),
    ("--env gem:game:GuessTheNumber-v0-easy", "pip install gem-llm"),
    ("--env code --model WHOLE --dataset no_tasks.jsonl", "no_tasks.jsonl"),
    ("--env code --model WHOLE --dataset ROWS", "row 2"),
    ("--model WHOLE --dataset tasks.jsonl", "dataset"),
    ("--out README.md/runs", "--out"),
    ("--out ~nobody_here/runs", "--out ~nobody_here/runs: this user has no home"),
    ("--cache_dir ~nobody_here", "--cache_dir ~nobody_here: this user has no home"),
    ("--name taken", "--name"),
    ("--dtype int8", "--dtype"),
    ("--resume yesterday", "--resume"),
    ("--resume auto --name run --lam 0.5 --lr 1", "--lam, --lr"),
    ("--save_every 0", "--save_every"),
    ("--env_timeout -1", "--env_timeout"),
    ("--lora_rank -2", "--lora_rank"),
    ("--lora_rank 8 --model WHOLE", "peft"),
    ("--wandb project --model WHOLE", "wandb"),
]


@pytest.mark.parametrize("flags, words", BAD)
def test_bad_input_is_one_sentence_and_exit_code_2(
    flags, words, monkeypatch, capsys, tmp_path, models, record_property
):
    record_property("flags", flags)
    for package in ("gem", "peft", "wandb"):
        monkeypatch.setitem(sys.modules, package, None)
    (tmp_path / "taken").mkdir()
    (tmp_path / "rows.jsonl").write_text(ROWS)
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "step-000020.pt").touch()
    (tmp_path / "run" / "config.json").write_text(json.dumps(vars(config(**TO_RESUME))))
    files = {name.upper(): str(models / name) for name in ("whole", "bare", "empty")}
    files["ROWS"] = str(tmp_path / "rows.jsonl")
    flags = ["--cache_dir", str(tmp_path / "cache"), *(files.get(f, f) for f in flags.split())]
    if "--out" not in flags:
        flags = ["--out", str(tmp_path), *flags]
    monkeypatch.setattr(aem, "rollout", lambda *args: pytest.fail("work was begun"))
    monkeypatch.setattr(envs, "embedded_policy", lambda *args: pytest.fail("work was begun"))
    before = set(tmp_path.iterdir())
    capsys.readouterr()
    assert run_main(monkeypatch, *flags) == 2
    error = capsys.readouterr().err.strip().splitlines()
    record_property("message", error[-1])
    assert words in error[-1] and "error: " in error[-1] and len(error) <= 2, error
    assert set(tmp_path.iterdir()) == before
