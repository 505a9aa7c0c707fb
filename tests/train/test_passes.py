"""Recorded passes are the passes; a step never waits for the host and is compiled once."""

from __future__ import annotations

import contextlib
import functools

import numpy as np
import pytest
import torch
from recording import CONFIG, Recording
from torch._dynamo.utils import counters
from torch._functorch import config as functorch_config
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.kept import counting_kept
from greenmim import GreenMIM
from greenmim.cli import main
from greenmim.launch import World
from greenmim.masking import random_visible
from greenmim.processes import Processes, Reports
from greenmim.recipe import DataConfig, Recipe
from greenmim.training import passes
from greenmim.training.passes import GraphedPasses, Passes, clip_gradients, reconstruction_loss

PARTS, UPDATES = 2, 3


class TwoAlike(Processes):
    """Two processes that compute the same, seen from one of them."""

    def __init__(self) -> None:
        super().__init__(World(rank=0, size=2), torch.device("cpu"))
        self.sums = 0

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        self.sums += 1
        return tensor.mul_(2)


def train(make, per_image: bool = False, parts: int = PARTS) -> tuple[list, list, dict]:
    """Losses, norms and weights of a short training run."""
    torch.manual_seed(0)
    model = GreenMIM(CONFIG)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, fused=True)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    work = make(reconstruction_loss, model, trained, contextlib.nullcontext, scaler, parts)
    rng, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    losses, norms = [], []
    for _ in range(UPDATES):
        for part in range(parts):
            images = torch.randn(2, 3, 64, 64, generator=generator)
            plan = model.plan(random_visible(rng, 4, 0.5, 2 if per_image else None))
            losses.append(work.forward_backward((images, plan), part))
        norms.append(work.clip(optimizer, limit=0.5))
        optimizer.step()
        work.zero_grad(optimizer)
    return losses, norms, dict(model.named_parameters())


@pytest.mark.parametrize("per_image", [False, True])
@pytest.mark.parametrize("several, parts", [(False, 1), (False, 2), (True, 1), (True, 2)])
def test_recorded_passes_train_as_plain_ones(monkeypatch, several, parts, per_image):
    processes = TwoAlike() if several else Processes(World(), torch.device("cpu"))
    recording = Recording()
    monkeypatch.setattr(passes, "record", recording)
    expected = train(Passes, per_image, parts)
    actual = train(functools.partial(GraphedPasses, processes), per_image, parts)
    assert recording.count == 1
    torch.testing.assert_close(actual[0], expected[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(actual[1], expected[1], rtol=1e-5, atol=0)
    for name, weights in expected[2].items():
        torch.testing.assert_close(actual[2][name], weights, rtol=1e-4, atol=1e-6, msg=name)
    if several:
        assert processes.sums == UPDATES  # once an update, however many micro-batches it has


def test_gradients_of_a_pass_alone_are_its_own(monkeypatch):
    """Nothing is summed in memory of its own where there is nothing to sum."""
    processes = Processes(World(), torch.device("cpu"))
    model = GreenMIM(CONFIG)
    trained = [p for p in model.parameters() if p.requires_grad]
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    arguments = reconstruction_loss, model, trained, contextlib.nullcontext, scaler
    assert GraphedPasses(processes, *arguments, 1).gradient is None
    assert all(parameter.grad is None for parameter in trained)
    assert GraphedPasses(processes, *arguments, 2).gradient is not None
    assert GraphedPasses(TwoAlike(), *arguments, 1).gradient is not None


def test_gradients_in_one_vector_begin_where_those_of_their_own_would():
    trained = [p for p in GreenMIM(CONFIG).parameters() if p.requires_grad]
    vector = passes.flat_gradients(trained)
    assert any(p.numel() % 16 for p in trained)
    assert all(p.grad.data_ptr() % 64 == vector.data_ptr() % 64 for p in trained)
    assert all(p.grad.shape == p.shape for p in trained)


def test_losses_of_a_graph_are_kept_when_it_runs_again(monkeypatch):
    monkeypatch.setattr(passes, "record", lambda work, prepare: work)
    losses, _, _ = train(functools.partial(GraphedPasses, Processes(World(), torch.device("cpu"))))
    assert len({loss.data_ptr() for loss in losses}) == len(losses)
    assert len({loss.item() for loss in losses}) == len(losses)


@pytest.mark.parametrize("per_image", [False, True])
def test_an_update_on_a_device_never_waits(monkeypatch, per_image):
    """On a pretended device, where whatever reads a value back to the host raises.

    Without a GPU autograd's engine does not run for such a device: gradients are made up.
    """
    with torch.device("meta"):
        model = GreenMIM(CONFIG)
    plan = model.plan(random_visible(np.random.default_rng(0), 4, 0.5, 2 if per_image else None))
    processes = Processes(World(), torch.device("cpu"))
    copies = count_copies_to_the_host(monkeypatch)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = model.to_empty(device="cuda")
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=0.1)
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        work = Passes(reconstruction_loss, model, trained, contextlib.nullcontext, scaler, PARTS)

        def backward(loss):
            assert loss.device.type == "cuda" and loss.requires_grad
            for parameter in trained:
                parameter.grad = torch.zeros_like(parameter)

        monkeypatch.setattr(torch.Tensor, "backward", backward)
        reports = Reports(processes, PARTS)
        for _ in range(2):
            images = torch.empty(2, 3, 64, 64, device="cuda")
            losses = [
                work.forward_backward((images, plan.to("cuda")), part) for part in range(PARTS)
            ]
            norm = work.clip(optimizer, limit=1.0)
            processes.device = torch.device("cuda:0")
            with monkeypatch.context() as patch:
                patch.setattr(torch.cuda, "Event", FakeEvent)
                bad = reports.send(1, losses, norm)
            assert bad.device.type == "cuda"
            optimizer.step()
            work.zero_grad(optimizer)
    assert copies == [True, True]  # one report an update, without blocking


class FakeEvent:
    def record(self) -> None:
        pass


def count_copies_to_the_host(monkeypatch) -> list[bool]:
    """For each Tensor.to("cpu"), whether it was told not to block."""
    copies: list[bool] = []
    original = torch.Tensor.to

    def to(tensor, *arguments, **options):
        if arguments[:1] in (("cpu",), (torch.device("cpu"),)):
            copies.append(bool(options.get("non_blocking")))
        return original(tensor, *arguments, **options)

    for name in ("cpu", "item", "tolist", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, forbidden(name))
    for name in ("tensor", "as_tensor"):
        monkeypatch.setattr(torch, name, not_on_a_device(name, getattr(torch, name)))
    monkeypatch.setattr(torch.Tensor, "to", to)
    return copies


def not_on_a_device(name: str, original):
    def made(*arguments, device=None, **options):
        assert device is None or torch.device(device).type == "cpu", (
            f"torch.{name} copies and waits"
        )
        return original(*arguments, **options)

    return made


def forbidden(name: str):
    def waits(*_):
        raise AssertionError(f"Tensor.{name}() waits for the device")

    return waits


@torch._dynamo.config.patch(error_on_recompile=True)
def test_a_run_compiles_one_graph_for_all_masks(monkeypatch, tiny, photos, tmp_path):
    """Two: the backward pass is compiled with the forward pass, the last batch is as the first."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    counters.clear()
    work = tmp_path / "run"
    arguments = ["--config", str(tiny), "--data.root", str(photos), "--work-dir", str(work)]
    assert main(["pretrain", *arguments, "--compile", "true", "--log.tensorboard", "false"]) == 0
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


@functorch_config.patch(ban_recompute_materialized_backward=True)
def test_recomputing_pointwise_work_keeps_less_and_gives_the_same_gradients():
    torch.manual_seed(0)
    model, images = GreenMIM(CONFIG), torch.randn(2, 3, 64, 64)
    plan = model.plan(random_visible(np.random.default_rng(0), 4, 0.5))
    found = []
    for wanted in (False, True):
        passes.recompute_pointwise(wanted)
        torch._dynamo.reset()
        # The partitioner of the compiler that users have; what it splits runs as it is.
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager_decomp_partition")
        with counting_kept(model) as kept, torch.autocast("cpu", torch.bfloat16):
            loss = compiled(images, plan=plan, loss_only=True).loss
        loss.backward()
        found.append((sum(kept.values()), {n: p.grad for n, p in model.named_parameters()}))
        model.zero_grad()
    (much, expected), (less, actual) = found
    assert less < 0.8 * much
    for name, gradient in expected.items():
        assert gradient is None or torch.equal(actual[name], gradient), name


@pytest.mark.parametrize("wanted", [False, True])
def test_a_run_says_what_the_compiler_keeps(wanted):
    recipe = Recipe(work_dir="-", data=DataConfig(root="-"), compile=True,
                    recompute_pointwise=wanted)  # fmt: skip
    with functorch_config.patch(ban_recompute_materialized_backward=wanted):
        passes.distribute(GreenMIM(CONFIG), recipe, alone=True)
        assert functorch_config.ban_recompute_materialized_backward == (not wanted)


def test_recomputing_pointwise_work_needs_the_compiler(tiny, photos, tmp_path, capsys):
    work = tmp_path / "run"
    arguments = ["--config", str(tiny), "--data.root", str(photos), "--work-dir", str(work)]
    assert main(["pretrain", *arguments, "--recompute-pointwise", "true"]) == 2
    assert "add --compile true" in " ".join(capsys.readouterr().err.split())
    assert not work.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--cuda-graph needs a CUDA GPU"),
        (["--strategy", "fsdp"], "--cuda-graph does not go with --strategy fsdp"),
        (
            ["--activation-checkpointing", "true", "--model.drop-path", "0.1"],
            "cannot repeat stochastic depth",
        ),
    ],
)
def test_where_a_graph_cannot_be(options, message, tiny, photos, tmp_path, capsys):
    work = tmp_path / "run"
    arguments = ["--config", str(tiny), "--data.root", str(photos), "--work-dir", str(work)]
    assert main(["pretrain", *arguments, "--cuda-graph", "true", *options]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not work.exists()


@pytest.mark.parametrize(("limit", "after"), [(10.0, 5.0), (2.0, 2.0), (float("inf"), 5.0)])
def test_gradients_above_the_limit_are_scaled_down_to_it(limit, after):
    weights = [torch.nn.Parameter(torch.zeros(n)) for n in (1, 1, 2)]
    weights[0].grad, weights[1].grad = torch.tensor([3.0]), torch.tensor([-4.0])  # norm 5; one None
    norm = clip_gradients(weights, limit)
    assert norm.item() == 5.0
    expected = torch.tensor([3.0, -4.0]) * after / 5
    torch.testing.assert_close(torch.cat([w.grad for w in weights[:2]]), expected)


def test_no_limit_is_no_pass_over_the_gradients(monkeypatch):
    monkeypatch.setattr(torch.nn.utils, "clip_grads_with_norm_", None)
    weight = torch.nn.Parameter(torch.zeros(2))
    weight.grad = torch.tensor([3.0, 4.0])
    assert clip_gradients([weight], float("inf")) == 5.0


def test_gradients_that_are_not_finite_are_reported():
    weight = torch.nn.Parameter(torch.zeros(2))
    weight.grad = torch.tensor([1.0, float("nan")])
    assert clip_gradients([weight], 1.0).isnan()
