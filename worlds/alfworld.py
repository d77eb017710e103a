"""ALFWorld: its engine, its words, its expert (pip install alfworld==0.4.2).

    python aem.py --env worlds.alfworld:Alfworld --model Qwen/Qwen2.5-1.5B-Instruct

What `alfworld-download` brings is played where it is: its `train` games, and `valid_unseen` for
evaluation. Else games are drawn by `alfworld_games`.
"""

import copy
import functools
import json
import random
import sys
from pathlib import Path

try:
    import fast_downward
    import textworld
    from alfworld.agents.environment.alfred_tw_env import TASK_TYPES, AlfredDemangler
    from alfworld.agents.expert import HandCodedAgentFailed, HandCodedAgentTimeout, HandCodedTWAgent
    from alfworld.info import ALFWORLD_DATA
    from textworld.envs import PddlEnv
    from textworld.envs.pddl import textgen
    from textworld.logic import Rule
except ImportError as error:
    raise ImportError(f"{error}: pip install alfworld==0.4.2, with a C++ compiler") from error

from envs import HELD_OUT
from worlds.alfworld_games import make_game


def remember():
    """Have the engine remember what it parses and translates again and again.

    It parses grammar at every word of an observation, and translates a problem four times at each
    reset. These are functions of modules: no subclass reaches them.
    """
    parse = functools.lru_cache(4096)(textgen._parse_and_convert)
    translate = fast_downward.pddl2sas

    def parse_once(text, rule_name, trace=False):
        return copy.deepcopy(parse(text, rule_name=rule_name))  # what is derived writes into it

    @functools.lru_cache(64)
    def translate_once(domain, problem):
        arguments = sys.argv  # it writes its own there
        try:
            return translate(domain, problem)
        finally:
            sys.argv = arguments

    def pddl2sas(domain, problem, verbose=False, optimize=False):
        return translate_once(domain, problem)  # only the planner would need it optimized

    def copy_context(context):  # the engine's own copies all that is in it, for each word
        return context | {key: dict(context[key]) for key in ("variables", "mapping")}

    textgen._parse_and_convert = parse_once
    textgen.copy_context = copy_context
    fast_downward.pddl2sas = pddl2sas
    Rule.parse_conjunctive_query = functools.lru_cache(4096)(Rule.parse_conjunctive_query)


remember()


def read_game(file):
    """A game of ALFWorld's own, as `make_game` returns one."""
    trajectory = json.loads((file.parent / "traj_data.json").read_text())
    kept = {key: trajectory[key] for key in ("task_type", "pddl_params")}
    return json.loads(file.read_text()) | kept


@functools.cache
def downloaded(part):
    """Files of a part of ALFWorld's own games: those that ALFWorld itself would play."""
    folder = Path(ALFWORLD_DATA, "json_2.1.1", part)
    files = sorted(folder.glob("*/*/game.tw-pddl"))
    files = [file for file in files if file.parts[-3].split("-")[0] in TASK_TYPES.values()]
    files = [file for file in files if "Sliced" not in file.parts[-3]]
    files = [file for file in files if json.loads(file.read_text()).get("solvable")]
    found = f"{len(files)} games" if files else "no games, so they are generated"
    print(f"ALFWorld, {part}: {found} ({folder})")
    return files


class Expert(HandCodedTWAgent):
    """ALFWorld's hand-coded expert, for a game that need not be a file.

    It was not told that the engine's "put" has become "move": it forgets what it carries.
    """

    def reset(self, game):
        params = {key: str(value).lower() for key, value in game["pddl_params"].items()}
        policy = self.get_task_policy(game)
        self.policy = policy(params, max_steps=self.max_steps)

    def act(self, game_state, reward, done, last_action=""):
        return super().act(game_state, reward, done, last_action.replace("move", "put"))


class Alfworld:
    """An ALFWorld game, in a room that training sees or, from seed HELD_OUT on, another one."""

    instructions = (
        "You are in a household. Actions: go to PLACE; open PLACE; close PLACE; take THING from "
        "PLACE; move THING to PLACE; clean, heat or cool THING with PLACE; slice THING with THING; "
        "use LAMP; examine PLACE; look; inventory. Names have numbers. Reply with one action and "
        "nothing else, like: go to drawer 1"
    )
    max_turns = 50
    max_response_tokens = 32
    held_out = True
    show_admissible = False  # in each observation

    def __init__(self):
        infos = textworld.EnvInfos(feedback=True, won=True, admissible_commands=True, facts=True)
        self.engine = AlfredDemangler(PddlEnv(infos))  # one for all games: each takes 34 MB of disk
        self.rng = random.Random()
        self.evaluation_tasks = len(downloaded("valid_unseen")) or None

    def reset(self, *, seed=None, options=None):
        """Start the game of a seed, or any. Returns: (observation, info with "task_type")."""
        seed = self.rng.randrange(HELD_OUT) if seed is None else seed
        self.game = self._game(seed)
        self.engine.load(self.game)
        self.state = self.engine.reset()
        return self._observation(), {"task_type": self.game["task_type"]}

    def _game(self, seed):
        held_out = seed >= HELD_OUT
        files = downloaded("valid_unseen" if held_out else "train")
        if not files:
            return make_game(seed, held_out)
        index = (seed - HELD_OUT) if held_out else random.Random(seed).randrange(len(files))
        return read_game(files[index % len(files)])

    def admissible(self):
        """The actions that can be carried out now."""
        return self.state.admissible_commands

    def step(self, action):
        """Take an action. The reward is 10 for solving the task, and -0.1 for an invalid action.

        Returns: (observation, reward, terminated, truncated, info with "success" and "invalid").
        Never truncated: whoever plays counts the turns.
        """
        action = action.strip().lower()
        invalid = action not in self.admissible()
        self.state, _, _ = self.engine.step(action)
        success = bool(self.state.won)
        info = {"success": success, "invalid": invalid}
        return self._observation(), 10.0 * success - 0.1 * invalid, success, False, info

    def _observation(self):
        if not self.show_admissible:
            return self.state.feedback
        return f"{self.state.feedback}\nAdmissible actions: {', '.join(self.admissible())}"

    def demonstration(self, seed, noise=0.0):
        """The expert's episode, [(observation, action)]; actions are random with chance `noise`.

        The expert knows only what it has seen; it solves most tasks, not all.
        """
        observation, _ = self.reset(seed=seed)
        rng = random.Random(f"demonstration/{seed}")
        shared = random.getstate()
        random.seed(seed)  # the expert draws from there
        expert = Expert(max_steps=self.max_turns)
        expert.reset(self.game)
        expert.observe(self.state.feedback)
        action = "look"
        turns = []
        while len(turns) < self.max_turns and not self.state.won:
            if rng.random() < noise or action not in self.admissible():
                action = rng.choice(self.admissible())
            turns.append((observation, action))
            observation = self.step(action)[0]
            try:
                action = expert.act(self.state, 0, False, action)
            except (HandCodedAgentFailed, HandCodedAgentTimeout, IndexError):  # it gives up
                break
        random.setstate(shared)
        return turns


class AlfworldAdmissible(Alfworld):
    """The same with the admissible actions in each observation."""

    show_admissible = True
