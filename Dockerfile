# Training on NVIDIA GPUs. The -devel image has the compilers that the native image code and torch.compile need.
#
#   docker build -t swin .
#   docker run --gpus all --ipc=host -v /path/to/imagenet:/data/imagenet:ro -v "$PWD/logs:/swin/logs" swin \
#       torchrun --nproc_per_node=8 main.py --cfg configs/swin_tiny.yaml --data-path /data/imagenet
#
# --ipc=host: loader workers pass batches through shared memory, and a container's default of 64 MB is too small.
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04

RUN apt-get update && apt-get install --yes --no-install-recommends build-essential git python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /swin
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1
COPY requirements.txt .
RUN python3 -m venv /opt/venv && pip install --no-cache-dir -r requirements.txt

COPY . .
CMD ["python", "main.py", "--help"]
