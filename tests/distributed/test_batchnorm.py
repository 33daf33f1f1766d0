"""BatchNorm of two processes against that of one which sees the whole batch."""

import pytest
import timm
import torch
from torch import nn

from helpers.processes import run_together
from sssd_zoo.distributed import batchnorm
from sssd_zoo.distributed.batchnorm import CPUSyncBatchNorm, average_batchnorm, synchronise_batchnorm

CODE = """
from functools import partial
from timm.layers import BatchNormAct2d
from torch import nn
from sssd_zoo.distributed import gather
from sssd_zoo.distributed.batchnorm import average_batchnorm, synchronise_batchnorm

torch.manual_seed(0)
images, upstream = torch.randn(2, 8, 3, 5, 5) * 2 + 1
half = slice(4 * rank, 4 * rank + 4)


def norm(kind=nn.BatchNorm2d):
    made = kind(3, momentum=0.3)
    nn.init.uniform_(made.weight, generator=torch.Generator().manual_seed(1))
    nn.init.uniform_(made.bias, generator=torch.Generator().manual_seed(2))
    return made


network = nn.Sequential(norm(), nn.BatchNorm1d(3), norm(partial(BatchNormAct2d, act_layer=nn.Hardswish)))
synced = synchronise_batchnorm(network, torch.device("cpu"))[0]
half_images = images[half].clone().requires_grad_()
out = synced(half_images)
out.backward(upstream[half])
for parameter in synced.parameters():  # what DistributedDataParallel does, but for the mean
    dist.all_reduce(parameter.grad)

far = synchronise_batchnorm(nn.Sequential(norm()), torch.device("cpu"))[0]
far(images[half] + 1000)

local = norm()
local(images[half])
before = local.running_mean.clone()
averaged = nn.Sequential(local, nn.Linear(1, 1), nn.BatchNorm2d(3, track_running_stats=False))
average_batchnorm(averaged)

result = {
    "types": [type(layer).__name__ for layer in network],
    "out": gather(out),
    "activated": gather(network[2](images[half])),
    "images.grad": gather(half_images.grad),
    "weight.grad": synced.weight.grad,
    "bias.grad": synced.bias.grad,
    "buffers": dict(synced.named_buffers()),
    "far": far.running_var,
    "eval": gather(synced.eval()(images[half])),
    "means": gather(before[None]),
    "averaged": dict(local.named_buffers()),
}
if rank == 0:
    torch.save(result, "result.pt")
"""


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """What two processes with half a batch each computed."""
    folder = tmp_path_factory.mktemp("processes")
    run_together(CODE, folder)
    return torch.load(folder / "result.pt")


@pytest.fixture
def whole():
    """The same by one process: the norm, the images and the gradient of the output."""
    torch.manual_seed(0)
    images, upstream = torch.randn(2, 8, 3, 5, 5) * 2 + 1
    norm = nn.BatchNorm2d(3, momentum=0.3)
    nn.init.uniform_(norm.weight, generator=torch.Generator().manual_seed(1))
    nn.init.uniform_(norm.bias, generator=torch.Generator().manual_seed(2))
    return norm, images.requires_grad_(), upstream


def test_only_batchnorm2d_is_synchronised(shared):
    assert shared["types"] == ["CPUSyncBatchNorm", "BatchNorm1d", "CPUSyncBatchNormAct"]


def test_timm_s_norm_with_an_activation_keeps_it(shared, whole, monkeypatch):
    norm, images, _ = whole
    torch.testing.assert_close(shared["activated"], nn.functional.hardswish(norm(images)).detach())

    monkeypatch.setattr(batchnorm, "world_size", lambda: 2)
    network = timm.create_model("sssd_mobilenetv3_small_100_cifar").eval()
    images = torch.randn(2, 3, 32, 32)
    expected = network(images)
    synced = synchronise_batchnorm(network, torch.device("cuda"))  # in eval mode, which needs no GPU
    assert any(isinstance(layer, nn.SyncBatchNorm) for layer in synced.modules())
    torch.testing.assert_close(synced(images), expected)


def test_synchronised_it_is_that_of_the_whole_batch_and_so_are_its_gradients(shared, whole):
    norm, images, upstream = whole
    out = norm(images)
    out.backward(upstream)
    torch.testing.assert_close(shared["out"], out.detach())
    torch.testing.assert_close(shared["images.grad"], images.grad)
    torch.testing.assert_close(shared["weight.grad"], norm.weight.grad)
    torch.testing.assert_close(shared["bias.grad"], norm.bias.grad)


def test_synchronised_its_running_statistics_are_those_of_the_whole_batch(shared, whole):
    norm, images, _ = whole
    norm(images)
    assert shared["buffers"].keys() == dict(norm.named_buffers()).keys()
    for name, buffer in norm.named_buffers():
        torch.testing.assert_close(shared["buffers"][name], buffer)
    torch.testing.assert_close(shared["eval"], norm.eval()(images).detach())


def test_a_variance_much_smaller_than_the_mean_is_kept(shared, whole):
    norm, images, _ = whole
    norm(images.detach() + 1000)
    torch.testing.assert_close(shared["far"], norm.running_var, rtol=1e-3, atol=0)


def test_averaged_statistics_are_the_mean_of_the_processes_own(shared, whole):
    norm, images, _ = whole
    local = [nn.BatchNorm2d(3, momentum=0.3) for _ in range(2)]
    for each, half in zip(local, images.detach().chunk(2), strict=True):
        each(half)
    torch.testing.assert_close(shared["means"], torch.stack([each.running_mean for each in local]))
    for name in ("running_mean", "running_var"):
        mean = torch.stack([each.get_buffer(name) for each in local]).mean(0)
        torch.testing.assert_close(shared["averaged"][name], mean)
    norm(images)  # the mean of the whole batch is that of its halves; its variance is more than theirs
    torch.testing.assert_close(shared["averaged"]["running_mean"], norm.running_mean)


def test_one_process_alone_keeps_what_it_has():
    network = nn.Sequential(nn.BatchNorm2d(3))
    assert type(synchronise_batchnorm(network, torch.device("cpu"))[0]) is nn.BatchNorm2d
    network(torch.randn(4, 3, 2, 2))
    before = network[0].running_mean.clone()
    average_batchnorm(network)
    assert torch.equal(network[0].running_mean, before)


def test_in_eval_mode_it_needs_no_other_process():
    norm = CPUSyncBatchNorm(3).eval()
    plain = nn.BatchNorm2d(3).eval()
    images = torch.randn(4, 3, 2, 2)
    torch.testing.assert_close(norm(images), plain(images))
