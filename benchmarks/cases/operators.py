"""Single operators, in the shapes that MobileNetV3-Large and V2 have."""

from torch import nn

from benchmarks.cases.registry import Problem, case, inputs

ACTIVATIONS = {
    "none": nn.Identity,
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "hardswish": nn.Hardswish,
    "hardsigmoid": nn.Hardsigmoid,
    "silu": nn.SiLU,
    "sigmoid": nn.Sigmoid,
}
CONVOLUTION_DIRECTIONS = ("forward", "forward+input", "forward+weight", "forward+both")
BATCH_NORM_DIRECTIONS = ("forward", "training")
SQUEEZE_EXCITE_DIRECTIONS = ("forward", "forward+both")


def batch_norm_act(channels, size, activation):
    def make(batch):
        from mobilenet_fast import functional

        norm = nn.BatchNorm2d(channels)
        for parameter in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            nn.init.uniform_(parameter, 0.5, 1.5)
        module = nn.Sequential(norm, ACTIVATIONS[activation]()).eval()

        def fused(x):
            return functional.batch_norm_act(
                x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps, activation=activation
            )

        def layer():
            from mobilenet_fast.nn import BatchNormAct2d

            ours = BatchNormAct2d(channels, eps=norm.eps, activation=activation)
            ours.load_state_dict(norm.state_dict())
            return ours.to(norm.weight.device, norm.weight.dtype)

        return Problem(module, inputs(batch, channels, size, size), fused, layer)

    return make


class PlainSqueezeExcite(nn.Module):
    def __init__(self, channels, squeeze_channels, activation, gate):
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc1 = nn.Conv2d(channels, squeeze_channels, 1)
        self.activation = ACTIVATIONS[activation]()
        self.fc2 = nn.Conv2d(squeeze_channels, channels, 1)
        self.gate = ACTIVATIONS[gate]()

    def forward(self, x):
        return x * self.gate(self.fc2(self.activation(self.fc1(self.pool(x)))))


def squeeze_excite(channels, size, squeeze_channels, activation="relu", gate="hardsigmoid"):
    def make(batch):
        from mobilenet_fast import functional

        module = PlainSqueezeExcite(channels, squeeze_channels, activation, gate).eval()

        def fused(x):
            fc1, fc2 = module.fc1, module.fc2
            activations = {"squeeze_activation": activation, "gate_activation": gate}
            return functional.squeeze_excite(x, fc1.weight, fc1.bias, fc2.weight, fc2.bias, **activations)

        return Problem(module, inputs(batch, channels, size, size), fused)

    return make


def depthwise_conv2d(channels, size, kernel, stride, activation):
    def make(batch):
        from mobilenet_fast import functional

        conv = nn.Conv2d(channels, channels, kernel, stride, kernel // 2, groups=channels)
        module = nn.Sequential(conv, ACTIVATIONS[activation]()).eval()

        def fused(x):
            return functional.depthwise_conv2d(
                x, conv.weight, conv.bias, conv.stride, conv.padding, activation=activation
            )

        return Problem(module, inputs(batch, channels, size, size), fused)

    return make


def pointwise_conv2d(channels, out_channels, size, activation):
    def make(batch):
        from mobilenet_fast import functional

        conv = nn.Conv2d(channels, out_channels, 1)
        module = nn.Sequential(conv, ACTIVATIONS[activation]()).eval()

        def fused(x):
            return functional.pointwise_conv2d(x, conv.weight, conv.bias, activation=activation)

        return Problem(module, inputs(batch, channels, size, size), fused)

    return make


for _c, _size, _act in [
    (16, 112, "hardswish"),
    (72, 56, "relu"),
    (120, 28, "relu"),
    (192, 28, "relu6"),
    (672, 14, "hardswish"),
    (960, 7, "hardswish"),
]:
    case("operators", f"batch_norm_act {_c}x{_size}x{_size} {_act}", directions=BATCH_NORM_DIRECTIONS)(
        batch_norm_act(_c, _size, _act)
    )

for _c, _size, _s in [(72, 28, 24), (120, 28, 32), (480, 14, 120), (672, 14, 168), (960, 7, 240)]:
    case("operators", f"squeeze_excite {_c}x{_size}x{_size} squeeze {_s}", directions=SQUEEZE_EXCITE_DIRECTIONS)(
        squeeze_excite(_c, _size, _s)
    )

for _c, _size, _k, _stride, _act in [
    (16, 112, 3, 1, "relu"),
    (64, 112, 3, 2, "relu"),
    (72, 56, 3, 1, "relu"),
    (72, 56, 5, 2, "relu"),
    (120, 28, 5, 1, "relu"),
    (240, 28, 3, 2, "hardswish"),
    (480, 14, 3, 1, "hardswish"),
    (672, 14, 5, 1, "hardswish"),
    (672, 14, 5, 2, "hardswish"),
    (960, 7, 5, 1, "hardswish"),
]:
    case("operators", f"depthwise_conv2d {_c}x{_size}x{_size} k{_k} s{_stride}", directions=CONVOLUTION_DIRECTIONS)(
        depthwise_conv2d(_c, _size, _k, _stride, _act)
    )

for _c, _out, _size, _act in [
    (16, 64, 112, "relu"),
    (64, 24, 56, "none"),
    (24, 72, 56, "relu"),
    (40, 120, 28, "relu"),
    (120, 40, 28, "none"),
    (80, 480, 14, "hardswish"),
    (672, 112, 14, "none"),
    (160, 960, 7, "hardswish"),
    (960, 160, 7, "none"),
]:
    case("operators", f"pointwise_conv2d {_c}to{_out} {_size}x{_size}", directions=CONVOLUTION_DIRECTIONS)(
        pointwise_conv2d(_c, _out, _size, _act)
    )
