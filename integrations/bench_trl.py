"""Seconds per optimizer step of TRL's GRPOTrainer without and with AEM, in turns, on a CPU.

    python integrations/bench_trl.py

A Qwen2 of 6 M parameters with random weights samples 16 completions of 32 tokens by TRL's own
`generate`, twice: once where TRL makes no forward for old log-probs, so that AEM adds one, and
once where it makes one. The learning rate is 0, so all trainers sample the same tokens. Results go
to integrations/bench_trl.json.
"""

import json
import platform
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent))

import datasets  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
import trl  # noqa: E402
from trl_aem import AEMGRPOTrainer  # noqa: E402

ROUNDS = 5
STEPS = 4  # batches; the first is not counted
PROMPT = "go to shelf and look " * 4
CASES = {"one step per batch": 1, "two steps per batch": 2}  # num_iterations
TRAINERS = {"without": trl.GRPOTrainer, "with AEM": AEMGRPOTrainer}


class Clock(transformers.TrainerCallback):
    """Keeps the time at the end of each optimizer step."""

    def __init__(self):
        self.ends = []

    def on_step_end(self, *args, **kwargs):
        self.ends.append(time.perf_counter())


def reward(completion_ids, **columns):
    return [float(ids[0] % 7) for ids in completion_ids]


def make_policy(folder):
    """A random model and a tokenizer, into a folder."""
    special = ["<|endoftext|>"]
    tokenizer = transformers.Qwen2Tokenizer().train_new_from_iterator(
        [PROMPT], 300, new_special_tokens=special, show_progress=False
    )
    tokenizer.eos_token = tokenizer.pad_token = special[0]
    config = transformers.Qwen2Config(
        vocab_size=8192,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        tie_word_embeddings=True,
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    transformers.Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def seconds_per_step(trainer_class, iterations, folder):
    """Mean over the counted steps, whole batches of them."""
    options = trl.GRPOConfig(
        output_dir=folder,
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        logging_strategy="no",
        max_steps=STEPS * iterations,
        learning_rate=0.0,
        num_generations=8,
        per_device_train_batch_size=16,
        num_iterations=iterations,
        max_completion_length=32,
        model_init_kwargs={"dtype": "float32"},
    )
    tasks = datasets.Dataset.from_list([{"prompt": PROMPT}] * 64)
    clock = Clock()
    trainer = trainer_class(folder, reward, options, tasks, callbacks=[clock])
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    counted = clock.ends[iterations - 1 :]
    return (counted[-1] - counted[0]) / (len(counted) - 1)


def main():
    transformers.utils.logging.disable_progress_bar()
    results = {"torch": torch.__version__, "trl": trl.__version__}
    results |= {"machine": platform.machine(), "threads": torch.get_num_threads(), "seconds": {}}
    with tempfile.TemporaryDirectory() as folder:
        make_policy(folder)
        for case, iterations in CASES.items():
            found = {name: [] for name in TRAINERS}
            for i in range(ROUNDS):
                turns = list(TRAINERS.items())
                if i % 2:  # who comes first changes
                    turns.reverse()
                for name, trainer_class in turns:
                    found[name].append(seconds_per_step(trainer_class, iterations, folder))
            ratios = sorted(b / a for a, b in zip(found["without"], found["with AEM"]))
            medians = "  ".join(f"{name} {median(v):.3f} s" for name, v in found.items())
            spread = f"{median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})"
            print(f"{case}: {medians}  ratio {spread}", flush=True)
            results["seconds"][case] = found
    (HERE / "bench_trl.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
