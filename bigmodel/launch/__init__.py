"""Processes that work together, started on one machine or several, and what becomes of them. See README.md."""

from __future__ import annotations

__all__: list[str] = []
