"""What people do with a model, they do with a fused one."""

from __future__ import annotations

import copy
import io
import threading

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from greenmim_kernels import use_backend
from greenmim_kernels.integrations import (
    fuse,
    fuse_window_attention,
    unfuse_window_attention,
)

from .cases import (
    BLOCKS,
    CLASSES,
    LIBRARIES,
    ShiftWindowMSA,
    WindowAttention,
    close,
    close_gradients,
    first,
    fused_copy,
    randomized,
    segment_mask,
    step,
    timm_maxvit,
    timm_swin,
    timm_swin_v2,
    torchvision_maxvit,
    torchvision_swin,
)

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", LIBRARIES)
def test_fused_and_undone(name: str, calls: list[str]) -> None:
    library = LIBRARIES[name]
    model, x = randomized(library.make()), torch.randn(library.inputs[0])
    classes, keys = [type(m) for m in model.modules()], list(model.state_dict())
    before, drawn = step(model, x), torch.get_rng_state()
    report = fuse_window_attention(model)
    assert torch.equal(torch.get_rng_state(), drawn)  # nothing was drawn
    assert list(model.state_dict()) == keys
    assert str(fuse_window_attention(model)) == str(report)  # a second time changes nothing
    calls.clear()
    close(step(model, x), before)
    assert len(calls) == sum(hasattr(m, "reader") for m in model.modules())
    unfuse_window_attention(model)
    assert [type(m) for m in model.modules()] == classes
    assert torch.equal(step(model, x), before)


def test_what_is_reported() -> None:
    class Odd(WindowAttention):
        def forward(self, x, mask=None):
            return 2 * super().forward(x, mask)

    class Broken(WindowAttention):
        def forward(self, x, mask=None, *, place):
            return x

    class Gated(WindowAttention):
        gate = False

        def forward(self, x, mask=None):
            return super().forward(x, mask) * (2 if self.gate else 1)

    class SomeWindowAttention(nn.Module):
        pass

    class Holder:
        lock = threading.Lock()

        def look(self, *_):
            pass

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.whole = nn.Sequential(*(CLASSES["microsoft"]() for _ in range(3)))
            self.odd, self.broken = Odd(16, (4, 4), 2), Broken(16, (4, 4), 2)
            self.other = SomeWindowAttention()
            self.nowhere = WindowAttention(16, (4, 4), 2).to("meta")
            self.gated = nn.ModuleList(Gated(16, (4, 4), 2) for _ in range(2))
            self.gated[1].gate = True
            self.patched = WindowAttention(16, (4, 4), 2)
            self.patched.forward = lambda x, mask=None: x
            self.strange = WindowAttention(16, (4, 4), 2)
            self.strange.window_size = 4
            self.watched = WindowAttention(16, (4, 4), 2)
            holder = Holder()
            holder.lock = threading.Lock()  # cannot be copied
            self.watched.register_forward_hook(holder.look)

    with torch.device("meta"), use_backend("reference"), torch.inference_mode():  # whatever is on
        with torch.device("cpu"):
            model = Model()
        report = fuse_window_attention(model)
    fused = ["whole.0", "whole.1", "whole.2", "gated.0", "watched"]
    assert list(report.fused) == fused
    left = ["odd", "broken", "nowhere", "gated.1", "patched", "strange", "other"]
    assert list(report.left) == left
    text = str(report)
    assert "Gated: its code computes something else (gated.1)" in text
    assert "WindowAttention: its forward was replaced (patched)" in text
    assert "WindowAttention: its code could not be tried: TypeError" in text
    assert "fused: 4 x WindowAttention, attention alone (whole.0 to watched)" in text
    assert "Odd: its code computes something else (odd)" in text
    assert "Broken: its code could not be tried: TypeError" in text
    assert 'on the device "meta"' in text and "SomeWindowAttention: not known (other)" in text
    assert "nothing was changed" in str(fuse_window_attention(nn.Linear(2, 2)))


def test_an_attention_that_is_the_model_is_reported_without_its_children() -> None:
    class UnknownWindowAttention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Module()
            self.bias.register_buffer("relative_position_index", torch.zeros(4, 4).long())

    assert list(fuse_window_attention(UnknownWindowAttention()).left) == [""]
    maxvit = LIBRARIES["timm_maxvit"].make()
    odd = next(m for m in maxvit.modules() if type(m).__name__ == "AttentionCl")
    odd.forward = lambda x, shared_rel_pos=None: x
    assert list(fuse_window_attention(odd).left) == [""]


def test_attention_inside_of_another_one_is_reported() -> None:
    for model, name in (
        (ShiftWindowMSA(16, 2, (4, 3)), "w_msa"),
        (nn.Sequential(ShiftWindowMSA(16, 2, (4, 3))), "0.w_msa"),
    ):
        report = fuse_window_attention(model)
        assert list(report.fused) == [name] and not report.left


@pytest.mark.parametrize(
    "extra",
    [
        torch.eye(3).to_sparse(),
        torch.randn(3, dtype=torch.complex64).conj(),
        torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]),
    ],
    ids=["sparse", "conjugate", "nested"],
)
def test_a_buffer_of_another_layout(extra: torch.Tensor) -> None:
    """Where its values cannot be read, each module is tried by itself; nothing fails."""
    model = nn.Sequential(*(CLASSES["microsoft"]() for _ in range(2)))
    for module in model:
        module.register_buffer("extra", extra)
    assert fuse._code_of(model[0])
    report = fuse_window_attention(model)
    assert list(report.fused) + list(report.left) == ["0", "1"]


def test_a_second_module_that_differs(calls: list[str]) -> None:
    """In a buffer of its bias, or in a method: what was found of the first is not taken from it."""
    model = LIBRARIES["timm_maxvit_tf"].make()
    modules = [m for m in model.modules() if type(m).__name__ == "AttentionCl"][:2]
    modules[1].rel_pos.height_lookup.copy_(modules[1].rel_pos.height_lookup.flip(2))
    report = fuse_window_attention(nn.ModuleList(modules))
    assert list(report.fused) == ["0"] and list(report.left) == ["1"]
    modules = [copy.deepcopy(modules[0]) for _ in range(2)]
    for module in modules:
        unfuse_window_attention(module)
    real = modules[1].rel_pos.get_bias
    modules[1].rel_pos.get_bias = lambda: 2 * real()
    report = fuse_window_attention(nn.ModuleList(modules))
    assert list(report.fused) == ["0"] and list(report.left) == ["1"]


def test_a_block_that_somebody_changed_keeps_its_attention_fused() -> None:
    model = timm_swin()
    block = model.layers[0].blocks[0]

    class Changed(type(block)):
        def _attn(self, x):
            return super()._attn(x.flip(1))

    block.__class__ = Changed
    before = model(x := torch.randn(1, 3, 56, 56))
    report = fuse_window_attention(model)
    assert "attention alone" in report.fused["layers.0.blocks.0.attn"]
    assert "computes something else" in report.left["layers.0.blocks.0"]
    close(model(x), before)


def test_undone_whole_or_not_at_all() -> None:
    model = nn.Sequential(CLASSES["microsoft"](), CLASSES["microsoft"]())
    fuse_window_attention(model)
    fused = type(model[1])
    model[1].__class__ = type("Sharded", (fused,), {})
    with pytest.raises(RuntimeError, match="1 has become a Sharded since it was fused"):
        unfuse_window_attention(model)
    assert type(model[0]) is fused
    model[1].__class__ = fused
    unfuse_window_attention(model)
    assert type(model[0]) is type(model[1]) is WindowAttention


@pytest.mark.parametrize(
    ("name", "place"), [("torchvision", "features.1"), ("torchvision_maxvit", "blocks.0")]
)
def test_traced_by_fx(name: str, place: str) -> None:
    """What is traced is the library's code."""
    extraction = pytest.importorskip("torchvision").models.feature_extraction
    library = LIBRARIES[name]
    model, x = randomized(library.make()).eval(), torch.randn(library.inputs[0])
    fused = fused_copy(model)
    expected = extraction.create_feature_extractor(model, [place])(x)
    found = extraction.create_feature_extractor(fused, [place])(x)
    assert torch.equal(found[place], expected[place])


def test_hooks_run_and_are_not_called_before() -> None:
    model, seen = timm_swin(), []
    for block in (block for layer in model.layers for block in layer.blocks):
        block.attn.register_forward_hook(lambda m, inputs, out: seen.append(tuple(out.shape)))
    fuse_window_attention(model)
    assert not seen
    model(torch.randn(1, 3, 56, 56))
    assert seen == [(1, 196, 16), (1, 196, 16), (1, 49, 32), (1, 49, 32)]


def test_torchvision_maxvit_layers(calls: list[str]) -> None:
    """Their layout in memory; and what goes to the library's code."""
    model = torchvision_maxvit()
    layer = model.blocks[0].layers[0].layers.grid_attention
    fused, x = fused_copy(layer), torch.randn(2, 16, 12, 12)
    calls.clear()
    close(fused(x), layer(x))
    assert fused(x).is_contiguous(memory_format=torch.channels_last) and len(calls) == 2
    with pytest.raises(RuntimeError):  # made for grids of one size
        fused(torch.randn(2, 16, 18, 18))
    seen: list[str] = []
    hook = fused.attn_layer.register_forward_hook(lambda *_: seen.append("here"))
    calls.clear()
    close(fused(x), layer(x))
    assert seen and len(calls) == 1  # of the attention alone
    hook.remove()
    fused.attn_layer.append(nn.Identity())
    close(fused(x), layer(x))


def test_a_swin_block_that_does_not_fit() -> None:
    """As the library says: a grid that the window does not divide, a window without a bias."""
    model = fused_copy(LIBRARIES["swin_ir"].make())
    block = next(m for m in model.modules() if type(m).__name__ == "FusedSwinTransformerBlock")
    x = torch.randn(1, 120, 16)
    with pytest.raises(RuntimeError):
        block(x, (10, 12))
    block.window_size = 2
    with pytest.raises(RuntimeError):
        block(x, (12, 10))


def test_dropout_behind_attention() -> None:
    model = randomized(torchvision_maxvit(attention_dropout=1.0)).train()
    x = torch.randn(2, 3, 48, 48)
    close(step(fused_copy(model), x), step(model, x))


@pytest.mark.parametrize("name", BLOCKS)
def test_drop_path_of_blocks(name: str) -> None:
    block, x = randomized(BLOCKS[name](2, 0.5)), torch.randn(2, 96, 16)
    fused = fused_copy(block)
    close(step(fused, x), step(block, x))
    close_gradients(fused, block)


DROPPING = {
    "torchvision": {"stochastic_depth_prob": 0.5},
    "torchvision_maxvit": {"stochastic_depth_prob": 0.5},
    "timm": {"drop_path_rate": 0.5},
    "hugging_face": {"drop_path_rate": 0.5},
    "monai_3d": {"use_checkpoint": True},
    "swin_ir": {"drop_path_rate": 0.5, "use_checkpoint": True},
}


@pytest.mark.parametrize("name", DROPPING)
def test_drop_path_and_checkpointing(name: str) -> None:
    library = LIBRARIES[name]
    model, x = randomized(library.make(**DROPPING[name])).train(), torch.randn(library.inputs[0])
    if name == "timm":
        model.set_grad_checkpointing(True)
    if name == "hugging_face":
        model.gradient_checkpointing_enable()
    fused = fused_copy(model)
    close(step(fused, x), step(model, x))
    close_gradients(fused, model)


COMPILED = ["timm", "timm_v2", "torchvision", "monai_2d", "hugging_face", "hugging_face_v2"]
COMPILED += ["torchvision_maxvit", "swin_ir"]


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_as_one_graph(name: str) -> None:
    """Once, and once more for all other batches."""
    library = LIBRARIES[name]
    model = fused_copy(randomized(library.make()))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    _, *shape = library.inputs[0]
    for batch, frames in ((2, 1), (2, 1), (3, 2), (5, 2)):
        x = torch.randn(batch, *shape)
        close(step(compiled, x), step(model, x))
        assert counter.frame_count == frames


def test_inductor() -> None:
    model = fused_copy(randomized(torchvision_swin(depths=[2], num_heads=[2])))
    x = torch.randn(1, 3, 56, 40)
    close(step(torch.compile(model, fullgraph=True), x), step(model, x))


def test_compiled_for_sizes_that_change() -> None:
    model = fused_copy(randomized(torchvision_swin(depths=[2], num_heads=[2])))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for size in ((56, 40), (40, 56), (64, 64)):
        x = torch.randn(1, 3, *size)
        close(step(compiled, x), step(model, x))


@pytest.mark.parametrize("name", CLASSES)
def test_attention_alone_is_compiled_with_its_mask(name: str) -> None:
    model = fused_copy(CLASSES[name]())
    slots = torch.tensor(model.window_size).prod().item()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    x = torch.randn(6, slots, 16)
    for mask in (segment_mask(3, slots), segment_mask(3, slots).flip(0)):
        close(compiled(x, mask), model(x, mask))
    assert counter.frame_count == 1
    close(compiled(x), model(x))
    with pytest.raises(RuntimeError, match="the mask does not cut windows into segments, or"):
        compiled(x, segment_mask(3, slots).tril())


@pytest.mark.parametrize("make", [timm_swin, timm_swin_v2])
def test_timm_sizes_that_change(make) -> None:
    model = randomized(make(strict_img_size=False))
    fused = fused_copy(model)
    for size in ((56, 56), (72, 40), (60, 84)):
        x = torch.randn(1, 3, *size)
        close(step(fused, x), step(model, x))
    for one in (model, fused):
        one.set_input_size((64, 64), window_size=8)
    x = torch.randn(1, 3, 64, 64)
    close(step(fused, x), step(model, x))
    assert type(fused.layers[0].blocks[0]).__name__.startswith("Fused")


@pytest.mark.parametrize("bias", ["bias", "mlp", "bias_tf"])
def test_maxvit_sizes_that_change(bias: str) -> None:
    model = randomized(timm_maxvit(rel_pos_type=bias))
    fused = fused_copy(model)
    for size in ((96, 64), (64, 32)):
        x = torch.randn(1, 3, *size)
        close(step(fused, x), step(model, x))
    with pytest.raises(AssertionError, match="must be divisible"):  # as the library says
        fused(torch.randn(1, 3, 96, 40))
    for one in (model, fused):
        for module in one.modules():
            if hasattr(module, "set_partition_size"):
                module.set_partition_size((2, 3))
    x = torch.randn(1, 3, 64, 96)
    close(step(fused, x), step(model, x))
    block = fused.stages[0].blocks[0].attn_grid
    block.partition_size = (4, 3)  # the bias is for others
    with pytest.raises(RuntimeError):
        block(torch.randn(1, 16, 12, 16))
    assert type(fused.stages[0].blocks[0].attn_grid).__name__ == "FusedPartitionAttentionCl"


def test_maxvit_attention_alone(calls: list[str]) -> None:
    """What a block of timm's other forms, or anybody, calls with windows that were cut before."""
    for name, shape in (("timm_maxvit", (3, 4, 2, 16)), ("torchvision_maxvit", (2, 3, 9, 16))):
        model = randomized(LIBRARIES[name].make())
        kinds = ("AttentionCl", "RelativePositionalMultiHeadAttention")
        attention = next(m for m in model.modules() if type(m).__name__ in kinds)
        fused, x = fused_copy(attention), torch.randn(shape)
        calls.clear()
        close(fused(x), attention(x))
        assert len(calls) == 1
        with pytest.raises(RuntimeError):  # fewer slots: as the library
            fused(x[:, :, 1:])
        if name == "timm_maxvit":
            # It has a bias of its own.
            shared = torch.zeros(1, 8, 8)
            close(fused(x, shared), attention(x, shared))
            close(fused(x, shared_rel_pos=shared), attention(x, shared_rel_pos=shared))
            for one in (fused, attention):
                one.scale = 1.0
            close(fused(x), attention(x))
            for one in (fused, attention):
                one.fused_attn = False
            close(fused(x), attention(x))


def test_copied_pickled_saved_and_loaded() -> None:
    for name in (
        "timm",
        "hugging_face",
        "monai_2d",
        "timm_maxvit",
        "torchvision_maxvit",
        "swin_ir",
        "hat",
    ):
        library = LIBRARIES[name]
        model, x = randomized(library.make()), torch.randn(library.inputs[0])
        fused = fused_copy(model)
        file = io.BytesIO()
        torch.save(fused, file)
        file.seek(0)
        for again in (copy.deepcopy(fused), torch.load(file, weights_only=False)):
            assert [type(m) for m in again.modules()] == [type(m) for m in fused.modules()]
            close(step(again, x), step(model, x))
        other = library.make()
        other.load_state_dict(fused.state_dict())  # one way
        close(first(other(x)), first(model(x)))
        fused.load_state_dict(randomized(library.make(), 3).state_dict())  # and the other


def test_distributed_data_parallel(tmp_path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model, x = randomized(timm_swin()), torch.randn(2, 3, 56, 56)
        parallel = nn.parallel.DistributedDataParallel(fused_copy(model))
        close(step(parallel, x), step(model, x))
        close_gradients(parallel, model)
    finally:
        dist.destroy_process_group()
