#!/usr/bin/env bash
# Trains on this machine: one process drives all its accelerators, laid out by the configuration's `mesh`.
#
#   launch/local.sh configs/sft_lora_20b.yaml [--section.field value ...]
#
# SIGTERM saves and ends with exit code 143; the same command goes on from there, after a kill or a power cut too.
set -euo pipefail
exec "${PYTHON:-python}" -m gptoss_jax.finetune "$@"
