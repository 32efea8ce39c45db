"""Hypergradient estimators: one estimator per file, each a small frozen object passed to :func:`diffopt.solve`.

All docstrings write one step as ``s_{t+1} = U_t(s_t, g_t; eta)``, where ``s_t`` is the state (params and buffers)
before step ``t = 1, ..., T``, ``g_t`` the inner gradient there and ``eta`` the optimizer's hyperparameters
(derivations, section 0). ``C_t``, ``E_t``, ``D_t`` are the derivatives of ``U_t`` in ``s_t``, ``g_t``, ``eta``; ``H_t``
and ``M_t`` those of ``g_t`` in the params and in what the loss reads; ``P`` takes the params out of a state. So a whole
step has the derivatives ``J_t = C_t + E_t H_t P`` in the state and ``B_t = D_t + E_t M_t`` in the rest, and
``Lambda_t`` (the adjoint) is the derivative of the outer loss ``F`` in ``s_{t+1}``. ``nabla`` leaves out the explicit
derivative of the outer loss, which ordinary autograd adds. An HVP is one product that gives ``H_t u`` and ``M_t' u``.

``Adjoint``, ``Keep``, ``Trajectory``, ``Cotangents`` and ``Claims`` are what an estimator of your own is written with;
``StepByStep`` helps an estimator that goes from step to step, and :func:`diffopt.testing.check_estimator` tests it.
``Reverse`` is in ``diffopt/adjoint/reverse.py``, because it is the default and the core does not import this folder.
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
