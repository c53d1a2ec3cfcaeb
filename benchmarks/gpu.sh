#!/bin/sh
# What only a GPU can say, in under nine minutes: attention, training steps of NBP-XL, XXL and 3B, decoding.
#
#     benchmarks/gpu.sh [--all] [PYTHON]        (default: .venv/bin/python)
#
# --all, an hour or so: also the tests marked gpu, the engine, its memory, estimates, checkpoints, and forecasters.
# It needs no data, no weights and no network: a GPU, this repository, and torch with requirements.txt.
#
# THIS SCRIPT HAS NEVER BEEN RUN ON A GPU: none was at hand when it was written. Expect to mend it.
#
# Writes benchmarks/results/gpu_DATE_NAME.md with the GPUs, driver and versions, and the output of every command. A part
# that fails or takes longer than it may is written down as such with what it said, and the others still run; the exit
# status then is 1. Run on an idle machine.
set -u
cd "$(dirname "$0")/.." || exit 1
all=
if [ "${1:-}" = --all ]; then
    all=1
    shift
fi
python=${1:-.venv/bin/python}

if ! "$python" -c "import torch, sys; sys.exit(not torch.cuda.is_available())"; then
    echo "benchmarks/gpu.sh: $python sees no CUDA device; install torch's CUDA build, or pass another python" >&2
    exit 2
fi
if ! "$python" -c "import deepspeed, benchmarks.decoding, benchmarks.training_step"; then
    echo "benchmarks/gpu.sh: $python lacks what the line above names: $python -m pip install -r requirements.txt" >&2
    exit 2
fi

name=$("$python" -c "import re, torch; print(re.sub(r'\W+', '_', torch.cuda.get_device_name()))")
out=benchmarks/results/gpu_$(date +%F)_$name.md
failed=0

part() { # title, seconds that it may take, command...
    title=$1
    seconds=$2
    shift 2
    printf '\n## %s\n\n`%s`\n\n' "$title" "$*" >>"$out"
    echo "$title ..." >&2
    log=$(mktemp)
    timeout -k 10 "$seconds" "$@" >"$log" 2>&1
    status=$?
    # Tables are markdown already; the rest is shown as it was printed.
    if grep -q '^|' "$log"; then grep -v '^\[' "$log" >>"$out"; else { echo '```'; tail -n 60 "$log"; echo '```'; } >>"$out"; fi
    if [ $status -ne 0 ]; then
        why="exit status $status"
        [ $status -eq 124 ] && why="ended after $seconds seconds"
        printf '\n**FAILED: %s.** The last lines:\n\n```\n%s\n```\n' "$why" "$(tail -n 30 "$log")" >>"$out"
        failed=1
    fi
    rm -f "$log"
}

{
    printf '# On %s\n\n%s\n\n```\n' "$name" "$(date +%F)"
    nvidia-smi --query-gpu=index,name,memory.total,driver_version --format=csv
    "$python" - <<'PYTHON'
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

print(f"Python {platform.python_version()}, torch {torch.__version__}, CUDA {torch.version.cuda}, ", end="")
print(f"NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}, {torch.cuda.device_count()} GPUs")
for package in ("deepspeed", "flash-attn", "xformers"):
    try:
        print(package, version(package))
    except PackageNotFoundError:
        print(package, "absent")
PYTHON
    git log -1 --format='commit %h %s'
    git status --short
    printf '```\n'
} >"$out"

part "Attention" 170 "$python" -m benchmarks.attention --widths 96
part "Training step of the large priors" 200 "$python" -m benchmarks.training_step --seconds 40
part "Decoding by block shape" 150 "$python" -m benchmarks.decoding --rounds 3

if [ "$all" ]; then
    gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())')
    part "Tests" 3600 "$python" -m pytest -m "gpu and not slow" -q -rs
    # A GPU's steps are short beside a CPU's at the same size: a model for which launching kernels is not all there is.
    part "Engine step beside bare DeepSpeed" 900 \
        "$python" -m benchmarks.engine steps --precision bf16 --layers 12 --width 1024 --batch 8
    part "Memory of each ZeRO stage" 900 "$python" -m benchmarks.engine memory --ranks "$gpus" --parameters 400e6
    part "Estimated memory beside what torch allocates" 1800 "$python" -m benchmarks.estimates
    part "Saving checkpoints" 900 "$python" -m benchmarks.checkpoints stall --parameters 400e6
    part "Training steps of forecasters" 1200 "$python" -m benchmarks.forecasters
fi

echo "$out"
exit $failed
