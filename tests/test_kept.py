"""What steps keep for their backward pass, counted."""

from __future__ import annotations

from benchmarks import kept
from greenmim import ModelConfig

SMALL = ModelConfig(
    image_size=96, window_size=7, embed_dim=16, depths=(2, 2, 2, 1), num_heads=(1, 2, 4, 8),
    decoder_dim=32, decoder_heads=2,
)  # fmt: skip


def test_each_step_keeps_less_than_the_one_before():
    rows = {row.name: row for row in kept.kept_by_all(SMALL, 0.75)}
    order = ["simmim", "naive", "ours", "ours, compiled", "ours, compiled, pointwise recomputed"]
    assert set(rows) == set(order)
    per_image = [rows[name].per_image for name in order]
    assert per_image == sorted(per_image, reverse=True) and per_image[-1] > 0
    assert per_image[-1] < 0.7 * per_image[1] and per_image[-1] < 0.3 * per_image[0]
    # Weights in 16 bits are kept too, unless they are cast again.
    weights = rows["ours"].state // kept.STATE_BYTES
    assert weights < rows["ours, compiled"].fixed < 3 * weights
    assert rows[order[-1]].fixed < 0.5 * weights
    assert rows["ours"].total(3) == 3 * rows["ours"].per_image + rows["ours"].fixed + 12 * weights
