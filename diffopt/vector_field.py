"""Vector fields that are made of something else: of a map with a fixed point, of a game's losses."""

from __future__ import annotations

from diffopt.rollout.field import VectorField as VectorField
