"""On how many GPUs does a model fit? Computed from shapes, not measured: the table of the README.

    python experiments/memory.py

Weights, gradients and AdamW's state are counted exactly; activations, logits and the cache are estimated for the default batch:
128 trajectories of 4096 tokens (32 of them with --lora_rank and --groups 4), micro-batches of 8192 tokens, with gradient
checkpointing. A tenth of each GPU is left to the rest.
"""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
import torch
import transformers

import aem
import bench

DEFAULT = aem.Config()
ROWS, LENGTH, MICRO_BATCH = DEFAULT.groups * DEFAULT.group_size, DEFAULT.max_length, DEFAULT.micro_batch_tokens
GPUS, COUNTS = {"24 GB": 24e9, "80 GB": 80e9, "141 GB": 141e9}, (1, 2, 4, 8, 16, 32)
QWEN_32B = bench.QWEN_7B | dict(hidden_size=5120, intermediate_size=27648, num_hidden_layers=64, num_attention_heads=40)
QWEN_32B |= dict(num_key_value_heads=8)
SHAPES = {"1.5 B": bench.QWEN_1_5B, "7 B": bench.QWEN_7B, "32 B": QWEN_32B}


def sizes(shape):
    """(parameters, those of a layer, those of embedding and head, config), counted on a model without storage."""
    with torch.device("meta"):
        model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**shape))
    layer, config = sum(p.numel() for p in model.model.layers[0].parameters()), model.config
    outer = config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2)
    return model.num_parameters(), layer, outer, config


def peak(shape, gpus, adapters=False):
    """Bytes per GPU at the larger of rollout and update."""
    weights, layer, outer, c = sizes(shape)
    cache = 1.5 * ROWS / gpus * LENGTH * c.num_hidden_layers * c.num_key_value_heads * c.hidden_size // c.num_attention_heads * 4
    saved = MICRO_BATCH * 2 * (c.num_hidden_layers * c.hidden_size + 3 * c.intermediate_size + 8 * c.hidden_size)
    update = saved + 3 * 4 * aem.LOGITS_AT_ONCE  # activations, logits with their gradients
    if adapters:  # bf16 weights that stay as they are
        return 2 * weights + max(cache / 4, update)
    if gpus == 1:  # fp32 weights, AdamW's two moments; bf16 copies of the weights by autocast; gradients in the update
        return 12 * weights + 2 * weights + max(cache, 4 * weights + update)
    gathered = 2 * (outer + 2 * layer) + 4 * (outer + layer)  # bf16 weights of a layer and the next, fp32 gradients
    return 12 * weights / gpus + max(2 * weights + cache, 4 * weights / gpus + gathered + update)


def table():
    """The README's lines."""
    lines = [f"| GPUs of | {' | '.join(f'{m}, all weights | {m}, `--lora_rank`' for m in SHAPES)} |", "|---" * 7 + "|"]
    for name, memory in GPUS.items():
        cells = []
        for shape in SHAPES.values():
            fits = next((n for n in COUNTS if peak(shape, n) < 0.9 * memory), None)
            cells.append(f"{fits} ({peak(shape, fits) / 1e9:.0f} GB each)" if fits else "no")
            alone = peak(shape, 1, True)
            cells.append(f"1 ({alone / 1e9:.0f} GB)" if alone < 0.9 * memory else "no")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    print("\n".join(table()))
