"""The operators' namespace. A build for the Hugging Face Hub replaces this file, so that one
process can load several versions.
"""

import torch

ops = torch.ops.greenmim


def add_op_namespace_prefix(name: str) -> str:
    """The qualified name of an operator."""
    return f"{ops.name}::{name}"
