"""One hash of weights for the whole package."""

import torch

from erde_hub.fingerprint import model_fingerprint


def test_it_sees_one_bit_and_no_memory_format():
    module = torch.nn.Conv2d(3, 4, 3)
    before = model_fingerprint(module)
    assert model_fingerprint(module.to(memory_format=torch.channels_last)) == before
    with torch.no_grad():
        module.bias[0] = torch.nextafter(module.bias[0], torch.tensor(9.0))
    assert model_fingerprint(module) != before
