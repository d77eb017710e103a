"""AEM in verl's older RayPPOTrainer: that of 0.7 and 0.8, and of 0.9 with trainer.use_v1=False.

With the folder of aem.py and this one in PYTHONPATH, and everything else as for verl:

    VERL_USE_EXTERNAL_MODULES=verl_aem_legacy python -m verl.trainer.main_ppo \\
        trainer.use_v1=False algorithm.adv_estimator=grpo ...

Responses, groups, entropies and settings: see verl_aem.py. Run with verl 0.9.1.
"""

from aem_tokens import token_alphas
from verl.trainer.ppo import ray_trainer
from verl_settings import read_settings


class AEMRayPPOTrainer(ray_trainer.RayPPOTrainer):
    """RayPPOTrainer with AEM between its advantages and its update."""

    def __init__(self, config, *args, **kwargs):
        self.aem = read_settings(config)
        super().__init__(config, *args, **kwargs)

    def _compute_old_log_prob(self, batch):
        result = super()._compute_old_log_prob(batch)  # old log-probs, and a figure for the log
        old = result[0].batch
        old["aem_entropy"] = old["entropys"]  # `fit` drops "entropys", and keeps the rest
        # before rollout correction rejects tokens, which would split a response in two
        old["aem_sampled"] = batch.batch["response_mask"].bool()
        return result

    def _update_actor(self, batch):
        data = batch.batch
        alpha = token_alphas(
            entropy=data.pop("aem_entropy"),
            sampled=data.pop("aem_sampled"),
            trained=data["response_mask"].bool(),
            group=batch.non_tensor_batch["uid"].tolist(),
            **self.aem,
        )  # (B, T)
        data["advantages"] = data["advantages"] * alpha
        return super()._update_actor(batch)


# verl has no registry here; it imports this module before its main_ppo takes the name
ray_trainer.RayPPOTrainer = AEMRayPPOTrainer
