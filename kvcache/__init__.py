"""Key/value cache: how much of it there is."""

from __future__ import annotations

from kvcache.accounting import cache_bytes, cache_slots, full_cache_bytes

__all__ = ["cache_bytes", "cache_slots", "full_cache_bytes"]
