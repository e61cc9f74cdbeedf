"""Normalizations with mistakes, written as students write them, with the name of each mistake."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

WRONG = []
BN = (0, 2, 3)


def wrong(kind, *names, **options):
    def keep(candidate):
        WRONG.append((kind, names, candidate, options))
        return candidate

    return keep


# --- variance and epsilon -------------------------------------------------------------------------


@wrong("bn", "unbiased variance")
def bn_var_of_torch(x, gamma, beta, eps=1e-5):
    mean, var = x.mean(BN, keepdim=True), x.var(BN, keepdim=True)
    return gamma.view(1, -1, 1, 1) * (x - mean) / torch.sqrt(var + eps) + beta.view(1, -1, 1, 1)


@wrong("ln", "unbiased variance")
def ln_std_of_torch(x):
    flat = x.flatten(1)
    out = (flat - flat.mean(1, keepdim=True)) / torch.sqrt(flat.std(1, keepdim=True) ** 2 + 1e-5)
    return out.view_as(x)


@wrong("gn", "unbiased variance")
def gn_ddof(x, G):
    y = x.reshape(x.shape[0], G, -1)
    mu, var = y.mean(axis=2, keepdims=True), np.var(y, axis=2, keepdims=True, ddof=1)
    return ((y - mu) / np.sqrt(var + 1e-5)).reshape(x.shape)


@wrong("bn", "epsilon outside the root")
def bn_eps_outside(x, weight, bias):
    mean, var = x.mean(BN, keepdim=True), x.var(BN, keepdim=True, unbiased=False)
    return (x - mean) / (torch.sqrt(var) + 1e-5) * weight.view(1, -1, 1, 1) + bias.view(-1, 1, 1)


@wrong("ln", "epsilon outside the root")
def ln_std_plus_eps(x):
    return np.stack([(image - image.mean()) / (image.std() + 1e-6) for image in x])


@wrong("bn", "epsilon missing")
def bn_no_eps(x):
    return (x - x.mean(BN, True)) / x.std(BN, correction=0, keepdim=True)


@wrong("in", "epsilon missing")
def in_forgot_eps(x, gamma, beta, eps):
    mu, sigma = x.mean((2, 3), keepdim=True), x.var((2, 3), correction=0, keepdim=True).sqrt()
    return gamma.view(1, -1, 1, 1) * (x - mu) / sigma + beta.view(1, -1, 1, 1)


@wrong("ln", "epsilon squared")
def ln_eps_squared(x, eps=1e-5):
    d = x - x.mean((1, 2, 3), keepdim=True)
    return d / torch.sqrt((d**2).mean((1, 2, 3), keepdim=True) + eps**2)


@wrong("bn", "epsilon of another size")
def bn_tensorflow_eps(x):
    mean, var = x.mean(BN, True), x.var(BN, correction=0, keepdim=True)
    return (x - mean) / torch.sqrt(var + 1e-3)


@wrong("gn", "epsilon of another size")
def gn_tiny_eps(x, groups):
    y = x.reshape(len(x), groups, -1)
    y = (y - y.mean(2, True)) / (y.var(2, False, True) + 1e-8).sqrt()
    return y.reshape(x.shape)


wrong("bn", "epsilon of another size")(nn.BatchNorm2d(6, eps=1e-3))


@wrong("bn", "variance instead of standard deviation")
def bn_no_root(x, gamma, beta, eps):
    mean, var = x.mean(BN, True), x.var(BN, correction=0, keepdim=True)
    return gamma.view(1, -1, 1, 1) * (x - mean) / (var + eps) + beta.view(1, -1, 1, 1)


@wrong("ln", "variance instead of standard deviation")
def ln_divided_by_variance(x):
    x = np.asarray(x)
    return (x - x.mean((1, 2, 3), keepdims=True)) / x.var((1, 2, 3), keepdims=True)


@wrong("bn", "root taken twice")
def bn_sqrt_of_std(x):
    std = x.std(BN, unbiased=False, keepdim=True)
    return (x - x.mean(BN, keepdim=True)) / torch.sqrt(std + 1e-5)


@wrong("bn", "sum instead of variance")
def bn_forgot_to_divide(x):
    d = x - x.mean(BN, keepdim=True)
    return d / torch.sqrt((d**2).sum(BN, keepdim=True) + 1e-5)


@wrong("ln", "variance about zero")
def ln_mean_of_squares(x):
    mean, var = x.mean((1, 2, 3), keepdim=True), x.pow(2).mean((1, 2, 3), keepdim=True)
    return (x - mean) / torch.sqrt(var + 1e-5)


@wrong("bn", "multiplied by the standard deviation")
def bn_times_std(x):
    var, mean = torch.var_mean(x, BN, correction=0, keepdim=True)
    return (x - mean) * torch.sqrt(var + 1e-5)


@wrong("bn", "not divided by the standard deviation")
def bn_only_centred(x, gamma, beta):
    return gamma.view(1, -1, 1, 1) * (x - x.mean(BN, keepdim=True)) + beta.view(1, -1, 1, 1)


@wrong("in", "mean not subtracted")
def in_not_centred(x):
    return x / torch.sqrt(x.var((2, 3), unbiased=False, keepdim=True) + 1e-5)


# --- which numbers share a mean -------------------------------------------------------------------


@wrong("bn", "mean and variance over N only")
def bn_as_for_vectors(x, gamma, beta, eps):
    mean, var = x.mean(axis=0), x.var(axis=0)
    return gamma.reshape(-1, 1, 1) * (x - mean) / np.sqrt(var + eps) + beta.reshape(-1, 1, 1)


@wrong("bn", "mean and variance over H and W")
def bn_each_image(x):
    m, v = x.mean((2, 3), keepdim=True), x.var((2, 3), unbiased=False, keepdim=True)
    return (x - m) / torch.sqrt(v + 1e-5)


@wrong("bn", "mean and variance over N, C, H and W")
def bn_one_mean(x):
    return (x - x.mean()) / (x.var(unbiased=False) + 1e-5).sqrt()


@wrong("bn", "mean and variance over C, H and W")
def bn_that_is_ln(x):
    return F.layer_norm(x, x.shape[1:])


@wrong("ln", "mean and variance over N, H and W")
def ln_that_is_bn(x, w, b):
    m, v = x.mean(BN, keepdim=True), x.var(BN, unbiased=False, keepdim=True)
    return (x - m) / torch.sqrt(v + 1e-5) * w.view(1, -1, 1, 1) + b.view(1, -1, 1, 1)


@wrong("ln", "mean and variance over C only")
def ln_convnext(x, weight, bias):
    u = x.mean(1, keepdim=True)
    s = (x - u).pow(2).mean(1, keepdim=True)
    x = (x - u) / torch.sqrt(s + 1e-5)
    return weight[:, None, None] * x + bias[:, None, None]


@wrong("ln", "mean and variance over W only")
def ln_last_axis(x):
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, False, keepdim=True) + 1e-5).sqrt()


@wrong("ln", "mean and variance over H and W")
class LayerNormOfPositions(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(1, channels, 1, 1))
        self.beta = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, x):
        mean, var = x.mean([2, 3], keepdim=True), x.var([2, 3], keepdim=True, correction=0)
        return self.gamma * (x - mean) / torch.sqrt(var + 1e-5) + self.beta


wrong("gn", "mean and variance over C, H and W", groups=2)(nn.GroupNorm(1, 6))
wrong("gn", "mean and variance over H and W", groups=2)(nn.GroupNorm(6, 6))


@wrong("gn", "groups interleaved")
def gn_interleaved(x, gamma, beta, G):
    N, C, H, W = x.shape
    y = x.view(N, C // G, G, H, W)
    y = (y - y.mean((1, 3, 4), keepdim=True)) / torch.sqrt(y.var((1, 3, 4), False, True) + 1e-5)
    return gamma.view(1, -1, 1, 1) * y.view(N, C, H, W) + beta.view(1, -1, 1, 1)


@wrong("gn", "groups interleaved")
def gn_strided(x, num_groups):
    out = torch.zeros_like(x)
    for g in range(num_groups):
        part = x[:, g::num_groups]
        var, mean = torch.var_mean(part, (1, 2, 3), correction=0, keepdim=True)
        out[:, g::num_groups] = (part - mean) / (var + 1e-5).sqrt()
    return out


@wrong("gn", "group size for number")
def gn_of_group_size(x, groups):
    y = x.reshape(x.shape[0], -1, groups, *x.shape[2:])
    y = (y - y.mean((2, 3, 4), True)) / (y.var((2, 3, 4), False, True) + 1e-5).sqrt()
    return y.reshape(x.shape)


@wrong("gn", "groups over the batch")
def gn_with_the_batch(x, groups):
    y = x.reshape(x.shape[0], groups, -1)
    y = (y - y.mean(axis=(0, 2), keepdims=True)) / np.sqrt(y.var((0, 2), keepdims=True) + 1e-5)
    return y.reshape(x.shape)


@wrong("gn", "groups without positions")
def gn_channels_only(x, groups):
    y = x.reshape(x.shape[0], groups, -1, *x.shape[2:])
    y = (y - y.mean(2, True)) / (y.var(2, False, True) + 1e-5).sqrt()
    return y.reshape(x.shape)


@wrong("bn", "axes mixed")
def bn_reshape_to_channels(x, gamma, beta):
    flat = x.reshape(x.shape[1], -1)
    flat = (flat - flat.mean(1, keepdim=True)) / (flat.var(1, False, True) + 1e-5).sqrt()
    return gamma.view(1, -1, 1, 1) * flat.reshape(x.shape) + beta.view(1, -1, 1, 1)


@wrong("bn", "axes mixed")
def bn_rows_of_channels(x):
    N, C, H, W = x.shape
    flat = x.reshape(N * H * W, C)
    flat = (flat - flat.mean(0)) / np.sqrt(flat.var(0) + 1e-5)
    return flat.reshape(N, C, H, W)


@wrong("bn", "axes mixed")
def bn_not_permuted_back(x):
    N, C, H, W = x.shape
    flat = x.permute(0, 2, 3, 1).reshape(-1, C)
    flat = (flat - flat.mean(0)) / torch.sqrt(flat.var(0, unbiased=False) + 1e-5)
    return flat.reshape(N, C, H, W)


@wrong("gn", "axes mixed")
def gn_groups_first(x, G):
    y = x.reshape(G, -1)
    y = (y - y.mean(1, keepdim=True)) / (y.var(1, False, True) + 1e-5).sqrt()
    return y.reshape(x.shape)


@wrong("ln", "variance over N, H and W")
def ln_variance_of_channels(x):
    return (x - x.mean((1, 2, 3), True)) / torch.sqrt(x.var(BN, False, True) + 1e-5)


# --- scale and shift ------------------------------------------------------------------------------


@wrong("bn", "scale and shift swapped")
def bn_swapped(x, gamma, beta):
    xhat = F.batch_norm(x, None, None, training=True)
    return beta.view(1, -1, 1, 1) * xhat + gamma.view(1, -1, 1, 1)


@wrong("ln", "shift before scale")
def ln_shift_first(x, gamma, beta):
    xhat = F.layer_norm(x, x.shape[1:])
    return (xhat + beta.view(1, -1, 1, 1)) * gamma.view(1, -1, 1, 1)


@wrong("gn", "scale and shift missing")
class GroupNormUnused(nn.Module):
    def __init__(self, num_groups, num_channels):
        super().__init__()
        self.num_groups = num_groups
        self.weight = nn.Parameter(torch.ones(num_channels))
        self.bias = nn.Parameter(torch.zeros(num_channels))

    def forward(self, x):
        return F.group_norm(x, self.num_groups)


@wrong("bn", "shift missing")
def bn_no_shift(x, gamma, beta):
    return F.batch_norm(x, None, None, training=True) * gamma.view(1, -1, 1, 1)


@wrong("in", "scale missing")
def in_no_scale(x, gamma, beta):
    return F.instance_norm(x) + beta.view(1, -1, 1, 1)


@wrong("bn", "shift subtracted")
def bn_minus_beta(x, gamma, beta):
    xhat = F.batch_norm(x, None, None, training=True)
    return gamma.view(1, -1, 1, 1) * xhat - beta.view(1, -1, 1, 1)


wrong("ln", "scale and shift by element")(nn.LayerNorm([6, 3, 4]))
wrong("ln-elementwise", "scale and shift by channel")(nn.GroupNorm(1, 6))


@wrong("gn", "scale and shift by element")
class GroupNormOfElements(nn.Module):
    def __init__(self, groups, channels, size):
        super().__init__()
        self.groups = groups
        self.scale = nn.Parameter(torch.ones(channels, *size))
        self.shift = nn.Parameter(torch.zeros(channels, *size))

    def forward(self, x):
        return F.group_norm(x, self.groups) * self.scale + self.shift


@wrong("bn", "one scale for all channels")
class BatchNormScalar(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(1))
        self.beta = nn.Parameter(torch.zeros(1))
        self.bn = nn.BatchNorm2d(channels, affine=False)

    def forward(self, x):
        return self.gamma * self.bn(x) + self.beta


@wrong("ln", "scale and shift along the wrong axis")
class LayerNormBroadcast(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels))
        self.beta = nn.Parameter(torch.zeros(channels))

    def forward(self, x):
        return self.gamma * F.layer_norm(x, x.shape[1:]) + self.beta


@wrong("bn", "statistics along the wrong axis")
def bn_without_keepdim(x):
    return (x - x.mean(BN)) / torch.sqrt(x.var(BN, unbiased=False) + 1e-5)


# --- gradients ------------------------------------------------------------------------------------


@wrong("bn", "mean and variance detached")
def bn_no_grad_statistics(x, gamma, beta):
    with torch.no_grad():
        mean, var = x.mean(BN, True), x.var(BN, False, True)
    return gamma.view(1, -1, 1, 1) * (x - mean) / (var + 1e-5).sqrt() + beta.view(1, -1, 1, 1)


@wrong("ln", "variance detached")
def ln_variance_data(x):
    var = x.data.var((1, 2, 3), False, keepdim=True)
    return (x - x.mean((1, 2, 3), keepdim=True)) / (var + 1e-5).sqrt()


@wrong("gn", "mean detached")
def gn_mean_detached(x, groups):
    y = x.reshape(x.shape[0], groups, -1)
    mean, var = y.mean(2, True).detach(), y.var(2, False, True)
    return ((y - mean) / (var + 1e-5).sqrt()).reshape(x.shape)


@wrong("ln", "no gradients")
def ln_no_grad(x):
    with torch.no_grad():
        return F.layer_norm(x, x.shape[1:])


@wrong("bn", "scale and shift are no parameters")
class BatchNormNoParameters(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.gamma, self.beta = torch.ones(channels), torch.zeros(channels)
        self.bn = nn.BatchNorm2d(channels, affine=False)

    def forward(self, x):
        return self.gamma.view(1, -1, 1, 1) * self.bn(x) + self.beta.view(1, -1, 1, 1)


def backward_mean(dout, cache):
    xhat, gamma, std = cache
    d = dout * gamma.reshape(1, -1, 1, 1)
    dx = (d - d.mean(BN, keepdims=True) - xhat * (d * xhat).mean(BN, keepdims=True)) / std
    return dx, (dout * xhat).mean(BN), dout.sum(BN)


def backward_short(dout, cache):
    xhat, gamma, std = cache
    return dout * gamma.reshape(1, -1, 1, 1) / std, (dout * xhat).sum(BN), dout.sum(BN)


def backward_alone(dout, cache):
    xhat, gamma, std = cache
    d = dout * gamma.reshape(1, -1, 1, 1)
    return (d - d.mean(BN, keepdims=True) - xhat * (d * xhat).mean(BN, keepdims=True)) / std


@wrong("bn", "gradient of scale", backward=backward_mean)
@wrong("bn", "gradient of scale", "gradient of shift", backward=backward_alone)
@wrong("bn", "mean and variance detached", backward=backward_short)
def bn_forward(x, gamma, beta):
    std = np.sqrt(x.var(BN, keepdims=True) + 1e-5)
    xhat = (x - x.mean(BN, keepdims=True)) / std
    return gamma.reshape(1, -1, 1, 1) * xhat + beta.reshape(1, -1, 1, 1), (xhat, gamma, std)


# --- running statistics ---------------------------------------------------------------------------


class Base(nn.Module):
    """What the following have in common; `move` is where they differ."""

    def __init__(self, channels, eps=1e-5, momentum=0.1):
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.gamma = nn.Parameter(torch.ones(1, channels, 1, 1))
        self.beta = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.register_buffer("running_mean", torch.zeros(1, channels, 1, 1))
        self.register_buffer("running_var", torch.ones(1, channels, 1, 1))

    def forward(self, x):
        if self.training:
            mean, var = x.mean(BN, keepdim=True), x.var(BN, keepdim=True, unbiased=False)
            self.move(mean.detach(), x.detach().var(BN, keepdim=True), var.detach())
        else:
            mean, var = self.running_mean, self.running_var
        return self.gamma * (x - mean) / torch.sqrt(var + self.eps) + self.beta

    def move(self, mean, var, biased):
        self.running_mean = (1 - self.momentum) * self.running_mean + self.momentum * mean
        self.running_var = (1 - self.momentum) * self.running_var + self.momentum * var


@wrong("bn", "momentum the wrong way round")
class MomentumReversed(Base):
    def move(self, mean, var, biased):
        self.running_mean = self.momentum * self.running_mean + (1 - self.momentum) * mean
        self.running_var = self.momentum * self.running_var + (1 - self.momentum) * var


@wrong("bn", "running variance biased")
class RunningBiased(Base):
    def move(self, mean, var, biased):
        super().move(mean, biased, biased)


@wrong("bn", "running variance biased", "momentum the wrong way round")
def bn_two_mistakes(x, gamma, beta, running_mean, running_var, training, momentum=0.1):
    view = (1, -1, 1, 1)
    if training:
        mean, var = x.mean(BN), x.var(BN, unbiased=False)
        with torch.no_grad():
            running_mean.copy_(momentum * running_mean + (1 - momentum) * mean)
            running_var.copy_(momentum * running_var + (1 - momentum) * var)
    else:
        mean, var = running_mean, running_var
    xhat = (x - mean.view(view)) / (var.view(view) + 1e-5).sqrt()
    return gamma.view(view) * xhat + beta.view(view)


@wrong("bn", "running statistics not moved")
class NeverMoved(Base):
    def move(self, mean, var, biased):
        running_mean = (1 - self.momentum) * self.running_mean + self.momentum * mean
        running_var = (1 - self.momentum) * self.running_var + self.momentum * var
        return running_mean, running_var


@wrong("bn", "running statistics not moved")
def bn_local_names(x, gamma, beta, running_mean, running_var, training=True):
    if training:
        mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3))
        running_mean = 0.9 * running_mean + 0.1 * mean
        running_var = 0.9 * running_var + 0.1 * var * x[:, 0].size / (x[:, 0].size - 1)
    else:
        mean, var = running_mean, running_var
    xhat = (x - mean[:, None, None]) / np.sqrt(var[:, None, None] + 1e-5)
    return gamma[:, None, None] * xhat + beta[:, None, None]


@wrong("bn", "running statistics moved twice")
class MovedTwice(Base):
    def move(self, mean, var, biased):
        super().move(mean, var, biased)
        super().move(mean, var, biased)


@wrong("bn", "running statistics replaced")
class Replaced(Base):
    def move(self, mean, var, biased):
        self.running_mean, self.running_var = mean, var


@wrong("bn", "running statistics summed")
class Summed(Base):
    def move(self, mean, var, biased):
        self.running_mean += self.momentum * mean
        self.running_var += self.momentum * var


@wrong("bn", "standard deviation in the running variance")
class RunningStd(Base):
    def move(self, mean, var, biased):
        super().move(mean, torch.sqrt(biased + self.eps), biased)


@wrong("bn", "running variance not moved")
class MeanOnly(Base):
    def move(self, mean, var, biased):
        self.running_mean = (1 - self.momentum) * self.running_mean + self.momentum * mean


@wrong("bn", "running statistics in the graph")
class InTheGraph(Base):
    def forward(self, x):
        if not self.training:
            return super().forward(x)
        self.move(x.mean(BN, keepdim=True), x.var(BN, keepdim=True), None)
        self.eval()
        return self.gamma * F.batch_norm(x, None, None, training=True) + self.beta


@wrong("bn", "running statistics are parameters")
class RunningParameters(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.running_mean = nn.Parameter(torch.zeros(channels))
        self.running_var = nn.Parameter(torch.ones(channels))

    def forward(self, x):
        mean, var = self.running_mean.data, self.running_var.data
        return F.batch_norm(x, mean, var, training=self.training)


@wrong("bn", "batch statistics used in evaluation")
class AlwaysBatch(Base):
    def forward(self, x):
        mean, var = x.mean(BN, keepdim=True), x.var(BN, keepdim=True, unbiased=False)
        if self.training:
            self.move(mean.detach(), x.detach().var(BN, keepdim=True), None)
        return self.gamma * (x - mean) / torch.sqrt(var + self.eps) + self.beta


@wrong("bn", "no running statistics", "batch statistics used in evaluation")
class NothingKept(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels))
        self.beta = nn.Parameter(torch.zeros(channels))

    def forward(self, x):
        return F.batch_norm(x, None, None, self.gamma, self.beta, training=True)


@wrong("bn", "running statistics moved in evaluation")
class MovedInEvaluation(Base):
    def forward(self, x):
        out = super().forward(x)
        if not self.training:
            self.move(x.mean(BN, keepdim=True), x.var(BN, keepdim=True), None)
        return out


@wrong("bn", "running statistics moved in evaluation")
class MovedBeforeEvaluation(Base):
    def forward(self, x):
        if not self.training:
            self.move(x.mean(BN, keepdim=True), x.var(BN, keepdim=True), None)
        return super().forward(x)


@wrong("bn", "running statistics used in training")
class RunningInTraining(Base):
    def forward(self, x):
        if self.training:
            with torch.no_grad():
                self.move(x.mean(BN, keepdim=True), x.var(BN, keepdim=True), None)
        xhat = (x - self.running_mean) / torch.sqrt(self.running_var + self.eps)
        return self.gamma * xhat + self.beta


@wrong("bn", "epsilon missing")
def bn_no_eps_in_test(x, gamma, beta, bn_param):
    mean, var = bn_param["running_mean"], bn_param["running_var"]
    if bn_param["mode"] == "train":
        F.batch_norm(x, mean, var, training=True)
        return F.batch_norm(x, None, None, gamma, beta, training=True)
    xhat = (x - mean.view(1, -1, 1, 1)) / var.view(1, -1, 1, 1).sqrt()
    return xhat * gamma.view(1, -1, 1, 1) + beta.view(1, -1, 1, 1)


# --- shapes, dtype, in place, errors --------------------------------------------------------------


@wrong("bn", "constant of the example's shape")
def bn_sixteen(x):
    mean = x.sum(BN, keepdim=True) / 16
    var = ((x - mean) ** 2).sum(BN, keepdim=True) / 16
    return (x - mean) / torch.sqrt(var + 1e-5)


@wrong("gn", "constant of the example's shape")
def gn_of_the_example(x):
    y = x.reshape(4, 2, 8)
    y = (y - y.mean(2, keepdim=True)) / (y.var(2, False, True) + 1e-5).sqrt()
    return y.reshape(4, 4, 2, 2)


@wrong("ln", "shape N = 1", "shape H = W = 1")
def ln_squeezed(x):
    x = x.squeeze()
    axes = tuple(range(1, x.dim()))
    return (x - x.mean(axes, True)) / (x.var(axes, correction=0, keepdim=True) + 1e-5).sqrt()


@wrong("ln", "dtype not kept")
def ln_float(x):
    x = x.float()
    return F.layer_norm(x, x.shape[1:])


@wrong("bn", "input changed in place")
def bn_in_place(x):
    x -= x.mean(BN, keepdim=True)
    x /= torch.sqrt((x**2).mean(BN, keepdim=True) + 1e-5)
    return x


@wrong("ln", "input changed in place")
def ln_in_place(x):
    for image in x:
        image -= image.mean()
        image /= math.sqrt(image.var() + 1e-5)
    return np.array(x)


@wrong("bn", "error")
def bn_typo(x):
    return (x - x.mean(BN, keepdim=True)) / torch.squareroot(x.var(BN, keepdim=True))


@wrong("bn", "too slow")
def bn_endless(x):
    while True:
        try:
            x = x + 1
        except:  # noqa: E722
            x = x - 1


@wrong("bn", "unknown")
def bn_nonsense(x):
    return torch.tanh(x) * 3 + x.flip(1)


# --- two mistakes at once -------------------------------------------------------------------------


@wrong("bn", "unbiased variance", "epsilon outside the root")
def bn_std_plus_eps(x, gamma, beta, eps):
    xhat = (x - x.mean(BN, keepdim=True)) / (x.std(BN, keepdim=True) + eps)
    return gamma.view(1, -1, 1, 1) * xhat + beta.view(1, -1, 1, 1)


@wrong("ln", "unbiased variance", "mean and variance over C only")
def ln_two(x):
    return (x - x.mean(1, keepdim=True)) / torch.sqrt(x.var(1, keepdim=True) + 1e-5)


@wrong("gn", "groups interleaved", "epsilon missing")
def gn_two(x, G):
    y = x.reshape(x.shape[0], -1, G, *x.shape[2:])
    y = (y - y.mean((1, 3, 4), keepdims=True)) / y.std((1, 3, 4), keepdims=True)
    return np.reshape(y, x.shape)


@wrong("bn", "scale and shift swapped", "variance instead of standard deviation")
def bn_three(x, gamma, beta):
    mean, var = x.mean(BN, keepdim=True), x.var(BN, False, True)
    xhat = (x - mean) / (var + 1e-5)
    return beta.view(1, -1, 1, 1) * xhat + gamma.view(1, -1, 1, 1)


# --- from memory, some with several mistakes --------------------------------------------------


@wrong(
    "bn",
    "epsilon outside the root",
    "running variance biased",
    "momentum the wrong way round",
    "running statistics in the graph",
)
class FourMistakes(nn.Module):
    def __init__(self, num_features, momentum=0.1):
        super().__init__()
        self.momentum = momentum
        self.gamma = nn.Parameter(torch.ones(1, num_features, 1, 1))
        self.beta = nn.Parameter(torch.zeros(1, num_features, 1, 1))
        self.running_mean = torch.zeros(1, num_features, 1, 1)
        self.running_var = torch.ones(1, num_features, 1, 1)

    def forward(self, x):
        if self.training:
            mean = x.mean((0, 2, 3), keepdim=True)
            var = x.var((0, 2, 3), keepdim=True, unbiased=False)
            self.running_mean = self.momentum * self.running_mean + (1 - self.momentum) * mean
            self.running_var = self.momentum * self.running_var + (1 - self.momentum) * var
        else:
            mean, var = self.running_mean, self.running_var
        return self.gamma * (x - mean) / (var.sqrt() + 1e-5) + self.beta


@wrong("ln", "mean and variance over C only", "unbiased variance", "epsilon outside the root")
class ThreeMistakes(nn.Module):
    def __init__(self, features):
        super().__init__()
        self.w = nn.Parameter(torch.ones(features))
        self.b = nn.Parameter(torch.zeros(features))

    def forward(self, x):
        x = x.permute(0, 2, 3, 1)
        x = (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-6)
        return (x * self.w + self.b).permute(0, 3, 1, 2)


@wrong("bn", "unbiased variance", "epsilon outside the root", "scale and shift swapped")
def bn_three_mistakes(x, gamma, beta):
    xhat = (x - x.mean(BN, keepdim=True)) / (x.std(BN, keepdim=True) + 1e-5)
    return beta.view(1, -1, 1, 1) * xhat + gamma.view(1, -1, 1, 1)


@wrong("bn", "variance over N, C, H and W")
def bn_variance_of_all(x):
    return (x - x.mean(BN, keepdim=True)) / (x.var(unbiased=False) + 1e-5).sqrt()


@wrong("bn", "mean over N, C, H and W")
def bn_mean_of_all(x):
    return (x - x.mean()) / (x.var(BN, keepdim=True, unbiased=False) + 1e-5).sqrt()


@wrong("ln", "mean absolute deviation", "epsilon outside the root")
def ln_absolute(x):
    d = x - x.mean((1, 2, 3), keepdim=True)
    return d / (d.abs().mean((1, 2, 3), keepdim=True) + 1e-5)


@wrong("bn", "mean not squared")
def bn_forgot_a_square(x):
    mean = x.mean(BN, keepdim=True)
    return (x - mean) / torch.sqrt((x**2).mean(BN, keepdim=True) - mean + 1e-5)


@wrong("gn", "group size for number")
def gn_split(x, num_groups):
    return torch.cat([F.layer_norm(part, part.shape[1:]) for part in x.split(num_groups, 1)], 1)


@wrong("gn", "scale and shift by group")
class GroupNormOfGroups(nn.Module):
    def __init__(self, groups, channels):
        super().__init__()
        self.groups = groups
        self.w = nn.Parameter(torch.ones(1, groups, 1))
        self.b = nn.Parameter(torch.zeros(1, groups, 1))

    def forward(self, x):
        y = x.reshape(x.shape[0], self.groups, -1)
        y = (y - y.mean(2, True)) / (y.var(2, False, True) + 1e-5).sqrt()
        return (y * self.w + self.b).reshape(x.shape)


@wrong("bn", "variance instead of standard deviation")
def bn_no_root_in_evaluation(x, gamma, beta, running_mean, running_var, training):
    if training:
        return F.batch_norm(x, running_mean, running_var, gamma, beta, True)
    mean, var, gamma, beta = (v[:, None, None] for v in (running_mean, running_var, gamma, beta))
    return (x - mean) / var * gamma + beta


@wrong("bn", "scale and shift missing")
def bn_no_scale_in_evaluation(x, gamma, beta, running_mean, running_var, training):
    if training:
        return F.batch_norm(x, running_mean, running_var, gamma, beta, True)
    return F.batch_norm(x, running_mean, running_var)


@wrong("ln", "error")
def ln_no_return(x):
    x = (x - x.mean()) / x.std()


@wrong("bn", "error")
def bn_exit(x):
    raise SystemExit("done")


@wrong("ln", "scale and shift swapped", "no gradients", "dtype not kept")
def ln_ones(x):
    return x.bool()


wrong("bn", "error")(nn.LazyBatchNorm2d)
