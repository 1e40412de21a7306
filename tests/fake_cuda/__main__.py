"""Runs a command on the stand-in CUDA runtime: python -m tests.fake_cuda python main.py --cfg configs/demo.yaml ..."""

import os
import sys

from tests.fake_cuda.build import CannotBuild, build, environment


def main(command: list[str]) -> None:
    if not command:
        sys.exit(__doc__)
    try:
        folder = build()
    except CannotBuild as error:
        sys.exit(f"error: the stand-in CUDA runtime cannot be built: {error}")
    os.execvpe(command[0], command, environment(folder))


if __name__ == "__main__":
    main(sys.argv[1:])
