"""AEM: Adaptive Entropy Modulation for multi-turn agentic RL (arXiv:2605.00425), in one file.

An LLM agent acts over many turns and gets one sparse reward at the end. AEM asks how uncertain the policy was over each
complete *response* and rescales that response's advantage: entropy rises while failures dominate, and falls once successes
do. No extra model, reward or forward pass: the entropies are by-products of sampling.

    python aem.py                                      # a tiny policy learns a household game on a CPU, in minutes
    python aem.py --aem false                          # the same without AEM: plain GRPO
    python aem.py --model Qwen/Qwen2.5-1.5B-Instruct   # the same code on a GPU
    python aem.py --help                               # every flag, with the paper's symbols

The file: Config, 1 the method, 2 the policy, 3 rollout, 4 update, 5 the embedded policy, 6 training and what it shows.
Shapes: N trajectories, R responses, n sampled tokens, B rows, T positions, D hidden size, V vocabulary. Entropy is in nats.
"""

import functools
import hashlib
import inspect
import json
import math
import random
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from statistics import fmean

import torch
import transformers
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import envs

HELD_OUT = 2**30  # training tasks have seeds below, evaluation tasks from here on: they never overlap


class UsageError(ValueError):
    """What the user can fix: one sentence that names the flag or file, and the fix. The command exits with code 2."""


def flag(default, text, least=None, above=None):
    """A field of Config: its default, its help text, and the bound its value must respect."""
    return field(default=default, metadata={"help": text, "least": least, "above": above})


@dataclass
class Config:
    """Everything a run depends on; each field is a flag of the same name."""

    model: str = flag("tiny", "the policy pi: 'tiny' (embedded, no download), a hub id, a folder, or an earlier run's folder")
    env: str = flag("household", "environment: a name in envs.ENVS, or module:Class for your own")
    estimator: str = flag("grpo", "base advantage A and its loss: a row of ESTIMATORS")
    aem: bool = flag(True, "multiply each response's advantage by AEM's alpha; 'false' gives the plain baseline")
    lam: float = flag(1.0, "lambda, strength of the modulation: max alpha / min alpha <= e^lambda; 0 turns it off", least=0)
    min_range: float = flag(0.1, "gate: alpha = 1 in a group whose H_bar spans less than this, in nats", least=0)
    steps: int = flag(60, "training steps, each a rollout batch and its update", least=0)
    groups: int = flag(16, "tasks per step; the rollouts of one task are a group G", least=1)
    group_size: int = flag(8, "rollouts of each task; a group of one has no baseline", least=2)
    max_turns: int = flag(12, "responses per trajectory at most", least=1)
    max_response_tokens: int = flag(16, "tokens per response at most; models that reason first need more", least=1)
    max_length: int = flag(4096, "tokens per trajectory at most, prompt and observations included", least=1)
    temperature: float = flag(1.0, "sampling temperature; pi, entropies and log-probs are meant at it", above=0)
    lr: float | None = flag(None, "AdamW's learning rate; by default 3e-4 for models under 10 M parameters, else 1e-6", above=0)
    epochs: int = flag(1, "passes of the update over one rollout batch", least=1)
    minibatches: int = flag(1, "optimizer steps per pass", least=1)
    clip_low: float | None = flag(None, "epsilon_low: ratios are clipped at 1 - clip_low; by default the estimator's", least=0)
    clip_high: float | None = flag(None, "epsilon_high: ratios are clipped at 1 + clip_high; by default the estimator's", least=0)
    max_grad_norm: float = flag(1.0, "gradients are clipped to this global norm", above=0)
    micro_batch_tokens: int = flag(8192, "tokens, padding included, per forward of the update: memory, not results", least=1)
    gradient_checkpointing: bool | None = flag(None, "recompute activations in backward; by default on a GPU only")
    device: str = flag("auto", "'cpu', 'cuda', ...; 'auto' takes a GPU if there is one; a GPU computes in bf16 autocast")
    seed: int = flag(0, "seed of tasks, sampling and minibatches; on one CPU, the same seed gives the same metrics")
    eval_every: int = flag(20, "steps between evaluations; one more before the first step and after the last", least=1)
    eval_tasks: int = flag(256, "held-out tasks per evaluation, one rollout of each at --temperature", least=1)
    out: str = flag("runs", "folder that holds the runs")
    name: str = flag("", "the run's folder in --out; by default after env, estimator and seed, numbered if taken")
    warm_steps: int = flag(900, "behaviour-cloning steps that warm-start the 'tiny' policy", least=0)
    warm_noise: float = flag(0.2, "share of random actions in its demonstrations", least=0)
    cache_dir: str = flag("~/.cache/aem", "folder where warm starts are kept for the next run")

    def check(self):
        """Raise UsageError for the first value that can't work, before anything expensive."""
        for f in fields(self):
            value, least, above = getattr(self, f.name), f.metadata["least"], f.metadata["above"]
            if value is not None and least is not None and not (value >= least and math.isfinite(value)):
                raise UsageError(f"--{f.name} must be at least {least}, not {value}: {f.metadata['help']}")
            if value is not None and above is not None and not (value > above and math.isfinite(value)):
                raise UsageError(f"--{f.name} must be above {above}, not {value}: {f.metadata['help']}")
        if self.estimator not in ESTIMATORS:
            raise UsageError(f"unknown --estimator {self.estimator!r}: use one of {', '.join(ESTIMATORS)}")
        try:
            torch.empty(0, device=self.torch_device)
        except (RuntimeError, AssertionError):
            raise UsageError(f"--device {self.device} is not available here: use --device cpu") from None

    @property
    def torch_device(self):
        return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if self.device == "auto" else self.device)

    @property
    def rule(self):
        """The estimator's row, with the numbers that flags override."""
        given = {k: getattr(self, k) for k in ("clip_low", "clip_high") if getattr(self, k) is not None}
        return replace(ESTIMATORS[self.estimator], **given)


# ---------------------------------------------------------------- 1. the method: pure functions of tensors


def token_stats(logits, ids):
    """Log-probability of the given tokens, and entropy of the distributions they come from.

    logp = log pi(y_l | s, y_<l);  H_tok = -sum_v pi(v) log pi(v), over the full vocabulary.

    Args: logits (..., V) floats, already divided by the temperature, -inf allowed; ids (...) integers.
    Returns: (logp, entropy), two float32 tensors (...), in nats.

    >>> token_stats(torch.zeros(2), torch.tensor(1))  # a fair coin: log 1/2 and log 2
    (tensor(-0.6931), tensor(0.6931))
    """
    z = logits.float()
    z = z - z.amax(-1, keepdim=True).detach()  # (..., V); the largest is 0, so nothing overflows
    log_sum = z.logsumexp(-1)
    logp = z.gather(-1, ids.unsqueeze(-1)).squeeze(-1) - log_sum
    # H = log sum exp z - sum p z. subtle: an impossible token has p z = 0 * -inf = NaN, hence the clamp
    entropy = log_sum - (z.softmax(-1) * z.clamp_min(torch.finfo(z.dtype).min)).sum(-1)
    return logp, entropy


def aem_coefficients(entropy, group, lam=1.0, min_range=0.1):
    """AEM's coefficient of each response: within a group, confident responses count more and uncertain ones less.

    H~ = (H_bar - min_G H_bar) / (max_G H_bar - min_G H_bar);  alpha = exp(-lam H~) / mean_G exp(-lam H~), so mean_G alpha = 1.
    A group whose H_bar spans less than `min_range` nats holds nothing but noise: alpha = 1.

    Args: entropy (R,), H_bar of each response; group (R,) integers, its task. Returns: alpha (R,).
    Not preserved in general: sum_G alpha A differs from sum_G A.

    >>> aem_coefficients(torch.tensor([0.2, 1.2]), torch.tensor([0, 0]))
    tensor([1.4621, 0.5379])
    """
    alpha = torch.ones_like(entropy)
    for g in group.unique():
        member = group == g
        h = entropy[member]
        span = h.max() - h.min()
        if span >= min_range and span > 0:
            weight = torch.exp(-lam * (h - h.min()) / span)
            alpha[member] = weight / weight.mean()
    return alpha


@dataclass(frozen=True)
class Estimator:
    """One base estimator: all that sets it apart from the others."""

    advantage: Callable  # (G,) rewards of a group, not all equal -> (G,) advantages
    clip_low: float  # epsilon_low
    clip_high: float  # epsilon_high
    token_weight: Callable  # (N,) sampled tokens of each trajectory -> (N,) weight of each of its tokens in the loss


ESTIMATORS = {
    # the loss is the mean over trajectories of their token mean; no KL, no entropy bonus, no dual clip
    "grpo": Estimator(lambda r: (r - r.mean()) / (r.std() + 1e-6), 0.2, 0.2, lambda length: 1 / (len(length) * length)),
}


def group_advantages(rewards, group, estimator="grpo"):
    """Advantage A of each trajectory against the others of its task; all its responses share it.

    Statistics run over trajectories, not over their turns. A group whose rewards are all equal gets exactly 0.

    Args: rewards (N,) floats; group (N,) integers. Returns: (N,). Raises ValueError for a group of one.

    >>> group_advantages(torch.tensor([1.0, 0.0, 0.0, 0.0]), torch.zeros(4, dtype=torch.long))
    tensor([ 1.5000, -0.5000, -0.5000, -0.5000])
    """
    advantages = torch.zeros_like(rewards)
    for g in group.unique():
        member = group == g
        r = rewards[member].double()
        if len(r) < 2:
            raise ValueError(f"group {int(g)} has one trajectory: a group-relative advantage needs two")
        if r.max() > r.min():  # subtle: equal rewards divided by std + eps would give rounding noise, not 0
            advantages[member] = ESTIMATORS[estimator].advantage(r).to(rewards.dtype)
    return advantages


def clipped_loss(logp, old_logp, advantage, clip_low, clip_high):
    """PPO's clipped loss of each token: max(-A r, -A clip(r, 1 - low, 1 + high)) with r = pi / pi_old.

    Args: three (n,) tensors and two numbers. Returns: (loss (n,), clipped (n,) bool: where the clip stops the gradient).
    """
    ratio = torch.exp(logp - old_logp)
    plain, clipped = -advantage * ratio, -advantage * ratio.clamp(1 - clip_low, 1 + clip_high)
    return torch.maximum(plain, clipped), clipped > plain


# ---------------------------------------------------------------- 2. the policy: a causal LM and its chat template


class Policy:
    """A causal language model with its tokenizer. Ids are the truth: appended, never decoded and encoded again."""

    def __init__(self, model, tokenizer, temperature=1.0):
        self.model, self.tokenizer, self.temperature = model, tokenizer, temperature
        self.body, self.head, self.device = model.get_decoder(), model.get_output_embeddings(), model.device
        self.frame, self.end = chat_frame(tokenizer)
        self.observation = functools.lru_cache(65536)(self.observation)  # small environments repeat themselves
        for module in model.modules():  # sampling and training must see the same distribution: no dropout
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.0

    def autocast(self):
        """bf16 matrix products on a GPU, from fp32 master weights; plain fp32 on a CPU."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")

    def hidden(self, ids, **kwargs):
        """Final hidden states (B, T, D) of ids (B, T)."""
        with self.autocast():
            return self.body(input_ids=ids, **kwargs).last_hidden_state

    def logits(self, hidden):
        """(..., D) -> (..., V) float32 logits at the sampling temperature."""
        with self.autocast():
            return self.head(hidden).float() / self.temperature

    def opening(self, instructions, observation):
        """Ids of a conversation up to the first response: the chat template, rendered once."""
        messages = [{"role": "system", "content": instructions}] * bool(instructions)
        messages += [{"role": "user", "content": observation}]
        text = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def observation(self, text, ended):
        """Ids that an observation adds after a response: the difference that the chat template adds.

        It begins by closing the agent's turn. Where the response `ended` with a sampled end-of-turn token, that is done.
        """
        before, after = self.frame
        ids = self.tokenizer(before + text.strip() + after, add_special_tokens=False).input_ids
        return ids[ids.index(self.end) + 1 :] if ended else ids


def chat_frame(tokenizer):
    """The chat template's text between a response and an observation, and from there to the next response.

    Found by rendering marks. The end-of-turn token is the first special one after a response, whatever `eos_token` says.
    Returns: ((before, after), end-of-turn id). Raises UsageError if there is no template, or no such token.
    """
    if not tokenizer.chat_template:
        raise UsageError(f"the tokenizer of --model {tokenizer.name_or_path} has no chat template: use an instruction-tuned model")
    messages = [{"role": r, "content": c} for r, c in (("user", "task"), ("assistant", "<<response>>"), ("user", "<<answer>>"))]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    before, after = text.split("<<response>>")[1].split("<<answer>>")
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    end = [i for i in tokenizer(before, add_special_tokens=False).input_ids if i in special]
    if not end:
        raise UsageError(f"the chat template of --model {tokenizer.name_or_path} ends a response without a special token")
    return (before, after), end[0]


def load_policy(cfg, path):
    """Load a policy from a hub id, a folder, or an earlier run's folder; fp32 master weights, on the run's device.

    Raises UsageError if that can't be done, or if the model computes its logits in a way this file does not.
    """
    folder = Path(path) / "checkpoint" if (Path(path) / "checkpoint").is_dir() else path
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        chat_frame(tokenizer)  # a missing chat template shows before gigabytes are read
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    except UsageError:
        raise
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot load --model {path}: {' '.join(str(error).split())[:200]}") from None
    policy = Policy(model.to(cfg.torch_device), tokenizer, cfg.temperature)
    if cfg.gradient_checkpointing or (cfg.gradient_checkpointing is None and policy.device.type == "cuda"):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    probe = torch.arange(8, device=policy.device).unsqueeze(0)  # (1, T)
    with torch.no_grad(), policy.autocast():  # some architectures cap or scale their logits after the head
        if not torch.allclose(model.eval()(probe).logits, policy.head(policy.hidden(probe)), atol=1e-2):
            raise UsageError(f"--model {path}: {type(model).__name__} is not supported, its logits are not head(hidden states)")
    return policy


# ---------------------------------------------------------------- 3. rollout: many trajectories, many turns, one batch


@dataclass
class Response:
    """All tokens the policy sampled in one turn: the action. Recorded while sampling, under the behaviour policy."""

    start: int  # position of its first token in the trajectory
    logp: list[float] = field(default_factory=list)  # per token, nats
    entropy: list[float] = field(default_factory=list)  # H_tok per token, nats
    text: str = ""
    observation: str = ""  # what the environment answered
    alpha: float = 1.0
    advantage: float = 0.0  # alpha * A

    @property
    def h_bar(self):
        return fmean(self.entropy)


@dataclass
class Trajectory:
    """One episode as one token sequence: prompt + response_1 + observation_1 + response_2 + ..."""

    group: int
    env: object
    rng: random.Random  # its own: what it samples does not depend on the rest of the batch
    ids: list[int] = field(default_factory=list)
    responses: list[Response] = field(default_factory=list)
    cached: int = 0  # tokens of `ids` in the KV cache
    ended: bool = False  # the response being sampled has come to its end
    prompt: str = ""
    task_type: str = ""
    reward: float = 0.0
    invalid: int = 0
    success: bool = False
    done: bool = False
    error: str = ""  # traceback, if the environment crashed

    def call(self, method, *args, **kwargs):
        """Call the environment. If it crashes, that fails this trajectory alone, is kept in `error`, and returns None."""
        try:
            return getattr(self.env, method)(*args, **kwargs)
        except Exception:
            self.error, self.done = traceback.format_exc(), True

    def mask(self):
        """(T,) bool: the sampled tokens, those the loss runs over."""
        mask = torch.zeros(len(self.ids), dtype=torch.bool)
        for r in self.responses:
            mask[r.start : r.start + len(r.logp)] = True
        return mask


class SlotCache:
    """Key-value cache in which a token's slot is its position: every row grows at its own length, without holes.

    Padding lands in slots that later tokens overwrite; until then the mask `slot <= position` hides it.
    """

    def __init__(self):
        self.layers = []  # per layer [keys, values], each (B, heads, capacity, head size), zero where unused

    def prepare(self, slots, used):
        """Announce a forward of tokens at `slots` (B, T), the longest row being `used` long. Returns its attention mask."""
        self.slots, self.used, self.capacity = slots, used, int(slots.max()) + 1
        return (torch.arange(used, device=slots.device) <= slots.unsqueeze(-1)).unsqueeze(1)  # (B, 1, T, used)

    def update(self, key, value, layer, *args, **kwargs):
        """What transformers' attention calls: store (B, heads, T, head size), get back (B, heads, used, head size)."""
        if layer == len(self.layers):
            self.layers.append([key[:, :, :0], value[:, :, :0]])
        rows = torch.arange(len(key), device=key.device).unsqueeze(-1)  # (B, 1), beside slots (B, T)
        for i, new in enumerate((key, value)):
            if (missing := self.capacity - self.layers[layer][i].shape[2]) > 0:
                room = new.new_zeros(*new.shape[:2], max(missing, 64), new.shape[3])
                self.layers[layer][i] = torch.cat([self.layers[layer][i], room], 2)
            self.layers[layer][i][rows, :, self.slots] = new.transpose(1, 2)
        return tuple(stored[:, :, : self.used] for stored in self.layers[layer])

    def keep(self, rows):
        """Drop all rows of the batch but these."""
        self.layers = [[stored[rows] for stored in layer] for layer in self.layers]


def next_logits(policy, cache, trajectories):
    """Logits (B, V) of each trajectory's next token, by a forward over the tokens that are not in the cache yet.

    One path for all: whole prompts, the observation after a response, a single sampled token.
    """
    starts = [min(t.cached, len(t.ids) - 1) for t in trajectories]  # at least the last token: its output is wanted
    pending = [torch.tensor(t.ids[start:]) for t, start in zip(trajectories, starts)]
    last = torch.tensor([len(p) - 1 for p in pending], device=policy.device)
    ids = pad_sequence(pending, batch_first=True).to(policy.device)  # (B, T), padded on the right
    slots = (torch.tensor(starts).unsqueeze(-1) + torch.arange(ids.shape[1])).to(policy.device)  # (B, T)
    mask = cache.prepare(slots, max(len(t.ids) for t in trajectories))
    hidden = policy.hidden(ids, position_ids=slots, attention_mask=mask, past_key_values=cache, use_cache=True)
    for t in trajectories:
        t.cached = len(t.ids)
    return policy.logits(hidden[torch.arange(len(ids), device=policy.device), last])  # (B, T, D) -> (B, D) -> (B, V)


def sample(logits, uniform):
    """One token per row by inverse CDF. Args: logits (B, V); uniform (B,) float64 in [0, 1). Returns: ids (B,)."""
    cdf = logits.softmax(-1).cumsum(-1, dtype=torch.float64)  # subtle: float32 sums are off in a large vocabulary
    ids = torch.searchsorted(cdf, uniform.unsqueeze(-1) * cdf[:, -1:], right=True)  # right: never a token of probability 0
    return ids.squeeze(-1).clamp_max(logits.shape[-1] - 1)


def respond(policy, cache, trajectories, cfg):
    """Every trajectory samples one response, token by token, up to its end-of-turn token or the limit."""
    stops = {policy.end, policy.tokenizer.eos_token_id}
    for t in trajectories:
        t.ended = False
        t.responses.append(Response(start=len(t.ids)))
    for _ in range(cfg.max_response_tokens):
        logits = next_logits(policy, cache, trajectories)
        uniform = torch.tensor([0.0 if t.ended else t.rng.random() for t in trajectories], dtype=torch.float64)
        ids = sample(logits, uniform.to(policy.device))
        for t, token, logp, entropy in zip(trajectories, ids.tolist(), *(s.tolist() for s in token_stats(logits, ids))):
            if not t.ended:
                t.ids.append(token)
                t.responses[-1].logp.append(logp)
                t.responses[-1].entropy.append(entropy)
                t.ended = token in stops
        if all(t.ended for t in trajectories):
            break


def act(policy, t, cfg):
    """The environment answers the response just sampled; its answer is appended, or the episode is over."""
    response = t.responses[-1]
    response.text = policy.tokenizer.decode(t.ids[response.start :], skip_special_tokens=True)
    answer = t.call("step", response.text)
    if answer is None:
        return
    response.observation, reward, terminated, truncated, info = answer
    ids = policy.observation(response.observation, t.ids[-1] == policy.end)
    full = len(t.responses) >= cfg.max_turns or len(t.ids) + len(ids) + cfg.max_response_tokens > cfg.max_length
    t.reward += float(reward)
    t.invalid += bool(info.get("invalid", False))
    t.success = bool(info.get("success", terminated and reward > 0))
    t.done = bool(terminated or truncated or full)
    if not t.done:
        t.ids += ids


@torch.no_grad()
def rollout(policy, environments, seeds, group_size, cfg, stream):
    """Play `group_size` episodes of each task, all in one batch, turn by turn.

    Args: environments, one per episode; seeds, one per task; stream, a name that seeds the sampling of this batch.
    Returns: the trajectories, those of a task one after the other.
    """
    policy.model.eval()  # subtle: in training mode gradient checkpointing drops the cache
    trajectories = []
    for i, env in zip(range(len(seeds) * group_size), environments):
        t = Trajectory(i // group_size, env, random.Random(f"{cfg.seed}/{stream}/{i}"))
        if (answer := t.call("reset", seed=seeds[t.group])) is not None:
            t.prompt, t.task_type = answer[0], answer[1].get("task_type", "")
            t.ids = policy.opening(getattr(env, "instructions", ""), t.prompt)
        trajectories.append(t)
    cache, playing = SlotCache(), [t for t in trajectories if not t.done]
    while playing:
        respond(policy, cache, playing, cfg)
        for t in playing:
            act(policy, t, cfg)
        rows = [i for i, t in enumerate(playing) if not t.done]
        cache.keep(rows)
        playing = [playing[i] for i in rows]
    return trajectories


# ---------------------------------------------------------------- 4. update: advantages, then clipped policy gradient


def assign_credit(trajectories, cfg):
    """Set `alpha` and `advantage` of every response: A_AEM = alpha A, A shared by a trajectory's responses.

    A trajectory whose environment crashed stays in the baseline of its group as the failure it is, but trains no token and
    is left out of the entropies of its group.
    """
    rewards = torch.tensor([t.reward for t in trajectories])  # (N,)
    group = torch.tensor([t.group for t in trajectories])  # (N,)
    base = group_advantages(rewards, group, cfg.estimator).tolist()  # (N,)
    owned = [(t, r, a) for t, a in zip(trajectories, base) if not t.error for r in t.responses]
    alpha = torch.ones(len(owned))  # (R,)
    if cfg.aem:
        h_bar, group = torch.tensor([r.h_bar for _, r, _ in owned]), torch.tensor([t.group for t, _, _ in owned])
        alpha = aem_coefficients(h_bar, group, cfg.lam, cfg.min_range)
    for (_, r, a), r.alpha in zip(owned, alpha.tolist()):
        r.advantage = r.alpha * a


def micro_batches(trajectories, budget):
    """Cut trajectories, sorted by length, into batches of at most `budget` tokens, padding included (or of one trajectory)."""
    batch = []
    for t in sorted(trajectories, key=lambda t: len(t.ids)):
        if batch and (len(batch) + 1) * len(t.ids) > budget:
            yield batch
            batch = []
        batch.append(t)
    if batch:
        yield batch


def sampled_logps(policy, trajectories):
    """Log-probs (n,) of all sampled tokens under the current weights, row after row, differentiable.

    Only sampled positions reach the head, in chunks that are recomputed in backward: (tokens x vocabulary) never exists.
    """
    ids = pad_sequence([torch.tensor(t.ids) for t in trajectories], batch_first=True).to(policy.device)  # (B, T)
    mask = pad_sequence([t.mask() for t in trajectories], batch_first=True).to(policy.device)  # (B, T)
    hidden = policy.hidden(ids[:, :-1], use_cache=False)  # padding is on the right, where causal attention never looks
    hidden = hidden[mask[:, 1:]]  # (B, T-1, D) -> (n, D): position l-1 predicts token l
    chunk = max(1, 2**24 // policy.head.out_features)  # 64 MB of float32 logits
    pairs = zip(hidden.split(chunk), ids[mask].split(chunk))
    logp = [checkpoint(lambda h, y: token_stats(policy.logits(h), y)[0], h, y, use_reentrant=False) for h, y in pairs]
    return torch.cat(logp)


def accumulate_gradients(policy, trajectories, cfg):
    """Gradients of one optimizer step: a sum over tokens whose weights are fixed first, so micro-batches change nothing.

    Returns: sums over the tokens trained on: loss, tokens, clipped, and gap, |log-prob at sampling - log-prob now|.
    """
    rule, sums = cfg.rule, dict(loss=0.0, tokens=0, clipped=0, gap=0.0)
    lengths = torch.tensor([sum(len(r.logp) for r in t.responses) for t in trajectories])  # (N,) counted once, over all
    weights = dict(zip(map(id, trajectories), rule.token_weight(lengths).tolist()))
    moving = [t for t in trajectories if any(r.advantage for r in t.responses)]  # the others have no gradient
    for batch in micro_batches(moving, cfg.micro_batch_tokens):
        logp = sampled_logps(policy, batch)  # (n,)
        rows = [(old, r.advantage, weights[id(t)]) for t in batch for r in t.responses for old in r.logp]
        old_logp, advantage, weight = torch.tensor(rows, device=policy.device).unbind(-1)  # (n, 3) -> three (n,)
        token_loss, clipped = clipped_loss(logp, old_logp, advantage, rule.clip_low, rule.clip_high)
        loss = (weight * token_loss).sum()
        loss.backward()
        sums["loss"] += loss.item()
        sums["tokens"] += len(logp)
        sums["clipped"] += clipped.sum().item()
        sums["gap"] += (logp.detach() - old_logp).abs().sum().item()
    return sums


def update(policy, optimizer, trajectories, cfg, step):
    """PPO-clip on one rollout batch: `epochs` passes of `minibatches` optimizer steps, old log-probs from sampling.

    A step whose loss or gradient is not finite is skipped and counted; where no reward varies there is no step at all.
    Returns: metrics, means over the optimizer steps; logp_gap is that of the first, before the weights move.
    """
    policy.model.train()
    shuffler, usable = random.Random(f"{cfg.seed}/minibatches/{step}"), [t for t in trajectories if not t.error]
    taken, skipped, gap = [], 0, None
    for _ in range(cfg.epochs):
        order = shuffler.sample(usable, len(usable))
        for part in range(cfg.minibatches):
            sums = accumulate_gradients(policy, order[part :: cfg.minibatches], cfg)
            if not sums["tokens"]:
                continue
            gap = sums["gap"] / sums["tokens"] if gap is None else gap
            norm = torch.nn.utils.clip_grad_norm_(policy.model.parameters(), cfg.max_grad_norm).item()
            if math.isfinite(norm) and math.isfinite(sums["loss"]):
                optimizer.step()
                taken.append((sums["loss"], norm, sums["clipped"] / sums["tokens"]))
            else:
                skipped += 1
            optimizer.zero_grad()
    means = [fmean(column) for column in zip(*taken)] or [0.0] * 3
    metrics = dict(zip(("loss", "grad_norm", "clip_fraction"), means))
    return metrics | {"logp_gap": gap or 0.0, "updates": len(taken), "skipped_updates": skipped}


# ---------------------------------------------------------------- 5. the embedded policy: built, warm-started, kept

# It knows its task already, so its chat template passes over the system prompt.
TEMPLATE = """{% for m in messages if m.role != 'system' %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}\
{% if add_generation_prompt %}<|assistant|>{% endif %}"""


def tiny_policy(texts, seed):
    """An untrained Qwen2 of 0.4 M parameters with a word-level tokenizer over the words of `texts`."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    special, splitter = ["<|pad|>", "<|unknown|>", "<|end|>", "<|user|>", "<|assistant|>"], pre_tokenizers.Whitespace()
    words = sorted({word for text in texts for word, _ in splitter.pre_tokenize_str(text)})
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(special + words)}, unk_token=special[1]))
    core.pre_tokenizer = splitter
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core, pad_token=special[0], unk_token=special[1])
    tokenizer.add_special_tokens({"eos_token": special[2], "additional_special_tokens": special[3:]})
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(seed)
    shape = dict(hidden_size=128, intermediate_size=384, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4)
    config = transformers.Qwen2Config(vocab_size=len(tokenizer), tie_word_embeddings=True, **shape)
    config.bos_token_id, config.eos_token_id, config.pad_token_id = None, 2, 0
    return Policy(transformers.Qwen2ForCausalLM(config), tokenizer)


def clone_behaviour(env, steps, noise, seed=0, batch=48, lr=3e-3):
    """Warm start: next-token prediction on scripted demonstrations that are sometimes wrong. Returns: a Policy.

    The loss runs over all tokens, observations too: trained on actions alone, a model this small never learns to copy the
    object's name from its task.
    """
    rng = random.Random(f"demonstrations/{seed}")
    demonstration = lambda noise: env.demonstration(rng.randrange(HELD_OUT), noise)  # noqa: E731
    policy = tiny_policy((text for _ in range(2000) for turn in demonstration(0.5) for text in turn), seed)
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=max(1, steps))
    respond = functools.lru_cache(65536)(lambda text: policy.tokenizer(text).input_ids + [policy.end])
    for _ in (bar := tqdm(range(steps), desc="warm start", unit="step")):
        rows = []
        for turns in (demonstration(noise) for _ in range(batch)):
            ids = policy.opening("", turns[0][0]) + respond(turns[0][1])
            for observation, action in turns[1:]:
                ids += policy.observation(observation, True) + respond(action)
            rows.append(torch.tensor(ids))
        logits = policy.logits(policy.hidden(pad_sequence(rows, batch_first=True)[:, :-1], use_cache=False))  # (B, T-1, V)
        targets = pad_sequence(rows, batch_first=True, padding_value=-100)[:, 1:]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.2f}")
    return policy


def warm_start(env, cfg):
    """Folder of the embedded policy for this environment, made on first use. Its name covers all it depends on.

    Raises UsageError if the environment offers no demonstrations.
    """
    if not hasattr(env, "demonstration"):
        raise UsageError(f"--model tiny learns from demonstrations, and --env {cfg.env} has none: name a model with --model")
    parts = (inspect.getmodule(type(env)), Policy, chat_frame, tiny_policy, clone_behaviour)
    key = [TEMPLATE, cfg.max_turns, cfg.warm_steps, cfg.warm_noise, torch.__version__, transformers.__version__]
    key = json.dumps([cfg.env, *map(inspect.getsource, parts), *key])
    folder = Path(cfg.cache_dir).expanduser() / hashlib.sha256(key.encode()).hexdigest()[:16]
    if not folder.is_dir():
        save_policy(clone_behaviour(env, cfg.warm_steps, cfg.warm_noise), folder)
    return folder


def save_policy(policy, folder):
    """Write model and tokenizer where `from_pretrained` reads them; all or nothing, by a rename."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".draft-"))
    policy.model.save_pretrained(draft)
    policy.tokenizer.save_pretrained(draft)
    draft.replace(folder)


# ---------------------------------------------------------------- 6. training, and what it shows


def rollout_metrics(trajectories):
    """Means over a batch. `response_entropy` estimates H_resp: summed token entropies per response, in nats."""
    responses = [r for t in trajectories for r in t.responses]
    return {
        "success": fmean(t.success for t in trajectories),
        "reward": fmean(t.reward for t in trajectories),
        "response_entropy": fmean(sum(r.entropy) for r in responses),
        "token_entropy": fmean(h for r in responses for h in r.entropy),
        "alpha_min": min(r.alpha for r in responses),
        "alpha_max": max(r.alpha for r in responses),
        "turns": fmean(len(t.responses) for t in trajectories),
        "response_tokens": fmean(len(r.logp) for r in responses),
        "invalid_actions": fmean(t.invalid for t in trajectories),
        "env_errors": sum(bool(t.error) for t in trajectories),
    }


def train_step(policy, optimizer, environments, cfg, step):
    """One step of the algorithm: act, credit and modulate, learn. Returns: (metrics, trajectories)."""
    start = time.perf_counter()
    seeds = random.Random(f"{cfg.seed}/tasks/{step}").sample(range(HELD_OUT), cfg.groups)
    trajectories = rollout(policy, environments, seeds, cfg.group_size, cfg, f"train/{step}")
    acted = time.perf_counter()
    assign_credit(trajectories, cfg)
    learned = update(policy, optimizer, trajectories, cfg, step)
    seconds = {"rollout_seconds": acted - start, "update_seconds": time.perf_counter() - acted}
    return rollout_metrics(trajectories) | learned | seconds, trajectories


def evaluate(policy, environments, cfg):
    """One sampled rollout of each held-out task, with random numbers of its own, the same each time.

    Returns: (metrics: success over all and per task type, seconds; trajectories).
    """
    start, trajectories = time.perf_counter(), []
    for first in range(0, cfg.eval_tasks, len(environments)):
        seeds = range(HELD_OUT + first, HELD_OUT + min(first + len(environments), cfg.eval_tasks))
        trajectories += rollout(policy, environments, seeds, 1, cfg, f"eval/{first}")
    kinds = {k: [t.success for t in trajectories if t.task_type == k] for k in sorted({t.task_type for t in trajectories})}
    metrics = {"eval_success": fmean(t.success for t in trajectories), "eval_by_type": {k: fmean(v) for k, v in kinds.items()}}
    return metrics | {"eval_seconds": time.perf_counter() - start}, trajectories
