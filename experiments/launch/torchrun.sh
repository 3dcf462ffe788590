#!/usr/bin/env bash
# Trains on the GPUs of one machine, or of several, with torchrun. Words after the script's name are options of halos fit.
#
#   One machine, all its GPUs:
#     RUN_DIR=runs/kto bash torchrun.sh --model.policy.path mistralai/Mistral-7B-v0.1 --data.train feedback.jsonl
#   Four machines: the same on each, with the number of machines and the name of one of them:
#     NODES=4 HEAD=node-0 RUN_DIR=/shared/runs/kto bash torchrun.sh --model.policy.path ... --data.train ...
#
# The same command resumes a run that was stopped.
# A rank that fails ends all ranks; torchrun starts none again (--max-restarts 0), as one line has named the reason.
set -euo pipefail

RUN_DIR=${RUN_DIR:?set it to the folder of the run, on a disk that all machines share}
NODES=${NODES:-1}                                # machines
GPUS=${GPUS:-$(nvidia-smi --list-gpus | wc -l)}  # processes on each machine, one per GPU
HEAD=${HEAD:-localhost}                          # a machine that the others reach by this name
PORT=${PORT:-29400}                              # a free port there
JOB=${JOB:-halos}                                # a name that tells jobs with the same HEAD and PORT apart
# Groups of ranks that each hold one sharded copy of the models. With one a machine, weights are gathered over its own
# fast links and only gradients cross the network. Set 1 if a machine is too small for a copy.
REPLICAS=${REPLICAS:-$NODES}
STRATEGY=${STRATEGY:-fsdp2}  # or ddp, for models that fit one GPU whole
OBJECTIVE=${OBJECTIVE:-kto}
PRECISION=${PRECISION:-bf16-mixed}

# Models and data are read from the cache of a machine with network access; no rank asks the hub.
# HF_HOME and HALOS_CACHE may each be a shared folder, or one on a disk of each machine.
export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}
# The network between machines, if there are several: NCCL_SOCKET_IFNAME=ib0 (GLOO_SOCKET_IFNAME on CPUs).

options=(--objective "$OBJECTIVE" --run_dir "$RUN_DIR"
         --trainer.devices "$GPUS" --trainer.num_nodes "$NODES" --trainer.precision "$PRECISION")
case $STRATEGY in
  fsdp2) options+=(--trainer.strategy fsdp2 --trainer.strategy.replicas "$REPLICAS") ;;
  *) options+=(--trainer.strategy "$STRATEGY") ;;
esac

# A run that was stopped is resumed.
if [[ -e $RUN_DIR/checkpoints/last.ckpt || -e $RUN_DIR/checkpoints/previous.ckpt ]]; then
  options+=(--ckpt_path last)
fi

exec torchrun --nnodes "$NODES" --nproc-per-node "$GPUS" --max-restarts 0 \
  --rdzv-backend c10d --rdzv-endpoint "$HEAD:$PORT" --rdzv-id "$JOB" \
  --module halos_pl fit "${options[@]}" "$@"
