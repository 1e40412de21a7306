"""The type of a model that can be trained: what the optimizer and FSDP ask of it, besides `forward`."""

from collections.abc import Callable, Iterable, Set

from torch import nn


class TrainableModel(nn.Module):
    """A model of this project defines these as methods; a model of timm has them set on the instance.

    Attributes:
        no_weight_decay: returns parts of names: parameters whose names contain one of them do not decay.
        num_layer_ids: number of values of `get_layer_id`.
        get_layer_id: returns the depth of a parameter, by its name: 0 for the embedding of the patches,
            `num_layer_ids - 1` for the head.
        blocks: returns the modules that FSDP shards one by one, from the input to the output.
    """

    no_weight_decay: Callable[[], Set[str]]
    num_layer_ids: int
    get_layer_id: Callable[[str], int]
    blocks: Callable[[], Iterable[nn.Module]]
