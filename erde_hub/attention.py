"""Implementations of attention that a stored config may name."""

from __future__ import annotations

#: They come with torch and transformers, or with a package of that name; any other name would be fetched from the Hub.
ATTENTION = ("sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention")
