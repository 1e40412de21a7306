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
graphs=(--models swin_tiny --batch-sizes 64 --compile-modes graphs)
compile_beside v2_here 125 "${v2_t[@]}" --libraries
compile_beside v2_timm 125 "${v2_t[@]}" --libraries timm --no-here
compile_beside base_here 125 "${base[@]}" --libraries
compile_beside base_timm 125 "${base[@]}" --libraries timm --no-here
compile_beside graphs 125 "${graphs[@]}" --libraries
join
time_step v2_here 30 "${v2_t[@]}" --libraries
time_step v2_timm 30 "${v2_t[@]}" --libraries timm --no-here
time_step base_here 38 "${base[@]}" --libraries
time_step base_timm 38 "${base[@]}" --libraries timm --no-here

LINES_SHOWN=30 part attention 30 "$python" -m benchmarks.window_attention --batch-size 256 --write "$work/window_attention.md"
LINES_SHOWN=20 part loader 45 "$python" -m benchmarks.loader --only device --rounds 1 \
    --images "$data/imagenet_sample_500.zip" --output "$work"
LINES_SHOWN=8 part save 30 "$python" -m benchmarks.gpu.save_stall --models swin_tiny swin_base

time_step eager 18 --models swin_tiny --batch-sizes 128 --compile-modes eager --libraries
time_step graphs 24 "${graphs[@]}" --libraries
finish
