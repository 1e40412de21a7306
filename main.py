"""Try it on any machine (a small Swin learns handwritten digits; minutes on two CPU cores):

    python main.py --cfg configs/demo.yaml

Train Swin-T on ImageNet-1K with 8 GPUs, 1024 images a step; the same command again resumes where it stopped:

    torchrun --standalone --nproc_per_node=8 main.py --cfg configs/swin_tiny.yaml --data-path DIR --batch-size 128

Evaluate released weights on one GPU, or on the CPU:

    python main.py --cfg configs/swin_tiny.yaml --data-path DIR --eval --pretrained swin_tiny_patch4_window7_224.pth

Measure images/s, without any data:

    python main.py --cfg configs/swin_tiny.yaml --throughput --batch-size 64

DIR holds train/<class>/*.jpg and val/<class>/*.jpg. A run writes to OUTPUT/MODEL.NAME/TAG, by default
logs/<name>/default. config.py lists every key that --cfg and --opts can set. Later sources win over earlier ones:
defaults, files named by BASE, --cfg, the other flags, --opts.
"""

from utils import interrupt

if __name__ == "__main__":  # before the other imports, so that Ctrl-C does not answer with a traceback of one of them
    interrupt.install()

# torch is imported only after the command line is parsed, so that --help and mistakes are answered at once.
import argparse
import io
import logging
import os
import sys
import time
from collections.abc import Sequence
from functools import partial
from typing import NoReturn

from yacs.config import CfgNode

from config import get_config
from utils.cli import CliParser, as_user_error
from utils.config.foreign_flags import explain_flag
from utils.config.merge import Override, nearest, parse_opts
from utils.distributed.launch import read_launch
from utils.errors import ExitCode, LostProcess, UserError
from utils.tracking import logger

# By then torchrun has ended the processes that would only repeat rank 0's message.
OTHER_RANKS_DELAY_SECONDS = 5

TRAIN_LESS_MEMORY = (
    "a smaller --batch-size with as many --accumulation-steps more (the same global batch), or --use-checkpoint; with "
    "--allow-config-change when resuming a run"
)


class SetKey(argparse.Action):
    """A flag that sets one key of the configuration: to its argument, or to `const` if it takes none."""

    def __init__(self, option_strings: list[str], dest: str, key: str, help: str, const: object = None, **kwargs):
        nargs = None if const is None else 0
        help = f"{help} [{key}]"
        super().__init__(option_strings, dest, nargs, const, default=argparse.SUPPRESS, help=help, **kwargs)
        self.key = key

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        value = values if self.const is None else self.const
        namespace.flags = [*namespace.flags, Override(self.key, value, option_string)]


def build_parser() -> argparse.ArgumentParser:
    """The command line. Flags that set keys leave an `Override` each in `flags`, in the order they were typed."""
    parser = CliParser(
        prog="python main.py",
        usage=argparse.SUPPRESS,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(flags=[])

    group = parser.add_argument_group("configuration")
    group.add_argument("--cfg", metavar="FILE", help="recipe in YAML, such as configs/swin_tiny.yaml (required)")
    group.add_argument(
        "--opts", metavar="KEY VALUE", nargs="+", action="extend", default=[],
        help="any keys of config.py, such as --opts TRAIN.EPOCHS 100 AUG.MIXUP 0",
    )  # fmt: skip

    def flag(*names: str, key: str, **kwargs) -> None:
        group.add_argument(*names, action=SetKey, key=key, **kwargs)

    group = parser.add_argument_group("what to do (training, if none of these is given)")
    flag("--eval", key="EVAL_MODE", const=True, help="evaluate the weights given by --resume or --pretrained")
    flag("--throughput", key="THROUGHPUT_MODE", const=True, help="measure images/s; needs no data")

    group = parser.add_argument_group("data")
    flag("--data-path", metavar="DIR", key="DATA.DATA_PATH", help="folder of the data set")
    flag("--zip", key="DATA.ZIP_MODE", const=True, help="read train.zip and val.zip with their map files")
    flag("--cache-mode", metavar="MODE", key="DATA.CACHE_MODE", help="of the zip files: no, part or full")
    flag("--batch-size", metavar="N", key="DATA.BATCH_SIZE", help="images per process and micro-batch")

    group = parser.add_argument_group("weights")
    flag("--pretrained", metavar="FILE", key="MODEL.PRETRAINED", help="start from this file, URL or released name")
    flag(
        "--ema", key="MODEL.PRETRAINED_EMA", const="ema", help="take the averaged weights of a file with both: sets ema"
    )
    flag("--resume", metavar="FILE", key="MODEL.RESUME", help="resume the run that saved this checkpoint")

    group = parser.add_argument_group("training")
    flag("--accumulation-steps", metavar="N", key="TRAIN.ACCUMULATION_STEPS", help="micro-batches for one step")
    flag("--use-checkpoint", key="TRAIN.USE_CHECKPOINT", const=True, help="recompute activations: less memory, slower")
    flag("--disable_amp", "--disable-amp", key="AMP_ENABLE", const=False, help="no mixed precision: sets False")
    flag("--optim", metavar="NAME", key="TRAIN.OPTIMIZER.NAME", help="adamw or sgd")

    group = parser.add_argument_group("the run's folder, OUTPUT/MODEL.NAME/TAG")
    flag("--output", metavar="DIR", key="OUTPUT", help="folder of all runs")
    flag("--tag", metavar="NAME", key="TAG", help="name of this run beside others of the same model")
    group.add_argument(
        "--allow-config-change", action="store_true",
        help="resume a run although configuration, data or global batch size differ (sets no key)",
    )  # fmt: skip

    group = parser.add_argument_group("accepted for command lines of the original code")
    flag("--local_rank", "--local-rank", metavar="N", key="LOCAL_RANK", help="no effect: torchrun sets LOCAL_RANK")
    flag("--amp-opt-level", metavar="LEVEL", key="AMP_OPT_LEVEL", help="of Apex: O0 is --disable_amp, others nothing")
    flag("--fused_window_process", key="FUSED_WINDOW_PROCESS", const=True, help="no effect: see MODEL.ATTN")
    flag("--fused_layernorm", key="FUSED_LAYERNORM", const=True, help="no effect: PyTorch's own LayerNorm is used")
    return parser


def parse_command_line(argv: Sequence[str]) -> tuple[CfgNode, argparse.Namespace]:
    """Returns the frozen configuration, and the arguments that are no keys of it (`cfg`, `allow_config_change`).

    Raises:
        UserError: unknown or incomplete flag, --resume beside --pretrained, or anything `config.get_config` refuses.
    """
    parser = build_parser()
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        _refuse_argument(unknown, parser)
    if not args.cfg:
        raise UserError("--cfg FILE is missing: name a recipe, such as --cfg configs/swin_tiny.yaml (see --help).")
    given = {override.key: override for override in [*args.flags, *parse_opts(args.opts)]}
    pretrained, resume = given.get("MODEL.PRETRAINED"), given.get("MODEL.RESUME")
    if pretrained and pretrained.value and resume and resume.value:
        raise UserError(
            f"{resume.origin} MODEL.RESUME continues a run and {pretrained.origin} MODEL.PRETRAINED starts a new one: "
            "give one of --resume and --pretrained."
        )
    flags = list(args.flags)
    if pretrained and pretrained.value and not resume:
        # A checkpoint named in the file (as in the saved config of a resumed run) would win over the requested weights.
        flags.append(Override("MODEL.RESUME", "", pretrained.origin))
    return get_config(args.cfg, args.opts, flags), args


def run(config: CfgNode, allow_config_change: bool) -> ExitCode | None:
    """Joins the other processes of the run and trains, evaluates or measures, as configured.

    Returns:
        INTERRUPTED if Ctrl-C asked to stop and everything is saved, else None.
    """
    from engine import evaluation, throughput, trainer
    from utils.distributed.process_group import process_group

    try:
        with process_group(config.TIMEOUT) as dist_info:
            if config.THROUGHPUT_MODE:
                throughput.measure_throughput(config, dist_info)
            elif config.EVAL_MODE:
                evaluation.evaluate_weights(config, dist_info)
            else:
                interrupted = trainer.train(config, dist_info, allow_config_change)
                return ExitCode.INTERRUPTED if interrupted else None
            return None
    except (MemoryError, RuntimeError, OSError) as error:
        user_error = as_user_error(error, TRAIN_LESS_MEMORY)
        if user_error is None:
            raise
        raise user_error from error


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line `argv` (sys.argv by default) and returns an `ExitCode`."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # file names may contain bytes that are no text
        sys.stdout.reconfigure(errors="backslashreplace")
    logger.set_up(_rank())
    interrupt.log_with(partial(logging.getLogger(__name__).error, extra=logger.FILE_ONLY))
    try:
        config, args = parse_command_line(sys.argv[1:] if argv is None else argv)
        read_launch()  # before the slow imports
        return run(config, args.allow_config_change) or ExitCode.OK
    except UserError as error:
        if _rank() != 0 and not isinstance(error, LostProcess):  # rank 0 may be the lost one
            time.sleep(OTHER_RANKS_DELAY_SECONDS)
        print(f"error{'' if _rank() == 0 else f' (rank {_rank()})'}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        if _rank() == 0 and interrupt.claim_report():
            print("interrupted", file=sys.stderr)
        return ExitCode.INTERRUPTED


def _rank() -> int:
    """Returns the rank of this process, 0 where RANK is no number: `read_launch` refuses it later."""
    rank = os.environ.get("RANK", "")
    return int(rank) if rank.isdecimal() else 0


def _refuse_argument(unknown: Sequence[str], parser: argparse.ArgumentParser) -> NoReturn:
    """Raises UserError for the first of the arguments that the parser does not know."""
    name, has_value, value = unknown[0].partition("=")
    if not name.startswith("-"):
        raise UserError(f"{unknown[0]!r} belongs to no flag. Keys are set by --opts KEY VALUE (see --help).")
    following = unknown[1] if len(unknown) > 1 and not unknown[1].startswith("-") else None
    known = [option for option in parser._option_string_actions if option.startswith("--") and option != "--help"]
    guess = nearest(name, known)
    advice = explain_flag(name, value if has_value else following)
    advice = advice or (f"Did you mean {guess}?" if guess else "--help lists all flags.")
    raise UserError(f"there is no flag {name}. {advice}")


if __name__ == "__main__":
    sys.exit(main())
