"""The loss of a regression, and what it refuses."""

import pytest
import torch

from erde_hub.errors import ConfigError, InputTypeError, LabelError, ShapeError
from erde_hub.losses import MSELoss, create_addition, create_loss, list_additions, mse_loss


def test_squared_errors_by_hand():
    outputs = [torch.tensor([[0.0, 1.0], [2.0, 2.0]]), torch.tensor([[1.0, 1.0], [0.0, 0.0]])]
    targets = torch.tensor([[1.0, 1.0], [0.0, 3.0]])
    result = MSELoss(exit_weights=[2.0, 0.5])(outputs, None, targets)
    assert result.exit_terms["mse"].tolist() == [(1 + 0 + 4 + 1) / 4, (0 + 0 + 0 + 9) / 4]
    assert result.loss.item() == 2 * 1.5 + 0.5 * 2.25
    expected = sum(torch.nn.functional.mse_loss(exit_, targets) for exit_ in outputs)
    assert mse_loss(outputs, targets) == expected


def test_one_target_is_one_column_and_never_broadcast():
    outputs, targets = [torch.randn(4, 1)], torch.randn(4)
    loss = create_loss("mse")(outputs, None, targets).loss
    torch.testing.assert_close(loss, (outputs[0][:, 0] - targets).square().mean())
    assert loss == create_loss("mse")(outputs, None, targets[:, None]).loss


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        (torch.tensor([0, 1]), InputTypeError, r"must be floats, got torch.int64.*labels.float\(\)"),
        ([0.0, 1.0], InputTypeError, "must be a tensor of real numbers, got list"),
        (torch.zeros(2), ShapeError, r"must have shape \(2, 2\), one number per sample and target, got \(2,\)"),
        (torch.tensor([[0.0, 1.0], [float("nan"), 0.0]]), LabelError, r"labels\[1, 0\] is nan"),
    ],
)
def test_labels_that_are_no_targets(labels, error, message):
    with pytest.raises(error, match=message):
        MSELoss()([torch.zeros(2, 2)], None, labels)


@pytest.mark.parametrize("name", list_additions())
def test_what_compares_probabilities_cannot_join(name):
    with pytest.raises(ConfigError, match=name):
        MSELoss().add(create_addition(name))
