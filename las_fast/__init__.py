"""las_fast: Listen, Attend and Spell, fast and proven."""

__version__ = "0.2.0"
