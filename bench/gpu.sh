#!/usr/bin/env bash
# Builds, checks and times everything on the GPU of this machine, without network, in under nine minutes.
#
# usage: bench/gpu.sh [FOLDER]
#
# Needs a python3 with torch 2.9 or newer for CUDA, triton, numpy, safetensors, tqdm and pytest; nvcc for the CUDA
# kernels, compute-sanitizer for their memory check. Writes FOLDER/<card>-<date>.json (default: bench/results) and, where
# time is left, <card>-<date>-autotuned.json; logs beside them in FOLDER/logs. Prints the tables last. A stage that fails
# does not stop the next; the exit code tells.
set -uo pipefail
cd "$(dirname "$0")/.."

folder=${1:-bench/results}
mkdir -p "$folder/logs"
python=${PYTHON:-python3}
export PYTHONPATH=$PWD
failed=()

deadline=330  # in seconds from the start, for all before the benchmark

stage() {  # stage NAME SECONDS COMMAND...: at most so long, and not past $deadline
    local name=$1 limit=$2 start=$SECONDS log
    shift 2
    log="$folder/logs/${name// /-}.log"
    limit=$((limit < deadline - SECONDS ? limit : deadline - SECONDS))
    if [ "$limit" -le 0 ]; then
        echo "=== $name: LEFT OUT, no time"
        failed+=("$name")
        return
    fi
    echo "=== $name"
    if timeout --signal=INT --kill-after=10 "$limit" "$@" > "$log" 2>&1; then
        echo "=== $name: passed in $((SECONDS - start)) s"
    else
        echo "=== $name: FAILED ($?) after $((SECONDS - start)) s; the end of $log:"
        tail -n 15 "$log"
        failed+=("$name")
    fi
}

"$python" -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "torch sees no GPU here")' || exit 2
card=$("$python" -c 'import re, torch; print(re.sub("[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()))')
result="$folder/$card-$(date +%Y-%m-%d).json"
nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem,memory.total --format=csv 2> /dev/null
"$python" -c 'import torch, triton; print("torch", torch.__version__, "triton", triton.__version__)'

stage 'build' 150 env MAX_JOBS="$(nproc)" "$python" setup.py build_ext --inplace
stage 'what is there' 30 "$python" -m tgdp_fast info
for backend in triton cuda; do
    stage "validate $backend" 100 "$python" -m tgdp_fast validate --backend "$backend" \
        --json "$folder/logs/validate-$backend.json"
done
stage 'tests' 100 "$python" -m pytest -q tests/test_gpu.py
if command -v compute-sanitizer > /dev/null; then
    for tool in memcheck racecheck; do
        stage "sanitizer $tool" 60 compute-sanitizer --tool "$tool" --error-exitcode 9 "$python" bench/gpu_small.py
    done
fi
# Rows are saved case by case, so that what a limit cuts off costs the rest only.
deadline=520
stage 'benchmark' "$deadline" "$python" -m tgdp_fast bench --device cuda --seconds 1 \
    --only guided_step/1e6 guided_step/1e8 guided_step_noise 'mlp*batch256-input2-width512' \
    'mlp*batch4096-input2-width512' 'mlp*batch65536-input2-width512' 'mlp*batch4096-input2-width128' \
    trajectory fit_step 'mlp*batch256-input3904-width512' 'sampling/samples10000-width512' long_convolution/64 \
    sssd_ecg/blocks36-width256-batch1 sssd_ecg/blocks36-width256-batch8 --json "$result"
# The Triton kernels with measured launch configurations; choices are new every time.
autotuned="${result%.json}-autotuned.json"
rm -f "$autotuned"
if [ "$SECONDS" -lt $((deadline - 60)) ]; then
    stage 'benchmark autotuned' "$deadline" env TGDP_TRITON_AUTOTUNE=1 XDG_CACHE_HOME="$(mktemp -d)" \
        "$python" -m tgdp_fast bench --device cuda --seconds 1 --providers triton triton+graph \
        --only 'mlp*batch65536-input2-width512' 'mlp*batch4096-input2-width128' guided_step/1e8 fit_step \
        --json "$autotuned"
fi

echo
"$python" -m tgdp_fast bench-report "$result" --out "$folder/logs" > /dev/null 2>&1
"$python" - "$result" "$autotuned" <<'CODE'
import json, os, sys
from tgdp_fast.benchmark import report

for path in filter(os.path.exists, sys.argv[1:]):
    print(path, report.table(json.load(open(path))["rows"]), sep="\n")
CODE
echo "$result, after $SECONDS s; failed: ${failed[*]:-nothing}"
[ ${#failed[@]} -eq 0 ]
