"""Batteries for estimators and optimizers of your own."""

from diffopt.testing.estimators import check_estimator

__all__ = ["check_estimator"]
