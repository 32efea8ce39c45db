"""Deliberate faults of one line each, which ``tests/mutations.py`` makes one after the other."""

from __future__ import annotations

from typing import NamedTuple


class Fault(NamedTuple):
    """One line changed in one file; ``tests`` names the tests likeliest to notice, if not those of the file's name."""

    what: str
    file: str
    old: str
    new: str
    tests: str = ""


FAULTS = [
    Fault(
        "the adjoint of the first step is dropped",
        "diffopt/stepper.py",
        "for step in range(first, last + 1):",
        "for step in range(first + (first == 1), last + 1):",
    ),
    Fault(
        "direct terms keep the last step's instead of the sum",
        "diffopt/trajectory.py",
        "self._shared[number] + term if number in self._shared else term",
        "term",
    ),
    Fault(
        "the direct term of a batch goes to the step after it",
        "diffopt/trajectory.py",
        "slice_at(number, self._stepped[number], step).copy_",
        "slice_at(number, self._stepped[number], min(step + 1, self._trajectory.steps)).copy_",
    ),
    Fault(
        "a checkpointed block starts one state late",
        "diffopt/record.py",
        "self.states[step] = state",
        "self.states[step + 1] = state",
    ),
    Fault(
        "the gradient inside a recorded step is a constant (no curvature)",
        "diffopt/stepper.py",
        "before, current, step, differentiable=True",
        "before, current, step, differentiable=False",
    ),
    Fault(
        "every step sees the first batch",
        "diffopt/dynamics.py",
        "return extra.select(axis, first)",
        "return extra.select(axis, 0)",
    ),
    Fault(
        "truncation keeps one step too many",
        "estimators/truncated.py",
        "first=trajectory.steps - self.steps + 1",
        "first=max(1, trajectory.steps - self.steps)",
    ),
    Fault("the sign of weight decay is wrong", "diffopt/optimizers.py", "grads + weight_decay", "grads - weight_decay"),
    Fault(
        "the first momentum step is dampened",
        "diffopt/optimizers.py",
        "direction if is_zero(self.dampening) or step == 1",
        "direction if is_zero(self.dampening)",
    ),
    Fault(
        "Adam's bias correction is one step behind",
        "diffopt/optimizers.py",
        "mean / (1 - beta1**step)",
        "mean / (1 - beta1 ** (step + 1))",
    ),
    Fault(
        "the root has an infinite slope at zero",
        "diffopt/leaves.py",
        "torch.where(positive, torch.where(positive, x, torch.ones_like(x)).sqrt(), torch.zeros_like(x))",
        "x.sqrt()",
    ),
    Fault(
        "a Kronecker factor is transposed",
        "diffopt/preconditioned.py",
        "(matrix @ moved",
        "(matrix.mT @ moved",
    ),
    Fault(
        "forward mode leaves out the mixed derivative",
        "estimators/forward_mode.py",
        "[*moving[:params], *read.values()]",
        "[*moving[:params], *(0 * rate for rate in read.values())]",
    ),
    Fault(
        "forward mode leaves out the tangent of the hyperparameters",
        "estimators/forward_mode.py",
        "*grads_moving, *(rates[i] for i in hypers)",
        "*grads_moving, *(0 * rates[i] for i in hypers)",
    ),
    Fault(
        "shared inputs of a vmapped pullback are not given a task axis",
        "diffopt/estimator.py",
        "own = call.wanted | set(range(count)) | set(range(inputs, len(tensors)))",
        "own = set(range(count)) | set(range(inputs, len(tensors)))",
    ),
    Fault(
        "hyperparameters batched by the inner vmap only are aligned with the outer one",
        "diffopt/dynamics.py",
        "enumerate(reversed(self.levels))",
        "enumerate(self.levels)",
    ),
    Fault(
        "random numbers are drawn anew in the backward pass",
        "diffopt/stepper.py",
        "self.record.replay(step, state",
        "self.record.replay(None, state",
    ),
    Fault(
        "a used-up record is used again",
        "diffopt/trajectory.py",
        "self.record.usable = False\n        if self.record.block",
        "self.record.usable = True\n        if self.record.block",
    ),
    Fault(
        "Reptile points away from the solution",
        "estimators/reptile.py",
        "trajectory.initial[:count] - trajectory.final[:count]",
        "trajectory.final[:count] - trajectory.initial[:count]",
    ),
    Fault(
        "an order of the binomial rule leaves out its earliest step",
        "estimators/binomial.py",
        "_write(adjoints, low - 1, updates.scan(_row(adjoints, end), low, end, pushes))",
        "_write(adjoints, low - (level < 2), updates.scan(_row(adjoints, end), low, end, pushes))",
    ),
    Fault(
        "the binomial rule forgets its scale",
        "estimators/binomial.py",
        "self.scale * _rows(weights, low, high)",
        "_rows(weights, low, high)",
    ),
    Fault(
        "the binomial rule takes mixed products at every order",
        "estimators/binomial.py",
        "mixed = level == self.order and curvature.reads_wanted",
        "mixed = curvature.reads_wanted",
    ),
    Fault(
        "the binomial window is one step too long",
        "estimators/binomial.py",
        "self.trajectory.steps - self.curved + 1",
        "max(1, self.trajectory.steps - self.curved)",
    ),
    Fault(
        "E' is taken without its curvature's step (C instead of E)",
        "diffopt/update_blocks.py",
        "adjoints[self._part(out)] * _of_steps(f, first - self._first, end - self._first)",
        "adjoints[self._part(out)]",
    ),
    Fault(
        "the hyperparameters' terms of parallel rules are dropped",
        "diffopt/update_blocks.py",
        "return dict(zip(hypers, terms, strict=True))",
        "return {}",
    ),
    Fault(
        "the Krylov rule leaves out its free last step",
        "estimators/krylov.py",
        "            stack = stack + residual\n",
        "",
    ),
    Fault(
        "the Krylov system has the wrong sign",
        "estimators/krylov.py",
        "return x - self.apart(self.scan(",
        "return x + self.apart(self.scan(",
    ),
    Fault(
        "a window's updates all count as its first step",
        "diffopt/dynamics.py",
        "(step - 1) * self.window + i + 1",
        "(step - 1) * self.window + 1",
    ),
    Fault(
        "the last window is not short",
        "diffopt/dynamics.py",
        "return min(self.window, self.inner_steps - (step - 1) * self.window)",
        "return self.window",
    ),
    Fault(
        "the implicit system lacks the identity",
        "diffopt/implicit.py",
        "return v - through_step(v, moving).state",
        "return through_step(v, moving).state",
    ),
    Fault(
        "the implicit rule gives the proximal center no hypergradient",
        "diffopt/implicit.py",
        "initial[i] = cotangent[i] + term",
        "initial[i] = cotangent[i]",
    ),
    Fault(
        "conjugate gradients take the old residual for the direction",
        "diffopt/linear_solve/conjugate_gradient.py",
        "p = r + tasks.times(",
        "p = r + tasks.times(alpha, ap) + tasks.times(",
    ),
    Fault(
        "negative curvature goes unnoticed",
        "diffopt/linear_solve/conjugate_gradient.py",
        "breakdown = breakdown | (active & ~(curvature > 0))",
        "breakdown = breakdown",
    ),
    Fault(
        "the Neumann series adds what it should subtract",
        "diffopt/linear_solve/neumann.py",
        "x, r = x + move, r - matvec(move)",
        "x, r = x + move, r + matvec(move)",
    ),
    Fault(
        "orthonormal directions lack their factor",
        "estimators/es_jacobian.py",
        "return frame.movedim(-1, 0).to(base.device), float(size)",
        "return frame.movedim(-1, 0).to(base.device), 1.0",
    ),
    Fault(
        "central differences are divided by one radius",
        "estimators/es_jacobian.py",
        "slope = (high - low) / (2 * self.radius)",
        "slope = (high - low) / self.radius",
    ),
    *(
        Fault(f"lifting: {what}", f"diffopt/{file}.py", old, new, "from_torch")
        for what, file, old, new in [
            ("no_grad in a step cuts", "pure", 'if name == "_set_grad_enabled"', 'if name == "never"'),
            ("a root's slope at zero is infinite", "pure", "torch.ones_like(x), x).sqrt()", "x, x).sqrt()"),
            ("a learned zero is left out", "pure", 'return question == "ne"', 'return question == "eq"'),
            ("a changed view goes unnoticed", "pure", "if any(source is not target and", "if any(False and"),
            ("an old view goes unnoticed", "pure", "if source.value is not seen and", "if False and"),
            ("a number loses its derivative", "pure", "value.double() if", "value.detach().double() if"),
            ("an option's derivative is lost in alpha", "pure", "else x + alpha * y", "else x + alpha.detach() * y"),
            ("tasks take the first one's branch", "pure", "!= bool(plain.any())", "!= bool(plain.all())"),
            ("all leaves get the first one's option", "torch_rule", "learned_cell(x, part[0])", "learned_cell(x, 0)"),
            (
                "the count of steps is one ahead",
                "lift_memory",
                "value = _expected(memory, step - 1)",
                "value = _expected(memory, step)",
            ),
            ("state is given back at the first step too", "torch_rule", "if step > 1:", "if step > 0:"),
            ("a changed attribute goes unnoticed", "torch_rule", "before.get(name) != after.get(name)", "False"),
            ("values are not compared", "lift_check", "if not error <= allowed:", "if error > 9:"),
            ("dead coordinates are not looked at", "lift_check", "for dead in (False, True)", "for dead in (False,)"),
            ("derivatives are not compared", "lift_check", "if abs(got - expected) <=", "if 0 <="),
            ("batches are not compared", "lift_check", "if not error <= 1e-6", "if error > 9"),
        ]
    ),
    Fault(
        "the last order of the binomial rule leaves out its latest step",
        "estimators/binomial.py",
        "low, high = first_curved + self.order - level, steps - level + 1",
        "low, high = first_curved + self.order - level, steps - level + (level < self.order)",
    ),
    Fault(
        "the loss's terms of the Krylov rule belong to the adjoints after the free step",
        "estimators/krylov.py",
        "system.curvature.product(system.turned(stack, cotangent), 1, direct)",
        "system.curvature.product(system.turned(stack + residual, cotangent), 1, direct)",
    ),
    Fault(
        "the Krylov rule reports its residual in no unit",
        "estimators/krylov.py",
        "torch.where(size > 0, left_over / size, 0)",
        "left_over",
    ),
    Fault(
        "products that are not needed are counted",
        "diffopt/parallel.py",
        "len(steps) if counted is None else counted",
        "len(steps)",
        "costs",
    ),
    Fault(
        "the mixed derivatives of a batch of steps are dropped",
        "diffopt/parallel.py",
        "direct.add(steps[0], {number: term})",
        "pass",
        "binomial",
    ),
    Fault(
        "GMRES does not orthogonalise",
        "diffopt/linear_solve/gmres.py",
        "w = w - tasks.times(column[-1], q)",
        "w = w + 0 * tasks.times(column[-1], q)",
    ),
    Fault(
        "GMRES believes its recurrence instead of the residual",
        "diffopt/linear_solve/gmres.py",
        "size = tasks.norm(b - matvec(x)) if used",
        "size = 0 * tasks.norm(b - matvec(x)) if used",
    ),
    Fault(
        "a task that has converged moves on with the others",
        "diffopt/linear_solve/conjugate_gradient.py",
        "alpha = torch.where(active, rr / torch.where(active, curvature, 1), 0)",
        "alpha = rr / curvature",
    ),
    Fault(
        "the Neumann series steps by the largest eigenvalue instead of its inverse",
        "diffopt/linear_solve/neumann.py",
        "step, used = 1 / largest_eigenvalue(",
        "step, used = largest_eigenvalue(",
    ),
    Fault(
        "a diverging Neumann series is a solution",
        "diffopt/linear_solve/neumann.py",
        "breakdown = ~(residual <= first)",
        "breakdown = residual != residual",
    ),
    Fault(
        "Nystrom's small system lacks the damping",
        "diffopt/linear_solve/nystrom.py",
        "c.mT @ c / rho",
        "c.mT @ c",
    ),
    Fault(
        "in half precision the recurrence's residual stands for the true one",
        "diffopt/linear_solve/conjugate_gradient.py",
        "if precision or (rr.dtype",
        "if (rr.dtype",
        "half_precision",
    ),
    Fault(
        "in single precision the recurrence's residual stands for the true one",
        "diffopt/linear_solve/conjugate_gradient.py",
        "(rr.dtype != torch.float64 and not all_stopped(converged))",
        "False",
        "linear_solve",
    ),
    Fault(
        "compiled pullbacks leave the curvature out",
        "diffopt/compiled.py",
        "autodiff.filled(found, params), current",
        "autodiff.or_zeros(found, params), current",
        "compiled",
    ),
    Fault(
        "compiled steps of one optimizer serve another",
        "diffopt/compiled.py",
        "structures, autocast, optimizer)",
        "structures, autocast)",
        "compiled",
    ),
    Fault(
        "compiled steps of one window serve another",
        "diffopt/compiled.py",
        "(*self._what, self._dynamics.window, updates)",
        "(*self._what, updates)",
        "compiled",
    ),
    Fault(
        "step by step, the push is taken away",
        "diffopt/step_by_step.py",
        "(x + y for x, y in zip(before, push",
        "(x - y for x, y in zip(before, push",
        "step_by_step",
    ),
    Fault(
        "step by step, the mixed products are lost",
        "diffopt/step_by_step.py",
        "self._direct.add(step, dict(zip(read, terms[count:], strict=True)))",
        "pass",
        "step_by_step",
    ),
    Fault(
        "compiled pullbacks forget the rollout's autocast",
        "diffopt/trajectory.py",
        "with self.record.replay(None, self.final[0].device):",
        "if True:",
        "compiled",
    ),
    Fault(
        "chunks of tasks draw their own numbers where all should draw the same",
        "diffopt/over_tasks.py",
        'randomness.snapshot(device) if call.randomness == "same" else None',
        "None",
        "over_tasks",
    ),
    Fault(
        "a linked step's gradient runs through the update before it",
        "diffopt/stepper.py",
        "[p.view_as(p) if p.requires_grad else p.detach().requires_grad_() for p in params]",
        "list(params)",
        "update_blocks",
    ),
    Fault(
        "squares are summed in half precision",
        "diffopt/linear_solve/base.py",
        "pairs = zip(a.widened(), b.widened(), strict=True)",
        "pairs = zip(a, b, strict=True)",
        "half_precision",
    ),
    Fault(
        "the fixed point is never that of the whole state",
        "diffopt/implicit.py",
        "if not whole_state or _same(after[i], trajectory.final[i])]",
        "]",
    ),
    Fault(
        "stationarity is measured against the whole way, not the average step",
        "diffopt/implicit.py",
        "dynamics.steps * distance / way",
        "distance / way",
        "compare",
    ),
    Fault(
        "a copy that watches hides from the problem what rule it is given",
        "diffopt/compare.py",
        "steps = copy.copy(rule), list[int]()",
        "steps = Reverse(1), list[int]()",
    ),
    Fault(
        "a comparison looks once whether the problem repeats itself",
        "diffopt/compare.py",
        "_refuse_change(expected, loss)",
        "pass",
    ),
    Fault(
        "every rule counts as used",
        "diffopt/compare.py",
        "used=bool(solves)",
        "used=True",
    ),
    Fault(
        "tasks share their random directions",
        "estimators/es_jacobian.py",
        "frame = q * r.diagonal",
        "frame = q.reshape(-1, *q.shape[-2:])[0].expand(q.shape) * r.diagonal",
    ),
]
