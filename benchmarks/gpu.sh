#!/usr/bin/env bash
# What only a GPU can show, in stages: build, test, profile, bench, train. One call per stage, or several:
#   benchmarks/gpu.sh build test bench
# Results go to $OUT (default: benchmarks/results). A stage goes on past what fails in it, and says so by its exit status.
# To try the script, also without a GPU, in minutes:
#   OUT=/tmp/tried TINY=1 benchmarks/gpu.sh build test profile bench train
# build    installs the wheels in $WHEELS, if that is set, before the package: what a machine without a network lacks.
# test     several processes where pytest-xdist is there; most of the time goes into Triton's compiler, so keep
#          $TRITON_CACHE_DIR where a machine is borrowed again.
# bench    takes BENCH="warp step" for some of the benchmarks only, SELECT="not compiled" for some of their rows, and
#          LIMIT, the seconds after which one ends with the rows that it has (default: 240). COMMIT names the code that is
#          measured where git does not know.
# train    stops after TRAIN_LIMIT seconds (default: 3600) with a checkpoint; the next call goes on from it.
# Python does not see an interrupt while it waits for a GPU: what hangs there is killed two minutes later.
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
                "$PYTHON" -m pip install --no-build-isolation --no-deps --editable .
            "$PYTHON" -c "import spss_fast.train" || failed=1 ;; # says which of the dependencies is missing
        test)
            # what needs a GPU first; what only compiles is shown without one
            folders=(tests/engine/test_graphs.py tests/ops tests/nets tests/engine)
            if [ "$TINY" = 1 ]; then folders=(tests/engine/test_graphs.py tests/nets); fi
            several=()
            if "$PYTHON" -c "import xdist" 2> /dev/null; then several=(-n 8); fi
            # strides beyond 32 bits take gigabytes of a GPU each: those alone
            OMP_NUM_THREADS=2 "$PYTHON" -m pytest "${several[@]}" "${folders[@]}" -k "not beyond_32_bits" \
                --ignore tests/ops/test_native_builds.py --ignore tests/ops/test_triton_compiles.py \
                --ignore tests/ops/test_large.py --continue-on-collection-errors 2>&1 | tee "$OUT/gpu_tests.log" || failed=1
            if [ "$TINY" != 1 ]; then
                "$PYTHON" -m pytest tests/ops/test_matrix.py tests/ops/test_large.py -k "beyond_32_bits or large" \
                    2>&1 | tee "$OUT/gpu_tests_large.log" || failed=1
            fi ;;
        profile)
            if [ "$TINY" = 1 ]; then echo "profile: full sizes only, so left out"; continue; fi
            "$PYTHON" benchmarks/profile_step.py "$OUT" 2>&1 | tee "$OUT/profile_step.txt" || failed=1 ;;
        bench)
            seconds=0.5
            if [ "$TINY" = 1 ]; then seconds=0.01; fi
            # one run each, so that none takes the others' results along when it fails
            for name in ${BENCH:-step contrastive uncertainty propagate norm losses loader warp}; do
                timeout -k 120 -s INT "${LIMIT:-240}" "$PYTHON" -m pytest "benchmarks/bench_$name.py" --benchmark-only \
                    -k "${SELECT:-bench}" --bench-results "$OUT" --bench-seconds "$seconds" || failed=1
            done ;;
        train)
            if [ "$TINY" = 1 ]; then
                arguments=(--dataset phantom --iterations 2 --registration-epochs 1 --registration-steps 1 --filters 2)
            else
                arguments=(--dataset la --data-dir "${LA:?the folder of the LA scans}")
            fi
            run=${RUN:-$OUT/run}
            if [ -e "$run/checkpoints/last.pt" ]; then arguments=(--resume); fi
            timeout -k 120 -s INT "${TRAIN_LIMIT:-3600}" \
                "$PYTHON" -m spss_fast.train "${arguments[@]}" --out "$run" || failed=1 ;;
        *) echo "unknown stage $stage: build, test, profile, bench or train" >&2; exit 2 ;;
    esac
done
exit $failed
