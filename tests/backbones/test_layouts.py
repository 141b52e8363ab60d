"""Which axis of a feature holds the channels: found out, said by the user, or refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torchvision
from torch import Tensor, nn

from erde_hub import EarlyExitWrapper, list_exit_points
from erde_hub.errors import ConfigError, ErdeError, ExitPointError
from erde_hub.heads import list_heads
from tests.fakes.networks import Call


class Net(nn.Module):
    """A stem, a stage whose output is read, and a mean over its other axes; any of them may be a function."""

    def __init__(self, stem: nn.Module, stage: Callable[[Tensor], Tensor], axes: tuple[int, ...], width: int) -> None:
        super().__init__()
        self.stem, self.stage = stem, stage if isinstance(stage, nn.Module) else Call(stage)
        self.axes, self.fc = axes, nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage(self.stem(x))
        return self.fc(x.mean(self.axes) if self.axes else x)


class OneSize(nn.Conv2d):
    """Takes images of one size, as networks with a table of positions do."""

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[-1] == 12
        return super().forward(x)


class Frames(nn.Conv2d):
    """Frames (N, T, C * F) of a spectrogram (N, T, F)."""

    def __init__(self) -> None:
        super().__init__(1, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x[:, None]).permute(0, 2, 1, 3).flatten(2)


def _conv(width: int, kind: type[nn.Conv2d] = nn.Conv2d) -> nn.Conv2d:
    return kind(3, width, 3, padding=1)


def _last(layer: nn.Module) -> nn.Sequential:
    return nn.Sequential(layer, Call(lambda x: x.permute(0, 2, 3, 1)))


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str, int]] = {
    "channels last": (lambda: Net(_conv(16), lambda x: x.permute(0, 2, 3, 1), (1, 2), 16), (3, 12, 12), "NHWC", 16),
    "channels first": (lambda: Net(_conv(16), torch.relu, (2, 3), 16), (3, 12, 12), "NCHW", 16),
    "a cube": (lambda: Net(_conv(12), lambda x: x.permute(0, 2, 3, 1), (1, 2), 12), (3, 12, 12), "NHWC", 12),
    "one size, norm": (lambda: Net(_last(_conv(12, OneSize)), nn.LayerNorm(12), (1, 2), 12), (3, 12, 12), "NHWC", 12),
    "one size, activation": (lambda: Net(_conv(12, OneSize), nn.GELU(), (2, 3), 12), (3, 12, 12), "NCHW", 12),
    "one pixel": (lambda: Net(_conv(12), lambda x: x.mean((2, 3), True), (2, 3), 12), (3, 12, 12), "NCHW", 12),
    "signals": (lambda: Net(nn.Conv1d(3, 16, 3), torch.relu, (2,), 16), (3, 20), "NCL", 16),
    "sequences": (lambda: Net(nn.Linear(6, 16), torch.relu, (1,), 16), (20, 6), "NLC", 16),
    "recurrent": (lambda: Net(nn.Linear(6, 16), Call(lambda x: x.cumsum(1)), (1,), 16), (16, 6), "NLC", 16),
    "patches of an image": (lambda: Net(_conv(12), lambda x: x.flatten(2), (2,), 12), (3, 12, 12), "NCL", 12),
    "tokens of an image": (lambda: Net(_conv(12), lambda x: x.flatten(2).mT, (1,), 12), (3, 12, 12), "NLC", 12),
    "vectors": (lambda: Net(nn.Linear(6, 16), nn.ReLU(), (), 16), (6,), "NC", 16),
}  # fmt: skip


@pytest.mark.parametrize("name", NETS)
def test_channels_are_found(name):
    make, size, layout, width = NETS[name]
    model = EarlyExitWrapper(make(), exits=["stage"], input_size=size).eval()
    assert (model.config.exit_features[0]["format"], model.config.exit_features[0]["width"]) == (layout, width)
    assert model(torch.randn(2, *size), output_all_exits=True).exit_logits[0].shape == (2, 4)


@pytest.mark.parametrize(
    ("make", "name", "width", "layout"),
    [
        (torchvision.models.swin_t, "features.3", 192, "NHWC"),
        (torchvision.models.convnext_tiny, "features.3", 192, "NCHW"),
        (torchvision.models.vit_b_16, "encoder.layers.encoder_layer_5", 768, "NLC"),
    ],
)
def test_networks_of_torchvision(make, name, width, layout):
    with torch.device("meta"):
        net = make(weights=None, num_classes=5)
    point = EarlyExitWrapper(net, exits=[name], input_size=(3, 224, 224)).config.exit_features[0]
    assert (point["width"], point["format"]) == (width, layout)


def _open() -> nn.Module:
    """One size, and no layer that tells."""
    return Net(_conv(12, OneSize), lambda x: x * x.sigmoid(), (2, 3), 12)


SIZE = (3, 12, 12)


class Recurrent(nn.GRU):
    """Takes sequences of width 32 and returns the states alone."""

    def __init__(self) -> None:
        super().__init__(32, 12, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x)[0]


@pytest.mark.parametrize("reader", [Recurrent, lambda: nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 12))])
def test_what_the_next_layer_takes_outranks_a_size_that_it_does_not_take(reader):
    """Twice as many bands make its input wider, twice as many frames do not."""
    model = EarlyExitWrapper(Net(Frames(), reader(), (1,), 12), exits=["stem"], input_size=(10, 8))
    feature = model.config.exit_features[0]
    assert (feature["width"], feature["format"]) == (32, "NLC")


@pytest.mark.parametrize("width", [144, 12])
@pytest.mark.parametrize("name", ["stage", "stage.0"])
def test_a_linear_layer_over_tokens_is_asked_for(name, width):
    """As in an MLP-Mixer: the layer claims the last axis, which follows the size of the image."""
    over_tokens = nn.Sequential(nn.Linear(144, 144), Call(lambda x: x.sin()))
    net = Net(nn.Sequential(_conv(width), nn.Flatten(2)), over_tokens, (2,), width)
    with pytest.raises(ExitPointError, match=r"cannot be told which axis.*write feature_format="):
        EarlyExitWrapper(net, exits=[name], input_size=SIZE)


def test_what_stays_open_is_asked_for():
    with pytest.raises(
        ExitPointError, match=r"\(N, 12, 12, 12\).*write feature_format=\{'stage': 'NCHW'\} where it is the second"
    ):
        EarlyExitWrapper(_open(), exits=["stage"], input_size=SIZE)
    assert [p.name for p in list_exit_points(_open(), SIZE)] == ["stem"]
    points = list_exit_points(_open(), SIZE, feature_format={"stage": "NCHW"})
    assert [(p.name, p.format) for p in points] == [("stem", "NCHW"), ("stage", "NCHW")]


@pytest.mark.parametrize("said", ["NCHW", ["NCHW"], {"stage": "NCHW"}])
@pytest.mark.parametrize("exits", [["stage"], ["stem", "stage"]])
def test_what_the_user_says_is_taken_and_kept(said, exits, tmp_path):
    if isinstance(said, list):
        said = said * len(exits)
    model = EarlyExitWrapper(_open(), exits=exits, input_size=SIZE, feature_format=said)
    assert [feature["format"] for feature in model.config.exit_features] == ["NCHW"] * len(exits)
    model.save_pretrained(tmp_path)
    assert (
        EarlyExitWrapper.from_pretrained(tmp_path, backbone=_open()).config.exit_features == model.config.exit_features
    )


@pytest.mark.parametrize(
    ("said", "error", "words"),
    [
        ("NWHC", ConfigError, "must be one of NCHW, NHWC, NLC, NCL, NC, got 'NWHC'"),
        ({"stag": "NCHW"}, ConfigError, "names 'stag', which is no exit; did you mean 'stage'"),
        (["NCHW", "NCHW"], ConfigError, "2 entries for 1 named exits"),
        ({"stage": "NLC"}, ConfigError, "the output of this stage has 4 axes"),
        ("NLC", ExitPointError, "write feature_format"),  # says nothing about a map
    ],
)
def test_what_cannot_be_said(said, error, words):
    with pytest.raises(error, match=words):
        EarlyExitWrapper(_open(), exits=["stage"], input_size=SIZE, feature_format=said)


def test_features_without_the_samples_in_front():
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.rnn, self.fc = nn.Linear(6, 8), nn.GRU(8, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.rnn(self.stem(x).transpose(0, 1))[0][-1])

    with pytest.raises(ErdeError, match="batch-first"):
        EarlyExitWrapper(Turned(), exits=["rnn"], input_size=(7, 6))
    net = Net(nn.Linear(6, 8), lambda x: x.transpose(0, 1), (0,), 8)
    with pytest.raises(ExitPointError, match="the samples along its first axis"):
        EarlyExitWrapper(net, exits=["stage"], input_size=(7, 6))


@pytest.mark.parametrize("head", [name for name in list_heads() if name != "lm"])
def test_heads_read_signals_along_the_right_axis(head):
    make, size, *_ = NETS["signals"]
    model = EarlyExitWrapper(make(), exits=["stage"], head=head, input_size=size).eval()
    turned = Net(nn.Conv1d(3, 16, 3), lambda x: x.relu().mT, (1,), 16)
    other = EarlyExitWrapper(turned, exits=["stage"], head=head, input_size=size).eval()
    other.load_state_dict(model.state_dict())
    x = torch.randn(3, *size)
    ours, theirs = (m(x, output_all_exits=True).exit_logits[0] for m in (model, other))
    assert other.config.exit_features[0]["format"] == "NLC"
    torch.testing.assert_close(ours, theirs)
