"""A small model, and what stands in for a CUDA graph where there is no GPU."""

from __future__ import annotations

from greenmim import ModelConfig
from greenmim.training import passes

CONFIG = ModelConfig(
    image_size=64, window_size=2, embed_dim=16, depths=(1, 2, 1, 1), num_heads=(1, 2, 4, 8),
    decoder_dim=32, decoder_heads=2,
)  # fmt: skip


class Recording:
    """What a graph does, without a GPU: replays write where the recorded call wrote."""

    count = 0

    def __call__(self, work, prepare):
        for _ in range(passes.WARM_UP):
            prepare()
            work()
        prepare()
        self.count += 1
        return lambda: (prepare(), work())
