"""The game of real_model.py. Warm starts are kept under a key of this file: it rarely changes."""

import envs


class EasyHousehold(envs.GuidedHousehold):
    """One of the six kinds of tasks, without its search: four actions suffice.

    Where the thing and the lamp are is said at once: go there, take it, go to the lamp, use it.
    """

    kinds = ("examine",)
    instructions = "You are a household robot. Reply with one of the admissible actions."
    max_turns = 6
    max_response_tokens = 12

    def _draw(self):
        observation, kind, task = super()._draw()
        self.seen = set(self.places)
        found = [f"The desklamp is in the {self.lamp}."]
        found += [f"The {item.name} is in the {item.place}." for item in self.items]
        return f"{' '.join(sorted(found))} {observation}", kind, task
