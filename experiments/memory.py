"""Does a model fit one GPU? Computed from shapes, not measured.

    python experiments/memory.py

One process holds everything; more processes are data parallel and each needs as much for weights,
gradients and optimizer. Weights, gradients, AdamW's state and the cache are counted exactly;
activations and logits are estimated. The batch is the default one: 128 trajectories of 4096 tokens
(32 of them with --lora_rank 16 and --groups 4), all at their full length, micro-batches of 8192
tokens, bfloat16, gradient checkpointing. A tenth of each GPU is left to CUDA and fragments.
"""

import sys
from pathlib import Path

import torch
import transformers

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
import bench

import aem

GPUS = {"24 GB": 24e9, "80 GB": 80e9, "141 GB": 141e9}
USABLE = 0.9
DEFAULT = aem.Config()
LENGTH = DEFAULT.max_length
LORA_RANK = 16
LORA_GROUPS = 4
QWEN_32B = bench.QWEN_7B | {
    "hidden_size": 5120,
    "intermediate_size": 27648,
    "num_hidden_layers": 64,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
}
SHAPES = {"1.5 B": bench.QWEN_1_5B, "7 B": bench.QWEN_7B, "32 B": QWEN_32B}

FLOAT32 = 4  # bytes of a number
BFLOAT16 = 2
TRAINED = 3 * FLOAT32  # a weight and AdamW's two moments
GRADIENT = FLOAT32
# estimates, in bytes, of what is alive in backward
A_LOGIT = 16  # as bfloat16, as float32, its log-probability, and their gradients
A_HEAD_WEIGHT = 2 * BFLOAT16 + FLOAT32  # its copy, that one's gradient, and this in float32
A_LAYER_PER_HIDDEN = 40  # of one token in one layer: two norms, attention, residuals
A_LAYER_PER_INTERMEDIATE = 14  # and the gated product


def build(shape):
    """The model without storage, for counting."""
    with torch.device("meta"):
        return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**shape))


def adapter_size(model):
    """Weights of LoRA adapters at all linear layers but the head."""
    total = 0
    for module in model.model.modules():
        if isinstance(module, torch.nn.Linear):
            total += LORA_RANK * (module.in_features + module.out_features)
    return total


def rollout_bytes(config, rows):
    """The cache at full length, and what is there beside it for a moment."""
    head_size = config.hidden_size // config.num_attention_heads
    tokens = rows * LENGTH
    a_layer = 2 * tokens * config.num_key_value_heads * head_size * BFLOAT16  # keys and values
    for_all_heads = 2 * tokens * config.hidden_size * BFLOAT16  # as attention repeats them
    layers = config.num_hidden_layers + 1  # `SlotCache.keep` copies one layer at a time
    return layers * a_layer + for_all_heads


def activation_bytes(config, width):
    """Each layer's input, `width` bytes a number, one layer computed again, a chunk of logits."""
    inputs = config.num_hidden_layers * config.hidden_size * width
    a_layer = A_LAYER_PER_HIDDEN * config.hidden_size
    a_layer += A_LAYER_PER_INTERMEDIATE * config.intermediate_size
    return DEFAULT.micro_batch_tokens * (inputs + a_layer) + A_LOGIT * aem.LOGITS_AT_ONCE


def peak_of_all_weights(model):
    """Bytes at the largest of rollout, backward and optimizer step."""
    config = model.config
    weights = model.num_parameters()
    copies = BFLOAT16 * weights  # by autocast
    head = A_HEAD_WEIGHT * config.vocab_size * config.hidden_size
    rollout = copies + rollout_bytes(config, DEFAULT.groups * DEFAULT.group_size)
    backward = copies + GRADIENT * weights + head + activation_bytes(config, FLOAT32)
    optimizer_step = GRADIENT * weights + FLOAT32 * weights  # AdamW's denominators, all at once
    return TRAINED * weights + max(rollout, backward, optimizer_step)


def peak_of_lora(model):
    """The same, if the model is frozen in bfloat16."""
    config = model.config
    frozen = BFLOAT16 * model.num_parameters()
    adapters = (TRAINED + GRADIENT + FLOAT32) * adapter_size(model)
    rollout = rollout_bytes(config, LORA_GROUPS * DEFAULT.group_size)
    return frozen + adapters + max(rollout, activation_bytes(config, BFLOAT16))


def table():
    """The lines of a table in Markdown."""
    lines = [f"| computed, not measured | needs | {' | '.join(f'fits {name}' for name in GPUS)} |"]
    lines.append("|---" * (2 + len(GPUS)) + "|")
    for name, shape in SHAPES.items():
        model = build(shape)
        peaks = {
            f"{name}, all weights": peak_of_all_weights(model),
            f"{name}, `--lora_rank {LORA_RANK} --groups {LORA_GROUPS}`": peak_of_lora(model),
        }
        for row, peak in peaks.items():
            fits = ["yes" if peak < USABLE * memory else "no" for memory in GPUS.values()]
            lines.append(f"| {row} | {peak / 1e9:.0f} GB | {' | '.join(fits)} |")
    return lines


if __name__ == "__main__":
    print("\n".join(table()))
