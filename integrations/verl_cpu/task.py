"""The task: a tool, and a reward. verl loads this file by its path."""

from verl.tools.function_tool import function_tool


@function_tool
def walk(steps: int) -> str:
    """Walk on.

    Args:
        steps: how far.
    """
    return "You are in a room like the one before."


def reward(data_source, solution_str, ground_truth, extra_info=None):
    """A reward that differs within a group is all that is needed."""
    return float(len(solution_str) % 3)
