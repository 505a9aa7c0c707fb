"""The kernels in other people's models: one call, in place and undone by another.

from greenmim_kernels.integrations import fuse_window_attention

model = timm.create_model("swin_tiny_patch4_window7_224", pretrained=True)
print(fuse_window_attention(model))
"""

from .fuse import FusionReport, fuse_window_attention, unfuse_window_attention

__all__ = ["FusionReport", "fuse_window_attention", "unfuse_window_attention"]
