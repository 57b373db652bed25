"""The head's product on CUDA: bf16 factors, fp32 result."""

import torch


class FP32Product(torch.autograd.Function):
    """hidden [N, D] x weight [V, D] -> logits [N, V], see `fp32_product`."""

    @staticmethod
    def forward(ctx, hidden, weight):
        ctx.save_for_backward(hidden, weight)
        return torch.mm(hidden, weight.t(), out_dtype=torch.float32)

    @staticmethod
    def backward(ctx, grad):
        hidden, weight = ctx.saved_tensors
        grad = grad.to(weight.dtype)
        return grad @ weight, grad.t() @ hidden


def fp32_product(hidden, weight):
    """hidden [N, D] x weight [V, D], both bf16 on CUDA -> fp32 logits [N, V], differentiable in both.

    A bf16 result would round every log-prob to about 0.03 nats. Factors in fp32 would cost more time than all the
    blocks that phase one of BuPO runs.
    """
    return FP32Product.apply(hidden, weight)
