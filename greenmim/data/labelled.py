"""Images with their classes: the middle of each, whole, for what is measured on features."""

from __future__ import annotations

import contextlib
import dataclasses

import numpy as np
import torch

from greenmim.data.dataset import Crop, Finish, Sample
from greenmim.data.held_out import HeldOutImages
from greenmim.data.images import Source, hopeless, patiently
from greenmim.data.loader import Collate
from greenmim.data.sampler import Item
from greenmim.data.sources import find_source
from greenmim.guards import UserError, one_line
from greenmim.messages import dashes
from greenmim.planning import Planner
from greenmim.recipe import DataConfig, MaskConfig

# Images whose classes are looked at, to find out whether there are any.
_LOOKED_AT = 20


def find_labelled(config: DataConfig, option: str) -> Source:
    """What an option of a recipe's `data` names, with classes.

    Raises:
        UserError: as `find_source`; or the first images that were looked at have no class.
    """
    source = find_source(config, option)
    for index in source.some(_LOOKED_AT):
        with contextlib.suppress(Exception):  # told when it is read
            if source.label(index) is not None:
                return source
    raise UserError(
        f"{dashes(option)} {source.root}: its images have no classes; each class needs a folder of"
        " its own (or a .cls beside each image of a shard, or a column of classes)."
    )


class LabelledImages(HeldOutImages):
    """A source's images and labels without augmentation, looked up by `Item`.

    An image that cannot be read has no label: none stands in, as it would count twice.

    Args:
        source, config, image_size: As of `AugmentedImages`.
        crop: Side of the part that is taken, as a share of the largest part of its shape.
    """

    def __init__(
        self, source: Source, config: DataConfig, image_size: tuple[int, int], crop: float = 1.0
    ) -> None:
        super().__init__(source, dataclasses.replace(config, repeats=1), image_size, seed=0)
        self.share = crop

    def crop(self, height: int, width: int, item: Item) -> Crop:
        whole = super().crop(height, width, item)
        high, wide = (max(1, round(side * self.share)) for side in (whole.height, whole.width))
        top, left = whole.top + (whole.height - high) // 2, whole.left + (whole.width - wide) // 2
        return Crop(top, left, high, wide, flip=False)

    def _sample(self, item: Item) -> Sample:
        index = self._index(item)
        try:
            sample = patiently(lambda: self._read(index, item))
            label = self.source.label(index)
            return sample._replace(label=label, failures=tuple(self.source.take_damaged()))
        except Exception as error:  # decoders raise anything on a broken file
            path = self.source.path(index)
            stop = None
            if why := hopeless(error):
                stop = f"{path} cannot be read, for {why} ({one_line(error)})."
            blank = torch.zeros(3, *self.image_size, dtype=torch.uint8)
            return Sample(item, blank, False, ((path, one_line(error)),), stop)


class LabelledCollate(Collate):
    """Stacks images with everything visible: one plan serves all batches."""

    def __init__(self, planner: Planner, finish: Finish | None) -> None:
        super().__init__(planner, MaskConfig(), 0, finish)

    def visible(self, items: list[Item]) -> np.ndarray:
        height, width = self.planner.unit_grid
        return np.ones(height * width, dtype=bool)
