"""Runs the models of other libraries on the kernels: ``print(fuse_window_attention(model))``."""

from .fuse import FusionReport, fuse_window_attention, unfuse_window_attention

__all__ = ["FusionReport", "fuse_window_attention", "unfuse_window_attention"]
