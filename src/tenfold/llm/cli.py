"""The room's verbs. What computes is imported inside them, so that help is quick."""

from __future__ import annotations

from collections.abc import Callable

VERBS: dict[str, Callable[..., object]] = {}
