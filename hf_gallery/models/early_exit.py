"""Assisted decoding by the model itself: its first layers draft, all of them check (assistant_early_exit)."""

from __future__ import annotations

from typing import Any

from transformers.generation.candidate_generator import AssistedCandidateGenerator


class EarlyExit(AssistedCandidateGenerator):
    """Drafts with the first layers of the model's decoder.

    In place of transformers' own, which sets config.num_hidden_layers meanwhile: an encoder-decoder's layers need not
    follow that, and a draft that fails would leave it so.
    """

    def __init__(self, *, generation_config, **kwargs):
        super().__init__(generation_config=generation_config, **kwargs)
        self.exit_after = generation_config.assistant_early_exit
        self.generation_config.assistant_early_exit = None  # the draft is plain decoding

    def get_candidates(self, input_ids, **kwargs):
        decoder: Any
        (decoder,) = (x for x in self.assistant_model.modules() if getattr(x, "causal", False))
        decoder.exit_after = self.exit_after
        try:
            return super().get_candidates(input_ids)
        finally:
            decoder.exit_after = None
