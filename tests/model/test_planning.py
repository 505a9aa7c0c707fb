"""Plans: fixed shapes, quick to make, and a step that takes one compiles whole and never waits."""

from __future__ import annotations

import pickle
import time

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode

from greenmim import GreenMIM, ModelConfig
from greenmim.masking import num_visible_units, random_visible
from greenmim.planning import Planner

from .conftest import SMALL, images_for, load_json, small, some_visible


@pytest.mark.parametrize("per_image", [False, True])
def test_compiles_once_for_all_masks(per_image, backend):
    model = small(image_size=(96, 96)).float()
    images = images_for(model)
    torch._dynamo.reset()
    counter = CompileCounter()
    counted = torch.compile(model, fullgraph=True, backend=counter)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for seed in range(3):
        plan = model.plan(some_visible(model, 2 if per_image else None, seed))
        expected = model(images, plan=plan)
        counted(images, plan=plan)
        loss = compiled(images, plan=plan).loss
        torch.testing.assert_close(loss, expected.loss)
        loss.backward()
    assert counter.frame_count == 1


def test_gradient_of_the_compiled_model():
    model = small().float()
    images = images_for(model)
    plan = model.plan(some_visible(model))
    model(images, plan=plan).loss.backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    torch._dynamo.reset()
    torch.compile(model, fullgraph=True)(images, plan=plan).loss.backward()
    for name, parameter in model.named_parameters():
        if name in expected:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-3, atol=1e-5)


def tensors_of(plan):
    tensors = [plan.visible, plan.unit_index, plan.hidden_index, plan.patch_index]
    for part in dict.fromkeys(part for pair in plan.partitions for part in pair):
        tensors += [*part.tensors]
    return tensors


def test_the_shapes_of_a_plan_never_depend_on_the_mask():
    planner = pickle.loads(pickle.dumps(Planner(ModelConfig())))

    def shapes(plan):
        return [tuple(tensor.shape) for tensor in tensors_of(plan)]

    rng = np.random.default_rng(0)
    corner = np.zeros((7, 7), dtype=bool)
    corner[:3, :4] = True
    first = shapes(planner(corner.flatten()))
    for _ in range(50):
        assert shapes(planner(random_visible(rng, 49, 0.75))) == first


def test_planning_a_step_is_quick():
    """No more than a few loops over the tokens in Python that say which window each is in."""
    planner = Planner(ModelConfig())
    rng = np.random.default_rng(0)

    def loop(units):
        windows = []
        for grid, (height, width), shift in planner.stages:
            scale = grid[0] // 7
            tokens = np.argwhere(units.reshape(7, 7).repeat(scale, 0).repeat(scale, 1))
            for down, right in ((0, 0), shift):
                found = {}
                for number, (row, column) in enumerate(tokens.tolist()):
                    window = ((row + (height - down) % height) // height,
                              (column + (width - right) % width) // width)  # fmt: skip
                    found.setdefault(window, []).append((number, row, column))
                windows.append(found)
        return windows

    def least(call):
        seconds = []
        for _ in range(60):
            visible = random_visible(rng, 49, 0.75)
            start = time.perf_counter()
            call(visible)
            seconds.append(time.perf_counter() - start)
        return min(seconds)

    assert least(planner) < 4 * least(loop)


def test_a_plan_is_not_changed_by_what_becomes_of_the_mask():
    model = small()
    for visible in (some_visible(model), torch.from_numpy(some_visible(model, 3))):
        plan = model.plan(visible)
        before = plan.visible.clone()
        visible[:] = ~visible
        assert torch.equal(plan.visible, before)


def test_plans_move_and_stay_whole():
    model = small(image_size=(224, 224), window_size=7)
    plan = model.plan(some_visible(model))
    even, odd = plan.partitions[0]
    assert even is not odd
    assert plan.partitions[3][0] is plan.partitions[3][1]
    moved = plan.to("meta")
    assert moved.partitions[3][0] is moved.partitions[3][1]
    assert moved.partitions[0][1].token_index.device.type == "meta"


@pytest.mark.parametrize("per_image", [False, True])
def test_a_plan_is_one_piece_of_memory(per_image):
    """What moves it, pickles it or overwrites it moves one tensor."""
    model = small(image_size=(96, 96))
    first, second = (model.plan(some_visible(model, 2 if per_image else None, i)) for i in (0, 1))
    assert pickle.dumps(first).count(b"_rebuild_tensor") == 1
    assert first.memory.shape == second.memory.shape
    copied = pickle.loads(pickle.dumps(first))
    for plan in (first, copied):
        plan.memory.copy_(second.memory)  # as the fixed inputs of a CUDA graph are overwritten
        tensors, others = tensors_of(plan), tensors_of(second)
        assert len(tensors) == 4 + 4 * 7  # stage 4 has no shift: one partition, twice
        for tensor, other in zip(tensors, others, strict=True):
            assert torch.equal(tensor, other)
            assert (tensor.data_ptr() - plan.memory.data_ptr()) % 64 == 0


def places_of(part, row, grid, window, shift, odd):
    """int32 [N, 2], row and column of the tokens."""
    kept = part.token_index[row] >= 0
    columns = 2 * window[1] - 1
    local = -part.key_row[row][kept]
    shift = shift if odd else (0, 0)
    first = [(m - s) % m for m, s in zip(window, shift, strict=True)]
    across = (grid[1] - 1 + first[1]) // window[1] + 1
    number = part.window_id[row][kept]
    place = torch.empty(part.num_tokens, 2, dtype=torch.int32)
    place[part.token_index[row][kept].long()] = torch.stack([
        number // across * window[0] + local // columns - first[0],
        number % across * window[1] + local % columns - first[1],
    ], 1)  # fmt: skip
    return place


@pytest.mark.parametrize("per_image", [False, True])
def test_tokens_stand_by_unit_and_children_together(per_image):
    """The partitions number tokens as the pixels are taken, and merging needs no gather."""
    model = small(image_size=(96, 128))
    visible = some_visible(model, 2 if per_image else None)
    plan = model.plan(visible)
    for row, units in enumerate(np.atleast_2d(visible)):
        places = None
        for (grid, *window_and_shift), pair in zip(
            model.planner.stages, plan.partitions, strict=True
        ):
            for odd, part in enumerate(pair):
                place = places_of(part, row, grid, *window_and_shift, odd)
                if places is not None:
                    children = places.unflatten(0, (-1, 4))
                    offsets = torch.tensor([[0, 0], [1, 0], [0, 1], [1, 1]], dtype=torch.int32)
                    assert torch.equal(children, 2 * place[:, None] + offsets)
            flat = place[:, 0].long() * grid[1] + place[:, 1]
            if places is None:
                assert torch.equal(flat, plan.patch_index[row])
            places = place
        assert torch.equal(flat, torch.from_numpy(np.flatnonzero(units)))  # row-major at the end


@pytest.mark.parametrize("per_image", [False, True])
def test_a_step_on_a_device_takes_the_plan_along_and_never_waits(per_image):
    """On a pretended device, where an operation that reads a value back to the host raises."""
    with torch.device("meta"):
        model = GreenMIM(ModelConfig(**SMALL))
    plan = model.plan(some_visible(model, 2 if per_image else None))
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = model.to_empty(device="cuda")
        out = model(torch.empty(2, 3, 64, 64, device="cuda"), plan=plan)
    assert {tensor.device.type for tensor in out} == {"cuda"}
    assert out.latent.shape == (2, 2, 128) and out.loss.shape == ()
    assert plan.visible.device.type == "cpu"


def test_visible_counts_are_the_published_ones():
    for key, expected in load_json("lr_schedule_and_keep_counts.json")[
        "visible_units_kept"
    ].items():
        units, ratio = (float(part.split("=")[1]) for part in key.split())
        assert num_visible_units(int(units), ratio) == expected, key
