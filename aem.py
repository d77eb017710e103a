"""AEM: Adaptive Entropy Modulation for multi-turn agentic RL (arXiv:2605.00425), in one file.

An LLM agent acts over many turns and gets one sparse reward at the end. AEM measures how uncertain
the policy was over each complete *response*, and rescales that response's advantage. In each step:

    sample_batch    roll out groups of trajectories, a task each; record every token's entropy
    assign_credit   A: a trajectory's reward against its group's, for each of its responses
    modulate        alpha = exp(-lambda H~) / mean exp(-lambda H~): smaller where H_bar is higher
    train_step      A_AEM = alpha A
    update          PPO-clip with A_AEM, on the sampled tokens only

Read `train_step` first, then section 1 (the method), 4 (rollout) and 5 (update).

    python aem.py                                      # a tiny policy learns a game on a CPU
    python aem.py --aem false --estimator dapo         # without AEM; another base estimator
    python aem.py --model Qwen/Qwen2.5-1.5B-Instruct   # the same code on a GPU

Shapes: N trajectories, R responses, n sampled tokens, B rows, T positions, D hidden size,
V vocabulary. Entropies, surprisals and log-probs are in nats, at the sampling temperature.
"""

import atexit
import datetime
import gc
import hashlib
import inspect
import json
import math
import os
import random
import re
import shutil
import signal
import sys
import threading
import time
import traceback
from collections import Counter
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from typing import Literal

import jinja2  # comes with torch
import torch
import torch.distributed as dist
import transformers
from safetensors import SafetensorError
from torch.nn.functional import cross_entropy, pad
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import envs


class UsageError(ValueError):
    """What the user can fix: one sentence that names the flag or file, and the fix."""


# ------------------------------------------------------------------------------ 1. the method
def token_stats(logits, ids):
    """Log-prob log pi(y_l | s, y_<l) of tokens, and token entropy -sum_v pi(v) log pi(v).

    Args: logits (..., V), already divided by the temperature, -inf allowed; ids (...) integers.
    Returns: (logp, entropy), two (...) of float32 or better.
    >>> token_stats(torch.zeros(2), torch.tensor(1))  # a fair coin: log 1/2 and log 2
    (tensor(-0.6931), tensor(0.6931))
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    log_p = logits.to(dtype).log_softmax(-1)  # (..., V)
    logp = log_p.gather(-1, ids.unsqueeze(-1)).squeeze(-1)  # (..., V) -> (...)
    log_p = log_p.clamp_min(torch.finfo(dtype).min)  # subtle: 0 * -inf would be NaN
    entropy = -(log_p.exp() * log_p).sum(-1)  # (..., V) -> (...)
    return logp, entropy


def aem_coefficients(h_bar, group, lam=1.0, min_range=0.1, direction="normal", generator=None):
    """AEM's alpha of each response: confident responses count more, uncertain ones less.

        H~    = (H_bar - min_G H_bar) / (max_G H_bar - min_G H_bar)
        alpha = exp(-lam H~) / mean_G exp(-lam H~)                     so that mean_G alpha = 1

    Source: AEM; exp(-lam H~) / mean is EMPG's scaling (arXiv:2509.09265), here within a group G.
    A group whose H_bar spans less than `min_range` nats holds nothing but noise: alpha = 1.
    Ablations: 'reverse' takes 1 - H~ for H~, 'shuffle' permutes the alphas of each group.
    Args: h_bar (R,), mean token entropy of each response; group (R,) integers, the G that it
    belongs to. Returns: (R,).
    >>> aem_coefficients(torch.tensor([0.2, 1.2]), torch.tensor([0, 0]))
    tensor([1.4621, 0.5379])
    """
    alpha = torch.ones_like(h_bar)
    for g in group.unique():
        member = group == g
        h = h_bar[member]  # (R_g,)
        if direction == "shuffle":
            h = h[torch.randperm(len(h), generator=generator)]  # and the alphas with them
        low, high = h.min(), h.max()
        if high - low < min_range or high == low:
            continue
        h_tilde = (h - low) / (high - low)
        if direction == "reverse":
            h_tilde = 1 - h_tilde
        weight = torch.exp(-lam * h_tilde)
        alpha[member] = weight / weight.mean()  # note: sum_G alpha A is in general not sum_G A
    return alpha


@dataclass(frozen=True)
class Estimator:
    """A base estimator: how rewards become advantages, and advantages a loss."""

    advantage: str = "standardised"  # or 'centred', 'leave-one-out'
    loss_mean: str = "trajectory"  # or 'response': of token means; every 'token'; a 'constant'
    clip_low: float = 0.2  # epsilon_low
    clip_high: float = 0.2  # epsilon_high
    ratio: str = "token"  # pi / pi_old of each 'token'; one for a 'response', or a 'trajectory'
    dynamic_sampling: bool = False  # replace groups whose rewards are all equal
    overlong: float = 0.0  # soft penalty on this last share of --max_response_tokens
    compact_filtering: bool = False  # don't train on trajectories that hit a limit
    step_weight: float = 0.0  # w in A = A_episode + w A_step
    gamma: float = 0.95  # discount of the returns in A_step
    statistics: str = "trajectories"  # that a group's mean and std run over; or 'turns'
    dual_clip: float = math.inf  # c: where A < 0, a token's loss is -A c at most
    kl: float = 0.0  # weight of the KL divergence (k3) from the starting policy
    entropy_bonus: float = 0.0  # weight of the tokens' entropies, taken off the loss
    minibatches: int = 2  # optimizer steps per pass over a rollout batch
    task_order: bool = False  # minibatches of neighbouring groups, not shuffled


ESTIMATORS = {  # as their papers have them: no entropy bonus, no dual clip
    "grpo": Estimator(),  # DeepSeekMath, arXiv:2402.03300
    "dr_grpo": Estimator("centred", "constant"),  # Dr. GRPO, arXiv:2503.20783
    "rloo": Estimator("leave-one-out", "token"),  # Back to basics, arXiv:2402.14740
    # DAPO, arXiv:2503.14476
    "dapo": Estimator(loss_mean="token", clip_high=0.28, dynamic_sampling=True, overlong=0.2),
    # GSPO, arXiv:2507.18071
    "gspo": Estimator(clip_low=3e-4, clip_high=4e-4, ratio="trajectory"),
    # DeepSWE's recipe (Together AI and Agentica, 2025)
    "grpo++": Estimator("leave-one-out", "constant", clip_high=0.28, compact_filtering=True),
    "gigpo": Estimator(loss_mean="token", step_weight=1.0),  # GiGPO, arXiv:2505.10978
}


def verl_agent(rule):
    """An estimator as verl-agent's scripts for ALFWorld and WebShop run it.

    Source: github.com/langfengQ/verl-agent, October 2025, examples and ppo_trainer.yaml; the dual
    clip is arXiv:1912.09729. Its 256 turns a minibatch are 9 to 25 minibatches of 16 x 8 episodes.
    >>> verl_agent(ESTIMATORS["gspo"]).ratio
    'response'
    """
    rule = replace(rule, statistics="turns", loss_mean="token", dual_clip=3.0, overlong=0.0)
    rule = replace(rule, kl=0.01, entropy_bonus=0.001, minibatches=16, task_order=True)
    if rule.ratio == "trajectory":  # a turn is a sequence there, and its GSPO has no dual clip
        rule = replace(rule, ratio="response", loss_mean="response", dual_clip=math.inf)
    return rule


def vary(rewards):
    """Whether rewards (n,) differ by more than rounding."""
    spread = rewards.max() - rewards.min()
    return bool(spread > 1e-9 * rewards.abs().max().clamp_min(1.0))


def group_advantages(rewards, group, kind="standardised"):
    """Advantage of each trajectory against its group; where all rewards are equal, exactly 0.

    Sources: see ESTIMATORS. Args: rewards (N,) floats; group (N,) integers. Returns: (N,).
    >>> group_advantages(torch.tensor([1.0, 0.0, 0.0, 0.0]), torch.zeros(4))
    tensor([ 1.5000, -0.5000, -0.5000, -0.5000])
    """
    advantages = torch.zeros_like(rewards)
    for g in group.unique():
        member = group == g
        r = rewards[member]  # (G,)
        if not vary(r):  # subtle: dividing by std + 1e-6 would blow up rounding
            continue
        advantage = r - r.mean()
        if kind == "standardised":
            advantage = advantage / (r.std() + 1e-6)
        elif kind == "leave-one-out":  # R - mean of the others
            advantage = advantage * len(r) / (len(r) - 1)
        advantages[member] = advantage
    return advantages


def token_weights(tokens, kind, longest):
    """Weight in the loss of each token of a sequence: what the loss is a mean over.

    Args: tokens (N,), trained tokens of each sequence: a trajectory, or for the kind 'response' a
    response; longest, as many as a trajectory can have.
    """
    if kind in ("trajectory", "response"):  # GRPO: mean over sequences of their token mean
        return 1 / (tokens.count_nonzero() * tokens)
    if kind == "token":  # DAPO: mean over all tokens
        return (1 / tokens.sum()).expand_as(tokens)
    return torch.full_like(tokens, 1 / (len(tokens) * longest))  # Dr. GRPO: a constant


def clipped_loss(logp, old_logp, advantage, clip_low, clip_high, dual_clip=math.inf):
    """PPO's loss per token, max(-A r, -A clip(r, 1 - low, 1 + high)), and where the clip acts.

    Where A < 0 the dual clip keeps it below -A c. Args: logp, old_logp, advantage (n,).
    Returns: two (n,). Sources: PPO, arXiv:1707.06347; dual clip, arXiv:1912.09729.
    """
    ratio = torch.exp(logp - old_logp)  # r = pi / pi_old
    unclipped = -advantage * ratio
    clipped = -advantage * ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = torch.maximum(unclipped, clipped)
    capped = torch.minimum(loss, -advantage * dual_clip)  # subtle: NaN where A = 0, not taken
    return torch.where(advantage < 0, capped, loss), clipped > unclipped


def entropy_drift(logits, advantages):
    """The entropy-drift theorem of AEM: how a natural-gradient step moves a policy's entropy H.

    One sampled response moves it by A (S - H), S = -log pi; all together by the expectation.
    Args: logits, advantages (..., K) over K responses. Returns: drift of each response (..., K),
    and expected drift (...), in nats per unit of step size.
    >>> entropy_drift(torch.tensor([1.0, 0.0]), torch.tensor([1.0, -1.0]))  # the likelier is better
    (tensor([-0.2689, -0.7311]), tensor(-0.3932))
    """
    logp = logits.log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1, keepdim=True)
    drift = advantages * (-logp - entropy)
    return drift, (logp.exp() * drift).sum(-1)


# ------------------------------------------------------------------------------ 2. settings
# what a number must be at least; where it is not listed, 0
AT_LEAST = {"groups": 1, "max_turns": 1, "max_response_tokens": 1, "max_length": 1, "epochs": 1}
AT_LEAST |= {"minibatches": 1, "micro_batch_tokens": 1, "eval_every": 1, "eval_tasks": 1}
AT_LEAST |= {"save_every": 1, "group_size": 2, "temperature": 0.01, "max_grad_norm": 1e-6}


def flag(default, text):
    return field(default=default, metadata={"help": text})


@dataclass
class Config:
    """Everything a run depends on. Each field is a flag of the same name."""

    model: str = flag("tiny", "policy pi: 'tiny' (embedded), a hub id, a folder, an earlier run")
    env: str = flag("household", f"{', '.join(envs.ENVS)}, gem:NAME for GEM's, or module:Class")
    dataset: str = flag("", "tasks for --env code: openai/openai_humaneval, or a JSONL file")
    # the method
    aem: bool = flag(True, "multiply advantages by AEM's alpha; 'false' is the baseline")
    lam: float = flag(1.0, "lambda: max alpha / min alpha <= e^lambda; 0 turns AEM off")
    min_range: float = flag(0.1, "alpha = 1 in a group whose H_bar spans less than this, in nats")
    aem_direction: Literal["normal", "reverse", "shuffle"] = flag("normal", "ablations of alpha")
    aem_scope: Literal["group", "trajectory", "batch"] = flag("group", "H_bar is compared within")
    estimator: Literal[tuple(ESTIMATORS)] = flag("grpo", "base advantage A, and its loss")
    max_resample: int = flag(20, "DAPO: draws at most to replace groups of equal rewards; or 0")
    recipe: Literal["plain", "verl_agent"] = flag("plain", "as in its paper, or in verl-agent")
    kl_coef: float | None = flag(None, "KL (k3) from the starting policy; by default the recipe's")
    # rollout
    groups: int = flag(16, "tasks per step; the rollouts of one task are a group G")
    group_size: int = flag(8, "rollouts of each task; a group of one has no baseline")
    max_turns: int | None = flag(None, "responses per trajectory; by default the env's")
    max_response_tokens: int | None = flag(None, "tokens per response; by default the env's")
    max_length: int = flag(4096, "tokens per trajectory at most, if the model sees as many")
    env_timeout: float | None = flag(None, "seconds a step may take; 0: no limit; others' envs: 60")
    action_tag: str = flag("", "'action': only <action>...</action> reaches the environment")
    temperature: float = flag(1.0, "sampling temperature; pi and entropies are meant at it")
    # update
    steps: int = flag(100, "training steps, each a rollout batch and its update; 0: evaluate only")
    lr: float | None = flag(None, "AdamW; by default 7e-4 below 10 M weights, LoRA 1e-5, else 1e-6")
    lora_rank: int = flag(0, "train LoRA adapters of this rank (pip install peft); 0: all weights")
    epochs: int = flag(1, "passes of the update over one rollout batch")
    minibatches: int | None = flag(None, "optimizer steps per pass; by default the recipe's")
    max_grad_norm: float = flag(1.0, "gradients are clipped to this global norm")
    recompute_old_logps: bool = flag(False, "old log-probs by the update's forward, for bf16")
    # machine
    device: str = flag("auto", "'cpu', 'cuda', ...; 'auto': a GPU for all but 'tiny'")
    dtype: Literal["auto", "float32", "bfloat16"] = flag("auto", "of matrix products")
    micro_batch_tokens: int = flag(8192, "tokens per forward, padding included")
    compile: bool = flag(False, "torch.compile the model")
    # the run
    seed: int = flag(0, "of tasks, sampling and minibatches")
    date: str = flag("", "that chat templates may print; by default the day the run was begun")
    eval_every: int = flag(20, "steps between evaluations; also the first and the last")
    eval_tasks: int = flag(256, "tasks per evaluation, one rollout of each")
    save_every: int = flag(20, "steps between checkpoints; also at the end, or Ctrl-C")
    out: str = flag("runs", "folder that holds the runs")
    name: str = flag("", "the run's folder in --out; by default numbered")
    resume: Literal["", "auto"] = flag("", "'auto': go on with the run --name, or the newest alike")
    wandb: str = flag("", "send metrics to this project of Weights & Biases too")
    warm_steps: int | None = flag(None, "steps of imitation first; by default 1000 if 'tiny', or 0")
    warm_noise: float = flag(0.35, "share of random actions in the demonstrations it imitates")
    warm_lr: float = flag(5e-5, "AdamW's in imitation by a --model; 'tiny' has its own recipe")
    cache_dir: str = flag("~/.cache/aem", "folder where warm starts are kept")

    @property
    def rule(self):
        """The Estimator, as the recipe and the flags have it."""
        rule = ESTIMATORS[self.estimator]
        if self.recipe == "verl_agent":
            rule = verl_agent(rule)
        if self.kl_coef is not None:
            rule = replace(rule, kl=self.kl_coef)
        if self.minibatches is not None:
            rule = replace(rule, minibatches=self.minibatches)
        return rule

    def check(self):
        """Raises UsageError for what can't work. Settles paths, and what is None or 'auto'."""
        for name, value in vars(self).items():
            least = AT_LEAST.get(name, 0)
            if isinstance(value, int | float) and not least <= value < math.inf:
                raise UsageError(f"--{name} must be at least {least} and finite, not {value}")
        if self.dataset and (self.env != "code" or self.model == "tiny" or self.warm_steps):
            needs = "--dataset needs --env code and a --model, without --warm_steps"
            raise UsageError(f"{needs}: only the embedded tasks have demonstrations")
        for name, package in (("lora_rank", "peft"), ("wandb", "wandb")):
            if getattr(self, name) and find_spec(package) is None:
                raise UsageError(f"--{name} needs a further package: pip install {package}")
        for name in ("out", "model", "cache_dir"):  # whole paths: an environment may change folder
            path = os.path.expanduser(getattr(self, name))
            if path.startswith("~"):
                raise UsageError(f"--{name} {path}: this user has no home folder, choose another")
            if name != "model" or os.path.isdir(path):
                setattr(self, name, os.path.abspath(path))
        self.kl_coef = self.rule.kl
        self.minibatches = self.rule.minibatches
        if self.warm_steps is None:
            self.warm_steps = 1000 if self.model == "tiny" else 0
        if self.env_timeout is None:
            self.env_timeout = 0.0 if self.env in envs.ENVS else 60.0
        if self.device == "auto":
            self.device = "cuda" if torch.cuda.is_available() and self.model != "tiny" else "cpu"
        if self.dtype == "auto":
            self.dtype = "float32" if self.device == "cpu" else "bfloat16"


# ------------------------------------------------------------------------------ 3. the policy
class Policy:
    """A causal LM with its tokenizer and chat template. Rollout and update share its weights."""

    def __init__(self, model, tokenizer, temperature=1.0, dtype="float32", date=""):
        self.model = model.eval()  # for good: dropout would part rollout and update
        self.body = model.get_decoder()
        self.head = model.get_output_embeddings()
        self.weights = [p for p in model.parameters() if p.requires_grad]
        self.device = model.device
        self.dtype = dtype
        self.temperature = temperature
        self.reference = None  # for a KL term: the starting policy
        self.tokenizer = tokenizer
        self.date = date
        self.before, self.after, self.strips, self.end = chat_frame(tokenizer)
        ends = model.generation_config.eos_token_id  # an id, several, or None
        ends = ends if isinstance(ends, list) else [ends]
        self.ends = {self.end, tokenizer.eos_token_id, *ends} - {None}
        self.control, self.spelling = special_tokens(tokenizer, self.ends)
        self.encode = lru_cache(4096)(self.encode_text)

    def autocast(self):
        """Matrix products in bfloat16 from float32 weights, if so asked."""
        return torch.autocast(self.device.type, torch.bfloat16, self.dtype == "bfloat16")

    def hidden(self, ids, **kwargs):
        """Final hidden states: ids (B, T) -> (B, T, D)."""
        with self.autocast():
            return self.body(input_ids=ids, **kwargs).last_hidden_state

    def logits(self, hidden):
        """Logits at the sampling temperature, as float32: (..., D) -> (..., V)."""
        with self.autocast():
            logits = self.head(hidden)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return logits if self.temperature == 1 else logits / self.temperature  # no needless copy

    def encode_text(self, text):
        """Ids of a text. A special token that the template does not use is a word like others."""
        ids = []
        for i in token_ids(self.tokenizer, text):
            ids += self.spelling.get(i, [i])
        return ids

    def opening_ids(self, instructions, observation):
        """Ids of a conversation up to the first response: the chat template, rendered once."""
        observation = self.control.sub(" ", observation)  # it can't open or end a turn
        turns = [("user", observation)]
        if instructions and self.tokenizer.chat_template != envs.TEMPLATE:  # that policy knows them
            try:
                text = render(self.tokenizer, [("system", instructions), *turns], self.date)
            except jinja2.TemplateError:  # Gemma's template has no system role
                text = ""
            if instructions.strip() in text:
                return list(self.encode(text))
            turns = [("user", f"{instructions}\n\n{observation}")]
        return list(self.encode(render(self.tokenizer, turns, self.date)))

    def observation_ids(self, observation, ended):
        """Ids that an observation adds. They end the agent's turn, too, if it has not `ended`."""
        observation = self.control.sub(" ", observation)
        if self.strips:
            observation = observation.strip()
        ids = self.encode(self.before + observation + self.after)
        return ids[ids.index(self.end) + 1 :] if ended else list(ids)


def token_ids(tokenizer, text, **options):
    return tokenizer(text, add_special_tokens=False, **options).input_ids


CONVERSATION = (("user", "task"), ("assistant", "<<response>>"), ("user", " <<observation>> "))


def render(tokenizer, turns, date=""):
    """Text of a conversation, pairs (role, content), up to the agent's next response."""
    messages = [{"role": role, "content": content} for role, content in turns]
    template = tokenizer.chat_template
    if date:  # where the template prints today's, it prints this one, on any day
        day = datetime.date.fromisoformat(date)
        pattern = r"""strftime_now\((['"])(.+?)\1\)"""
        template = re.sub(pattern, lambda call: repr(day.strftime(call[2])), template)
    return tokenizer.apply_chat_template(
        messages, chat_template=template, add_generation_prompt=True, tokenize=False
    )


def chat_frame(tokenizer):
    """What a chat template puts between a response and an observation, and after that.
    Returns: (before, after, whether it strips observations, id of the token that ends a turn: the
    first added one in `before`). Raises ValueError if there is no template, or no such token.
    """
    if not tokenizer.chat_template:
        raise ValueError("its tokenizer has no chat template, use an instruction-tuned model")
    text = render(tokenizer, CONVERSATION)
    strips = " <<observation>> " not in text
    observation = "<<observation>>" if strips else " <<observation>> "
    before, after = text.split("<<response>>")[1].split(observation)
    ends = [i for i in token_ids(tokenizer, before) if i in tokenizer.added_tokens_decoder]
    if not ends:
        raise ValueError("its chat template ends a response without a special token")
    return before, after, strips, ends[0]


def special_tokens(tokenizer, ends):
    """How added tokens are read in an environment's text, which must not open or end a turn.
    Returns: (pattern of what the template itself uses: it is blanked, {id of any other special
    token: the ids of its spelling}).
    """
    added = tokenizer.added_tokens_decoder
    ids = [*token_ids(tokenizer, render(tokenizer, CONVERSATION)), *ends]
    used = {i for i in ids if i in added}
    control = re.compile("|".join(re.escape(added[i].content) for i in used))
    words = [i for i, token in added.items() if token.special and i not in used]
    texts = [added[i].content for i in words]
    spelled = token_ids(tokenizer, texts, split_special_tokens=True) if words else []
    return control, dict(zip(words, spelled))


def add_adapter(model, cfg):
    """Freeze the model but for LoRA adapters: those it came with, or new ones."""
    if not getattr(model, "_hf_peft_config_loaded", False):
        from peft import LoraConfig  # pip install peft

        torch.manual_seed(cfg.seed)
        rank = cfg.lora_rank
        model.add_adapter(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"))
    ranks = {adapter.r for adapter in model.peft_config.values()}
    if cfg.lora_rank and ranks != {cfg.lora_rank}:
        raise ValueError(f"its adapters have rank {ranks}: give that, or leave out --lora_rank")
    for name, weight in model.named_parameters():
        weight.requires_grad_("lora_" in name)
        if not weight.requires_grad:  # it needs no float32
            weight.data = weight.data.to(getattr(torch, cfg.dtype))


@torch.no_grad()
def check_model(policy, cfg):
    """Raises ValueError for a model that is not head(body(ids)), or sees its ids otherwise."""
    if not all(p.isfinite().all() for p in policy.model.parameters()):
        raise ValueError("its weights are not finite")
    config = policy.body.config
    limit = getattr(config, "max_position_embeddings", None) or cfg.max_length
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") in ("dynamic", "longrope"):  # beyond, they turn with the length
        limit = rope.get("original_max_position_embeddings", limit)
    if "sliding_attention" in (getattr(config, "layer_types", None) or ["sliding_attention"]):
        limit = min(limit, getattr(config, "sliding_window", None) or limit)
    if limit < cfg.max_length and cfg.max_length != Config.max_length:
        raise ValueError(f"it sees {limit} tokens at once: lower --max_length to that")
    if limit < cfg.max_length:
        print(f"--max_length is {limit}, as this model sees no more at once", file=sys.stderr)
        cfg.max_length = limit
    t = Trajectory(0, None, None, list(range(8)))
    cache = SlotCache()
    for _ in range(2):  # a prompt, then a token
        ours = next_logits(policy, cache, [t], cfg)[0].softmax(-1)  # (V,)
        ids = torch.tensor([t.ids], device=policy.device)
        theirs = policy.model(ids).logits[0, -1].float().softmax(-1)
        gap = (ours - theirs).abs().sum().item()
        if not gap <= 0.05:  # NaN, too
            raise ValueError(f"its probabilities are {gap:.2f} off those of decoder and head")
        t.ids.append(1)


recomputed = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)


def layer_forward(forward, *args, **kwargs):
    """A layer's forward; where there is a gradient, backward computes it again."""
    if torch.is_grad_enabled():
        return recomputed(forward, *args, **kwargs)
    return forward(*args, **kwargs)  # subtle: compiled, a checkpoint could not fill the cache


def checkpoint_layers(model):
    """Gradient checkpointing: backward computes each layer again; without gradient, no effect.
    transformers' own switch needs training mode, which turns the cache off and dropout on.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer  # 4.52 or later

    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.forward = partial(layer_forward, layer.forward)


def source_of(path):
    """The folder that holds a model's files: a run has them in checkpoint/."""
    folder = Path(path).expanduser()
    return folder / "checkpoint" if (folder / "checkpoint").is_dir() else folder


def load_policy(cfg, path):
    """A policy from a hub id, a folder, or an earlier run's folder. Raises UsageError."""
    source = source_of(path)
    if str(path).startswith((".", "/", "~")) and not source.is_dir():
        raise UsageError(f"--model {path}: there is no such folder")
    source = source if source.is_dir() else path
    torch.backends.cuda.enable_cudnn_sdp(False)  # it makes a plan for each new shape
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source)
        chat_frame(tokenizer)  # a missing template shows before gigabytes are read
        model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        check_model(Policy(model, tokenizer), cfg)  # on the CPU, before weights are rounded
        if cfg.lora_rank or getattr(model, "_hf_peft_config_loaded", False):
            add_adapter(model, cfg)
        policy = Policy(model.to(cfg.device), tokenizer, cfg.temperature, cfg.dtype, cfg.date)
    except torch.OutOfMemoryError:  # main says what helps
        raise
    except Exception as error:  # whatever loaders, templates and models of others raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise UsageError(f"cannot use --model {path} on {cfg.device}, {reason}") from error
    if cfg.device != "cpu":
        checkpoint_layers(model)
    if cfg.compile:
        torch.compiler.config.recompile_limit = 64  # prompts and single tokens, rollout and update
        policy.body.compile(dynamic=True)
    return policy


def warm_start(env, cfg):
    """Folder of the policy that has imitated this environment, made on first use: the embedded one,
    or the --model. Raises UsageError.
    """
    if not hasattr(env, "demonstration"):
        remedy = "name a --model, without --warm_steps"
        raise UsageError(f"--env {cfg.env} has no demonstrations to imitate: {remedy}")
    sources = [inspect.getsource(module) for module in (inspect.getmodule(type(env)), envs)]
    settings = [cfg.env, cfg.max_turns, cfg.warm_steps, cfg.warm_noise, torch.__version__]
    if cfg.model != "tiny":
        sources += [inspect.getsource(function) for function in (imitate, demonstrated, begin)]
        settings += [cfg.model, cfg.warm_lr, cfg.dtype, cfg.groups, cfg.group_size]
        settings += [cfg.temperature, cfg.max_length, cfg.max_response_tokens, cfg.action_tag]
        settings += [cfg.max_grad_norm, cfg.lora_rank]
        settings += [cfg.seed if cfg.lora_rank else 0]  # of the adapters' first weights
        settings += [[f.name, f.stat().st_mtime_ns] for f in sorted(source_of(cfg.model).glob("*"))]
    key = hashlib.sha256(json.dumps(settings + sources).encode()).hexdigest()[:16]
    folder = Path(cfg.cache_dir) / key
    sizes = folder / "sizes.json"  # of its files: one that was cut short later on is noticed
    if not sizes.exists() or sizes.read_text() != file_sizes(folder):
        unfinished = folder.with_suffix(f".{os.getpid()}")
        unfinished.mkdir(parents=True, exist_ok=True)  # shows now if it can't be written
        try:
            if cfg.model == "tiny":
                parts = envs.embedded_policy(env, cfg.warm_steps, cfg.warm_noise)
            else:
                parts = imitate(load_policy(cfg, cfg.model), env, cfg)
            for part in parts:
                with written(unfinished):
                    part.save_pretrained(unfinished)
            (unfinished / "sizes.json").write_text(file_sizes(unfinished))
            shutil.rmtree(folder, ignore_errors=True)
            unfinished.rename(folder)  # complete, or not there at all
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
        del parts
        gc.collect()  # a policy refers to itself: its weights would stay beside the next one's
    return folder


def file_sizes(folder):
    """Names and bytes of a folder's files, as JSON."""
    files = sorted(file for file in folder.glob("*") if file.name != "sizes.json")
    return json.dumps({file.name: file.stat().st_size for file in files})


# ------------------------------------------------------------------------------ 4. rollout
@dataclass
class Response:
    """All tokens the policy sampled in one turn: the action. Recorded while sampling."""

    start: int  # position of its first token in the trajectory
    logp: list[float] = field(default_factory=list)  # old log-prob of each token
    entropy: list[float] = field(default_factory=list)  # H_tok of each token
    reference: list[float] = field(default_factory=list)  # log-probs of the starting policy
    text: str = ""
    observation: str = ""  # what the environment said to it
    reward: float = 0.0
    invalid: bool = False  # the environment carried nothing out
    alpha: float = 1.0
    advantage: float = 0.0  # A_AEM = alpha A
    weight: float = 0.0  # of each of its tokens in the loss

    @property
    def h_bar(self):
        return sum(self.entropy) / len(self.entropy)  # AEM's proxy of its uncertainty


@dataclass
class Trajectory:
    """One episode as one token sequence: prompt + response_1 + observation_1 + response_2 ..."""

    group: int
    env: object
    rng: random.Random  # its own: what it samples does not depend on the rest of the batch
    ids: list[int] = field(default_factory=list)
    responses: list[Response] = field(default_factory=list)
    cached: int = 0  # leading tokens that are in the KV cache
    seed: int = 0  # of its task
    prompt: str = ""
    task_type: str = ""
    reward: float = 0.0
    penalty: float = 0.0  # soft overlong penalty, taken off the reward
    success: bool = False
    done: bool = False
    truncated: bool = False  # it hit a limit
    masked: bool = False  # not trained on: it crashed, or compact filtering
    error: str = ""  # traceback, if its environment crashed


def responses_of(trajectories):
    return [r for t in trajectories for r in t.responses]


class SlotCache:
    """Key-value cache in which a token's slot is its position: rows grow at their own length.
    Padding lands in slots that later tokens overwrite; until then the mask hides it.
    """

    def __init__(self):
        self.layers = []  # per layer [keys, values], each (B, heads, capacity, head size)
        self.capacity = 0

    def prepare(self, slots, needed):
        """Announce a forward of tokens at `slots` (B, T) < `needed`.
        Returns: what is added to attention's scores (B, 1, T, capacity), -inf behind a token.
        """
        self.slots = slots
        self.rows = torch.arange(len(slots), device=slots.device).unsqueeze(-1)  # (B, 1)
        needed = 64 * math.ceil(needed / 64)  # few shapes: a GPU plans for each anew
        self.capacity = max(self.capacity, needed)
        behind = torch.arange(self.capacity, device=slots.device) > slots.unsqueeze(-1)
        return torch.where(behind, -math.inf, 0.0).unsqueeze(1)

    def update(self, key, value, layer, *args, **kwargs):
        """What transformers' attention calls: store (B, heads, T, size), get all slots."""
        if layer == len(self.layers):  # of value's type: in bfloat16, rotation gives float32 keys
            self.layers.append([x[:, :, :0].to(value.dtype) for x in (key, value)])
        pair = self.layers[layer]
        for i, new in enumerate((key, value)):
            missing = self.capacity - pair[i].shape[2]
            if missing > 0:
                pair[i] = pad(pair[i], (0, 0, 0, missing))
            pair[i][self.rows, :, self.slots] = new.transpose(1, 2).to(value.dtype)
        return pair

    def keep(self, rows):
        """Only these rows of the batch go on. A layer at a time: two caches might not fit."""
        for pair in self.layers:
            pair[:] = [stored[rows] for stored in pair]


def next_logits(policy, cache, trajectories, cfg):
    """Logits (B, V) of each trajectory's next token: forwards over what is not in the cache yet.
    At most about `micro_batch_tokens` at once, as a batch of long prompts could exceed the memory.
    """
    width = max(1, cfg.micro_batch_tokens // len(trajectories))
    longest = max(len(t.ids) - t.cached for t in trajectories)
    for _ in range(math.ceil(longest / width)):
        starts = [min(t.cached, len(t.ids) - 1) for t in trajectories]  # at least the last token
        pieces = [t.ids[start : start + width] for t, start in zip(trajectories, starts)]
        columns = max(len(piece) for piece in pieces)
        ids = torch.tensor([piece + [0] * (columns - len(piece)) for piece in pieces])  # (B, T)
        slots = torch.tensor(starts).unsqueeze(-1) + torch.arange(columns)  # (B, T)
        mask = cache.prepare(slots.to(policy.device), max(starts) + columns)
        positions = cache.slots.clamp_max(cfg.max_length - 1)  # of padding: any that there is
        inputs = {"position_ids": positions, "attention_mask": mask, "past_key_values": cache}
        hidden = policy.hidden(ids.to(policy.device), use_cache=True, **inputs)  # (B, T, D)
        for t, start, piece in zip(trajectories, starts, pieces):
            t.cached = start + len(piece)
    last = torch.tensor([len(piece) - 1 for piece in pieces])
    return policy.logits(hidden[torch.arange(len(last)), last])  # (B, D) -> (B, V)


def sample(logits, uniform):
    """One token per row by inverse CDF. Args: logits (B, V); uniform (B,) in [0, 1). -> ids (B,)"""
    cdf = logits.softmax(-1).cumsum(-1, dtype=torch.float64)  # subtle: float32 sums drift
    target = uniform.unsqueeze(-1) * cdf[:, -1:]
    ids = torch.searchsorted(cdf, target, right=True)  # right: never a token of probability 0
    return ids.squeeze(-1).clamp_max(logits.shape[-1] - 1)


@torch.no_grad()
def respond(policy, cache, trajectories, cfg):
    """Every trajectory samples one response, token by token, until all have ended theirs."""
    for t in trajectories:
        t.responses.append(Response(start=len(t.ids)))
    live = list(range(len(trajectories)))  # rows whose response goes on; the others wait
    with policy.autocast():  # one for all tokens: weights are rounded to bfloat16 once
        while live:
            logits = next_logits(policy, cache, trajectories, cfg)[live]  # (B, V) -> (live, V)
            uniform = [trajectories[i].rng.random() for i in live]
            ids = sample(logits, torch.tensor(uniform, dtype=torch.float64).to(policy.device))
            logps, entropies = token_stats(logits, ids)  # (live,) each
            if entropies.isnan().any():
                raise UsageError("the policy's logits are not finite any more: lower --lr")
            columns = (ids.tolist(), logps.tolist(), entropies.tolist())
            for i, token, logp, entropy in zip(list(live), *columns):  # a copy, as rows leave it
                response = trajectories[i].responses[-1]
                trajectories[i].ids.append(token)
                response.logp.append(logp)
                response.entropy.append(entropy)
                if token in policy.ends or len(response.logp) == cfg.max_response_tokens:
                    live.remove(i)
    for t in trajectories:
        ids = t.ids[t.responses[-1].start :]
        t.responses[-1].text = policy.tokenizer.decode(ids, skip_special_tokens=True)


def action_in(text, tag):
    """What the environment gets of a response: all, or what its last <tag>...</tag> holds."""
    if not tag:
        return text
    actions = re.findall(f"<{re.escape(tag)}>(.*?)</{re.escape(tag)}>", text, re.DOTALL)
    return actions[-1] if actions else ""


def begin(policy, t, observation, info, cfg):
    """Enter a task into its trajectory: what the environment's `reset` returned."""
    instructions = getattr(t.env, "instructions", None) or ""
    if cfg.action_tag:
        instructions += " Think first, between <think> and </think>; then give your action,"
        instructions += f" between <{cfg.action_tag}> and </{cfg.action_tag}>."
    t.ids = policy.opening_ids(instructions, observation)
    t.prompt = observation
    kind = info.get("task_type")
    t.task_type = "" if kind is None else str(kind)
    if len(t.ids) + cfg.max_response_tokens > cfg.max_length:
        raise UsageError(f"a prompt of {len(t.ids)} tokens leaves no room: raise --max_length")


def observe(policy, t, observation, reward, terminated, truncated, info, cfg):
    """Enter what the environment says to the last response: what its `step` returned."""
    ids = policy.observation_ids(observation, ended=t.ids[-1] == policy.end)
    response = t.responses[-1]
    response.observation = observation
    response.reward = float(reward)
    if not math.isfinite(response.reward):
        raise ValueError(f"the environment's reward is {reward}")
    t.reward += response.reward
    no_action = not action_in(response.text, cfg.action_tag).strip()
    response.invalid = bool(info.get("invalid", no_action))
    t.success = bool(info.get("success", terminated and not truncated and reward > 0))
    no_turn = len(t.responses) >= cfg.max_turns
    no_room = len(t.ids) + len(ids) + cfg.max_response_tokens > cfg.max_length
    t.truncated = bool(not terminated and (truncated or no_turn or no_room))
    t.done = bool(terminated or t.truncated)
    if not t.done:
        t.ids += ids


def call(function, argument, in_thread):
    """A Future of function(argument), computed here and now, or in a thread, which may hang."""
    future = Future()

    def work():
        try:
            future.set_result(function(argument))
        except BaseException as error:  # SystemExit too: whoever asks for the result gets it
            future.set_exception(error)

    if in_thread:
        threading.Thread(target=work, daemon=True).start()
    else:
        work()
    return future


def exchange(policy, trajectories, cfg):
    """Let each environment reset, or step. A crash or a timeout fails its own trajectory.
    Environments marked `parallel` run at the same time, under one deadline.
    """

    def ask(t):
        if not t.responses:
            return t.env.reset(seed=t.seed)
        return t.env.step(action_in(t.responses[-1].text, cfg.action_tag))

    parallel = getattr(trajectories[0].env, "parallel", False)
    batches = [trajectories] if parallel else [[t] for t in trajectories]
    in_threads = parallel or cfg.env_timeout > 0
    for batch in batches:
        futures = [call(ask, t, in_threads) for t in batch]
        wait(futures, cfg.env_timeout or None)
        for t, future in zip(batch, futures):
            enter = observe if t.responses else begin
            try:
                enter(policy, t, *future.result(timeout=0), cfg)
            except envs.SandboxError:  # not the environment's failure: the run stops
                raise
            except (Exception, SystemExit):  # counted and shown
                t.error = traceback.format_exc()
                t.reward, t.success, t.done = 0.0, False, True
                t.env = None  # it may still run: a new one takes its place


def rollout(policy, environments, seeds, group_size, cfg, stream, first=0):
    """`group_size` episodes of each seed's task in one batch, turn by turn.

    All sample a response together, and those whose response has ended wait; then every environment
    steps. `stream`, and a trajectory's number from `first` on, name its random numbers. Each
    process plays its part of the trajectories.
    Returns: N trajectories, those of a group one after the other.
    """
    rank, world = rank_and_world()
    count = len(seeds) * group_size
    mine = range(rank * count // world, (rank + 1) * count // world)
    trajectories = []
    for i, env in zip(mine, environments):
        rng = random.Random(f"{cfg.seed}/{stream}/{first + i}")
        group = i // group_size
        trajectories.append(Trajectory(first + group, env, rng, seed=seeds[group]))
    playing = trajectories
    cache = SlotCache()
    while playing:
        exchange(policy, playing, cfg)
        live = [i for i, t in enumerate(playing) if not t.done]
        if len(live) < len(playing):
            cache.keep(live)
            playing = [playing[i] for i in live]
        respond(policy, cache, playing, cfg)  # nobody, at the end
    for i, t in enumerate(trajectories):
        if t.env is None:
            environments[i] = make_environments(cfg, 1)[0]
        t.env = t.rng = None  # other processes need neither
    return sum(gather(trajectories), [])


def check_crashes(trajectories, cfg):
    """Raises UsageError, with the first traceback, if most trajectories crashed."""
    errors = [t.error for t in trajectories if t.error]
    if 2 * len(errors) > len(trajectories):
        crashed = f"--env {cfg.env} crashed in {len(errors)} of {len(trajectories)} trajectories"
        raise UsageError(f"{crashed}, first of all:\n{errors[0]}")


def make_environments(cfg, count=None):
    """Environments, by default one per trajectory of a batch. Settles limits that are None."""
    if count is None:
        count = math.ceil(cfg.groups * cfg.group_size / rank_and_world()[1])
    options = {"dataset": cfg.dataset} if cfg.dataset else {}
    try:
        environments = [envs.make(cfg.env, **options) for _ in range(count)]
    except ValueError as error:
        raise UsageError(error) from error
    for name, fallback in (("max_turns", 12), ("max_response_tokens", 16)):
        if getattr(cfg, name) is None:
            setattr(cfg, name, getattr(environments[0], name, None) or fallback)
    for env in environments:
        if hasattr(env, "max_turns"):
            env.max_turns = cfg.max_turns  # else its own limit would end the episode before
    return environments


REMEDIES = (
    "trajectories.txt shows what the policy says. Where it hardly solves anything, let it imitate "
    "first (--warm_steps, if the environment has demonstrations), list what it may do (as --env "
    "household-guided), name a format (--action_tag), or begin with easier tasks."
)


def overlong_penalty(t, cfg):
    """DAPO's soft penalty, 0 to 1: linear over the last share of the longest response."""
    share = cfg.rule.overlong
    longest = max((len(r.logp) for r in t.responses), default=0) / cfg.max_response_tokens
    return (longest - 1 + share) / share if longest > 1 - share else 0.0


def episode_reward(t, rule):
    """Reward of a trajectory. Where statistics run over turns, what invalid actions cost is left
    out: each turn bears its own. Source of the latter: verl-agent.
    """
    if rule.statistics == "trajectories":
        return t.reward - t.penalty
    return sum(r.reward for r in t.responses if not r.invalid) - t.penalty


def sample_batch(policy, environments, cfg, step):
    """Trajectories of `groups` tasks. Dynamic sampling (DAPO) replaces groups that do not vary.
    Returns: (trajectories to train on, all that were sampled). Raises UsageError if
    `max_resample` further draws are not enough.
    """
    rule = cfg.rule
    draws = cfg.max_resample if rule.dynamic_sampling and step > 0 else 0
    tasks = random.Random(f"{cfg.seed}/tasks/{step}")
    kept, sampled = [], []
    for draw in range(draws + 1):
        missing = cfg.groups - len(kept) // cfg.group_size
        seeds = tasks.sample(range(envs.HELD_OUT), missing)
        drawn = rollout(policy, environments, seeds, cfg.group_size, cfg, f"train/{step}/{draw}")
        for t in drawn:
            t.group += draw * cfg.groups
            t.penalty = overlong_penalty(t, cfg)
        for i in range(0, len(drawn), cfg.group_size):
            group = drawn[i : i + cfg.group_size]
            rewards = [episode_reward(t, rule) for t in group if not t.error]
            rewards = torch.tensor(rewards, dtype=torch.float64)
            if draws == 0 or (len(rewards) and vary(rewards)):
                kept += group
        sampled += drawn
        check_crashes(sampled, cfg)
        if len(kept) == cfg.groups * cfg.group_size:
            return kept, sampled
    found = f"{len(kept) // cfg.group_size} of {len(sampled) // cfg.group_size} groups"
    remedy = f"--groups {cfg.groups} are needed: raise --max_resample, or use 0 to train on all"
    raise UsageError(f"at step {step} rewards vary in only {found}, {remedy}. {REMEDIES}")


# ------------------------------------------------------------------------------ 5. update
def assign_credit(trajectories, cfg):
    """Base advantage A (R,) of every response: its trajectory's against the group's.

    A crashed trajectory is missing from its group; one that compact filtering masks counts in the
    baseline. Neither is trained on: it is `masked`, and A = 0.
    """
    rule = cfg.rule
    group = [-1 - i if t.error else t.group for i, t in enumerate(trajectories)]  # a crash: alone
    for t in trajectories:
        t.masked = bool(t.error or (rule.compact_filtering and t.truncated))
    turns = torch.tensor([len(t.responses) for t in trajectories])
    trained = torch.tensor([not t.masked for t in trajectories]).repeat_interleave(turns)
    if rule.statistics == "turns":
        rewards = []  # of each response: its episode's, and its own penalty if it was invalid
        for t in trajectories:
            episode = episode_reward(t, rule)
            rewards += [episode + r.reward if r.invalid else episode for r in t.responses]
        rewards = torch.tensor(rewards, dtype=torch.float64)  # (R,)
        of_turn = torch.tensor(group).repeat_interleave(turns)  # (N,) -> (R,)
        advantages = group_advantages(rewards, of_turn, rule.advantage)
    else:
        rewards = [episode_reward(t, rule) for t in trajectories]
        rewards = torch.tensor(rewards, dtype=torch.float64)
        advantages = group_advantages(rewards, torch.tensor(group), rule.advantage)  # (N,)
        advantages = advantages.repeat_interleave(turns)  # (N,) -> (R,)
    if rule.step_weight:
        advantages += rule.step_weight * step_advantages(trajectories, group, rule)
    return advantages * trained


def step_advantages(trajectories, group, rule):
    """GiGPO's A_step (R,): discounted returns, compared after the same observation, the anchor.
    Source: arXiv:2505.10978. An anchor that is met once in its group gives 0.
    """
    anchors = {}  # (group, observation) -> its number
    keys, returns = [], []  # (R,) each
    for g, t in zip(group, trajectories):
        observation = t.prompt
        for i, r in enumerate(t.responses):
            keys.append(anchors.setdefault((g, observation), len(anchors)))
            later = enumerate(t.responses[i:])
            returns.append(sum(rule.gamma**k * response.reward for k, response in later))
            observation = r.observation
    returns = torch.tensor(returns, dtype=torch.float64)
    return group_advantages(returns, torch.tensor(keys), rule.advantage)


def modulate(trajectories, cfg, step):
    """AEM's alpha (R,) of every response; 1 without AEM.

    Responses that are not trained on stay out of the min, max and mean of their G.
    """
    scope, h_bar, used = [], [], []  # (R,) each
    for i, t in enumerate(trajectories):
        member_of = {"group": t.group, "trajectory": i, "batch": 0}[cfg.aem_scope]
        for r in t.responses:
            scope.append(member_of)
            h_bar.append(r.h_bar)
            used.append(cfg.aem and not t.masked)
    scope, used = torch.tensor(scope), torch.tensor(used)
    h_bar = torch.tensor(h_bar, dtype=torch.float64)
    shuffler = torch.Generator().manual_seed(hash((cfg.seed, step)))
    settings = (cfg.lam, cfg.min_range, cfg.aem_direction, shuffler)
    alpha = torch.ones_like(h_bar)
    alpha[used] = aem_coefficients(h_bar[used], scope[used], *settings)
    return alpha


def micro_batches(trajectories, budget):
    """Batches of like length, of at most `budget` tokens, padding included, or one trajectory."""
    rest = sorted(trajectories, key=lambda t: len(t.ids))
    while rest:
        size = max(1, budget // len(rest[-1].ids))  # the longest sets the width
        yield rest[-size:]
        del rest[-size:]


LOGITS_AT_ONCE = 2**26  # in an update: 256 MB in float32


def sampled_stats(policy, trajectories, entropies=False):
    """Log-probs (n,) of all sampled tokens under the current weights, in order, and their entropies
    (n,), if these are wanted, else 0; both differentiable. The head runs at sampled positions only,
    in chunks that backward computes again, so that (tokens x vocabulary) never exists.
    """
    rows = [torch.tensor(t.ids) for t in trajectories]
    ids = pad_sequence(rows, batch_first=True).to(policy.device)  # (B, T), padded on the right
    spots = []  # of sampled tokens, in 0 ... B T
    for row, t in enumerate(trajectories):
        for r in t.responses:
            first = row * ids.shape[1] + r.start
            spots += range(first, first + len(r.logp))
    spots = torch.tensor(spots, device=policy.device)  # (n,)
    hidden = policy.hidden(ids, use_cache=False).flatten(0, 1)  # (B T, D)
    hidden = hidden.index_select(0, spots - 1)  # (n, D), what each token was drawn from

    def stats(hidden, tokens):
        logits = policy.logits(hidden)
        if entropies:
            return token_stats(logits, tokens)
        logp = -cross_entropy(logits, tokens, reduction="none")
        return logp, torch.zeros_like(logp)

    size = max(1, LOGITS_AT_ONCE // policy.head.out_features)
    chunks = zip(hidden.split(size), ids.flatten()[spots].split(size))
    logps, entropy = zip(*[recomputed(stats, h, y) for h, y in chunks])
    return torch.cat(logps), torch.cat(entropy)


@torch.no_grad()
def record_logps(policy, trajectories, cfg, name):
    """Set every response's `name`, 'logp' or 'reference', by the update's forwards of `policy`."""
    rank, world = rank_and_world()
    played = [t for t in trajectories if t.responses]
    batches = list(micro_batches(played, cfg.micro_batch_tokens))
    parts = gather([sampled_stats(policy, batch)[0].tolist() for batch in batches[rank::world]])
    for i, batch in enumerate(batches):
        logps = iter(parts[i % world][i // world])
        for r in responses_of(batch):
            setattr(r, name, [next(logps) for _ in r.logp])


def policy_loss(policy, batch, cfg):
    """The loss of a micro-batch: a sum over its sampled tokens, of its trajectories' weights.
    Returns: (loss, sums over the tokens for the metrics).
    """
    rule = cfg.rule
    table = []  # a line per sampled token
    for r in responses_of(batch):
        for old_and_reference in zip(r.logp, r.reference or r.logp):
            table.append((r.weight, r.advantage, *old_and_reference))
    precision = torch.promote_types(policy.model.dtype, torch.float32)
    table = torch.tensor(table, dtype=precision, device=policy.device)  # (n, 4)
    weight, advantage, old_logp, reference = table.T  # (n,) each
    logp, entropy = sampled_stats(policy, batch, entropies=rule.entropy_bonus > 0)  # (n,) each
    gap = logp.detach() - old_logp
    centre = old_logp  # the ratio is exp(logp - centre)
    if rule.ratio != "token":
        # GSPO: its value is the sequence's, s = exp(mean_l (logp - old_logp)), its gradient each
        # token's own: centre = sg[logp] - log s
        sequences = [t.responses for t in batch]
        if rule.ratio == "response":
            sequences = [[r] for r in responses_of(batch)]
        lengths = [sum(len(r.logp) for r in sequence) for sequence in sequences]
        log_s = [gaps.mean().expand_as(gaps) for gaps in gap.split(lengths)]
        centre = logp.detach() - torch.cat(log_s)
    limits = (rule.clip_low, rule.clip_high, rule.dual_clip)
    loss, clipped = clipped_loss(logp, centre, advantage, *limits)  # (n,)
    d = reference - logp if rule.kl else torch.zeros_like(logp)
    kl = torch.exp(d) - d - 1  # k3 (Schulman, 2020): estimates KL(pi || pi_ref), never negative
    loss = (weight * (loss + rule.kl * kl - rule.entropy_bonus * entropy)).sum()
    sums = {"loss": loss, "clip_fraction": clipped.sum(), "kl": kl.sum(), "gap": gap.abs().sum()}
    return loss, {name: value.item() for name, value in sums.items()} | {"tokens": len(logp)}


def weigh(trajectories, cfg):
    """Set the `weight` in the loss of the responses of one optimizer step."""
    loss_mean = cfg.rule.loss_mean
    sequences = []  # lists of responses; of those that are masked, nothing is trained on
    for t in trajectories:
        responses = [] if t.masked else t.responses
        sequences += [[r] for r in responses] if loss_mean == "response" else [responses]
    tokens = [sum(len(r.logp) for r in sequence) for sequence in sequences]
    longest = min(cfg.max_turns * cfg.max_response_tokens, cfg.max_length)
    weights = token_weights(torch.tensor(tokens).double(), loss_mean, longest)
    for sequence, weight in zip(sequences, weights.tolist()):
        for r in sequence:
            r.weight = weight


def split_minibatches(trajectories, rule, shuffler):
    """One pass: the trajectories of each optimizer step, a list of `rule.minibatches` lists, some
    of them empty if there are fewer trajectories.
    """
    count = rule.minibatches
    if rule.task_order:
        ends = [len(trajectories) * i // count for i in range(count + 1)]
        return [trajectories[i:j] for i, j in zip(ends, ends[1:])]
    order = shuffler.sample(trajectories, len(trajectories))
    return [order[i::count] for i in range(count)]


def accumulate_gradients(policy, trajectories, cfg):
    """Gradients of one optimizer step, whose tokens are weighted before it is split.
    Each process takes every n-th micro-batch; then gradients and sums are added up.
    Returns: Counter of sums over tokens; empty if there is nothing to learn.
    """
    rule = cfg.rule
    learners = [t for t in trajectories if any(r.advantage for r in t.responses)]
    if rule.kl or rule.entropy_bonus:  # these move the others, too
        learners = [t for t in trajectories if t.responses and not t.masked]
    if not learners:
        return Counter()
    weigh(trajectories, cfg)
    rank, world = rank_and_world()
    sums = Counter()
    for batch in list(micro_batches(learners, cfg.micro_batch_tokens))[rank::world]:
        loss, counts = policy_loss(policy, batch, cfg)
        loss.backward()
        sums.update(counts)
    if world > 1:
        for p in policy.weights:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            dist.all_reduce(p.grad)
    total = Counter()
    for part in gather(sums):
        total.update(part)
    return total


def update(policy, optimizer, trajectories, cfg, step):
    """PPO-clip on one rollout batch: `epochs` passes of `rule.minibatches` optimizer steps.
    A step that is not finite is skipped; where no reward varies, there is none. Returns: metrics,
    means over optimizer steps, of trajectories that were trained on; `logp_gap` is taken before the
    first of them, where it is rounding alone; `last_...` from the last, the furthest off-policy.
    """
    rule = cfg.rule
    if not any(r.advantage for r in responses_of(trajectories)):
        return {"updates": 0, "skipped_updates": 0}
    if cfg.recompute_old_logps:
        record_logps(policy, trajectories, cfg, "logp")
    if rule.kl:
        record_logps(policy.reference, trajectories, cfg, "reference")
    shuffler = random.Random(f"{cfg.seed}/minibatches/{step}")
    minibatches = []
    for _ in range(cfg.epochs):
        minibatches += split_minibatches(trajectories, rule, shuffler)
    rows, gaps = [], []
    for minibatch in minibatches:
        sums = accumulate_gradients(policy, minibatch, cfg)
        if not sums:
            continue
        gaps.append(sums["gap"] / sums["tokens"])  # mean |log ratio|
        norm = torch.nn.utils.clip_grad_norm_(policy.weights, cfg.max_grad_norm).item()
        if math.isfinite(norm) and math.isfinite(sums["loss"]):
            optimizer.step()
            shares = {name: sums[name] / sums["tokens"] for name in ("clip_fraction", "kl", "gap")}
            rows.append({"loss": sums["loss"], "grad_norm": norm} | shares)
        optimizer.zero_grad()
    metrics = {"updates": len(rows), "skipped_updates": len(gaps) - len(rows)}
    if gaps and math.isfinite(gaps[0]):
        metrics["logp_gap"] = gaps[0]
    if rows:
        for name in ("loss", "grad_norm", "clip_fraction", "kl"):
            metrics[name] = fmean(row[name] for row in rows)
        metrics["last_clip_fraction"] = rows[-1]["clip_fraction"]
        metrics["last_log_ratio"] = rows[-1]["gap"]
    return metrics


def demonstrated(policy, env, seed, cfg):
    """A demonstration as a trajectory, as if the policy had sampled the expert's actions.
    Raises UsageError.
    """
    try:
        turns = env.demonstration(seed, cfg.warm_noise)
    except Exception as error:  # in others' code
        why = traceback.format_exc()
        raise UsageError(f"--env {cfg.env}: its demonstration {seed} failed:\n{why}") from error
    t = Trajectory(0, env, None)
    for observation, action in turns[: cfg.max_turns]:
        text = f"<{cfg.action_tag}>{action}</{cfg.action_tag}>" if cfg.action_tag else action
        ids = [*policy.encode(text), policy.end]
        if len(ids) > cfg.max_response_tokens:
            raise UsageError(f"a demonstration has {len(ids)} tokens: raise --max_response_tokens")
        observed = policy.observation_ids(observation, ended=True) if t.ids else []
        if not t.ids:
            begin(policy, t, observation, {}, cfg)
        if len(t.ids) + len(observed) + len(ids) > cfg.max_length:
            break
        t.ids += observed
        t.responses.append(Response(len(t.ids), [0.0] * len(ids)))
        t.ids += ids
    return t


def imitate(policy, env, cfg):
    """Behaviour cloning: `warm_steps` batches of demonstrations, as many as a rollout batch holds.
    Cross-entropy of the agent's tokens, by the update's forwards. Returns: (model, tokenizer).
    """
    optimizer = torch.optim.AdamW(policy.weights, lr=cfg.warm_lr, weight_decay=0.0)
    rng = random.Random("demonstrations")
    bar = tqdm(range(cfg.warm_steps), desc="imitation", unit="step")
    for _ in bar:
        seeds = [rng.randrange(envs.HELD_OUT) for _ in range(cfg.groups * cfg.group_size)]
        episodes = [demonstrated(policy, env, seed, cfg) for seed in seeds]
        episodes = [t for t in episodes if t.responses]
        tokens = sum(len(r.logp) for r in responses_of(episodes))
        total = 0.0
        for batch in micro_batches(episodes, cfg.micro_batch_tokens):
            loss = -sampled_stats(policy, batch)[0].sum() / tokens
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(policy.weights, cfg.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{total:.3f}", refresh=False)
    return policy.model, policy.tokenizer


# ------------------------------------------------------------------------------ 6. training
def train_step(policy, optimizer, environments, cfg, step):
    """One step of the algorithm. Step 0 measures the starting policy and trains nothing.
    Returns: (trajectories, metrics).
    """
    start = time.perf_counter()
    trajectories, sampled = sample_batch(policy, environments, cfg, step)
    rolled_out = time.perf_counter()
    advantages = assign_credit(trajectories, cfg)  # A (R,)
    alphas = modulate(trajectories, cfg, step)  # alpha (R,), of mean 1 in each G
    for r, A, alpha in zip(responses_of(trajectories), advantages.tolist(), alphas.tolist()):
        r.alpha = alpha
        r.advantage = alpha * A  # A_AEM
    metrics = {"step": step} | batch_metrics(trajectories, sampled, cfg)
    if step > 0:
        metrics |= update(policy, optimizer, trajectories, cfg, step)
    metrics["rollout_seconds"] = rolled_out - start
    metrics["update_seconds"] = time.perf_counter() - rolled_out
    return trajectories, metrics


def gated_share(trajectories, min_range):
    """Share of groups of a task, whatever the scope, whose H_bar span less than AEM's gate."""
    h_bars = {}
    for t in trajectories:
        if not t.masked:
            h_bars.setdefault(t.group, []).extend(r.h_bar for r in t.responses)
    spans = [max(h_bar) - min(h_bar) for h_bar in h_bars.values() if h_bar]
    return fmean(span < min_range for span in spans) if spans else None


def equal_share(trajectories):
    """Share of groups in which all advantages are 0: there is nothing to learn from them."""
    groups = {t.group for t in trajectories}
    varied = {t.group for t in trajectories if any(r.advantage for r in t.responses)}
    return 1 - len(varied) / len(groups)


def batch_metrics(trajectories, sampled, cfg):
    """Means over all `sampled` trajectories; alphas, signs and masks of those to train on."""
    responses, trained = responses_of(sampled), responses_of(trajectories)
    mass = sum(abs(r.advantage) for r in trained)
    metrics = {
        "success": fmean(t.success for t in sampled),
        "reward": fmean(t.reward for t in sampled),
        "response_entropy": fmean(sum(r.entropy) for r in responses),  # estimates H_resp
        "token_entropy": fmean(h for r in responses for h in r.entropy),
        "alpha_min": min(r.alpha for r in trained),
        "alpha_max": max(r.alpha for r in trained),
        "negative": fmean(r.advantage < 0 for r in trained),  # share that is pushed down
        "negative_mass": sum(max(-r.advantage, 0) for r in trained) / mass if mass else None,
        "gated_groups": gated_share(trajectories, cfg.min_range),
        "turns": fmean(len(t.responses) for t in sampled),
        "response_tokens": fmean(len(r.logp) for r in responses),
        "invalid_actions": fmean(sum(r.invalid for r in t.responses) for t in sampled),
        "invalid_share": fmean(r.invalid for r in responses),
        "truncated": sum(t.truncated for t in sampled),
        "overlong": sum(t.penalty > 0 for t in sampled),
        "masked": sum(t.masked for t in trajectories),
        "env_errors": sum(t.error != "" for t in sampled),
        "groups": len({t.group for t in sampled}),
        "equal_groups": equal_share(trajectories),
        "dropped_groups": len({t.group for t in sampled} - {t.group for t in trajectories}),
    }
    return {name: value for name, value in metrics.items() if value is not None}


def evaluate(policy, environments, cfg):
    """One sampled rollout of each evaluation task, with the same random numbers each time.
    Returns: (trajectories, metrics).
    """
    start = time.perf_counter()
    available = getattr(environments[0], "evaluation_tasks", None) or math.inf
    tasks = min(cfg.eval_tasks, available)
    seeds = range(envs.HELD_OUT, envs.HELD_OUT + tasks)
    size = cfg.groups * cfg.group_size
    played = []
    for first in range(0, tasks, size):
        batch = seeds[first : first + size]
        played += rollout(policy, environments, batch, 1, cfg, "eval", first)
    check_crashes(played, cfg)
    kinds = sorted({t.task_type for t in played if t.task_type})
    return played, {
        "eval_success": fmean(t.success for t in played),
        "eval_tasks": len(played),
        "eval_errors": sum(t.error != "" for t in played),
        "eval_invalid": fmean(r.invalid for r in responses_of(played)),
        "eval_by_type": {k: fmean(t.success for t in played if t.task_type == k) for k in kinds},
        "eval_seconds": time.perf_counter() - start,
    }


def readable(trajectories, step):
    """The best and the worst trajectory of the group with the largest alpha, as text."""
    widest = max(trajectories, key=lambda t: max((r.alpha for r in t.responses), default=0.0))
    group = [t for t in trajectories if t.group == widest.group]
    if len(group) == 1:  # an evaluation, without groups: the best and the worst of all
        group = trajectories
    best = max(group, key=lambda t: (t.success, t.reward))
    worst = min(group, key=lambda t: (t.success, t.reward))
    lines = []
    for t in [best] if best is worst else [best, worst]:
        outcome = "success" if t.success else "failure"
        numbers = f"reward {t.reward:.1f} after {len(t.responses)} turns"
        lines += [f"=== step {step}, {t.task_type} task, {outcome}, {numbers}", t.prompt]
        for r in t.responses:
            first, *rest = r.text.split("\n")
            numbers = f"H_bar {r.h_bar:.2f}  alpha {r.alpha:.2f}  advantage {r.advantage:+.2f}"
            lines.append(f"  > {first:<40} {numbers}")
            lines += [f"    {line}" for line in rest]
            lines.append(r.observation)
        lines.append(t.error)
    return "\n".join(lines) + "\n"


def plot_curves(run, rows):
    """Draw curves.png from the rows of metrics.jsonl."""
    from matplotlib.figure import Figure  # pip install matplotlib

    panels = {
        "Success (share of trajectories)": {"success": "training", "eval_success": "evaluation"},
        "Response entropy (nats)": {"response_entropy": "mean over responses"},
        "AEM's coefficient alpha": {"alpha_max": "largest", "alpha_min": "smallest"},
    }
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    for axis, (title, lines) in zip(figure.subplots(1, 3), panels.items()):
        for name, label in lines.items():
            points = [(row["step"], row[name]) for row in rows if name in row]
            if points:
                axis.plot(*zip(*points), ".-" if name == "eval_success" else "-", label=label)
                axis.legend()
        axis.set(title=title, xlabel="training step", ylim=(0, None))
    figure.savefig(run / "curves.png", dpi=120)


FIRST_STEPS = 3  # that tell whether there is anything to learn from


def warn_without_signal(run):
    """Say so if advantages or actions of the first steps leave hardly anything to learn from."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    rows = [row for row in rows if "invalid_share" in row]
    names = ("equal_groups", "invalid_share", "success")
    equal, invalid, success = [fmean(row[name] for row in rows) for name in names]
    if success < 0.5 and max(equal, invalid) >= 0.9:
        tqdm.write(
            f"warning: so far all advantages are 0 in {equal:.0%} of the groups, and {invalid:.0%} "
            f"of the actions are invalid: there is hardly anything to learn from. {REMEDIES}"
        )


def report(run, rows, seconds, held_out):
    """Print success before and after, with the 95 % interval of the last (Wilson, 1927)."""
    rows = [row for row in rows if "eval_success" in row]
    before, after = [{"all": r["eval_success"], **r["eval_by_type"]} for r in (rows[0], rows[-1])]
    title = "held-out success" if held_out else "evaluation success"
    print(f"{title:<20}{'before':>8}{'after':>8}")
    for kind, success in after.items():
        print(f"{kind:<20}{before.get(kind, math.nan):>8.1%}{success:>8.1%}")
    n, p, z = rows[-1]["eval_tasks"], rows[-1]["eval_success"], 1.96
    middle = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
    interval = f"{middle - half:.1%} to {middle + half:.1%}"
    print(f"95 % interval of the last: {interval} ({n} tasks)")
    if "eval_invalid" in rows[-1]:
        print(f"invalid actions in the last evaluation: {rows[-1]['eval_invalid']:.1%}")
    print(f"{seconds:.0f} s in all; look at trajectories.txt in {run}")


# ------------------------------------------------------------------------------ 7. the run
LOGS = ("metrics.jsonl", "trajectories.txt")
MAY_CHANGE = {"steps", "eval_every", "eval_tasks", "save_every", "resume", "out", "name", "wandb"}
MAY_CHANGE |= {"cache_dir", "env_timeout", "micro_batch_tokens", "max_resample"}
SHOWN = ("success", "reward", "response_entropy", "alpha_min", "alpha_max", "eval_success")


def rank_and_world():
    """This process's number, and how many there are: (0, 1) without torchrun.
    Data parallel: all hold the whole policy, and all trajectories of a batch. Each rolls out its
    part of these, and computes the gradients of its part of the micro-batches.
    """
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def gather(value):
    """The `value` of every process, in order of rank."""
    values = [value] * rank_and_world()[1]
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


def open_run(cfg):
    """The run's folder: a new one, or the one to resume. Raises UsageError."""
    stem = f"{cfg.env.replace(':', '.')}-{cfg.estimator}{'-aem' if cfg.aem else ''}-seed{cfg.seed}"
    begun = [run for run in Path(cfg.out).glob(f"{stem}-*") if checkpoints(run)]
    number = 1
    while (Path(cfg.out) / f"{stem}-{number}").exists():
        number += 1
    run = Path(cfg.out) / (cfg.name or f"{stem}-{number}")
    if cfg.resume and begun and not cfg.name:
        run = max(begun, key=lambda run: (run / "checkpoints").stat().st_mtime)
    try:
        run.mkdir(parents=True, exist_ok=cfg.resume == "auto")
    except OSError as error:
        remedy = "choose another --out or --name, or --resume auto"
        raise UsageError(f"cannot make the run's folder {run} ({error}): {remedy}") from error
    return run


def check_same(run, cfg):
    """Raises UsageError if a run to be resumed has other settings in anything that matters."""
    try:
        then = json.loads((run / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f"{run / 'config.json'} can't be read ({error})") from error
    known = {k: v for k, v in then.items() if k in vars(cfg)}
    before = Config(**known | {"wandb": ""})  # of an earlier aem.py it may lack some settings
    before.check()
    cfg.lr = before.lr if cfg.lr is None else cfg.lr
    cfg.date = cfg.date or before.date
    if cfg.max_length == Config.max_length:
        cfg.max_length = before.max_length  # the model's own limit, perhaps
    differ = [k for k, v in vars(cfg).items() if k not in MAY_CHANGE and v != getattr(before, k)]
    if differ:
        raise UsageError(f"{run} has another --{', --'.join(differ)}: use its, or another --name")


def checkpoints(run):
    """The run's checkpoints, the oldest first."""
    return sorted((run / "checkpoints").glob(f"step-{6 * '[0-9]'}.pt"))


@contextmanager
def written(path):
    """What libraries make of a full disk becomes an OSError again."""
    try:
        yield
    except (RuntimeError, SafetensorError) as error:
        raise OSError(f"cannot write {path}, is the disk full? {error}") from error


def save_checkpoint(run, policy, optimizer, step):
    """All that later steps depend on, as random numbers hang on seed and step alone."""
    named = policy.model.named_parameters()  # a tied head is there once
    state = {
        "step": step,
        "weights": {name: p.data for name, p in named if p.requires_grad},
        "optimizer": optimizer.state_dict(),
        "logs": {name: (run / name).read_bytes().decode() for name in LOGS},  # as it is: with \r
    }
    new = run / "checkpoints" / f"step-{step:06}.pt"
    new.parent.mkdir(exist_ok=True)
    with written(new):
        torch.save(state, new.with_suffix(".partial"))
    new.with_suffix(".partial").rename(new)  # complete, or not there at all
    for old in checkpoints(run)[:-2]:
        old.unlink()


def load_checkpoint(run, policy, optimizer):
    """Go back to the newest checkpoint, with the logs as they were then.
    Returns: the next step, 0 if there is no checkpoint. Raises UsageError for a broken one.
    """
    state = {"step": -1, "logs": dict.fromkeys(LOGS, "")}
    if checkpoints(run):
        newest = checkpoints(run)[-1]
        try:
            state = torch.load(newest, map_location="cpu")  # what follows moves what must move
            policy.model.load_state_dict(state["weights"], strict=False)  # the others are frozen
            optimizer.load_state_dict(state["optimizer"])
        except Exception as error:  # whatever a broken file makes of unpickling
            remedy = "remove it, and the run goes on from the one before"
            raise UsageError(f"{newest} is broken ({error}): {remedy}") from error
    if rank_and_world()[0] == 0:
        for name, text in state["logs"].items():
            (run / name).write_bytes(text.encode())
    return state["step"] + 1


def export(run, policy):
    """The model as `save_pretrained` writes it: what --model and transformers load. Weights that
    are not finite any more don't take the place of earlier ones.
    """
    if rank_and_world()[0] == 0 and all(p.isfinite().all() for p in policy.weights):
        with written(run / "checkpoint"):
            policy.model.save_pretrained(run / "checkpoint")
            policy.tokenizer.save_pretrained(run / "checkpoint")
    gather(None)  # nobody leaves before it is written


def record(run, row, trajectories, cfg):
    """Append a step to the run's files."""
    with open(run / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    with open(run / "trajectories.txt", "a", encoding="utf-8", errors="backslashreplace") as file:
        file.write(readable(trajectories, row["step"]) if "eval_success" in row else "")
    if cfg.steps > 0 and row["step"] == min(FIRST_STEPS, cfg.steps):
        warn_without_signal(run)
    errors = [t.error for t in trajectories if t.error]
    if errors and not (run / "env_error.txt").exists():
        (run / "env_error.txt").write_text(errors[0], "utf-8", "backslashreplace")
    if row.get("updates") == 0:
        why = "no gradient is finite" if row["skipped_updates"] else "no advantage differs from 0"
        tqdm.write(f"step {row['step']}: no update, as {why}")
    if cfg.wandb:
        import wandb

        wandb.log(row, step=row["step"])


@contextmanager
def caught_signals():
    """A list of the SIGINTs and SIGTERMs received inside; a second one ends the run at once."""
    received = []
    before = {}  # the handlers

    def restore():
        for number, handler in before.items():
            signal.signal(number, handler)

    def receive(number, frame):
        received.append(number)
        restore()

    if threading.current_thread() is threading.main_thread():  # others can't catch any
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, receive)
    try:
        yield received
    finally:
        restore()


def set_up(cfg):
    """Join the other processes, load everything. Returns: (run's folder, environments, policy)."""
    if "LOCAL_RANK" in os.environ and not dist.is_initialized():
        if cfg.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "cpu:gloo,cuda:nccl" if cfg.device == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=datetime.timedelta(days=7))  # imitation is slow
        atexit.register(time.sleep, 0.1)  # gloo's threads abort a process that ends before them
    leads = rank_and_world()[0] == 0
    run = gather(open_run(cfg) if leads else None)[0]
    try:
        environments = make_environments(cfg)
        if checkpoints(run):
            check_same(run, cfg)
        cfg.date = cfg.date or time.strftime("%Y-%m-%d")
        source = cfg.model
        if cfg.model == "tiny" or cfg.warm_steps:
            source = gather(warm_start(environments[0], cfg) if leads else None)[0]
        policy = load_policy(cfg, source)
        if cfg.rule.kl:
            policy.reference = load_policy(cfg, source)
    except BaseException as error:
        if leads and not any(run.iterdir()):
            run.rmdir()
        if isinstance(error, ValueError | OSError | envs.SandboxError):
            raise UsageError(error) from error
        raise
    if cfg.lr is None:
        adapters = any(not p.requires_grad for p in policy.model.parameters())
        small = policy.model.num_parameters() < 1e7
        cfg.lr = 1e-5 if adapters else 7e-4 if small else 1e-6
    if leads:
        (run / "config.partial").write_text(json.dumps(vars(cfg), indent=2))
        (run / "config.partial").rename(run / "config.json")
    if leads and cfg.wandb:
        import wandb

        wandb.init(project=cfg.wandb, name=run.name, config=vars(cfg))
    return run, environments, policy


def one_step(policy, optimizer, environments, cfg, step):
    """A training step, and an evaluation when it is due. Returns: (trajectories, metrics)."""
    trajectories, metrics = [], {"step": step}
    if cfg.steps > 0:
        trajectories, metrics = train_step(policy, optimizer, environments, cfg, step)
    if step % cfg.eval_every == 0 or step == cfg.steps:
        evaluated, more = evaluate(policy, environments, cfg)
        trajectories = trajectories or evaluated
        metrics |= more
    return trajectories, metrics


def train(cfg):
    """Train a policy; everything lands in the run's folder. Returns: the rows of metrics.jsonl.
    Raises UsageError. After SIGINT or SIGTERM it saves, and exits with 130 or 143.
    """
    start = time.perf_counter()
    cfg.check()
    transformers.utils.logging.disable_progress_bar()
    run, environments, policy = set_up(cfg)
    optimizer = torch.optim.AdamW(policy.weights, lr=cfg.lr, weight_decay=0.0)
    begin_at = load_checkpoint(run, policy, optimizer) if cfg.resume else 0
    stop = 0
    leads = rank_and_world()[0] == 0
    bar = tqdm(initial=begin_at, total=cfg.steps + 1, desc=run.name, disable=not leads)
    with caught_signals() as received, bar:
        for step in range(begin_at, cfg.steps + 1):
            try:
                trajectories, row = one_step(policy, optimizer, environments, cfg, step)
            except UsageError:  # too little that varies, too many crashes: what was learned stays
                export(run, policy)
                raise
            stop = max(gather(max(received, default=0)))
            if leads:
                record(run, row, trajectories, cfg)
                if step and (step % cfg.save_every == 0 or step == cfg.steps or stop):
                    save_checkpoint(run, policy, optimizer, step)
            shown = {name: f"{row[name]:.3g}" for name in SHOWN if name in row}
            bar.set_postfix(shown, refresh=False)
            bar.update()
            if stop:
                break
    gather(None)  # until all is recorded
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    if cfg.steps > 0:
        export(run, policy)
    if leads:
        held_out = getattr(environments[0], "held_out", False)  # else other seeds of the same tasks
        report(run, rows, time.perf_counter() - start, held_out)
        plot_curves(run, rows)
    gather(None)  # nobody leaves before: torchrun would end the others
    if stop:
        print(f"stopped: --name {run.name} --resume auto goes on", file=sys.stderr)
        sys.exit(128 + stop)
    return rows


def main():
    """The command line: one flag for each field of Config."""
    texts = {"description": __doc__.split("\n\n")[1], "usage": "aem.py [--flag value]"}
    parser = transformers.HfArgumentParser(Config, allow_abbrev=False, **texts)
    cfg, unknown = parser.parse_args_into_dataclasses(return_remaining_strings=True)
    try:
        if unknown:
            raise UsageError(f"unknown flag {unknown[0]}: python aem.py --help lists them all")
        train(cfg)
        return
    except (UsageError, envs.SandboxError, OSError, ImportError) as error:
        message = error
        if os.path.isdir(cfg.out) and shutil.disk_usage(cfg.out).free < 2**20:
            message = f"the disk of --out {cfg.out} is full ({error})"
    except KeyboardInterrupt:  # before the first step, or the second one
        sys.exit(130)
    except torch.OutOfMemoryError as error:
        less = "lower --micro_batch_tokens, --groups or --max_length, or use --lora_rank 16"
        message = f"the GPU's memory is full: {less} ({error})"
    print(f"aem.py: error: {message}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
