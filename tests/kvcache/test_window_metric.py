"""What PrefixKV is shown of a window of queries: sums over the rows of the attention maps, pass by pass."""

from __future__ import annotations

import pytest
import torch
from retaining import Recorder, retained_generate
from tiny_llama import llama_inputs, tiny_llama

from kvcache import PrefixKV

WINDOW = 6


@pytest.mark.parametrize("chunk", [None, 1, 4])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_sums_over_the_last_rows_of_the_attention_maps(attention, chunk):
    inputs = llama_inputs([20, 13, 4])
    maps = tiny_llama(attention="eager")(**inputs, output_attentions=True).attentions
    shown = []
    policy = Recorder(needs=PrefixKV(metric="window", window=WINDOW).needs, shown=shown)
    extra = {} if chunk is None else {"prefill_chunk_size": chunk}
    retained_generate(tiny_llama(attention=attention), policy, inputs, max_new_tokens=2, **extra)
    assert len(shown) == 3
    for row, stats in enumerate(shown):
        real = inputs["attention_mask"][row].bool()
        for layer, attended in zip(stats, maps, strict=True):
            rows = attended[row].double()[:, real][:, :, real][:, -WINDOW:]
            assert layer.probs is None
            torch.testing.assert_close(layer.scores.double(), rows.mean(0).sum(0), atol=1e-5, rtol=1e-5)
