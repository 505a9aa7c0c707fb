"""Fine-tuning as a task: an encoder learns to classify labelled images.

Augmentation, mixing, layer decay and the average of the weights are timm's own. All that they draw
follows from the seed and from where in the run it is drawn, as in `data.sampler`.
"""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import numpy as np
import torch
from timm.data.mixup import Mixup, mixup_target
from timm.data.random_erasing import RandomErasing
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from greenmim.classifier import Classifier
from greenmim.data.dataset import Finish
from greenmim.data.images import Source
from greenmim.data.labelled import (
    LabelledCollate,
    LabelledImages,
    TrainingImages,
    find_classes,
    find_labelled,
    of_classes,
)
from greenmim.data.loader import Batch, Collate
from greenmim.data.sampler import MIX, torch_seed
from greenmim.evaluation.accuracy import numbers_of
from greenmim.evaluation.classification import classify
from greenmim.evaluation.sweep import Sweep
from greenmim.finetune_recipe import FinetuneRecipe
from greenmim.flops import forward_flops
from greenmim.guards import UserError, first_line, user_errors
from greenmim.initial import initialise_classifier, sizes_in, with_usual
from greenmim.messages import listed
from greenmim.planning import Plan
from greenmim.processes import Processes
from greenmim.training.passes import classification_loss, distribute, whole_weights
from greenmim.training.task import Aside, Finishes, Task, Watch, started_from
from greenmim_kernels import use_backend


class Finetuning(Task):
    """Fine-tuning of a classifier."""

    command = "finetune"
    recipe: FinetuneRecipe
    model: Classifier

    def __init__(self, recipe: FinetuneRecipe) -> None:
        super().__init__(recipe)
        self.bytes_per_weight = 12 if recipe.ema_decay is None else 16
        self.average: ModelEmaV3 | None = None
        self.classes: dict[str, int] = {}
        self._average_weights: dict[str, Tensor] | None = None  # of the checkpoint

    def find(self) -> dict[str, Any]:
        data = self.recipe.data
        found: dict[str, Any] = {"data.root": find_labelled(data, "data.root")}
        if data.val_root:
            found["data.val_root"] = find_labelled(data, "data.val_root", least=1)
        found["classes"] = find_classes(found["data.root"], data.classes)
        return found

    def build(self, found: dict[str, Any], state: dict[str, Any] | None) -> list[str]:
        recipe = self.recipe
        try:
            sizes = state["recipe"]["model"] if state else sizes_in(recipe.init)
        except (ValueError, OSError) as error:
            raise UserError(f"--init {recipe.init}: {first_line(error)}.") from error
        model = recipe.model.filled(with_usual(sizes))
        for name in ("image_size", "window_size", "num_heads"):
            if sizes and getattr(model, name) is None:
                raise UserError(
                    f"--model.{name.replace('_', '-')} is missing; the weights of --init"
                    f" {recipe.init} do not tell it."
                )
        config = started_from(model.model_config(), recipe.init, sizes, state)
        # As it is saved beside the run: whole, so that it needs no checkpoint to be read again.
        whole = {field.name: getattr(config, field.name) for field in dataclasses.fields(model)}
        model = dataclasses.replace(model, **whole)
        self.recipe = recipe = dataclasses.replace(recipe, model=model)
        names = found["classes"]
        if state and state["classes"] != names:
            raise _other_classes(state["classes"], names)
        self.classes = {name: number for number, name in enumerate(names)}
        if len(names) < 2:
            raise UserError(
                f"--data.root {recipe.data.root} has {len(names)} classes; at least two are needed."
            )
        if "data.val_root" in found:  # all of them are measured with: is any of a class?
            of_classes(found["data.val_root"], names)
        source, notes = of_classes(found["data.root"], names)
        self.dataset = TrainingImages(
            source, recipe.data, config.image_hw, recipe.seed, self.classes,
        )  # fmt: skip
        notes += self.dataset.check_readable()
        torch.manual_seed(recipe.seed)
        with user_errors():
            self.model = Classifier(config, len(names))
        mix = recipe.mix
        mixes = mix.mixup > 0 or mix.cutmix > 0
        self.mixup = None if not mixes else Mixup(
            mix.mixup, mix.cutmix, prob=mix.prob, switch_prob=mix.switch_prob,
            label_smoothing=mix.smoothing, num_classes=len(names),
        )  # fmt: skip
        return notes

    def facts(self, found: dict[str, Any]) -> list[str]:
        lines = [f"classes          {len(self.classes)}"]
        if source := found.get("data.val_root"):
            lines.append(f"held out         {len(source)} in {source.root}")
        return lines

    def flops(self) -> float:
        with use_backend("auto"), torch.random.fork_rng([]):
            return forward_flops(self.model, self.model.plan())

    def initialise(self, checkpoint: str) -> list[str]:
        try:
            return initialise_classifier(self.model, checkpoint)
        except (ValueError, OSError) as error:
            raise UserError(f"--init {checkpoint}: {first_line(error)}.") from error

    def restore(self, state: dict[str, Any]) -> None:
        super().restore(state)
        self._average_weights = state.get("ema")

    def placed(self, processes: Processes) -> None:
        """Copy the model for the average; it is spread over processes as the model is."""
        recipe, weights = self.recipe, self._average_weights
        self._average_weights = None
        if recipe.ema_decay is None:
            return
        self.average = ModelEmaV3(self.model, recipe.ema_decay, use_warmup=True)
        if weights:
            self.average.module.load_state_dict(weights)
        if recipe.strategy == "fsdp" and not processes.alone:
            distribute(self.average.module, recipe, processes.alone)

    def parameter_groups(self) -> list[dict[str, Any]]:
        from timm.optim import param_groups_layer_decay  # much that pre-training does without

        optim = self.recipe.optim
        return param_groups_layer_decay(
            self.model,
            weight_decay=optim.weight_decay,
            no_weight_decay_list=self.model.no_weight_decay(),
            layer_decay=optim.layer_decay,
        )

    def collate(self, finish: Finish | None) -> Collate:
        return LabelledCollate(self.model.planner, finish)

    def make_sweeps(
        self, found: dict[str, Any], finishes: Finishes, processes: Processes
    ) -> list[str]:
        source: Source | None = found.get("data.val_root")
        if source is None:
            return []
        data, (in_loader, on_device) = self.recipe.data, finishes
        images = LabelledImages(source, data, self.model.config.image_hw)
        with processes.agreed():
            images.check_readable()
        collate = self.collate(in_loader)
        self.sweeps = [Sweep(images, collate, data.batch_size, data.workers, on_device, processes)]
        return source.notes()

    def inputs(self, batch: Batch, step: int, micro_batch: int) -> tuple[Tensor, Plan, Tensor]:
        """Images, plan and targets [B, K], erased and mixed."""
        recipe, images = self.recipe, batch.images
        labels = numbers_of(batch.labels, self.classes).to(images.device, non_blocking=True)
        seed = torch_seed(recipe.seed, MIX, step, micro_batch)
        # timm draws from the global generators of Python and NumPy, and pixels from PyTorch's.
        random.seed(seed)
        np.random.seed(seed % 2**32)
        if recipe.data.erase:
            RandomErasing(recipe.data.erase, mode="pixel", device=images.device)(images)
        if self.mixup is not None:
            images, targets = self.mixup(images, labels)
        else:
            targets = mixup_target(labels, len(self.classes), 1.0, recipe.mix.smoothing)
        return images, batch.plan, targets

    def loss(self, wrapped_model: nn.Module, images: Tensor, plan: Plan, targets: Tensor) -> Tensor:
        return classification_loss(wrapped_model, images, plan, targets)

    def updated(self, step: int) -> None:
        if self.average is not None:
            self.average.update(self.model, step)

    def state(self, keep: bool) -> dict[str, Any]:
        more: dict[str, Any] = {"classes": list(self.classes)}
        if self.average is not None:
            more["ema"] = whole_weights(self.average.module, keep)
        return more if keep else {}

    def asides(self, watch: Watch) -> list[Aside]:
        self.watch = watch
        every = self.recipe.log.val_every_epochs
        return [(every, self.measure)] if self.sweeps else []

    def measure(self, step: int) -> bool:
        """Log the accuracy on held-out images, and that of the average. A collective."""
        watch, (sweep,) = self.watch, self.sweeps
        models = [self.model] if self.average is None else [self.model, self.average.module]
        results = classify(sweep, models, watch.autocast, self.classes, watch.stop)
        if results is None:
            return False
        watch.log.unreadable(results[0].failures, "it is left out")
        without, others = results[0].without_label, results[0].strangers.total()
        parts = [f"{without} have no class and are left out"] if without else []
        if others:
            parts.append(f"{others} have one that is not learned and count as wrong")
        if parts:
            watch.log.say_once(f"of the held-out images {listed(parts)}")
        for name, what, found in zip(
            ("val", "val_ema"), ("held-out", "of the averaged weights"), results, strict=False
        ):
            accuracy, images = found.accuracy, found.images
            shares = {"loss": found.loss, "top1": accuracy.top1, "top5": accuracy.top5}
            text = f"{what} loss {found.loss:.4f}, {accuracy.words()} ({images} images)"
            watch.measured(name, step, shares, text, images=images)
        return True


def _other_classes(before: list[str], now: list[str]) -> UserError:
    if len(before) != len(now):
        what = f"{len(before)} there and {len(now)} here"
    else:
        first = next(pair for pair in zip(before, now, strict=True) if pair[0] != pair[1])
        what = "{} there is {} here".format(*first)
    return UserError(
        f"The checkpoint has other classes than the images: {what}; name the images, or the"
        " --data.classes, that it was trained with."
    )
