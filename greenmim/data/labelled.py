"""Images with their classes: the middle of each, whole, for what is measured on features."""

from __future__ import annotations

import numpy as np
import torch

from greenmim.data.dataset import Crop, Finish, Sample
from greenmim.data.held_out import HeldOutImages
from greenmim.data.images import Folder, Source, hopeless, patiently
from greenmim.data.loader import Collate
from greenmim.data.sampler import Item
from greenmim.data.sources import Tars, find_source
from greenmim.guards import UserError, one_line
from greenmim.messages import dashes
from greenmim.planning import Planner
from greenmim.recipe import DataConfig, MaskConfig

# Side of the middle that is taken, as a share of the largest part: 224 of 256 pixels.
CROP = 0.875
# The label of an image that cannot be read; of one without a class it is None.
UNREADABLE = ""
# Images whose classes are looked at, to find out whether there are any.
_LOOKED_AT = 20


def find_labelled(config: DataConfig, option: str) -> Source:
    """What an option of a recipe's `data` names, with classes.

    Raises:
        UserError: as `find_source`; or the first images that were looked at have no class, or
            nobody needs to look to know that all have the same.
    """
    name = dashes(option)
    try:
        source = find_source(config, option)
    except UserError as error:  # of a number that counts images of data.root in a run alone
        text = str(error).replace("pass --data.num-samples", "put their info file beside them")
        raise UserError(text) from error
    labels, problem = set(), None
    for index in source.some(_LOOKED_AT):
        try:
            labels.add(source.label(index))
        except Exception as error:  # a shard that cannot be opened, say
            problem = problem or error
    if labels == set() and problem:
        raise UserError(f"{name} {source.root}: {one_line(problem)}.") from problem
    if len(labels - {None}) < 2 and isinstance(source, (Folder, Tars)):
        for index in range(len(source)):
            labels.add(source.label(index))
            if len(labels - {None}) == 2:
                break
    classes = labels - {None}
    how = (
        "each class needs a folder of its own (or a .cls beside each image of a shard, or a column"
        " of classes)"
    )
    if not classes:
        raise UserError(f"{name} {source.root}: its images have no classes; {how}.")
    if len(classes) == 1 and isinstance(source, (Folder, Tars)):
        raise UserError(f"{name} {source.root}: all its images are of one class, {classes.pop()};"
                        f" {how}.")  # fmt: skip
    return source


class LabelledImages(HeldOutImages):
    """A source's images and labels without augmentation, looked up by `Item`.

    An image that cannot be read is blank and labelled so: none stands in, as it would count twice.

    Args:
        source, config, image_size: As of `AugmentedImages`.
        crop: Side of the middle that is taken, as a share of the largest part of its shape.
        most: So many of them at most, evenly spaced; None takes all.
    """

    def __init__(
        self,
        source: Source,
        config: DataConfig,
        image_size: tuple[int, int],
        crop: float = CROP,
        most: int | None = None,
    ) -> None:
        super().__init__(source, config, image_size, seed=0)
        self.share, self.most = crop, most

    def __len__(self) -> int:
        return len(self.source) if self.most is None else min(len(self.source), self.most)

    def _index(self, item: Item) -> int:
        return self.source.at(item.position * len(self.source) // len(self), 0)

    def crop(self, height: int, width: int, item: Item) -> Crop:
        whole = super().crop(height, width, item)
        high, wide = (max(1, round(side * self.share)) for side in (whole.height, whole.width))
        top, left = whole.top + (whole.height - high) // 2, whole.left + (whole.width - wide) // 2
        return Crop(top, left, high, wide, flip=False)

    def _sample(self, item: Item) -> Sample:
        index = self._index(item)
        try:
            sample = patiently(lambda: self._read(index, item))
            return sample._replace(label=patiently(lambda: self.source.label(index)))
        except Exception as error:  # decoders raise anything on a broken file
            path, stop = self.source.path(index), None
            if why := hopeless(error):
                stop = f"{path} cannot be read, for {why} ({one_line(error)})."
            blank = torch.zeros(3, *self.image_size, dtype=torch.uint8)
            failures = ((path, one_line(error)),)
            return Sample(item, blank, False, failures, stop, label=UNREADABLE)


class LabelledCollate(Collate):
    """Stacks images, with everything visible."""

    def __init__(self, planner: Planner, finish: Finish | None) -> None:
        super().__init__(planner, MaskConfig(), 0, finish)

    def visible(self, items: list[Item]) -> np.ndarray:
        height, width = self.planner.unit_grid
        return np.ones(height * width, dtype=bool)
