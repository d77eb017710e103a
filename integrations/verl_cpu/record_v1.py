"""Writes what each update of the AEM trainer is about to see to $RECORD/step-N.pt, for check.py."""

import os
from pathlib import Path

import torch
import transfer_queue as tq
import verl_aem
from verl.trainer.ppo.v1 import register_trainer

FIELDS = ["input_ids", "response_mask", "rm_scores", "entropy", "advantages"]


@register_trainer("recorded_aem_sync")
class RecordedTrainer(verl_aem.AEMTrainerSync):
    """trainer.v1.trainer_mode=recorded_aem_sync: as aem_sync."""

    def __init__(self, config):
        config.trainer.v1.trainer_mode = "aem_sync"
        super().__init__(config)

    def _update_actor(self, batch, metrics):
        rows = {"keys": batch.keys, "partition_id": batch.partition_id}
        data = tq.kv_batch_get(**rows, select_fields=["uid", *FIELDS])
        record = {name: [row.clone() for row in data[name].unbind()] for name in FIELDS}
        record["uid"] = list(data["uid"])
        torch.save(record, Path(os.environ["RECORD"]) / f"step-{self.global_steps}.pt")
        return super()._update_actor(batch, metrics)
