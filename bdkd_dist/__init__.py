"""Distributed online distillation of small image classifiers whose confidence can be trusted.

The rooms, lower ones knowing nothing of upper ones: ``cli``, ``launch``, ``records``, ``engine``, ``data``,
``models``, ``metrics``, ``objectives``. The last two need torch alone. ``uris`` and ``errors`` lie below all.
"""

__version__ = "0.1.0"
