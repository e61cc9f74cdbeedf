"""Correct normalizations as students and courses write them, each in another style."""

import math
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import normlab as nl

RIGHT = []


def right(kind, **options):
    def keep(candidate):
        RIGHT.append((kind, candidate, options))
        return candidate

    return keep


# --- batch normalization ------------------------------------------------------------------------


@right("bn")
def bn_plain(x):
    mean = x.mean(dim=(0, 2, 3), keepdim=True)
    var = x.var(dim=(0, 2, 3), unbiased=False, keepdim=True)
    return (x - mean) / torch.sqrt(var + 1e-5)


@right("bn")
def bn_var_mean(x, gamma, beta, eps=1e-5):
    var, mean = torch.var_mean(x, dim=(0, 2, 3), correction=0, keepdim=True)
    return gamma[None, :, None, None] * (x - mean) * torch.rsqrt(var + eps) + beta[:, None, None]


@right("bn")
def bn_numpy(x, gamma, beta, eps):
    mu = x.mean(axis=(0, 2, 3), keepdims=True)
    sigma2 = x.var(axis=(0, 2, 3), keepdims=True)
    return gamma.reshape(1, -1, 1, 1) * (x - mu) / np.sqrt(sigma2 + eps) + beta.reshape(1, -1, 1, 1)


@right("bn")
def bn_neither_numpy_nor_torch(x, scale, shift):
    variance = x.var(axis=(0, 2, 3), keepdims=True)  # in numpy that divides by n
    out = (x - x.mean(axis=(0, 2, 3), keepdims=True)) / (variance + 1e-5) ** 0.5
    return out * scale.reshape(1, -1, 1, 1) + shift.reshape(1, -1, 1, 1)


@right("bn")
def bn_nested_loops(x, gamma, beta):
    n, c, h, w = x.shape
    out = torch.empty_like(x)
    for k in range(c):
        total = 0.0
        for i in range(n):
            for r in range(h):
                for s in range(w):
                    total = total + x[i, k, r, s]
        mean = total / (n * h * w)
        squares = 0.0
        for i in range(n):
            for r in range(h):
                for s in range(w):
                    squares = squares + (x[i, k, r, s] - mean) ** 2
        std = (squares / (n * h * w) + 1e-5) ** 0.5
        for i in range(n):
            out[i, k] = gamma[k] * (x[i, k] - mean) / std + beta[k]
    return out


@right("bn")
def bn_python_lists(x):
    numbers = x.tolist()
    count = len(numbers) * len(numbers[0][0]) * len(numbers[0][0][0])
    for channel in range(len(numbers[0])):
        flat = [v for image in numbers for row in image[channel] for v in row]
        mean = sum(flat) / count
        std = math.sqrt(sum((v - mean) ** 2 for v in flat) / count + 1e-5)
        for image in numbers:
            image[channel] = [[(v - mean) / std for v in row] for row in image[channel]]
    return np.array(numbers)


@right("bn")
def bn_channels_first(x, weight, bias):
    flat = x.permute(1, 0, 2, 3).reshape(x.shape[1], -1)
    mean, var = flat.mean(1, keepdim=True), flat.var(1, correction=0, keepdim=True)
    flat = (flat - mean) / (var + 1e-5).sqrt() * weight[:, None] + bias[:, None]
    return flat.view(x.shape[1], x.shape[0], *x.shape[2:]).permute(1, 0, 2, 3)


@right("bn")
def bn_einsum(x, gamma, beta):
    n = x.shape[0] * x.shape[2] * x.shape[3]
    mean = torch.einsum("nchw->c", x) / n
    centred = x - mean.view(1, -1, 1, 1)
    var = torch.einsum("nchw,nchw->c", centred, centred) / n
    return torch.einsum("nchw,c->nchw", centred, gamma / (var + 1e-5).sqrt()) + beta.view(-1, 1, 1)


@right("bn")
def bn_mean_of_squares(x, g, b, e=1e-5):
    mean = x.mean((0, 2, 3), True)
    var = (x * x).mean((0, 2, 3), True) - mean * mean
    return g.view(1, -1, 1, 1) * ((x - mean) / (var + e).sqrt()) + b.view(1, -1, 1, 1)


@right("bn")
def bn_d2l(X, gamma, beta, moving_mean, moving_var, eps, momentum):
    if not torch.is_grad_enabled():
        X_hat = (X - moving_mean) / torch.sqrt(moving_var + eps)
    else:
        mean = X.mean(dim=(0, 2, 3), keepdim=True)
        var = ((X - mean) ** 2).mean(dim=(0, 2, 3), keepdim=True)
        X_hat = (X - mean) / torch.sqrt(var + eps)
        n = X.numel() / X.shape[1]
        moving_mean = (1.0 - momentum) * moving_mean + momentum * mean
        moving_var = (1.0 - momentum) * moving_var + momentum * var * n / (n - 1)
    Y = gamma * X_hat + beta
    return Y, moving_mean.data, moving_var.data


@right("bn")
class D2lBatchNorm(nn.Module):
    def __init__(self, num_features, num_dims):
        super().__init__()
        shape = (1, num_features) if num_dims == 2 else (1, num_features, 1, 1)
        self.gamma = nn.Parameter(torch.ones(shape))
        self.beta = nn.Parameter(torch.zeros(shape))
        self.moving_mean = torch.zeros(shape)
        self.moving_var = torch.ones(shape)

    def forward(self, X):
        if self.moving_mean.device != X.device:
            self.moving_mean = self.moving_mean.to(X.device)
            self.moving_var = self.moving_var.to(X.device)
        Y, self.moving_mean, self.moving_var = bn_d2l(
            X, self.gamma, self.beta, self.moving_mean, self.moving_var, eps=1e-5, momentum=0.1
        )
        return Y


@right("bn")
def bn_cs231n(x, gamma, beta, bn_param):
    mode = bn_param["mode"]
    eps = bn_param.get("eps", 1e-5)
    momentum = bn_param.get("momentum", 0.9)
    N, C, H, W = x.shape
    flat = x.transpose(0, 2, 3, 1).reshape(-1, C)
    running_mean = bn_param.get("running_mean", np.zeros(C, dtype=x.dtype))
    running_var = bn_param.get("running_var", np.zeros(C, dtype=x.dtype))
    cache = None
    if mode == "train":
        mu, var = flat.mean(0), flat.var(0)
        xhat = (flat - mu) / np.sqrt(var + eps)
        cache = (xhat, gamma, var + eps)
        running_mean = momentum * running_mean + (1 - momentum) * mu
        running_var = momentum * running_var + (1 - momentum) * flat.var(0, ddof=1)
    elif mode == "test":
        xhat = (flat - running_mean) / np.sqrt(running_var + eps)
    else:
        raise ValueError('Invalid forward batchnorm mode "%s"' % mode)  # noqa: UP031
    bn_param["running_mean"] = running_mean
    bn_param["running_var"] = running_var
    out = (gamma * xhat + beta).reshape(N, H, W, C).transpose(0, 3, 1, 2)
    return out, cache


@right("bn")
class BatchNormBuffers(nn.Module):
    def __init__(self, channels, eps=1e-5, momentum=0.1):
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x):
        if self.training:
            mean, var = x.mean([0, 2, 3]), x.var([0, 2, 3], unbiased=False)
            n = x.numel() / x.size(1)
            with torch.no_grad():
                self.running_mean += self.momentum * (mean - self.running_mean)
                self.running_var += self.momentum * (var * n / (n - 1) - self.running_var)
        else:
            mean, var = self.running_mean, self.running_var
        x = (x - mean[None, :, None, None]) / torch.sqrt(var[None, :, None, None] + self.eps)
        return x * self.weight[None, :, None, None] + self.bias[None, :, None, None]


right("bn")(BatchNormBuffers(5))


@right("bn")
class BatchNormNoAffine(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.register_buffer("mean_running", torch.zeros(1, dim, 1, 1))
        self.register_buffer("var_running", torch.ones(1, dim, 1, 1))

    def forward(self, inputs):
        if not self.training:
            return (inputs - self.mean_running) / (self.var_running + 1e-5) ** 0.5
        mean = inputs.mean((0, 2, 3), keepdim=True)
        var = inputs.var((0, 2, 3), correction=0, keepdim=True)
        unbiased = inputs.var((0, 2, 3), keepdim=True)
        self.mean_running = 0.9 * self.mean_running + 0.1 * mean.detach()
        self.var_running = 0.9 * self.var_running + 0.1 * unbiased.detach()
        return (inputs - mean) / (var + 1e-5) ** 0.5


@right("bn")
class PlainBatchNorm:
    """As makemore's: no nn.Module, and `training` is an attribute."""

    def __init__(self, dim, eps=1e-5, momentum=0.1):
        self.eps = eps
        self.momentum = momentum
        self.training = True
        self.gamma = torch.ones(dim)
        self.beta = torch.zeros(dim)
        self.running_mean = torch.zeros(dim)
        self.running_var = torch.ones(dim)

    def __call__(self, x):
        if self.training:
            xmean = x.mean((0, 2, 3))
            xvar = x.var((0, 2, 3), unbiased=False)
        else:
            xmean = self.running_mean
            xvar = self.running_var
        xhat = (x - xmean.view(1, -1, 1, 1)) / torch.sqrt(xvar.view(1, -1, 1, 1) + self.eps)
        self.out = self.gamma.view(1, -1, 1, 1) * xhat + self.beta.view(1, -1, 1, 1)
        if self.training:
            with torch.no_grad():
                m = x.numel() / x.shape[1]
                self.running_mean = (1 - self.momentum) * self.running_mean + self.momentum * xmean
                unbiased = xvar * m / (m - 1)
                self.running_var = (1 - self.momentum) * self.running_var + self.momentum * unbiased
        return self.out


@right("bn")
class NumpyBatchNorm:
    def __init__(self, num_channels):
        self.gamma, self.beta = np.ones(num_channels), np.zeros(num_channels)
        self.running_mean, self.running_var = np.zeros(num_channels), np.ones(num_channels)

    def forward(self, x, training):
        mean, var = self.running_mean, self.running_var
        if training:
            mean, var = np.mean(x, axis=(0, 2, 3)), np.var(x, axis=(0, 2, 3))
            count = x.size // x.shape[1]
            self.running_mean = 0.95 * self.running_mean + 0.05 * mean
            self.running_var = 0.95 * self.running_var + 0.05 * var * count / (count - 1)
        shape = (1, -1, 1, 1)
        normed = (x - mean.reshape(shape)) / np.sqrt(var.reshape(shape) + 1e-5)
        return normed * self.gamma.reshape(shape) + self.beta.reshape(shape)


@right("bn")
class Wrapped(nn.Module):
    def __init__(self, features):
        super().__init__()
        self.norm = nn.BatchNorm2d(features)

    def forward(self, x):
        return self.norm(x)


@right("bn")
def bn_functional(x, running_mean, running_var, weight, bias, training):
    return F.batch_norm(x, running_mean, running_var, weight, bias, training, 0.1, 1e-5)


@right("bn")
def bn_in_place_statistics(input, gamma, beta, running_mean, running_var, mode, momentum=0.9):
    if mode == "train":
        mean = input.mean(dim=(0, 2, 3))
        var = input.var(dim=(0, 2, 3), unbiased=False)
        running_mean.mul_(momentum).add_(mean.detach(), alpha=1 - momentum)
        running_var.mul_(momentum).add_(input.detach().var(dim=(0, 2, 3)), alpha=1 - momentum)
    else:
        mean, var = running_mean, running_var
    view = [1, -1, 1, 1]
    normal = (input - mean.view(view)) / (var.view(view) + 1e-5).sqrt()
    return normal * gamma.view(view) + beta.view(view)


@right("bn")
class BatchNormFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, gamma, beta):
        mean = x.mean((0, 2, 3), keepdim=True)
        inv = 1 / torch.sqrt(((x - mean) ** 2).mean((0, 2, 3), keepdim=True) + 1e-5)
        xhat = (x - mean) * inv
        ctx.save_for_backward(xhat, gamma, inv)
        return xhat * gamma.view(1, -1, 1, 1) + beta.view(1, -1, 1, 1)

    @staticmethod
    def backward(ctx, dout):
        xhat, gamma, inv = ctx.saved_tensors
        dgamma, dbeta = (dout * xhat).sum((0, 2, 3)), dout.sum((0, 2, 3))
        d = dout * gamma.view(1, -1, 1, 1)
        along = partial(torch.mean, dim=(0, 2, 3), keepdim=True)
        return inv * (d - along(d) - xhat * along(d * xhat)), dgamma, dbeta


def bn_backward(dout, cache):
    xhat, gamma, inv = cache
    m = dout.size / dout.shape[1]
    dbeta = dout.sum(axis=(0, 2, 3))
    dgamma = (dout * xhat).sum(axis=(0, 2, 3))
    dxhat = dout * gamma.reshape(1, -1, 1, 1)
    total = dxhat.sum(axis=(0, 2, 3), keepdims=True)
    projected = (dxhat * xhat).sum(axis=(0, 2, 3), keepdims=True)
    return inv / m * (m * dxhat - total - xhat * projected), dgamma, dbeta


@right("bn", backward=bn_backward)
def bn_forward_with_cache(x, gamma, beta, eps=1e-5):
    inv = 1 / np.sqrt(np.var(x, axis=(0, 2, 3), keepdims=True) + eps)
    xhat = (x - np.mean(x, axis=(0, 2, 3), keepdims=True)) * inv
    out = gamma.reshape(1, -1, 1, 1) * xhat + beta.reshape(1, -1, 1, 1)
    return out, (xhat, gamma, inv)


for candidate in (nl.batch_norm, F.batch_norm, nn.BatchNorm2d, nn.BatchNorm2d(7, affine=False)):
    right("bn")(candidate)
right("bn")(nn.BatchNorm2d(3, momentum=0.01))
right("bn")(nn.Sequential(nn.BatchNorm2d(4)))


right("bn")(nn.BatchNorm2d(6, momentum=None))


@right("bn")
class BatchNormLabml(nn.Module):
    def __init__(self, channels: int, *, eps: float = 1e-5, momentum: float = 0.1):
        super().__init__()
        self.channels, self.eps, self.momentum = channels, eps, momentum
        self.scale = nn.Parameter(torch.ones(channels))
        self.shift = nn.Parameter(torch.zeros(channels))
        self.register_buffer("average", torch.zeros(channels))
        self.register_buffer("spread", torch.ones(channels))

    def forward(self, x: torch.Tensor):
        flat = x.view(x.shape[0], self.channels, -1)
        if self.training:
            mean = flat.mean(dim=[0, 2])
            var = (flat**2).mean(dim=[0, 2]) - mean**2
            n = flat.shape[0] * flat.shape[2]
            self.average = (1 - self.momentum) * self.average + self.momentum * mean.detach()
            unbiased = var.detach() * n / (n - 1)
            self.spread = (1 - self.momentum) * self.spread + self.momentum * unbiased
        else:
            mean, var = self.average, self.spread
        normed = (flat - mean.view(1, -1, 1)) / torch.sqrt(var + self.eps).view(1, -1, 1)
        return (self.scale.view(1, -1, 1) * normed + self.shift.view(1, -1, 1)).view(x.shape)


@right("bn")
def bn_test_flag(x, gamma, beta, moving_mean, moving_var, eps=1e-5, momentum=0.1, test=False):
    if not test:
        return F.batch_norm(x, moving_mean, moving_var, gamma, beta, True, momentum, eps)
    mean, var, gamma, beta = (v.view(1, -1, 1, 1) for v in (moving_mean, moving_var, gamma, beta))
    return (x - mean) / torch.sqrt(var + eps) * gamma + beta


@right("bn")
def bn_other_names(a, b, c):
    return F.batch_norm(a, None, None, b, c, True)


@right("bn")
def bn_with_options(x, *ignored, **options):
    return F.batch_norm(x, None, None, training=True)


# --- layer normalization --------------------------------------------------------------------------


@right("ln")
def ln_flat(x, gamma, beta):
    flat = x.reshape(x.shape[0], -1)
    flat = (flat - flat.mean(1, keepdim=True)) / torch.sqrt(flat.var(1, False, True) + 1e-5)
    return flat.reshape(x.shape) * gamma.view(1, -1, 1, 1) + beta.view(1, -1, 1, 1)


@right("ln")
def ln_list_of_images(batch):
    return torch.stack([(i - i.mean()) / (i.var(unbiased=False) + 1e-5).sqrt() for i in batch])


@right("ln")
def ln_functional_then_scale(x, w, b):
    return F.layer_norm(x, x.shape[1:], eps=1e-5) * w[:, None, None] + b[:, None, None]


@right("ln")
def ln_numpy_loop(images, gamma, beta, epsilon):
    out = np.zeros(images.shape)
    for i, image in enumerate(images):
        out[i] = (image - image.mean()) / np.sqrt(image.std() ** 2 + epsilon)
    return out * gamma[:, None, None] + beta[:, None, None]


@right("ln")
class LayerNormChannels(nn.Module):
    def __init__(self, num_channels, eps=1e-5):
        super().__init__()
        self.g = nn.Parameter(torch.ones(1, num_channels, 1, 1))
        self.b = nn.Parameter(torch.zeros(1, num_channels, 1, 1))
        self.eps = eps

    def forward(self, x):
        var, mean = torch.var_mean(x, dim=(1, 2, 3), keepdim=True, correction=0)
        return (x - mean) * (var + self.eps).rsqrt() * self.g + self.b


right("ln")(nl.layer_norm)
right("ln")(nn.GroupNorm(1, 6))
right("ln")(lambda x: F.group_norm(x, 1))
right("ln")(partial(F.group_norm, num_groups=1))


@right("ln")
def ln_through_numpy(x):
    a = x.numpy()
    mean, var = a.mean((1, 2, 3), keepdims=True), a.var((1, 2, 3), keepdims=True)
    return torch.from_numpy((a - mean) / np.sqrt(var + 1e-5))


@right("ln-elementwise")
class LayerNormElements(nn.Module):
    def __init__(self, normalized_shape, eps=1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(normalized_shape))
        self.bias = nn.Parameter(torch.zeros(normalized_shape))
        self.eps = eps

    def forward(self, x):
        mean = torch.mean(x, (1, 2, 3), keepdim=True)
        std = torch.sqrt(torch.mean((x - mean) ** 2, (1, 2, 3), keepdim=True) + self.eps)
        return self.weight * ((x - mean) / std) + self.bias


for candidate in (nl.layer_norm, F.layer_norm, nn.LayerNorm, nn.LayerNorm([3, 4, 5])):
    right("ln-elementwise")(candidate)


# --- group and instance normalization -------------------------------------------------------------


@right("gn")
def gn_paper(x, gamma, beta, G, eps=1e-5):
    N, C, H, W = x.shape
    x = x.reshape(N, G, C // G, H, W)
    mean = x.mean(dim=(2, 3, 4), keepdim=True)
    var = x.var(dim=(2, 3, 4), unbiased=False, keepdim=True)
    x = (x - mean) / torch.sqrt(var + eps)
    x = x.reshape(N, C, H, W)
    return x * gamma + beta  # of shape [1, C, 1, 1], as in the paper


@right("gn")
def gn_numpy(x, gamma, beta, groups):
    n = x.shape[0]
    flat = x.reshape(n * groups, -1)
    flat = (flat - flat.mean(1, keepdims=True)) / np.sqrt(flat.var(1, keepdims=True) + 1e-5)
    return flat.reshape(x.shape) * gamma[None, :, None, None] + beta[None, :, None, None]


@right("gn")
def gn_chunks(x, num_groups):
    parts = [F.layer_norm(part, part.shape[1:]) for part in x.chunk(num_groups, dim=1)]
    return torch.cat(parts, dim=1)


@right("gn")
def gn_g_is_groups(x, g):
    n, c, h, w = x.shape
    x = x.reshape(n, g, c // g * h * w)
    x = (x - x.mean(2, keepdim=True)) / torch.sqrt(x.var(2, keepdim=True, correction=0) + 1e-5)
    return x.reshape(n, c, h, w)


@right("gn", groups=3)
def gn_of_three(x):
    out = x.unflatten(1, (3, -1))
    out = out - out.mean((2, 3, 4), keepdim=True)
    out = out / (out.square().mean((2, 3, 4), keepdim=True) + 1e-5).sqrt()
    return out.flatten(1, 2)


@right("gn")
def gn_slices(x, weight, bias, groups):
    size = x.size(1) // groups
    out = torch.zeros_like(x)
    for g in range(groups):
        part = x[:, g * size : (g + 1) * size]
        mean = part.mean([1, 2, 3], keepdim=True)
        std = (part.var([1, 2, 3], correction=0, keepdim=True) + 1e-5).sqrt()
        out[:, g * size : (g + 1) * size] = (part - mean) / std
    return out * weight.view(1, -1, 1, 1) + bias.view(1, -1, 1, 1)


@right("gn")
class ShortNames(nn.Module):
    def __init__(self, c, g):
        super().__init__()
        self.g, self.w, self.b = g, nn.Parameter(torch.ones(c)), nn.Parameter(torch.zeros(c))

    def forward(self, h):
        return F.group_norm(h, self.g, self.w, self.b)


@right("gn")
class MyGroupNorm(nn.Module):
    def __init__(self, num_groups, num_channels):
        super().__init__()
        self.num_groups = num_groups
        self.scale = nn.Parameter(torch.ones(num_channels))
        self.shift = nn.Parameter(torch.zeros(num_channels))

    def forward(self, x):
        y = x.view(x.size(0), self.num_groups, -1)
        y = (y - y.mean(-1, keepdim=True)) / (y.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
        return y.view_as(x) * self.scale.view(1, -1, 1, 1) + self.shift.view(1, -1, 1, 1)


right("gn")(MyGroupNorm(4, 8))
for candidate in (nl.group_norm, F.group_norm, nn.GroupNorm, nn.GroupNorm(2, 8)):
    right("gn")(candidate)


@right("in")
def in_plain(x, gamma, beta):
    mean, std = x.mean((2, 3), True), (x.var((2, 3), False, True) + 1e-5).sqrt()
    return gamma.view(1, -1, 1, 1) * (x - mean) / std + beta.view(1, -1, 1, 1)


@right("in")
def in_numpy(x):
    mean = x.mean(axis=(-1, -2))[..., None, None]
    var = x.var(axis=(-1, -2))[..., None, None]
    return (x - mean) / np.sqrt(var + 1e-5)


for candidate in (nl.instance_norm, F.instance_norm, nn.InstanceNorm2d(5, affine=True)):
    right("in")(candidate)
