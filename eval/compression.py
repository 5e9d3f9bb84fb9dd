"""The decoder of MAD's compression task: from one state of a model, all that it has read."""

from __future__ import annotations

import math

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class Compressor(nn.Module):
    """A model without its language head, and the decoder of Poli et al. 2024 (athms/mad-lab at 0f49a45,
    mad/model/auto_encoder.py): to the state after the last column each position's sinusoids are added, two layers of
    the same width read the sum, and a linear map gives the token at that position. labels[t] is for logits[t].

    Here the state has passed the model's own last norm before, which the official code leaves out.
    """

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.encoder = model.base_model
        width = model.config.hidden_size
        if width % 2:
            raise ValueError(f"hidden_size is {width}; half of it are sines and half cosines, so give an even number")
        self.decoder = nn.Sequential(
            nn.RMSNorm(width),
            nn.Linear(width, width),
            nn.GELU(),
            nn.RMSNorm(width),
            nn.Linear(width, width),
            nn.GELU(),
            nn.RMSNorm(width),
            nn.Linear(width, model.config.vocab_size),
        )
        for module in self.decoder:
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> CausalLMOutput:
        """Logits (B, T, V) of all tokens of input_ids (B, T), and with labels (B, T) the mean loss where they are not
        -100."""
        state = self.encoder(input_ids=input_ids).last_hidden_state[:, -1:]  # (B, 1, C)
        logits = self.decoder(state + sinusoids(input_ids.shape[1], state))  # (B, T, V)
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100)
        return CausalLMOutput(loss=loss, logits=logits)


def sinusoids(length: int, like: torch.Tensor) -> torch.Tensor:
    """Sines, then cosines of positions 0 to length - 1 at wavelengths from 2 pi to 20,000 pi, (length, C) for `like`
    (..., C)."""
    half = like.shape[-1] // 2
    rates = torch.exp(torch.arange(half, device=like.device) * (-math.log(10000) / max(1, half - 1)))  # (C / 2,)
    angles = torch.arange(length, device=like.device)[:, None] * rates  # (T, C / 2)
    return torch.cat([angles.sin(), angles.cos()], dim=1).to(like.dtype)
