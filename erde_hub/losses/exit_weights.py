"""How much each exit counts in a loss: explicit numbers, or presets from the literature.

Methods differ in nothing but these numbers when they train exits jointly with cross-entropy, so the numbers have names.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from erde_hub.errors import ConfigError, InputTypeError, unknown_name


def _uniform(num_exits: int, progress: float) -> list[float]:
    """All 1 (Huang et al., Multi-Scale Dense Networks, arXiv 1703.09844)."""
    return [1.0] * num_exits


def _sdn(num_exits: int, progress: float) -> list[float]:
    """Early exits grow with training to 0.9 i / n, the final one has 1 (Kaya et al., arXiv 1810.07052)."""
    early = num_exits - 1
    largest = [0.9 * i / early for i in range(1, early + 1)]
    return [min(c, 0.01 + progress * c) for c in largest] + [1.0]


def _linear(num_exits: int, progress: float) -> list[float]:
    """In proportion to the exit's number, with the sum one half (Ilhan et al., EENet, arXiv 2301.07099)."""
    return [e / (num_exits * (num_exits + 1)) for e in range(1, num_exits + 1)]


def _branchynet(num_exits: int, progress: float) -> list[float]:
    """Early exits 1, final exit 0.3 (Teerapittayanon et al., BranchyNet, arXiv 1709.01686, on a two-exit AlexNet)."""
    return [1.0] * (num_exits - 1) + [0.3 if num_exits > 1 else 1.0]


_PRESETS: dict[str, Callable[[int, float], list[float]]] = {
    "uniform": _uniform,
    "msdnet": _uniform,
    "sdn": _sdn,
    "linear": _linear,
    "branchynet": _branchynet,
}


def list_exit_weights_presets() -> list[str]:
    """Returns the names of all presets."""
    return list(_PRESETS)


def exit_weights_preset(name: str, num_exits: int, epoch: int | None = None, epochs: int | None = None) -> list[float]:
    """Returns one weight per exit, shallow to deep, the final classifier last.

    ``uniform`` (also ``msdnet``)
        1 for every exit.
    ``sdn``
        Shallow-Deep Networks: 1 for the final exit, min(C_i, 0.01 + epoch C_i / epochs) for early exit i of n, so that
        early exits hardly disturb the young backbone. C_i = 0.9 i / n, which for the six early exits of the paper is
        0.15, 0.30, ... 0.90, the fraction of the network's cost at which they sit; other n follow the same line, an
        extension of ours. Without an epoch: the end, C.
    ``linear``
        EENet's backbones: e / (E (E + 1)) for exit e of E, counted from 1; the weights sum to one half.
    ``branchynet``
        1 for early exits and 0.3 for the final one. Published for one early exit on AlexNet; several get 1 each. A
        single exit, which has nothing to be balanced against, gets 1.

    Args:
        name: A preset.
        num_exits: Exits, the final classifier included.
        epoch: Epoch that is about to be trained, from 1; read by ``sdn``, checked for all.
        epochs: Epochs of the whole training.

    Raises:
        UnknownNameError: No preset has that name.
        ConfigError: No exits; an epoch outside 1 to ``epochs``; one of the two without the other.

    References:
        MSDNet, arXiv 1703.09844. Shallow-Deep Networks, arXiv 1810.07052. EENet, arXiv 2301.07099 (weights as in its
        code). BranchyNet, arXiv 1709.01686.

    Example:
        >>> exit_weights_preset("linear", 3)
        [0.08333333333333333, 0.16666666666666666, 0.25]
        >>> [round(w, 4) for w in exit_weights_preset("sdn", 3, epoch=10, epochs=100)]
        [0.055, 0.1, 1.0]
    """
    if not isinstance(name, str) or name not in _PRESETS:
        raise unknown_name("exit_weights preset", name, _PRESETS)
    if isinstance(num_exits, bool) or not isinstance(num_exits, int) or num_exits < 1:
        raise ConfigError(f"num_exits must be a whole number of at least 1, got {num_exits!r}")
    return _PRESETS[name](num_exits, check_epoch(epoch, epochs))


def check_epoch(epoch: int | None, epochs: int | None) -> float:
    """Returns epoch / epochs, or 1 where neither is given.

    Raises:
        ConfigError: One without the other, not whole numbers, or an epoch outside 1 to ``epochs``.
    """
    if epoch is None and epochs is None:
        return 1.0
    whole = all(isinstance(value, int) and not isinstance(value, bool) for value in (epoch, epochs))
    if not whole or epoch is None or epochs is None or not 1 <= epoch <= epochs:
        raise ConfigError(f"epoch counts from 1 to epochs and both are needed, got epoch={epoch!r}, epochs={epochs!r}")
    return epoch / epochs


def check_exit_weights(exit_weights: object) -> str | tuple[float, ...]:
    """Returns a preset's name or the weights as a tuple of floats.

    Raises:
        UnknownNameError: No preset has that name.
        InputTypeError: Neither a name nor a sequence of numbers.
        ConfigError: A weight is negative, infinite or NaN, or none is above 0.
    """
    if isinstance(exit_weights, str):
        if exit_weights not in _PRESETS:
            raise unknown_name("exit_weights preset", exit_weights, _PRESETS)
        return exit_weights
    if not isinstance(exit_weights, Sequence):
        raise InputTypeError(
            f"exit_weights must be one number per exit or a preset ({', '.join(_PRESETS)}), got {exit_weights!r}"
        )
    for exit_, weight in enumerate(exit_weights):
        if isinstance(weight, bool) or not isinstance(weight, (int, float)):
            raise InputTypeError(f"exit_weights[{exit_}] must be a number, got {weight!r}")
        if not math.isfinite(weight) or weight < 0:
            raise ConfigError(f"exit_weights[{exit_}] must be finite and at least 0, got {weight!r}")
    if not any(exit_weights):
        raise ConfigError(f"exit_weights {list(exit_weights)!r} leave nothing to train: at least one must be above 0")
    return tuple(float(weight) for weight in exit_weights)


def weights_per_exit(
    exit_weights: str | Sequence[float], num_exits: int, epoch: int | None = None, epochs: int | None = None
) -> list[float]:
    """Returns one number per exit from what :func:`check_exit_weights` let through.

    Args:
        exit_weights: A preset's name, or the weights.
        num_exits: Exits, the final classifier included.
        epoch: As in :func:`exit_weights_preset`.
        epochs: As in :func:`exit_weights_preset`.

    Raises:
        ConfigError: The weights are not one per exit.
    """
    if isinstance(exit_weights, str):
        return exit_weights_preset(exit_weights, num_exits, epoch, epochs)
    if len(exit_weights) != num_exits:
        raise ConfigError(
            f"exit_weights has {len(exit_weights)} entries, {list(exit_weights)}, for {num_exits} exits: give one"
            " weight per exit, the final one included"
        )
    return list(exit_weights)
