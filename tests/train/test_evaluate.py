"""kNN and the linear probe: against scikit-learn, on labels of every kind of source, as commands
and while a run is watched."""

from __future__ import annotations

import contextlib
import json
import math
import os
import pickle
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from crew import command, losses, records, run_crew
from matplotlib.axes import Axes
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from tar_files import encoded, name_of, source_of
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from train_pictures import COLOURS, coloured

import greenmim
from greenmim.checkpoint import convert_checkpoint
from greenmim.cli import main
from greenmim.config import MODELS, ModelConfig
from greenmim.data.dataset import Finish
from greenmim.data.images import Source
from greenmim.data.labelled import LabelledCollate, LabelledImages
from greenmim.data.sampler import Item
from greenmim.data.sources import HuggingFace
from greenmim.evaluation import accuracy
from greenmim.evaluation.accuracy import Accuracy, by_class, draw, measure, table
from greenmim.evaluation.classifiers import knn_pieces, knn_scores, linear_probe
from greenmim.evaluation.features import extract, load_features
from greenmim.evaluation.sweep import Sweep
from greenmim.guards import UserError
from greenmim.initial import config_of
from greenmim.launch import World
from greenmim.mim import GreenMIM
from greenmim.processes import Processes
from greenmim.recipe import DataConfig
from greenmim.tools.evaluate import probe
from greenmim.tools.loading import load_encoder, load_model
from greenmim.tools.measured import LabelledData
from tests.archives import write_tar

# Others differ from these in width and depth alone; a SwinV2's weights do not tell its windows.
SIZES = [
    name
    for name in MODELS
    if not any(part in name for part in ("large", "base_patch4_window7", "swinv2"))
]


@pytest.fixture
def options(finished_run, labelled, tmp_path) -> list[str]:
    train, val = labelled
    return [
        *("--checkpoint", str(finished_run / "checkpoints" / "last.pth"), "--device", "cpu"),
        *("--data.root", str(train), "--data.val-root", str(val), "--data.workers", "0"),
        *("--output", str(tmp_path / "found.json")),
    ]


def found(tmp_path: Path) -> dict:
    return json.loads((tmp_path / "found.json").read_text())


def clusters(images: int, seed: int, classes: int = 7, width: int = 16, spread: float = 2.0):
    """Features of images around a centre for each class, and their classes."""
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(99))
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (images,), generator=draw)
    noise = torch.randn(images, width, generator=draw)
    return centres[labels] + spread * noise + 3, labels


# ---- the classifiers ----------------------------------------------------------------------------


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (20, 0.07), (200, 1.0)])
def test_knn_is_that_of_scikit_learn(k, temperature, monkeypatch):
    monkeypatch.setattr("greenmim.evaluation.classifiers._AT_ONCE", 300 * 11)  # in pieces
    train, labels = clusters(300, 0)
    features, answers = clusters(90, 1)
    theirs = KNeighborsClassifier(
        k, metric="cosine", weights=lambda distance: np.exp(-distance / temperature)
    ).fit(train.double().numpy(), labels.numpy())
    expected = theirs.predict_proba(features.double().numpy())
    scores = knn_scores(train, labels, features, 7, k, temperature)
    np.testing.assert_allclose(scores.exp(), expected, atol=2e-5)
    top1 = theirs.score(features.double().numpy(), answers.numpy())
    pieces = knn_pieces(train, labels, features, 7, k, temperature)
    found = measure(pieces, answers)
    assert found.top1 == pytest.approx(top1) and 0.2 < top1 < 0.95
    assert found.confusion.total() == 90


def test_votes_at_a_low_temperature_are_those_of_the_nearest():
    train, labels = clusters(300, 0)
    features, _ = clusters(90, 1)
    first = knn_scores(train, labels, features, 7, k=1).argmax(1)
    cold = knn_scores(train, labels, features, 7, k=20, temperature=1e-3)
    assert (cold.argmax(1) == first).double().mean() > 0.95 and not cold.isnan().any()


def test_each_image_is_told_by_the_others():
    train, labels = clusters(60, 2)
    scores = knn_scores(train, labels, None, 7, k=5)
    for number in range(60):
        rest = torch.arange(60) != number
        alone = knn_scores(train[rest], labels[rest], train[number : number + 1], 7, k=5)
        torch.testing.assert_close(scores[number], alone[0], rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="k is 60 and there are 59 neighbours"):
        knn_scores(train, labels, None, 7, k=60)
    with pytest.raises(ValueError, match="k is 0; it has to be at least 1"):
        knn_scores(train, labels, None, 7, k=0)
    assert knn_scores(train, labels, train[:0], 7).shape == (0, 7)


def test_the_probe_is_as_good_as_scikit_learns_regression():
    train, labels = clusters(1500, 3)
    features, answers = clusters(1000, 4)
    mean, deviation = train.mean(0), train.std(0)
    theirs = LogisticRegression(C=1e4, max_iter=2000).fit((train - mean) / deviation, labels)
    expected = theirs.score((features - mean) / deviation, answers)
    scores, rates, best = linear_probe(train, labels, features, answers, 7, epochs=60)
    assert measure([scores], answers).top1 == best.top1 == pytest.approx(expected, abs=0.015)
    assert expected > 0.55 and len({rate.top1 for rate in rates}) > 1
    assert best == max(rates, key=lambda rate: (rate.choosing, -rate.loss)) != rates[2]
    # The answers choose nothing.
    wrong = (answers + 1) % 7
    again, _, same = linear_probe(train, labels, features, wrong, 7, epochs=60)
    assert torch.equal(again, scores) and same.lr == best.lr and same.top1 < 0.3


def test_a_rate_of_the_probe_is_that_of_a_layer_alone():
    """Written out, for one rate; features of very different sizes."""
    train, labels = clusters(70, 5, classes=3)
    features, answers = clusters(40, 6, classes=3)
    sizes = 10.0 ** torch.linspace(-2, 2, train.shape[1])
    rates = (0.01, 0.3, 2.0)
    found = [
        linear_probe(train * sizes, labels, features * sizes, answers, 3, rates=some, epochs=7,
                     batch_size=20, seed=1)
        for some in (rates, rates[:1], rates[1:2], rates[2:])
    ]  # fmt: skip
    for number, (scores, (alone,), _) in enumerate(found[1:]):
        rate = found[0][1][number]
        assert rate.lr == rates[number]
        assert tuple(rate) == pytest.approx(tuple(alone), rel=1e-4)
        if rate == found[0][2]:
            torch.testing.assert_close(found[0][0], scores, rtol=1e-4, atol=1e-4)
    draw = torch.Generator().manual_seed(1)
    torch.randperm(70, generator=draw)  # which images choose
    normal = torch.nn.BatchNorm1d(train.shape[1], eps=1e-6, momentum=1.0, affine=False)
    normal(train * sizes)
    normal.running_var *= 69 / 70  # of all images, as of a batch in training
    layer = torch.nn.Linear(train.shape[1], 3)
    for parameter in layer.parameters():
        torch.nn.init.zeros_(parameter)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.3, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 7 * 4)
    normal.eval()
    for _ in range(7):
        for index in torch.randperm(70, generator=draw).tensor_split(4):
            optimizer.zero_grad()
            scores = layer(normal(train[index] * sizes[None]))
            torch.nn.functional.cross_entropy(scores, labels[index]).backward()
            optimizer.step()
            schedule.step()
    torch.testing.assert_close(found[2][0], layer(normal(features * sizes)), rtol=1e-3, atol=1e-3)


def test_images_that_choose_are_not_learned():
    """Labels by chance are learned by heart, and then say nothing of the images left out."""
    draw = torch.Generator().manual_seed(7)
    train = torch.randn(400, 600, generator=draw)
    labels = torch.randint(4, (400,), generator=draw)
    _, rates, best = linear_probe(train, labels, train, labels, 4, rates=(0.001, 1.0), epochs=60)
    assert best.top1 > 0.9 and rates[1].top1 == 1.0
    assert all(0.0 < rate.choosing < 0.55 for rate in rates)


def test_the_probe_of_a_few_images_and_of_batches_of_one():
    train, labels = torch.randn(3, 8), torch.tensor([0, 1, 0])
    scores, rates, _ = linear_probe(train, labels, train, labels, 2, epochs=5, batch_size=2)
    assert scores.isfinite().all() and len(rates) == 8
    train, labels = clusters(200, 8, classes=3, spread=0.5)
    *_, one = linear_probe(train, labels, train, labels, 3, epochs=3, batch_size=1)
    assert one.top1 > 0.9
    with pytest.raises(ValueError, match="at least 2"):
        linear_probe(train[:1], labels[:1], train, labels, 3)
    with pytest.raises(ValueError, match="give at least one"):
        linear_probe(train, labels, train, labels, 3, rates=())
    half, *_ = linear_probe(train.half(), labels, train.half(), labels, 3, epochs=3)
    assert half.dtype == torch.float32


@pytest.mark.parametrize("rates", [[1e39, 0.1], [0.1, 1e39]])
def test_a_rate_that_diverges_is_not_chosen(rates):
    """Its scores are NaN, of which the first counts as the best: that of most images' class."""
    train = torch.randn(60, 8, generator=torch.Generator().manual_seed(3))
    labels = (torch.arange(60) < 12).long()
    scores, found, best = linear_probe(train, labels, train, labels, 2, rates=rates, epochs=9)
    (wild,) = (rate for rate in found if rate.lr == 1e39)
    assert math.isnan(wild.loss) and wild.choosing >= best.choosing
    assert best.lr == 0.1 and scores.isfinite().all()


def test_accuracies_by_hand():
    no = -math.inf
    scores = torch.tensor([[0.9, 0.1, no], [0.1, 0.9, no], [0.6, 0.4, no], [0.3, 0.7, no]])
    for pieces in ([scores], scores.split(3), scores.split(1)):
        accuracy = measure(pieces, torch.tensor([0, 1, 1, 2]))
        assert (accuracy.top1, accuracy.top5) == (0.5, 0.75)  # nobody voted for the last one's
        assert accuracy.confusion == {(0, 0): 1, (1, 1): 1, (1, 0): 1, (2, 1): 1}
    unknown = measure([scores], torch.tensor([0, 1, 1, -1]))
    assert unknown.top1 == 0.5 and unknown.confusion.total() == 3
    rows = by_class(accuracy, ["a", "b", "c", "d"])
    assert rows[1] == {"class": "b", "images": 2, "top1": 0.5, "taken_for": "a", "taken": 1}
    assert rows[3] == {"class": "d", "images": 0, "top1": None, "taken_for": None, "taken": 0}
    assert [line.split()[0] for line in table(rows).splitlines()] == ["class", "c", "b", "a"]
    assert "2 more" in table(rows, most=1)


def test_scores_that_say_nothing_are_taken_for_nothing(tmp_path):
    nan, no = math.nan, -math.inf
    scores = torch.tensor([[nan, nan], [no, no], [0.1, 0.9], [nan, 0.5]])
    accuracy = measure([scores], torch.tensor([0, 0, 0, 1]))
    assert accuracy.top1 == 0.0
    assert accuracy.confusion == {(0, -1): 2, (0, 1): 1, (1, -1): 1}
    first, second = by_class(accuracy, ["a", "b"])
    assert first == {"class": "a", "images": 3, "top1": 0.0, "taken_for": "b", "taken": 1}
    assert second == {"class": "b", "images": 1, "top1": 0.0, "taken_for": None, "taken": 0}
    drawn = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Axes, "imshow", lambda axes, shares, **_: drawn.append(shares) or 1 / 0)
        with pytest.raises(ZeroDivisionError):
            draw(accuracy, ["a", "b"], "", tmp_path / "a.png")
    np.testing.assert_allclose(drawn[0], [[0, 1 / 3], [0, 0]])


def test_pictures_of_many_classes_and_of_odd_names(tmp_path):
    same = Accuracy(1.0, 1.0, Counter({(n, n): 1 for n in range(200)}))
    assert draw(same, map(str, range(200)), "many", tmp_path / "many.png")
    assert not draw(same, map(str, range(2001)), "too many", tmp_path / "more.png")
    names = ["$\\x$", os.fsdecode(b"\xff\xfe"), "a" * 90]
    assert draw(same._replace(confusion=Counter({(0, 1): 3})), names, "odd", tmp_path / "odd.png")
    assert {file.name for file in tmp_path.iterdir()} == {"many.png", "odd.png"}


# ---- labels -------------------------------------------------------------------------------------


def labels_of(source) -> list[str | None]:
    return [source.label(index) for index in range(len(source))]


def test_labels_of_folders_and_tars(photos, tar, tmp_path):
    assert labels_of(source_of(str(photos))) == [None, None, "cats", "cats", "dogs", "dogs"]
    assert labels_of(source_of(str(tar))) == [f"class{n % 3}" for n in range(12)]
    below = {f"./set/train/{'ab'[n % 2]}/{name_of(n)}": encoded(n) for n in range(4)}
    source = source_of(str(write_tar(tmp_path / "below.tar", below)))
    assert labels_of(source) == ["a", "b", "a", "b"]
    for part in "xy":
        write_tar(tmp_path / "parts" / f"{part}.tar", {name_of(n): encoded(n) for n in range(2)})
    assert labels_of(source_of(f"tar/{tmp_path}/parts")) == ["x", "x", "y", "y"]
    loose = {"cover.png": encoded(1), "set/a/0.png": encoded(0), "set/b/1.png": encoded(1)}
    source = source_of(str(write_tar(tmp_path / "loose.tar", loose)))
    assert labels_of(source) == [None, "a", "b"]
    for part in "xy":
        write_tar(tmp_path / "same" / f"{part}.tar", {"a/0.png": encoded(0), "a/1.png": encoded(1)})
    assert set(labels_of(source_of(f"tar/{tmp_path}/same"))) == {None}
    inner = {f.name: f.read_bytes() for f in sorted((tmp_path / "parts").iterdir())}
    nested = source_of(str(write_tar(tmp_path / "nested.tar", inner)))
    assert labels_of(nested) == ["x", "x", "y", "y"]
    assert labels_of(source_of(str(tmp_path / "parts" / "x.tar"))) == [None, None]


def test_labels_of_shards(shards, tmp_path):
    assert labels_of(source_of(f"wds/{shards}/train-{{0..3}}.tar")) == ["7"] * 12
    write_tar(tmp_path / "s-0.tar", {"0.cls": b" 3\n", "0.png": encoded(0), "1.png": encoded(0)})
    assert labels_of(source_of(f"wds/{tmp_path}/s-0.tar")) == ["3", None]


def test_labels_and_splits_of_hugging_face(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    for number in range(6):
        folder = tmp_path / "hub" / ("train" if number < 4 else "test") / f"class{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name_of(number)).write_bytes(encoded(number))
    train, test = (source_of(f"hfds/{tmp_path}/hub{split}") for split in ("", ":test"))
    assert sorted(labels_of(train)) == ["class0", "class0", "class1", "class1"]
    assert sorted(labels_of(test)) == ["class0", "class1"]
    assert train.fingerprint() != test.fingerprint()
    # Another process gets it without its rows, and may ask for them in any order.
    for ask in (lambda source: source.labels(), lambda source: source.classes(),
                lambda source: source.fingerprint(), labels_of):  # fmt: skip
        assert ask(pickle.loads(pickle.dumps(train))) == ask(train)
    monkeypatch.setattr(HuggingFace, "_load", lambda self: [])
    with pytest.raises(UserError, match="there is no image in it"):
        source_of(f"hfds/{tmp_path}/hub")


def test_a_fingerprint_changes_where_images_do(tmp_path):
    folder = coloured(tmp_path / "some", 2)
    first = source_of(str(folder)).fingerprint()
    assert source_of(str(folder)).fingerprint() == first
    Image.new("RGB", (9, 9)).save(folder / "red" / "0.png")
    second = source_of(str(folder)).fingerprint()
    (folder / "red" / "0.png").rename(folder / "red" / "9.png")
    assert len({first, second, source_of(str(folder)).fingerprint()}) == 3
    # What the labels follow from, too.
    assert source_of(str(tmp_path)).fingerprint() != source_of(str(folder)).fingerprint()
    tar = write_tar(tmp_path / "t.tar", {"a/0.png": encoded(0), "a/0.cls": b"1"})
    kinds = {source_of(f"{kind}/{tar}").fingerprint() for kind in ("tar", "wds")}
    counted = source_of(f"wds/{tar}", num_samples=2).fingerprint()
    assert len(kinds | {counted}) == 3


# ---- the commands -------------------------------------------------------------------------------


@pytest.mark.parametrize(("task", "more"), [("knn", ["--k", "3"]), ("probe", ["--epochs", "30"])])
def test_colours_are_told_apart(task, more, options, tmp_path, capsys):
    assert main([task, *options, *more]) == 0
    result = found(tmp_path)
    assert result["top1"] == result["top5"] == 1.0
    assert (result["images"], result["train_images"], result["classes"]) == (9, 18, 3)
    assert {row["class"]: row["images"] for row in result["by_class"]} == dict.fromkeys(COLOURS, 3)
    assert result["k"] == 3 if task == "knn" else result["lr"] in [r["lr"] for r in result["rates"]]
    said = capsys.readouterr().out
    assert "top-1 100.00 %" in said and f"wrote {tmp_path}/found.json" in said
    with Image.open(tmp_path / "found.png") as picture:
        assert picture.width > 300


@pytest.fixture
def counted(monkeypatch) -> list[int]:
    """Images of each sweep that is made."""
    found, real = [], Sweep.run

    def run(self, *arguments):
        found.append(len(self.images))
        return real(self, *arguments)

    monkeypatch.setattr(Sweep, "run", run)
    return found


def test_features_are_kept(options, counted, tmp_path, capsys):
    again = ["knn", *options, "--k", "3", "--overwrite"]
    assert main(["knn", *options, "--k", "3"]) == 0 and counted == [18, 9]
    first = found(tmp_path)
    assert main(["knn", *options, "--k", "3"]) == 2
    assert "is there already; add --overwrite" in capsys.readouterr().err
    (tmp_path / "found.json").unlink()
    assert main(["knn", *options, "--k", "3"]) == 2  # its picture
    assert "found.png is there already" in capsys.readouterr().err
    with pytest.MonkeyPatch.context() as few:
        few.setattr(accuracy, "_DRAWN", 1)  # classes of a picture
        assert main(again) == 0 and not (tmp_path / "found.png").exists()
    assert main(again) == 0 and len(counted) == 2 and (tmp_path / "found.png").exists()
    assert found(tmp_path) == first
    kept = sorted((tmp_path / "features").iterdir())
    kept[0].write_bytes(kept[0].read_bytes()[:-5])
    assert load_features(kept[0]) is None
    assert main(again) == 0 and len(counted) == 3
    assert main([*again, "--features", str(tmp_path / "elsewhere")]) == 0 and len(counted) == 5
    assert found(tmp_path) == first


def test_features_are_made_anew_where_anything_is_another(
    options, counted, finished_run, labelled, tiny, photos, tmp_path
):
    train = shutil.copytree(labelled[0], tmp_path / "train")
    base = ["knn", *options, "--data.root", str(train), "--k", "3", "--overwrite"]
    older = next((finished_run / "checkpoints").glob("step_00000003.pth"))
    state = torch.load(finished_run / "checkpoints" / "last.pth", weights_only=True)
    state["recipe"]["data"]["mean"] = [0.1, 0.2, 0.3]
    torch.save(state, tmp_path / "other_mean.pth")
    assert main(base) == 0
    for more in (
        ["--checkpoint", str(older)],
        ["--checkpoint", str(tmp_path / "other_mean.pth")],
        ["--precision", "bf16"],
        ["--data.crop", "1"],
        ["--data.max-pixels", "999999"],
    ):
        counted.clear()
        assert main([*base, *more]) == 0
        assert counted == [18, 9], more
    counted.clear()
    os.utime(train / "red" / "0.png", (1, 1))
    assert main(base) == 0 and counted == [18]
    values = [load_features(file).values for file in (tmp_path / "features").iterdir()]
    images = [v for v in values if len(v) == 18]
    # All but those of another time and another limit differ.
    different = {tuple(round(x, 4) for x in v.flatten()[:5].tolist()) for v in images}
    assert len(images) == 7 and len(different) == 5


def test_the_middle_is_taken(tmp_path):
    pixels = np.zeros((128, 128, 3), np.uint8)
    pixels[32:96, 32:96] = 255
    (tmp_path / "a").mkdir()
    Image.fromarray(pixels).save(tmp_path / "a" / "0.png")
    config, item = DataConfig(root=str(tmp_path)), Item(0, 0, 0, 0)
    half, whole = (
        LabelledImages(source_of(str(tmp_path)), config, (32, 32), crop)[item].image
        for crop in (0.5, 1.0)
    )
    assert half.min() == 255 and 0.15 < (whole == 255).double().mean() < 0.3


def test_of_many_images_some_are_taken(labelled):
    source = source_of(str(labelled[0]))
    images = LabelledImages(source, DataConfig(root="x"), (32, 32), most=6)
    labels = [images[Item(0, 0, 0, number)].label for number in range(len(images))]
    assert labels == ["blue", "blue", "green", "green", "red", "red"]


def test_what_cannot_be_read_or_has_no_class_is_left_out_and_said(
    options, counted, labelled, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(Source, "fingerprint", lambda source: source.root)
    train = coloured(tmp_path / "train", 4)
    good = (train / "red" / "0.png").read_bytes()
    (train / "red" / "0.png").write_bytes(b"no picture")
    Image.new("RGB", (9, 9)).save(train / "lost.png")
    (tmp_path / "val" / "violet").mkdir(parents=True)
    Image.new("RGB", (9, 9)).save(tmp_path / "val" / "violet" / "0.png")
    (tmp_path / "val" / "red").symlink_to(labelled[1] / "red")
    places = ["--data.root", str(train), "--data.val-root", str(tmp_path / "val"), "--overwrite"]
    assert main(["knn", *options, *places, "--k", "2"]) == 0
    result, said = found(tmp_path), capsys.readouterr().err
    assert result["train_images"] == 11 and result["images"] == 4
    assert result["unreadable"] == [str(train / "red" / "0.png")]
    assert "red/0.png (cannot identify image" in said and "left out" in said
    assert f"1 images of {train} have no class and are left out" in said
    assert "no class violet: 1 images of --data.val-root cannot be right" in said
    assert result["top1"] == 0.75
    # Nothing is kept of what was not whole: it may have been the network.
    state = (train / "red" / "0.png").stat()
    (train / "red" / "0.png").write_bytes(good)
    os.utime(train / "red" / "0.png", ns=(state.st_atime_ns, state.st_mtime_ns))
    assert main(["knn", *options, *places, "--k", "2"]) == 0
    assert found(tmp_path)["train_images"] == 12 and counted == [13, 4, 13]


def test_a_shard_that_is_down_is_named(options, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("greenmim.data.images.PAUSES", ())
    (tmp_path / "s-0.tar").write_bytes(b"junk")
    info = {"splits": {"train": {"filenames": ["s-0.tar"], "shard_lengths": [3]}}}
    (tmp_path / "_info.json").write_text(json.dumps(info))
    assert main(["knn", *options, "--data.root", f"wds/{tmp_path}/s-0.tar"]) == 2
    error = capsys.readouterr().err
    assert "s-0.tar" in error and "no tar file" in error and "no classes" not in error
    assert main(["knn", *options, "--data.root", "wds/pipe:cat x.tar"]) == 2
    assert "--data.num-samples" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (["--k", "19"], "--k is 19, and only 18 images can vote; lower it."),
        (["--data.root", "{one}"], "--data.root {one}: all its images are of one class, red"),
        (["--k", "0"], "--k is 0; it has to be above 0."),
        (["--data.root", "{flat}"], "--data.root {flat}: its images have no classes"),
        (["--data.val-root", "{flat}"], "--data.val-root {flat}: its images have no classes"),
        (["--data.val-root", "gone"], "There is no folder gone"),
        (["--output", "{flat}/a.txt"], "has to end in .json"),
        (["--output", "gone/a.json"], "there is no folder gone"),
        (["--checkpoint", "gone.pth"], "There is no checkpoint gone.pth."),
        (["--checkpoint", "{flat}/0.png"], "cannot be read"),
        (["--data.crop", "1.5"], "--data.crop is 1.5"),
        (["--data.max-pixels", "0"], "--data.max-pixels is 0; it has to be at least 1."),
        (["--temperature", ".nan"], "--temperature is nan; it has to be above 0 and finite."),
    ],
)
def test_errors_are_told(changed, said, options, tmp_path, capsys):
    flat = tmp_path / "flat"
    flat.mkdir()
    Image.new("RGB", (9, 9)).save(flat / "0.png")
    one = tmp_path / "one"
    (one / "red").mkdir(parents=True)
    Image.new("RGB", (9, 9)).save(one / "red" / "0.png")
    changed = [word.format(flat=flat, one=one) for word in changed]
    assert main(["knn", *options, *changed]) == 2
    error = capsys.readouterr().err
    assert said.format(flat=flat, one=one) in error and len(error.splitlines()) == 1
    assert not (tmp_path / "found.json").exists()


def test_data_must_be_named(options, capsys):
    place = options.index("--data.val-root")
    without = options[:place] + options[place + 2 :]
    assert main(["probe", *without]) == 2
    assert "--data.val-root is missing" in capsys.readouterr().err
    for given, said in (
        ("[]", "--lr is empty; give a number above 0."),
        (".inf", "--lr is inf; it has to be above 0 and finite."),
        ("[.nan, 0.1]", "--lr is nan; it has to be above 0 and finite."),
        ("[0.1, -1]", "--lr is -1.0; it has to be above 0"),
    ):
        assert main(["probe", *options, "--lr", given]) == 2
        assert said in capsys.readouterr().err
    assert main(["probe", *options, "--lr", "0.1", "--epochs", "2"]) == 0
    output = Path(options[-1])
    assert [rate["lr"] for rate in found(output.parent)["rates"]] == [0.1]
    # From Python a list will do; what JSON has no number for is null.
    place = dict(zip(options[::2], options[1::2], strict=True))
    data = LabelledData(root=place["--data.root"], val_root=place["--data.val-root"], workers=0)
    more = {"lr": [1e38, 0.1], "epochs": 9, "device": "cpu", "overwrite": True}
    result = probe(place["--checkpoint"], data, output, **more)
    text = output.read_text()
    assert "NaN" not in text and "Infinity" not in text
    assert json.loads(text) == result and result["rates"][0]["loss"] is None


def test_two_processes_find_what_one_does(options, tmp_path):
    more = ["--k", "3", "--data.batch-size", "2"]
    assert main(["knn", *options, *more, "--features", str(tmp_path / "one")]) == 0
    first = found(tmp_path)
    apart = ["--overwrite", "--features", str(tmp_path / "two")]
    said = run_crew(["knn", *options, *more, *apart], 2, tmp_path / "outputs")
    assert found(tmp_path) == first and said.count("top-1") == 1
    one, two = (sorted((tmp_path / name).iterdir()) for name in ("one", "two"))
    assert [file.name for file in one] == [file.name for file in two]
    for a, b in zip(one, two, strict=True):
        a, b = load_features(a), load_features(b)
        assert a.labels == b.labels
        torch.testing.assert_close(a.values, b.values, rtol=1e-5, atol=1e-5)


def test_a_model_in_training_is_looked_at_as_it_is_used(labelled):
    """Without the paths that it drops, and trains on after it."""
    config = ModelConfig(image_size=64, window_size=2, embed_dim=16, depths=(1, 1, 1, 2),
                         num_heads=(1, 2, 4, 8), decoder_dim=32, decoder_heads=2,
                         drop_path=0.9)  # fmt: skip
    model, data = GreenMIM(config).train(), DataConfig(root=str(labelled[1]))
    images = LabelledImages(source_of(data.root), data, (64, 64))
    collate = LabelledCollate(model.planner, Finish(data))
    with Processes(World(), torch.device("cpu")) as processes:
        sweep = Sweep(images, collate, 4, 0, None, processes)
        features = extract(sweep, model, contextlib.nullcontext)
    assert model.training
    batch = collate([images[Item(0, 0, 0, number)] for number in range(9)])
    torch.testing.assert_close(features.values, model.eval().embed(batch.images))
    assert features.labels == list(batch.labels) == ["blue"] * 3 + ["green"] * 3 + ["red"] * 3


# ---- whose encoder ------------------------------------------------------------------------------


def test_an_embedding_is_the_mean_of_timms_features():
    config = ModelConfig(image_size=64, window_size=2, embed_dim=16, depths=(2, 2, 2, 2),
                         num_heads=(1, 2, 4, 8), decoder_dim=32, decoder_heads=2)  # fmt: skip
    model = GreenMIM(config).double().eval()
    theirs = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=64, window_size=2, embed_dim=16, num_classes=0,
        depths=(2, 2, 2, 2), num_heads=(1, 2, 4, 8),
    ).double().eval()  # fmt: skip
    theirs.load_state_dict(convert_checkpoint(model.state_dict(), "greenmim", "timm"))
    for module in theirs.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = config.norm_eps
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(model.embed(images), theirs(images), rtol=1e-9, atol=1e-9)
        whole = model.plan(np.ones(4, dtype=bool))
        assert torch.equal(model.embed(images, whole), model.embed(images))
    with pytest.raises(ValueError, match=r"\[B, 3, 64, 64\]"):
        model.embed(images[..., :32])


def test_whoever_wrote_the_file_the_features_are_the_same(finished_run, tmp_path):
    path = finished_run / "checkpoints" / "last.pth"
    exported = tmp_path / "encoder.safetensors"
    assert main(["export", "--checkpoint", str(path), "--output", str(exported)]) == 0
    model, run = load_model(path)
    images = torch.rand(2, 3, *model.config.image_hw)
    expected = model.eval().embed(images)
    for file in (path, exported):
        other, facts = load_encoder(file)
        assert other.config.image_hw == model.config.image_hw
        assert torch.equal(other.eval().embed(images), expected)
        assert facts["data"]["mean"] == run["data"]["mean"]
    # Weights alone do not say that images were 96 x 64.
    images, found = torch.rand(2, 3, 64, 64), []
    for kind in ("official", "greenmim", "timm"):
        weights = convert_checkpoint(model.state_dict(), "greenmim", kind)
        torch.save({"model": weights}, tmp_path / "weights.pth")
        other, facts = load_encoder(tmp_path / "weights.pth")
        assert facts == {}
        found.append(other.eval().embed(images))
    assert torch.equal(found[0], found[1])
    torch.testing.assert_close(found[2], found[0], rtol=1e-3, atol=1e-3)  # with timm's epsilon
    table = "layers.0.blocks.0.attn.relative_position_bias_table"
    weights[table] = torch.zeros(15, 1)
    torch.save({"model": weights}, tmp_path / "weights.pth")
    with pytest.raises(UserError, match="its windows are not square"):
        load_encoder(tmp_path / "weights.pth")


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("kind", ["timm", "official", "greenmim"])
def test_sizes_are_known_from_weights_alone(name, kind):
    model = greenmim.create_model(name)
    weights = convert_checkpoint(model.state_dict(), "greenmim", kind)
    found, own = config_of(weights, {}), model.config
    assert found.norm_eps == (1e-5 if kind == "timm" and own.encoder == "swin" else 1e-6)
    for field in ("window_size", "embed_dim", "depths", "num_heads"):
        assert tuple(np.atleast_1d(getattr(found, field))) == tuple(
            np.atleast_1d(getattr(own, field))
        )
    assert found.image_hw == (224, 224)


# ---- while a run is watched ---------------------------------------------------------------------


def test_a_run_is_watched_and_goes_its_way(tiny, photos, labelled, tmp_path, monkeypatch, capsys):
    plain, watched = tmp_path / "plain", tmp_path / "watched"
    assert main(command(tiny, photos, plain)) == 0
    monkeypatch.setattr("greenmim.training.pretraining.NEIGHBOURS", 4)
    more = ("--data.probe-root", str(labelled[0]), "--log.probe-every-epochs", "1")
    assert main(command(tiny, photos, watched, *more)) == 0
    assert losses(plain) == losses(watched)
    rows = records(watched, "knn")
    assert [row["step"] for row in rows] == [4, 8]
    assert all((row["images"], row["k"], row["top1"], row["top5"]) == (18, 4, 1, 1) for row in rows)
    assert "4 nearest neighbours top-1 100.00 %" in capsys.readouterr().out
    board = EventAccumulator(str(watched / "tensorboard")).Reload()
    assert [event.step for event in board.Scalars("knn/top1")] == [4, 8]
    # Labels of others give another accuracy; a fault in it ends no run.
    shuffled = tmp_path / "shuffled"
    for number, file in enumerate(sorted(labelled[0].rglob("*.png"))):
        (shuffled / "abc"[number % 3]).mkdir(parents=True, exist_ok=True)
        shutil.copy(file, shuffled / "abc"[number % 3] / f"{number}.png")
    more = ("--data.probe-root", str(shuffled), "--log.probe-every-epochs", "2")
    assert main(command(tiny, photos, tmp_path / "shuffled_run", *more)) == 0
    assert records(tmp_path / "shuffled_run", "knn")[0]["top1"] < 0.6
    monkeypatch.setattr("greenmim.training.pretraining.neighbours_accuracy", lambda *_: 1 / 0)
    assert main(command(tiny, photos, tmp_path / "faulty", *more)) == 0
    assert "nearest neighbours were not measured: division by zero" in capsys.readouterr().out
    nowhere = command(tiny, photos, tmp_path / "none", "--data.probe-root", str(photos / "cats"))
    assert main(nowhere) == 2
    assert "its images have no classes" in capsys.readouterr().err


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_processes_find_what_one_does_while_they_train(strategy, resumable, labelled, tmp_path):
    more = ("--data.probe-root", str(labelled[0]), "--log.probe-every-epochs", "1")
    more += ("--strategy", strategy)
    found = []
    for size in (1, 2):
        run_crew(resumable(f"run{size}", size, *more), size, tmp_path / "outputs")
        found.append([row["top1"] for row in records(tmp_path / f"run{size}", "knn")])
    assert found[0] == pytest.approx(found[1], abs=0.06) and len(found[0]) == 2
