"""Hypergradient estimators: one rule per file, each a small frozen object passed to :func:`diffopt.solve`.

``Adjoint``, ``Keep``, ``Trajectory``, ``Cotangents`` and ``Claims`` are what a rule of your own is written with, and
``StepByStep`` one that goes from step to step; :func:`diffopt.testing.check_estimator` tests it.
"""

from diffopt.adjoint.claims import Claims
from diffopt.adjoint.estimator import Adjoint, Estimator
from diffopt.adjoint.reverse import Reverse
from diffopt.adjoint.step_by_step import StepByStep
from diffopt.adjoint.trajectory import Cotangents, Trajectory
from diffopt.estimators.binomial import Binomial
from diffopt.estimators.es_jacobian import ESJacobian
from diffopt.estimators.first_order import FirstOrder
from diffopt.estimators.forward_mode import ForwardMode
from diffopt.estimators.implicit import Implicit
from diffopt.estimators.krylov import Krylov
from diffopt.estimators.multi_step import MultiStep
from diffopt.estimators.reptile import Reptile
from diffopt.estimators.truncated import Truncated
from diffopt.estimators.unrolled import Unrolled
from diffopt.rollout.record import Keep

__all__ = [
    "Adjoint",
    "Binomial",
    "Claims",
    "Cotangents",
    "ESJacobian",
    "Estimator",
    "FirstOrder",
    "ForwardMode",
    "Implicit",
    "Keep",
    "Krylov",
    "MultiStep",
    "Reptile",
    "Reverse",
    "StepByStep",
    "Trajectory",
    "Truncated",
    "Unrolled",
]
