"""Hostile programs against the sandbox, and benign ones that have to pass. Standard library only.

    python experiments/hostile.py            # all programs, in this process's own rights
    python experiments/hostile.py --user     # the same as an unprivileged user, if this process is root's
    python experiments/hostile.py --mutate   # takes each protection away in turn: the canary or a program has to notice

A program is contained if its verdict is "not passed". Those of ACTS return the right answer only if their act succeeds, those of
CHEATS and HANGS are wrong however they end. Then the machine is looked over: files, processes, shared memory, descriptors.
"""

import contextlib
import os
import resource
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import envs

TESTS = [([2], 4), ([5], 10)]  # the task: double x
HEAD = """import ctypes, gc, json, mmap, os, resource, signal, socket, sys, time
libc = ctypes.CDLL(None, use_errno=True)
def refused(act):  # by whom: seccomp says EPERM (1), Landlock EACCES, a kernel that has no such call ENOSYS
  try: return ctypes.get_errno() if act() == -1 else 0
  except OSError as error: return error.errno
"""
SCAN = """import ctypes, platform
libc, sigprocmask = ctypes.CDLL(None), {"x86_64": 14, "aarch64": 135}[platform.machine()]
def f(x):  # the pages around an object of ours that hold the reversed text; a page that isn't mapped makes the call fail
  needle, here, found = bytes(reversed(%r)), id(object()) & ~4095, 0
  for page in range(here - 2**23, here + 2**23, 4096):
    if libc.syscall(sigprocmask, 1, ctypes.c_void_p(page), None, 8) == 0: found += needle in ctypes.string_at(page, 4096)
  return found"""
ACTS = """open("/etc/passwd").read()
open("/etc/hostname").read()
open(PROJECT).read()
open(HARNESS).read()
os.listdir("/")
os.listdir("/tmp")
os.listdir("/proc")
open("/proc/self/environ", "rb").read()
open("/proc/self/mem", "rb").read(1)
open(f"/proc/{os.getppid()}/mem", "rb").read(1)
open(f"/proc/{os.getppid()}/environ", "rb").read()
open(f"/proc/{os.getppid()}/cmdline", "rb").read()
os.listdir(f"/proc/{os.getppid()}/fd")
open("/dev/urandom", "rb").read(1)
open("/dev/null", "w")
assert refused(lambda: open(DIR + "/new", "w")) != 1
assert refused(lambda: os.execv("/bin/true", ["true"])) != 1
assert refused(lambda: libc.syscall(0x40000000 + 39)) != 1
open(DIR + "/new", "w").write("x")
os.close(os.open(DIR + "/new2", os.O_CREAT | os.O_RDONLY))
open("/dev/shm/aem", "w")
open(VICTIM).read()
open(VICTIM, "a").write("x")
os.truncate(VICTIM, 0)
os.remove(VICTIM)
os.rename(VICTIM, VICTIM + "2")
os.chmod(VICTIM, 0)
os.chown(VICTIM, 1, 1)
os.utime(VICTIM, (1, 1))
os.setxattr(VICTIM, "user.x", b"x")
os.link(VICTIM, VICTIM + "3")
os.symlink(VICTIM, DIR + "/link")
os.mkdir(DIR + "/folder")
os.rmdir(DIR)
os.mkfifo(DIR + "/fifo")
os.mknod(DIR + "/node")
open(os.path.dirname(os.__file__) + "/sitecustomize.py", "w")
sys.path.append(SITE) or __import__("pip")
sys.path.append(os.path.dirname(os.__file__) + "/site-packages") or __import__("pip")
os.chdir("/tmp")
os.chroot("/tmp")
os.umask(0)
os.fork()
os.forkpty()
__import__("threading").Thread(target=print).start()
__import__("_thread").start_new_thread(print, ())
__import__("subprocess").run(["true"])
__import__("multiprocessing").Process(target=print).start()
assert os.system("true") == 0
os.posix_spawn("/bin/true", ["true"], {})
os.execv("/bin/true", ["true"])
socket.socket(socket.AF_INET, socket.SOCK_STREAM)
socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
socket.socket(socket.AF_UNIX)
socket.socketpair()
__import__("urllib.request").request.urlopen("http://127.0.0.1")
os.kill(os.getppid(), 0)
os.kill(os.getpid(), signal.SIGSTOP)
os.kill(-1, 0)
os.killpg(0, 0)
signal.raise_signal(signal.SIGSTOP)
signal.alarm(9); assert 0 < signal.alarm(0) < 10
signal.setitimer(signal.ITIMER_REAL, 9)
os.setpriority(os.PRIO_PROCESS, os.getppid(), 1)
os.nice(1)
os.setpriority(os.PRIO_PROCESS, 0, 1)
resource.getrlimit(resource.RLIMIT_CPU)
resource.prlimit(os.getppid(), resource.RLIMIT_NOFILE)
resource.prlimit(os.getppid(), resource.RLIMIT_NOFILE, (9, 9))
resource.setrlimit(resource.RLIMIT_CPU, (99, 99))
resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
os.sched_setaffinity(0, [0])
os.memfd_create("x")
__import__("multiprocessing.shared_memory").shared_memory.SharedMemory(create=True, size=9)
os.pipe()
os.dup(3)
os.eventfd(0)
os.pidfd_open(os.getppid())
bytearray(2**33)
mmap.mmap(-1, 2**33)
[bytearray(2**20) for _ in range(2000)]
os.setuid(1)
os.setgid(1)
os.setgroups([1])
os.setsid()
assert libc.ptrace(16, os.getppid(), 0, 0) == 0
assert libc.ptrace(0, 0, 0, 0) == 0
assert libc.unshare(0x10000000) == 0
assert libc.setns(3, 0) == 0
assert libc.prctl(4, 1, 0, 0, 0) == 0
assert libc.personality(0) != -1
assert libc.syscall(425, 8, ctypes.create_string_buffer(120)) >= 0
assert libc.syscall(321, 0, ctypes.create_string_buffer(120), 120) >= 0
assert libc.syscall(323, 0) >= 0
assert libc.syscall(298, ctypes.create_string_buffer(120), 0, -1, -1, 0) >= 0
assert libc.syscall(310, os.getppid(), None, 0, None, 0, 0) >= 0
assert libc.syscall(250, 0, -3, 1) >= 0
assert libc.syscall(0x40000000 + 39) > 0
assert libc.shmget(0, 4096, 0o1600) >= 0
assert libc.msgget(0, 0o1600) >= 0
assert libc.semget(0, 1, 0o1600) >= 0
assert libc.mq_open(b"/aem", 0o102, 0o600, None) >= 0
assert libc.sethostname(b"x", 1) == 0
assert libc.sync_file_range(3, 0, 0, 0) == 0
assert libc.vhangup() == 0""".splitlines()
CHEATS = {
    "exit": "import sys\nsys.exit(0)",
    "_exit": "import os\nos._exit(0)",
    "exit in f": "import os\ndef f(x): os._exit(0)",
    "prints": "print('all passed')\nprint('{\"value\": 4}')",
    "equal to all": "class A:\n  def __eq__(s, o): return True\n  __hash__ = None\ndef f(x): return A()",
    "int subclass": "class A(int):\n  def __eq__(s, o): return True\ndef f(x): return A(3)",
    "right int subclass": "class A(int): pass\ndef f(x): return A(2 * x)",
    "str": "def f(x): return str(2 * x)",
    "list": "def f(x): return [2 * x]",
    "tagged": "def f(x): return {'tuple': [2 * x]}",
    "nan": "def f(x): return float('nan')",
    "infinity": "def f(x): return float('inf')",
    "huge integer": "def f(x): return 10**4000",
    "too huge integer": "def f(x): return 10**400000",
    "close": "def f(x): return 2 * x + 1e-3",
    "complex": "def f(x): return complex(2 * x)",
    "none": "def f(x): pass",
    "generator": "def f(x): yield 2 * x",
    "one right": "def f(x): return 4",
    "first call only": "n = []\ndef f(x):\n  n.append(1)\n  return 4 if len(n) == 1 else None",
    "forged": "import os\nos.write(3, b'{\"value\": null}\\n{\"value\": 4}\\n{\"value\": 4}\\n')\ndef f(x): return 0",
    "forged too many": "import os\nos.write(3, b'{\"value\": 4}\\n' * 50)\ndef f(x): return 0",
    "forged, then dies": "import os\nos.write(3, b'{\"value\": null}\\n{\"value\": 4}\\n{\"value\": 5}\\n')\nos._exit(0)",
    "forged list": "import os\nos.write(3, b'[1, 2]\\n')\ndef f(x): return 0",
    "forged rubbish": "import os\nos.write(3, bytes(range(256)) * 9)\ndef f(x): return 2 * x",
    "forged depth": "import os\nos.write(3, b'[' * 50000 + b'\\n')\ndef f(x): return 2 * x",
    "forged right, but too many": "import os\nos.write(3, b'{\"value\": 4}\\n{\"value\": 10}\\n')\ndef f(x): return 0",
    "forged list, then dies": "import os\nos.write(3, b'[1]\\n')\nos._exit(0)",
    "forged depth, then dies": "import os\nos.write(3, b'[' * 50000 + b'\\n')\nos._exit(0)",
    "forged shown": "import os\nos.write(3, b'{\"shown\": [[1]], \"ended\": {}, \"value\": {\"value\": 4}}\\n')\nos._exit(0)",
    "forged verdict": "import os\nos.write(3, b'{\"ended\": \"passed\"}\\n')\nos._exit(0)\nf = 1",
    "forged pid": "import os\nos.write(3, b'1\\n')\ndef f(x): return 2 * x",
    "patched json": "import json\njson.dumps = lambda *a, **k: '{\"value\": 4}'\ndef f(x): return 0",
    "patched builtins": "import builtins\nbuiltins.type = lambda *a: int\nbuiltins.all = lambda x: True\ndef f(x): return A",
    "gc walk": "import gc\ndef f(x):\n  for o in gc.get_objects():\n"
    "    if isinstance(o, dict) and 'expected' in o: return o['expected']",
    "frame walk": "import sys\ndef f(x):\n  g = sys._getframe()\n  while g:\n"
    "    if 'expected' in g.f_locals: return g.f_locals['expected']\n    g = g.f_back",
    "argv": "import sys, json\ndef f(x): return json.loads(sys.orig_argv[-1])['expected']",
    "trace": "import sys\nsys.settrace(lambda *a: None)\ndef f(x): return None",
    "raises": "def f(x): raise SystemExit(0)",
    "raises at str": "class E(Exception):\n  def __str__(s): return 1 / 0\ndef f(x): raise E",
    "keyboard": "raise KeyboardInterrupt",
    "no entry": "def g(x): return 2 * x",
    "entry is no function": "f = 4",
    "syntax": "def f(x) return 2 * x",
    "empty": "",
    "nul": "def f(x):\n  return '\0'",
    "surrogate": "def f(x): return '\ud800'",
    "surrogate name": "\udcff = 1",
    "bidi": "def f(x): return '\u202e\u2066 4'",
    "nesting": "f = lambda x: " + "(" * 1000 + "x" + ")" * 1000,
    "deep list": "def f(x):\n  a = []\n  for _ in range(10**5): a = [a]\n  return a",
    "self containing": "def f(x):\n  a = []\n  a.append(a)\n  return a",
    "megabyte source": "def f(x): return 2 * x\n#" + "x" * 2**20,
    "recursion": "import sys\nsys.setrecursionlimit(10**9)\ndef f(x): return f(x)",
    "segfault": "import ctypes\ndef f(x): return ctypes.string_at(0)",
    "abort": "import os\ndef f(x): os.abort()",
    "closes descriptors": "import os\nos.closerange(0, 99)\ndef f(x): return 2 * x",
    "reads input": "import os\ndef f(x): return int(input())",
    "reads descriptors": "import os\ndef f(x):\n  for fd in range(4, 64):\n"
    "    try: return len(os.read(fd, 9))\n    except OSError: pass",
    "floods replies": "import os\ndef f(x):\n  while True: os.write(3, b'x' * 65536)",
    "floods lines": "import os\ndef f(x):\n  while True: os.write(3, b'\\n' * 65536)",
    "large value": "def f(x): return 'x' * 10**7",
    "large exception": "def f(x): raise ValueError('x' * 10**7)",
    "unpickles": "import pickle\ndef f(x): return pickle.loads(b\"cos\\nsystem\\n(S'true'\\ntR.\")",
}  # fmt: skip
HANGS = {
    "loop": "while True: pass",
    "loop in f": "def f(x):\n  while True: pass",
    "loop that catches": "def f(x):\n  while True:\n    try:\n      while True: pass\n    except BaseException: pass",
    "ignores signals": "import signal\nfor n in range(1, 65):\n"
    "  try: signal.signal(n, signal.SIG_IGN)\n  except Exception: pass\nwhile True: pass",
    "in C": "def f(x): return sum(range(10**12))",
    "regex": "import re\ndef f(x): return re.match('(a+)+$', 'a' * 40 + 'b')",
    "power": "def f(x): return len(str(7**7**9))",
    "str of exception": "class E(Exception):\n  def __str__(s):\n    while True: pass\ndef f(x): raise E",
    "atexit": "import atexit, time\natexit.register(time.sleep, 99)\ndef f(x): return None",
    "del": "class A:\n  def __del__(s):\n    while True: pass\ndef f(x):\n  A()\n  return 2 * x",
    "sleep": "import time\ndef f(x): time.sleep(99)",
    "lock": "import threading\nlock = threading.Lock()\nlock.acquire()\ndef f(x): lock.acquire()",
    "output": "def f(x):\n  while True: print('x' * 65536)",
    "bytes": "def f(x):\n  a = []\n  while True:\n    try: a.append(bytearray(10**6))\n    except MemoryError: pass",
}  # fmt: skip
BENIGN = {
    "plain": "def f(x): return 2 * x",
    "float": "def f(x): return 2.0 * x",
    "prints": "print('hello')\ndef f(x):\n  print(x, file=__import__('sys').stderr)\n  return 2 * x",
    "imports": "import collections, dataclasses, decimal, fractions, functools, heapq, itertools, "
    "math, random, re, statistics, string\n"
    "import bisect, datetime, hashlib, json, typing, copy, operator, queue, textwrap, "
    "unicodedata, zlib, sqlite3, csv, io, enum, abc\n"
    "def f(x): return int(math.fsum([x, x]))",
    "recursion": "def g(n): return n if n < 2 else g(n - 1) + g(n - 2)\ndef f(x): return 2 * x + 0 * g(18)",
    "deep recursion": "def g(n): return 0 if n == 0 else g(n - 1)\ndef f(x): return 2 * x + g(800)",
    "memory": "def f(x):\n  a = bytearray(150 * 2**20)\n  return 2 * x",
    "processor": "import time\ndef f(x):\n  end = time.process_time() + 0.25\n"
    "  while time.process_time() < end: pass\n  return 2 * x",
    "sleep": "import time\ndef f(x):\n  time.sleep(0.3)\n  return 2 * x",
    "class": "class A:\n  def __init__(s, x): s.x = x\n  def double(s): return 2 * s.x\ndef f(x): return A(x).double()",
    "unicode": "überschuß = '漢字🙂'\ndef f(x): return 2 * x + len(überschuß) - 3",
    "main guard": "def f(x): return 2 * x\nif __name__ == '__main__':\n  f(input())",
    "lambda": "f = lambda x: x + x",
    "exception": "def f(x):\n  try: return {}[x]\n  except KeyError: return x << 1",
    "files of its own": "import io\ndef f(x):\n  b = io.StringIO()\n  b.write('x' * x * 2)\n  return len(b.getvalue())",
    "typing": "def f(x: int) -> int:\n  return 2 * x",
    "random": "import random\nrandom.seed(0)\ndef f(x): return 2 * x + int(random.random() * 0)",
}  # fmt: skip


def programs(folder):
    """{name: (source, whether it has to pass)}."""
    names = {
        "PROJECT": envs.__file__,
        "HARNESS": __file__,
        "DIR": folder,
        "VICTIM": f"{folder}/victim",
    }
    names["SITE"] = next(
        (p for p in sys.path if p.endswith("-packages")), "/usr/lib/python3/dist-packages"
    )
    found = {f"act: {act}": act for act in ACTS}
    for name, act in found.items():
        for word, path in names.items():
            act = act.replace(word, repr(path))
        found[name] = f"{HEAD}def f(x):\n  {act}\n  return 2 * x"
    hostile = (
        found
        | {f"cheat: {n}": c for n, c in CHEATS.items()}
        | {f"hang: {n}": c for n, c in HANGS.items()}
    )
    return {n: (c, False) for n, c in hostile.items()} | {
        f"benign: {n}": (c, True) for n, c in BENIGN.items()
    }


def traces(folder):
    """What hostile programs could have left behind: files, shared memory, processes, descriptors of this process."""
    mine = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(
            FileNotFoundError, ProcessLookupError
        ):  # others' processes come and go
            mine += [stat] if stat.read_text().split(") ")[1].split()[1] == str(os.getpid()) else []
    files = {
        str(p): (p.stat().st_mode, p.stat().st_size, p.stat().st_mtime)
        for p in Path(folder).rglob("*")
    }
    shared = sorted(os.listdir("/dev/shm")), open("/proc/sysvipc/shm").read().count("\n")
    return {
        "files": files,
        "shared memory": shared,
        "children": len(mine),
        "descriptors": len(os.listdir("/proc/self/fd")),
    }


STATUS = {"NoNewPrivs": "1", "Seccomp": "2"}
STATUS |= {"CapEff": "0" * 16, "CapPrm": "0" * 16, "CapInh": "0" * 16}
LIMITS = {"Max cpu time": 1, "Max file size": 0, "Max core file size": 0, "Max processes": 0}
LIMITS |= {"Max open files": 32, "Max address space": 512 << 20}


def look_for_others(sandbox):
    """Whether a program finds in its memory what others held before: [what it finds]."""
    secret = os.urandom(8).hex()
    scan = SCAN % secret[::-1].encode()
    before = sandbox.run(scan, "f", [[0]])[0].get("value")
    for _ in range(20):
        sandbox.run(f"text = {secret * 9!r}\ndef f(x): return x + text", "f", [[secret]])
    after = sandbox.run(scan, "f", [[0]])[0].get("value")
    if before == after:
        return []
    return [f"it finds another program in its memory ({before} pages before, {after} after)"]


def look_at(pid):
    """What holds a running child, read from outside: [what is missing]."""
    child = Path("/proc", str(pid))
    missing = []
    lines = (child / "status").read_text().splitlines()
    status = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
    for name, value in STATUS.items():
        if status[name].strip() != value:
            missing.append(f"{name} is {status[name]}")
    lines = (child / "limits").read_text().splitlines()
    for name, value in LIMITS.items():
        line = next(line for line in lines if line.startswith(name))
        if line[26:].split()[:2] != [str(value), str(value)]:
            missing.append(f"{name} is not {value}")
    with contextlib.suppress(PermissionError):  # as a user we may not look
        if sorted(os.listdir(child / "fd")) != ["0", "1", "2", "3"]:
            missing.append("it has other descriptors")
    if (child / "mem").stat().st_uid != 0:  # what can't be dumped belongs to root
        missing.append("it can be traced")
    if os.getsid(pid) != pid:
        missing.append("it is in its server's session")
    return missing


def only_child(pid):
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])


def look_inside(sandbox):
    """What a running child is really held by. Then its server dies, and so must it.

    Returns: [what is missing].
    """
    missing = look_for_others(sandbox)
    server = sandbox.idle.get()
    sandbox.idle.put(server)
    with ThreadPoolExecutor(1) as pool:
        asleep = pool.submit(sandbox.run, "import time\ntime.sleep(9)", "f", [[1]])
        time.sleep(0.5)
        pid = only_child(only_child(server.pid))  # its watcher's
        missing += look_at(pid)
        server.kill()
        time.sleep(0.3)
        child = Path("/proc", str(pid))
        if child.exists() and "Z" not in (child / "stat").read_text().split(")")[1][:3]:
            missing.append("it outlives its server")
        if not isinstance(asleep.exception(), envs.SandboxError):
            missing.append("a dead server goes unnoticed")
    return missing


def attack(only=""):
    """Run every program whose name contains `only`. Returns their number, and those that were not contained or not passed."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "victim").write_text("precious")
        everything, before = (
            {n: p for n, p in programs(folder).items() if only in n},
            traces(folder),
        )
        sandbox = envs.Sandbox(cpu_seconds=1, workers=2)
        memory, bad = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, []
        with ThreadPoolExecutor(4) as pool:
            verdicts = list(
                pool.map(lambda program: sandbox.grade(program[0], "f", TESTS), everything.values())
            )
        for (name, (_, passes)), verdict in zip(everything.items(), verdicts):
            if all(verdict.passed) != passes or (verdict.status == "passed") != passes:
                bad.append(f"{name} ({verdict.status}: {verdict.feedback[:100]})")
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) / 1024
        bad += [f"memory of this process grew by {grown:.0f} MB"] if grown > 50 else []
        bad += (
            []
            if all(sandbox.grade(BENIGN["plain"], "f", TESTS).passed)
            else ["the sandbox does not work any more"]
        )
        sandbox.close()
        bad += look_inside(envs.Sandbox(cpu_seconds=1, workers=1)) if not only else []
        after = traces(folder)
        bad += [
            f"{what}: {before[what]} before, {after[what]} after"
            for what in before
            if before[what] != after[what]
        ]
    return len(everything), bad


ALLOW = "read:0:63 write:1:64"
PROTECTIONS = {  # what to take away: (text in envs.py, what to put there)
    "Landlock": ("libc.syscall(SYS_LANDLOCK_RESTRICT_SELF, ruleset, 0),", "0,"),
    "no site-packages": ('if not entry.name.endswith("-packages")', "if True"),
    "seccomp": ('"seccomp": libc.prctl(', '"seccomp": 0 and libc.prctl('),
    "fork forbidden": (ALLOW, f"{ALLOW} clone:56:220 fork:57:220 vfork:58:220"),
    "threads forbidden": (ALLOW, f"{ALLOW} clone:56:220 clone3:435:435 set_robust_list:273:99 rseq:334:293"),
    "exec forbidden": (ALLOW, f"{ALLOW} execve:59:221"),
    "sockets forbidden": (ALLOW, f"{ALLOW} socket:41:198 socketpair:53:199"),
    "kill forbidden": (ALLOW, f"{ALLOW} kill:62:129"),
    "ptrace forbidden": (ALLOW, f"{ALLOW} ptrace:101:117"),
    "memfd forbidden": (ALLOW, f"{ALLOW} memfd_create:319:279"),
    "chmod forbidden": (ALLOW, f"{ALLOW} chmod:90:52 fchmodat:268:53"),
    "prlimit forbidden": (ALLOW, f"{ALLOW} prlimit64:302:261"),
    "pipes forbidden": (ALLOW, f"{ALLOW} pipe2:293:59"),
    "shared memory forbidden": (ALLOW, f"{ALLOW} shmget:29:194"),
    "timers forbidden": (ALLOW, f"{ALLOW} setitimer:38:103 alarm:37:103"),
    "priorities forbidden": (ALLOW, f"{ALLOW} setpriority:141:140"),
    "opening for reading only": ("(BPF_JSET, 1, 0, to_write)", "(BPF_JSET, 1, 0, 0)"),
    "x32 refused": ("X32_SYSCALL_BIT), deny", "X32_SYSCALL_BIT), allow"),
    "no new privileges": ("    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)", "    pass"),
    "not dumpable": ("    libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)", "    pass"),
    "the child dies with its parent": ("libc.prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0) or ", ""),
    "the watcher dies with the server": ("    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0)", "    pass"),
    "capabilities": ("libc.capset(header, (ctypes.c_uint32 * 6)())", "0"),
    "own session": ("    os.setsid()", "    pass"),
    "CPU limit": ("in limits.items():", 'in (limits | {"RLIMIT_CPU": 10**6}).items():'),
    "memory limit": ('"RLIMIT_AS": memory_mb << 20, ', ""),
    "file limit": ('"RLIMIT_FSIZE": 0, ', ""),
    "process limit": ('"RLIMIT_NPROC": 0, ', ""),
    "descriptor limit": (', "RLIMIT_NOFILE": 32', ""),
    "core limit": (', "RLIMIT_CORE": 0', ""),
    "wall clock": ("left = end - time.monotonic()", "left = 99"),
    "reply limit": (" and len(data) < MOST_REPLIES:", ":"),
    "kill": ("    os.kill(child, SIGKILL)\n", ""),
    "a watcher for each task": ("watcher = os.fork()", "watcher = 0"),
    "closed descriptors": ("os.closerange(REPLIES_FD + 1, 64),", "0,"),
    "exact types": ("kind in (bool, int, float, str)", "isinstance(value, (bool, int, float, str))"),
    "strict comparison": ("return comparable and expected == reply", "return str(expected) == str(reply)"),
    "number of replies": ("if rest or not honest", "if not honest"),
    "shape of replies": ("type(reply) is dict and ", ""),
    "how it ended is ours to say": (' and "ended" not in reply', ""),
    "deep replies": ("contextlib.suppress(ValueError, RecursionError)", "contextlib.suppress(ValueError)"),
    "source limit": ("if len(code) > 2**16:", "if False:"),
}  # fmt: skip


def copied(script, source, *options, user=False, timeout=600):
    """Run this script on a copy of envs.py, as `nobody` if so asked. Returns the finished process, None if it took too long."""
    python, identity = sys.executable, {}
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "experiments").mkdir()
        Path(folder, "envs.py").write_text(source)
        Path(folder, "experiments", "hostile.py").write_text(script)
        os.chmod(folder, 0o755)
        if user:
            identity = {"user": 65534, "group": 65534, "extra_groups": []}
            pythons = [
                sys.executable,
                sys._base_executable,
                "/usr/local/bin/python3",
                "/usr/bin/python3",
            ]
            python = next((p for p in pythons if runs(p, identity)), None)
            if not python:
                words = "skipped: there is no Python >= 3.10 that an unprivileged user may run\n"
                return subprocess.CompletedProcess([], 0, words, "")
        command, done = [python, "-B", f"{folder}/experiments/hostile.py", *options], None
        with contextlib.suppress(subprocess.TimeoutExpired):
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                timeout=timeout,
                start_new_session=True,
                **identity,
            )
        return done


def runs(python, identity):
    """Whether that interpreter can be run with that identity, and is new enough."""
    command = [python, "-c", "import sys; sys.exit(sys.version_info < (3, 10))"]
    try:
        return subprocess.run(command, cwd="/", **identity).returncode == 0
    except OSError:
        return False


def mutate():
    """Take every protection away in turn, in a copy. Returns how many nobody noticed."""
    unnoticed, source, script = 0, Path(envs.__file__).read_text(), Path(__file__).read_text()
    for name, (text, other) in PROTECTIONS.items():
        assert source.count(text) == 1, f"{name}: envs.py has no, or more than one, {text}"
        user = (
            name == "not dumpable" and os.getuid() == 0
        )  # root can't see the difference from outside
        done = copied(script, source.replace(text, other), user=user, timeout=60)
        lines = (done.stdout + done.stderr).strip().splitlines() if done else ["hangs"]
        unnoticed += done is not None and done.returncode == 0
        told = (
            "NOT NOTICED"
            if done and done.returncode == 0
            else lines[0 if not done or done.stdout.strip() else -1][:100]
        )
        print(f"{name:<34}{told}", flush=True)
    return unnoticed


if __name__ == "__main__":
    if "--mutate" in sys.argv:
        sys.exit(bool(mutate()))
    if "--user" in sys.argv and os.getuid() == 0:
        done = copied(Path(__file__).read_text(), Path(envs.__file__).read_text(), user=True)
        print(done.stdout + done.stderr, end="")
        sys.exit(done.returncode)
    start, (count, bad) = (
        time.monotonic(),
        attack(sys.argv[1] if len(sys.argv) > 1 and sys.argv[1] != "--user" else ""),
    )
    print("\n".join(bad), end="\n" * bool(bad))
    print(
        f"{count} programs as user {os.getuid()}, {len(bad)} not contained, {time.monotonic() - start:.0f} s"
    )
    sys.exit(bool(bad))
