"""As record_v1.py, for verl's older trainer."""

import os
from pathlib import Path

import torch
import verl_aem_legacy
from verl.trainer.ppo import ray_trainer

FIELDS = ["response_mask", "rm_scores", "entropy", "advantages"]


class Recorder(verl_aem_legacy.AEMRayPPOTrainer.__base__):
    """verl's own trainer; comes after AEM's in the order of methods."""

    def _compute_old_log_prob(self, batch):
        result = super()._compute_old_log_prob(batch)
        self.entropy = result[0].batch["entropys"]
        return result

    def _update_actor(self, batch):
        data = {**batch.batch, "entropy": self.entropy}
        data["rm_scores"] = data["token_level_scores"]
        present = data["attention_mask"].bool()  # (B, prompt + T)
        record = {"uid": batch.non_tensor_batch["uid"].tolist()}
        record["input_ids"] = [ids[at] for ids, at in zip(data["input_ids"], present)]
        responses = present[:, -data["responses"].shape[1] :]  # (B, T)
        for name in FIELDS:
            record[name] = [row[at] for row, at in zip(data[name], responses)]
        torch.save(record, Path(os.environ["RECORD"]) / f"step-{self.global_steps}.pt")
        return super()._update_actor(batch)


class RecordedTrainer(verl_aem_legacy.AEMRayPPOTrainer, Recorder):
    """AEM, then the recorder, then verl's own."""


ray_trainer.RayPPOTrainer = RecordedTrainer
