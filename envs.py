"""Text environments for multi-turn agents.

An environment speaks Gymnasium's signature, with text on both sides:

    env = make("household")
    observation, info = env.reset(seed=0)          # the same seed is the same task
    observation, reward, terminated, truncated, info = env.step("go to fridge")

What a trainer may read besides, all optional:
    env.instructions      how to act, for the system prompt of a model that has never seen the task
    info["task_type"]     after `reset`: the kind of task, for a table of success per kind
    info["success"]       after `step`: True once the task is solved
    info["invalid"]       after `step`: True if the action could not be carried out
    env.demonstration(seed, noise)   a scripted episode, for the embedded policy to imitate
"""

import importlib
import random
import re
import zlib

HELD_OUT = 2**30  # seeds from here on are for evaluation

# room: (its receptacles, the objects that may lie in them)
ROOMS = {
    "kitchen": (["fridge", "microwave", "sinkbasin", "countertop"], ["apple", "egg", "mug", "plate"]),
    "bathroom": (["sinkbasin", "bathtub", "shelf", "drawer"], ["cloth", "towel", "soapbar", "candle"]),
    "bedroom": (["bed", "desk", "shelf", "drawer"], ["book", "pen", "laptop", "pillow"]),
    "livingroom": (["sofa", "armchair", "shelf", "drawer"], ["book", "box", "vase", "watch"]),
}
# ALFWorld's six task types: (rooms that can host it, what the agent is told).
TASKS = {
    "pick": (("kitchen", "bathroom", "bedroom", "livingroom"), "put a {object} in the {target}"),
    "examine": (("bedroom", "livingroom"), "examine a {object} under the desklamp"),
    "clean": (("kitchen", "bathroom"), "put a clean {object} in the {target}"),
    "heat": (("kitchen",), "put a hot {object} in the {target}"),
    "cool": (("kitchen",), "put a cool {object} in the {target}"),
    "two": (("kitchen", "bathroom", "bedroom", "livingroom"), "put two {object} in the {target}"),
}
TOOLS = {"clean": "sinkbasin", "heat": "microwave", "cool": "fridge"}  # verb -> the fixture that does it


class Household:
    """A miniature of ALFWorld: find hidden objects in a room, change them, put them somewhere. Text in, text out.

    A task is one of six types in one of four rooms with four receptacles; `instructions` lists the actions. Reward, as in
    the paper: 10 for solving the task (which ends the episode), 0 otherwise, -0.1 for an invalid action. The episode is
    truncated after `max_turns` actions; every task can be solved within 12.
    """

    instructions = (
        "You are a household robot. What a place holds is seen only on going there, and you carry one object at a time. "
        "Actions: go to PLACE; take OBJECT from PLACE; put OBJECT in PLACE; clean OBJECT with sinkbasin; heat OBJECT with "
        "microwave; cool OBJECT with fridge; use desklamp; look. Reply with one action and nothing else, like: go to drawer"
    )

    def __init__(self, max_turns=12):
        self.max_turns, self.rng = max_turns, random.Random()
        self.reset()

    def reset(self, *, seed=None, options=None):
        """Start a task. Returns `(observation, info)`; without a seed the task is drawn from the env's own RNG."""
        self.rng = random.Random(seed) if seed is not None else self.rng
        held_out = seed is not None and seed >= HELD_OUT
        observation = self._draw(self.rng)
        while held_out != (zlib.crc32(f"{observation} {self.objects} {self.lamp}".encode()) % 8 == 0):
            observation = self._draw(self.rng)  # an eighth of all worlds is kept for evaluation, whatever the seeds
        return observation, {"task_type": self.kind}

    def _draw(self, rng):
        """Make a random world and task; returns the first observation."""
        self.kind = rng.choice(list(TASKS))
        self.room = rng.choice(TASKS[self.kind][0])
        places, names = ROOMS[self.room]
        self.places = rng.sample(places, len(places))  # listed in random order
        self.object = rng.choice(names)
        self.target = rng.choice([p for p in self.places if p != TOOLS.get(self.kind)]) if self.kind != "examine" else None
        # [name, place, state]: what is asked for lies anywhere but at the target, and there may be another object
        source = rng.choice([p for p in self.places if p != self.target])
        self.objects = [[self.object, source, ""] for _ in range(2 if self.kind == "two" else 1)]
        for name in rng.sample([n for n in names if n != self.object], rng.randint(0, 1)):
            self.objects.append([name, rng.choice(self.places), ""])
        self.lamp = rng.choice(self.places) if self.room in ("bedroom", "livingroom") else None
        self.here, self.turns, self.seen = None, 0, set()
        self.examined = self.solved = self.done = False
        task = TASKS[self.kind][1].format(object=self.object, target=self.target)
        return f"You are in the {self.room}. {self._listing(self.places)} Your task: {task}."

    def admissible(self):
        """The actions that can be carried out now, a list of text in a fixed order."""
        actions = ["look"] + [f"go to {p}" for p in self.places if p != self.here]
        held = self._held()
        if held:
            actions += [f"put {held[0]} in {self.here}"]
            actions += [f"{verb} {held[0]} with {tool}" for verb, tool in TOOLS.items() if tool == self.here]
        else:
            actions += sorted({f"take {o[0]} from {self.here}" for o in self.objects if o[1] == self.here})
        return actions + (["use desklamp"] if self.here and self.here == self.lamp else [])

    def step(self, action):
        """Carry out an action, whatever its case, articles and full stop; what is not admissible is invalid."""
        if self.done:
            return "The episode is over.", 0.0, self.solved, not self.solved, {"success": self.solved, "invalid": True}
        action = " ".join(re.sub(r"\b(the|an|a)\b|[.`'\"]", " ", action.lower()).split())
        invalid = action not in self.admissible()
        observation = "Nothing happens." if invalid else self._act(*action.split())
        self.turns += 1
        self.solved = self._check()
        self.done = self.solved or self.turns >= self.max_turns
        info = {"success": self.solved, "invalid": invalid}
        return observation, 10.0 * self.solved - 0.1 * invalid, self.solved, self.done and not self.solved, info

    def _act(self, verb, *words):
        """Carry out an admissible action; returns what is seen."""
        held = self._held()
        if verb == "go":
            self.here = words[-1]
        elif verb == "take":
            next(o for o in self.objects if o[0] == words[0] and o[1] == self.here)[1] = "hand"
            return f"You take the {words[0]}."
        elif verb == "put":
            held[1] = self.here
            return f"You put the {words[0]} down."
        elif verb in TOOLS:
            held[2] = verb  # a heated object that is cooled is no longer hot
            return f"You {verb} the {words[0]}."
        elif verb == "use":
            self.examined = held is not None and held[0] == self.object
            return "You turn on the desklamp."
        if self.here is None:  # look, before having gone anywhere
            return self._listing(self.places)
        self.seen.add(self.here)
        found = ["desklamp"] * (self.here == self.lamp) + [o[0] for o in self.objects if o[1] == self.here]
        return self._listing(found)

    def _listing(self, names):
        return f"You see {', '.join(names) or 'nothing'}."

    def _held(self):
        return next((o for o in self.objects if o[1] == "hand"), None)

    def _ready(self, item):
        """Whether an object is as the task wants it, wherever it is."""
        return item[0] == self.object and (self.kind not in TOOLS or item[2] == self.kind)

    def _check(self):
        """Whether the task is solved now."""
        if self.kind == "examine":
            return self.examined
        return sum(self._ready(o) and o[1] == self.target for o in self.objects) >= (2 if self.kind == "two" else 1)

    def expert(self):
        """The next action of a scripted agent that knows only what it has seen; it searches in the order of the list."""
        held = self._held()
        if held and held[0] != self.object:
            return f"put {held[0]} in {self.here}"
        if held and self.kind == "examine":
            return self._visit(self.lamp if self.lamp in self.seen else None) or "use desklamp"
        if held and not self._ready(held):
            return self._visit(TOOLS[self.kind]) or f"{self.kind} {held[0]} with {self.here}"
        if held:
            return self._visit(self.target) or f"put {held[0]} in {self.here}"
        left = [o for o in self.objects if o[0] == self.object and o[1] in self.seen]
        left = [o for o in left if o[1] != self.target or not self._ready(o)]  # not yet delivered
        left.sort(key=lambda o: o[1] != self.here)  # what lies here first
        return self._visit(left[0][1] if left else None) or f"take {left[0][0]} from {self.here}"

    def _visit(self, place):
        """`go to place` unless already there (then None); if it is unknown (None), search where nobody has looked."""
        if place is None:
            place = next(p for p in self.places if p not in self.seen and p != self.target)
        return f"go to {place}" if place != self.here else None

    def demonstration(self, seed, noise=0.0):
        """A scripted episode, `[(observation, action), ...]`: the expert's, but each action is random with chance `noise`."""
        rng = random.Random(f"demonstration/{seed}")
        observation, turns = self.reset(seed=seed)[0], []
        while not self.done:
            slips = self.admissible() + [f"take {rng.choice(ROOMS[self.room][1])} from {rng.choice(self.places)}"]
            action = rng.choice(slips) if rng.random() < noise else self.expert()
            turns.append((observation, action))
            observation = self.step(action)[0]
        return turns


ENVS = {"household": Household}


def make(name, **kwargs):
    """An environment: a name in `ENVS`, or `module:Class` for one of your own. Raises ValueError if there is none such."""
    if name in ENVS:
        return ENVS[name](**kwargs)
    module, colon, attribute = name.partition(":")
    if not colon:
        raise ValueError(f"unknown environment {name!r}: use one of {', '.join(ENVS)}, or module:Class for your own")
    try:
        return getattr(importlib.import_module(module), attribute)(**kwargs)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"cannot load environment {name!r}: {error}") from error


# The embedded policy's chat template. It knows its task already, so it passes over the system prompt.
TEMPLATE = """{% for m in messages if m.role != 'system' %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}\
{% if add_generation_prompt %}<|assistant|>{% endif %}"""


def untrained(texts, seed=0):
    """A new Qwen2 of 0.2 M parameters, and Qwen2's tokenizer trained until every word of `texts` is one token."""
    import torch
    import transformers

    special = ["<|end|>", "<|user|>", "<|assistant|>"]
    blank = transformers.Qwen2Tokenizer()
    tokenizer = blank.train_new_from_iterator(texts, 4096, new_special_tokens=special, show_progress=False)
    tokenizer.eos_token, tokenizer.chat_template, tokenizer.padding_side = "<|end|>", TEMPLATE, "right"
    shape = dict(hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4)
    config = transformers.Qwen2Config(vocab_size=len(tokenizer), tie_word_embeddings=True, initializer_range=0.1, **shape)
    config.bos_token_id, config.eos_token_id = None, tokenizer.eos_token_id
    torch.manual_seed(seed)
    return transformers.Qwen2ForCausalLM(config), tokenizer


def embedded_policy(env, steps, noise, batch=24):
    """A small (model, tokenizer) to start RL from, without a download: it has imitated `env.demonstration`, mistakes and all.

    The loss runs over all tokens: from actions alone, a model this small never learns to copy the object's name.
    """
    import torch
    from tqdm import tqdm

    rng = random.Random("demonstrations")
    model, tokenizer = untrained(text for i in range(2000) for turn in env.demonstration(i, 0.5) for text in turn)
    inner = [p for p in model.model.layers.parameters() if p.ndim == 2]  # matrices: by Muon they learn to copy much earlier
    outer = [p for p in model.parameters() if p not in set(inner)]
    optimizers = torch.optim.Muon(inner, lr=0.02, weight_decay=0.0), torch.optim.AdamW(outer, lr=4e-3, betas=(0.9, 0.98))
    schedules = [torch.optim.lr_scheduler.LinearLR(o, 1.0, 0.0, total_iters=max(1, steps)) for o in optimizers]
    for _ in (bar := tqdm(range(steps), desc="warm start", unit="step")):
        episodes = [env.demonstration(rng.randrange(HELD_OUT), noise) for _ in range(batch)]
        texts = ["".join(f"<|user|>{o}<|end|><|assistant|>{a}<|end|>" for o, a in turns) for turns in episodes]
        inputs = tokenizer(texts, padding=True, return_tensors="pt")  # (B, T), padded on the right
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        loss = model(inputs["input_ids"], labels=labels, use_cache=False).loss
        loss.backward()
        for part in (*optimizers, *schedules):
            part.step()
        model.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.2f}", refresh=False)
    return model, tokenizer
