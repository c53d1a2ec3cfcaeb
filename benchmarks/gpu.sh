#!/bin/sh
# Everything that only a GPU can say: the tests marked gpu, then the benchmarks that mean something on CUDA.
#
#     benchmarks/gpu.sh [PYTHON]        (default: .venv/bin/python)
#
# THIS SCRIPT HAS NEVER BEEN RUN: no GPU was at hand when it was written. Expect to mend it.
#
# Writes benchmarks/results/gpu_DATE_NAME.md with the GPUs, driver and versions, and the output of every command. A part
# that fails is written down as failed, and the others still run; the exit status then is 1. Run on an idle machine.
set -u
cd "$(dirname "$0")/.." || exit 1
python=${1:-.venv/bin/python}

if ! "$python" -c "import torch, sys; sys.exit(not torch.cuda.is_available())"; then
    echo "benchmarks/gpu.sh: $python sees no CUDA device; install torch's CUDA build, or pass another python" >&2
    exit 2
fi

name=$("$python" -c "import re, torch; print(re.sub(r'\W+', '_', torch.cuda.get_device_name()))")
out=benchmarks/results/gpu_$(date +%F)_$name.md
failed=0

part() { # title, command...
    title=$1
    shift
    printf '\n## %s\n\n`%s`\n\n' "$title" "$*" >>"$out"
    echo "$title ..." >&2
    log=$(mktemp)
    "$@" >"$log" 2>&1
    status=$?
    # Tables are markdown already; the rest is shown as it was printed.
    if grep -q '^|' "$log"; then grep -v '^\[' "$log" >>"$out"; else { echo '```'; tail -n 60 "$log"; echo '```'; } >>"$out"; fi
    if [ $status -ne 0 ]; then
        printf '\n**FAILED: exit status %s.** The last lines:\n\n```\n%s\n```\n' $status "$(tail -n 30 "$log")" >>"$out"
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

part "Tests" "$python" -m pytest -m "gpu and not slow" -q -rs
# A GPU's steps are short beside a CPU's at the same size: a model for which launching kernels is not all there is.
part "Decoding by block shape" "$python" -m benchmarks.decoding --rounds 3
part "Training step of the large priors" "$python" -m benchmarks.training_step --seconds 40
part "Attention" "$python" -m benchmarks.attention --widths 96
part "Engine step beside bare DeepSpeed" "$python" -m benchmarks.engine steps --precision bf16 --layers 12 --width 1024 --batch 8
part "Memory of each ZeRO stage" "$python" -m benchmarks.engine memory --ranks "$("$python" -c 'import torch; print(torch.cuda.device_count())')" --parameters 400e6
part "Estimated memory beside what torch allocates" "$python" -m benchmarks.estimates
part "Saving checkpoints" "$python" -m benchmarks.checkpoints stall --parameters 400e6

echo "$out"
exit $failed
