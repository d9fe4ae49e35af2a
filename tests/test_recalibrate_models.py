"""Recalibration of plain PyTorch models: every kind of layer and of loader, against float64 and against hooks."""

import collections
import copy

import pytest
import torch
from torch import nn

from spos_fast import InputError, recalibrate
from spos_fast.calibration import MODES


class Residual(nn.Module):
    def __init__(self, channels, out, stride):
        super().__init__()
        self.main = nn.Sequential(
            nn.Conv2d(channels, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU(),
            nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out),
        )  # fmt: skip
        self.side = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x):
        return (self.main(x) + self.side(x)).relu()


def _resnet():
    stem = nn.Conv2d(3, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8, momentum=None), nn.ReLU()
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.5), nn.Linear(16, 4), nn.BatchNorm1d(4, affine=False)
    return nn.Sequential(*stem, Residual(8, 8, 1), Residual(8, 16, 2), *head)


def _conv1d():
    return nn.Sequential(
        nn.Conv1d(3, 6, 3), nn.BatchNorm1d(6), nn.ReLU(), nn.Flatten(), nn.Linear(42, 5), nn.BatchNorm1d(5)
    )


def _conv3d():
    return nn.Sequential(
        nn.Conv3d(3, 6, 2), nn.BatchNorm3d(6), nn.ReLU(), nn.Conv3d(6, 4, 2), nn.BatchNorm3d(4, affine=False)
    )


class Shared(nn.Module):
    """One layer that is called twice in a forward, on maps of different sizes."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)
        self.again = self.norm

    def forward(self, x):
        return self.again(self.conv(self.norm(x).relu()))


MODELS = {
    "resnet": (_resnet, (3, 9, 9)),
    "resnet, channels last": (lambda: _resnet().to(memory_format=torch.channels_last), (3, 9, 9)),
    "1d": (_conv1d, (3, 9)),
    "3d": (_conv3d, (3, 4, 5, 4)),
    "shared": (Shared, (3, 9, 9)),
    "SyncBatchNorm": (lambda: nn.SyncBatchNorm.convert_sync_batchnorm(_resnet()), (3, 9, 9)),
}


def _model(name="resnet", sizes=(8, 8, 5)):
    make, shape = MODELS[name]
    torch.manual_seed(0)
    return make(), [torch.randn(n, *shape) * 3 + 1 for n in sizes]


def _norms(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}


@torch.no_grad()
def _inputs_in_float64(model, batches):
    """What every layer sees, call by call, where all of them normalise by batch statistics."""
    double = copy.deepcopy(model).double().eval()
    seen = {name: [] for name in _norms(double)}
    for name, norm in _norms(double).items():
        norm.train()
        norm.register_forward_pre_hook(lambda _, args, name=name: seen[name].append(args[0].transpose(0, 1).flatten(1)))
    for batch in batches:
        double(batch.double())
    return seen


def _expected(calls, mode):
    if mode == "pooled":
        values = torch.cat(calls, 1)
        return values.mean(1), values.var(1)
    mean, var = torch.zeros(len(calls[0])).double(), torch.ones(len(calls[0])).double()
    for number, values in enumerate(calls, 1):
        weight = 0.1 if mode == "ema" else 1 / number
        mean, var = torch.lerp(mean, values.mean(1), weight), torch.lerp(var, values.var(1), weight)
    return mean, var


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", MODELS)
def test_against_float64(name, mode):
    """All statistics of a network are those of the definition, computed in float64; batches differ in size."""
    model, batches = _model(name)
    seen = _inputs_in_float64(model, batches)
    recalibrate(model, batches, mode)
    for layer, norm in _norms(model).items():
        mean, var = _expected(seen[layer], mode)
        torch.testing.assert_close(norm.running_mean.double(), mean, rtol=5e-5, atol=5e-6)
        torch.testing.assert_close(norm.running_var.double(), var, rtol=5e-5, atol=5e-6)
        assert norm.num_batches_tracked == len(seen[layer])


@torch.no_grad()
def test_against_the_usual_hooks():
    """Averages of batch means and variances by hooks, as other projects do it, are the cumulative mode; the pooled mode
    has the same means for batches of equal size, and adds the variance between the batches."""
    model, batches = _model(sizes=(6, 6, 6))
    sums = {name: [0, 0] for name in _norms(model)}

    def hook(name):
        def add(_, args):
            x = args[0].transpose(0, 1).flatten(1)
            sums[name][0] = sums[name][0] + x.mean(1) / 3
            sums[name][1] = sums[name][1] + x.var(1) / 3

        return add

    usual = copy.deepcopy(model).train()
    usual[7].eval()  # dropout
    for name, norm in _norms(usual).items():
        norm.register_forward_pre_hook(hook(name))
    for batch in batches:
        usual(batch)
    pooled = copy.deepcopy(model)
    recalibrate(model, batches)
    recalibrate(pooled, batches, "pooled")
    for name, norm in _norms(model).items():
        torch.testing.assert_close(norm.running_mean, sums[name][0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(norm.running_var, sums[name][1], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(_norms(pooled)[name].running_mean, sums[name][0], rtol=1e-5, atol=1e-6)
    head = _norms(pooled)["9"]
    assert ((head.running_var / sums["9"][1] - 1).abs() > 0.05).any()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_mean_far_from_zero_keeps_the_variance(layout):
    """Pooled statistics of values around 100 with variance 1, batches with means apart: nothing cancels."""
    x = torch.randn(64, 2, 8, 8, dtype=torch.float64) + torch.linspace(99, 101, 64).double()[:, None, None, None]
    x = x.float().contiguous(memory_format=layout)
    norm = nn.BatchNorm2d(2)
    recalibrate(norm, x.split(10), "pooled")
    values = x.double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(norm.running_mean.double(), values.mean(1), rtol=5e-7, atol=0)
    torch.testing.assert_close(norm.running_var.double(), values.var(1), rtol=5e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype):
    """Half precision is not rounded before the end; float64 keeps its precision."""
    x = torch.randn(40, 3, 5, 5, dtype=torch.float64).to(dtype) + 4
    norm = nn.BatchNorm2d(3, dtype=dtype)
    recalibrate(norm, x.split(10), "pooled")
    values = x.double().transpose(0, 1).flatten(1)
    for got, wanted in ((norm.running_mean, values.mean(1)), (norm.running_var, values.var(1))):
        assert got.dtype == dtype
        tolerance = {} if dtype == torch.float64 else {"rtol": 2**-8, "atol": 0}
        torch.testing.assert_close(got, wanted.to(dtype), **tolerance)


def test_layers_that_are_left_alone():
    """Instance norm, layers without statistics, layers off the path, and those that ``modules`` leaves out, which then
    normalise by what they have; a layer in evaluation mode is recalibrated as the others."""
    model, batches = _model()
    model.insert(1, nn.InstanceNorm2d(8, track_running_stats=True))
    model.insert(2, nn.BatchNorm2d(8, track_running_stats=False))
    model.add_module("unused", nn.Identity())
    model.unused.norm = nn.BatchNorm2d(3)
    frozen = model[5]
    frozen.main[1].running_mean.fill_(0.5)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    model[6].eval()
    kept = [m for m in model.modules() if m not in set(frozen.modules()) | {model}]
    recalibrate(model, batches, modules=kept)
    left = {"1.", "2.", "5.", "unused."}
    for name, value in model.state_dict().items():
        if "running" in name:
            assert torch.equal(before[name], value) == any(name.startswith(part) for part in left), name
    with torch.no_grad():
        x = model[4](model[3](model[2](model.eval()[1](model[0](batches[0])))))
    expected, alone = copy.deepcopy(frozen).eval(), model[6].main[0](frozen(x))
    torch.testing.assert_close(alone, model[6].main[0](expected(x)))


def test_statistics_switched_off_for_training():
    """A layer that has statistics but is told not to track them evaluates with them, so they are recalibrated."""
    model, batches = _model()
    twin = copy.deepcopy(model)
    model[1].track_running_stats = False
    recalibrate(model, batches)
    recalibrate(twin, batches)
    assert torch.equal(model[1].running_mean, twin[1].running_mean) and not model[1].track_running_stats


def _as_dict(x):
    return {"image": x, "label": torch.zeros(len(x))}


@pytest.mark.parametrize(
    ("wrap", "how"),
    [
        (lambda x: (x, 0), {}),
        (lambda x: [[x, None], "meta"], {}),
        (_as_dict, {"inputs": "image"}),
        (lambda x: (0, _as_dict(x)), {"inputs": lambda item: item[1]["image"]}),
        (lambda x: (0, x), {"inputs": 1}),
        (_as_dict, {"inputs": lambda item: item, "forward": True}),
        (lambda x: x, {"device": "cpu"}),
        (lambda x: x, {"images": 100}),
    ],
)
def test_loaders(wrap, how):
    """What a loader may yield, and how the network's input is named in it."""
    model, batches = _model()
    twin = copy.deepcopy(model)
    recalibrate(twin, batches)
    how = dict(how, forward=lambda item: model(item["image"])) if "forward" in how else how
    recalibrate(model, map(wrap, batches), **how)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), twin.state_dict().values(), strict=True))


def test_a_number_of_images():
    """Reads no further than it must, and cuts the last batch."""
    model, batches = _model()
    twin = copy.deepcopy(model)
    recalibrate(twin, [batches[0], batches[1][:3]])
    loader = iter(batches)
    recalibrate(model, loader, images=11)
    assert len(list(loader)) == 1
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), twin.state_dict().values(), strict=True))


def test_moved_to_a_device():
    """``device`` moves the inputs, and without it they stay."""
    norm, seen, x = nn.BatchNorm2d(2), [], torch.randn(4, 2, 3, 3)
    recalibrate(norm, [x], device="meta", forward=lambda moved: seen.append(moved.device.type) or norm(x))
    recalibrate(norm, [x], forward=lambda moved: seen.append(moved.device.type) or norm(x))
    assert seen == ["meta", "cpu"]


def test_containers_are_moved_to_a_device():
    """``device`` moves the tensors in what ``inputs`` returns, and says so where it cannot."""
    norm, x, seen = nn.BatchNorm2d(2), torch.randn(4, 2, 3, 3), []
    Pair = collections.namedtuple("Pair", "image label")

    def forward(moved):
        seen.append(moved)
        return norm(x)

    item = {"image": x, "more": [x, (Pair(x, 3), "name", None)]}
    recalibrate(norm, [item], inputs=lambda batch: batch, device="meta", forward=forward)
    (moved,) = seen
    pair, *rest = moved["more"][1]
    assert all(value.device.type == "meta" for value in (moved["image"], moved["more"][0], pair.image))
    assert isinstance(pair, Pair) and pair.label == 3 and rest == ["name", None] and x.device.type == "cpu"
    with pytest.raises(InputError, match="device: a object cannot be moved"):
        recalibrate(norm, [x], inputs=lambda batch: object(), device="meta", forward=forward)


def test_sync_batch_norm_in_a_process_group(tmp_path):
    """SyncBatchNorm refuses CPU tensors as soon as processes are joined; recalibration runs on each one's own."""
    model, batches = _model("SyncBatchNorm")
    twin = _model()[0]
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match="GPU"):
            model.train()(batches[0])
        recalibrate(model, batches, "pooled")
    finally:
        torch.distributed.destroy_process_group()
    recalibrate(twin, batches, "pooled")
    assert all("forward" not in vars(m) for m in model.modules())
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), twin.state_dict().values(), strict=True))


def test_a_model_in_distributed_data_parallel():
    """The wrapper, which copies buffers between processes before every forward, is left out."""

    class Wrapper(nn.parallel.DistributedDataParallel):
        def __init__(self, module):
            nn.Module.__init__(self)
            self.module = module

    model, batches = _model()
    recalibrate(Wrapper(model), batches)
    assert model[1].num_batches_tracked == 3


def test_a_compiled_model():
    """Compiled code is not looked into: the model runs as it was written, and stays compiled."""
    model, batches = _model()
    twin = copy.deepcopy(model)
    runs = []
    compiled = torch.compile(model, backend=lambda graph, _: runs.append(1) or graph.forward)
    with torch.no_grad():
        compiled.eval()(batches[0])
    done = len(runs)
    recalibrate(compiled, batches, "pooled")
    recalibrate(twin, batches, "pooled")
    assert len(runs) == done > 0
    assert torch.equal(model[1].running_mean, twin[1].running_mean)


def _broken(model, name):
    """A model or loader that cannot be, and what is said about it."""
    _, good = _model()
    nan = good[1].clone()
    nan[2, 1, 3, 3] = float("nan")
    return {
        "empty": (model, [], "batches: there is none"),
        "no batch norm": (nn.Linear(3, 3), good, "model: has no batch normalisation"),
        "only untracked": (nn.BatchNorm2d(3, track_running_stats=False), good, "model: has no batch normalisation"),
        "only instance norm": (nn.InstanceNorm2d(3, track_running_stats=True), good, "model: has no batch normal"),
        "no modules": ((model, {"modules": []}), good, "modules: has no batch normalisation"),
        "one value": (model, [good[0], good[0][:1]], "batches: layer 9 gets 1 value a channel"),
        "no image": (model, [good[0][:0]], "batches: layer 1 gets no values a channel"),
        "NaN": (model, [good[0], nan], "batches: NaN or infinite values reach 8 of 8"),
        "a tensor": (model, good[0], "batches: got one tensor"),
        "dicts": (model, [{"image": good[0]}], "batches: got a dict; name the images in it by inputs, one of 'image'"),
        "wrong key": ((model, {"inputs": "x"}), [{"image": good[0]}], "inputs: got 'x', .* dict with 'image'"),
        "wrong index": ((model, {"inputs": 3}), [good], "inputs: got 3, which is not in a batch: list"),
        "numbers": (model, [(1, 2)], "batches: got a int; expected tensors"),
        "empty tuple": (model, [()], "batches: got a tuple"),
        "images": ((model, {"images": 0}), good, "images: got 0"),
        "images of dicts": (
            (model, {"images": 5, "inputs": dict}),
            [{"image": good[0]}],
            "images: cannot be counted in",
        ),
        "lazy": (nn.Sequential(nn.Conv2d(3, 4, 1), nn.LazyBatchNorm2d()), good, "model: 1 is a LazyBatchNorm2d that"),
        "never called": ((model, {"forward": lambda x: x}), good, "model: none of its 8 normalisation layers runs"),
        "devices": (_parallel(model), good, "model: got DataParallel on 2 devices"),
    }[name]


def _parallel(model):
    wrapped = nn.DataParallel(model)
    wrapped.device_ids = [0, 1]
    return wrapped


@pytest.mark.parametrize(
    "name",
    [
        "empty", "no batch norm", "only untracked", "only instance norm", "one value", "no image", "NaN", "a tensor",
        "dicts", "wrong key", "wrong index", "numbers", "empty tuple", "images", "images of dicts", "lazy",
        "never called", "devices", "no modules",
    ],
)  # fmt: skip
@pytest.mark.parametrize("mode", ["cumulative", "pooled"])
def test_refused(name, mode):
    """One clear error, and a model that is as it was, to the bit, its flags and hooks too."""
    model, batches = _model()
    model.train()(batches[2])
    model[3].eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    flags = [module.training for module in model.modules()]
    given, loader, says = _broken(model, name)
    given, how = given if isinstance(given, tuple) else (given, {})
    with pytest.raises(InputError, match=says):
        recalibrate(given, loader, mode, **how)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == flags
    assert not any(norm._forward_hooks or norm._forward_pre_hooks for norm in _norms(model).values())


def test_nonfinite_statistics_can_be_kept():
    """Where a NaN is a result: every layer that it reaches has NaN, and a layer that it does not reach has none."""
    model, batches = _model()
    batches[1][2, 1, 3, 3] = float("nan")
    recalibrate(model, batches, allow_nonfinite=True)
    assert model[1].running_mean.isnan().all() and model[3].main[1].running_var.isnan().all()
    norm = nn.BatchNorm2d(3)
    recalibrate(norm, batches, allow_nonfinite=True)
    assert norm.running_var.isnan().tolist() == [False, True, False]


def test_a_set_smaller_than_a_batch():
    """Few images are one small batch, in all modes but ema the statistics of that batch."""
    for mode in ("cumulative", "pooled"):
        model, batches = _model(sizes=(3,))
        recalibrate(model, torch.utils.data.DataLoader(batches[0], batch_size=128), mode)
        values = model[0](batches[0]).transpose(0, 1).flatten(1)
        torch.testing.assert_close(model[1].running_var, values.var(1), rtol=1e-5, atol=1e-6)


def test_the_layers_move_as_usual_afterwards():
    """What watches the layers is gone: training goes on, and an interrupted recalibration leaves nothing either."""

    def interrupted():
        yield batches[0]
        raise KeyboardInterrupt

    model, batches = _model()
    with pytest.raises(KeyboardInterrupt):
        recalibrate(model, interrupted(), "pooled")
    recalibrate(model, batches)
    twin = copy.deepcopy(model)
    for net in (model, twin):
        torch.manual_seed(5)
        net.train()(batches[0])
    assert model[1].num_batches_tracked == 4
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), twin.state_dict().values(), strict=True))
