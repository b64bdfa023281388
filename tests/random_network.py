"""Networks drawn at random from what accelerate() has rules for, and from what it has none for."""

import random

import torch
import torch.nn.functional as F
from torch import nn

# Around vectors of 4, 8 and 16 lanes and the panels of the matrix kernels.
CHANNELS = (1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 24, 31, 32, 33, 48, 49, 63, 64, 65, 72, 80, 96, 97, 130)
ACTIVATIONS = (
    F.relu,
    F.relu6,
    F.hardswish,
    F.hardsigmoid,
    F.silu,
    torch.sigmoid,
    F.relu_,
    lambda x: F.hardswish(x, inplace=True),
    lambda x: x * F.relu6(x + 3) / 6,
    lambda x: F.relu6(x + 3, inplace=True) / 6,
    lambda x: x * torch.sigmoid(x),
    lambda x: F.hardtanh(x, 0, 6, inplace=True),
    F.gelu,
    torch.tanh,
)


def _fits(x, kernel, padding, dilation):
    return all(size + 2 * p >= dilation * (k - 1) + 1 for size, k, p in zip(x.shape[2:], kernel, padding, strict=True))


class RandomNetwork(nn.Module):
    """``random_network(seed)(x)``: a list of values grows from ``x``, each step reads some of them and appends one."""

    def __init__(self, seed: int):
        super().__init__()
        torch.manual_seed(seed)
        self.choose = random.Random(seed)
        pick = self.choose
        self.input_shape = (pick.choice((1, 2, 3)), pick.choice(CHANNELS), pick.randint(1, 20), pick.randint(1, 20))
        self.layers = nn.ModuleList()
        self.steps = []
        self.names = []
        values = [torch.zeros(self.input_shape)]
        makers = [getattr(self, name) for name in dir(self) if name.startswith("draw_")]
        weights = [
            4 if maker.__name__ in ("draw_block", "draw_pointwise", "draw_depthwise", "draw_activation") else 1
            for maker in makers
        ]
        self.eval()
        with torch.no_grad():
            while len(self.steps) < 3 + seed % 14:
                (maker,) = pick.choices(makers, weights)
                index = len(values) - 1 if pick.random() < 0.8 else pick.randrange(len(values))
                step = maker(index, values)
                if step is None:
                    continue
                result = step(self, [value.clone() for value in values])
                if result.numel() == 0 or result.numel() > 400_000:
                    continue
                self.steps.append(step)
                self.names.append(maker.__name__.removeprefix("draw_"))
                values.append(result)
            self.outputs = sorted({len(values) - 1, *pick.sample(range(1, len(values)), pick.randint(0, 2))})
        del self.choose

    def forward(self, x):
        values = [x]
        for step in self.steps:
            values.append(step(self, values))
        pooled = values[-1].mean((2, 3))
        return [values[i] for i in self.outputs], pooled

    def layer(self, layer):
        """Its place among the layers: a copy of this network has layers of its own."""
        self.layers.append(layer.eval())
        return len(self.layers) - 1

    # Each gives a step, a function of the values so far, or None where the value with this index does not suit it.

    def draw_pointwise(self, i, values):
        conv = self.layer(
            nn.Conv2d(values[i].shape[1], self.choose.choice(CHANNELS), 1, bias=self.choose.random() < 0.5)
        )
        return lambda s, v: s.layers[conv](v[i])

    def draw_block(self, i, values):
        """An inverted residual with some of its parts."""
        pick, c = self.choose, values[i].shape[1]
        hidden, kernel, stride = pick.choice(CHANNELS), pick.choice((3, 5)), pick.choice((1, 1, 2))
        out = c if stride == 1 else pick.choice(CHANNELS)
        expand = self.layer(nn.Conv2d(c, hidden, 1, bias=False))
        depthwise = self.layer(nn.Conv2d(hidden, hidden, kernel, stride, kernel // 2, groups=hidden, bias=False))
        project = self.layer(nn.Conv2d(hidden, out, 1, bias=pick.random() < 0.5))
        norms = [self.norm(size) for size in (hidden, hidden, out)]
        first, second = pick.choice(ACTIVATIONS), pick.choice(ACTIVATIONS)
        squeeze_excite = self.draw_squeeze_excite(0, [torch.empty(1, hidden, 1, 1)]) if pick.random() < 0.5 else None
        gated_before = pick.random() < 0.5
        residual = stride == 1 and pick.random() < 0.7

        def step(s, v):
            x = first(s.layers[norms[0]](s.layers[expand](v[i])))
            x = s.layers[norms[1]](s.layers[depthwise](x))
            x = x if gated_before else second(x)
            x = squeeze_excite(s, [x]) if squeeze_excite else x
            x = second(x) if gated_before else x
            x = s.layers[norms[2]](s.layers[project](x))
            return x.add_(v[i]) if residual else x

        return step

    def draw_dense(self, i, values):
        pick, c = self.choose, values[i].shape[1]
        kernel = (pick.randint(1, 5), pick.randint(1, 5))
        padding = pick.choice(("same", (kernel[0] // 2, kernel[1] // 2), (pick.randint(0, 3), pick.randint(0, 3))))
        stride = 1 if padding == "same" else pick.randint(1, 2)
        dilation = pick.choice((1, 1, 2))
        if padding != "same" and not _fits(values[i], kernel, padding, dilation):
            return None
        conv = self.layer(nn.Conv2d(c, pick.choice(CHANNELS[:14]), kernel, stride, padding, dilation))
        return lambda s, v: s.layers[conv](v[i])

    def draw_depthwise(self, i, values):
        pick, c = self.choose, values[i].shape[1]
        kernel = pick.choice((1, 2, 3, 5, 7, (3, 1), (1, 5), (2, 4)))
        kernel = kernel if isinstance(kernel, tuple) else (kernel, kernel)
        padding, dilation = (kernel[0] // 2, kernel[1] // 2), pick.choice((1, 1, 1, 2))
        if not _fits(values[i], kernel, padding, dilation):
            return None
        multiplier = pick.choice((1, 1, 1, 1, 2))
        conv = self.layer(nn.Conv2d(c, c * multiplier, kernel, pick.choice((1, 1, 2)), padding, dilation, groups=c))
        return lambda s, v: s.layers[conv](v[i])

    def draw_padded(self, i, values):
        c = values[i].shape[1]
        pads = [self.choose.randint(0, 2) for _ in range(4)]
        conv = self.layer(nn.Conv2d(c, c, 2, groups=self.choose.choice((1, c))))
        if min(values[i].shape[2:]) < 2:
            return None
        return lambda s, v: s.layers[conv](F.pad(v[i], pads))

    def draw_norm(self, i, values):
        norm = self.norm(values[i].shape[1])
        return lambda s, v: s.layers[norm](v[i])

    def norm(self, channels):
        layer = nn.BatchNorm2d(channels, eps=self.choose.choice((1e-5, 1e-3)))
        layer.running_mean.normal_(0, 0.5)
        layer.running_var.uniform_(0.3, 1.5)
        nn.init.uniform_(layer.weight, 0.5, 1.5)
        nn.init.normal_(layer.bias, 0, 0.5)
        return self.layer(layer)

    def draw_activation(self, i, values):
        activation = self.choose.choice(ACTIVATIONS)
        return (lambda s, v: activation(v[i])) if i else None  # the input is not written to

    def draw_sum(self, i, values):
        j = self.choose.choice([j for j, value in enumerate(values) if value.shape == values[i].shape])
        return self.choose.choice(
            (lambda s, v: v[i] + v[j], lambda s, v: F.relu(v[j] + v[i]), lambda s, v: torch.add(v[i], v[j], alpha=0.5))
        )

    def draw_sum_in_place(self, i, values):
        others = [j for j, value in enumerate(values) if value.shape == values[i].shape and j != i]
        if not i or not others:
            return None
        j = self.choose.choice(others)
        return lambda s, v: v[i].add_(v[j])

    def draw_product(self, i, values):
        j = self.choose.choice([j for j, value in enumerate(values) if value.shape == values[i].shape])
        return lambda s, v: v[i] * torch.tanh(v[j])

    def draw_squeeze_excite(self, i, values):
        pick, c = self.choose, values[i].shape[1]
        hidden = pick.choice(CHANNELS[:12])
        activation, gate = pick.choice((F.relu, F.silu, F.relu6)), pick.choice((torch.sigmoid, F.hardsigmoid))
        if pick.random() < 0.5:
            a, b = self.layer(nn.Conv2d(c, hidden, 1)), self.layer(nn.Conv2d(hidden, c, 1, bias=pick.random() < 0.5))
            return lambda s, v: v[i] * gate(s.layers[b](activation(s.layers[a](F.adaptive_avg_pool2d(v[i], 1)))))
        a, b = self.layer(nn.Linear(c, hidden)), self.layer(nn.Linear(hidden, c))
        return lambda s, v: (
            gate(s.layers[b](activation(s.layers[a](v[i].mean((2, 3))))))[:, :, None, None].expand_as(v[i]) * v[i]
        )

    def draw_gate(self, i, values):
        shape = (*values[i].shape[:2], 1, 1)
        gates = [j for j, value in enumerate(values) if value.shape == shape]
        if not gates:
            return None
        j = self.choose.choice(gates)
        return lambda s, v: v[i] * torch.sigmoid(v[j])

    def draw_pool(self, i, values):
        return self.choose.choice(
            (
                lambda s, v: F.adaptive_avg_pool2d(v[i], 1),
                lambda s, v: v[i].mean((2, 3), keepdim=True),
                lambda s, v: F.max_pool2d(v[i], 3, 2, 1),
                lambda s, v: F.avg_pool2d(v[i], 2, 1, 1),
            )
        )

    def draw_cat(self, i, values):
        c = values[i].shape
        others = [j for j, value in enumerate(values) if (value.shape[0], *value.shape[2:]) == (c[0], *c[2:])]
        j = self.choose.choice(others)
        return lambda s, v: torch.cat([v[i], v[j]], 1)

    def draw_split(self, i, values):
        c = values[i].shape[1]
        return (lambda s, v: v[i].split([c // 3, c - c // 3], 1)[1]) if c > 3 else None

    def draw_mixed(self, i, values):
        """Depthwise convolutions of several sizes, each of some of the channels, as in MixNet."""
        pick, c = self.choose, values[i].shape[1]
        if c < 3:
            return None
        first, stride = pick.randint(1, c - 1), pick.choice((1, 2))
        sizes, kernels = (first, c - first), (3, pick.choice((1, 5, 7)))
        convs = [
            self.layer(nn.Conv2d(size, size, k, stride, k // 2, groups=size, bias=False))
            for size, k in zip(sizes, kernels, strict=True)
        ]
        norm, activation = self.norm(c), pick.choice(ACTIVATIONS)

        def step(s, v):
            parts = [s.layers[conv](part) for conv, part in zip(convs, v[i].split(sizes, 1), strict=True)]
            return activation(s.layers[norm](torch.cat(parts, 1)))

        return step

    def draw_shuffle(self, i, values):
        n, c, h, w = values[i].shape
        return (lambda s, v: v[i].view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)) if c % 2 == 0 else None

    def draw_scale(self, i, values):
        number = self.choose.choice((0.5, -1.0, 1 / 6, 3))
        return self.choose.choice(
            (lambda s, v: v[i] * number, lambda s, v: v[i] + number, lambda s, v: v[i] / 6, lambda s, v: number - v[i])
        )
