"""Images with their classes: the middle of each, whole, to measure; augmented ones, to learn."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from timm.data import auto_augment
from torchvision.transforms.v2 import functional as F

from greenmim.data.dataset import AugmentedImages, Crop, Finish, NotWanted, Sample
from greenmim.data.held_out import HeldOutImages
from greenmim.data.images import Folder, Selected, Source, hopeless, patiently
from greenmim.data.loader import Collate, copied_shared
from greenmim.data.sampler import AUGMENT, STAND_IN, Item, torch_seed
from greenmim.data.sources import Tars, find_source
from greenmim.finetune_recipe import LabelledImagesConfig
from greenmim.guards import UserError, one_line
from greenmim.messages import dashes, listed
from greenmim.planning import Plan, Planner
from greenmim.recipe import ImagesConfig, MaskConfig

# Side of the centre crop, as a share of the largest one: 224 of 256 pixels.
CROP = 0.875
# The label of an image that cannot be read; of one without a class it is None.
UNREADABLE = ""
# Images whose classes are looked at, to find out whether there are any.
_LOOKED_AT = 20
# Random draws for an image of a learned class, before all are tried in order.
_DRAWN = 1000


def find_labelled(config: ImagesConfig, option: str, least: int = 2) -> Source:
    """What an option of a recipe's `data` names, with classes.

    Raises:
        UserError: as `find_source`; or the first images have no class, or there are fewer than
            `least` classes, where that is known.
    """
    name = dashes(option)
    try:
        source = find_source(config, option)
    except UserError as error:  # --data.num-samples is of a run's data.root only
        text = str(error).replace("pass --data.num-samples", "put their info file beside them")
        raise UserError(text) from error
    labels: set[str | None] = set()
    problem = None
    for index in source.some(_LOOKED_AT):
        try:
            labels.add(source.label(index))
        except Exception as error:  # a shard that cannot be opened, say
            problem = problem or error
    if labels == set() and problem:
        raise UserError(f"{name} {source.root}: {one_line(problem)}.") from problem
    classes = {label for label in labels if label is not None}
    if len(classes) < 2 and isinstance(source, (Folder, Tars)):
        classes = set(source.classes() or ())
    how = (
        "each class needs a folder of its own (or a .cls beside each image of a shard, or a column"
        " of classes)"
    )
    if not classes:
        raise UserError(f"{name} {source.root}: its images have no classes; {how}.")
    if len(classes) < least and isinstance(source, (Folder, Tars)):
        raise UserError(f"{name} {source.root}: all its images are of one class, {classes.pop()};"
                        f" {how}.")  # fmt: skip
    return source


class LabelledImages(HeldOutImages):
    """A source's images and labels without augmentation, looked up by `Item`.

    An image that cannot be read is blank and labelled UNREADABLE: a replacement would count twice.

    Args:
        source, config, image_size: As for `AugmentedImages`.
        crop: Side of the centre crop, as a share of the largest one.
        most: At most this many images, evenly spaced; None takes all.
    """

    def __init__(
        self,
        source: Source,
        config: ImagesConfig,
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

    def check_readable(self) -> list[str]:
        """As for `AugmentedImages`, but a few images are tried."""
        reasons = []
        for index in self.source.some(_LOOKED_AT):
            try:
                self.read(index)
            except Exception as error:  # decoders raise anything on a broken file
                reasons.append(f"{self.source.path(index)} ({one_line(error)})")
            else:
                return self.source.notes()
        raise UserError(f"No image can be read: {len(reasons)} under {self.source.root} failed; the"
                        f" first is {reasons[0]}.")  # fmt: skip

    def read(self, index: int) -> Sample:
        """An image by its index in the source; raises anything where it cannot be read."""
        return self._read(index, Item(0, 0, 0, 0))

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
    """Stacks images and labels, with everything visible."""

    def __init__(self, planner: Planner, finish: Finish | None) -> None:
        super().__init__(planner, MaskConfig(), 0, finish)
        height, width = planner.unit_grid
        self.whole = planner(np.ones(height * width, dtype=bool))

    def _plan(self, items: list[Item]) -> Plan:
        return Plan(copied_shared(self.whole.memory), self.whole.layout)


# ---- to learn from ------------------------------------------------------------------------------


def find_classes(source: Source, file: str | None, option: str = "data.classes") -> list[str]:
    """The classes in the order of a classifier's scores: from a file, or of the images.

    Args:
        source: The images.
        file: The file that the option names, or None.
        option: The option's name, for messages.

    Raises:
        UserError: the file is missing or has too few classes; or the images' are not known.
    """
    if file is None:
        if (found := source.classes()) is None:
            raise UserError(
                f"--{option} is missing: {source.root} does not list its classes; write a file with"
                " one class per line."
            )
        return found
    try:  # Windows begins such files with a mark; names of folders need not be UTF-8
        text = Path(file).read_text(encoding="utf-8-sig", errors="surrogateescape")
    except OSError as error:
        raise UserError(f"--{option} {file} cannot be read: {one_line(error)}.") from error
    found = [line for line in text.split("\n") if line.strip()]
    if len(found) < 2 or len(set(found)) < len(found):
        twice = next((name for name, count in Counter(found).items() if count > 1), None)
        what = f"names {twice} twice" if twice else "names fewer than two classes"
        raise UserError(f"--{option} {file} {what}; it has to have one class in each line.")
    return found


def of_classes(source: Source, classes: Collection[str]) -> tuple[Source, list[str]]:
    """The images of a source that are of some classes, where labels are known without reading.

    Returns:
        Their source; notes on the others, and on classes without an image.

    Raises:
        UserError: there is none.
    """
    if (labels := source.labels()) is None:
        return source, []
    names = set(classes)
    taken = np.array([n for n, label in enumerate(labels) if label in names], dtype=np.int64)
    there = {label for label in labels if label is not None}
    if not len(taken):
        raise UserError(
            f"No image in {source.root} is of a class that is learned"
            f" ({some_of(names)}), they are of {some_of(there)}; use a folder with folders of"
            " these names, or fix --data.classes."
        )
    missing = [name for name in classes if name not in there]
    notes = [f"{source.root} has no image of {some_of(missing)}"] if missing else []
    if len(taken) == len(labels):
        return source, notes
    without = labels.count(None)
    others = Counter(label for label in labels if label is not None and label not in names)
    parts = [f"{without} images without a class"] if without else []
    if others:
        parts.append(f"{others.total()} of classes that are not learned ({some_of(others)})")
    left_out = f"left out of {source.root}: {listed(parts)}"
    return Selected(source, taken, left_out), notes


def some_of(names: Collection[str]) -> str:
    """The first five names in their alphabetical order, for people."""
    return f"{listed(sorted(names)[:5])}{' ...' * (len(names) > 5)}"


def _posterize(picture: Image.Image, bits: int, **options: object) -> Image.Image:
    """timm's, which keeps no bit at the greatest magnitude; Pillow 13 refuses that."""
    return auto_augment.posterize(picture, max(bits, 1), **options)


class TrainingImages(AugmentedImages):
    """Augmented images with their classes.

    Where labels are unknown before reading, an image of a class that is not learned is replaced by
    another one, drawn at random.

    Args:
        source, config, image_size, seed: As for `AugmentedImages`.
        classes: The classes that are learned.
    """

    config: LabelledImagesConfig

    def __init__(
        self,
        source: Source,
        config: LabelledImagesConfig,
        image_size: tuple[int, int],
        seed: int,
        classes: Collection[str],
    ) -> None:
        super().__init__(source, config, image_size, seed)
        self.classes, self.change = frozenset(classes), None
        if config.rand_augment:
            hints = {  # as timm's own loader gives them
                "translate_const": int(min(image_size) * 0.45),
                "img_mean": tuple(min(255, round(255 * part)) for part in config.mean),
                "interpolation": Image.Resampling.BICUBIC,
            }
            self.change = auto_augment.rand_augment_transform(config.rand_augment, hints)
            for operation in self.change.ops:
                if operation.aug_fn is auto_augment.posterize:
                    operation.aug_fn = _posterize

    def check_readable(self) -> list[str]:
        notes = super().check_readable()
        if not self.source.knows_labels:
            notes.append(
                f"{self.source.root} does not tell classes before images are read: images of"
                " classes that are not learned are replaced by others"
            )
        return notes

    def _candidates(self, item: Item) -> Iterator[int]:
        if self.source.knows_labels:  # `of_classes` has left images of these classes only
            yield from super()._candidates(item)
            return
        index = self._index(item)
        if self._is_learned(index):
            yield index
        # Not the next learned one: after a run of others the same image would come again and again.
        rng = random.Random(torch_seed(self.seed, STAND_IN, item.epoch, item.position))
        drawn = (rng.randrange(len(self)) for _ in range(_DRAWN))
        for position in itertools.chain(drawn, range(len(self))):
            if self._is_learned(other := self.source.at(position, item.epoch)):
                yield other

    def _is_learned(self, index: int) -> bool:
        """True also where the label cannot be read: reading the image then says why."""
        try:
            return patiently(lambda: self.source.label(index)) in self.classes
        except Exception:  # whatever reading an image may raise
            return True

    def none_to_read(self) -> str:
        return (
            f"No image in {self.source.root} is of a class that is learned"
            f" ({some_of(self.classes)})."
        )

    def _read(self, index: int, item: Item) -> Sample:
        label = self.source.label(index)
        if label not in self.classes:  # `_is_learned` could not read it, now it can be read
            raise NotWanted
        sample = super()._read(index, item)
        if self.change is not None:
            # timm draws from the global generators of Python and NumPy.
            seed = torch_seed(self.seed, AUGMENT, item.epoch, item.position)
            random.seed(seed)
            np.random.seed(seed % 2**32)
            changed = self.change(F.to_pil_image(sample.image))
            sample = sample._replace(image=F.pil_to_tensor(changed))
        return sample._replace(label=label)
