"""AEM in verl's trainer (V1, verl's default since 0.9): each response's advantage times its alpha.

With the folder of aem.py and this one in PYTHONPATH, and everything else as for verl:

    VERL_USE_EXTERNAL_MODULES=verl_aem python -m verl.trainer.main_ppo \\
        trainer.v1.trainer_mode=aem_sync algorithm.adv_estimator=grpo ...

A response is a run of 1s in `response_mask`; its group, all responses of all rollouts of a `uid`.
The entropies are those that verl computes with the old log-probs: there is no further forward.
Settings: see verl_settings.py. Run with verl 0.9.1, see verl_cpu/.
"""

import transfer_queue as tq
from aem_tokens import token_alphas
from tensordict import TensorDict
from verl.trainer.ppo.v1 import (
    PPOTrainerColocateAsync,
    PPOTrainerSeparateAsync,
    PPOTrainerSync,
    register_trainer,
)
from verl.workers.utils.padding import response_to_nested
from verl_settings import read_settings

PREFIX = "aem_"


class AEMMixin:
    """Comes before one of verl's trainers: AEM between its advantages and its loss."""

    def __init__(self, config):
        self.aem = read_settings(config)
        v1 = config.trainer.v1
        # verl looks for this name among its own modes' settings, and compares it with "sync"
        v1.trainer_mode = v1.trainer_mode.removeprefix(PREFIX)
        super().__init__(config)

    def _compute_advantage(self, batch, metrics):
        """verl's advantages, times alpha. verl keeps rows in its TransferQueue, unpadded."""
        rows = {"keys": batch.keys, "partition_id": batch.partition_id}
        # before rollout correction rejects tokens, which would split a response in two
        sampled = tq.kv_batch_get(**rows, select_fields=["response_mask"])["response_mask"]
        batch = super()._compute_advantage(batch, metrics)
        fields = ["entropy", "response_mask", "advantages", "uid"]
        data = tq.kv_batch_get(**rows, select_fields=fields)
        alpha = token_alphas(
            entropy=data["entropy"].to_padded_tensor(0.0),
            sampled=sampled.to_padded_tensor(0).bool(),
            trained=data["response_mask"].to_padded_tensor(0).bool(),
            group=list(data["uid"]),
            **self.aem,
        )  # (B, T)
        advantages = data["advantages"].to_padded_tensor(0.0) * alpha
        metrics["aem/alpha_max"] = alpha.max().item()
        metrics["aem/alpha_min"] = alpha.min().item()
        changed = {"advantages": response_to_nested(advantages, sampled)}
        return tq.kv_batch_put(**rows, fields=TensorDict(changed, batch_size=len(rows["keys"])))


@register_trainer(PREFIX + "sync")
class AEMTrainerSync(AEMMixin, PPOTrainerSync):
    """trainer.v1.trainer_mode=aem_sync: sampling and training in turns."""


@register_trainer(PREFIX + "colocate_async")
class AEMTrainerColocateAsync(AEMMixin, PPOTrainerColocateAsync):
    """trainer.v1.trainer_mode=aem_colocate_async: unfinished rollouts go on in the next step."""


@register_trainer(PREFIX + "separate_async")
class AEMTrainerSeparateAsync(AEMMixin, PPOTrainerSeparateAsync):
    """trainer.v1.trainer_mode=aem_separate_async: sampling on GPUs of its own."""
