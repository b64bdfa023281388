"""Batch norm with an activation behind it."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from torch import Tensor, nn

from .. import functional, reference
from .dispatch import kernels_serve, known


@known
class BatchNormAct2d(nn.BatchNorm2d):
    """``activation(nn.BatchNorm2d(num_features, ...)(input))``

    An `nn.BatchNorm2d` in constructor, attributes and state_dict. In eval mode, tensors that
    `mobilenet_fast.functional` has kernels for and that need no gradient run in one, in one pass; everything else, and
    training, runs as `nn.BatchNorm2d` does. Of half-precision images, parameters and statistics may be float32.
    What `nn.SyncBatchNorm.convert_sync_batchnorm` makes of it, a `SyncBatchNormAct`, keeps the activation.

    Args:
        num_features, eps, momentum, affine, track_running_stats, device, dtype: as `nn.BatchNorm2d` takes them.
        activation: "none", "relu", "relu6", "hardswish", "hardsigmoid", "silu" or "sigmoid".

    Shape:
        (N, C, H, W) → the same, in the layout that `nn.BatchNorm2d` gives. The error is that of
        `mobilenet_fast.functional.batch_norm_act`.

    Raises:
        ValueError: ``activation`` is another.

    Batch Normalization (Ioffe and Szegedy, 2015, arXiv:1502.03167), section 3.1.
    """

    # On the class as well, for a layer that replace_layers turned into this one has none of its own.
    activation: str | None = "none"

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device=None,
        dtype=None,
        *,
        activation: str = "none",
    ) -> None:
        reference.check_activation("BatchNormAct2d", activation)
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        self.activation = activation

    def forward(self, input: Tensor) -> Tensor:
        if self.kernel_serves(input):
            return functional.batch_norm_act(
                input,
                self.running_mean,
                self.running_var,
                self.weight,
                self.bias,
                eps=self.eps,
                activation=self.activation,
            )
        return self.plain_forward(input)

    def plain_forward(self, input: Tensor) -> Tensor:
        return reference.activation(super().forward(input), self.activation)

    def kernel_serves(self, input: Tensor) -> bool:
        return (
            uses_running_statistics(self)
            and self.activation is not None
            and kernels_serve(input, norm=(self.running_mean, self.running_var, self.weight, self.bias))
        )

    def extra_repr(self) -> str:
        return super().extra_repr() + ("" if self.activation == "none" else f", activation={self.activation}")

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        caller = sys._getframe(1)
        asks = caller.f_code is nn.SyncBatchNorm.convert_sync_batchnorm.__func__.__code__
        if asks and self.activation is not None:
            # PyTorch's conversion asks for the children of what it replaces, and for no activation. It goes on to
            # return this layer of its own.
            layer = caller.f_locals["module_output"]
            layer.__class__, layer.activation = SyncBatchNormAct, self.activation
        return super().named_children()


class SyncBatchNormAct(nn.SyncBatchNorm):
    """``activation(nn.SyncBatchNorm(input))``: what PyTorch's conversion makes of a `BatchNormAct2d`."""

    activation: str = "none"

    def forward(self, input: Tensor) -> Tensor:
        return reference.activation(super().forward(input), self.activation)

    def extra_repr(self) -> str:
        return super().extra_repr() + ("" if self.activation == "none" else f", activation={self.activation}")


def uses_running_statistics(norm: nn.BatchNorm2d) -> bool:
    buffers = norm._buffers
    return not norm.training and buffers.get("running_mean") is not None and buffers.get("running_var") is not None
