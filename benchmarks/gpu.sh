#!/usr/bin/env bash
# What only a GPU can show, in stages: build, test, bench, train. One call per stage, or several: gpu.sh build test bench
# Results go to $OUT (default: benchmarks/results). A stage goes on past what fails in it, and says so by its exit status.
# To try the script, also without a GPU, in minutes:
#   OUT=/tmp/tried TINY=1 benchmarks/gpu.sh build test bench train
# build installs the wheels in $WHEELS, if that is set, before the package: what a machine without a network lacks.
# bench takes BENCH="warp step" for some of the benchmarks only.
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-benchmarks/results}
PYTHON=${PYTHON:-python3}
TINY=${TINY:-0}
mkdir -p "$OUT"
failed=0

for stage in "${@:-build}"; do
    case $stage in
        build)
            if [ -n "${WHEELS:-}" ]; then "$PYTHON" -m pip install --no-index --no-deps "$WHEELS"/*.whl; fi
            MAX_JOBS=${MAX_JOBS:-16} TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-9.0} \
                "$PYTHON" -m pip install --no-build-isolation --no-deps --editable . ;;
        test)
            # what needs a GPU first; what only compiles is shown without one
            folders=(tests/engine/test_graphs.py tests/ops tests/nets tests/engine)
            if [ "$TINY" = 1 ]; then folders=(tests/engine/test_graphs.py tests/nets); fi
            "$PYTHON" -m pytest "${folders[@]}" --ignore tests/ops/test_native_builds.py \
                --ignore tests/ops/test_triton_compiles.py 2>&1 | tee "$OUT/gpu_tests.log" || failed=1 ;;
        bench)
            seconds=0.5
            if [ "$TINY" = 1 ]; then seconds=0.01; fi
            # one run each, so that none takes the others' results along when it ends too early
            for name in ${BENCH:-warp propagate uncertainty contrastive step norm losses loader}; do
                timeout 240 "$PYTHON" -m pytest "benchmarks/bench_$name.py" --benchmark-only --bench-results "$OUT" \
                    --bench-seconds "$seconds" || failed=1
            done ;;
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
exit $failed
