"""Random weights for the checkpoints that the scripts here make."""

import torch


def loud(model, seed):
    """Weights wide enough that a key too many or too few shows."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            x = torch.randn(parameter.shape, generator=g)
            if "emb_layers" in name:
                x = 0.5 * x
            elif parameter.dim() > 1:
                x = 1.2 * x / parameter.shape[-1] ** 0.5
            else:
                x = 1 + 0.2 * x if "layer_norm.weight" in name else 0.3 * x
            parameter.copy_(x)
    return model.eval()
