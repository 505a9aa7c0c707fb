"""The operators' namespace. A build for the Hugging Face Hub has a file of its own here, so that a
process can load several versions.
"""

import torch

ops = torch.ops.greenmim


def add_op_namespace_prefix(name: str) -> str:
    """The qualified name of an operator."""
    return f"{ops.name}::{name}"
