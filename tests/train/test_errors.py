"""Bad input: one line on stderr, exit code 2, and nothing written."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from greenmim.checkpoint import write_atomic
from greenmim.cli import main
from greenmim.guards import UserError, exit_code
from greenmim.launch import World
from greenmim.tools.loading import not_written
from greenmim.training import run_folder, startup
from greenmim.training.run_folder import RunFolder


def complaint(capsys, *arguments: str) -> str:
    """Run the command, expect exit code 2, and return its one line."""
    assert main(arguments) == 2
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("greenmim: error: ")
    assert captured.out == ""
    return lines[0]


def pretrain(tiny: Path, photos: Path | str, work_dir: Path, *more: str) -> list[str]:
    return [
        "pretrain",
        "--config",
        str(tiny),
        "--data.root",
        str(photos),
        "--work-dir",
        str(work_dir),
        *more,
    ]


def test_folder_of_images(tmp_path: Path, tiny: Path, capsys) -> None:
    work = tmp_path / "run"
    assert "no folder" in complaint(capsys, *pretrain(tiny, tmp_path / "nowhere", work))
    (tmp_path / "empty").mkdir()
    assert "no image in" in complaint(capsys, *pretrain(tiny, tmp_path / "empty", work))
    (tmp_path / "file.png").touch()
    assert "is a file" in complaint(capsys, *pretrain(tiny, tmp_path / "file.png", work))
    assert not work.exists()


def test_all_images_corrupt(tmp_path: Path, tiny: Path, capsys) -> None:
    (tmp_path / "bad").mkdir()
    for index in range(4):
        (tmp_path / "bad" / f"{index}.jpg").write_bytes(b"rubbish")
    text = complaint(capsys, *pretrain(tiny, tmp_path / "bad", tmp_path / "run"))
    assert "No image can be read" in text and "0.jpg" in text
    assert not (tmp_path / "run").exists()


def test_fewer_images_than_a_batch(tmp_path: Path, tiny: Path, photos: Path, capsys) -> None:
    text = complaint(capsys, *pretrain(tiny, photos, tmp_path / "run", "--data.batch-size", "13"))
    assert "--data.batch-size to 12 or less" in text and "--data.repeats to at least 3" in text
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("option", "value", "wanted"),
    [
        ("--epochs", "0", "--epochs is 0"),
        ("--epochs", "many", "--epochs many: give a whole number"),
        ("--mask.ratio", "1.0", "--mask.ratio is 1.0"),
        ("--mask.ratio", "0.9", "0.9 hides all 6 units"),
        ("--data.crop-scale", "[0.9,0.1]", "--data.crop-scale"),
        ("--schedule.warmup-epochs", "3", "--schedule.warmup-epochs is 3"),
        ("--optim.lr", "-1", "--optim.lr is -1"),
        ("--seed", str(2**63), "below 2**63"),
        ("--hang-minutes", ".inf", "at most 1e6, or null"),
        ("--data.mean", "[.nan,0,0]", "--data.mean"),
        ("--data.std", "[1,.inf,1]", "--data.std"),
        ("--optim.betas", "[0.9,1.0]", "--optim.betas"),
        ("--model.image-size", "100", "100"),
        ("--model.num-heads", "[3,2,4,8]", "cannot be split into 3 heads"),
        ("--backend", "triton", "triton"),
        ("--backend", "abacus", "abacus"),
        ("--precision", "fp16", "--precision fp16 needs CUDA"),
        ("--epoch-count", "3", "--epoch-count is no option"),
        ("--checkpoint.keep-last", "0", "--checkpoint.keep-last is 0"),
        ("--config", "greenmim_swin-giant", "`greenmim presets` lists them"),
        ("--resume", "nowhere.pth", "no checkpoint nowhere.pth"),
    ],
)
def test_values(
    option: str, value: str, wanted: str, tmp_path: Path, tiny: Path, photos: Path, capsys
) -> None:
    text = complaint(capsys, *pretrain(tiny, photos, tmp_path / "run", option, value))
    assert wanted in text
    assert not (tmp_path / "run").exists()


def test_missing_options_and_commands(tiny: Path, photos: Path, capsys) -> None:
    assert "--data.root" in complaint(capsys, "pretrain", "--config", str(tiny), "--work-dir", "x")
    assert "--work-dir" in complaint(
        capsys, "pretrain", "--config", str(tiny), "--data.root", str(photos)
    )
    assert "fly" in complaint(capsys, "fly")
    text = complaint(capsys, "reconstruct", "--images", "a", "--output", "b.png")
    assert "--checkpoint is missing" in text
    assert main([]) == 2


def test_a_run_that_goes_on_has_its_values(finished_run: Path, capsys) -> None:
    text = complaint(capsys, "pretrain", "--resume", "--work-dir", str(finished_run))
    assert f"the run's own values with --config {finished_run}/config.yaml" in text


@pytest.mark.parametrize(
    ("typed", "wanted"),
    [
        (["--data-root", "x"], "--data-root is no option; did you mean --data.root?"),
        (["--batch-size=3"], "--batch-size is no option; did you mean --data.batch-size?"),
        (["--workers", "2"], "--workers is no option; did you mean --data.workers?"),
        (["--lr", "2"], "--lr is no option; did you mean --optim.lr?"),
        (["--epoch", "2"], "--epoch is no option; did you mean --epochs?"),
        (["--quite-another", "2"], "--quite-another is no option ("),
        (["--steps", "2"], "--steps is no option ("),
        (["--every-steps=3"], "did you mean --checkpoint.every-steps or --log.every-steps?"),
        (["--config", "greenmim_swin-demo"], "Did you mean greenmim_swin-demo-cpu?"),
        (["--model.image-size", "224,320"], "or 2 whole numbers such as '[224, 224]'"),
        (["--optim.lr", "nan"], "--optim.lr nan: give a number or null"),
        (["--optim.lr", "-1e-3"], "one that begins with a dash is --optim.lr=-1e-3"),
        (["--dry-run=true"], "--dry-run takes no value; leave =true out"),
        (["--device", "tpu"], "--device tpu: give auto, cpu or cuda"),
        (["--compile", "perhaps"], "--compile perhaps: give true or false"),
        (["--launcher", "srun"], "--launcher srun: give none or slurm"),
        (["--epochs"], "--epochs needs a value: a whole number"),
        (["--epochs", "null"], "--epochs null: give a whole number"),
        (["--epochs", ""], "--epochs '': give a whole number"),
        (["--optim.betas", "0.9"], "--optim.betas 0.9: give 2 numbers such as '[0.9, 0.95]'"),
        (["--data", '{"decode": "fast"}'], "--data.decode fast: give full or reduced"),
        (["--sbatch", "x"], "--sbatch x: give JSON such as"),
        (["photos"], "photos belongs to no option"),
        (["my photos"], "my photos belongs to no option"),
        (["--help", "weather"], "--help weather: there are all, run, slurm, model"),
        (["--help=weather"], "--help weather: there are all, run, slurm, model"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_typos_and_types_are_told_in_words(typed, wanted, capsys) -> None:
    text = complaint(capsys, "pretrain", "--work-dir", "x", *typed)
    assert wanted in text
    for word in ("Literal", "<class", "Union", "NoneType", "unrecognized", "Got value"):
        assert word not in text


def test_commands_and_tools_are_told_in_words(capsys) -> None:
    assert "pretain is no command; did you mean pretrain?" in complaint(capsys, "pretain")
    text = complaint(capsys, "convert", "--input", "x", "--output", "y", "--target", "foo")
    assert "--target foo: give official, timm or greenmim" in text
    text = complaint(capsys, "export", "--ceckpoint", "x")
    assert "--ceckpoint is no option; did you mean --checkpoint?" in text


def test_broken_recipe_files(tmp_path: Path, photos: Path, capsys) -> None:
    recipe = tmp_path / "recipe.yaml"
    for content, wanted in (
        ("epochs: [3\n", "parsing"),
        ("epochz: 3\n", "--config has epochz, which is no option; did you mean epochs?"),
        ("data: {root: [1]}\n", "root"),
        ("epochs: many\n", f"{recipe} has epochs: many: give a whole number"),
        ("data: {batch_size: 1.5}\n", f"{recipe} has data.batch_size: 1.5: give a whole number"),
    ):
        recipe.write_text(content)
        assert wanted in complaint(capsys, *pretrain(recipe, photos, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_work_dir_that_cannot_be_made(tmp_path: Path, tiny: Path, photos: Path, capsys) -> None:
    (tmp_path / "file").write_text("mine")
    assert "is a file" in complaint(capsys, *pretrain(tiny, photos, tmp_path / "file"))
    assert "is a file" in complaint(capsys, *pretrain(tiny, photos, tmp_path / "file" / "run"))
    assert (tmp_path / "file").read_text() == "mine"
    assert "cannot be written" in complaint(
        capsys, *pretrain(tiny, photos, Path("/proc/greenmim-run"))
    )


def test_a_disk_without_room_for_a_checkpoint(
    tmp_path: Path, tiny: Path, photos: Path, capsys, monkeypatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    text = complaint(capsys, *pretrain(tiny, photos, tmp_path / "run"))
    wanted = "a checkpoint takes 5 MB, the run needs room for 3 and the disk has 1 MB left"
    assert wanted in text and "--checkpoint.keep-last" in text
    assert not (tmp_path / "run").exists()


def test_a_run_is_not_overwritten(finished_run: Path, tiny: Path, photos: Path, capsys) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished_run.rglob("*")}
    text = complaint(capsys, *pretrain(tiny, photos, finished_run))
    assert "already holds a run" in text and "--resume" in text
    assert {path: path.stat().st_mtime_ns for path in finished_run.rglob("*")} == before


def test_checkpoint_of_another_model(
    finished_run: Path, tiny: Path, photos: Path, tmp_path: Path, capsys
) -> None:
    last = str(finished_run / "checkpoints" / "last.pth")
    text = complaint(
        capsys,
        *pretrain(tiny, photos, tmp_path / "run", "--resume", last, "--model.embed-dim", "32"),
    )
    assert "another model" in text and "embed_dim is 16 there and 32" in text
    assert not (tmp_path / "run").exists()


def test_checkpoints_that_are_none(tiny: Path, photos: Path, tmp_path: Path, capsys) -> None:
    bad = tmp_path / "bad.pth"
    bad.write_bytes(b"not a checkpoint at all")
    assert "cannot be read" in complaint(
        capsys, *pretrain(tiny, photos, tmp_path / "r", "--resume", str(bad))
    )
    torch.save({"model": {}}, bad)
    assert "not written by" in complaint(
        capsys, *pretrain(tiny, photos, tmp_path / "r", "--resume", str(bad))
    )
    assert not (tmp_path / "r").exists()


def test_checkpoint_of_another_run_is_not_mixed_in(
    finished_run: Path, tiny: Path, photos: Path, tmp_path: Path, capsys
) -> None:
    foreign = tmp_path / "other.pth"
    foreign.write_bytes((finished_run / "checkpoints" / "last.pth").read_bytes())
    text = complaint(capsys, *pretrain(tiny, photos, finished_run, "--resume", str(foreign)))
    assert "not part of" in text


@pytest.mark.parametrize("more", [(), ("--dry-run",)])
def test_a_resumed_run_is_checked_before_it_starts_or_is_submitted(
    more, finished_run: Path, tiny: Path, photos: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    start = ("--resume", str(finished_run / "checkpoints" / "last.pth"), *more)
    sizes = ("--model.window-size", "4")
    text = complaint(capsys, *pretrain(tiny, photos, tmp_path / "run", *start, *sizes))
    assert "is of another model: window_size is 2 there and 4 in this recipe; set --model" in text
    text = complaint(capsys, *pretrain(tiny, photos, tmp_path / "run", *start))
    assert "is at or beyond the end of 2 epochs; raise --epochs" in text
    epochs = ("--epochs", "3")
    monkeypatch.setattr(RunFolder, "_free_bytes", lambda folder: 1000)
    text = complaint(capsys, *pretrain(tiny, photos, tmp_path / "run", *epochs, *start))
    assert "the run needs room for" in text
    monkeypatch.undo()
    real = run_folder.load_checkpoint

    def damaged(path, lazily=False):
        state = real(path, lazily)
        state["model"].popitem()
        return state

    monkeypatch.setattr(run_folder, "load_checkpoint", damaged)
    text = complaint(capsys, *pretrain(tiny, photos, tmp_path / "run", *epochs, *start))
    assert "The run's checkpoint is damaged: " in text and "name an older one" in text
    assert not (tmp_path / "run").exists()


def test_one_of_several_processes_tells_what_a_dry_run_found(
    tiny: Path, photos: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    for rank in ("0", "1"):
        for name, value in (("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", "2")):
            monkeypatch.setenv(name, value)
        assert main(pretrain(tiny, tmp_path / "nowhere", tmp_path / "run", "--dry-run")) == 2
        assert ("no folder" in capsys.readouterr().err) == (rank == "0")


@pytest.mark.parametrize(
    "names",
    [
        ("RANK", "LOCAL_RANK", "WORLD_SIZE"),
        (
            "SLURM_PROCID",
            "SLURM_LOCALID",
            "SLURM_STEP_NUM_TASKS",
            "SLURM_STEP_ID",
            "SLURM_STEP_NODELIST",
        ),
    ],
)
def test_one_job_is_submitted_not_one_by_each_process(
    names, tiny: Path, photos: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    for rank in ("0", "1"):
        for name, value in zip(names, (rank, rank, "2", "0", "a"), strict=False):
            monkeypatch.setenv(name, value)
        assert main(pretrain(tiny, photos, tmp_path / "run", "--launcher", "slurm")) == 2
        told = "--launcher slurm starts the processes itself; call it without torchrun or srun."
        assert (told in capsys.readouterr().err) == (rank == "0")


def test_what_cannot_be_written_is_told_once(tmp_path: Path) -> None:
    output = tmp_path / "a.pth"

    def fail(path: Path) -> None:
        raise RuntimeError("PytorchStreamWriter failed.")

    with pytest.raises(OSError) as error:
        write_atomic(fail, output)
    said = f"--output {output} cannot be written: PytorchStreamWriter failed."
    assert str(not_written(output, error.value)) == said
    full = OSError(errno.ENOSPC, "No space left on device", ".a.pth.12")
    assert str(not_written(output, full)).endswith("cannot be written: No space left on device.")


def test_more_updates_than_asked_for(
    finished_run: Path, tiny: Path, photos: Path, tmp_path: Path, capsys
) -> None:
    start = ("--resume", str(finished_run / "checkpoints" / "last.pth"), "--epochs", "9")
    text = complaint(capsys, *pretrain(tiny, photos, tmp_path / "run", *start, "--max-steps", "3"))
    assert "has 8 updates already, and --max-steps is 3; raise it" in text


def test_trackers_are_closed_where_a_run_does_not_start(
    tiny: Path, photos: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    closed = []
    tracker = SimpleNamespace(close=lambda: closed.append("closed"))

    def refuse(folder, recipe, resumed_at):
        raise UserError("somebody was faster")

    monkeypatch.setattr(startup, "make_trackers", lambda *_: [tracker])
    monkeypatch.setattr(RunFolder, "start", refuse)
    assert "somebody was faster" in complaint(capsys, *pretrain(tiny, photos, tmp_path / "run"))
    assert closed == ["closed"]


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (errno.EACCES, "/root/run: refused; use another path (--debug shows what for)."),
        (errno.ENAMETOOLONG, "/root/run: this name is too long; use a shorter one."),
    ],
)
def test_paths_that_the_system_refuses(number: int, said: str, capsys) -> None:
    def work() -> int:
        raise OSError(number, "refused", "/root/run")

    assert exit_code(work) == 2
    assert capsys.readouterr().err == f"greenmim: error: {said}\n"
    with pytest.raises(OSError):  # of something else than a path
        exit_code(lambda: (_ for _ in ()).throw(OSError(errno.EACCES, "refused")))


def test_debug_shows_the_traceback(tmp_path: Path, tiny: Path, monkeypatch) -> None:
    arguments = pretrain(tiny, tmp_path / "nowhere", tmp_path / "run")
    with pytest.raises(Exception, match="no folder"):
        main([*arguments, "--debug"])
    monkeypatch.setenv("GREENMIM_DEBUG", "1")
    with pytest.raises(Exception, match="no folder"):
        main(arguments)


def test_world_comes_from_the_environment(
    tiny: Path, photos: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    assert World.from_environment({}) == World(0, 0, 1)
    torchrun = {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8"}
    assert World.from_environment(torchrun) == World(5, 1, 8)
    with pytest.raises(UserError, match="RANK is '-1'"):
        World.from_environment({"RANK": "-1"})
    with pytest.raises(UserError, match="RANK is 2 but WORLD_SIZE is 1"):
        World.from_environment({"RANK": "2"})
    monkeypatch.setenv("RANK", "2")
    assert "RANK is 2 but" in complaint(capsys, *pretrain(tiny, photos, tmp_path / "run"))


# ---- reconstruct, convert -----------------------------------------------------------------------


def test_reconstruct(finished_run: Path, photos: Path, tmp_path: Path, capsys) -> None:
    last = str(finished_run / "checkpoints" / "last.pth")

    def text(
        checkpoint: str = last, images: str = str(photos), output: str = "p.png", *more: str
    ) -> str:
        return complaint(
            capsys,
            "reconstruct",
            "--checkpoint",
            checkpoint,
            "--images",
            images,
            "--output",
            str(tmp_path / output),
            *more,
        )

    assert "no checkpoint" in text(checkpoint=str(tmp_path / "no.pth"))
    assert "no image" in text(images=str(tmp_path / "no.png"))
    assert "has to end in" in text(output="p.doc")
    assert "no folder" in text(output="nowhere/p.png")
    assert "--mask-ratio: mask_ratio must be" in text(
        last, str(photos), "p.png", "--mask-ratio", "1.5"
    )
    torch.save({"model": {"weight": torch.zeros(2)}}, tmp_path / "other.pth")
    assert "--model" in text(checkpoint=str(tmp_path / "other.pth"))
    named = ("--model", "greenmim_swin_tiny_patch4_window7_224")
    assert "another model" in text(str(tmp_path / "other.pth"), str(photos), "p.png", *named)
    assert "is of another model and says itself which; leave it out" in text(
        last, str(photos), "p.png", *named
    )
    assert "unknown model 'swim'" in text(last, str(photos), "p.png", "--model", "swim")
    assert "/dev/null is neither an image file nor a folder" in text(images="/dev/null")
    (tmp_path / "bad.png").write_text("no picture")
    assert "bad.png cannot be read" in text(images=str(tmp_path / "bad.png"))
    assert not list(tmp_path.glob("*p.png"))
    mine = tmp_path / "mine.jpg"
    shutil.copy(photos / "0.png", mine)
    before = mine.read_bytes()
    assert "is there already; add --overwrite" in text(images=str(mine), output="mine.jpg")
    assert mine.read_bytes() == before
    (tmp_path / "folder.png").mkdir()
    assert "folder.png is a folder" in text(output="folder.png")
    assert main(["reconstruct", "--checkpoint", last, "--images", str(photos), "--output",
                 str(tmp_path / "CAPITALS.PNG")]) == 0  # fmt: skip
    arguments = ("--checkpoint", last, "--images", str(photos), "--output", str(mine))
    assert main(["reconstruct", *arguments, "--overwrite"]) == 0 and mine.read_bytes() != before


def test_convert(finished_run: Path, tmp_path: Path, capsys) -> None:
    last = str(finished_run / "checkpoints" / "last.pth")

    def text(*more: str, input: str = last, output: str = "o.safetensors") -> str:
        return complaint(
            capsys, "convert", "--input", input, "--output", str(tmp_path / output), *more
        )

    assert "no checkpoint" in text(input=str(tmp_path / "no.pth"))
    for name in ("o.onnx", "o.SAFETENSORS"):  # would be a pickle
        assert "has to end in one of .safetensors, .pth, .pt" in text(output=name)
    assert "no folder" in text(output="nowhere/o.pth")
    assert "not --source official" in text("--source", "official")
    assert "mxnet" in text("--target", "mxnet")
    # Its own merging is Swin's, and would be permuted.
    order = text("--merge-order", "row-major")
    assert f"row-major is of official weights, and {last} is --source greenmim" in order
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pth")
    assert "pass --source" in text(input=str(tmp_path / "other.pth"))
    (tmp_path / "bad.pth").write_bytes(b"rubbish")
    assert "cannot be read" in text(input=str(tmp_path / "bad.pth"))
    (tmp_path / "there.pth").write_text("mine")
    assert "--overwrite" in text(output="there.pth")
    assert (tmp_path / "there.pth").read_text() == "mine"
    assert not (tmp_path / "o.safetensors").exists()
