#!/usr/bin/env bash
# verl's own main_ppo with the AEM trainer, on a CPU: two steps of 4 tasks x 4 rollouts with a tool,
# then check.py. Takes the Python of $PYTHON, or makes an environment in the folder $1 (or a new one).
# TRAINER=legacy: verl's older trainer.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
work=${1:-$(mktemp -d)}
mkdir -p "$work/record"
work=$(cd "$work" && pwd)
rm -f "$work"/record/step-*.pt
echo "in $work, verl's log too"
if [ -z "${PYTHON:-}" ]; then
    python3 -m venv "$work/venv"
    PYTHON=$work/venv/bin/python
    "$PYTHON" -m pip install -q -r "$here/requirements.txt"
fi
export PYTHONPATH=$here/../..:$here/..:$here
"$PYTHON" "$here/prepare.py" "$work"

export RECORD=$work/record
if [ "${TRAINER:-v1}" = legacy ]; then
    record=record_legacy
    trainer=(trainer.use_v1=False)
else
    record=record_v1
    trainer=(trainer.v1.trainer_mode=recorded_aem_sync)
fi
export VERL_USE_EXTERNAL_MODULES=cpu_platform,bench,$record
export VERL_PLATFORM=cpu VERL_ENGINE_DEVICE=cuda  # verl's FSDP engine is not registered for a CPU
actor=actor_rollout_ref.actor
rollout=actor_rollout_ref.rollout
"$PYTHON" -m verl.trainer.main_ppo \
    hydra.run.dir="$work/hydra" "${trainer[@]}" \
    algorithm.adv_estimator=grpo +algorithm.aem.lam=0.7 \
    trainer.device=cpu trainer.nnodes=1 trainer.n_gpus_per_node=1 \
    +ray_kwargs.ray_init.num_gpus=1 ray_kwargs.ray_init.num_cpus=16 \
    transfer_queue.backend.SimpleStorage.num_data_storage_units=1 \
    trainer.total_training_steps=2 trainer.val_before_train=False trainer.test_freq=-1 \
    trainer.save_freq=-1 trainer.logger='[console]' \
    data.train_files="$work/tasks.parquet" data.val_files="$work/tasks.parquet" \
    data.train_batch_size=4 data.dataloader_num_workers=0 \
    data.max_prompt_length=256 data.max_response_length=128 \
    reward.custom_reward_function.path="$here/task.py" \
    reward.custom_reward_function.name=reward \
    reward.num_workers=1 \
    actor_rollout_ref.model.path="$work/policy" \
    +actor_rollout_ref.model.override_config.attn_implementation=eager \
    actor_rollout_ref.model.use_remove_padding=False \
    actor_rollout_ref.model.enable_gradient_checkpointing=False \
    $actor.strategy=fsdp2 $actor.fsdp_config.use_torch_compile=False \
    $actor.fsdp_config.model_dtype=fp32 \
    +$actor.fsdp_config.mixed_precision.param_dtype=fp32 \
    $actor.ppo_mini_batch_size=2 $actor.ppo_micro_batch_size_per_gpu=4 $actor.optim.lr=1e-4 \
    $rollout.name=cpu $rollout.tensor_model_parallel_size=1 $rollout.n=4 $rollout.temperature=0.8 \
    $rollout.log_prob_micro_batch_size_per_gpu=8 $rollout.calculate_log_probs=False \
    $rollout.agent.num_workers=1 \
    $rollout.agent.default_agent_loop=tool_agent $rollout.multi_turn.enable=True \
    $rollout.multi_turn.format=command $rollout.multi_turn.max_assistant_turns=4 \
    $rollout.multi_turn.function_tool_path="$here/task.py" \
    > "$work/verl.log" 2>&1 || { tail -n 20 "$work/verl.log"; exit 1; }
"$PYTHON" "$here/check.py" "$work"
