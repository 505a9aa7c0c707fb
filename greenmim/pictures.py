"""Original, masked and reconstructed images side by side: what a model makes of hidden units."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from greenmim.config import UNIT_PIXELS
from greenmim.data.dataset import AugmentedImages, normalise
from greenmim.data.decode import open_fitted
from greenmim.masking import draw_visible
from greenmim.mim import GreenMIM
from greenmim.recipe import MaskConfig

HIDDEN_GREY = 0.78
_GAP = 2  # pixels between images


@torch.no_grad()
def reconstruction(
    network: GreenMIM, images: torch.Tensor, visible: np.ndarray, paste_visible: bool
) -> torch.Tensor:
    """Reconstructed images [B, 3, H, W], normalised as the input is.

    Args:
        network: The model, in evaluation mode.
        images: float [B, 3, H, W], on the model's device.
        visible: bool [B, L], True = visible.
        paste_visible: Keep the pixels of visible units; only hidden ones are as predicted.
    """
    patches = network.patchify(images)
    prediction = network(images, visible=visible).prediction.to(patches.dtype)
    if network.config.norm_pix_loss:
        # The model predicts each unit in multiples of its own contrast: put the true one back.
        variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
        prediction = prediction * (variance + 1e-6).sqrt() + mean
    if paste_visible:
        keep = torch.from_numpy(visible).to(images.device).unsqueeze(-1)
        prediction = torch.where(keep, patches, prediction)
    return network.unpatchify(prediction)


def shown(
    network: GreenMIM,
    images: torch.Tensor,
    visible: np.ndarray,
    mean: Sequence[float],
    std: Sequence[float],
    paste_visible: bool = True,
) -> list[torch.Tensor]:
    """Original, masked and reconstructed images, each float [B, 3, H, W] in 0 to 1, on the CPU.

    Hidden units are grey in the second.

    Args:
        network, images, visible, paste_visible: As for `reconstruction`.
        mean, std: Per channel, what the images were normalised with.
    """
    scale, shift = torch.tensor(std).view(3, 1, 1), torch.tensor(mean).view(3, 1, 1)
    found = [images, images, reconstruction(network, images, visible, paste_visible)]
    found = [(column.float().cpu() * scale + shift).clamp(0, 1) for column in found]
    hidden = spread(torch.from_numpy(~visible), *images.shape[2:])
    found[1] = torch.where(hidden, torch.tensor(HIDDEN_GREY), found[1])
    return found


def spread(units: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """bool [B, L] of units to bool [B, 1, H, W] of pixels."""
    grid = units.view(-1, 1, height // UNIT_PIXELS, width // UNIT_PIXELS)
    return grid.repeat_interleave(UNIT_PIXELS, dim=2).repeat_interleave(UNIT_PIXELS, dim=3)


def page(rows: list[torch.Tensor]) -> np.ndarray:
    """One row of images for each tensor [B, 3, H, W] in 0 to 1, as uint8 [H', W', 3]."""
    padded = [torch.nn.functional.pad(row, (_GAP, 0, _GAP, 0), value=1.0) for row in rows]
    joined = torch.cat([torch.cat(list(row), dim=2) for row in padded], dim=1)
    joined = torch.nn.functional.pad(joined, (0, _GAP, 0, _GAP), value=1.0)
    return (joined.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()


class Album:
    """A few images of a data set, drawn again and again while a model learns.

    Args:
        dataset: Where they come from (see `Source.some`); unreadable ones are left out.
        count: Number of images.
        mask: Kind and ratio of the masks, one per image, the same each time.
    """

    def __init__(self, dataset: AugmentedImages, count: int, mask: MaskConfig) -> None:
        self.mean, self.std = dataset.mean, dataset.std
        found, image_size = [], dataset.image_size
        for index in dataset.source.some(count):
            try:
                image = open_fitted(dataset.source.open(index), image_size)
            except Exception:  # decoders raise anything; the loader names the file
                continue
            found.append(normalise(image, self.mean, self.std))
        self.images = torch.stack(found) if found else torch.empty(0, 3, *image_size)
        grid = image_size[0] // UNIT_PIXELS, image_size[1] // UNIT_PIXELS
        self.visible = draw_visible(
            np.random.default_rng(0), grid, mask.ratio, len(found), mask.kind
        )

    def draw(self, network: GreenMIM) -> np.ndarray | None:
        """Rows of originals, masked and reconstructed, uint8 [H', W', 3]; None without images."""
        if not len(self.images):
            return None
        images = self.images.to(network.decoder_embed.weight.device)
        learning = network.training
        network.eval()
        try:
            return page(shown(network, images, self.visible, self.mean, self.std))
        finally:
            network.train(learning)
