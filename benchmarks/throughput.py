"""Swin-T here beside timm's Swin-T, in one process and in turns; and what the training loop costs over a bare one.

    python -m benchmarks.throughput                               # random images
    python -m benchmarks.throughput --images imagenet_sample.zip  # real ones: a zip of JPEGs
    python -m benchmarks.throughput --batch-size 8 --turns 7 --write benchmarks/results/throughput.md

A training step is forward, backward, clipping at 5.0 and an update of the same
fused AdamW. `loop` is a step of this project's model by `engine.train`, with all it counts and checks; `bare` is the
same model in the plainest loop that makes the same update.
"""

import argparse
import itertools
import statistics
import sys
import time
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import timm
import torch
from torch import nn
from torchvision import transforms

from config import get_config
from data.codecs.pillow_decode import BadImage, decode
from engine import train_step
from engine.train_step import TrainComponents, TrainState, seconds_for
from models.build import build_model
from optimizer import build_optimizer
from tasks.classification import Classification
from utils.cli import number, run_cli
from utils.errors import UserError
from utils.files import write_text
from utils.tracking.run_dir import collect_env

CONFIG = Path(__file__).parent.parent / "configs" / "swin_tiny.yaml"


def load_batch(source: Path | None, batch_size: int, device: torch.device) -> torch.Tensor:
    """(B, 3, 224, 224) float32: the first images of a zip of JPEGs, or random numbers."""
    if source is None:
        return torch.randn(batch_size, 3, 224, 224, generator=torch.Generator().manual_seed(0)).to(device)
    prepare = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224), transforms.ToTensor()])
    try:
        with zipfile.ZipFile(source) as archive:
            found = sorted(n for n in archive.namelist() if n.lower().endswith((".jpeg", ".jpg")))[:batch_size]
            pictures = [decode(archive.read(name), f"{source}:{name}") for name in found]
    except (OSError, zipfile.BadZipFile, RuntimeError, BadImage) as error:
        raise UserError(f"--images {source}: cannot be read ({error}). Give a zip of JPEG images") from error
    if not pictures:
        raise UserError(f"--images {source}: has no file that ends in .jpg or .jpeg. Give a zip of JPEG images")
    repeated = itertools.islice(itertools.cycle(pictures), batch_size)
    return torch.stack([prepare(picture) for picture in repeated]).to(device)


def timm_steps(
    images: torch.Tensor, target: torch.Tensor, amp_dtype: torch.dtype | None
) -> tuple[Callable[[], None], Callable[[], None]]:
    model = timm.create_model("swin_tiny_patch4_window7_224", drop_path_rate=0.2).to(images.device)
    return bare_steps(model, images, target, amp_dtype, torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True))


def bare_steps(
    model: nn.Module,
    images: torch.Tensor,
    target: torch.Tensor,
    amp_dtype: torch.dtype | None,
    optimizer: torch.optim.Optimizer,
) -> tuple[Callable[[], None], Callable[[], None]]:
    """A step of inference and one of training, with nothing that is not needed for the result."""
    loss_of = Classification(model).soft_loss
    parameters = list(model.parameters())
    autocast = torch.autocast(images.device.type, amp_dtype or torch.bfloat16, enabled=amp_dtype is not None)

    def infer() -> None:
        model.eval()
        with torch.inference_mode(), autocast:
            model(images)

    def train() -> None:
        model.train()
        with autocast:
            output = model(images)
        loss_of(output.float(), target).backward()
        nn.utils.clip_grad_norm_(parameters, 5.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return infer, train


def loop_step(model: nn.Module, images: torch.Tensor, target: torch.Tensor, amp_dtype: torch.dtype | None, optimizer):
    """One update by the project's own loop."""
    scaler = torch.amp.GradScaler(images.device.type, enabled=False)
    components = TrainComponents(Classification(model), optimizer, scaler, images.device, amp_dtype, clip_grad=5.0)
    batches = itertools.repeat({"image": images, "target": target, "position": 0})
    updates = train_step.train(components, batches, TrainState(), lambda update: 1e-6, len(images))
    return lambda: next(updates)


def interleave(
    steps: dict[str, Callable[[], object]], images: int, device: torch.device, seconds: float, turns: int
) -> dict[str, list[float]]:
    """Images per second of each of `steps`, which all handle `images` of them, in each of `turns` turns.

    In a turn every candidate runs for about `seconds`; the order is turned round from turn to turn.
    """
    times = {}
    for name, step in steps.items():
        seconds_for(step, 2, device)  # warm-up
        times[name] = max(1, round(seconds / seconds_for(step, 1, device)))
    rates: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(turns):
        for name in list(steps)[:: -1 if turn % 2 else 1]:
            rates[name].append(times[name] * images / seconds_for(steps[name], times[name], device))
    return rates


def ratio(rates: dict[str, list[float]], name: str, other: str) -> float:
    """How many times as fast `name` is as `other`: the median over the turns."""
    return statistics.median(a / b for a, b in zip(rates[name], rates[other], strict=True))


def compare(args: argparse.Namespace, device: torch.device) -> list[str]:
    """The lines of a Markdown table, measured now."""
    images = load_batch(args.images, args.batch_size, device)
    target = torch.rand(args.batch_size, 1000, generator=torch.Generator().manual_seed(0)).softmax(1).to(device)
    config = get_config(str(CONFIG))
    lines = [
        "| | images/s here (loop) | bare loop | timm | here / timm | loop / bare |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for amp_dtype in (None, torch.bfloat16):
        name = "float32" if amp_dtype is None else "bfloat16"
        model = build_model(config, 1000).to(device)
        optimizer = build_optimizer(config, model)
        for group in optimizer.param_groups:
            group["lr"] = 1e-6
        infer, train = bare_steps(model, images, target, amp_dtype, optimizer)
        timm_infer, timm_train = timm_steps(images, target, amp_dtype)
        loop = loop_step(model, images, target, amp_dtype, optimizer)

        def medians(steps: dict[str, Callable[[], object]]) -> tuple[dict[str, list[float]], dict[str, str]]:
            rates = interleave(steps, len(images), device, args.seconds, args.turns)
            return rates, {key: f"{sorted(values)[len(values) // 2]:.1f}" for key, values in rates.items()}

        rates, shown = medians({"here": infer, "timm": timm_infer})
        times = ratio(rates, "here", "timm")
        lines.append(f"| inference, {name} | {shown['here']} | | {shown['timm']} | {times:.3f} | |")
        rates, shown = medians({"here": loop, "bare": train, "timm": timm_train})
        lines.append(
            f"| training, {name} | {shown['here']} | {shown['bare']} | {shown['timm']} | "
            f"{ratio(rates, 'here', 'timm'):.3f} | {ratio(rates, 'here', 'bare'):.3f} |"
        )
        print("\n".join(lines[-2:]), flush=True)
    return lines


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.throughput",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--images", type=Path, help="zip of JPEG images; random images if not given")
    parser.add_argument("--batch-size", type=number(int, 1, 65536), default=8)
    parser.add_argument("--seconds", type=number(float, 0, 1e5), default=3.0, help="of each candidate in each turn")
    parser.add_argument("--turns", type=number(int, 1, 1e4), default=7)
    parser.add_argument("--write", type=Path, help="Markdown file for the table and what it was measured on")
    args = parser.parse_args(argv)
    return run_cli(lambda: measure(args, argv or sys.argv[1:]))


def measure(args: argparse.Namespace, typed: Sequence[str]) -> int:
    lines = compare(args, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    if args.write:
        facts = collect_env()
        head = [
            f"# Swin-T, batch {args.batch_size}, {args.turns} turns, medians",
            "",
            f"{facts['hardware']}; {', '.join(f'{k} {v}' for k, v in facts['versions'].items())}; "
            f"Python {facts['python']}; {time.strftime('%Y-%m-%d')}",
            "",
            f"`{' '.join(['python', '-m', 'benchmarks.throughput', *typed])}`",
            "",
        ]
        write_text(args.write, "\n".join([*head, *lines, ""]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
