#!/bin/sh
# nbval over the notebooks as another machine would compute: sh machines.sh "own 2" "avx2 1" ...
# own or avx2: the CPU's own instructions, or AVX2 alone (softmax, attention and bf16 products
# change in the last bits); then the number of threads. Each has runs of its own, trained anew.
set -eu
for machine in "$@"; do
  capability=${machine% *}
  echo "capability $capability, threads ${machine#* }"
  runs=$(mktemp -d)
  if [ "$capability" = avx2 ]; then
    export ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2
  else
    unset ATEN_CPU_CAPABILITY ONEDNN_MAX_CPU_ISA
  fi
  # Passive: a thread that waits in a loop takes the core from the one it waits for.
  GEMMATE_RUNS=$runs GEMMATE_THREADS=${machine#* } OMP_WAIT_POLICY=passive make course-notebooks || {
    echo "failed: capability $capability, threads ${machine#* }" >&2
    exit 1
  }
  rm -rf "$runs"
done
