"""Key/value cache: what it holds, and (from the next release on) what of it is retained."""

from __future__ import annotations

from kvcache.accounting import cache_bytes, cache_slots

__all__ = ["cache_bytes", "cache_slots"]
