"""ALFWorld: games are as they should be, and the engine is as it was, only faster."""

import json
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("fast_downward", reason="needs ALFWorld: pip install alfworld==0.4.2")
import alfworld.gen.constants as ai2thor  # noqa: E402

from envs import HELD_OUT  # noqa: E402
from worlds import alfworld as world  # noqa: E402
from worlds.alfworld_games import TASKS, make_game  # noqa: E402
from worlds.check import digests, disk  # noqa: E402

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def env():
    return world.Alfworld()


def literals(game, predicate):
    """Arguments of a predicate's facts at first, in a game's PDDL, as tuples."""
    initially, _ = game["pddl_problem"].split("(:goal")
    return [tuple(text.split()) for text in re.findall(rf"\({predicate} ([^()]*)\)", initially)]


def room(game):
    """What tells a game's room from others: its receptacles with their positions."""
    return frozenset(literals(game, "receptacleAtLocation"))


def test_games_keep_their_own_rules():
    for seed in range(120):
        game = make_game(seed, held_out=seed % 2 == 1)
        kind = dict(literals(game, "receptacleType")) | dict(literals(game, "objectType"))
        lying = literals(game, "inReceptacle")
        fits = set(literals(game, "canContain"))
        assert all(
            (kind[place], kind[thing]) in fits for thing, place in lying if "Lamp" not in thing
        )
        wanted = game["pddl_params"]["object_target"] + "Type"
        target = game["pddl_params"]["parent_target"] + "Type"
        places = [kind[place] for thing, place in lying if kind[thing] == wanted]
        assert len(places) >= 1 + (game["task_type"] == "pick_two_obj_and_place")
        assert target not in places
        assert target == "Type" or (target, wanted) in fits
        verb, tool = TASKS[game["task_type"]]
        assert not tool or f"{tool}Type" in kind.values()
        assert not verb or wanted.removesuffix("Type") in ai2thor.VAL_ACTION_OBJECTS[verb]


def test_evaluation_is_in_rooms_that_training_never_sees():
    training = {room(make_game(seed)) for seed in range(300)}
    held_out = {room(make_game(HELD_OUT + seed, held_out=True)) for seed in range(300)}
    assert len(training) > 60 and len(held_out) > 15
    assert not training & held_out


@pytest.mark.parametrize("task", TASKS)
def test_the_expert_solves_each_type(env, monkeypatch, task):
    monkeypatch.setattr(world, "make_game", lambda seed, held_out: make_game(seed, held_out, task))
    turns = env.demonstration(1)
    observation, info = env.reset(seed=1)
    assert info["task_type"] == task
    for expected, action in turns:
        assert observation == expected
        observation, reward, terminated, truncated, info = env.step(action)
        assert not truncated and terminated == info["success"]
        assert reward == (10.0 if terminated else 0.0)
    assert info == {"success": True, "invalid": False}


def test_what_cannot_be_carried_out_is_invalid(env):
    env.reset(seed=1)
    before = env.admissible()
    for text in ("", "fly to bed 1", "take apple 1 from nowhere 9"):
        observation, reward, terminated, _, info = env.step(text)
        assert (observation, reward, terminated) == ("Nothing happens.", -0.1, False)
        assert info == {"success": False, "invalid": True}
        assert env.admissible() == before
    _, reward, _, _, info = env.step(f" {before[0].title()}\n")
    assert reward == 0.0 and not info["invalid"]


def test_admissible_actions_are_shown_on_demand(env):
    shown = world.AlfworldAdmissible()
    observation, _ = shown.reset(seed=1)
    plain, _ = env.reset(seed=1)
    assert observation == f"{plain}\nAdmissible actions: {', '.join(env.admissible())}"


PLAIN_ENGINE = """
import json, random, sys
import textworld
from alfworld.agents.environment.alfred_tw_env import AlfredDemangler
from textworld.envs import PddlEnv
from worlds.alfworld_games import make_game

steps, *seeds = map(int, sys.argv[1:])  # the engine overwrites it
infos = textworld.EnvInfos(feedback=True, won=True, admissible_commands=True)
engine = AlfredDemangler(PddlEnv(infos))
log = []
for seed in seeds:
    engine.load(make_game(seed))
    state = engine.reset()
    log.append([state.feedback, state.admissible_commands])
    rng = random.Random(seed)
    for _ in range(steps):
        state, _, _ = engine.step(rng.choice(state.admissible_commands))
        log.append([state.feedback, state.admissible_commands])
print(json.dumps(log))
"""


def test_remembering_changes_nothing(env, steps=15, seeds=(1, 2)):
    arguments = map(str, (steps, *seeds))
    command = [sys.executable, "-c", PLAIN_ENGINE, *arguments]
    plain = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    log = []
    for seed in seeds:
        log.append([env.reset(seed=seed)[0], env.admissible()])
        rng = random.Random(seed)
        for _ in range(steps):
            observation = env.step(rng.choice(env.admissible()))[0]
            log.append([observation, env.admissible()])
    assert log == json.loads(plain.stdout.splitlines()[-1])


def test_a_reset_leaves_the_process_as_it_was(env, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["aem.py"])
    env.reset(seed=100)
    before = sys.argv, sys.stdout, random.getstate(), disk(tmp_path)
    for seed in (101, 102):
        env.reset(seed=seed)
    env.demonstration(103)
    assert (sys.argv, sys.stdout, random.getstate(), disk(tmp_path)) == before
    assert sys.argv == ["aem.py"]


def test_same_seed_in_another_process(env):
    command = [sys.executable, "worlds/check.py", "worlds.alfworld:Alfworld", "--digests"]
    command += ["--same", "1"]  # strings hash differently there
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == digests(env, range(1), [])


def test_downloaded_games(monkeypatch, tmp_path):
    names = {  # folder of ALFWorld's download, whether it is played
        "train/pick_and_place_simple-Mug-None-Desk-301/trial_T1": True,
        "train/pick_and_place_simple-AppleSliced-None-Fridge-7/trial_T2": False,
        "train/pick_and_place_with_movable_recep-Pen-Bowl-Desk-8/trial_T3": False,
        "valid_unseen/look_at_obj_in_light-Mug-None-DeskLamp-308/trial_T4": True,
        "valid_unseen/pick_and_place_simple-Mug-None-Desk-308/trial_T5": True,
        "valid_unseen/pick_two_obj_and_place-Mug-None-Desk-308/trial_T6": True,
    }
    for seed, name in enumerate(names):
        folder = tmp_path / "json_2.1.1" / name
        folder.mkdir(parents=True)
        task = name.split("/")[1].split("-")[0]
        game = make_game(seed, task=task if task in TASKS else None)
        trajectory = {key: game.pop(key) for key in ("task_type", "pddl_params")}
        (folder / "game.tw-pddl").write_text(json.dumps(game))
        (folder / "traj_data.json").write_text(json.dumps(trajectory))
    monkeypatch.setattr(world, "ALFWORLD_DATA", str(tmp_path))
    world.downloaded.cache_clear()
    try:
        real = world.Alfworld()
        kinds = [real.reset(seed=HELD_OUT + i)[1]["task_type"] for i in range(3)]
        assert kinds == [name.split("/")[1].split("-")[0] for name in list(names)[3:]]
        assert real.evaluation_tasks == 3
        assert len({real.reset(seed=seed)[0] for seed in range(5)}) == 1
        observation = real.reset(seed=HELD_OUT)[0]
        assert real.demonstration(HELD_OUT)[0][0] == observation
        assert real.state.won
    finally:
        world.downloaded.cache_clear()
