#!/usr/bin/env bash
# What only a GPU can show, in stages: build, test, bench, train. One call per stage, or several: gpu.sh build test bench
# Results go to $OUT (default: benchmarks/results). To try the script, also without a GPU, in minutes:
#   OUT=/tmp/tried TINY=1 benchmarks/gpu.sh build test bench train
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-benchmarks/results}
PYTHON=${PYTHON:-python3}
TINY=${TINY:-0}
mkdir -p "$OUT"

for stage in "${@:-build}"; do
    case $stage in
        build) MAX_JOBS=${MAX_JOBS:-16} TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-9.0} \
            "$PYTHON" -m pip install --no-build-isolation --no-deps --editable . ;;
        test)
            folders=(tests/ops tests/nets tests/engine)
            if [ "$TINY" = 1 ]; then folders=(tests/nets); fi
            "$PYTHON" -m pytest "${folders[@]}" 2>&1 | tee "$OUT/gpu_tests.log" ;;
        bench)
            seconds=1.5
            if [ "$TINY" = 1 ]; then seconds=0.01; fi
            "$PYTHON" -m pytest benchmarks/ --benchmark-only --benchmark-json "$OUT/gpu_benchmark.json" \
                --bench-results "$OUT" --bench-seconds "$seconds" ;;
        train)
            if [ "$TINY" = 1 ]; then
                arguments=(--dataset phantom --iterations 2 --registration-epochs 1 --registration-steps 1 --filters 2)
            else
                arguments=(--dataset la --data-dir "${LA:?the folder of the LA scans}")
            fi
            run=${RUN:-$OUT/run}
            if [ -e "$run/checkpoints/last.pt" ]; then arguments=(--resume); fi
            "$PYTHON" -m spss_fast.train "${arguments[@]}" --out "$run" ;;
        *) echo "unknown stage $stage: build, test, bench or train" >&2; exit 2 ;;
    esac
done
