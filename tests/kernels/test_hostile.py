"""No tensor makes an operator of the CPU read or write what is not its own."""

from __future__ import annotations

import shutil

import hostile
import pytest
import sanitized
import torch
from hostile import CLEAR, attacks, bounded_memory, layouts_change_nothing, run_attacks

from greenmim_kernels.ops import SCHEMAS, operator

needs_sanitizer = pytest.mark.skipif(
    sanitized.preload() is None, reason="needs g++ and its libasan"
)


@pytest.mark.parametrize("name", hostile.ALL)
def test_hostile_tensors_raise_or_give_a_result(name, one_thread):
    with bounded_memory():
        counts = run_attacks((name,))
    assert counts[name, "raised"] > 20 and counts[name, "gave"] > 10
    assert sum(counts.values()) == sum(1 for _ in attacks(name))


@pytest.mark.parametrize("name", hostile.ALL)
def test_the_layout_in_memory_changes_nothing(name, one_thread):
    assert layouts_change_nothing((name,)) >= 3


def test_public_functions_refuse_them_with_words(one_thread):
    calls = list(hostile.public_attacks())
    with bounded_memory():
        for what, call in calls:
            with pytest.raises((*CLEAR, MemoryError)) as raised:
                call()
            assert str(raised.value).strip(), what
    assert len(calls) > 40


def test_bytes_of_a_bool_count_once():
    hostile.bools_of_other_bytes()


@pytest.mark.parametrize("name", SCHEMAS)
def test_shape_rules_count_in_64_bits(name):
    """Tensors of 2^31 elements and more, without memory."""
    arguments = [
        x.to("meta") if isinstance(x, torch.Tensor) else x for x in hostile.arguments_of(name)
    ]
    batch = 2**31  # images, of one partition
    for at, x in enumerate(arguments):
        if isinstance(x, torch.Tensor) and x.dim() > 1 and len(x) == hostile.CASE.batch:
            arguments[at] = x[:1].expand(batch, *x.shape[1:])
    results = operator(name)(*arguments)
    results = (results,) if isinstance(results, torch.Tensor) else results
    assert len(results[0]) == batch and results[0].numel() > 2**31


@needs_sanitizer
@pytest.mark.slow
def test_a_sanitizer_finds_nothing():
    done = sanitized.attacked(sanitized.build())
    assert done.returncode == 0, done.stderr[-4000:]
    assert "runtime error" not in done.stderr and "ERROR: AddressSanitizer" not in done.stderr
    assert done.stdout.endswith(" attacks\n") and int(done.stdout.split()[0]) > 3000


@needs_sanitizer
@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "right", "wrong"),
    [
        ("group_gather.cpp", "row < num_tokens && !seen[row]", "row <= num_tokens && !seen[row]"),
        ("sparse_depthwise_conv.cpp", "of[i] < tokens", "of[i] <= tokens"),
    ],
)
def test_a_planted_read_beyond_the_end_is_caught(file, right, wrong, tmp_path):
    shutil.copytree(sanitized.ROOT / "csrc", tmp_path / "csrc")
    source = tmp_path / "csrc" / "cpu" / file
    text = source.read_text()
    assert text.count(right) == 1
    source.write_text(text.replace(right, wrong))
    done = sanitized.attacked(sanitized.build(tmp_path))
    assert done.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr, done.stderr[-4000:]
