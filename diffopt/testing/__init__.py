"""Tests for an estimator or an optimizer of your own, the same that the library's pass.

``check_estimator(MyEstimator())`` and ``check_optimizer(MyOptimizer(lr=0.1))`` need no test framework: they return a
:class:`Report` or raise one :class:`diffopt.ConformanceError` that names every broken claim. In pytest::

    def test_my_estimator():
        check_estimator(MyEstimator())

What an estimator claims is its :class:`diffopt.estimators.Claims`; the default claims everything.
"""

from diffopt.reports import Finding, Report
from diffopt.testing.estimators import check_estimator
from diffopt.testing.optimizers import check_optimizer

__all__ = ["Finding", "Report", "check_estimator", "check_optimizer"]
