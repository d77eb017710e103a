"""Text environments for multi-turn agents: a household game, and coding tasks with a sandbox.

An environment speaks Gymnasium's signature, with text on both sides:

    env = make("household")
    observation, info = env.reset(seed=0)          # the same seed is the same task
    observation, reward, terminated, truncated, info = env.step("go to fridge")

What a trainer may read besides, all optional:
    env.instructions      how to act, for the system prompt of a model that has never seen the task
    env.max_turns, env.max_response_tokens, env.parallel    limits that suit it; True if `step` is slow and may run in a thread
    info["task_type"] after `reset`: the kind of task; info["success"], info["invalid"] after `step`: solved; not carried out
    env.demonstration(seed, noise)    a scripted episode, for the embedded policy to imitate
"""

import ast
import contextlib
import ctypes
import functools
import inspect
import json
import marshal
import math
import os
import pkgutil
import queue
import random
import re
import select
import struct
import subprocess
import sys
import time
import zlib
from typing import NamedTuple

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


class TextEnv:
    """Tasks by seed, an eighth of them kept for evaluation; rewards as in the paper; a turn limit. A subclass has two methods:

    `_draw() -> (observation, kind, all that makes this task)` and `_act(text) -> (observation, invalid, success, ended)`.
    """

    max_turns, max_response_tokens, parallel, instructions = 12, 16, False, ""

    def __init__(self, max_turns=None):
        self.max_turns, self.rng = max_turns or self.max_turns, random.Random()
        self.reset()

    def reset(self, *, seed=None, options=None):
        """Start a task. Returns `(observation, info)`; without a seed the task is drawn from the env's own RNG."""
        self.rng = random.Random(seed) if seed is not None else self.rng
        held_out = seed is not None and seed >= HELD_OUT
        for _ in range(1000):  # a tiny data set may have no such task: then any will do
            observation, kind, task = self._draw()
            if held_out == (zlib.crc32(task.encode()) % 8 == 0):
                break
        self.turns, self.success, self.done = 0, False, False
        return observation, {"task_type": kind}

    def step(self, action):
        """Take an action. Returns Gymnasium's five; the reward is 10 for solving the task and -0.1 for an invalid action."""
        if self.done:
            return "The episode is over.", 0.0, self.success, not self.success, {"success": self.success, "invalid": True}
        observation, invalid, self.success, ended = self._act(action)
        self.turns += 1
        self.done = ended or self.turns >= self.max_turns
        info = {"success": self.success, "invalid": invalid}
        return observation, 10.0 * self.success - 0.1 * invalid, ended, self.done and not ended, info


class Household(TextEnv):
    """A miniature of ALFWorld: find hidden objects in a room, change them, put them somewhere. Text in, text out.

    A task is one of six types in one of four rooms with four receptacles. Every one can be solved within 12 actions.
    """

    instructions = (
        "You are a household robot. What a place holds is seen only on going there, and you carry one object at a time. "
        "Actions: go to PLACE; take OBJECT from PLACE; put OBJECT in PLACE; clean OBJECT with sinkbasin; heat OBJECT with "
        "microwave; cool OBJECT with fridge; use desklamp; look. Reply with one action and nothing else, like: go to drawer"
    )

    def _draw(self):
        rng, self.kind = self.rng, self.rng.choice(list(TASKS))
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
        self.here, self.held, self.seen, self.examined = None, None, set(), False
        task = TASKS[self.kind][1].format(object=self.object, target=self.target)
        observation = f"You are in the {self.room}. You see {', '.join(self.places)}. Your task: {task}."
        return observation, self.kind, f"{observation} {self.objects} {self.lamp}"

    def admissible(self):
        """The actions that can be carried out now, a list of text in a fixed order."""
        held, here, lying = self.held, self.here, {o[0] for o in self.objects if o[1] == self.here}
        actions = ["look", *(f"go to {p}" for p in self.places if p != here)]
        actions += [f"put {held[0]} in {here}"] if held else [f"take {name} from {here}" for name in sorted(lying)]
        actions += [f"{verb} {held[0]} with {tool}" for verb, tool in TOOLS.items() if held and tool == here]
        return actions + ["use desklamp"] * bool(here and here == self.lamp)

    def _act(self, text):
        action = " ".join(re.sub(r"\b(the|an|a)\b|[.`'\"]", " ", text.lower()).split())  # whatever its case and articles
        invalid = action not in self.admissible()
        observation = "Nothing happens." if invalid else self._carry_out(*action.split())
        delivered = sum(self._ready(o) and o[1] == self.target for o in self.objects)
        solved = self.examined if self.kind == "examine" else delivered >= (2 if self.kind == "two" else 1)
        return observation, invalid, solved, solved

    def _carry_out(self, verb, *words):
        if verb == "go":
            self.here = words[-1]
        elif verb == "take":
            self.held = next(o for o in self.objects if o[0] == words[0] and o[1] == self.here)
            self.held[1] = None
            return f"You take the {words[0]}."
        elif verb == "put":
            self.held[1], self.held = self.here, None
            return f"You put the {words[0]} down."
        elif verb in TOOLS:
            self.held[2] = verb  # a heated object that is cooled is no longer hot
            return f"You {verb} the {words[0]}."
        elif verb == "use":
            self.examined = self.held is not None and self.held[0] == self.object
            return "You turn on the desklamp."
        self.seen.add(self.here)
        found = ["desklamp"] * (self.here == self.lamp) + [o[0] for o in self.objects if o[1] == self.here]
        return f"You see {', '.join(found if self.here else self.places) or 'nothing'}."

    def _ready(self, item):  # whether an object is as the task wants it, wherever it is
        return item[0] == self.object and (self.kind not in TOOLS or item[2] == self.kind)

    def expert(self):
        """The next action of a scripted agent that knows only what it has seen; it searches in the order of the list."""
        held = self.held
        if held and held[0] != self.object:
            return f"put {held[0]} in {self.here}"
        if held and self.kind == "examine":
            return self._visit(self.lamp if self.lamp in self.seen else None) or "use desklamp"
        if held and not self._ready(held):
            return self._visit(TOOLS[self.kind]) or f"{self.kind} {held[0]} with {self.here}"
        if held:
            return self._visit(self.target) or f"put {held[0]} in {self.here}"
        found = [o for o in self.objects if o[0] == self.object and o[1] in self.seen]
        left = [o for o in found if o[1] != self.target or not self._ready(o)]  # not yet delivered
        left.sort(key=lambda o: o[1] != self.here)  # what lies here first
        return self._visit(left[0][1] if left else None) or f"take {left[0][0]} from {self.here}"

    def _visit(self, place):  # None if already there; if the place is unknown (None), where nobody has looked
        place = place or next(p for p in self.places if p not in self.seen and p != self.target)
        return f"go to {place}" if place != self.here else None

    def demonstration(self, seed, noise=0.0):
        """A scripted episode, `[(observation, action), ...]`: the expert's, but each action is random with chance `noise`."""
        rng, observation, turns = random.Random(f"demonstration/{seed}"), self.reset(seed=seed)[0], []
        while not self.done:
            slips = self.admissible() + [f"take {rng.choice(ROOMS[self.room][1])} from {rng.choice(self.places)}"]
            action = rng.choice(slips) if rng.random() < noise else self.expert()
            turns.append((observation, action))
            observation = self.step(action)[0]
        return turns


# ---------------------------------------------------------------- a sandbox for programs that nobody trusts
# RL finds whatever passes, so a policy's programs count as hostile. The kernel contains them, for good and without privileges:
# Landlock says which files exist, seccomp which system calls, rlimits how much of everything. The verdict is the parent's:
# expected values never enter the child. A server forks a fresh child for each program, so that one costs milliseconds.
# These calls may be made, as name:number on x86-64:number on aarch64: memory, reading, time, identity. All else is EPERM.
CALLS = """read:0:63 write:1:64 close:3:57 fstat:5:80 lseek:8:62 mmap:9:222 mprotect:10:226 munmap:11:215 brk:12:214
rt_sigaction:13:134 rt_sigprocmask:14:135 rt_sigreturn:15:139 pread64:17:67 mremap:25:216 madvise:28:233 nanosleep:35:101
getpid:39:172 exit:60:93 uname:63:160 getcwd:79:17 gettimeofday:96:169 getrusage:98:165 getuid:102:174 getgid:104:176
geteuid:107:175 getegid:108:177 sigaltstack:131:132 gettid:186:178 futex:202:98 getdents64:217:61 clock_gettime:228:113
clock_nanosleep:230:115 exit_group:231:94 newfstatat:262:79 readlinkat:267:78 faccessat:269:48 getrandom:318:278 statx:332:291"""
MACHINES = {"x86_64": (1, 0xC000003E, 257), "aarch64": (2, 0xC00000B7, 56)}  # column of CALLS, audit number, openat
CANARY = """open("/etc/passwd") | open(project) | os.listdir("/") | open("/tmp/aem", "w") | os.mkdir("/tmp/aem") | os.pipe()
os.fork() | _thread.start_new_thread(print, ()) | os.execv("/bin/true", ["true"]) | socket.socket() | socket.socketpair()
os.kill(os.getppid(), 0) | os.kill(0, 0) | os.chmod("/tmp", 0o777) | os.memfd_create("x") | os.setuid(0) | bytearray(2**33)
os.dup(3) | resource.setrlimit(resource.RLIMIT_CPU, (99, 99)) | 1 / (1 + ctypes.CDLL(None).ptrace(0, 0, 0, 0))"""


def encode(value):
    """A value in JSON's types, by exact type: an instance of a subclass may lie about itself."""
    kind = type(value)
    if kind in (list, tuple, set, frozenset, dict):
        items = [encode(v) for v in (value.items() if kind is dict else value)]
        return [kind.__name__, *(items if kind in (list, tuple) else sorted(items, key=json.dumps))]
    return value if value is None or kind in (bool, int, float, str) else [kind.__name__, repr(value)]


def same(expected, reply):
    """Whether a reply is the expected value, both encoded: True is not 1, NaN is nothing, floats are compared to 1e-6."""
    kinds = [type(expected), type(reply)]
    if kinds == [list, list]:
        return len(expected) == len(reply) and all(map(same, expected, reply))
    if float in kinds and set(kinds) <= {int, float}:
        with contextlib.suppress(OverflowError):  # an integer of 400 digits
            return math.isclose(expected, reply, rel_tol=1e-6, abs_tol=1e-6)
    return kinds[0] is kinds[1] and expected == reply


def lock_up(cfg, ruleset, parent, reply):
    """In the child: give up every right, for good. Returns the layers that can't be had."""
    libc, code = ctypes.CDLL(None), ctypes.create_string_buffer(bytes.fromhex(cfg["filter"]))
    for fd, target in ((3, 0), (3, 1), (3, 2), (reply, 3)):  # 3 has been /dev/null so far
        os.dup2(fd, target)
    layers = {  # 0 or None if it holds; in this order, as seccomp forbids the means of the others
        "a session of its own": os.setsid(),  # no terminal, and no process group in common with anybody
        "limits": any(libc.prlimit(0, kind, (ctypes.c_uint64 * 2)(most, most), None) for kind, most in cfg["limits"]),
        "dying with its parent": libc.prctl(1, 9, 0, 0, 0) or os.getppid() != parent,
        "Landlock": libc.syscall(446, ruleset, 0),  # no file but the standard library's
        "dropping root's capabilities": libc.capset((ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()),
        "closing what it inherited": os.closerange(4, 64),
        "seccomp": libc.prctl(22, 2, (ctypes.c_uint64 * 2)(len(code) // 8, ctypes.addressof(code)), 0, 0),  # no call but CALLS
    }
    return [layer for layer, failed in layers.items() if failed]


def answer(task):
    """In the child: load the program, and reply a JSON line to each call. From here on nothing it says can be trusted."""
    space = {}
    for args in marshal.loads(bytes.fromhex(task["args"])):
        try:
            if not space:
                space["__name__"] = "program"
                exec(compile(task["code"], "program", "exec"), space)
                function = eval(task["entry"], space)
            value = function(*args)
            line = {"value": encode(value), "shown": repr(value)[:300]}
        except BaseException as error:
            line = {"error": f"{type(error).__name__}: {error}"[:300]}
        os.write(3, json.dumps(line).encode() + b"\n")


def serve(cfg):
    """The server: fork a child for each task, watch it, print [its replies, how it ended] in JSON. It ends with its parent."""
    libc = ctypes.CDLL(None)
    os.open("/dev/null", os.O_RDWR)  # descriptor 3
    libc.prctl(4, 0, 0, 0, 0)  # not dumpable: nobody may trace it or its children, or read their memory
    libc.prctl(38, 1, 0, 0, 0)  # no new privileges: Landlock and seccomp ask for it
    for name in "_bz2 _ctypes _decimal _hashlib _lzma _sqlite3 _ssl _uuid _zstd pyexpat zlib".split():
        with contextlib.suppress(ImportError):  # now, for they link to libraries that can't be read later
            __import__(name)
    ruleset = libc.syscall(444, ctypes.byref(ctypes.c_uint64(2**13 - 1)), 8, 0)
    for path, rights in cfg["paths"]:
        libc.syscall(445, ruleset, 1, (ctypes.c_uint32 * 3)(rights, 0, fd := os.open(path, os.O_PATH)), 0)
        os.close(fd)
    answer({"code": "f = int", "entry": "f", "args": marshal.dumps([()]).hex()})  # what Python sets up on first use
    while watcher := os.fork():  # a new one for each task: no child's memory has ever held another's program, inputs or values
        if os.waitpid(watcher, 0)[1]:
            return
    libc.prctl(1, 9, 0, 0, 0)  # dies with the server
    parent, (replies, reply), task = os.getpid(), os.pipe(), sys.stdin.buffer.readline() or sys.exit(1)
    if not (pid := os.fork()):
        try:
            missing = lock_up(cfg, ruleset, parent, reply)
            os.write(3, f"missing or forbidden: {missing}".encode() if missing else b"ready\n")
            if not missing:
                answer(json.loads(task))
        finally:
            os._exit(0)
    os.close(reply)
    data, end = b"", time.monotonic() + cfg["seconds"]
    while (left := end - time.monotonic()) > 0 and len(data) < 2**20:
        ready = select.select([replies, 0], [], [], left)[0]
        chunk = os.read(replies, 65536) if replies in ready else b""
        if ready and not chunk:  # the child has ended, or the parent
            break
        data += chunk
    os.kill(pid, 9)
    _, code, usage = os.wait4(pid, 0)
    slow = left <= 0 or usage.ru_utime + usage.ru_stime > 0.9 * cfg["limits"][0][1]
    ended = "flood" if len(data) >= 2**20 else "" if code == 0 else "timeout" if slow else "crashed"
    print(json.dumps([data.decode(errors="replace"), ended]), flush=True)
    os._exit(0)  # at once


# one bool per test; 'passed', 'failed', 'error' (it raised), 'timeout', 'crashed' or 'flood'; what the agent is told
Verdict = NamedTuple("Verdict", [("passed", list), ("status", str), ("feedback", str)])


class SandboxError(RuntimeError):
    """Programs can't be contained here, or the sandbox broke. That is never a reward of 0: the run stops."""


class Sandbox:
    """Runs programs that nobody trusts, `workers` at a time, from any thread. Raises SandboxError where they can't be contained.

    A program has `cpu_seconds`, `memory_mb` and the standard library; no file, process, thread or network.
    """

    def __init__(self, cpu_seconds=2, memory_mb=512, workers=2):
        if sys.platform != "linux" or os.uname().machine not in MACHINES:
            raise SandboxError("programs can be contained on Linux (5.13 or later) only, on x86-64 or aarch64")
        column, audit, openat = MACHINES[os.uname().machine]
        limits = [(0, math.ceil(cpu_seconds)), (9, memory_mb << 20), (1, 0), (6, 0), (7, 32), (4, 0)]
        library = os.path.dirname(os.__file__)  # 4: read a file, 8: list a folder; each of its entries but site-packages
        entries = [(e.path, 12 if e.is_dir() else 4) for e in os.scandir(library) if not e.name.endswith("-packages")]
        allow, deny = (6, 0, 0, 0x7FFF0000), (6, 0, 0, 0x50001)  # BPF; calls in another architecture's numbers kill
        code = [(32, 0, 0, 4), (21, 1, 0, audit), (6, 0, 0, 0x80000000), (32, 0, 0, 0), (53, 0, 1, 2**30), deny]
        code += [line for call in CALLS.split() for line in ((21, 0, 1, int(call.split(":")[column])), allow)]
        code += [(21, 0, 3, openat), (32, 0, 0, 32), (69, 1, 0, 0o1103), allow, deny]  # opening, unless to write or create
        cfg = {"limits": limits, "seconds": 3 * cpu_seconds + 2, "paths": [(library, 8), *entries]}
        cfg |= {"filter": b"".join(struct.pack("HBBI", *line) for line in code).hex()}
        source = "import contextlib, ctypes, json, marshal, os, select, sys, time\n"
        source += "".join(map(inspect.getsource, (encode, lock_up, answer, serve))) + "serve(json.loads(sys.argv[1]))"
        command = [sys.executable, "-I", "-S", "-B", "-X", "utf8", "-W", "ignore", "-c", source, json.dumps(cfg)]
        options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "env": {}, "cwd": "/"}
        self.workers, self.idle = workers, queue.SimpleQueue()
        for _ in range(workers):
            self.idle.put(subprocess.Popen(command, start_new_session=True, **options))
        acts = CANARY.replace("\n", " | ").split(" | ")
        code = f"import _thread, ctypes, os, resource, socket\nproject = {__file__!r}\ndef act(text):\n    eval(text)"
        for act, reply in zip(acts, self.run(code, "act", [[act] for act in acts])):
            if not re.match("(Permission|OS|Memory|Runtime|ZeroDivision|Value)Error", reply.get("error", "")):
                raise SandboxError(f"programs can't be contained here, the sandbox let {act} pass: {reply}")

    def close(self):
        """End the servers; waits for what still runs."""
        for _ in range(self.workers):
            self.idle.get().communicate()

    def run(self, code, entry, args):
        """Call the program's `entry` with each of `args`. Returns a reply per call, {"value": ...} or {"error": text}."""
        code = code if len(code) <= 2**16 else "raise MemoryError('64 KB are the limit')"
        server = self.idle.get()
        try:
            server.stdin.write(json.dumps({"code": code, "entry": entry, "args": marshal.dumps(args).hex()}).encode() + b"\n")
            server.stdin.flush()
            text, ended = json.loads(server.stdout.readline())
        except (OSError, ValueError):
            text = "its server has died"
        except BaseException:  # an interrupt: its late answer must not pass for the next program's
            server.kill()
            raise
        finally:
            self.idle.put(server)
        if not text.startswith("ready\n"):
            raise SandboxError(f"programs can't be contained here, {text or 'the sandbox gives no answer'}")
        replies, rest = [], {"error": ended or "no reply", "ended": ended or "error"}
        with contextlib.suppress(ValueError, RecursionError):  # if anything is no reply, or too much, nothing is believed
            *lines, tail = text[6:].split("\n", len(args))
            replies = [] if tail else [json.loads(line) for line in lines]
        replies = replies if all(type(reply) is dict and "ended" not in reply for reply in replies) else []  # that is ours to say
        return replies + [rest] * (len(args) - len(replies))

    def grade(self, code, entry, tests):
        """Judge a program by tests, pairs (arguments, expected value). Raises ValueError if there are none."""
        if not tests:
            raise ValueError("a program can't be judged by no tests")
        replies = self.run(code, entry, [arguments for arguments, _ in tests])
        passed = ["value" in reply and same(encode(expected), reply["value"]) for (_, expected), reply in zip(tests, replies)]
        if all(passed):
            return Verdict(passed, "passed", "")
        (arguments, expected), reply = next((test, reply) for test, reply, good in zip(tests, replies, passed) if not good)
        got = f"failed ({reply['error']})" if "error" in reply else f"returned {reply.get('shown')}"
        feedback = f"{entry}({', '.join(map(ascii, arguments)):.600}) {got:.600}, expected {ascii(expected):.600}"
        status = str(reply.get("ended", "error" if "error" in reply else "failed"))
        return Verdict(passed, status, re.sub(r"<\||\|>|[^\n -~]", "", feedback))  # no special token of a tokenizer


# ---------------------------------------------------------------- coding tasks
def coding_task(row):
    """A row of a data set as ((prompt, entry point, tests), number of tests left out). Raises ValueError: what is wrong with it.
    Asserts of the form `f(arguments) == value`, all literals, become inputs and expected values; they are parsed, never run."""
    prompt, sources = row.get("prompt") or row.get("text"), row.get("tests") or row.get("test_list") or [row.get("test")]
    plain = str(row.get("entry_point") or "f").isidentifier()
    if not plain or not isinstance(sources, list) or not all(isinstance(t, str) for t in (prompt, *sources)):
        raise ValueError('it needs a text "prompt" (or "text"), a name "entry_point", a list of texts "tests" (or "test_list")')
    tests, asserts = [], [node.test for source in sources for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Assert)]
    for test in asserts:
        match test:
            case ast.Compare(ast.Call(ast.Name(name), arguments, []), [ast.Eq()], [value]):
                with contextlib.suppress(ValueError):  # not literal
                    tests.append((name, [ast.literal_eval(a) for a in arguments], ast.literal_eval(value)))
    names = [name for name, _, _ in tests]
    entry = row.get("entry_point") or max(names, key=names.count, default="")
    tests = [(arguments, value) for name, arguments, value in tests if name in (entry, "candidate")]
    example = f"\nA test: {entry}({', '.join(map(repr, tests[0][0]))}) == {tests[0][1]!r}" if tests else ""
    return (prompt.strip() + example, entry, tests), len(asserts) - len(tests)


@functools.cache
def load_tasks(dataset):
    """The tasks of HumanEval, MBPP or a JSONL file, those with two tests or more. Raises ValueError that names the row.

    A line of the file: {"prompt": "Write add(a, b).", "entry_point": "add", "tests": ["assert add(1, 2) == 3", ...]}
    """
    import datasets  # not needed for the embedded tasks
    rows, found = None, []
    try:
        local = dataset.endswith((".json", ".jsonl"))
        rows = map(json.loads, open(dataset)) if local else (r for part in datasets.load_dataset(dataset).values() for r in part)
        for row in rows:
            found.append(coding_task(row))
    except Exception as error:  # whatever a loader or the network raises: it is the data set that can't be used
        where = f", row {len(found) + 1}" if rows else ""
        raise ValueError(f"cannot use --dataset {dataset}{where}: {' '.join(str(error).split())[:200]}") from error
    tasks = [task for task, _ in found if len(task[2]) > 1]
    summary = f"{len(tasks)} of {len(found)} tasks have two tests of the form f(literals) == literal or more"
    if not tasks:
        raise ValueError(f"cannot use --dataset {dataset}: {summary}")
    print(f"{dataset}: {summary}; {sum(n for _, n in found)} tests of another form are left out")
    return tasks


# The embedded tasks: two steps in words, and how each is written.
STEPS = {
    "add {k}": "({e} + {k})", "subtract {k}": "({e} - {k})", "multiply by {k}": "({e} * {k})", "negate": "(-{e})",
    "take the remainder by {k}": "({e} % {k})", "take the absolute value": "abs({e})", "cap at {k}": "min({e}, {k})",
    "raise to at least {k}": "max({e}, {k})",
}  # fmt: skip


class Code(TextEnv):
    """Write a program, see the first public test that it fails, try again. Programs run in a sandbox.

    A program that passes the public tests ends the episode; the task is solved if it passes the hidden ones too. A response
    without a program is invalid. Tasks are of a small embedded family, or those of `dataset` (see `load_tasks`).
    """

    instructions = (
        "Write a Python program that defines the function asked for, and nothing else; you may put it in a fenced block. It has "
        "the standard library, one thread, and no files, processes or network. If a test fails you see it, and reply again."
    )
    max_turns, parallel, sandbox = 3, True, None  # one sandbox for all, made on first use

    def __init__(self, max_turns=None, dataset=""):
        self.tasks, self.max_response_tokens = (load_tasks(dataset), 512) if dataset else (None, 24)
        Code.sandbox = Code.sandbox or Sandbox(workers=min(8, os.cpu_count()))
        super().__init__(max_turns)

    def _draw(self):
        if self.tasks:
            kind, (prompt, self.entry, tests) = "", self.rng.choice(self.tasks)
        else:
            self.steps = [(words, self.rng.randint(2, 9)) for words in self.rng.sample(list(STEPS), 2)]
            first, second = (words.format(k=k) for words, k in self.steps)
            prompt, kind, self.entry = f"Write f(x): {first}, then {second}.", second.split()[0], "f"
            tests = [([x], eval(formula(self.steps), {"x": x})) for x in self.rng.sample(range(-9, 20), 12)]
        shown = max(1, len(tests) // 3)
        self.public, self.hidden = tests[:shown], tests[shown:]
        return prompt, kind, prompt

    def _act(self, text):
        program = (re.findall(r"```[^\n]*\n(.*?)(?:```|\Z)", text, re.DOTALL) or [text])[-1].strip()  # last block, or all
        if not re.search(rf"\b(def|class|as)\s+{self.entry}\b|\b{self.entry}\b.*=", program):
            return f"There is no program that defines {self.entry}.", True, False, False
        verdict = self.sandbox.grade(program, self.entry, self.public)
        if not all(verdict.passed):
            return verdict.feedback, False, False, False
        return "The tests pass.", False, all(self.sandbox.grade(program, self.entry, self.hidden).passed), True

    def demonstration(self, seed, noise=0.0):
        """Attempts at an embedded task, each step of each wrong with chance `noise`, in kind, in number or in order."""
        rng, observation, turns = random.Random(f"demonstration/{seed}"), self.reset(seed=seed)[0], []
        while observation and len(turns) < self.max_turns:
            steps = [(rng.choice(list(STEPS)) if rng.random() < noise else words, k) for words, k in self.steps]
            steps = [(words, rng.randint(2, 9) if rng.random() < noise else k) for words, k in steps]
            program = formula(steps[::-1] if rng.random() < noise else steps)
            turns.append((observation, f"def f(x): return {program}"))
            results = [(n, eval(program, {"x": n}), value) for (n,), value in self.public]
            observation = next((f"f({n}) returned {got}, expected {value}" for n, got, value in results if got != value), "")
        return turns


def formula(steps):
    """The expression that an embedded task asks for: our own text, so that evaluating it here is safe."""
    return functools.reduce(lambda e, step: STEPS[step[0]].format(e=e, k=step[1]), steps, "x")


ENVS = {"household": Household, "code": Code}


def make(name, **kwargs):
    """An environment: a name in `ENVS`, gem:NAME for GEM's, or `module:Class`. Raises ValueError if there is none such."""
    if name in ENVS:
        return ENVS[name](**kwargs)
    if ":" not in name:
        raise ValueError(f"unknown environment {name!r}: use one of {', '.join(ENVS)}, or module:Class for your own")
    gem = name.startswith("gem:")
    try:
        return pkgutil.resolve_name("gem:make")(name[4:], **kwargs) if gem else pkgutil.resolve_name(name)(**kwargs)
    except Exception as error:
        hint = "; pip install gem-llm" * (gem and isinstance(error, ImportError))
        raise ValueError(f"cannot make environment {name!r}: {type(error).__name__}: {error}{hint}") from error


# The embedded policy's chat template. It knows its task already, so it passes over the system prompt.
TEMPLATE = """{% for m in messages if m.role != 'system' %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}\
{% if add_generation_prompt %}<|assistant|>{% endif %}"""


def embedded_policy(env, steps, noise, batch=24):
    """A Qwen2 of 0.2 M parameters to start RL from, without a download: it has imitated `env.demonstration`, mistakes and all.

    Returns: (model, tokenizer). Every word is one token. The loss runs over all tokens: from actions alone, a model this small
    never learns to copy the object's name.
    """
    import torch
    import transformers
    from tqdm import tqdm

    texts = (text for i in range(2000) for turn in env.demonstration(i, 0.5) for text in turn)
    options = {"new_special_tokens": ["<|end|>", "<|user|>", "<|assistant|>"], "show_progress": False}
    tokenizer = transformers.Qwen2Tokenizer().train_new_from_iterator(texts, 4096, **options)
    tokenizer.eos_token, tokenizer.chat_template, tokenizer.padding_side = "<|end|>", TEMPLATE, "right"
    shape = dict(hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4)
    shape |= dict(vocab_size=len(tokenizer), bos_token_id=None, eos_token_id=tokenizer.eos_token_id)
    config = transformers.Qwen2Config(tie_word_embeddings=True, initializer_range=0.1, **shape)
    torch.manual_seed(0)
    model, rng = transformers.Qwen2ForCausalLM(config), random.Random("demonstrations")
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
