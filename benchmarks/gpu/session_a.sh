#!/usr/bin/env bash
# First run on a GPU: whether it is right, the headline, a real training, and whether resuming gives the same bits.
#
#     OUT=DIR benchmarks/gpu/session_a.sh          writes DIR/a.tgz
#     DRY_RUN=1 benchmarks/gpu/session_a.sh        lists the parts and the longest time they can take
#
# GPU_DATA (.gpu) names a folder with cifar10/train.zip and so on. The exit code is the number of parts that failed.
source "$(dirname "$0")/common.sh"

# Right first: the kernels with many windows in a program.
LINES_SHOWN=30 part kernels 40 "$python" -m pytest -q -p no:cacheprovider -rfE --tb=short \
    -n "${TEST_WORKERS:-6}" tests/models/ops/test_triton_many_windows.py

# Nothing is timed here: all tests for a GPU, and beside them the compilation of the steps that are timed next.
LINES_SHOWN=40 beside tests 95 "$python" -m pytest -q -p no:cacheprovider -rfE --tb=short -n "${TEST_WORKERS:-6}" -m gpu ${TESTS:-tests}
swin_t=(--models swin_tiny --batch-sizes 256 --compile-modes compiled)
compile_beside here 95 "${swin_t[@]}" --libraries
compile_beside timm 95 "${swin_t[@]}" --libraries timm --no-here
compile_beside bf16 95 "${swin_t[@]}" --libraries --no-here --variant bf16 TRAIN.BF16_PARAMS True
join

# The headline, from the cache.
time_step here 18 "${swin_t[@]}" --libraries
time_step timm 18 "${swin_t[@]}" --libraries timm --no-here
time_step bf16 18 "${swin_t[@]}" --libraries --no-here --variant bf16 TRAIN.BF16_PARAMS True

# A real training by main.py; beside it a small one that is killed twice, and resumed to the same bits.
LINES_SHOWN=25 beside cifar10 110 "$python" -m torch.distributed.run --standalone --nproc_per_node=1 main.py \
    --cfg configs/cifar10.yaml --zip --data-path "$data/cifar10" --output "$work/runs" \
    --opts DATA.NUM_WORKERS "${WORKERS:-12}" TRAIN.EPOCHS "${CIFAR_EPOCHS:-20}" TRAIN.WARMUP_EPOCHS 2 SAVE_FREQ 20 PRINT_FREQ 50
beside resume 110 env TORCHINDUCTOR_DETERMINISTIC=1 "$python" -m benchmarks.gpu.resume --output "$work/resume" \
    --opts AMP_DTYPE bfloat16 TRAIN.EPOCHS 6 TRAIN.WARMUP_EPOCHS 1 SAVE_STEPS 20
join
finish
