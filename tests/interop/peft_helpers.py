"""What the tests beside peft do with adapters, its and ours."""

import numpy as np
import torch

from nufilt_jax.cli import main


def draw_factors(adapted, seed=None):
    """Every number of an adapter's factors as a training may leave it."""
    if seed is not None:
        torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.2 * torch.randn_like(parameter))


def weights(model):
    return {name: x.detach().numpy().copy() for name, x in model.state_dict().items()}


def nufilt(*argv):
    assert main([str(part) for part in argv]) == 0


def assert_same(ours, theirs, base):
    """To 1e-5 of what moved."""
    assert ours.keys() == theirs.keys() == base.keys()
    moved = sum(float(np.sum((theirs[name] - base[name]) ** 2)) for name in theirs) ** 0.5
    gap = sum(float(np.sum((theirs[name] - ours[name]) ** 2)) for name in theirs) ** 0.5
    assert moved > 0.1 and gap <= 1e-5 * moved
