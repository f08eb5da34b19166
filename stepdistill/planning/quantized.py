"""Quantised linear layers without numbers: the sizes and operations of torchao's and bitsandbytes'.

int8  torchao multiplies by the weight cast to the activation's dtype and scales the rows after;
      autograd keeps that cast until the layer's backward, so only checkpointing holds it short.
nf4   bitsandbytes unpacks for one product at a time, in the backward pass again, and keeps nothing.
"""

# Shapes: B batch and tokens, K inputs, N outputs.

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from stepdistill.loading.quantization import BLOCK

SECOND_BLOCK = 256  # scales of nf4 that share a second, float32 scale


class PackedLinear(nn.Linear):
    """A linear layer whose weight is held packed: int8 (N, K), or nf4 (N K / 2, 1)."""

    def __init__(self, plain: nn.Linear, kind: str) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = plain.in_features, plain.out_features
        self.kind, self.bias = kind, plain.bias
        count = plain.weight.numel()
        if kind == "int8":
            held = torch.empty_like(plain.weight, dtype=torch.int8)
            scales = [torch.empty(plain.out_features, device="meta")]
        else:
            held = torch.empty(-(-count // 2), 1, dtype=torch.uint8, device="meta")
            blocks = -(-count // BLOCK)
            scales = [
                torch.empty(blocks, dtype=torch.uint8, device="meta"),
                torch.empty(-(-blocks // SECOND_BLOCK), device="meta"),
            ]
        self.weight = nn.Parameter(held, requires_grad=False)
        self.scales = nn.ParameterList(nn.Parameter(s, requires_grad=False) for s in scales)

    def forward(self, x: Tensor) -> Tensor:
        """(..., N) of x (..., K), in x's dtype."""
        if self.kind == "int8":
            flat = x.reshape(-1, self.in_features) @ self.weight.t().to(x.dtype)
            out = flat * self.scales[0].to(flat.dtype)
            out = out.reshape(*x.shape[:-1], self.out_features)
        else:
            out = _Unpacked.apply(x, self.out_features)
        if self.bias is not None:
            out = out + self.bias
        return out.to(x.dtype)


class _Unpacked(torch.autograd.Function):
    """x (..., K) times a weight that exists for the product alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: int) -> Tensor:
        ctx.weight = (rows, x.shape[-1])
        return x @ x.new_empty(ctx.weight).t()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] @ grads[0].new_empty(ctx.weight), None


def pack(net: Any, kind: str) -> None:
    """Replace every linear layer of a blueprint's denoiser, as the loaders of `kind` do."""
    for module in list(net.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, PackedLinear(child, kind))
    net.register_to_config(quantization_config={"quant_method": kind})
