"""Pre-training as a task: fill in what is hidden."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from greenmim.data.dataset import AugmentedImages, Finish
from greenmim.data.held_out import HeldOutCollate, HeldOutImages
from greenmim.data.images import Source
from greenmim.data.labelled import LabelledCollate, LabelledImages, find_labelled
from greenmim.data.loader import Batch, Collate
from greenmim.data.sources import find_source
from greenmim.evaluation.accuracy import neighbours_accuracy
from greenmim.evaluation.features import extract
from greenmim.evaluation.held_out import held_out_loss
from greenmim.evaluation.sweep import Sweep
from greenmim.flops import forward_flops
from greenmim.guards import UserError, first_line, one_line, user_errors
from greenmim.initial import initialise, sizes_in
from greenmim.masking import draw_visible, num_visible_units
from greenmim.mim import GreenMIM
from greenmim.pictures import Album
from greenmim.planning import Plan
from greenmim.processes import Processes
from greenmim.recipe import Recipe
from greenmim.training.passes import decay_groups, reconstruction_loss, whole_weights
from greenmim.training.task import Aside, Finishes, Task, Watch, started_from
from greenmim_kernels import use_backend

# Labelled images that are classified while a run is watched: their features, and the comparison of
# all with all, are to take seconds on a GPU.
WATCHED = 50_000
# That vote.
NEIGHBOURS = 20


class Pretraining(Task):
    """Pre-training of a GreenMIM."""

    command = "pretrain"
    recipe: Recipe
    model: GreenMIM

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        self.held_out: Sweep | None = None
        self.probe: Sweep | None = None
        self.album: Album | None = None
        self.drawing = True

    def find(self) -> dict[str, Source]:
        data = self.recipe.data
        found = {"data.root": find_source(data)}
        if data.val_root:
            found["data.val_root"] = find_source(data, "data.val_root")
        if data.probe_root:
            found["data.probe_root"] = find_labelled(data, "data.probe_root")
        return found

    def build(self, found: dict[str, Source], state: dict[str, Any] | None) -> list[str]:
        recipe = self.recipe
        sizes: dict[str, Any] = {}
        if not state:
            with contextlib.suppress(ValueError, OSError):  # `initialise` tells what is wrong
                sizes = sizes_in(recipe.init)
        config = started_from(recipe.model, recipe.init, sizes, state)
        self.recipe = recipe = dataclasses.replace(recipe, model=config)
        size = config.image_hw
        self.dataset = AugmentedImages(found["data.root"], recipe.data, size, recipe.seed)
        notes = self.dataset.check_readable()
        torch.manual_seed(recipe.seed)
        with user_errors():
            self.model = GreenMIM(recipe.model)
        return notes

    def facts(self, found: dict[str, Source]) -> list[str]:
        units = self.model.config.num_units
        visible = num_visible_units(units, self.recipe.mask.ratio)
        dense = forward_flops(self.model, self.model.plan(np.ones(units, dtype=bool)))
        share = f"{100 * self.flops() / dense:.0f}% of the {dense / 1e9:.2f} GFLOPs"
        lines = [f"visible          {visible} of {units} units of an image; {share} of all units"]
        for option, title in (("data.val_root", "held out"), ("data.probe_root", "labelled")):
            if option in found:
                lines.append(f"{title:<16} {len(found[option])} in {found[option].root}")
        return lines

    def flops(self) -> float:
        mask, config = self.recipe.mask, self.recipe.model
        rng = np.random.default_rng(0)
        visible = draw_visible(rng, config.unit_grid, mask.ratio, kind=mask.kind)
        # On a CPU, whatever backend is forced; stochastic depth draws.
        with use_backend("auto"), torch.random.fork_rng([]):
            return forward_flops(self.model, self.model.plan(visible), loss_only=True)

    def initialise(self, checkpoint: str) -> list[str]:
        try:
            return initialise(self.model, checkpoint)
        except (ValueError, OSError) as error:
            raise UserError(f"--init {checkpoint}: {first_line(error)}.") from error

    def parameter_groups(self) -> list[dict[str, Any]]:
        return decay_groups(self.model)

    def collate(self, finish: Finish | None) -> Collate:
        return Collate(self.model.planner, self.recipe.mask, self.recipe.seed, finish)

    def make_sweeps(
        self, found: dict[str, Source], finishes: Finishes, processes: Processes
    ) -> list[str]:
        recipe, planner, notes = self.recipe, self.model.planner, []
        data, image_hw = recipe.data, recipe.model.image_hw
        in_loader, on_device = finishes
        if source := found.get("data.val_root"):
            with processes.agreed():
                images = HeldOutImages(source, data, image_hw, recipe.seed)
                notes += images.check_readable()
            masks = HeldOutCollate(planner, recipe.mask, recipe.seed, in_loader)
            self.held_out = Sweep(
                images, masks, data.batch_size, data.workers, on_device, processes
            )
        if source := found.get("data.probe_root"):
            labelled = LabelledImages(source, data, image_hw, most=WATCHED)
            whole = LabelledCollate(planner, in_loader)
            self.probe = Sweep(labelled, whole, data.batch_size, data.workers, on_device, processes)
            notes += source.notes()
            if len(source) > WATCHED:
                notes.append(
                    f"of {len(source)} images in {data.probe_root} {WATCHED} are classified"
                )
        self.sweeps = [sweep for sweep in (self.held_out, self.probe) if sweep]
        return notes

    def inputs(self, batch: Batch, step: int, micro_batch: int) -> tuple[Tensor, Plan]:
        return batch.images, batch.plan

    def loss(self, wrapped_model: nn.Module, images: Tensor, plan: Plan) -> Tensor:
        return reconstruction_loss(wrapped_model, images, plan)

    def asides(self, watch: Watch) -> list[Aside]:
        self.watch = watch
        every = self.recipe.log
        asides = [
            (every.val_every_epochs, self.measure_held_out) if self.held_out else None,
            (every.probe_every_epochs, self.measure_neighbours) if self.probe else None,
            (every.pictures_every_epochs, self.draw) if every.pictures_every_epochs else None,
        ]
        return [aside for aside in asides if aside]

    def measure_held_out(self, step: int) -> bool:
        """Log the loss on held-out images. A collective."""
        watch = self.watch
        assert self.held_out is not None
        found = held_out_loss(self.held_out, self.model, watch.autocast, watch.stop)
        if found is None:
            return False
        for failures in watch.processes.gather(found.failures):
            watch.log.unreadable(failures)
        text = f"held-out loss {found.loss:.4f} ({found.images} images)"
        watch.measured("val", step, {"loss": found.loss}, text, images=found.images)
        return True

    def measure_neighbours(self, step: int) -> bool:
        """Log how well labelled images are told by their neighbours. A collective."""
        watch = self.watch
        assert self.probe is not None
        found = extract(self.probe, self.model, watch.autocast, watch.stop)
        if found is None:
            return False
        watch.log.unreadable(found.failures, "it is left out")
        if not watch.processes.world.is_main:
            return True
        if len(found.labels) < 2:
            watch.log.say("nearest neighbours were not measured: fewer than two images can be read")
            return True
        try:
            k = min(NEIGHBOURS, len(found.labels) - 1)
            accuracy = neighbours_accuracy(found, k, watch.processes.device)
        except Exception as error:  # a full GPU: it ends no run
            watch.log.say(f"nearest neighbours were not measured: {one_line(error)}")
            return True
        shares, images = {"top1": accuracy.top1, "top5": accuracy.top5}, len(found.labels)
        text = f"{k} nearest neighbours {accuracy.words()} ({images} images)"
        watch.measured("knn", step, shares, text, images=images, k=k)
        return True

    def draw(self, step: int) -> bool:
        """Show how well the model fills in hidden units. A collective; it ends no run."""
        recipe, processes, network = self.recipe, self.watch.processes, self.model
        sliced = recipe.strategy == "fsdp" and not processes.alone
        # Only slices are brought together here. A model of its own, not compiled, is drawn with
        # where they are: nothing that fails there keeps the other processes waiting.
        weights = whole_weights(network, keep=processes.world.is_main) if sliced else None
        if self.drawing and processes.world.is_main:
            try:
                if weights:
                    network = GreenMIM(recipe.model)
                    network.load_state_dict(weights)
                    network.to(processes.device)
                if self.album is None:
                    self.album = Album(self.dataset, recipe.log.pictures, recipe.mask)
                with self.watch.autocast():
                    picture = self.album.draw(network)
                if picture is not None:
                    self.watch.log.picture(step, "original, masked, reconstruction", picture)
            except Exception as error:  # a full GPU, a disk that is gone: pictures are not the run
                self.drawing = False
                self.watch.log.say(f"no more pictures are drawn, for one failed: {one_line(error)}")
        return True
