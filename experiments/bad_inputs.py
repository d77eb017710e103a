"""What bad input is answered with: runs the tests' cases, writes experiments/bad_inputs.txt.

    python experiments/bad_inputs.py

The tests check that each ends with exit code 2, one sentence, no traceback, no file left behind,
and before any work began.
"""

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEST = "test_bad_input_is_one_sentence_and_exit_code_2"
TEMPORARY_FOLDER = re.compile(r"/tmp/\S*/(?=\w+)")


class Messages:
    """A pytest plugin that collects flags and message, which the cases record."""

    def __init__(self):
        self.texts = []

    def pytest_runtest_logreport(self, report):
        """pytest calls this after each phase of a case."""
        if report.when != "call":
            return
        case = dict(report.user_properties)
        message = case.get("message", "(the case failed before it had one)")
        message = TEMPORARY_FOLDER.sub("", message).replace(f"{ROOT}/", "")
        lines = [case.get("flags", report.nodeid), f"    {message}"]
        if report.failed:
            lines.append("    FAILED")
        self.texts.append("\n".join(lines))


def main():
    """Exit code: pytest's."""
    messages = Messages()
    arguments = ["-q", "--no-header", f"{ROOT / 'test_aem.py'}::{TEST}"]
    code = pytest.main(arguments, plugins=[messages])
    lines = [*messages.texts, f"{len(messages.texts)} cases"]
    Path(__file__).with_suffix(".txt").write_text("\n".join(lines) + "\n")
    sys.exit(code)


if __name__ == "__main__":
    main()
