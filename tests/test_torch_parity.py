"""The network and its training against PyTorch, in float64 (docs/network.md).

Equal functions: relative 1e-10. Equal learning: 1e-9 after 20 SGD steps. The tests named
`test_planted_fault_*` break one thing each and show that the parity tests would notice.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from duc_dlc_jax import config as default_config
from duc_dlc_jax import optimizer, train_step
from duc_dlc_jax.models import layers, segmenter
from duc_dlc_jax.models.resnet import BLOCKS, ResNet
from networks import NARROW, jit

torch = pytest.importorskip("torch", reason="parity is with PyTorch: pip install torch")
import references  # noqa: E402
import torch_twin as twins  # noqa: E402

FORWARD = 1e-10  # relative to the largest value
LEARNING = 1e-9  # absolute, on parameters and statistics of order 1
FAULT = 1e-6  # a planted fault differs by at least this
CLASSES, STEPS, RATES = 5, 20, (1, 2)

# Compiling dominates these tests: the programs run once or twenty times on tiny arrays.


@pytest.fixture(autouse=True)
def float64():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    with jax.enable_x64(True):
        yield
    torch.set_num_threads(threads)


def tiny(**changes):
    """config with a narrow 14-layer network; `changes` are fields of config.model."""
    c = default_config.default()
    small = NARROW | {
        "dlc_rates": RATES,
        "dropout": 0.0,
        "dtype": "float64",
        "bn_running_variance": "unbiased",
    }
    c.model.update(small | changes)
    c.optimizer.update({"learning_rate": 0.02, "weight_decay": 1e-4})
    return c


def images(batch, height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (batch, height, width, 3), np.uint8)


def pair(c, seed=0):
    """(our network, its variables, the twin with the same random weights)."""
    model = segmenter.create(c.model, CLASSES)
    twin = twins.Twin(c.model, CLASSES)
    twins.randomize(twin, seed)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 33, 33, 3), jnp.uint8))
    variables = twins.from_torch(twin.state_dict(), shapes, c.model.dlc_rates)
    return model, jax.tree.map(jnp.asarray, variables), twin


def difference(ours, theirs) -> float:
    """Largest absolute difference over that tensor's largest magnitude."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype == np.float64
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def forward_difference(c, height, width) -> float:
    model, variables, twin = pair(c)
    batch = images(2, height, width)
    ours = jit(model.apply)(variables, batch)
    with torch.no_grad():
        theirs, _ = twin.eval()(twins.normalized(batch))
    return difference(ours, theirs.permute(0, 2, 3, 1))


# the backbone against torchvision


@pytest.mark.parametrize(
    "depth", [50, *(pytest.param(d, marks=pytest.mark.parity) for d in (101, 152, 269))]
)
def test_backbone_equals_torchvision(depth):
    resnet = references.imported("torchvision.models.resnet")
    batch = images(1, 33, 40)
    state = None
    for stride, dilate in (32, (0, 0, 0)), (16, (0, 0, 1)), (8, (0, 1, 1)):
        with torch.device("meta"):
            theirs = resnet.ResNet(
                resnet.Bottleneck, list(BLOCKS[depth]), replace_stride_with_dilation=dilate
            )
        theirs = theirs.double().eval()
        theirs.fc = torch.nn.Identity()
        if state is None:
            theirs = theirs.to_empty(device="cpu")
            twins.randomize(theirs, depth)
            state = theirs.state_dict()
        theirs.load_state_dict(state, strict=False, assign=True)
        ours = ResNet(
            depth, 64, "plain", "3x3", stride,
            conv=lambda *a, **k: layers.Conv(*a, **k, dtype=jnp.float64),
            norm=lambda **k: layers.BatchNorm(**k, dtype=jnp.float64, use_running_average=True),
        )  # fmt: skip
        x = twins.normalized(batch)
        shapes = jax.eval_shape(ours.init, jax.random.key(0), jnp.zeros((1, 33, 40, 3)))
        variables = twins.from_torch(state, shapes)
        features = jit(ours.apply)(variables, x.permute(0, 2, 3, 1).numpy())
        with torch.no_grad():
            x = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(x))))
            for number, feature in enumerate(features, 1):
                x = getattr(theirs, f"layer{number}")(x)
                error = difference(feature, x.permute(0, 2, 3, 1))
                assert error < FORWARD, (stride, number, error)


# the whole network against the twin


@pytest.mark.parametrize(
    ("size", "changes"),
    [
        ((64, 96), {"resize_grid": "corners", "output_stride": 32}),
        ((65, 97), {"resize_grid": "stride", "output_stride": 32}),
        ((51, 70), {"resize_grid": "corners", "output_stride": 16}),
        ((62, 41), {"resize_grid": "stride", "output_stride": 16, "commute_coefficients": False}),
        ((47, 66), {"resize_grid": "corners", "output_stride": 8, "commute_coefficients": False}),
        ((50, 63), {"resize_grid": "stride", "output_stride": 8}),
        ((61, 43), {"resize_grid": "half_pixel", "output_stride": 16}),
        ((66, 97), {"resize_grid": "stride", "duc_upsampled": "coefficients"}),
        ((70, 51), {"resize_grid": "corners", "output_stride": 16, "duc_upsampled": "output"}),
        (
            (70, 45),
            {"resize_grid": "corners", "guidance_kernel": 5, "stride_on": "1x1", "stem": "narrow"},
        ),
        ((53, 66), {"resize_grid": "corners", "guidance_stride": 2, "commute_coefficients": False}),
        (
            (66, 53),
            {"resize_grid": "stride", "guidance_stride": 2, "guidance_kernel": 5, "stem": "deep"},
        ),
    ],
    ids=lambda value: "x".join(map(str, value)) if isinstance(value, tuple) else None,
)
def test_network_equals_twin(size, changes):
    assert forward_difference(tiny(**changes), *size) < FORWARD


@pytest.mark.parity
def test_paper_width_equals_twin():
    """Depth 26 at the default DUC and DLC widths and rates."""
    c = tiny(depth=26, width=16)
    defaults = default_config.default().model
    for name in ("duc_width", "guidance_width", "dlc_width", "dlc_growth", "dlc_rates"):
        c.model[name] = defaults[name]
    assert forward_difference(c, 65, 58) < FORWARD


@pytest.mark.parity
@pytest.mark.parametrize("commute", [True, False])
@pytest.mark.parametrize("grid", ["corners", "stride"])
@pytest.mark.parametrize("output_stride", [32, 16, 8])
def test_every_grid_and_stride_equals_twin(output_stride, grid, commute):
    """Each at one of three sizes; beside 32, 16 and 8, each grid and each order sees all three."""
    turn = {32: 0, 16: 1, 8: 2}[output_stride] + (grid == "stride") + 2 * commute
    size = [(64, 96), (65, 97), (50, 63)][turn % 3]
    changes = {"output_stride": output_stride, "resize_grid": grid, "commute_coefficients": commute}
    assert forward_difference(tiny(**changes), *size) < FORWARD


# learning


def batches():
    """STEPS different batches; some pixels are ignored, by other shares in each image."""
    random = np.random.default_rng(1)
    for step in range(STEPS):
        label = random.integers(0, CLASSES, (4, 33, 40), np.uint8)
        label[random.random(label.shape) < np.array([0, 0.1, 0.3, 0.9])[:, None, None]] = 255
        yield {"image": images(4, 33, 40, step), "label": label}


def learn(c, steps):
    """Our variables after `steps` of STEPS planned, from the weights of `pair`."""
    model, variables, _ = pair(c)
    rule = optimizer.create(c.optimizer, STEPS)
    step = jit(train_step.make_train_step(model, rule, c))
    state = train_step.create_state(model, rule, c, variables)
    for _, batch in zip(range(steps), batches(), strict=False):
        state, _ = step(state, batch, c.seed)
    return {"params": state.params, "batch_stats": state.batch_stats}


def learn_torch(c, steps, gradients=None):
    """The twin's state dict after `steps` of torch.optim.SGD, the poly rule and F.cross_entropy.

    Appends each step's {name: gradient} to the list `gradients`.
    """
    *_, twin = pair(c)
    o, twin = c.optimizer, twin.train()
    new = [p for name, p in twin.named_parameters() if not name.startswith("backbone.")]
    groups = [{"params": twin.backbone.parameters()}, {"params": new, "lr": 10 * o.learning_rate}]
    sgd = torch.optim.SGD(groups, o.learning_rate, momentum=0.9, weight_decay=1e-4)
    poly = torch.optim.lr_scheduler.LambdaLR(sgd, lambda step: (1 - step / STEPS) ** 0.9)
    for _, batch in zip(range(steps), batches(), strict=False):
        logits, aux = twin(twins.normalized(batch["image"]))
        label = torch.from_numpy(batch["label"]).long()
        loss = torch.nn.functional.cross_entropy(logits, label, ignore_index=255)
        if aux is not None:
            loss = loss + 0.2 * torch.nn.functional.cross_entropy(aux, label, ignore_index=255)
        sgd.zero_grad()
        loss.backward()
        if gradients is not None:
            gradients.append({name: p.grad.clone() for name, p in twin.named_parameters()})
        sgd.step()
        poly.step()
    return twin.state_dict()


def learning_difference(ours, theirs) -> float:
    """Largest absolute difference over every parameter and running statistic."""
    expected = twins.from_torch(theirs, ours, RATES)
    assert all(x.dtype == jnp.float64 for x in jax.tree.leaves(ours))
    gaps = jax.tree.map(lambda a, b: np.abs(np.asarray(a) - b).max(), ours, expected)
    return float(max(jax.tree.leaves(gaps)))


def test_learning_equals_twin():
    """20 SGD steps: poly, x10, coupled decay on everything, BN statistics, ignored pixels, aux."""
    c = tiny(aux_head=True)
    ours, theirs = learn(c, STEPS), learn_torch(c, STEPS)
    assert learning_difference(ours, learn_torch(c, 0)) > 1e-2  # twenty steps did something
    assert learning_difference(ours, theirs) < LEARNING


@pytest.fixture(scope="module")
def fault():
    """update rule -> how far 2 steps of it on the twin's gradients end from the twin."""
    c, gradients = tiny(), []
    with jax.enable_x64(True):
        _, variables, _ = pair(c)
        expected = learn_torch(c, 2, gradients)
        start = {"params": variables["params"], "batch_stats": {}}
        gradients = [
            jax.tree.map(jnp.asarray, twins.from_torch(g, start, RATES)) for g in gradients
        ]

    def difference_of(rule):
        params = start["params"]
        memory = rule.init(params)
        for gradient in gradients:
            updates, memory = rule.update(gradient["params"], memory, params)
            params = optax.apply_updates(params, updates)
        return learning_difference({"params": params, "batch_stats": {}}, expected)

    return difference_of


def test_right_rule_equals_twin(fault):
    """The right rule, measured as the planted faults below are."""
    assert fault(optimizer.create(tiny().optimizer, STEPS)) < LEARNING


def test_planted_fault_decay_dropped(fault):
    o = tiny().optimizer
    o.weight_decay = 0.0
    assert fault(optimizer.create(o, STEPS)) > FAULT


def test_planted_fault_decay_decoupled(fault):
    """AdamW's order: the decay joins after the momentum."""
    o = tiny().optimizer
    rule = optax.chain(
        optax.trace(o.momentum),
        optax.add_decayed_weights(o.weight_decay),
        optimizer.scale_parts(o.new_layer_multiplier),
        optax.scale_by_learning_rate(optimizer.poly_schedule(o.learning_rate, o.power, STEPS)),
    )
    assert fault(optax.with_extra_args_support(rule)) > FAULT


def test_planted_fault_times_ten_on_the_backbone(fault):
    o = tiny().optimizer
    o.update({"learning_rate": 10 * o.learning_rate, "new_layer_multiplier": 0.1})
    assert fault(optimizer.create(o, STEPS)) > FAULT


def test_planted_fault_schedule_dropped(fault):
    """The learning rate stays where it began."""
    o = tiny().optimizer
    o.power = 0.0
    assert fault(optimizer.create(o, STEPS)) > FAULT


def test_planted_fault_biased_running_variance():
    """One training forward: PyTorch stores the unbiased variance, and Flax the biased one."""
    c = tiny(bn_running_variance="biased")
    model, variables, twin = pair(c)
    batch = images(2, 33, 40)
    apply = jit(functools.partial(model.apply, train=True, mutable=["batch_stats"]))
    _, updated = apply(variables, batch)
    twin.train()(twins.normalized(batch))
    ours = {"params": variables["params"], "batch_stats": updated["batch_stats"]}
    assert learning_difference(ours, twin.state_dict()) > FAULT


@pytest.mark.parametrize("part", ["duc", "dlc", "backbone"])
def test_planted_fault_dilation_off_by_one(part):
    """The weights fit either way; only the numbers tell."""
    c = tiny(output_stride=16)
    model, variables, twin = pair(c)
    if part == "duc":
        model = model.clone(duc_dilation=c.model.duc_dilation + 1)
    elif part == "dlc":
        twin.dlc.branches[1][3].dilation = (3, 3)
        twin.dlc.branches[1][3].padding = (3, 3)
    else:
        twin.backbone.layer4[0].conv2.dilation = (2, 2)
        twin.backbone.layer4[0].conv2.padding = (2, 2)
    batch = images(1, 64, 96)
    with torch.no_grad():
        theirs, _ = twin.eval()(twins.normalized(batch))
    ours = jit(model.apply)(variables, batch)
    assert difference(ours, theirs.permute(0, 2, 3, 1)) > FAULT
