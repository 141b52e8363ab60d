"""Every policy of the table, the learned ones with weights drawn at random."""

from __future__ import annotations

import torch

from erde_hub.policies import ExitPolicy, LearnedPolicy, create_policy, get_policy

#: Policies that decide without having been fitted.
PLAIN = ["entropy", "confidence", "margin", "patience", "never", "always"]


def make_policy(name: str, exits: int = 5, classes: int = 4, seed: int = 0) -> ExitPolicy:
    if not issubclass(get_policy(name).cls, LearnedPolicy):
        return create_policy(name)
    wanted = {"num_exits": exits, "num_classes": classes}
    kwargs = {"eefp": ["num_exits"], "eenet": ["num_exits", "num_classes"], "set_size": ["num_exits"]}[name]
    policy = create_policy(name, **{key: wanted[key] for key in kwargs})
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for buffer in policy.buffers():
            value = torch.randn(buffer.shape, generator=generator)
            buffer.copy_(value.sigmoid() if name == "set_size" else value)
    return policy
