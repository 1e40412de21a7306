"""What a checkpoint must hold for a run to continue from it; who made the file may have been anybody.

`docs/FORMATS.md` says what the entries mean.
"""

from types import NoneType

import torch

from utils.errors import UserError

FORMAT = 1

_NUMBER = (int, float)
_ENTRIES: dict[str, tuple[type, ...]] = {
    "model": (dict,), "optimizer": (dict,), "optimizer_name": (str,), "scaler": (dict,), "ema": (dict, NoneType),
    "state": (dict,), "class_names": (list, NoneType), "config": (str,),
}  # fmt: skip
_STATE: dict[str, tuple[type, ...]] = {
    "samples": (int,), "best": _NUMBER, "skipped": _NUMBER, "skipped_in_a_row": _NUMBER, "epoch_sums": (dict,),
}  # fmt: skip
_STREAM: dict[str, tuple[type, ...]] = {"images": (int,), "fingerprint": (str,), "global_batch": (int,)}


def validate_checkpoint(contents: dict, source: str) -> None:
    """Checks that the checkpoint `source` has all entries of a run, of their kinds.

    Raises:
        UserError: it holds weights alone, is of a later version, or an entry is missing or something else.
    """
    if "state" not in contents or "optimizer" not in contents:
        raise UserError(f"{source}: holds weights, but no run to continue. Start a new run from them with --pretrained")
    if contents.get("format") != FORMAT:
        raise UserError(
            f"{source}: is of format {contents.get('format')!r}, and this version reads {FORMAT}. Continue with the "
            "version that wrote it, or start a new run from its weights with --pretrained"
        )
    wrong = [*_wrong(contents, _ENTRIES, ""), *_wrong(contents.get("state"), _STATE, "state.")]
    if "stream" in contents:
        wrong += _wrong(contents["stream"], _STREAM, "stream.")
    if not wrong:
        wrong = [*_wrong_state(contents), *_wrong_weights(contents), *_wrong_optimizer(contents["optimizer"])]
    if wrong:
        raise UserError(
            f"{source}: holds no run that can be continued ({', '.join(wrong[:5])} missing or of another kind). Take "
            "another checkpoint of this run, or start a new run from its weights with --pretrained"
        )
    class_names_in(contents, source)


def class_names_in(contents: dict, source: str) -> list[str] | None:
    """The names of the classes that the weights in `contents` tell apart, by label; None where it does not say.

    Raises:
        UserError: they are something else than names.
    """
    names = contents.get("class_names")
    if names is None or isinstance(names, list) and all(isinstance(name, str) for name in names):
        return names
    raise UserError(f"{source}: its class_names are no list of names. Take another copy, or one without that entry")


def _wrong(values: object, kinds: dict[str, tuple[type, ...]], where: str) -> list[str]:
    if not isinstance(values, dict):
        return []
    return [
        where + key for key, wanted in kinds.items()
        if key not in values or not isinstance(values[key], wanted) or isinstance(values[key], bool)
    ]  # fmt: skip


def _wrong_state(contents: dict) -> list[str]:
    state, stream = contents["state"], contents.get("stream", {"images": 1, "global_batch": 1})
    wrong = [f"state.{key}" for key in state if key not in _STATE]
    wrong += ["state.samples"] if not 0 <= state["samples"] < 2**62 else []
    wrong += [f"state.epoch_sums.{k}" for k, value in state["epoch_sums"].items() if not isinstance(value, _NUMBER)]
    wrong += [f"state.{key}" for key in ("skipped", "skipped_in_a_row") if not 0 <= state[key] < 2**62]
    return wrong + [f"stream.{key}" for key in ("images", "global_batch") if not 0 < stream[key] < 2**62]


def _wrong_weights(contents: dict) -> list[str]:
    return [
        f"{part}.{name}" for part in ("model", "ema") for name, value in (contents[part] or {}).items()
        if not isinstance(name, str) or not isinstance(value, torch.Tensor)
    ]  # fmt: skip


def _is_group(group: object) -> bool:
    return isinstance(group, dict) and isinstance(group.get("names"), list) and isinstance(group.get("lr"), _NUMBER)


def _wrong_optimizer(optimizer: dict) -> list[str]:
    groups, states = optimizer.get("param_groups"), optimizer.get("state")
    if not isinstance(groups, list) or not all(_is_group(group) for group in groups):
        return ["optimizer.param_groups"]
    if not isinstance(states, dict) or not all(isinstance(moments, dict) for moments in states.values()):
        return ["optimizer.state"]
    return [
        f"optimizer.state.{number}.{name}" for number, moments in states.items() for name, value in moments.items()
        if not isinstance(number, int) or not isinstance(value, torch.Tensor) or not value.is_floating_point()
        or moments.keys() != next(iter(states.values())).keys()
    ]  # fmt: skip
