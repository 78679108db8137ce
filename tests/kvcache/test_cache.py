"""The layer and the cache without a model: slots, sizes, bytes, rows."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from retaining import Ends
from tiny_llama import tiny_llama
from tiny_models import tiny
from transformers import T5Config
from transformers.cache_utils import DynamicSlidingWindowLayer

from kvcache import cache_bytes, full_cache_bytes
from kvcache.cache import RetainedCache
from kvcache.layer import RetainedLayer
from vlmeff.errors import RetentionStateError, UnsupportedCacheError, UnsupportedModelError

B, H, D = 2, 2, 4


def states(*slots, rows=B):
    """Keys [rows, H, len(slots), D] that say which row, head and slot they are of."""
    slot = torch.tensor(slots, dtype=torch.float32)[None, None, :, None]
    row = torch.arange(rows)[:, None, None, None] * 1000
    return (slot + row + torch.arange(H)[:, None, None] * 100).expand(rows, H, -1, D).contiguous()


def push(layer, *slots, rows=B):
    layer.announce(len(slots), None)
    return layer.update(states(*slots, rows=rows), -states(*slots, rows=rows))


def filled(length, *, headroom=0):
    layer = RetainedLayer(headroom)
    push(layer, *range(length))
    return layer


def compacted(layer, columns, *, valid=None, prompt_length, per_head=False):
    index = torch.tensor(columns)
    slots = index if valid is None else index.masked_fill(~torch.tensor(valid)[:, None].bool(), -1)
    valid = None if valid is None else torch.tensor(valid).bool()
    layer.compact(index, valid, slots.int(), prompt_length=prompt_length, per_head=per_head)
    layer.evict_from = index.shape[-1]
    return layer


def held(layer):
    """The slots that the keys themselves are of, [B, H, C]; and that the values go with them."""
    assert torch.equal(layer.keys, -layer.values)
    return (layer.keys[..., 0] % 100).long()


@pytest.mark.parametrize("headroom", [0, 1, 5])
def test_the_columns_that_stay_and_those_that_follow(headroom):
    layer = compacted(filled(6, headroom=headroom), [[[0, 2, 5]], [[1, 3, 4]]], prompt_length=6)
    for slot in (6, 7, 8):
        keys, values = push(layer, slot)
        assert keys.shape == values.shape == (B, H, layer.physical_length, D)
    assert held(layer)[:, 0].tolist() == [[0, 2, 5, 6, 7, 8], [1, 3, 4, 6, 7, 8]]
    assert torch.equal(held(layer)[:, 0], layer.slots().long())
    assert (layer.get_seq_length(), layer.physical_length, layer.get_mask_sizes(2)) == (9, 6, (11, 0))


def test_heads_may_keep_different_columns():
    index = [[[0, 1], [2, 3]], [[1, 3], [0, 2]]]
    layer = compacted(filled(4), index, prompt_length=4, per_head=True)
    push(layer, 4)
    assert held(layer).tolist() == [[[0, 1, 4], [2, 3, 4]], [[1, 3, 4], [0, 2, 4]]]
    assert layer.slots().tolist() == held(layer).tolist()


def test_fillers_are_invalid_and_what_follows_is_not():
    layer = compacted(filled(4), [[[0, 2, 3]], [[3, 3, 3]]], valid=[[1, 1, 1], [0, 0, 1]], prompt_length=4)
    push(layer, 4)
    assert layer.valid.int().tolist() == [[1, 1, 1, 1], [0, 0, 1, 1]]
    assert layer.slots().tolist() == [[0, 2, 3, 4], [-1, -1, 3, 4]]


def test_tokens_behind_the_prompt_survive_compaction():
    layer = compacted(filled(6), [[[0, 3]], [[1, 2]]], prompt_length=4)
    assert held(layer)[:, 0].tolist() == [[0, 3, 4, 5], [1, 2, 4, 5]]
    assert layer.slots().tolist() == [[0, 3, 4, 5], [1, 2, 4, 5]]


@pytest.mark.parametrize("headroom", [0, 8])
def test_compaction_frees_the_prompt(headroom):
    layer = filled(50, headroom=headroom)
    pointers = {t.untyped_storage().data_ptr() for t in (layer.keys, layer.values)}
    compacted(layer, [[[0, 9]], [[1, 2]]], prompt_length=50)
    push(layer, 50)
    gc.collect()
    alive = [t for t in gc.get_objects() if type(t) is torch.Tensor and t.layout == torch.strided]
    assert not [t for t in alive if t.untyped_storage().data_ptr() in pointers and t.numel() > B * H * 5 * D]
    capacity = 3 + headroom
    assert layer.nbytes() == 2 * B * H * capacity * D * 4 + layer.kept_slots.nbytes
    assert layer.keys.untyped_storage().nbytes() == B * H * capacity * D * 4


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_order_of_steps_keeps_keys_values_slots_and_validity_together(data):
    """Against a list of slots for each row."""
    layer = compacted(
        filled(6, headroom=data.draw(st.sampled_from([0, 3]))),
        [[[0, 2, 5]], [[4, 4, 5]]],
        valid=[[1, 1, 1], [0, 1, 1]],
        prompt_length=6,
    )
    model, names, seen = [[0, 2, 5], [-1, 4, 5]], [0, 1], 6
    for _ in range(data.draw(st.integers(1, 12))):
        step = data.draw(st.sampled_from(["push", "push", "crop", "drop", "reorder", "repeat", "select"]))
        if step == "push":
            count = data.draw(st.integers(1, 3))
            new = list(range(seen, seen + count))
            keys = torch.cat([states(*new, rows=2)[name : name + 1] for name in names])
            layer.announce(count, None)
            layer.update(keys, -keys)
            model, seen = [row + new for row in model], seen + count
        elif step == "crop":
            tail = next((i for i, slot in enumerate(reversed(model[0])) if slot != seen - 1 - i), len(model[0]))
            count = data.draw(st.integers(0, min(tail, seen - 6)))
            layer.crop(-count)
            model, seen = [row[: len(row) - count] for row in model], seen - count
        elif step == "drop":
            start = min(layer.evict_from, len(model[0]))
            count = data.draw(st.integers(0, 2))
            layer.drop_columns(start, count)
            model = [row[:start] + row[start + count :] for row in model]
        else:
            rows = len(model)
            if step == "reorder":
                order = data.draw(st.lists(st.integers(0, rows - 1), min_size=rows, max_size=rows))
                layer.reorder_cache(torch.tensor(order))
            elif step == "repeat" and rows < 8:
                order = [r for r in range(rows) for _ in range(2)]
                layer.batch_repeat_interleave(2)
            else:
                order = data.draw(st.lists(st.integers(0, rows - 1), min_size=1, max_size=rows))
                layer.batch_select_indices(torch.tensor(order))
            model, names = [model[r] for r in order], [names[r] for r in order]
    assert layer.seen == seen
    assert layer.slots().tolist() == model
    for row, slots in enumerate(model):
        for column, slot in enumerate(slots):
            assert bool(layer.valid[row, column]) == (slot >= 0)
            if slot >= 0:
                assert held(layer)[row, 0, column] == slot
                assert layer.keys[row, 0, column, 0] // 1000 == names[row]


def test_a_copy_goes_its_own_way():
    for headroom in (0, 4):
        layer = compacted(filled(4, headroom=headroom), [[[0, 1]], [[0, 1]]], prompt_length=4)
        push(layer, 4)
        twin = copy.deepcopy(layer)
        push(layer, 5)
        push(twin, 5, rows=B)
        twin.keys.zero_()
        push(layer, 6)
        assert held(layer)[0, 0].tolist() == [0, 1, 4, 5, 6]
        assert twin.seen == 6


def test_a_layer_filled_in_inference_mode_goes_on_outside():
    with torch.inference_mode():
        layer = compacted(filled(4, headroom=8), [[[0, 1]], [[0, 1]]], prompt_length=4)
        push(layer, 4)
    push(layer, 5)
    assert held(layer)[0, 0].tolist() == [0, 1, 4, 5]


def test_reset_makes_a_fresh_layer():
    layer = compacted(filled(4, headroom=2), [[[0]], [[1]]], prompt_length=4)
    push(layer, 4)
    layer.reset()
    assert (layer.seen, layer.physical_length, layer.compacted, layer.valid, layer.nbytes()) == (0, 0, False, None, 0)
    push(layer, 0, 1)
    assert held(layer)[0, 0].tolist() == [0, 1]


def test_what_a_layer_cannot_do_is_refused():
    layer = compacted(filled(4), [[[0]], [[1]]], prompt_length=4)
    with pytest.raises(RetentionStateError, match="wrapped model that filled it"):
        layer.update(states(4), states(4))
    with pytest.raises(ValueError, match="positive"):
        layer.crop(1)
    with pytest.raises(RetentionStateError, match="no_grad"):
        filled(2).update(states(2).requires_grad_(), states(2))


# The cache.


def test_only_plain_full_attention_layers_are_replaced():
    cache = RetainedCache(tiny("gemma3").config, Ends())
    kinds = [type(layer) for layer in cache.layers]
    assert kinds == [DynamicSlidingWindowLayer, DynamicSlidingWindowLayer, RetainedLayer]
    assert cache.retained == (2,)
    assert cache.is_croppable


def through(cache, *slots, rows=B):
    """A pass as the hooks make it."""
    cache.begin_pass(len(slots))
    for position, index in enumerate(cache.retained):
        cache.layer(position).announce(len(slots), None)
        cache.update(states(*slots, rows=rows), -states(*slots, rows=rows), index)
        cache.after_layer(position)


def ends_cache(**options):
    policy = Ends(**{name: options.pop(name) for name in list(options) if name in Ends.__dataclass_fields__})
    return RetainedCache(tiny_llama(layers=2).config, policy, **options)


def test_the_report_counts_what_is_there():
    cache = ends_cache(keep_ratio=0.5)
    empty = cache.report()
    assert (empty.bytes, empty.full_bytes, empty.keep_ratio) == (0, 0, None)
    through(cache, *range(10))
    through(cache, 10)
    report = cache.report()
    per_column = B * H * D * 2 * 4
    assert [(r.layer, r.seen, r.prompt_tokens, r.kept, r.columns) for r in report.layers] == [
        (0, 11, (10, 10), (5, 5), 6),
        (1, 11, (10, 10), (5, 5), 6),
    ]
    slots = B * 5 * 4
    assert report.bytes == sum(r.bytes for r in report.layers) == 2 * (6 * per_column + slots) == cache_bytes(cache)
    assert report.full_bytes == 2 * 11 * per_column == full_cache_bytes(cache)
    assert report.keep_ratio == 0.5
    assert cache.get_seq_length() == 11


@pytest.mark.parametrize("headroom", [0, 40])
def test_fixed_point_matches_one_deletion_at_a_time(headroom):
    """The official rule: after each token, if the layer exceeds its share by one entry, column e goes."""
    n, kept, steps = 40, 12, 200
    for interval in (1, 4, 16):
        for distance in (0, 5, 25):
            options = {"decode": "fixed_point", "evict_distance": distance, "evict_interval": interval}
            cache = ends_cache(keep_ratio=0.3, headroom=headroom, **options)
            through(cache, *range(n))
            expected = [0, *range(n - kept + 1, n)]
            column = kept - distance if kept - distance >= 1 else kept // 2
            for t in range(1, steps + 1):
                through(cache, n + t - 1)
                expected.append(n + t - 1)
                # physical - (S + t) * keep >= 1, in whole numbers
                if len(expected) * n - (n + t) * kept >= n:
                    del expected[column]
                layer = cache.layer(1)
                assert -1 < layer.physical_length - 0.3 * (n + t) < 1 + interval
                if t % interval == 0:
                    assert layer.slots()[0].tolist() == expected
                    assert (held(layer)[0, 0] % 100).tolist() == [slot % 100 for slot in expected]


def test_window_holds_the_newest_generated_tokens():
    cache = ends_cache(keep_ratio=0.5, decode="window", decode_window=5, evict_interval=3)
    through(cache, *range(10))
    for t in range(1, 31):
        through(cache, 9 + t)
        slots = cache.layer(0).slots()[0].tolist()
        generated = slots[5:]
        assert slots[:5] == [0, 6, 7, 8, 9]
        assert generated == list(range(10 + t - len(generated), 10 + t))
        assert min(t, 5) <= len(generated) < 5 + 3
        if t % 3 == 0:
            assert len(generated) == min(t, 5)


def test_rejected_tokens_go_before_anything_is_evicted():
    cache = ends_cache(keep_ratio=0.5, prompt_length=8)
    cache.activate_past_recording()
    through(cache, *range(11))
    assert cache.layer(0).physical_length == 11
    cache.crop(-2)
    assert cache.layer(1).slots()[0].tolist() == [0, 5, 6, 7, 8]
    through(cache, 9, 10)
    cache.crop(0)
    assert cache.layer(1).slots()[0].tolist() == [0, 5, 6, 7, 8, 9, 10]
    cache.crop(-3)
    assert (cache.get_seq_length(), cache.layer(0).physical_length) == (8, 4)


def test_crop_reaches_no_evicted_slot():
    cache = ends_cache(keep_ratio=0.5)
    through(cache, *range(8))
    through(cache, 8, 9)
    with pytest.raises(RetentionStateError, match="behind the prompt"):
        cache.crop(-3)
    assert cache.get_seq_length() == 10  # refused as a whole
    windowed = ends_cache(keep_ratio=0.5, decode="window", decode_window=2, evict_interval=1)
    through(windowed, *range(8))
    for slot in range(8, 14):
        through(windowed, slot)
    with pytest.raises(RetentionStateError):
        windowed.crop(-3)
    windowed.crop(-2)


def test_a_prompt_of_unknown_length_cannot_be_assisted():
    cache = ends_cache()
    cache.activate_past_recording()
    with pytest.raises(RetentionStateError, match="prompt_length"):
        through(cache, 0, 1, 2)


def test_a_prompt_that_the_hooks_saw_in_part_is_not_evicted_from():
    cache = ends_cache(prompt_length=6)
    for index in cache.retained:
        cache.update(states(0, 1, 2), states(0, 1, 2), index)
    with pytest.raises(RetentionStateError, match="unwrapped"):
        through(cache, 3, 4, 5)


def test_reset_empties_the_cache_for_another_prompt():
    cache = ends_cache(keep_ratio=0.5)
    through(cache, *range(8))
    cache.reset()
    assert (cache.get_seq_length(), cache.prompt_length, cache.nbytes()) == (0, None, 0)
    through(cache, *range(4))
    assert cache.layer(0).slots()[0].tolist() == [0, 3]


def test_models_that_cannot_be_retained_are_refused():
    with pytest.raises(UnsupportedCacheError, match="encoder-decoder"):
        RetainedCache(T5Config(), Ends())
    config = tiny("gemma3").config.get_text_config()
    config.layer_types = ["sliding_attention"] * 3
    with pytest.raises(UnsupportedModelError, match="full-attention"):
        RetainedCache(config, Ends())
    config = tiny_llama().config
    config.kv_sharing_modes = [None, None, "reuse", "reuse"]
    with pytest.raises(UnsupportedModelError, match="keys of others"):
        RetainedCache(config, Ends())
    with pytest.raises(ValueError, match="headroom"):
        RetainedCache(tiny_llama().config, Ends(), headroom=-1)
