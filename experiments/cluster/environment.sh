# Sourced by the job scripts: software, threads, caches. The place to change for a cluster of one's own; each value
# can also be set before sbatch, which hands the variables of the shell on.

# CLUSTER_MODULES="cuda/12.8 python/3.12" and CLUSTER_VENV=/path/to/venv; without them, .venv or what is on the PATH.
if [[ -n ${CLUSTER_MODULES:-} ]]; then
    # shellcheck disable=SC2086 # several words
    module load $CLUSTER_MODULES
fi
venv=${CLUSTER_VENV:-.venv}
if [[ -f $venv/bin/activate ]]; then
    source "$venv/bin/activate"
fi

# A task has --cpus-per-task cores: for the threads of its process, and for processes that decode pictures where
# data.cache is off. srun forgets that number since SLURM 22.05 unless it is told.
cpus=${SLURM_CPUS_PER_TASK:-1}
export SRUN_CPUS_PER_TASK=$cpus OMP_NUM_THREADS=${OMP_NUM_THREADS:-$cpus}
workers=$((cpus > 8 ? 8 : cpus - 1))

# Decoded pictures on the node's own disk; weights from the shared HF_HOME, filled on the login node beforehand, since
# compute nodes seldom reach the hub.
export LIT_DEFECT_CACHE=${LIT_DEFECT_CACHE:-${TMPDIR:-/tmp}/lit_defect-$USER}
export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1}

# Several nodes: say which network they share (see `ip -brief address` on a node) if NCCL picks another one.
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0
# export NCCL_DEBUG=INFO   # which network it has picked

# What identifies this job, also after a requeue: 1234, or 1234_5 in an array.
job=${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}

# `unless_given OPTION VALUE` adds an option to the array `words`, unless the user has given it.
unless_given() {
    [[ " ${words[*]} " == *" $1"[\ =]* ]] || words+=("$@")
}

# --signal reaches every process of a step, also those that would die of it. Where nothing else is said, USR1 is ignored;
# the process that trains asks for it, saves, and lets the job be requeued.
step() {
    srun --kill-on-bad-exit=1 bash -c 'trap "" USR1; exec "$@"' step "$@"
}
