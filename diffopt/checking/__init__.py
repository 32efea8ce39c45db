"""``diffopt.check``: whether a loss is fit."""
