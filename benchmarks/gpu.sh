#!/usr/bin/env bash
# What only a GPU can show, in stages: build, test, profile, bench, train, evaluate. One call per stage, or several:
#   benchmarks/gpu.sh build test bench
# Results go to $OUT (default: benchmarks/results). A stage goes on past what fails in it, and says so by its exit status.
# To try the script, also without a GPU, in minutes:
#   OUT=/tmp/tried TINY=1 benchmarks/gpu.sh build test profile bench train evaluate
# pack     comes before all of them, on a machine with a network and nvcc, for a GPU machine that has no network: writes
#          into $WHEELS the packages $MISSING and this one's extension, for $PACK_PYTHON (an interpreter of the GPU
#          machine's version), $TORCH and $TORCH_CUDA_ARCH_LIST. Carry that folder to the GPU machine.
# build    takes what is in $WHEELS, if that is set, and compiles nothing then, but the stages after it must come in the
#          same call; else it compiles the extension and installs the package.
# test     several processes where pytest-xdist is there; most of the time goes into Triton's compiler, so keep
#          $TRITON_CACHE_DIR where a machine is borrowed again.
# bench    takes BENCH="warp step" for some of the benchmarks only, SELECT="not compiled" for some of their rows, and
#          LIMIT, the seconds after which one ends with the rows that it has (default: 240). COMMIT names the code that is
#          measured where git does not know.
# train    stops after TRAIN_LIMIT seconds (default: 3600) with a checkpoint; the next call goes on from it. TRAIN="..."
#          for more flags.
# evaluate measures the run that train ended, and writes its student's weights.
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
        pack)
            rm -rf "${WHEELS:?where to write the wheels}" build/pack
            "${PACK_PYTHON:-python3.12}" -m venv build/pack
            build/pack/bin/pip install --quiet setuptools wheel ninja "${TORCH:-torch==2.11.0}"
            build/pack/bin/pip download --quiet --no-deps --only-binary :all: --dest "$WHEELS" ${MISSING:-SimpleITK monai}
            TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-9.0} \
                build/pack/bin/python setup.py build_ext --build-temp build/pack/temp --build-lib "$WHEELS"
            grep -q cudaLaunchKernel "$WHEELS"/spss_fast/_C*.so || { echo "pack: no CUDA operators, see above" >&2; exit 1; }
            du -ah "$WHEELS" ;;
        build)
            if [ -n "${WHEELS:-}" ]; then
                "$PYTHON" -m pip install --no-index --no-deps "$WHEELS"/*.whl
                cp "$WHEELS"/spss_fast/_C*.so spss_fast
                ln -sfn ../kernels spss_fast/kernels
                export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
            else
                MAX_JOBS=${MAX_JOBS:-16} TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-9.0} \
                    "$PYTHON" -m pip install --no-build-isolation --no-deps --editable .
            fi
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
                "$PYTHON" -m spss_fast.train "${arguments[@]}" ${TRAIN:-} --out "$run" || failed=1 ;;
        evaluate)
            run=${RUN:-$OUT/run}
            "$PYTHON" -m spss_fast.evaluate --run "$run" 2>&1 | tee "$OUT/evaluate.txt" || failed=1
            "$PYTHON" -m spss_fast.export --run "$run" --out "$OUT/student" --format safetensors || failed=1 ;;
        *) echo "unknown stage $stage: pack, build, test, profile, bench, train or evaluate" >&2; exit 2 ;;
    esac
done
exit $failed
