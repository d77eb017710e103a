#!/usr/bin/env bash
# All tests of the worlds, none skipped: in a fresh environment with what each of them needs.
# Takes a quarter of an hour, a C++ compiler and Java.
set -euo pipefail
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
source "$work/venv/bin/activate"
pip install -q -r requirements.txt alfworld==0.4.2 scienceworld==1.2.3 textworld-express==1.1.0 \
    thefuzz==0.22.1
export REPAIR_DATA="$work/repair"
python -m worlds.repair_tasks
pytest -q worlds
