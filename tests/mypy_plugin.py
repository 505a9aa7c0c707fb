"""What a module holds, parameters and modules by names, is `Any` to the type checker.

torch says `Tensor | Module` of `nn.Module.__getattr__`: of `block.mlp` neither a call nor an
attribute would be known, and every line that uses one would need a cast.
"""

from __future__ import annotations

from collections.abc import Callable

from mypy.plugin import AttributeContext, Plugin
from mypy.types import AnyType, Type, TypeOfAny, UnionType, get_proper_type


class ModuleAttributes(Plugin):
    def get_attribute_hook(self, fullname: str) -> Callable[[AttributeContext], Type] | None:
        return _attribute if fullname.startswith("torch.nn.modules.module.Module.") else None


def _attribute(context: AttributeContext) -> Type:
    # Attributes that torch declares have other types.
    union = isinstance(get_proper_type(context.default_attr_type), UnionType)
    return AnyType(TypeOfAny.explicit) if union else context.default_attr_type


def plugin(version: str) -> type[Plugin]:
    return ModuleAttributes
