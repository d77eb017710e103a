"""Makes what a run of verl starts from: python prepare.py FOLDER -> FOLDER/policy, tasks.parquet.

The policy is aem.py's embedded one, of 0.2 M parameters, after few steps of imitation: its
responses are commands, more or less, and it is surer of some than of others.
"""

import sys
from pathlib import Path

import pandas

import envs

IMITATION_STEPS = 60
TASKS = 32

# as envs.TEMPLATE, with what a tool answers in place of what the environment says
TEMPLATE = envs.TEMPLATE.replace("{{ m.role }}", "{{ 'user' if m.role == 'tool' else m.role }}")


def main(folder: Path):
    env = envs.ENVS["household"]()
    model, tokenizer = envs.embedded_policy(env, IMITATION_STEPS, noise=0.35)
    tokenizer.chat_template = TEMPLATE
    model.save_pretrained(folder / "policy")
    tokenizer.save_pretrained(folder / "policy")
    rows = []
    for seed in range(TASKS):
        observation, _command = next(iter(env.demonstration(seed, 0.0)))
        prompt = [{"role": "user", "content": observation}]
        reward_model = {"style": "rule", "ground_truth": ""}
        rows.append({"data_source": "household", "prompt": prompt, "reward_model": reward_model})
    pandas.DataFrame(rows).to_parquet(folder / "tasks.parquet")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
