#!/usr/bin/env bash
# Trains on the hosts of a file with Open MPI 4: a line is "host slots=8", a slot is a process, which drives one GPU.
#
#   launch/mpi.sh HOSTFILE configs/sft_full_20b.yaml [--section.field value ...]
#
# The configuration's `mesh` has to multiply to the number of slots; package, data and output.directory are at the same path on all hosts.
# SIGTERM to mpirun saves and ends; the same command goes on from there.
set -euo pipefail
hosts=${1:?"expected HOSTFILE CONFIG.yaml"}
shift
exec mpirun --hostfile "$hosts" --bind-to none --mca odls_base_sigkill_timeout 300 \
  "${PYTHON:-python}" -m gptoss_jax.finetune "$@" --distributed
