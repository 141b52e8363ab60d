"""Every head of the table keeps the same promises; the paper's branch is what the paper says."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from erde_hub.errors import ConfigError, ShapeError, UnknownNameError
from erde_hub.heads import ExitHead, FeatureSpec, create_head, get_head, list_heads, register_head

SPECS = {
    "map": (FeatureSpec(6, "NCHW", (4, 6)), (6, 4, 6)),
    "channels last": (FeatureSpec(6, "NHWC", (4, 6)), (4, 6, 6)),
    "class token": (FeatureSpec(6, "NLC", (9,), "token", 1), (9, 6)),
    "averaged tokens": (FeatureSpec(6, "NLC", (9,), "avg", 1), (9, 6)),
    "tokens alone": (FeatureSpec(6, "NLC", (9,)), (9, 6)),
    "vector": (FeatureSpec(6, "NC"), (6,)),
}
POOLING = [head for head in list_heads() if head != "lm"]  # which reads every token: test_lm_head.py
CASES = [(head, kind) for head in POOLING for kind in SPECS]


def make(head: str, kind: str, **kwargs) -> tuple[ExitHead, torch.Tensor]:
    spec, shape = SPECS[kind]
    torch.manual_seed(0)
    module = create_head(head, spec, 5, **kwargs)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn(p.shape) * 0.1)
    return module, torch.randn(7, *shape)


def copy_state(source: nn.Module, target: nn.Module) -> None:
    """Heads of two formats hold the same tensors under other names."""
    with torch.no_grad():
        for ours, theirs in zip(target.state_dict().values(), source.state_dict().values(), strict=True):
            ours.copy_(theirs)


# Contract over the table


@pytest.mark.parametrize(("head", "kind"), CASES)
def test_shape_gradient_and_order_of_the_batch(head, kind):
    module, x = make(head, kind)
    module.eval()
    x.requires_grad_()
    out = module(x)
    assert out.shape == (7, 5)
    assert torch.isfinite(out).all()
    out.square().sum().backward()
    assert torch.isfinite(x.grad).all()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in module.parameters())
    order = torch.randperm(7)
    torch.testing.assert_close(module(x[order]), out[order])
    torch.testing.assert_close(module(x[2:3]), out[2:3])
    assert module(x[:0]).shape == (0, 5)


@pytest.mark.parametrize(("head", "kind"), CASES)
def test_other_precisions(head, kind):
    module, x = make(head, kind)
    reference = module.eval()(x)
    torch.testing.assert_close(module.double()(x.double()).float(), reference)
    low = module.bfloat16()(x.bfloat16())
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), reference, rtol=0.1, atol=0.1)


@pytest.mark.parametrize(("head", "kind"), CASES)
def test_gradcheck_in_double_precision(head, kind):
    module, x = make(head, kind)
    module.double().eval()
    assert torch.autograd.gradcheck(module, (x[:2].double().requires_grad_(),), atol=1e-4)


@pytest.mark.parametrize(("head", "kind"), CASES)
def test_state_round_trip(head, kind):
    module, x = make(head, kind)
    again = create_head(head, SPECS[kind][0], 5)
    again.load_state_dict(module.state_dict())
    assert torch.equal(again.eval()(x), module.eval()(x))


@pytest.mark.parametrize(("head", "kind"), CASES)
def test_built_from_what_a_config_stores(head, kind):
    spec = SPECS[kind][0]
    assert FeatureSpec.from_dict(spec.to_dict()) == spec
    with torch.device("meta"):
        assert create_head(head, FeatureSpec.from_dict(spec.to_dict()), 5).spec == spec


@pytest.mark.parametrize("head", POOLING)
def test_the_width_is_that_of_the_channels_at_every_resolution(head):
    for kind in ("map", "channels last"):
        module, x = make(head, kind)
        larger = nn.functional.interpolate(x if kind == "map" else x.permute(0, 3, 1, 2), (8, 12), mode="nearest")
        module.eval()
        expected = module(x)
        torch.testing.assert_close(module(larger if kind == "map" else larger.permute(0, 2, 3, 1)), expected)


@pytest.mark.parametrize("head", POOLING)
def test_channels_last_features_are_read_along_their_channels(head):
    first, x = make(head, "map")
    last, _ = make(head, "channels last")
    copy_state(first, last)
    expected = first.eval()(x)
    assert torch.equal(last.eval()(x.permute(0, 2, 3, 1)), expected)
    shuffled = x[:, torch.randperm(6)]
    assert not torch.allclose(last(shuffled.permute(0, 2, 3, 1)), expected), "the channels carry the answer"


@pytest.mark.parametrize("head", POOLING)
def test_tokens_are_pooled_as_asked(head):
    module, x = make(head, "class token")
    module.eval()
    expected = module(x)
    other = x.clone()
    other[:, 1:] = 0
    assert torch.equal(module(other), expected), "only the class token counts"
    averaged, _ = make(head, "averaged tokens")
    averaged.load_state_dict(module.state_dict())
    averaged.eval()
    other = x.clone()
    other[:, 0] = 0
    assert torch.equal(averaged(other), averaged(x)), "the class token does not count"
    order = torch.cat([torch.zeros(1, dtype=torch.int64), 1 + torch.randperm(8)])
    torch.testing.assert_close(averaged(x[:, order]), averaged(x))


# The paper's branch


def test_the_branch_of_the_paper():
    module, x = make("fc", "map")
    assert module.fc.in_features == 4 * 6
    module.eval()
    norm = module.layers[0]
    with torch.no_grad():
        norm.running_mean.copy_(torch.randn(6))
        norm.running_var.copy_(torch.rand(6) + 0.5)
    shape = (1, 6, 1, 1)
    y = (x - norm.running_mean.view(shape)) / (norm.running_var.view(shape) + norm.eps).sqrt()
    y = (y * norm.weight.view(shape) + norm.bias.view(shape)).clamp_min(0)
    pooled = torch.stack([y[:, :, i : i + 2, j : j + 3].mean((2, 3)) for i in (0, 2) for j in (0, 3)], -1)
    expected = pooled.flatten(1) @ module.fc.weight.T + module.fc.bias
    torch.testing.assert_close(module(x), expected)


def test_its_dropout():
    module, x = make("fc", "map")
    assert [m.p for m in module.modules() if isinstance(m, nn.Dropout)] == [0.5]
    module.train()
    assert not torch.equal(module(x), module(x))
    plain, _ = make("fc", "map", dropout=0.0)
    plain.train()
    torch.testing.assert_close(plain(x), plain(x))


def test_the_literal_pooling():
    module, x = make("fc", "map", pool="kernel")
    assert module.fc.in_features == 6 * 2 * 3
    assert module.eval()(x).shape == (7, 5)
    with pytest.raises(ShapeError, match=r"features of \(4, 6\), got \(8, 12\)"):
        module(torch.randn(1, 6, 8, 12))
    last, _ = make("fc", "channels last", pool="kernel")
    copy_state(module, last)
    assert torch.equal(last.eval()(x.permute(0, 2, 3, 1)), module(x))
    small = create_head("fc", FeatureSpec(3, "NCHW", (2, 2)), 5)
    literal = create_head("fc", FeatureSpec(3, "NCHW", (2, 2)), 5, pool="kernel")
    assert literal.fc.in_features == 3  # 2x2 averaged to one
    assert small.fc.in_features == 12
    for size in ((), (1, 4)):
        with pytest.raises(ConfigError, match="at least 2x2"):
            create_head("fc", FeatureSpec(3, "NCHW", size), 5, pool="kernel")


def test_maps_smaller_than_the_pooling():
    module = create_head("fc", FeatureSpec(3, "NCHW", (1, 1)), 5).eval()
    assert module(torch.randn(2, 3, 1, 1)).shape == (2, 5)


def test_tokens_of_the_paper_branch_are_normalised_and_rectified():
    module, _ = make("fc", "tokens alone")
    assert [type(layer) for layer in list(module.layers)[1:]] == [nn.LayerNorm, nn.ReLU, nn.Dropout]
    assert module.fc.in_features == 6


def test_tokens_are_averaged_where_the_backbone_reads_a_class_token():
    spec = FeatureSpec(6, "NLC", (), "token", 1, masked=True)
    head, same = (create_head("fc", spec, 5, pool=pool).eval() for pool in ("mean", "adaptive"))
    head.load_state_dict(same.state_dict())
    x, mask = torch.randn(3, 4, 6), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]])
    assert torch.equal(same(x, mask), same(x[:, :1], mask[:, :1]))
    assert not torch.allclose(head(x, mask)[0], same(x, mask)[0])
    assert torch.allclose(head(x, mask)[2], same(x, mask)[2])  # no other token
    other = x.clone()
    other[1, 2:] = 100.0  # padding
    assert torch.equal(head(other, mask)[1], head(x, mask)[1])
    with pytest.raises(ConfigError, match=r"NLC, pool 'none'\) has none to average"):
        create_head("fc", FeatureSpec(6, "NLC", (), "none"), 5, pool="mean")


# Bad input


@pytest.mark.parametrize(
    ("head", "kwargs", "words"),
    [
        ("fc", {"pool": "max"}, "adaptive, kernel, mean, got 'max'"),
        ("fc", {"pool": "mean"}, r"this exit \(NCHW, pool 'avg'\) has none to average"),
        ("fc", {"dropout": 1.0}, "got 1.0"),
        ("fc", {"dropout": -0.1}, r"got -0\.1"),
        ("fc", {"dropout": "half"}, "got 'half'"),
        ("fc", {"dropout": float("nan")}, "got nan"),
        ("fc", {"drpout": 0.1}, "head 'fc' has no argument 'drpout'; did you mean 'dropout'"),
        ("mlp", {"hidden": 0}, "got 0"),
        ("mlp", {"hidden": 2.5}, r"got 2\.5"),
        ("mlp", {"dropout": 2}, "got 2"),
        ("avg_max", {"hidden": True}, "got True"),
        ("avg_max", {"dropout": 1}, "got 1"),
        ("linear", {"dropout": 0.1}, "it takes: none"),
        ("lm", {}, "every token of a causal language model, and this exit gives NCHW"),
    ],
)
def test_bad_arguments(head, kwargs, words):
    with pytest.raises(ConfigError, match=words):
        create_head(head, SPECS["map"][0], 5, **kwargs)


def test_mean_and_maximum_of_every_channel():
    module, x = make("avg_max", "map")
    norm, hidden, second, *_ = list(module.eval().layers)[1:]
    expected = module.fc(second(hidden(norm(torch.cat([x.flatten(2).mean(2), x.flatten(2).amax(2)], 1)))).relu())
    torch.testing.assert_close(module(x), expected)
    with pytest.raises(ConfigError, match="this exit answers for every token"):
        create_head("avg_max", FeatureSpec(6, "NLC", (), "none"), 5)


def test_bad_specs():
    for values, words in (
        ({"width": 3, "format": "CHW"}, "'CHW' is unknown"), ({"width": 0, "format": "NC"}, "got 0"),
        ({"width": True, "format": "NC"}, "got True"), ({"width": 3, "format": "NLC", "pool": "sum"}, "'sum'"),
        ({"width": 3, "format": "NC", "widht": 3}, "'widht'"), ({"format": "NC"}, "lacks width"), ("x", "got 'x'"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=words):
            FeatureSpec.from_dict(values)


def test_the_table():
    assert list_heads() == ["fc", "linear", "mlp", "avg_max", "lm"]
    with pytest.raises(UnknownNameError, match="unknown head 'lineer'; did you mean 'linear'"):
        get_head("lineer")
    with pytest.raises(ConfigError, match="head 'fc' is already registered"):
        register_head("fc", ExitHead, "mine")
    assert all(get_head(name).summary for name in list_heads())
    assert "2510.04856" in get_head("fc").reference
