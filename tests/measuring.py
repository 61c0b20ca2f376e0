"""What a computation makes on its way: the largest tensor, and the custom operators met."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from attamba.ops.chunk_attention.torch import _backward, _forward

IMPLEMENTATIONS = {
    torch.ops.attamba.chunk_attention.default: _forward._init_fn,
    torch.ops.attamba.chunk_attention_backward.default: _backward._init_fn,
}


class LargestTensor(TorchDispatchMode):
    """elements: of the largest storage made, inside the custom operators too."""

    def __init__(self) -> None:
        super().__init__()
        self.elements, self.operators = 0, set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in IMPLEMENTATIONS:
            self.operators.add(func)
            with self:
                return IMPLEMENTATIONS[func](*args, **(kwargs or {}))
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor):
                self.elements = max(self.elements, t.untyped_storage().nbytes() // t.itemsize)
        return out
