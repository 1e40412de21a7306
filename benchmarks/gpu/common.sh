# What session_a.sh and session_b.sh share: running a part within its time limit, and one archive of all outputs.
#
#   part NAME SECONDS COMMAND...     runs it and prints the end of its output at once
#   beside NAME SECONDS COMMAND...   the same in the background; `join` waits for all of these
#
# A part that fails or takes too long stops no other. With DRY_RUN=1 nothing is run: the parts are listed and their limits
# added up, those that run beside each other by the longest. To try the scripts where nothing is fast, such as on
# tests/fake_cuda: SMALL=1 measures the demo's model, STRETCH=N multiplies the limits, TESTS names fewer tests.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

session=$(basename "$0" .sh)
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
data=${GPU_DATA:-.gpu}      # holds cifar10/ and imagenet_sample_500.zip; not part of the repository
out=${OUT:-/tmp/gpu_session} # receives the archive
work=${WORK:-$(mktemp -d)}
grace=3                     # seconds from the end of the limit to SIGKILL
total=0 longest=0 failed=()

export PYTHONUNBUFFERED=1 PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-/tmp/gpu_session_inductor}
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-/tmp/gpu_session_triton}

_run() {
    local name=$1 limit=$(($2 * ${STRETCH:-1})) before=$SECONDS code
    shift 2
    timeout --kill-after=$grace "$limit" "$@" >"$work/$name.log" 2>&1
    code=$?
    echo "### $name: exit code $code, $((SECONDS - before)) of $limit s"
    tail -n "${LINES_SHOWN:-4}" "$work/$name.log"
    return $code
}
part() {
    if [ -n "${DRY_RUN:-}" ]; then
        printf 'at most %3d s  %s: %s\n' "$2" "$1" "${*:3}"
        total=$((total + $2 + grace))
    else
        _run "$@" || failed+=("$1")
    fi
}
names=() pids=()
beside() {
    if [ -n "${DRY_RUN:-}" ]; then
        printf 'at most %3d s, beside others  %s: %s\n' "$2" "$1" "${*:3}"
        [ "$2" -le "$longest" ] || longest=$2
    else
        _run "$@" &
        names+=("$1") pids+=($!)
    fi
}
join() {
    local i
    [ "$longest" = 0 ] || total=$((total + longest + grace))
    for i in "${!pids[@]}"; do
        wait "${pids[i]}" || failed+=("${names[i]}")
    done
    longest=0 names=() pids=()
}
# Images/s of one candidate, in a process of its own: step OPTIONS of benchmarks.step. All write to one table.
step() {
    "$1" "$2" "$3" "$python" -m benchmarks.step --device cuda --modes training --dtypes bfloat16 "${@:4}" \
        ${SMALL:+--models demo --batch-sizes 4}
}
compile_beside() { step beside "compile_$1" "$2" --rounds 1 --seconds 0.01 "${@:3}"; }
time_step() { step part "time_$1" "$2" --rounds 5 --seconds 0.6 --write "$work/step_gpu.md" "${@:3}"; }

finish() {
    if [ -n "${DRY_RUN:-}" ]; then
        echo "at most $total s in all"
        exit 0
    fi
    mkdir -p "$out"
    tar czf "$out/${session#session_}.tgz" --exclude='*.pth' --exclude=digits -C "$work" .
    echo "$SECONDS s in all; outputs are in $out/${session#session_}.tgz"
    [ ${#failed[@]} = 0 ] || echo "failed or stopped: ${failed[*]}"
    exit ${#failed[@]}
}

if [ -z "${DRY_RUN:-}" ]; then
    if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
        echo "error: PyTorch ($python) finds no GPU here; DRY_RUN=1 lists the parts" >&2
        exit 2
    fi
    mkdir -p "$work"
    command -v nvidia-smi >/dev/null && nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
    "$python" -c 'import torch, triton, numpy, PIL, timm
for module in (torch, triton, numpy, PIL, timm): print(module.__name__, module.__version__, end="  ", flush=True)'
    echo
fi
