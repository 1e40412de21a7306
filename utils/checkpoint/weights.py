"""The state dicts in a weight file: the weights of the model and, where training keeps one, their moving average."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from utils.errors import UserError

KINDS = ("model", "ema")  # the weights as trained, and their average

# Names of the entries that hold a state dict, the first found counts: of this project and the original code, then of
# other training programs.
_ENTRIES = {
    "model": ("model", "state_dict", "model_state_dict", "net", "weights", "params"),
    "ema": (
        "ema", "model_ema", "state_dict_ema", "ema_state_dict", "model_ema_state_dict", "ema_model", "net_ema",
        "params_ema", "weights_ema",
    ),
}  # fmt: skip
WEIGHT_ENTRIES = tuple(name for names in _ENTRIES.values() for name in names)
_WAY_OUT = {
    "ema": "Leave out --ema (MODEL.PRETRAINED_EMA)",
    "model": "Take the averaged ones: --ema (MODEL.PRETRAINED_EMA)",
}
_COUNTER = "n_averaged"  # of torch.optim.swa_utils.AveragedModel, beside the averaged weights


@dataclass(frozen=True)
class Weights:
    """One state dict of a weight file.

    Attributes:
        state_dict: name to tensor.
        kind: "ema" for a moving average, otherwise "model".
        note: for the log: the contents of the file and why this was taken; "" if it contains nothing else.
    """

    state_dict: dict[str, torch.Tensor]
    kind: str
    note: str = ""


def kinds_in(contents: Mapping[str, object]) -> list[str]:
    """Returns which of `KINDS` a weight file holds."""
    return list(_find(contents))


def extract_weights(contents: dict, source: str, choice: str = "auto") -> Weights:
    """Returns the weights of a file: alone, or in one of the entries that training programs use.

    Args:
        choice: "model", "ema", or "auto": the better of both where the file says which one that was, otherwise the
            model's if there are any.

    Raises:
        UserError: there are none, or none of the kind in `choice`, or they contain values that are not finite.
    """
    found = _find(contents)
    if not found:
        entries = ", ".join(str(key)[:80] for key in list(contents)[:8])
        raise UserError(f"{source}: no weights found; its entries are {entries}. Give a file that holds some")
    if choice != "auto" and choice not in found:
        raise UserError(f"{source}: holds no {_describe(choice)}, only {_describe(*found)}. {_WAY_OUT[choice]}")
    better = _better_kind(contents)
    if choice != "auto":
        kind = choice
    else:
        kind = better if better in found else next(iter(found))
    entry = found[kind]
    values = contents if entry is None else contents[entry]
    weights = {str(name): value for name, value in values.items() if isinstance(value, torch.Tensor)}
    if kind == "ema":
        weights.pop(_COUNTER, None)
    _require_finite(weights, source)
    return Weights(weights, kind, _note(found, kind, choice, better))


def _find(contents: Mapping[str, object]) -> dict[str, str | None]:
    """The kinds of weights in a file to the entries that hold them; None if that is the whole file."""
    found: dict[str, str | None] = {}
    for kind, names in _ENTRIES.items():
        entry = next((name for name in names if _holds_weights(contents.get(name))), None)
        if entry is not None:
            found[kind] = entry
    if not found and _holds_weights(contents):
        found["model"] = None
    return found


def _holds_weights(value: object) -> bool:
    return isinstance(value, Mapping) and any(isinstance(each, torch.Tensor) for each in value.values())


def _better_kind(contents: Mapping[str, object]) -> str | None:
    """Which kind was better at the last evaluation, in a checkpoint of this project."""
    state = contents.get("state")
    better = state.get("better_weights") if isinstance(state, Mapping) else None
    return better if isinstance(better, str) else None


def _describe(*kinds: str) -> str:
    texts = {"model": "weights as trained", "ema": "averaged weights (EMA)"}
    return " and ".join(texts[kind] for kind in kinds)


def _note(found: dict[str, str | None], kind: str, choice: str, better: str | None) -> str:
    if list(found) == ["model"]:
        return ""
    held = ", ".join(f"{_describe(each)} under {entry!r}" for each, entry in found.items())
    if len(found) == 1:
        return f"holds only {held}"
    if choice != "auto":
        reason = "as asked"
    elif better in found:
        reason = "the better ones at the last evaluation, as the file says"
    else:
        reason = "the file does not say which are better; --ema takes the averaged ones"
    return f"holds {held}: takes the {_describe(kind)} ({reason})"


def _require_finite(weights: dict[str, torch.Tensor], source: str) -> None:
    broken = [name for name, value in weights.items() if value.is_floating_point() and not value.isfinite().all()]
    if broken:
        more = f" and {len(broken) - 1} more" if broken[1:] else ""
        raise UserError(f"{source}: {broken[0]}{more}: not all values are finite. Use another copy, or an earlier one")
