#!/usr/bin/env bash
# Two machines train one model. On both, with the same text and chargpt in the same places:
#
#   deploy/two-machines.sh FIRST_ADDRESS OWN_ADDRESS my.txt --out /shared/runs/my [flags of chargpt train]
#
# FIRST_ADDRESS is the address of the machine that the other one reaches at port 29400 (and at ports
# that the system chooses). The run folder should be on a disk that both see: then either machine may
# vanish and come back, and the run continues from its last checkpoint.
set -euo pipefail
first=$1 own=$2
shift 2
per_machine=${PER_MACHINE:-$({ nvidia-smi -L 2> /dev/null || true; } | wc -l)}
# PyTorch 2.13 needs this: otherwise a machine that comes back waits for an address in vain.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
exec torchrun \
    --nnodes "${MACHINES:-2}" --nproc-per-node "$((per_machine > 0 ? per_machine : 1))" --max-restarts 10 \
    --rdzv-backend c10d --rdzv-id "${JOB:-chargpt}" --rdzv-endpoint "$first:29400" \
    --rdzv-conf "is_host=$([ "$first" = "$own" ] && echo true || echo false)" --local-addr "$own" \
    -m chargpt train "$@"
