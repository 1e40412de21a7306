#!/usr/bin/env bash
# First run on a GPU: whether it is right, the headline, a real training, and whether resuming gives the same bits.
#
#     OUT=DIR benchmarks/gpu/session_a.sh          writes DIR/a.tgz
#     DRY_RUN=1 benchmarks/gpu/session_a.sh        lists the parts and the longest time they can take
#
# GPU_DATA (.gpu) names a folder with cifar10/train.zip and so on. The exit code is the number of parts that failed.
source "$(dirname "$0")/common.sh"

# Right first: the kernels with many windows in a program, and all tests for a GPU. Nothing is timed here; beside them
# the steps that are timed next are compiled.
many=tests/models/ops/test_triton_many_windows.py
pytest=("$python" -m pytest -q -p no:cacheprovider -rfE --tb=short)
LINES_SHOWN=30 beside kernels 110 "${pytest[@]}" -n "${TEST_WORKERS:-4}" "$many"
LINES_SHOWN=40 beside tests 110 "${pytest[@]}" -n "${TEST_WORKERS:-6}" -m gpu --ignore "$many" ${TESTS:-tests}
swin_t=(--models swin_tiny --batch-sizes 256 --compile-modes compiled)
compile_beside here 110 "${swin_t[@]}" --libraries
compile_beside timm 110 "${swin_t[@]}" --libraries timm --no-here
compile_beside bf16 110 "${swin_t[@]}" --libraries --no-here --variant bf16 TRAIN.BF16_PARAMS True
join

# The headline. A process takes some 20 s to start, trace the model and find its code in the cache.
time_step here 35 "${swin_t[@]}" --libraries
time_step timm 35 "${swin_t[@]}" --libraries timm --no-here
time_step bf16 25 "${swin_t[@]}" --libraries --no-here --variant bf16 TRAIN.BF16_PARAMS True

# A real training by main.py; beside it a small one that is killed twice, and resumed to the same bits.
LINES_SHOWN=25 beside cifar10 107 "$python" -m torch.distributed.run --standalone --nproc_per_node=1 main.py \
    --cfg configs/cifar10.yaml --zip --data-path "$data/cifar10" --output "$work/runs" \
    --opts DATA.NUM_WORKERS "${WORKERS:-12}" TRAIN.EPOCHS "${CIFAR_EPOCHS:-20}" TRAIN.WARMUP_EPOCHS 2 SAVE_FREQ 20 PRINT_FREQ 50
beside resume 107 env TORCHINDUCTOR_DETERMINISTIC=1 "$python" -m benchmarks.gpu.resume --output "$work/resume" \
    --opts AMP_DTYPE bfloat16 TRAIN.EPOCHS 6 TRAIN.WARMUP_EPOCHS 1 SAVE_STEPS 20
join
finish
