#!/usr/bin/env bash
# Checks and times everything that needs a GPU, in one run of less than ten minutes, and writes its tables:
#
#     benchmarks/gpu_session.sh [FOLDER]                    FOLDER: benchmarks/results
#     benchmarks/gpu_session.sh --dry-run                   says what it would run, and for how long at most
#     DEVICE=cpu benchmarks/gpu_session.sh /tmp/session     the same parts, tiny, on a CPU: to try the script itself
#
# Each part has a time limit of its own; one that fails or takes too long is named at the end and stops no other. The
# exit code is the number of those. PYTHON names the interpreter.
set -uo pipefail
cd "$(dirname "$0")/.."

dry=
[ "${1:-}" = --dry-run ] && { dry=1; shift; }
if [ $# -gt 1 ] || [[ "${1:-}" == -* ]]; then
    sed -n '2,9s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
folder=${1:-benchmarks/results}
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
device=${DEVICE:-cuda}
if [ -z "$dry" ] && [ "$device" = cuda ] && ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "error: PyTorch ($python) finds no GPU here; DEVICE=cpu tries the script, --dry-run says what it would do" >&2
    exit 2
fi
[ -n "$dry" ] || mkdir -p "$folder" || exit 2
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
failed=()
started=$SECONDS

# part NAME SECONDS COMMAND...: runs it, with all that it says in FOLDER/gpu_session/NAME.log
part() {
    local name=$1 limit=$2 before=$SECONDS code
    shift 2
    if [ -n "$dry" ]; then
        printf '%-16s at most %3d s: %s\n' "$name" "$limit" "$*"
        total=$((${total:-0} + limit))
        return
    fi
    mkdir -p "$folder/gpu_session"
    timeout --kill-after=10 "$limit" "$@" >"$folder/gpu_session/$name.log" 2>&1
    code=$?
    printf '%-16s %3d s  %s\n' "$name" $((SECONDS - before)) "$([ $code = 0 ] && echo done || echo "FAILED ($code)")"
    [ $code = 0 ] || failed+=("$name")
}

step=("$python" -m benchmarks.step --device "$device" --write)
if [ "$device" = cuda ]; then
    table="$folder/step_gpu.md" large=(--batch-sizes 256 --seconds 1 --rounds 3) small=(--batch-sizes 1 8 --seconds 0.5 --rounds 3)
    memory=(--models swin_base --batch-sizes 64 --seconds 0.5 --rounds 3) graphs=(eager compiled graphs) first=128
    demo=(TRAIN.EPOCHS 3 TRAIN.WARMUP_EPOCHS 1) tests=(-m gpu tests)
else
    tiny=(--models demo --batch-sizes 2 --seconds 0.05 --rounds 1)
    table="$folder/step_cpu.md" large=("${tiny[@]}") small=("${tiny[@]}") memory=("${tiny[@]}") graphs=(eager) first=2
    demo=(TRAIN.EPOCHS 1 TRAIN.WARMUP_EPOCHS 0) tests=(tests/test_layering.py)
fi
main=("$python" main.py --cfg configs/swin_tiny.yaml)
[ "$device" = cuda ] || main=("$python" main.py --cfg configs/demo.yaml)

part tests 95 "$python" -m pytest -q -p no:cacheprovider "${tests[@]}"
part attention 50 "$python" -m benchmarks.window_attention --write "$folder/window_attention.md"

# Small and sure things first; the compiled peers take longest and come last.
part eager 50 "${step[@]}" "$table" "${large[@]}" --dtypes bfloat16 --compile-modes eager
part checkpointing 40 "${step[@]}" "$table" "${memory[@]}" --dtypes bfloat16 --modes training --compile-modes eager \
    --libraries timm torchvision --variant checkpoint TRAIN.USE_CHECKPOINT True
part bf16 25 "$python" -m torch.distributed.run --standalone --nproc_per_node=1 main.py --cfg configs/demo.yaml \
    --data-path "$scratch/digits" --output "$scratch/bf16" --opts AMP_DTYPE bfloat16 "${demo[@]}"
part fp16 25 "$python" -m torch.distributed.run --standalone --nproc_per_node=1 main.py --cfg configs/demo.yaml \
    --data-path "$scratch/digits" --output "$scratch/fp16" --opts AMP_DTYPE float16 "${demo[@]}"
for start in cold cached; do # "first step … s" in the log: compiling included
    part "first_step_$start" $([ $start = cold ] && echo 75 || echo 30) env TORCHINDUCTOR_CACHE_DIR="$scratch/inductor" \
        "${main[@]}" --throughput --batch-size $first --opts TRAIN.COMPILE True AMP_DTYPE bfloat16
done
part loader 45 "$python" -m benchmarks.loader --only device --rounds 2 --output "$folder"
part graphs 60 "${step[@]}" "$table" "${small[@]}" --dtypes bfloat16 --libraries --compile-modes "${graphs[@]}"
part compiled 90 "${step[@]}" "$table" "${large[@]}" --dtypes bfloat16 --modes training --compile-modes compiled \
    --variant skip MODEL.DROP_PATH_SKIP True --variant bf16 TRAIN.BF16_PARAMS True

if [ -n "$dry" ]; then
    echo "at most $total s in all"
    exit 0
fi
echo "$((SECONDS - started)) s in all; tables and logs are in $folder"
[ ${#failed[@]} = 0 ] || echo "failed or stopped: ${failed[*]}; see $folder/gpu_session/" >&2
exit ${#failed[@]}
