"""ScienceWorld and TextWorldExpress: split, solutions, rewards, and that a seed repeats."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

if not shutil.which("java"):
    pytest.skip("needs Java: apt install default-jre-headless", allow_module_level=True)
pytest.importorskip("py4j", reason="needs pip install scienceworld textworld-express")

from envs import HELD_OUT  # noqa: E402

ROOT = Path(__file__).parents[1]


def make_scienceworld():
    pytest.importorskip("scienceworld", reason="needs pip install scienceworld==1.2.3")
    from worlds.scienceworld import ScienceWorld

    return ScienceWorld()


def make_textworld_express():
    pytest.importorskip("textworld_express", reason="needs pip install textworld-express==1.1.0")
    from worlds.textworld_express import TextWorldExpress

    return TextWorldExpress()


@pytest.fixture(scope="module")
def lab():
    return make_scienceworld()


@pytest.fixture(params=[make_scienceworld, make_textworld_express])
def env(request):
    return request.param()


def first_seed_of(env, task):
    """A seed of training whose task is this one."""
    return next(seed for seed in range(500) if env.reset(seed=seed)[1]["task_type"] == task)


def test_evaluation_has_each_test_variation_once(lab):
    assert lab.evaluation_tasks == len(lab.test) == len(set(lab.test)) == 1819
    assert len({task for task, _ in lab.test[:30]}) == 30
    assert lab.reset(seed=HELD_OUT + 7)[1]["task_type"] == lab.test[7][0]
    for task, number in lab.test:
        assert number not in lab.train[task]


def test_the_solution_solves(env):
    seed = 0
    if hasattr(env, "simplifications"):
        seed = first_seed_of(env, "find-animal")
    turns = env.demonstration(seed)
    observation, _ = env.reset(seed=seed)
    for expected, action in turns:
        assert observation == expected
        observation, reward, terminated, truncated, info = env.step(action)
        assert not truncated
        assert terminated == info["success"]
        assert reward == 10.0 * terminated - 0.1 * info["invalid"]
    assert info["success"]


def test_what_cannot_be_carried_out_is_invalid(env):
    env.reset(seed=0)
    _, reward, terminated, _, info = env.step("fly to the moon")
    assert reward == -0.1 and info["invalid"] and not terminated
    _, reward, _, _, info = env.step(env.admissible()[0])
    assert reward == 0.0 and not info["invalid"]


def test_a_wrong_focus_ends_the_task_without_success(lab):
    lab.reset(seed=first_seed_of(lab, "find-animal"))
    wrong = [action for action in lab.admissible() if action.startswith("focus on")]
    _, reward, terminated, _, info = lab.step(wrong[0])
    assert terminated and reward == 0.0
    assert not info["success"] and info["score"] < 0


def test_environments_share_a_process_but_no_state(env):
    other = type(env)()
    assert other.server is not env.server
    first, _ = env.reset(seed=1)
    other.reset(seed=2)
    other.step(other.admissible()[0])
    seen = env.step("look around")[0]
    assert env.reset(seed=1)[0] == first
    assert env.step("look around")[0] == seen


FIRST_OBSERVATIONS = """
import json, sys
import envs
env = envs.make(sys.argv[1])
print(json.dumps([env.reset(seed=seed)[0] for seed in range(8)]))
"""


def test_a_seed_is_the_same_task_again_and_in_another_process(env):
    name = f"{type(env).__module__}:{type(env).__name__}"
    command = [sys.executable, "-c", FIRST_OBSERVATIONS, name]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    there = json.loads(done.stdout.splitlines()[-1])
    for _ in range(2):
        assert there == [env.reset(seed=seed)[0] for seed in range(8)]
