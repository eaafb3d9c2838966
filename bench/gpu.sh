#!/usr/bin/env bash
# Builds, checks and times everything on the GPU of this machine, without network, in under nine minutes.
#
# usage: bench/gpu.sh [FOLDER [checks]]
#
# Needs a python3 with torch 2.9 or newer for CUDA, triton, numpy, safetensors, tqdm and pytest; nvcc for the CUDA
# kernels, compute-sanitizer for their memory check. Writes FOLDER/<card>-<date>.json (default: bench/results);
# logs beside it in FOLDER/logs. Prints the table last. With "checks" it ends before the timings. A stage that fails
# does not stop the next; the exit code tells.
#
# Environment variables: PYTHON (python3); TGDP_PREBUILT=1, the extensions are there already, do not build them;
# TGDP_GPU_SECONDS, when to start nothing more (520); TGDP_COMMIT, what to write as the commit of a copy without history.
set -uo pipefail
cd "$(dirname "$0")/.."

folder=${1:-bench/results}
mkdir -p "$folder/logs"
python=${PYTHON:-python3}
export PYTHONPATH=$PWD TORCHINDUCTOR_COMPILE_THREADS=2
failed=()

end=${TGDP_GPU_SECONDS:-520}  # in seconds from the start
deadline=$((end - 190))       # for all before the benchmark

stage() {  # stage NAME SECONDS COMMAND...: at most so long, and not past $deadline; its exit status
    local name=$1 limit=$2 start=$SECONDS log
    shift 2
    log="$folder/logs/${name// /-}.log"
    limit=$((limit < deadline - SECONDS ? limit : deadline - SECONDS))
    if [ "$limit" -le 0 ]; then
        echo "=== $name: LEFT OUT, no time"
        return 1
    fi
    if timeout --signal=INT --kill-after=10 "$limit" "$@" > "$log" 2>&1; then
        echo "=== $name: passed in $((SECONDS - start)) s"
    else
        echo "=== $name: FAILED ($?) after $((SECONDS - start)) s; the end of $log:"$'\n'"$(tail -n 6 "$log" | cut -c1-400)"
        return 1
    fi
}

alone() {  # alone NAME SECONDS COMMAND...: a stage, before anything else goes on
    stage "$@" || failed+=("$1")
}

declare -A running=()
beside() {  # beside NAME SECONDS COMMAND...: a stage beside the others
    stage "$@" &
    running[$!]=$1
}

finish() {  # waits for the stages that run
    local process
    for process in "${!running[@]}"; do
        wait "$process" || failed+=("${running[$process]}")
    done
    running=()
}

"$python" -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "torch sees no GPU here")' || exit 2
read -r card capability < <("$python" -c '
import re, torch
major, minor = torch.cuda.get_device_capability()
name = re.sub("[^a-z0-9]+", "-", torch.cuda.get_device_name().lower())
print(name, f"{major}.{minor}" + "a" * (major == 9))')
result="$folder/$card-$(date +%Y-%m-%d).json"
nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem,memory.total --format=csv 2> /dev/null
"$python" -c 'import torch, triton; print("torch", torch.__version__, "triton", triton.__version__)'

if [ "${TGDP_PREBUILT:-0}" != 1 ]; then
    alone 'build' 200 env MAX_JOBS="$(nproc)" TORCH_CUDA_ARCH_LIST="$capability" "$python" setup.py build_ext --inplace
fi
alone 'what is there' 30 "$python" -m tgdp_fast info

# Checks, all beside each other: a kernel that fails spoils its own process alone.
for operator in guided_step long_convolution mlp_value_and_grad trajectory; do
    beside "validate cuda $operator" 100 "$python" -m tgdp_fast validate --backend cuda --operators $operator
done
for operator in guided_step long_convolution residual_block_; do
    beside "validate triton $operator" 150 "$python" -m tgdp_fast validate --backend triton --operators $operator
done
for operator in mlp_value_and_grad mlp_value_and_grad_backward mlp_forward mlp_backward; do
    for precision in bf16 fp16; do  # many kernels to compile
        beside "validate triton $operator $precision" 150 "$python" -m tgdp_fast validate --backend triton \
            --operators $operator --precisions $precision
    done
done
beside 'tests' 150 "$python" -m pytest -q -p no:cacheprovider tests/cuda/test_gpu.py
if command -v compute-sanitizer > /dev/null; then
    for tool in memcheck racecheck; do
        beside "sanitizer $tool" 150 compute-sanitizer --tool "$tool" --error-exitcode 9 "$python" bench/gpu_small.py
    done
fi
finish

# What the benchmark compiles, beside each other: its own processes find it in the caches of Triton and torch.
cases=(guided_step/1e6 guided_step/1e8 guided_step_noise 'mlp*batch256-input2-width512'
    'mlp*batch4096-input2-width512' 'mlp*batch65536-input2-width512' 'mlp*batch4096-input2-width128'
    'mlp*batch256-input3904-width512' trajectory fit_step/logistic fit_step/consistency sampling/samples10000-width512
    long_convolution/64 residual_block/64 'sssd_ecg/blocks36-width256-batch?' sssd_ecg/blocks36-width256-batch256)
for case in "${cases[@]}"; do
    name=${case//[^a-z0-9_-]/-}
    beside "compile $name" 150 "$python" -m tgdp_fast bench --device cuda --seconds 0.01 --only "$case"
done
finish
grep -hE ' fails: | is wrong' "$folder"/logs/compile-*.log | sort -u

if [ "${2:-all}" != checks ]; then
    # Rows are saved case by case, so that what a limit cuts off costs the rest only.
    deadline=$end
    alone 'benchmark' "$deadline" "$python" -m tgdp_fast bench --device cuda --seconds 1 --only "${cases[@]}" \
        --json "$result"
    echo
    "$python" -m tgdp_fast bench-report "$result" --out "$folder/logs" > /dev/null 2>&1
    "$python" - "$result" <<'CODE'
import json, sys
from tgdp_fast.lab.benchmark import report

print(sys.argv[1], report.table(json.load(open(sys.argv[1]))["rows"]), sep="\n")
CODE
fi
echo "$result, after $SECONDS s; failed: ${failed[*]:-nothing}"
[ ${#failed[@]} -eq 0 ]
