"""MoCo against slow manual versions, and its key encoder, queue, shuffle and split statistics for what they are for."""

import copy
from functools import partial

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d
from torch import nn

from sssd_zoo.configs import MoCoConfig
from sssd_zoo.data.augment import BatchRandom
from sssd_zoo.data.inputs import InputSpec
from sssd_zoo.tasks.moco import Encoder, MoCo, info_nce, shuffled_keys
from sssd_zoo.tasks.queue import enqueue
from sssd_zoo.tasks.split_batchnorm import GhostBatchNorm2d, split_batchnorm

MEAN, STD = (0.5,) * 3, (0.25,) * 3


class Trunk(nn.Module):
    """A small network with BatchNorm."""

    num_features = 6

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 6, 3, stride=2), nn.BatchNorm2d(6)

    def forward(self, images):
        return self.norm(self.conv(images)).relu().mean((2, 3))


def make(**kwargs) -> MoCo:
    torch.manual_seed(0)
    settings = {"dim": 5, "queue_size": 16, "splits": 2, "symmetric": False, **kwargs}
    return MoCo(Trunk(), MoCoConfig(**settings), InputSpec(12, MEAN, STD))


def batch_of(task: MoCo, size: int = 8, step: int = 0) -> dict:
    generator = torch.Generator().manual_seed(step)
    images = torch.randint(0, 256, (size, 3, 12, 12), dtype=torch.uint8, generator=generator)
    return task.views(images, BatchRandom(0, step))


def test_info_nce_equals_loops():
    torch.manual_seed(1)
    query, key, queue = (F.normalize(torch.randn(n, 5), dim=1) for n in (4, 4, 7))
    total, hits = 0.0, 0
    for q, k in zip(query, key, strict=True):
        scores = [float(q @ k) / 0.2] + [float(q @ other) / 0.2 for other in queue]
        exponentials = [torch.tensor(score).exp() for score in scores]
        total += float(-(exponentials[0] / sum(exponentials)).log())
        hits += max(scores) == scores[0]
    loss, top1 = info_nce(query, key, queue, 0.2)
    assert loss.item() == pytest.approx(total / 4, rel=1e-5)
    assert top1.item() == hits / 4
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(info_nce(query, key, queue, 0.2)[0], loss), "cosines are not rounded"


def test_forward_equals_the_method_step_by_step():
    task = make()
    before = make(splits=1)  # the same weights, by the same seed
    batch = batch_of(task)
    queue = task.queue.clone()
    out = task(batch)
    query_view, key_view = batch["views"]
    queries = torch.cat([before.query_encoder(part) for part in query_view.chunk(2)])
    shuffle = batch["shuffles"][0]
    keys = torch.empty(8, 5)
    for part in shuffle.chunk(2):  # each key with the statistics of its shuffled part
        keys[part] = before.key_encoder(key_view[part]).detach()
    expected, _ = info_nce(queries, keys, queue, task.config.temperature)
    torch.testing.assert_close(out["loss"], expected)
    torch.testing.assert_close(task.queue[:8], keys)
    assert torch.equal(task.queue[8:], queue[8:])


def test_symmetric_loss_is_the_sum_of_both_directions():
    one, two = make(symmetric=True), make()
    batch = batch_of(one)
    mirrored = {"views": batch["views"][::-1], "shuffles": batch["shuffles"][::-1]}
    expected = copy.deepcopy(two)(batch)["loss"] + copy.deepcopy(two)(mirrored)["loss"]
    torch.testing.assert_close(one(batch)["loss"], expected)
    assert one.pointer == 0, "16 keys of 8 images have gone once around the queue"


def test_gradients_reach_the_query_encoder_only():
    task = make(symmetric=True)
    task(batch_of(task))["loss"].backward()
    assert all(parameter.grad is not None for parameter in task.query_encoder.parameters())
    assert all(parameter.grad is None for parameter in task.key_encoder.parameters())


def test_key_encoder_is_the_moving_average():
    task = make(key_momentum=0.9)
    with torch.no_grad():
        for parameter in task.query_encoder.parameters():
            parameter.add_(1.0)
    keys = [parameter.clone() for parameter in task.key_encoder.parameters()]
    task.before_step()
    for old, new, query in zip(keys, task.key_encoder.parameters(), task.query_encoder.parameters(), strict=True):
        torch.testing.assert_close(new, 0.9 * old + 0.1 * query)


def test_queue_is_a_ring_also_where_the_batch_does_not_divide_it():
    task = make(queue_size=10)
    kept: list[torch.Tensor] = list(task.queue.clone())
    place = 0
    for step in range(7):
        keys = torch.full((4, 5), float(step))
        enqueue(task.queue, task.pointer, keys)
        for key in keys:
            kept[place % 10] = key
            place += 1
        torch.testing.assert_close(task.queue, torch.stack(kept))
        assert task.pointer == place % 10


def test_more_keys_than_the_queue_holds():
    task = make(queue_size=3)
    enqueue(task.queue, task.pointer, torch.arange(5.0).unsqueeze(1).expand(5, 5))
    assert sorted(task.queue[:, 0].tolist()) == [2, 3, 4]


def test_eval_mode_leaves_the_queue():
    task = make().eval()
    before = task.queue.clone()
    task(batch_of(task))
    assert torch.equal(task.queue, before)


def test_loss_uses_the_queue_from_before_the_batch():
    task = make()
    batch = batch_of(task)
    first = task(batch)["loss"].item()
    assert task(batch)["loss"].item() > first, "the second time the batch's own keys are among the negatives"


def test_each_part_has_statistics_of_its_own():
    encoder = Encoder(Trunk(), 5).train()
    images = torch.randn(8, 3, 12, 12)
    images[4:] += 5
    whole, half = encoder(images), encoder(images[:4])
    split_batchnorm(encoder, 2)
    torch.testing.assert_close(encoder(images)[:4], half)
    assert not torch.allclose(encoder(images), whole)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, partial(BatchNormAct2d, act_layer=nn.Hardswish)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_split_batchnorm_equals_batchnorm_on_each_part(dtype, norm):
    torch.manual_seed(2)
    images = torch.randn(12, 5, 4, 4).to(dtype).contiguous(memory_format=torch.channels_last)
    split, plain = norm(5), norm(5, momentum=0.1 / 3)
    with torch.no_grad():
        split.weight.uniform_(0.5, 2)
        split.bias.uniform_()
    plain.load_state_dict(split.state_dict())
    split_batchnorm(split, 3)
    ours, theirs = images.clone().requires_grad_(), images.clone().requires_grad_()
    out, expected = split(ours), torch.cat([plain(part) for part in theirs.chunk(3)])
    torch.testing.assert_close(out, expected, rtol=0, atol=0)
    assert out.is_contiguous(memory_format=torch.channels_last)
    upstream = torch.randn(12, 5, 4, 4).to(dtype)
    out.backward(upstream)
    expected.backward(upstream)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=0)
    for name, parameter in split.named_parameters():
        torch.testing.assert_close(parameter.grad, plain.get_parameter(name).grad)
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(split.get_buffer(name), plain.get_buffer(name))
    split.eval()
    torch.testing.assert_close(split(images), plain.eval()(images))


@pytest.mark.parametrize("name", ["sssd_mobilenetv4_conv_small_cifar", "sssd_resnet18_cifar"])
def test_every_batchnorm_of_a_network_is_split(name):
    network = timm.create_model(name)
    norms = [layer for layer in network.modules() if isinstance(layer, nn.BatchNorm2d)]
    split_batchnorm(network, 2)
    assert norms
    assert all(isinstance(layer, GhostBatchNorm2d) for layer in norms)


def test_compiled_split_batchnorm_gives_the_same():
    torch.manual_seed(3)
    norm = nn.BatchNorm2d(5)
    split_batchnorm(norm, 2)
    other = copy.deepcopy(norm)
    images = torch.randn(8, 5, 4, 4, requires_grad=True)
    # fullgraph: a break would leave the norm out of the compiled network. This backend needs no compiler.
    compiled = torch.compile(other, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(images), norm(images))
    torch.testing.assert_close(other.running_var, norm.running_var)
    with torch.autocast("cpu", torch.bfloat16):
        compiled(images + 10)
        norm(images + 10)
    torch.testing.assert_close(other.running_mean, norm.running_mean)
    compiled(images).square().sum().backward()
    norm(images).square().sum().backward()
    torch.testing.assert_close(other.weight.grad, norm.weight.grad)


@pytest.mark.parametrize("symmetric", [False, True])
def test_compiled_steps_are_the_same_with_their_queue_and_key_encoder(symmetric):
    """The forward pass writes the queue, the pointer and the running statistics, which a compiled one must do, too."""
    plain = make(symmetric=symmetric)
    other = copy.deepcopy(plain)
    compiled = torch.compile(other, backend="aot_eager", dynamic=False)
    for task, forward in ((plain, plain), (other, compiled)):
        optimizer = torch.optim.SGD(task.query_encoder.parameters(), lr=0.05)
        for step in range(3):
            task.before_step()
            loss = forward(batch_of(task, step=step))["loss"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    for name, value in other.state_dict().items():
        torch.testing.assert_close(value, plain.state_dict()[name], msg=lambda text, name=name: f"{name}: {text}")


def test_shuffle_hides_which_images_share_statistics():
    """Without a shuffle a key's part is its query's part; with it, the parts mix."""
    task = make()
    images = torch.randn(8, 3, 12, 12)
    images[4:] += 5
    still = shuffled_keys(task.key_encoder, images, torch.arange(8))
    mixed = shuffled_keys(task.key_encoder, images, torch.tensor([0, 4, 1, 5, 2, 6, 3, 7]))
    whole = make(splits=1)
    torch.testing.assert_close(still[:4], whole.key_encoder(images[:4]))
    assert not torch.allclose(still, mixed), "the statistics are of other images"
    torch.testing.assert_close(
        shuffled_keys(whole.key_encoder, images, torch.randperm(8)),
        shuffled_keys(whole.key_encoder, images, torch.arange(8)),
    )


def test_running_statistics_span_steps_whatever_the_splits():
    images = torch.randn(64, 3, 12, 12) * 2 + 1
    one, eight = make(splits=1), make(splits=8)
    slow = nn.BatchNorm2d(6, momentum=0.1 / 8)
    for part in one.query_encoder.trunk.conv(images).chunk(8):
        slow(part)
    one.query_encoder(images)
    eight.query_encoder(images)
    of_one, of_eight = one.query_encoder.trunk.norm, eight.query_encoder.trunk.norm
    torch.testing.assert_close(of_eight.running_mean, slow.running_mean)
    torch.testing.assert_close(of_eight.running_var, slow.running_var)
    # (1 - 0.1 / 8)^8 of the old value is left instead of 1 - 0.1.
    torch.testing.assert_close(of_eight.running_mean, of_one.running_mean, atol=0.004, rtol=0)


def test_queue_pointer_and_key_encoder_are_in_the_state():
    names = make().state_dict().keys()
    assert {"queue", "pointer", "key_encoder.trunk.conv.weight", "key_encoder.trunk.norm.running_mean"} <= names


def test_steps_on_one_batch_lower_its_loss():
    """With the keys and the queue held still, gradient descent must bring each query to its own key."""
    task = make(key_momentum=1.0, queue_size=32)
    optimizer = torch.optim.SGD(task.query_encoder.parameters(), lr=0.05)
    batch, queue = batch_of(task), task.queue.clone()
    losses = []
    for _ in range(20):
        task.queue.copy_(queue)
        task.before_step()
        loss = task(batch)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
