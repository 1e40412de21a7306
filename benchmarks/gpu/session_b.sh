#!/usr/bin/env bash
# Second run on a GPU: other models, the attention kernels, feeding, saving, eager and small batches.
#
#     OUT=DIR benchmarks/gpu/session_b.sh          writes DIR/b.tgz
#     DRY_RUN=1 benchmarks/gpu/session_b.sh        lists the parts and the longest time they can take
#
# GPU_DATA (.gpu) names a folder with imagenet_sample_500.zip. The exit code is the number of parts that failed.
source "$(dirname "$0")/common.sh"

v2_t=(--models swinv2_tiny_w8 --batch-sizes 128 --compile-modes compiled)
base=(--models swin_base --batch-sizes 64 --compile-modes compiled)
compile_beside v2_here 130 "${v2_t[@]}" --libraries
compile_beside v2_timm 130 "${v2_t[@]}" --libraries timm --no-here
compile_beside base_here 130 "${base[@]}" --libraries
compile_beside base_timm 130 "${base[@]}" --libraries timm --no-here
join
time_step v2_here 18 "${v2_t[@]}" --libraries
time_step v2_timm 18 "${v2_t[@]}" --libraries timm --no-here
time_step base_here 18 "${base[@]}" --libraries
time_step base_timm 18 "${base[@]}" --libraries timm --no-here

LINES_SHOWN=30 part attention 40 "$python" -m benchmarks.window_attention --batch-size 256 --write "$work/window_attention.md"
LINES_SHOWN=20 part loader 65 "$python" -m benchmarks.loader --only device --rounds 1 \
    --images "$data/imagenet_sample_500.zip" --output "$work"
LINES_SHOWN=8 part save 35 "$python" -m benchmarks.gpu.save_stall --models swin_tiny swin_base

small=(--models swin_tiny --batch-sizes 128 --compile-modes eager)
time_step eager_here 15 "${small[@]}" --libraries
time_step eager_timm 15 "${small[@]}" --libraries timm --no-here
time_step graphs 30 --models swin_tiny --batch-sizes 64 --compile-modes graphs --libraries
finish
