"""Checks that a checkpoint holds everything a run needs to continue. Checkpoints are untrusted input.

`docs/FORMATS.md` describes the entries.
"""

from types import NoneType

import torch

from utils.checkpoint.weights import KINDS
from utils.errors import UserError

FORMAT = 1

_NUMBER = (int, float)
_ENTRIES: dict[str, tuple[type, ...]] = {
    "model": (dict,), "optimizer": (dict,), "optimizer_name": (str,), "scaler": (dict,), "ema": (dict, NoneType),
    "state": (dict,), "class_names": (list, NoneType), "config": (str,),
}  # fmt: skip
_STATE: dict[str, tuple[type, ...]] = {
    "images_seen": (int,), "best_metric": (*_NUMBER, NoneType), "best_loss": (*_NUMBER, NoneType),
    "skipped": _NUMBER, "skipped_in_a_row": _NUMBER, "epoch_sums": (dict,),
}  # fmt: skip
_BETTER_WEIGHTS = (None, *KINDS)  # `state.better_weights`, which earlier checkpoints lack
_TRAIN_DATA: dict[str, tuple[type, ...]] = {"num_images": (int,), "dataset_digest": (str,), "global_batch_size": (int,)}
_COUNT_LIMIT = 2**62  # counters above this would overflow a 64-bit integer in arithmetic


def validate_checkpoint(contents: dict, source: str) -> None:
    """Checks that the checkpoint `source` has all entries of a run, with the right types.

    Raises:
        UserError: it holds only weights, has a newer format, or an entry is missing or invalid.
    """
    if "state" not in contents or "optimizer" not in contents:
        raise UserError(f"{source}: holds weights, but no run to continue. Start a new run from them with --pretrained")
    if contents.get("format") != FORMAT:
        raise UserError(
            f"{source}: has format {contents.get('format')!r}, but this version reads format {FORMAT}. Continue with "
            "the version that wrote it, or start a new run from its weights with --pretrained"
        )
    invalid = [*_invalid_types(contents, _ENTRIES, ""), *_invalid_types(contents["state"], _STATE, "state.")]
    if "train_data" in contents:
        invalid += _invalid_types(contents["train_data"], _TRAIN_DATA, "train_data.")
    if not invalid:
        invalid = [*_invalid_state(contents), *_invalid_weights(contents), *_invalid_optimizer(contents["optimizer"])]
    if invalid:
        raise UserError(
            f"{source}: cannot be continued from ({', '.join(invalid[:5])} missing or invalid). Use another checkpoint "
            "of this run, or start a new run from its weights with --pretrained"
        )
    class_names_in(contents, source)


def class_names_in(contents: dict, source: str) -> list[str] | None:
    """Returns the class names of a checkpoint, by label; None where it has none.

    Raises:
        UserError: the entry is not a list of names.
    """
    names = contents.get("class_names")
    if names is None or isinstance(names, list) and all(isinstance(name, str) for name in names):
        return names
    raise UserError(f"{source}: its class_names are no list of names. Use another copy, or one without that entry")


def _invalid_types(values: object, types: dict[str, tuple[type, ...]], prefix: str) -> list[str]:
    """The keys of `types` that are missing in `values` or have another type. A bool is not a number here."""
    if not isinstance(values, dict):
        return [prefix.rstrip(".")]
    return [
        prefix + key for key, wanted in types.items()
        if key not in values or not isinstance(values[key], wanted) or isinstance(values[key], bool)
    ]  # fmt: skip


def _invalid_state(contents: dict) -> list[str]:
    state, data = contents["state"], contents.get("train_data", {"num_images": 1, "global_batch_size": 1})
    invalid = [f"state.{key}" for key in state if key not in (*_STATE, "better_weights")]
    if state.get("better_weights") not in _BETTER_WEIGHTS:
        invalid.append("state.better_weights")
    invalid += [f"state.{key}" for key in ("images_seen", "skipped", "skipped_in_a_row") if not _is_count(state[key])]
    invalid += [f"state.epoch_sums.{k}" for k, value in state["epoch_sums"].items() if not isinstance(value, _NUMBER)]
    positive = ("num_images", "global_batch_size")
    return invalid + [f"train_data.{key}" for key in positive if not (data[key] and _is_count(data[key]))]


def _is_count(value: float) -> bool:
    return 0 <= value < _COUNT_LIMIT


def _invalid_weights(contents: dict) -> list[str]:
    return [
        f"{part}.{name}" for part in ("model", "ema") for name, value in (contents[part] or {}).items()
        if not isinstance(name, str) or not isinstance(value, torch.Tensor)
    ]  # fmt: skip


def _invalid_optimizer(optimizer: dict) -> list[str]:
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


def _is_group(group: object) -> bool:
    return isinstance(group, dict) and isinstance(group.get("names"), list) and isinstance(group.get("lr"), _NUMBER)
