"""AEM: Adaptive Entropy Modulation for multi-turn agentic RL (arXiv:2605.00425), in one file.

An LLM agent acts over many turns and gets one sparse reward at the end. AEM asks how uncertain the policy was over each
complete *response* and rescales that response's advantage: entropy rises while failures dominate, and falls once successes
do. No extra model, reward or forward pass: the entropies are by-products of sampling.

    python aem.py                                      # a tiny policy learns a household game on a CPU, in minutes
    python aem.py --aem false                          # the same without AEM: plain GRPO
    python aem.py --estimator dapo                     # AEM on another base estimator
    python aem.py --env code                           # it writes programs, which a sandbox runs
    python aem.py --model Qwen/Qwen2.5-1.5B-Instruct   # the same code on a GPU

Shapes: N trajectories, R responses, n sampled tokens, B rows, T positions, D hidden size, V vocabulary. Entropy is in nats.
"""

import atexit
import contextlib
import functools
import hashlib
import importlib.util
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
import warnings
from collections import Counter, defaultdict
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean

import jinja2  # comes with torch
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import transformers
from torch.distributed import fsdp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_state_dict, set_state_dict
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import envs


class UsageError(ValueError):
    """What the user can fix: one sentence that names the flag or file, and the fix. The command exits with code 2."""


def flag(default, text):
    return field(default=default, metadata={"help": text})


@dataclass
class Config:
    """Everything a run depends on; each field is a flag of the same name."""

    model: str = flag("tiny", "the policy pi: 'tiny' (embedded, no download), a hub id, a folder, or an earlier run's folder")
    env: str = flag("household", "environment: 'household', 'code', gem:NAME for one of GEM's, or module:Class for your own")
    dataset: str = flag("", "tasks for --env code: openai/openai_humaneval, google-research-datasets/mbpp, or a JSONL file")
    estimator: str = flag("grpo", "base advantage A and its loss: a row of ESTIMATORS")
    aem: bool = flag(True, "multiply each response's advantage by AEM's alpha; 'false' gives the plain baseline")
    lam: float = flag(1.0, "lambda, strength of the modulation: max alpha / min alpha <= e^lambda; 0 turns it off")
    min_range: float = flag(0.1, "gate: alpha = 1 in a group whose H_bar spans less than this, in nats")
    aem_direction: str = flag("normal", "ablations: 'reverse' turns H~ into 1 - H~, 'shuffle' permutes the alphas of a group")
    aem_scope: str = flag("group", "whose H_bar are normalised together: each 'group's, each 'trajectory's, or the 'batch's")
    mask_drift: str = flag("off", "train only on responses that should 'raise' entropy (A (alpha - 1) < 0) or 'lower' it (> 0)")
    # From here to gamma: by default what the estimator's row says.
    advantage: str | None = flag(None, "A of a trajectory from the rewards of its group: a row of ADVANTAGES")
    loss_mean: str | None = flag(None, "over what the loss per token is averaged: a row of LOSS_MEANS")
    clip_low: float | None = flag(None, "epsilon_low: ratios are clipped at 1 - epsilon_low")
    clip_high: float | None = flag(None, "epsilon_high: and at 1 + epsilon_high")
    sequence_ratio: bool | None = flag(None, "one ratio per trajectory instead of one per token")
    max_resample: int | None = flag(None, "replace groups whose rewards are all equal, by so many further draws at most; or 0")
    overlong: float | None = flag(None, "soft overlong penalty, up to 1, on this last share of --max_response_tokens")
    compact_filtering: bool | None = flag(None, "don't train on trajectories that hit a limit; their reward stays in baselines")
    step_weight: float | None = flag(None, "w in A = A_episode + w A_step, which compares returns after equal observations")
    gamma: float | None = flag(None, "discount of the returns in A_step")
    kl_coef: float = flag(0.0, "weight of the KL divergence (k3) from the starting policy, per token")
    steps: int = flag(100, "training steps, each a rollout batch and its update")
    groups: int = flag(16, "tasks per step; the rollouts of one task are a group G")
    group_size: int = flag(8, "rollouts of each task; a group of one has no baseline")
    max_turns: int | None = flag(None, "responses per trajectory at most; by default 12 in household, 3 in code")
    max_response_tokens: int | None = flag(None, "tokens per response at most; by default 16 in household, 24 or 512 in code")
    max_length: int = flag(4096, "tokens per trajectory at most, prompt and observations included")
    env_timeout: float | None = flag(None, "seconds that a step may take; by default 60 in environments of others, or 0: any")
    system: str | None = flag(None, "system prompt; by default the environment's instructions")
    action_tag: str = flag("", "'action': the environment gets what stands between <action> and </action>; the prompt says so")
    temperature: float = flag(1.0, "sampling temperature; pi, entropies and log-probs are meant at it")
    lr: float | None = flag(None, "AdamW's learning rate; by default 7e-4 below 10 M parameters, 1e-5 for LoRA, else 1e-6")
    lora_rank: int = flag(0, "train adapters of this rank, by peft, instead of all weights: for a single small GPU; or 0")
    epochs: int = flag(1, "passes of the update over one rollout batch")
    minibatches: int = flag(2, "optimizer steps per pass")
    max_grad_norm: float = flag(1.0, "gradients are clipped to this global norm")
    micro_batch_tokens: int = flag(8192, "tokens, padding included, per forward of update and prompts: memory, not results")
    gradient_checkpointing: bool | None = flag(None, "recompute activations in backward; by default on a GPU only")
    device: str = flag("auto", "'cpu', 'cuda', ...; 'auto' takes a GPU if there is one")
    dtype: str = flag("auto", "of matrix products: 'bfloat16', by default on a GPU, or 'float32'; weights are float32")
    compile: bool = flag(False, "torch.compile the model: a minute or more at the start, fewer and larger kernels from then on")
    recompute_old_logps: bool = flag(False, "old log-probs by a forward of the update's own, not as sampled: for bfloat16's gap")
    seed: int = flag(0, "seed of tasks, sampling and minibatches; on one CPU, the same seed gives the same metrics")
    eval_every: int = flag(20, "steps between evaluations; there is one before the first step and after the last too")
    eval_tasks: int = flag(256, "held-out tasks per evaluation, one rollout of each at --temperature")
    save_every: int = flag(20, "steps between checkpoints; there is one after the last step and after Ctrl-C or SIGTERM too")
    keep: int = flag(2, "checkpoints that stay: the newest")
    resume: str = flag("", "'auto' goes on with the newest run in --out that was begun under this name, if there is one")
    track: str = flag("", "send metrics to 'tensorboard' or 'wandb' too")
    out: str = flag("runs", "folder that holds the runs")
    name: str = flag("", "the run's folder in --out; by default after env, estimator and seed, numbered")
    warm_steps: int = flag(1000, "behaviour-cloning steps that warm-start the 'tiny' policy")
    warm_noise: float = flag(0.35, "share of random actions in its demonstrations")
    cache_dir: str = flag("~/.cache/aem", "folder where warm starts are kept for the next run")

    def check(self):
        """Settle what is None or 'auto'. Raise UsageError for the first value that can't work, before anything expensive."""
        tables = {"estimator": ESTIMATORS, "advantage": ADVANTAGES, "loss_mean": LOSS_MEANS}
        tables |= {"aem_direction": ("normal", "reverse", "shuffle"), "aem_scope": ("group", "trajectory", "batch")}
        tables |= {"mask_drift": ("off", "raise", "lower"), "dtype": ("auto", "float32", "bfloat16"), "resume": ("", "auto")}
        tables |= {"track": ("", "tensorboard", "wandb")}
        for name, known in tables.items():
            if getattr(self, name) not in (None, *known):
                raise UsageError(f"unknown --{name} {getattr(self, name)!r}: use one of {', '.join(filter(None, known))}")
        for name, value in ESTIMATORS[self.estimator].items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        least = dict.fromkeys("groups max_turns max_response_tokens max_length epochs minibatches micro_batch_tokens".split(), 1)
        least |= {"eval_every": 1, "eval_tasks": 1, "save_every": 1, "keep": 1, "group_size": 2, "temperature": 0.01}
        most = dict.fromkeys(("warm_noise", "overlong", "gamma", "clip_low"), 1)
        for name, value in vars(self).items():  # all other numbers: 0 or more
            low, high = least.get(name, 0), most.get(name, sys.float_info.max)
            if isinstance(value, int | float) and not low <= value <= high:
                bound = " and at most 1" if high == 1 else " and finite" if value > high else ""
                meaning = type(self).__dataclass_fields__[name].metadata["help"]
                raise UsageError(f"--{name} must be at least {low}{bound}, not {value} ({meaning})")
        if self.mask_drift != "off" and not self.aem:
            raise UsageError("--mask_drift chooses responses by their alpha: it needs --aem true")
        if self.dataset and (self.env != "code" or self.model == "tiny"):
            raise UsageError("--dataset is for --env code, with a --model: 'tiny' knows the embedded tasks only")
        for name, package in (("lora_rank", "peft"), ("track", self.track)):
            if getattr(self, name) and importlib.util.find_spec(package) is None:
                raise UsageError(f"--{name} {getattr(self, name)} needs a further package: pip install {package}")
        if self.compile and not any(map(shutil.which, ("c++", "g++", "clang++", os.environ.get("CXX", "")))):
            raise UsageError("--compile true needs a C++ compiler: install g++ or set CXX")
        if re.search(r"\W", self.action_tag):
            raise UsageError(f"--action_tag {self.action_tag} must be a word, like 'action' for <action>...</action>")
        if self.env_timeout is None:
            self.env_timeout = 0.0 if self.env in envs.ENVS else 60.0
        self.device = ("cuda" if torch.cuda.is_available() else "cpu") if self.device == "auto" else self.device
        self.dtype = ("float32" if self.device == "cpu" else "bfloat16") if self.dtype == "auto" else self.dtype


# ---------------------------------------------------------------- 1. the method: pure functions of tensors
def token_stats(logits, ids):
    """Log-probability log pi(y_l | s, y_<l) of the given tokens, and entropy H_tok = -sum_v pi(v) log pi(v).

    Args: logits (..., V) floats, already divided by the temperature, -inf allowed; ids (...) integers.
    Returns: (logp, entropy), two tensors (...) of float32 or better, in nats. No gradient flows through the entropy.
    >>> token_stats(torch.zeros(2), torch.tensor(1))  # a fair coin: log 1/2 and log 2
    (tensor(-0.6931), tensor(0.6931))
    """
    log_p = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)  # (..., V)
    logp = log_p.gather(-1, ids.unsqueeze(-1)).squeeze(-1)  # (...)
    log_p = log_p.detach().clamp_min(torch.finfo(log_p.dtype).min)  # subtle: else an impossible token gives 0 * -inf = NaN
    return logp, -(log_p.exp() * log_p).sum(-1)


def per_group(function, values, group):
    """`function` of each group's own values, a number or one per value: (n,) floats and (n,) integers -> (n,) floats."""
    result = torch.zeros_like(values)
    for g in group.unique():
        member = group == g
        result[member] = function(values[member])
    return result


def aem_coefficients(entropy, group, lam=1.0, min_range=0.1, direction="normal", generator=None):
    """AEM's coefficient of each response: within a group, confident responses count more and uncertain ones less.

    H~ = (H_bar - min_G H_bar) / (max_G H_bar - min_G H_bar);  alpha = exp(-lam H~) / mean_G exp(-lam H~), so mean_G alpha = 1.
    A group whose H_bar spans less than `min_range` nats holds nothing but noise: alpha = 1. Ablations: `direction` 'reverse'
    takes 1 - H~ for H~, 'shuffle' permutes the alphas of each group by `generator`.
    Args: entropy (R,), H_bar of each response; group (R,) integers, its task. Returns: alpha (R,).
    >>> aem_coefficients(torch.tensor([0.2, 1.2]), torch.tensor([0, 0]))
    tensor([1.4621, 0.5379])
    """
    low, high = (per_group(extreme, entropy, group) for extreme in (torch.min, torch.max))  # (R,) each
    normalised = (high - entropy if direction == "reverse" else entropy - low) / (high - low)  # H~
    weight = torch.exp(-lam * normalised)
    if direction == "shuffle":
        weight = per_group(lambda w: w[torch.randperm(len(w), generator=generator)], weight, group)
    alpha = weight / per_group(torch.mean, weight, group)  # note: sum_G alpha A is in general not sum_G A
    return torch.where((high - low >= min_range) & (high > low), alpha, 1.0)


ADVANTAGES = {  # (G,) rewards of a group, not all equal -> (G,) advantages
    "standardised": lambda r: (r - r.mean()) / (r.std() + 1e-6),
    "centred": lambda r: r - r.mean(),
    "leave-one-out": lambda r: (r - r.mean()) * len(r) / (len(r) - 1),  # R - mean of the others
}
LOSS_MEANS = {  # (N,) trained tokens of each trajectory, most that one can have -> (N,) weight of each of its tokens
    "trajectory": lambda tokens, most: 1 / (tokens.count_nonzero() * tokens),  # mean over trajectories of their token mean
    "token": lambda tokens, most: (1 / tokens.sum()).expand_as(tokens),  # mean over all tokens
    "constant": lambda tokens, most: torch.full_like(tokens, 1 / most) / len(tokens),  # the same whatever is sampled
}
GRPO = dict(
    advantage="standardised", loss_mean="trajectory", clip_low=0.2, clip_high=0.2, sequence_ratio=False,
    max_resample=0, overlong=0.0, compact_filtering=False, step_weight=0.0, gamma=0.95,
)  # fmt: skip
ESTIMATORS = {  # how each differs from GRPO; flags override it. None has an entropy bonus, a dual clip or, by itself, a KL term
    "grpo": GRPO,
    "dr_grpo": GRPO | dict(advantage="centred", loss_mean="constant"),
    "rloo": GRPO | dict(advantage="leave-one-out", loss_mean="token"),
    "dapo": GRPO | dict(loss_mean="token", clip_high=0.28, max_resample=20, overlong=0.2),
    "gspo": GRPO | dict(clip_low=3e-4, clip_high=4e-4, sequence_ratio=True),
    "grpo++": GRPO | dict(advantage="leave-one-out", loss_mean="constant", clip_high=0.28, compact_filtering=True),
    "gigpo": GRPO | dict(loss_mean="token", step_weight=1.0),
}


def group_advantages(rewards, group, advantage="standardised"):
    """Advantage of each reward against the others of its group; where they are all equal, exactly 0.

    Statistics run over trajectories, not over their turns: rewards (N,) floats; group (N,) integers. Returns: (N,).
    >>> group_advantages(torch.tensor([1.0, 0.0, 0.0, 0.0]), torch.zeros(4, dtype=torch.long))
    tensor([ 1.5000, -0.5000, -0.5000, -0.5000])
    """
    advantage = ADVANTAGES[advantage]  # subtle: for equal rewards, dividing by std + eps would give rounding noise
    result = per_group(lambda r: advantage(r) if r.max() > r.min() else torch.zeros_like(r), rewards.double(), group)
    return result.to(rewards.dtype)


def clipped_loss(logp, old_logp, advantage, clip_low, clip_high):
    """PPO's loss per token, max(-A r, -A clip(r, 1 - low, 1 + high)), r = pi / pi_old, and where the clip acts: two (n,)."""
    ratio = torch.exp(logp - old_logp)
    plain, clipped = -advantage * ratio, -advantage * ratio.clamp(1 - clip_low, 1 + clip_high)
    return torch.maximum(plain, clipped), clipped > plain


def entropy_drift(logits, advantages):
    """The entropy-drift theorem: what a natural-gradient step does to the entropy H of a distribution over K responses.

    A sampled response changes it by A (S - H), S = -log pi; all together by the expectation. Nats per unit of step size.
    Args: logits, advantages (..., K). Returns: (drift of each response (..., K), expected drift (...)).
    >>> entropy_drift(torch.tensor([1.0, 0.0]), torch.tensor([1.0, -1.0]))  # the likelier of the two is the better one
    (tensor([-0.2689, -0.7311]), tensor(-0.3932))
    """
    logp = logits.log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1, keepdim=True)
    drift = advantages * (-logp - entropy)
    return drift, (logp.exp() * drift).sum(-1)


# ---------------------------------------------------------------- 2. the policy: a causal LM and its chat template
LOGITS_AT_ONCE = 2**26  # that an update holds: 256 MB in float32, and twice that for gradients


class Policy:
    """A causal LM with its tokenizer. Ids are appended, never encoded again. Rollout and update read the same weights."""

    def __init__(self, model, tokenizer, temperature=1.0, dtype="float32"):
        self.model, self.tokenizer, self.temperature = model, tokenizer, temperature
        self.body, self.head = getattr(model, "sharded", None) or (model.get_decoder(), model.get_output_embeddings())
        self.device = model.device
        self.precision = torch.promote_types(model.dtype, torch.float32)  # of logits
        self.chunk = max(1, LOGITS_AT_ONCE // model.get_output_embeddings().out_features)  # positions for the head at once
        self.reference = None  # for a KL term: the starting policy, frozen
        self.autocast = functools.partial(torch.autocast, self.device.type, torch.bfloat16, dtype == "bfloat16")
        self.frame, self.end = chat_frame(tokenizer)
        self.ends = {self.end, tokenizer.eos_token_id}
        special = [re.escape(token.content) for token in tokenizer.added_tokens_decoder.values() if token.special]
        self.plain = functools.partial(re.compile("|".join(special) or "(?!)").sub, " ")  # text that can't open or end a turn
        self.encode = functools.lru_cache(4096)(lambda text: tokenizer(text, add_special_tokens=False).input_ids)
        for module in model.modules():  # sampling and training must see the same distribution: no dropout
            for name in {"p", "attention_dropout"} & vars(module).keys():
                setattr(module, name, 0.0)

    def hidden(self, ids, **kwargs):  # (B, T) -> (B, T, D), final hidden states
        with self.autocast():
            return self.body(input_ids=ids, **kwargs).last_hidden_state

    def logits(self, hidden):  # (..., D) -> (..., V), at the sampling temperature
        with self.autocast():
            logits = self.head(hidden).to(self.precision)  # the largest tensor of all: no needless copy
            return logits if self.temperature == 1 else logits / self.temperature

    def opening(self, instructions, observation):
        """Ids of a conversation up to the first response: the chat template, rendered once."""
        render = functools.partial(self.tokenizer.apply_chat_template, add_generation_prompt=True, tokenize=False)
        user = [{"role": "user", "content": self.plain(observation)}]
        try:
            text = render([{"role": "system", "content": instructions}, *user] if instructions else user)
        except jinja2.TemplateError:  # Gemma's template has no system role
            text = render([{"role": "user", "content": f"{instructions}\n\n{user[0]['content']}"}])
        return self.encode(text)[:]

    def answer(self, observation, ended):
        """Ids that the template adds for an observation, after closing the agent's turn if no sampled token `ended` it."""
        ids = self.encode(self.frame[0] + self.plain(observation).strip() + self.frame[1])
        return ids[ids.index(self.end) + 1 :] if ended else ids


# Under torchrun, every process holds all trajectories of a batch. It rolls out its part of them and computes the gradients of its
# part of the micro-batches; credit, alpha and metrics are computed by all alike, as by one. Weights are sharded by FSDP2.
def rank_and_world():
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def gathered(value):
    """The `value` of every process, in order of rank."""
    values = [value] * rank_and_world()[1]
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


def share(batches):
    """This process's part of some batches, (batch, True) each; then (a batch, False), so that all have equally many."""
    (rank, world), batches = rank_and_world(), [(batch, True) for batch in batches]
    return (batches + [(batch, False) for batch, _ in batches[:1]] * (-len(batches) % world))[rank::world]


def shard(model, cfg):
    """Split weights, and with them gradients and optimizer state, among all processes; a layer is gathered when it is used."""
    mesh = dist.init_device_mesh(cfg.device, (dist.get_world_size(),))
    mixed = fsdp.MixedPrecisionPolicy(param_dtype=getattr(torch, cfg.dtype), reduce_dtype=torch.float32)
    for module in (*model.get_decoder().layers, model):
        fsdp.fully_shard(module, mesh=mesh, mp_policy=mixed)
    model.set_reshard_after_backward(False, recurse=False)  # the head runs in chunks, on each process in as many as it needs
    model.run_body, model.run_head = model.get_decoder().__call__, model.get_output_embeddings().__call__
    for name in ("run_body", "run_head"):
        fsdp.register_fsdp_forward_method(model, name)
    model.sharded = model.run_body, model.run_head


@contextlib.contextmanager
def whole_weights(policy):
    """Inside, every process holds all weights, for forwards of its own; after that, its shard."""
    parts = [module for module in policy.model.modules() if isinstance(module, fsdp.FSDPModule)]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    yield
    for part in parts:
        part.reshard()
        part.set_reshard_after_forward(part is not policy.model, recurse=False)


def chat_frame(tokenizer):
    """What the chat template puts between a response and an observation, and from there to the next response.

    Returns: ((before, after), id of the end-of-turn token: the first special one after a response, whatever `eos_token` says).
    Raises ValueError if there is no template, or no such token.
    """
    if not tokenizer.chat_template:
        raise ValueError("its tokenizer has no chat template, use an instruction-tuned model")
    messages = [{"role": r, "content": c} for r, c in (("user", "task"), ("assistant", "<<response>>"), ("user", "<<answer>>"))]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    before, after = text.split("<<response>>")[1].split("<<answer>>")
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    end = [i for i in tokenizer(before, add_special_tokens=False).input_ids if i in special]
    if not end:
        raise ValueError("its chat template ends a response without a special token, use another model")
    return (before, after), end[0]


def add_adapter(model, cfg):
    """Freeze the model but for LoRA adapters, those it came with or new ones."""
    if not getattr(model, "_hf_peft_config_loaded", False):
        from peft import LoraConfig

        torch.manual_seed(cfg.seed)
        model.add_adapter(LoraConfig(r=cfg.lora_rank, lora_alpha=2 * cfg.lora_rank, target_modules="all-linear"))
    for name, weight in model.named_parameters():
        weight.requires_grad_("lora_" in name).data = weight.data.float() if "lora_" in name else weight.data


@torch.no_grad()
def check_forward(policy, max_length):
    """Raises ValueError for a model that this file can't drive: its logits, by our cache, are not what it says itself."""
    config, cache = policy.model.get_decoder().config, SlotCache(2)
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if window and window < max_length and "sliding_attention" in (getattr(config, "layer_types", None) or ["sliding_attention"]):
        raise ValueError(f"some of its layers see only the last {window} tokens: --max_length can be {window} at most")
    rows, gap = [Trajectory(0, None, None, list(range(n))) for n in (8, 5)], 0.0
    try:
        for _ in range(2):  # prompts of different lengths, then a token each
            for t, ours in zip(rows, next_logits(policy, cache, [0, 1], rows)):
                whole = policy.model(torch.tensor([t.ids]), use_cache=False).logits[0, -1].float() / policy.temperature
                gap = max(gap, (ours.softmax(-1) - whole.softmax(-1)).abs().sum().item())
                t.ids.append(1)
    except (AttributeError, TypeError, KeyError, IndexError) as error:
        raise ValueError(f"it is no plain decoder with a key-value cache ({type(error).__name__}: {error})") from None
    if not gap < 0.05:  # bfloat16's rounding is less
        raise ValueError(f"its probabilities are not those of decoder and head alone (they differ by {gap:.2f})")


def load_policy(cfg, path):
    """Load a policy from a hub id, a folder, or an earlier run's folder. Raises UsageError if that can't be done."""
    folder = Path(path) / "checkpoint" if (Path(path) / "checkpoint").is_dir() else path
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        chat_frame(tokenizer)  # a missing chat template shows before gigabytes are read
        dtype = getattr(torch, cfg.dtype) if cfg.lora_rank else torch.float32  # frozen weights need no more
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        if cfg.lora_rank or getattr(model, "_hf_peft_config_loaded", False):
            add_adapter(model, cfg)
        check_forward(Policy(model, tokenizer, cfg.temperature), cfg.max_length)
        model.to(cfg.device) if rank_and_world()[1] == 1 else shard(model, cfg)
    except (OSError, ValueError, RuntimeError, AssertionError, IndexError, jinja2.TemplateError) as error:
        raise UsageError(f"cannot use --model {path} on --device {cfg.device}: {' '.join(str(error).split())[:200]}") from None
    if cfg.gradient_checkpointing or cfg.gradient_checkpointing is None and cfg.device != "cpu":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if cfg.compile:
        torch.compiler.config.recompile_limit = 64  # rollout and update, prompts and single tokens: a dozen graphs
        model.get_decoder().compile(dynamic=True)
    return Policy(model, tokenizer, cfg.temperature, cfg.dtype)


def warm_start(env, cfg):
    """Folder of the embedded policy for this environment, made on first use. Its name covers all it depends on."""
    if not hasattr(env, "demonstration"):
        raise UsageError(f"--model tiny learns from demonstrations, and --env {cfg.env} has none: name a model with --model")
    versions, code = (torch.__version__, transformers.__version__), map(inspect.getsource, (inspect.getmodule(type(env)), envs))
    key = json.dumps([cfg.env, cfg.max_turns, cfg.warm_steps, cfg.warm_noise, *versions, *code])
    folder = Path(cfg.cache_dir).expanduser() / hashlib.sha256(key.encode()).hexdigest()[:16]
    if not (folder / "tokenizer_config.json").exists():
        folder.mkdir(parents=True, exist_ok=True)  # shows before the work if it can't be written
        for part in envs.embedded_policy(env, cfg.warm_steps, cfg.warm_noise):  # the tokenizer last: with it, it is complete
            part.save_pretrained(folder)
    return folder


# ---------------------------------------------------------------- 3. rollout: many trajectories, many turns, one batch
@dataclass
class Response:
    """All tokens the policy sampled in one turn: the action. Recorded while sampling, under the behaviour policy."""

    start: int  # position of its first token in the trajectory
    logp: list[float] = field(default_factory=list)  # old log-prob of each token, nats
    entropy: list[float] = field(default_factory=list)  # H_tok of each token, nats
    text: str = ""
    observation: str = ""  # what the environment answered
    reward: float = 0.0
    alpha: float = 1.0
    advantage: float = 0.0  # A, then alpha * A


@dataclass
class Trajectory:
    """One episode as one token sequence: prompt + response_1 + observation_1 + response_2 + ..."""

    group: int
    env: object
    rng: random.Random  # its own: what it samples does not depend on the rest of the batch
    ids: list[int] = field(default_factory=list)
    responses: list[Response] = field(default_factory=list)
    cached: int = 0  # leading tokens that are in the KV cache
    waits: bool = True  # for its environment: at the start, and when a response has come to its end
    prompt: str = ""
    task_type: str = ""
    reward: float = 0.0
    penalty: float = 0.0  # soft overlong penalty, taken off the reward
    invalid: int = 0
    success: bool = False
    done: bool = False
    truncated: bool = False  # it hit a limit
    masked: bool = False  # not trained on: it crashed, or compact filtering
    error: str = ""  # traceback, if the environment crashed


class SlotCache:
    """Key-value cache in which a token's slot is its position: every row grows at its own length, without holes."""
    # padding lands in slots that later tokens overwrite; until then the mask hides slots behind a token's own
    layers = ()  # per layer [keys, values], each (rows, heads, capacity, head size), zero where unused

    def __init__(self, size):
        self.size = size  # rows

    def prepare(self, rows, slots, capacity):
        """Announce a forward of tokens at `slots` (B, T) < `capacity` of `rows` (B,), all in order or some.

        Returns: what is added to attention's scores, (B, 1, T, capacity): 0, or -inf behind a token's own slot.
        """
        self.rows, self.slots, self.capacity = rows, slots, capacity
        hidden = torch.arange(capacity, device=slots.device) > slots.unsqueeze(-1)
        return torch.zeros(hidden.shape, device=slots.device).masked_fill(hidden, -math.inf).unsqueeze(1)

    def update(self, key, value, layer, *args, **kwargs):
        """What transformers' attention calls: store (B, heads, T, head size), get back (B, heads, capacity, head size)."""
        if layer == len(self.layers):
            empty = [value.new_zeros(self.size, *new.shape[1:2], 0, new.shape[3]) for new in (key, value)]
            self.layers = [*self.layers, empty]  # of value's type: in bf16, rotation gives fp32 keys
        stored, whole = self.layers[layer], len(self.rows) == self.size
        for i, new in enumerate((key, value)):
            if (missing := self.capacity - stored[i].shape[2]) > 0:
                missing = max(missing, self.capacity // 2, 64)  # by half: to grow by a constant is quadratic
                stored[i] = torch.cat([stored[i], stored[i].new_zeros(*stored[i].shape[:2], missing, new.shape[3])], 2)
            stored[i][self.rows.unsqueeze(-1), :, self.slots] = new.transpose(1, 2).to(stored[i].dtype)
        return [x[:, :, : self.capacity] if whole else x[self.rows, :, : self.capacity] for x in stored]

    def keep(self, rows):
        """Only these rows go on, as rows 0, 1, ..."""
        self.size, self.layers = len(rows), [[x[rows] for x in layer] for layer in self.layers]


def next_logits(policy, cache, rows, trajectories):
    """Logits (B, V) of each trajectory's next token: a forward over what is not in the cache yet, prompt, answer or token.

    `rows` are the trajectories' rows in the cache.
    """
    starts = [min(t.cached, len(t.ids) - 1) for t in trajectories]  # at least the last token: its output is wanted
    lengths = [len(t.ids) - start for t, start in zip(trajectories, starts)]
    ids = [t.ids[start:] + [0] * (max(lengths) - n) for t, start, n in zip(trajectories, starts, lengths)]
    ids, rows = torch.tensor(ids, device=policy.device), torch.tensor(rows, device=policy.device)  # (B, T) padded right, (B,)
    slots = torch.tensor(starts, device=policy.device).unsqueeze(-1) + torch.arange(ids.shape[1], device=policy.device)  # (B, T)
    mask = cache.prepare(rows, slots, max(starts) + ids.shape[1])
    hidden = policy.hidden(ids, position_ids=slots, attention_mask=mask, past_key_values=cache, use_cache=True)
    for t in trajectories:
        t.cached = len(t.ids)
    return policy.logits(hidden[range(len(ids)), [n - 1 for n in lengths]])  # (B, T, D) -> (B, D) -> (B, V)


def sample(logits, uniform):
    """One token per row by inverse CDF. Args: logits (B, V); uniform (B,) float64 in [0, 1). Returns: ids (B,)."""
    cdf = logits.softmax(-1).cumsum(-1, dtype=torch.float64)  # subtle: float32 sums are off in a large vocabulary
    ids = torch.searchsorted(cdf, uniform.unsqueeze(-1) * cdf[:, -1:], right=True)  # right: never a token of probability 0
    return ids.squeeze(-1).clamp_max(logits.shape[-1] - 1)


def sample_tokens(policy, cache, rows, trajectories, cfg):
    """Every trajectory samples the next token of its response, which waits once it is at its end or at the limit."""
    logits = next_logits(policy, cache, rows, trajectories)
    uniform = torch.tensor([0.0 if t.waits else t.rng.random() for t in trajectories], dtype=torch.float64)
    ids = sample(logits, uniform.to(policy.device))
    for t, token, logp, entropy in zip(trajectories, ids.tolist(), *(s.tolist() for s in token_stats(logits, ids))):
        if not t.waits:
            t.ids.append(token)
            t.responses[-1].logp.append(logp)
            t.responses[-1].entropy.append(entropy)
            t.waits = token in policy.ends or len(t.responses[-1].logp) == cfg.max_response_tokens
            if t.waits:
                t.responses[-1].text = policy.tokenizer.decode(t.ids[t.responses[-1].start :], skip_special_tokens=True)


FORMAT = " Think first, between <think> and </think>; then give your action, between <{tag}> and </{tag}>."


def action_in(text, tag):
    """What the environment gets of a response: all of it, or what its last <tag>...</tag> holds; nothing if there is none."""
    found = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL) if tag else [text]
    return found[-1] if found else ""


def act(policy, t, answer, cfg):
    """Enter into a trajectory what the environment says, `answer()`; its ids are appended."""
    if not t.responses:
        t.prompt, info = answer()
        system = getattr(t.env, "instructions", "") if cfg.system is None else cfg.system
        system += FORMAT.format(tag=cfg.action_tag) if cfg.action_tag else ""
        t.ids, t.task_type = policy.opening(system, t.prompt), info.get("task_type", "")
        if len(t.ids) + cfg.max_response_tokens > cfg.max_length:
            raise ValueError(f"a prompt of {len(t.ids)} tokens leaves no room for a response: raise --max_length")
        return
    response = t.responses[-1]
    response.observation, reward, terminated, truncated, info = answer()
    if not math.isfinite(reward):
        raise ValueError(f"the environment's reward is {reward}")
    response.reward = float(reward)
    t.reward += response.reward
    t.invalid += bool(info.get("invalid", not action_in(response.text, cfg.action_tag).strip()))
    t.success = bool(info.get("success", terminated and not truncated and reward > 0))
    ids = policy.answer(response.observation, t.ids[-1] == policy.end)
    full = len(t.responses) >= cfg.max_turns or len(t.ids) + len(ids) + cfg.max_response_tokens > cfg.max_length
    t.truncated = bool(not terminated and (truncated or full))
    t.done = bool(terminated or t.truncated)
    t.ids += [] if t.done else ids


def make_environments(cfg, count=0):
    """`count` environments, by default one for each trajectory of a batch. Limits that are None become the environment's own."""
    count = count or -(-cfg.groups * cfg.group_size // rank_and_world()[1])
    options = {"max_turns": cfg.max_turns} if cfg.env in envs.ENVS else {}
    options |= {"dataset": cfg.dataset} if cfg.dataset else {}
    environments = [envs.make(cfg.env, **options) for _ in range(count)]
    for name, otherwise in (("max_turns", 12), ("max_response_tokens", 16)):
        setattr(cfg, name, getattr(cfg, name) or getattr(environments[0], name, None) or otherwise)
    return environments


def in_thread(function):
    """A Future of `function()`, computed in a thread that nobody waits for at the end: it may hang."""
    future = Future()

    def work():
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return future


def observe(policy, trajectories, seeds, cfg):
    """The environments answer those that wait. Who goes on begins a response; a crash fails its own trajectory."""

    def ask(t):
        return t.env.step(action_in(t.responses[-1].text, cfg.action_tag)) if t.responses else t.env.reset(seed=seeds[t.group])

    answers = [functools.partial(ask, t) for t in trajectories]
    if getattr(trajectories[0].env, "parallel", False):  # all begin now
        answers = [functools.partial(in_thread(answer).result, cfg.env_timeout or None) for answer in answers]
    elif cfg.env_timeout:  # one at a time
        answers = [lambda answer=answer: in_thread(answer).result(cfg.env_timeout) for answer in answers]
    for t, answer in zip(trajectories, answers):
        try:
            act(policy, t, answer, cfg)
        except envs.SandboxError:  # nobody's failure: the run stops
            raise
        except Exception as error:  # counted and shown
            t.error, t.done, t.reward, t.success = traceback.format_exc(), True, 0.0, False
            t.env = None if isinstance(error, TimeoutError) else t.env  # it still runs: a new one takes its place
        if not t.done:
            t.waits = False
            t.responses.append(Response(start=len(t.ids)))


def rollout(policy, environments, seeds, group_size, cfg, stream):
    """Trajectories: `group_size` episodes of each seed's task, in one batch; `stream` names their random numbers.

    All sample a token at a time. Those at the end of their response wait, until their rows have wasted as much work as two
    forwards of all: then their environments answer, which is encoded in one forward. Who is done leaves the batch.
    """
    policy.model.eval()  # subtle: in training mode gradient checkpointing drops the cache
    (rank, world), count = rank_and_world(), len(seeds) * group_size
    numbered = zip(range(rank * count // world, (rank + 1) * count // world), environments)  # this process's part
    trajectories = [Trajectory(i // group_size, env, random.Random(f"{cfg.seed}/{stream}/{i}")) for i, env in numbered]
    cache, playing, idle = SlotCache(len(trajectories)), trajectories, 0
    with whole_weights(policy), torch.inference_mode(), policy.autocast():  # one autocast: weights are rounded to bf16 once
        while playing:
            waiting = [t for t in playing if t.waits]
            rows, idle = range(len(playing)), idle + len(waiting)
            if idle > 2 * len(playing) or len(waiting) == len(playing):
                idle = 0
                observe(policy, waiting, seeds, cfg)
                if any(t.done for t in waiting):
                    cache.keep([i for i, t in enumerate(playing) if not t.done])
                    playing = [t for t in playing if not t.done]
                rows = [i for i, t in enumerate(playing) if t.responses[-1].start == len(t.ids)]
            width = max((len(playing[i].ids) - playing[i].cached for i in rows), default=1)
            size = max(1, cfg.micro_batch_tokens // width)  # rows at once: long prompts could fill the memory
            for part in (rows[first : first + size] for first in range(0, len(rows), size)):
                sample_tokens(policy, cache, part, [playing[i] for i in part], cfg)
    for i, t in enumerate(trajectories):
        if t.env is None:
            environments[i] = make_environments(cfg, 1)[0]
        t.env = t.rng = None  # what other processes need not get
    return [t for part in gathered(trajectories) for t in part]


def check_crashes(trajectories, cfg):
    """Raises UsageError if the environment crashed in more than half of the trajectories."""
    if 2 * len(crashes := [t.error for t in trajectories if t.error]) > len(trajectories):
        thread = "; a world that must stay in one thread needs --env_timeout 0" * bool(cfg.env_timeout)
        raise UsageError(f"--env {cfg.env} crashed in {len(crashes)} of {len(trajectories)} trajectories{thread}:\n{crashes[0]}")


def sample_batch(policy, environments, cfg, step):
    """Trajectories of `groups` tasks. Dynamic sampling replaces groups whose rewards are all equal, by further tasks.

    Returns: (trajectories to train on, all that were sampled). Raises UsageError after `max_resample` further draws.
    """
    tasks, kept, sampled = random.Random(f"{cfg.seed}/tasks/{step}"), [], []
    for draw in range(cfg.max_resample + 1):
        seeds, rewards = tasks.sample(range(envs.HELD_OUT), cfg.groups - len(kept) // cfg.group_size), defaultdict(set)
        drawn = rollout(policy, environments, seeds, cfg.group_size, cfg, f"train/{step}/{draw}")
        for t in drawn:
            t.group += draw * cfg.groups
            length = max((len(r.logp) for r in t.responses), default=0) / cfg.max_response_tokens
            t.penalty = max(0.0, length - 1 + cfg.overlong) / cfg.overlong if cfg.overlong else 0.0  # linear, at most 1
            rewards[t.group].add(t.reward - t.penalty)
        sampled += drawn
        check_crashes(sampled, cfg)
        kept += [t for t in drawn if len(rewards[t.group]) > 1 or not cfg.max_resample or step == 0]
        if len(kept) == cfg.groups * cfg.group_size:
            return kept, sampled
    found = f"rewards vary in only {len(kept) // cfg.group_size} of {len(sampled) // cfg.group_size} groups"
    raise UsageError(f"at step {step} {found}, --groups {cfg.groups} are needed: raise --max_resample, or use 0 to train on all")


# ---------------------------------------------------------------- 4. update: advantages, then clipped policy gradient
def assign_credit(trajectories, cfg):
    """Set every response's base advantage A: its trajectory's, plus w times its step's where GiGPO asks for it."""
    group = torch.tensor([t.group for t in trajectories])  # (N,)
    rewards = torch.tensor([t.reward - t.penalty for t in trajectories], dtype=torch.float64)
    for t, advantage in zip(trajectories, group_advantages(rewards, group, cfg.advantage).tolist()):
        t.masked = bool(t.error or cfg.compact_filtering and t.truncated)
        for r in t.responses:
            r.advantage = 0.0 if t.masked else advantage
    anchors, keys, returns = {}, [], []  # GiGPO compares discounted returns after the same observation, the anchor
    for t in trajectories if cfg.step_weight else []:
        for i, observation in enumerate([t.prompt, *(r.observation for r in t.responses)][: len(t.responses)]):
            keys.append(anchors.setdefault((t.group, observation), len(anchors)))
            returns.append(sum(cfg.gamma**k * r.reward for k, r in enumerate(t.responses[i:])))
    steps = group_advantages(torch.tensor(returns, dtype=torch.float64), torch.tensor(keys), cfg.advantage)  # (R,) or empty
    for (t, r), advantage in zip([(t, r) for t in trajectories for r in t.responses], steps.tolist()):
        r.advantage += 0.0 if t.masked else cfg.step_weight * advantage


def modulate(trajectories, cfg, step):
    """AEM: A_AEM = alpha A for every response. One that is not trained on stays out of min, max and mean. Returns: seconds."""
    start, kept = time.perf_counter(), [(i, t, r) for i, t in enumerate(trajectories) if not t.masked for r in t.responses]
    scope = torch.tensor([{"group": t.group, "trajectory": i, "batch": 0}[cfg.aem_scope] for i, t, _ in kept])  # (R,)
    h_bar = torch.tensor([sum(r.entropy) / len(r.entropy) for _, _, r in kept], dtype=torch.float64)  # (R,)
    shuffler = torch.Generator().manual_seed(hash((cfg.seed, step)))
    alpha = aem_coefficients(h_bar, scope, cfg.lam, cfg.min_range, cfg.aem_direction, shuffler)  # (R,)
    sign = {"off": 0, "raise": -1, "lower": 1}[cfg.mask_drift]  # of A (alpha - 1); H moves by A (S - H), and S - H ~ 1 - alpha
    for (_, _, r), a in zip(kept, alpha.tolist()):
        r.alpha, r.advantage = a, a * r.advantage if sign == 0 or sign * r.advantage * (a - 1) > 0 else 0.0
    return time.perf_counter() - start


def micro_batches(trajectories, budget):
    """Batches of trajectories of like length: at most `budget` tokens each, padding included, or one trajectory."""
    rest = sorted(trajectories, key=lambda t: len(t.ids))
    while rest:
        size = max(1, budget // len(rest[-1].ids))  # the longest is the width
        yield rest[-size:]
        del rest[-size:]


def sampled_hidden(policy, trajectories):
    """The hidden states (n, D) that all sampled tokens were drawn from, differentiable, and the tokens (n,), in order."""
    ids = pad_sequence([torch.tensor(t.ids) for t in trajectories], batch_first=True).to(policy.device)  # (B, T)
    firsts = [(row * ids.shape[1] + r.start, len(r.logp)) for row, t in enumerate(trajectories) for r in t.responses]
    at = torch.tensor([first + i for first, n in firsts for i in range(n)], device=policy.device)  # (n,), in 0 ... B T
    hidden = policy.hidden(ids, use_cache=False)  # (B, T, D); padding is where nothing looks: right
    return hidden.flatten(0, 1).index_select(0, at - 1), ids.flatten()[at]


def token_logps(policy, hidden, ids):
    """log pi (n,) of tokens (n,) given the hidden states (n, D) before them: what `token_stats` says of their logits."""
    return -cross_entropy(policy.logits(hidden), ids, reduction="none")


@torch.no_grad()
def sampled_logps(policy, hidden, ids):
    """`token_logps` without gradient, in chunks of positions: (tokens x vocabulary) never exists."""
    return torch.cat([token_logps(policy, h, y) for h, y in zip(hidden.split(policy.chunk), ids.split(policy.chunk))])


def accumulate_gradients(policy, trajectories, cfg):
    """Gradients of one optimizer step, a sum over tokens.

    The loss is taken back through the head chunk by chunk, and then once through the body.
    Returns: Counter of sums over tokens, `loss`, `clipped`, `gap` |old - new log-prob| and `kl`; of `tokens` sampled, `positions`
    computed, and `padding` among these. Empty if there is nothing to learn.
    """
    sums, world, most = Counter(), rank_and_world()[1], min(cfg.max_turns * cfg.max_response_tokens, cfg.max_length)
    tokens = [0.0 if t.masked else sum(len(r.logp) for r in t.responses) for t in trajectories]
    weights = dict(zip(map(id, trajectories), LOSS_MEANS[cfg.loss_mean](torch.tensor(tokens).double(), most).tolist()))
    moving = [t for t in trajectories if any(r.advantage for r in t.responses)]  # the others have no gradient ...
    moving = [t for t in trajectories if not t.masked] if moving and cfg.kl_coef else moving  # ... but by their KL
    synchronise = getattr(policy.model, "set_requires_gradient_sync", bool)  # bool: nothing to do with one process
    for batch, counts in share(micro_batches(moving, cfg.micro_batch_tokens)):
        rows = [(p, r.advantage, counts * weights[id(t)], i) for i, t in enumerate(batch) for r in t.responses for p in r.logp]
        old, advantage, weight, row = torch.tensor(rows, dtype=policy.precision, device=policy.device).T  # four (n,)
        hidden, ids = sampled_hidden(policy, batch)  # (n, D), (n,)
        anchor, reference = old, old
        if cfg.sequence_ratio:  # GSPO: r = s = exp(mean_l (logp - old)), yet each token keeps its own gradient
            now = sampled_logps(policy, hidden, ids)
            anchor = now - per_group(torch.mean, now - old, row)
        if cfg.kl_coef:
            with torch.no_grad():
                reference = sampled_logps(policy.reference, *sampled_hidden(policy.reference, batch))
        gradients, here = [], Counter()
        synchronise(False)
        parts = zip(*(x.split(policy.chunk) for x in (hidden.detach(), ids, old, anchor, advantage, weight, reference)))
        for h, y, old, anchor, advantage, weight, reference in parts:
            logp = token_logps(policy, h.requires_grad_(), y)
            token_loss, clipped = clipped_loss(logp, anchor, advantage, cfg.clip_low, cfg.clip_high)
            d = reference - logp if cfg.kl_coef else torch.zeros_like(logp)
            kl = torch.exp(d) - d - 1  # k3, an estimate of KL(pi || pi_ref) that is never negative
            loss = (weight * (token_loss + cfg.kl_coef * kl)).sum()
            (loss * world).backward()  # FSDP takes the mean over processes: we want the sum
            gradients.append(h.grad)
            gap = (logp - old).abs().sum().item()
            here.update(loss=loss.item(), tokens=len(logp), clipped=clipped.sum().item(), gap=gap, kl=kl.sum().item())
        synchronise(True)
        hidden.backward(torch.cat(gradients))
        size = len(batch) * max(len(t.ids) for t in batch)
        here.update(positions=size, padding=size - sum(len(t.ids) for t in batch))
        sums.update(here if counts else {})
    getattr(policy.model, "reshard", bool)()
    return functools.reduce(lambda total, part: total.update(part) or total, gathered(sums), Counter())


@torch.no_grad()
def recompute_old_logps(policy, trajectories, cfg):
    """Replace the old log-probs recorded while sampling. Returns: mean |old - new|, the gap between the two computations."""
    batches, gaps = list(micro_batches([t for t in trajectories if t.responses], cfg.micro_batch_tokens)), []
    mine = [sampled_logps(policy, *sampled_hidden(policy, batch)).tolist() for batch, _ in share(batches)]
    parts = gathered(mine)
    for i, batch in enumerate(batches):
        logps = parts[i % len(parts)][i // len(parts)]
        for r in (r for t in batch for r in t.responses):
            gaps += [abs(old - new) for old, new in zip(r.logp, logps)]
            r.logp, logps = logps[: len(r.logp)], logps[len(r.logp) :]
    return fmean(gaps)


def update(policy, optimizer, trajectories, cfg, step):
    """PPO-clip on one rollout batch: `epochs` passes of `minibatches` optimizer steps, old log-probs from sampling.

    A step that is not finite is skipped and counted; where no reward varies there is none. Returns: metrics, means over steps.
    """
    policy.model.train()
    shuffler, taken, gaps, total = random.Random(f"{cfg.seed}/minibatches/{step}"), [], [], Counter()
    recomputed = [recompute_old_logps(policy, trajectories, cfg)] if cfg.recompute_old_logps and trajectories else []
    for _ in range(cfg.epochs):
        order = shuffler.sample(trajectories, len(trajectories))
        for part in range(cfg.minibatches):
            sums = accumulate_gradients(policy, order[part :: cfg.minibatches], cfg)
            if not sums:
                continue
            total.update(sums)
            norm = torch.nn.utils.clip_grad_norm_(policy.model.parameters(), cfg.max_grad_norm)
            norm = getattr(norm, "full_tensor", lambda norm=norm: norm)().item()  # over all shards
            if math.isfinite(norm) and math.isfinite(sums["loss"]):
                optimizer.step()
                taken.append((sums["loss"], norm, sums["clipped"] / sums["tokens"], sums["kl"] / sums["tokens"]))
            gaps.append(sums["gap"] / sums["tokens"])  # the first is measured before the weights move: pure rounding
            optimizer.zero_grad()
    means = dict(zip(("loss", "grad_norm", "clip_fraction", "kl"), [fmean(c) for c in zip(*taken)] or [0.0] * 4))
    means |= {"logp_gap": [*recomputed, *gaps, 0.0][0], "padding": total["padding"] / max(total["positions"], 1)}
    return means | {"updates": len(taken), "skipped_updates": len(gaps) - len(taken)}


# ---------------------------------------------------------------- 5. training, and what it shows
def train_step(policy, optimizer, environments, cfg, step):
    """One step of the algorithm: act, credit and modulate, learn. Step 0 measures the starting policy and trains nothing.

    Returns: (trajectories, metrics). `response_entropy` estimates H_resp: summed token entropies per response, in nats.
    """
    start = time.perf_counter()
    trajectories, sampled = sample_batch(policy, environments, cfg, step)
    acted = time.perf_counter()
    assign_credit(trajectories, cfg)
    aem_seconds = modulate(trajectories, cfg, step) if cfg.aem else 0.0
    learned = update(policy, optimizer, trajectories if step else [], cfg, step)
    seconds = {"rollout_seconds": acted - start, "update_seconds": time.perf_counter() - acted, "aem_seconds": aem_seconds}
    responses, alpha = [r for t in sampled for r in t.responses], [r.alpha for t in trajectories for r in t.responses]
    metrics = {
        "step": step, "success": fmean(t.success for t in sampled), "reward": fmean(t.reward for t in sampled),
        "response_entropy": fmean(sum(r.entropy) for r in responses), "alpha_min": min(alpha), "alpha_max": max(alpha),
        "token_entropy": fmean(h for r in responses for h in r.entropy), "turns": fmean(len(t.responses) for t in sampled),
        "response_tokens": fmean(len(r.logp) for r in responses), "invalid_actions": fmean(t.invalid for t in sampled),
        "negative": fmean(r.advantage < 0 for t in trajectories for r in t.responses),  # share of responses that are pushed down
        "env_errors": sum(bool(t.error) for t in sampled), "truncated": sum(t.truncated for t in sampled),
        "overlong": sum(t.penalty > 0 for t in sampled), "masked": sum(t.masked for t in trajectories),
        "groups": len(sampled) // cfg.group_size, "dropped_groups": (len(sampled) - len(trajectories)) // cfg.group_size,
    }  # fmt: skip
    return trajectories, metrics | learned | seconds


def evaluate(policy, environments, cfg):
    """One sampled rollout of each held-out task, with random numbers of its own, the same each time.

    Returns: (trajectories, metrics).
    """
    start, seeds, played = time.perf_counter(), range(envs.HELD_OUT, envs.HELD_OUT + cfg.eval_tasks), []
    batch = cfg.groups * cfg.group_size
    for first in range(0, len(seeds), batch):
        played += rollout(policy, environments, seeds[first : first + batch], 1, cfg, f"eval/{first}")
    check_crashes(played, cfg)
    kinds = sorted({t.task_type for t in played if t.task_type})
    by_type = {kind: fmean(t.success for t in played if t.task_type == kind) for kind in kinds}
    success = fmean(t.success for t in played)
    seconds = time.perf_counter() - start
    return played, {"eval_success": success, "eval_tasks": len(played), "eval_by_type": by_type, "eval_seconds": seconds}


def readable(trajectories, step):
    """The best and the worst trajectory of the group whose alphas differ most, as text with each response's numbers."""
    chosen = max(trajectories, key=lambda t: max((r.alpha for r in t.responses), default=0)).group
    group, text = sorted((t for t in trajectories if t.group == chosen), key=lambda t: t.reward), ""
    for t in group[-1], group[0]:
        kind = f"{t.task_type} task".strip()
        text += f"=== step {step}, {kind}, reward {t.reward:.1f} after {len(t.responses)} turns\n{t.prompt}\n"
        for r in t.responses:
            text += f"  > {r.text:<40} H_bar {fmean(r.entropy):.2f}  alpha {r.alpha:.2f}  advantage {r.advantage:+.2f}\n"
            text += f"{r.observation}\n"
        text += t.error + "\n"
    return text


def plot_curves(run):
    """Draw curves.png from metrics.jsonl alone."""
    from matplotlib.figure import Figure

    rows, figure = [json.loads(line) for line in open(run / "metrics.jsonl")], Figure(figsize=(12, 3.6), layout="constrained")
    panels = {
        "Success (share of trajectories)": {"success": "training tasks", "eval_success": "held-out tasks"},
        "Response entropy (nats)": {"response_entropy": "mean over responses"},
        "AEM's coefficient alpha": {"alpha_max": "largest in the batch", "alpha_min": "smallest in the batch"},
    }
    for axis, (title, lines) in zip(figure.subplots(1, 3), panels.items()):
        for name, label in lines.items():
            axis.plot(*zip(*((r["step"], r[name]) for r in rows if name in r)), ".-" if "eval" in name else "-", label=label)
        axis.set(title=title, xlabel="training step", ylim=(0, None))
        axis.legend()
    figure.savefig(run / "curves.png", dpi=120)


def report(run, rows, seconds):
    """Print success on held-out tasks, before and after, with the 95 % interval (Wilson's) of the last evaluation."""
    rows = [row for row in rows if "eval_success" in row]
    before, after = ({"all": r["eval_success"], **r["eval_by_type"]} for r in (rows[0], rows[-1]))
    print(f"{'held-out success':<20}{'before':>8}{'after':>8}")
    print(*(f"{kind:<20}{before.get(kind, math.nan):>8.1%}{after[kind]:>8.1%}" for kind in after), sep="\n")
    n, p, z = rows[-1]["eval_tasks"], after["all"], 1.96
    middle, half = p + z * z / 2 / n, z * math.sqrt(p * (1 - p) / n + z * z / 4 / n / n)
    low, high = ((middle + sign * half) / (1 + z * z / n) for sign in (-1, 1))
    print(f"95 % interval of the last: {low:.1%} to {high:.1%} ({n} tasks)")
    print(f"{seconds:.0f} s in all; look at {run}/{'curves.png and ' * (len(rows) > 1)}trajectories.txt")


# ---------------------------------------------------------------- 6. a run that survives: folder, checkpoints, signals
LOGS = "metrics.jsonl", "trajectories.txt"
MAY_CHANGE = "steps eval_every eval_tasks save_every keep resume out name cache_dir track".split()
MAY_CHANGE += "env_timeout micro_batch_tokens max_resample".split()


def open_run(cfg):
    """The run's folder: a new one, or the one to resume. Raises UsageError if it can't be made."""
    name = f"{cfg.env.replace(':', '.')}-{cfg.estimator}{'-aem' * cfg.aem}-seed{cfg.seed}"
    found = [Path(cfg.out) / cfg.name] if cfg.name else Path(cfg.out).glob(f"{name}-*")
    begun = sorted(filter(Path.is_dir, found), key=lambda folder: (bool(checkpoints(folder)), folder.stat().st_mtime))
    if cfg.resume and begun:
        return begun[-1]
    numbered = (Path(cfg.out) / f"{name}-{i}" for i in range(1, 10**6))
    run = Path(cfg.out) / cfg.name if cfg.name else next(folder for folder in numbered if not folder.exists())
    try:
        run.mkdir(parents=True)
    except OSError as error:
        raise UsageError(f"cannot make the run's folder {run} ({error.strerror}): choose another --out or --name") from None
    return run


def save_checkpoint(run, policy, optimizer, step, keep):
    """All that later steps depend on (random numbers hang on seed and step alone): complete, or not there at all."""
    new = run / "checkpoints" / f"step-{step:06}"
    partial, untouched = new.with_suffix(".partial"), not optimizer.state
    state = dict(zip(("model", "optimizer"), get_state_dict(policy.model, optimizer)))
    main = rank_and_world()[0] == 0
    if main:
        shutil.rmtree(partial, ignore_errors=True)
    dcp.save(state, checkpoint_id=partial)  # the others write when the first process has told them what
    if main:
        sizes = {name: (run / name).stat().st_size for name in LOGS}
        (partial / "run.json").write_text(json.dumps({"step": step, "sizes": sizes, "untouched": untouched}))
        partial.rename(new)
        for old in checkpoints(run)[:-keep]:
            shutil.rmtree(old)
    if untouched:  # subtle: get_state_dict has made a state, as after a first update
        optimizer.state.clear()


def checkpoints(run):
    return sorted((run / "checkpoints").glob("step-??????"))


def check_same(run, cfg):
    """Raises UsageError if a run to be resumed has other settings in anything that matters. What is None becomes the run's."""
    then = json.loads((run / "config.json").read_text())
    cfg.lr = then["lr"] if cfg.lr is None else cfg.lr
    differ = [name for name, value in asdict(cfg).items() if name not in MAY_CHANGE and then.get(name) != value]
    if differ:
        raise UsageError(f"{run} can't be resumed with another --{', --'.join(differ)}: choose its values, or another --name")


def load_checkpoint(run, policy, optimizer):
    """Go back to the newest checkpoint, with the files as they were then. Returns the next step; 0 if there is none."""
    saved = {"step": -1, "sizes": {}}
    if found := checkpoints(run):
        saved = json.loads((found[-1] / "run.json").read_text())
        state = dict(zip(("model", "optimizer"), get_state_dict(policy.model, optimizer)))
        dcp.load(state, checkpoint_id=found[-1])
        set_state_dict(policy.model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        if saved.get("untouched"):
            optimizer.state.clear()
    for file in (run / name for name in LOGS if (run / name).exists()):
        os.truncate(file, saved["sizes"].get(file.name, 0))
    return saved["step"] + 1


def export(run, policy):
    """The model as `save_pretrained` writes it, whole, in run/checkpoint: what --model and transformers load."""
    state = get_model_state_dict(policy.model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank_and_world()[0] == 0:
        whole = {name: weight for name, weight in state.items() if name not in policy.model.all_tied_weights_keys}
        policy.model.save_pretrained(run / "checkpoint", state_dict=whole)
        policy.tokenizer.save_pretrained(run / "checkpoint")
    gathered(None)  # nobody leaves before it is written: torchrun ends the others when one has failed or was stopped


@contextlib.contextmanager
def signals():
    """A list that notes SIGINT and SIGTERM, so that a run can end after its step; a second one ends it at once."""
    noted, numbers = [], (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.signal(number, lambda number, frame: noted.append(number) or restore()) for number in numbers}
    restore = lambda: [signal.signal(*pair) for pair in before.items()]  # noqa: E731
    try:
        yield noted
    finally:
        restore()


def tracker(cfg, run):
    """A function that sends a row of metrics to TensorBoard or Weights & Biases, if asked for."""
    if cfg.track == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(run)
        return lambda row: [writer.add_scalar(k, v, row["step"]) for k, v in row.items() if not isinstance(v, dict)]
    if cfg.track == "wandb":
        import wandb

        wandb.init(project="aem", name=run.name, dir=run, config=asdict(cfg))
        return lambda row: wandb.log(row, step=row["step"])
    return lambda row: None


def record(run, row, trajectories):
    """Append a step to the run's files."""
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")
    with open(run / "trajectories.txt", "a", errors="backslashreplace") as file:
        file.write(readable(trajectories, row["step"]) if "eval_success" in row else "")
    crashes = [t.error for t in trajectories if t.error]
    if crashes and not (run / "env_error.txt").exists():
        (run / "env_error.txt").write_text(crashes[0], errors="backslashreplace")


def set_up(cfg):
    """Join the other processes, if torchrun began several; load everything. Returns: (run's folder, environments, policy)."""
    if "LOCAL_RANK" in os.environ and not dist.is_initialized():
        if cfg.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("cpu:gloo,cuda:nccl" if cfg.device == "cuda" else "gloo")
        atexit.register(time.sleep, 0.1)  # gloo's threads need the interpreter once more, and abort a process that is ending
    main = rank_and_world()[0] == 0
    run = gathered(open_run(cfg) if main else None)[0]
    try:
        environments = make_environments(cfg)
        if checkpoints(run):
            check_same(run, cfg)
        source = gathered(warm_start(environments[0], cfg) if main and cfg.model == "tiny" else cfg.model)[0]
        policy = load_policy(cfg, source)
        policy.reference = load_policy(cfg, source) if cfg.kl_coef else None
    except (ValueError, OSError, envs.SandboxError) as error:
        if main and not any(run.iterdir()):
            run.rmdir()
        raise UsageError(error) from None
    return run, environments, policy


def train(cfg):
    """Train a policy; everything lands in the run's folder. Returns the rows of metrics.jsonl. Raises UsageError."""
    cfg.check()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # checkpoints say so of a single process
    start, (run, environments, policy), rank = time.perf_counter(), set_up(cfg), rank_and_world()[0]
    small = policy.model.num_parameters() < 1e7
    cfg.lr = cfg.lr if cfg.lr is not None else 1e-5 if cfg.lora_rank else 7e-4 if small else 1e-6
    optimizer = torch.optim.AdamW([p for p in policy.model.parameters() if p.requires_grad], lr=cfg.lr, weight_decay=0.0)
    first = load_checkpoint(run, policy, optimizer) if cfg.resume else 0
    if rank == 0:
        (run / "config.partial").write_text(json.dumps(asdict(cfg), indent=2))
        (run / "config.partial").rename(run / "config.json")
        track = tracker(cfg, run)
    stopped, shown = 0, ("success", "reward", "response_entropy", "alpha_min", "alpha_max", "env_errors", "eval_success")
    quiet = rank > 0 or "TQDM_DISABLE" in os.environ
    with signals() as noted, tqdm(total=cfg.steps + 1, initial=first, desc=run.name, unit="step", disable=quiet) as bar:
        for step in range(first, cfg.steps + 1):
            try:
                trajectories, row = train_step(policy, optimizer, environments, cfg, step) if cfg.steps else ([], {"step": 0})
                if step % cfg.eval_every == 0 or step == cfg.steps:
                    evaluated, more = evaluate(policy, environments, cfg)
                    trajectories, row = trajectories or evaluated, row | more
            except UsageError:  # too few groups that vary, too many crashes: what was learned stays
                if cfg.steps:
                    export(run, policy)
                raise
            if rank == 0:
                record(run, row, trajectories)
                track(row)
                if step and not row["updates"]:
                    tqdm.write(f"step {step}: no update, as in no group do rewards vary")
            bar.set_postfix({name: f"{row[name]:.3g}" for name in shown if name in row}, refresh=False)
            bar.update()
            stopped = max(gathered(max(noted, default=0)))
            if step and (step % cfg.save_every == 0 or step == cfg.steps or stopped):
                save_checkpoint(run, policy, optimizer, step, cfg.keep)
            if stopped:
                break
    rows = [json.loads(line) for line in open(run / "metrics.jsonl")]
    if rank == 0 and cfg.steps:
        plot_curves(run)
    if cfg.steps:
        export(run, policy)
    if stopped:
        print(f"stopped after step {step}: --resume auto goes on from there", file=sys.stderr)
        sys.exit(128 + stopped)
    if rank == 0:
        report(run, rows, time.perf_counter() - start)
    return rows


def main():
    """The command line: one flag for each field of Config."""
    about = __doc__.split("\n\n")[1]
    parser = transformers.HfArgumentParser(Config, description=about, usage="aem.py [--flag value]", allow_abbrev=False)
    cfg, unknown = parser.parse_args_into_dataclasses(return_remaining_strings=True)
    try:
        if unknown:
            raise UsageError(f"unknown flag {unknown[0]}: python aem.py --help lists them all")
        train(cfg)
        if dist.is_initialized():
            dist.destroy_process_group()
        return
    except (UsageError, envs.SandboxError) as error:
        said = error
    except torch.OutOfMemoryError as error:
        less = "lower --micro_batch_tokens, --groups or --max_length, use --lora_rank 16, or more GPUs by torchrun"
        said = f"the GPU's memory is full: {less} ({str(error).splitlines()[0]})"
    except (OSError, dcp.api.CheckpointException) as error:
        cause = next(iter(getattr(error, "failures", {}).values()), (error,))[0]
        said = f"{cause}; is the disk of --out {cfg.out} full? --resume auto goes on from the last checkpoint"
    except KeyboardInterrupt:  # before the first step, or the second one
        sys.exit(130)
    print(f"aem.py: error: {said}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
