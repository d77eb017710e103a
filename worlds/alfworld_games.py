"""Games for ALFWorld's engine, drawn by seed from what the package alfworld itself ships.

ALFWorld's own: the PDDL domain, the grammar, the goals and the words for them, 120 floor plans of
AI2-THOR (receptacles, where to stand before them, types of objects), what fits where, what can be
cleaned, heated or cooled, and which rooms are for training. Ours: where objects lie, and those
receptacles that the floor plans' lists leave out.
"""

import dataclasses
import functools
import json
import random
from pathlib import Path

import alfworld.gen.constants as ai2thor
import alfworld.gen.goal_library as goal_library
from alfworld.info import ALFRED_PDDL_PATH, ALFRED_TWL2_PATH

LAYOUTS = Path(ai2thor.__file__).parent / "layouts"
TASKS = {  # task type: (what its object must be, the receptacle that makes it so)
    "pick_and_place_simple": (None, None),
    "look_at_obj_in_light": (None, None),
    "pick_clean_then_place_in_recep": ("Cleanable", "SinkBasin"),
    "pick_heat_then_place_in_recep": ("Heatable", "Microwave"),
    "pick_cool_then_place_in_recep": ("Coolable", "Fridge"),
    "pick_two_obj_and_place": (None, None),
}
LOOK = "look_at_obj_in_light"
LAMP = "DeskLamp"
LAMP_STANDS = ("Desk", "SideTable", "Dresser", "Shelf")
FIXED = ai2thor.RECEPTACLES - ai2thor.MOVABLE_RECEPTACLES_SET  # they can't be carried
FITS = {  # receptacle's type: types that may lie there
    kind: {name for name in ai2thor.VAL_RECEPTACLE_OBJECTS[kind] if "Sliced" not in name}
    for kind in FIXED & set(ai2thor.VAL_RECEPTACLE_OBJECTS)
}
STOVE_BURNERS = 4
IN_PDDL = {"-": "_minus_", "+": "_plus_", ".": "_dot_", ",": "_comma_", "|": "_bar_"}
IN_DOMAIN = "Knife ButterKnife".split()  # types that the domain's actions name
RECEPTACLES_IN_DOMAIN = "SinkBasin Microwave Fridge".split()


def pddl_name(text):
    """A name of AI2-THOR as ALFWorld spells it in PDDL."""
    for char, word in IN_PDDL.items():
        text = text.replace(char, word)
    return text


def type_of(name):
    """The type of a receptacle or an object, by its name in AI2-THOR."""
    first, *_, last = name.split("|")
    return last if last.endswith("Basin") else first


@dataclasses.dataclass
class Room:
    """A floor plan of AI2-THOR. Names are AI2-THOR's; lists are sorted, so that draws repeat."""

    receptacles: dict  # name: where to stand before it
    types: list  # of all objects that are in it

    @property
    def kinds(self):  # of receptacles
        return sorted(set(map(type_of, self.receptacles)))

    @property
    def portable(self):
        """Types of objects that can be carried and have somewhere to lie."""
        fitting = set().union(*(FITS[kind] for kind in self.kinds))
        return [name for name in self.types if name in fitting - FIXED]

    @property
    def lamp_stands(self):
        stands = [name for name in self.receptacles if type_of(name) in LAMP_STANDS]
        return stands if LAMP in self.types else []

    def spots(self, kind, besides=None):
        """Receptacles where an object of a type may lie, but none of the type `besides`."""
        names = {name: type_of(name) for name in self.receptacles}
        return [name for name, type_ in names.items() if kind in FITS[type_] and type_ != besides]


@functools.cache
def floor_plan(scene):
    """The Room of a scene's number."""
    openable = json.loads((LAYOUTS / f"FloorPlan{scene}-openable.json").read_text())
    types = json.loads((LAYOUTS / f"FloorPlan{scene}-objects.json").read_text())
    receptacles = {}
    for name, (x, z, rotation, horizon) in sorted(openable.items()):
        receptacles[name] = f"loc|{4 * x:.0f}|{4 * z:.0f}|{rotation / 90:.0f}|{horizon:.0f}"
    listed = set(map(type_of, receptacles))
    for kind in sorted(FIXED.intersection(types) - listed):
        for i in range(STOVE_BURNERS if kind == "StoveBurner" else 1):
            basin = kind.endswith("Basin")
            name = f"{kind.removesuffix('Basin')}|{i}|{kind}" if basin else f"{kind}|{i}"
            receptacles[name] = f"loc|{kind}|{i}"
    return Room(receptacles, sorted(types))


def choices(room, task):
    """All (object's type, target's type) of a task in a room; without a target if it is to look."""
    able, tool = TASKS[task]
    if tool and tool not in room.kinds:
        return []
    names = [name for name in room.portable if not able or name in ai2thor.VAL_ACTION_OBJECTS[able]]
    if task == LOOK:
        return [(name, None) for name in names if room.lamp_stands]
    targets = [kind for kind in room.kinds if kind != tool]
    pairs = [(name, kind) for name in names for kind in targets if name in FITS[kind]]
    return [(name, kind) for name, kind in pairs if room.spots(name, besides=kind)]


def lay_out(rng, room, task, wanted, target):
    """Where objects lie at first, {object: receptacle}; none of those wanted is at its target."""
    lying = {}
    for kind in room.portable:
        spots = room.spots(kind, besides=target if kind == wanted else None)
        least = 2 if kind == wanted and task == "pick_two_obj_and_place" else 1
        for i in range(rng.randint(least, ai2thor.MAX_NUM_OF_OBJ_INSTANCES)):
            lying[f"{kind}|{i}"] = rng.choice(spots)
    if room.lamp_stands:
        lying[f"{LAMP}|0"] = rng.choice(room.lamp_stands)
    return lying


def declarations(room, lying):
    """The PDDL problem's objects, a line each."""
    object_types = sorted({*map(type_of, lying), *IN_DOMAIN})
    receptacle_types = sorted({*room.kinds, *RECEPTACLES_IN_DOMAIN})
    lines = ["agent1 - agent", f"{pddl_name('loc|start')} - location"]
    lines += [f"{pddl_name(name)} - object" for name in lying]
    lines += [f"{pddl_name(name)} - receptacle" for name in room.receptacles]
    lines += [f"{pddl_name(spot)} - location" for spot in sorted(set(room.receptacles.values()))]
    lines += [f"{kind}Type - otype" for kind in object_types]
    lines += [f"{kind}Type - rtype" for kind in receptacle_types]
    return lines


def facts(room, lying):
    """What is true at first, a PDDL literal each."""
    found = ["atLocation agent1 loc|start"]
    for kind in room.kinds:
        present = sorted(FITS[kind].intersection(map(type_of, lying)))
        found += [f"canContain {kind}Type {name}Type" for name in present]
    for name, spot in room.receptacles.items():
        kind = type_of(name)
        found += [f"receptacleType {name} {kind}Type", f"receptacleAtLocation {name} {spot}"]
        if kind in ai2thor.OPENABLE_CLASS_SET:
            found.append(f"openable {name}")
    for name, receptacle in lying.items():
        kind = type_of(name)
        found += [f"objectType {name} {kind}Type", f"inReceptacle {name} {receptacle}"]
        found.append(f"objectAtLocation {name} {room.receptacles[receptacle]}")
        if kind != LAMP:
            found.append(f"pickupable {name}")
        if kind in ai2thor.MOVABLE_RECEPTACLES_SET:
            found.append(f"isReceptacleObject {name}")
        abilities = ai2thor.VAL_ACTION_OBJECTS.items()  # Heatable, Coolable, ...
        found += [f"{ability.lower()} {name}" for ability, kinds in abilities if kind in kinds]
    return [f"({pddl_name(fact)})" for fact in found]


def make_game(seed, held_out=False, task=None):
    """The game of a seed, as ALFWorld's files hold it, in a room for training or for evaluation.

    Returns: what textworld's PddlEnv loads (game.tw-pddl), with "task_type" and "pddl_params" of
    ALFRED's traj_data.json.
    """
    rng = random.Random(f"alfworld/{seed}")
    scenes = ai2thor.TEST_SCENE_NUMBERS if held_out else ai2thor.TRAIN_SCENE_NUMBERS
    task = task or rng.choice(list(TASKS))
    hosts = ai2thor.GOALS_VALID[task]
    scenes = [s for s in scenes if any(s in ai2thor.SCENE_TYPE[room] for room in hosts)]
    able = (scene for scene in rng.sample(scenes, len(scenes)) if choices(floor_plan(scene), task))
    room = floor_plan(next(able))
    wanted, target = rng.choice(choices(room, task))
    lying = lay_out(rng, room, task, wanted, target)
    lamp = LAMP if task == LOOK else ""
    goal = goal_library.gdict[task]
    words = {"obj": wanted, "recep": target or "", "toggle": lamp}
    text = rng.choice(goal["templates"]).format(**{k: v.lower() for k, v in words.items()})
    inside = "\n".join(declarations(room, lying))
    initially = "\n".join(facts(room, lying))
    problem = f"(define (problem plan) (:domain alfred) (:objects {inside}) (:init {initially})"
    return {
        "pddl_domain": Path(ALFRED_PDDL_PATH).read_text(),
        "grammar": Path(ALFRED_TWL2_PATH).read_text().replace("UNKNOWN GOAL", text),
        "pddl_problem": problem + goal["pddl"].format(**words).replace("#", "-"),
        "solvable": True,
        "task_type": task,
        "pddl_params": {
            "object_target": wanted,
            "parent_target": target or "",
            "toggle_target": lamp,
        },
    }
