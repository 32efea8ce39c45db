"""Deliberate faults of one line each, which ``tests/mutations.py`` makes one after the other."""

from __future__ import annotations

import re
from typing import NamedTuple


class Fault(NamedTuple):
    """One line changed in one place; ``tests`` names the tests likeliest to notice: ``test_<tests>*.py``.

    ``where`` is a function, ``Class.method``, a class or a constant of the library, whatever file it stands in
    (``fault_places.py`` finds it): a move breaks no fault.
    """

    what: str
    where: str
    old: str
    new: str
    tests: str


def read(table: str) -> list[Fault]:
    """The faults of a table.

    Of each it has what is wrong (where, and which tests); below it, indented, after a minus what stands there, after a
    plus what is put in its place, if anything is. The bracket may stand below too, where a line would be too long.
    """
    found: list[list[str]] = []
    for line in table.splitlines():
        if line.startswith("    "):
            found[-1].append(line[4:])
        elif line and not line.startswith("#"):
            found.append([line])
    faults = []
    for what, *lines in found:
        said = what if lines[0].startswith(("- ", "+ ")) else f"{what} ({lines[0].strip('()')})"
        what, where, tests = HEADING.fullmatch(said).groups()
        faults.append(Fault(what, where, _after("- ", lines), _after("+ ", lines), tests))
    return faults


def _after(sign: str, lines: list[str]) -> str:
    return "\n".join(line.removeprefix(sign) for line in lines if line.startswith(sign))


HEADING = re.compile(r"(.+) \(([\w.]+), (\w+)\)")

TABLE = r"""
the adjoint of the first step is dropped (Replay.block, estimators)
    - for step in range(first, last + 1):
    + for step in range(first + (first == 1), last + 1):
direct terms keep the last step's instead of the sum (DirectTerms.add, binomial)
    - self._sums[place] + term if place in self._sums else term
    + term
a compiled step's direct term goes to the step before it (_compiled_sweep, compiled)
    - direct.add(step, terms[1])
    + direct.add(max(1, step - 1), terms[1])
the direct term of a batch goes to the step after it (DirectTerms.add, estimators)
    - self._layout.slice_at(place, self._sums[place], step).copy_
    + self._layout.slice_at(place, self._sums[place], min(step + 1, self._trajectory.steps)).copy_
a checkpointed block starts one state late (Keeper._store, estimators)
    - self.states[step] = state
    + self.states[step + 1] = state
the gradient inside a recorded step is a constant (no curvature) (take_step, estimators)
    - losses, params, step, differentiable=ground.linked
    + losses, params, step, differentiable=False
every step sees the first batch (Layout.slice_at, estimators)
    -             return tensor.select(axis, first)
    +             return tensor.select(axis, 0)
truncation keeps one step too many (Truncated._first, estimators)
    - return max(1, trajectory.steps - self.steps + 1)
    + return max(1, trajectory.steps - self.steps)
the sign of weight decay is wrong (decayed, optimizers)
    - grads + weight_decay
    + grads - weight_decay
the first momentum step is dampened (SGD._dampened, optimizers)
    - return direction if first else (1 - self.dampening) * direction
    + return (1 - self.dampening) * direction
Adam's bias correction is one step behind (_adam_move, optimizers)
    - mean / (1 - beta1**step)
    + mean / (1 - beta1 ** (step + 1))
the root has an infinite slope at zero (root, optimizers)
    - torch.where(zero, torch.zeros_like(x), torch.where(zero, torch.ones_like(x), x).sqrt())
    + x.sqrt()
a Kronecker factor is transposed (_multiply_axes, optimizers)
    - (matrix @ moved
    + (matrix.mT @ moved
forward mode leaves out the mixed derivative (MovingProblem.take_step, estimators)
    - tangents = [*layout.params(moving), *([rate] if of_loss else [])]
    + tangents = [*layout.params(moving), *([0 * rate] if of_loss else [])]
forward mode leaves out the tangent of the hyperparameters (MovingProblem.take_step, estimators)
    - *(rate for _ in of_update)
    + *(0 * rate for _ in of_update)
shared inputs of a vmapped pullback are not given a task axis (_Pullback.vmap, composition)
    - own = call.wanted | set(range(count)) | set(range(inputs, len(tensors)))
    + own = set(range(count)) | set(range(inputs, len(tensors)))
hyperparameters batched by the inner vmap only are aligned with the outer one (Dynamics._aligned, levels)
    - enumerate(reversed(self.layout.levels))
    + enumerate(self.layout.levels)
random numbers are drawn anew in the backward pass (Replay._take, randomness)
    - with self._rollout.replay(step, losses.device):
    + with self._rollout.replay(None, losses.device):
a used-up record is used again (_blocks_backwards, randomness)
    - while end >= first:
    -         record.usable = False
    + while end >= first:
    +         record.usable = True
Reptile points away from the solution (Reptile.pullback, every_rule)
    - trajectory.inputs.params - layout.params(trajectory.final)
    + layout.params(trajectory.final) - trajectory.inputs.params
an order of the binomial rule leaves out its earliest step (graded, binomial)
    - low, high = first + last - order, steps - order + 1
    + low, high = first + last - order + (order == 1), steps - order + 1
the binomial rule forgets its scale (graded, binomial)
    - scale * updates.to_gradient(
    + updates.to_gradient(
the binomial rule takes mixed products at every order (graded, binomial)
    - mixed, before = order == last and curvature.reads_wanted,
    + mixed, before = curvature.reads_wanted,
the binomial window is one step too long (Binomial.pullback, binomial)
    - first, last = trajectory.steps - curved + 1,
    + first, last = max(1, trajectory.steps - curved),
E' is taken without its curvature's step (C instead of E) (DiagonalBlocks.to_gradient, every_rule)
    - adjoints[self._part(out)] * _of_steps(f, first - self._first, end - self._first)
    + adjoints[self._part(out)]
the hyperparameters' terms of parallel rules are dropped (UpdateGraph.to_hyperparameters, binomial)
    - return dict(zip(self.hypers, terms, strict=True))
    + return {}
the Krylov system has the wrong sign (AdjointSystem.matvec, krylov)
    - return x - self.tasks_first(self.scan(
    + return x + self.tasks_first(self.scan(
a window's updates all count as its first step (Dynamics.updates, multi_step)
    - hyperparameters, i), first + i)
    + hyperparameters, i), first)
the last window is not short (Layout.length, multi_step)
    - return min(self.window, self.inner_steps - (step - 1) * self.window)
    + return self.window
the implicit system lacks the identity (LastStep.system, implicit)
    - return through if self._root else (v - past) - through
    + return through
the implicit system forgets what its update hands on (LastStep.system, implicit)
    - return through if self._root else (v - past) - through
    + return through if self._root else v - through
a minimiser may be far away if the loss's units are small (refuse_long_step, stationarity)
    - if not tracing.holds(step <= 10 * allowed
    + if False and not tracing.holds(step <= 10 * allowed
the gradient of implicit is differentiated with the wrong sign (LastStep.cotangents, implicit)
    - solution[i] = -x if self._root else x
    + solution[i] = x
the implicit rule gives the proximal center no hypergradient (LastStep.cotangents, implicit)
    - initial[i] = cotangent[i] + term
    + initial[i] = cotangent[i]
the Neumann series adds what it should subtract (Neumann.iterate, linear_solve)
    - x, r = x + move, r - matvec(move)
    + x, r = x + move, r + matvec(move)
orthonormal directions lack their factor (directions, es_jacobian)
    - return frame.movedim(-1, 0).to(base.device), float(size)
    + return frame.movedim(-1, 0).to(base.device), 1.0
central differences are divided by one radius (ESJacobian.pullback, es_jacobian)
    - group.rolled_out(-self.radius * z)) / (2 * self.radius)
    + group.rolled_out(-self.radius * z)) / self.radius
lifting: no_grad in a step cuts (AsPureFunction.__torch_function__, lift_third_party)
    - if name == "_set_grad_enabled"
    + if name == "never"
lifting: a root's slope at zero is infinite (RULES, from_torch)
    - "sqrt": root
    + "sqrt": torch.sqrt
lifting: a learned zero is left out (_answer_about, from_torch)
    - return question == "ne"
    + return question == "eq"
lifting: a changed view goes unnoticed (_put, from_torch)
    - if any(source is not target and
    + if any(False and
lifting: an old view goes unnoticed (_read, from_torch)
    - if source.value is not seen and
    + if False and
lifting: a number loses its derivative (_number, from_torch)
    - value.double() if
    + value.detach().double() if
lifting: an option's derivative is lost in alpha (_add, from_torch)
    - else input + alpha * other
    + else input + alpha.detach() * other
lifting: tasks take the first one's branch (_decide, from_torch)
    - != bool(plain.any())
    + != bool(plain.all())
lifting: all leaves get the first one's option (_updated, lift_hyperparameters)
    - learned_cell(x, part[0])
    + learned_cell(x, 0)
lifting: the count of steps is one ahead (restore, from_torch)
    - value = _expected(memory, step - 1)
    + value = _expected(memory, step)
lifting: state is given back at the first step too (_updated, from_torch)
    - if step > 1:
    -             for store
    + if step > 0:
    +             for store
lifting: a changed attribute goes unnoticed (TorchClass.observe, from_torch)
    - before.get(name) != after.get(name)
    + False
lifting: values are not compared (compare_values, from_torch)
    - if not error <= allowed:
    + if error > 9:
lifting: dead coordinates are not looked at (_check_derivatives, from_torch)
    - for dead in (False, True)
    + for dead in (False,)
lifting: derivatives are not compared (_compare_with_differences, from_torch)
    - if abs(got - expected) <=
    + if 0 <=
lifting: batches are not compared (_check_batches, lift_refusals)
    - if not error <= 1e-6
    + if error > 9
the last order of the binomial rule leaves out its latest step (graded, binomial)
    - low, high = first + last - order, steps - order + 1
    + low, high = first + last - order, steps - order + (order < last)
the loss's terms of the Krylov rule belong to the adjoints after the free step (Krylov._solved, krylov)
    - system.curvature.product(system.to_gradient(stack, cotangent), 1, direct)
    + system.curvature.product(system.to_gradient(stack + residual, cotangent), 1, direct)
products that are not needed are counted (ParallelCurvature.product, costs)
    - len(steps) if counted is None else counted
    + len(steps)
the mixed derivatives of a batch of steps are dropped (ParallelCurvature._pull, binomial)
    - direct.add_rows(steps, {place: term})
    + pass
GMRES does not orthogonalise (minimal_residual, linear_solve)
    - w = tasks.plus(w, -column[-1], q)
    + w = tasks.plus(w, 0 * column[-1], q)
GMRES believes its recurrence instead of the residual (GMRES.iterate, linear_solve)
    - size = tasks.norm(b - matvec(x)) if used
    + size = 0 * tasks.norm(b - matvec(x)) if used
a task that has converged moves on with the others (ConjugateGradient.iterate, linear_solve)
    - alpha = torch.where(active, rr / torch.where(active, curvature, 1), 0)
    + alpha = rr / curvature
the Neumann series steps by the largest eigenvalue instead of its inverse (Neumann.iterate, linear_solve)
    - step, used = 1 / largest_eigenvalue(
    + step, used = largest_eigenvalue(
a diverging Neumann series is a solution (Neumann.iterate, linear_solve)
    - breakdown = ~(residual <= first)
    + breakdown = residual != residual
Nystrom's small system lacks the damping (Nystrom.iterate, linear_solve)
    - c.mT @ c / rho
    + c.mT @ c
in half precision the recurrence's residual stands for the true one (ConjugateGradient._judged, half_precision)
    - None if precision else lambda numbers: numbers[2]
    + lambda numbers: numbers[2]
in single precision the recurrence's residual stands for the true one (ConjugateGradient._judged, linear_solve)
    - if precision or rr.dtype != torch.float64:
    + if precision:
compiled pullbacks leave the curvature out (Pullbacks._evaluate, compiled)
    - derivatives.filled(found, params), now.hyperparameters
    + derivatives.or_zeros(found, params), now.hyperparameters
compiled steps of one optimizer serve another (kind_of, compiled)
    - structures, autocast, optimizer)
    + structures, autocast)
compiled steps of one window serve another (_Lookup.__call__, compiled)
    - (*self._what, self._dynamics.layout.window, updates)
    + (*self._what, updates)
step by step, the push is taken away (StepByStep.through, step_by_step)
    - self._trajectory.layout.pushed(before, push)
    + self._trajectory.layout.pushed(before, -push)
step by step, the mixed products are lost (StepByStep.curvature, step_by_step)
    - self._direct.add(step, dict(zip(read, terms[len(params) :], strict=True)))
    + pass
compiled pullbacks forget the rollout's autocast (_compiled_sweep, compiled)
    - with trajectory.rollout.replay(None, device):
    + if True:
chunks of tasks draw their own numbers where all should draw the same (_Mean.forward, over_tasks)
    - random_state.snapshot(device) if call.randomness == "same" else None
    + None
a linked step's gradient runs through the update before it (Block.slice, update_blocks)
    - x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
    + x if x.requires_grad else x.detach().requires_grad_()
squares are summed in half precision (Tasks.dot, inner_products)
    - pairs = zip(a.widened(), b.widened(), strict=True)
    + pairs = zip(a, b, strict=True)
the fixed point is never that of the whole state (LastStep.__init__, implicit)
    - range(count if whole_state else params)
    + range(params)
stationarity is measured against the whole way, not the average step (LastStep._report, compare_notes)
    - self._layout.steps * distance / way
    + distance / way
a copy that watches hides from the problem what rule it is given (_watched, compare)
    - steps = copy.copy(estimator), list[int]()
    + steps = Reverse(1), list[int]()
a comparison looks once whether the problem repeats itself (_timed, compare)
    - _refuse_change(expected, losses[0])
    + pass
a picture draws what failed (Comparison.plot, compare)
    - rows = [row for row in self.rows if row.failure is None]
    + rows = list(self.rows)
a comparison in which everything failed is a table (compare, compare)
    - if rows and all(row.failure for row in rows):
    + if False:
an implicit rule's residual is taken for Krylov's (krylov_residual, compare)
    - if "stationarity" not in record.diagnostics]
    + ]
what is no better than zero is said of some rules only (_row_notes, compare)
    - elif row.relative_error >= 1:
    + elif row.relative_error >= 1 and row.estimator.startswith("MultiStep"):
no rule counts as random (_row, compare)
    - random=estimator.claims(max(solves, default=1)).random
    + random=False
every rule counts as used (_row, compare)
    - used=bool(solves)
    + used=True
tasks share their random directions (directions, es_jacobian)
    - frame = q * r.diagonal
    + frame = q.reshape(-1, *q.shape[-2:])[0].expand(q.shape) * r.diagonal

# the files of a run and of a data folder
a checkpoint is believed whatever its checksum (load_tensors, run_files)
    -         check_seal(content)
    +         len(content)
a file is written where it lies (replacing, run_files)
    - partial = path.with_name(path.name + ".partial")
    + partial = path
two processes write one run (lock, run_files)
    - fcntl.LOCK_EX | fcntl.LOCK_NB
    + fcntl.LOCK_SH | fcntl.LOCK_NB
the second process of a job writes the folder of the first (check_alone, run_files)
    - int(rank) > 0
    + int(rank) > 1
a changed log is taken for that of the checkpoint (MetricsLog.read, run_files)
    - if digest not in ("", self.digest):
    + if False:
a line without its end counts as one (MetricsLog.read, run_files)
    - content[: content.rfind(b"\n") + 1].splitlines
    + content.splitlines
a changed run.json is believed (Reproduction.begin, run_files)
    - if digest not in (None, self.fingerprint):
    + if False:
a unit's line belongs to any run (check_rows, run_files)
    - if (sealed or "checksum" in row) and row.get("checksum")
    + if False and row.get("checksum")
the results of a run that was lost are overwritten (RunFolder.check_unused, run_files)
    - for path in self._kept:
    + for path in self._kept[:1]:
a unit goes on from the state of another run (UnitFile.read, run_files)
    - content.get("run", self.run) != self.run
    + False
a member of a zip is unpacked whatever its size (_content, damaged_data)
    - if member.file_size > LARGEST_DRAWING:
    + if False:
every decoder is tried on a drawing (_decode, damaged_data)
    - formats=("PNG",)
    + formats=None

# arguments, means over tasks, minimisers, lifted spellings
the tasks of mean_over_tasks add up in their own half precision (_wide, over_tasks)
    - return torch.promote_types(dtype, torch.float32)
    + return dtype
axes of tasks are counted from behind below vmap, too (mean_over_tasks, over_tasks)
    - dim % leaf.ndim for
    + dim for
a task loss may write into its arguments (_refuse_changes, over_tasks)
    - if transforms.version(x) != version:
    + if False:
in_dims given as a dict is read by its keys (_dims_of_leaves, bad_inputs)
    - listed = isinstance(given, Sequence) and not isinstance(given, str)
    + listed = isinstance(given, Sequence | dict) and not isinstance(given, str)
a kink at zero is taken for a smooth minimiser (refuse_kink, stationarity)
    - elif any(map(bool, rests))
    + elif False and any(map(bool, rests))
any gradient that a step turns around is a kink's (Point.at_a_kink, stationarity)
    - turned = turned & ((self._slope(tasks, down, factor * length) - first).abs() < size / 10)
    + turned = turned & (self._slope(tasks, down, factor * length) < size / 2)
the squares of small numbers vanish in a norm (Tasks.norm, stationarity)
    - scale = power_of_two(self.largest(wide))
    + scale = torch.ones_like(self.largest(wide))
Nystrom does not look whether its matrix is symmetric (Nystrom.iterate, stationarity)
    - | ~residual.isfinite() | asymmetric
    + | ~residual.isfinite()
the root of a negative number is zero (root, arguments)
    - zero = x == 0
    + zero = x <= 0
a number that the dtype cannot hold goes to torch as alpha (Leaves.minus, arguments)
    - (abs(scale) > _LEAST_MAXIMUM and self._cannot_hold(scale))
    + False
numpy's numbers stay what they are (plain, arguments)
    - return float(value) if isinstance(value, numpy.longdouble) else value.item()
    + return value
a list of batches is read across (check_batches, arguments)
    - if _is_one_batch_per_step(batches, steps):
    + if False:
a tuple of stacked tensors is taken for a list of batches (_is_one_batch_per_step, arguments)
    - return listed and alike and steps > 1 if isinstance(batches[0], Tensor)
    + return alike and steps > 1 if isinstance(batches[0], Tensor)
a lifted step may not use torch's old orders of arguments (apply_rule, lift_spellings)
    - if len(values) == len(old) and not
    + if False and not
a first gradient that is NaN is called a divergence (refuse_divergence, checks)
    - if step == 1 and what == "the state after" and not reason:
    + if False:

# what the fuzz of the public interface found
the imaginary parts' directions change their sign (Group._at_places, complex)
    - torch.complex(x[..., 0], x[..., 1]) if complexes
    + torch.complex(x[..., 0], -x[..., 1]) if complexes
a conjugate argument is taken as it lies in memory (Group.inputs, complex)
    - torch.view_as_real(x.resolve_conj())
    + torch.view_as_real(x.conj().resolve_conj())
losses that autocast gives another dtype under vmap are written as they are (ParallelCurvature._record, solution)
    - movedim(0, -1).to(again.dtype)
    + movedim(0, -1)

# what another processor, or a path with a space, must not decide
in single precision nothing is solved whose true residual is above rtol (ConjugateGradient._judged, linear_solve)
    - torch.finfo(rr.dtype).eps ** 0.5)
    + 0.0)
a path with a space is not recognised on the compiler's command line (explanation, compiler_paths)
    - place.path.split()[0]
    + place.path
whatever the compiler stumbles over is put down to a path with a space (explanation, compiler_paths)
    - if any(word
    + if words or any(word

# odd arguments, the validator of options, and tensors without arithmetic
True is taken for an integer (is_integer, odd_arguments)
    - return isinstance(value, int) and not isinstance(value, bool)
    + return isinstance(value, int)
an integer beyond all floats ends the check of a number (as_float, odd_arguments)
    - except OverflowError:
    + except ZeroDivisionError:
an integer beyond 64 bits stays one (check_number, unusable_tensors)
    - return found if abs(number) > _LARGEST else number
    + return number
a message trusts the repr of what it shows (brief, odd_arguments)
    - except Exception:  # a repr of the user's own, too deep, or of too many digits; no message is about that
    + except ValueError:
an option is compared before its type is looked at (_is_among, odd_arguments)
    - return (value is None and None in also) or (isinstance(value, str) and str(value) in also)
    + return value in also
a tensor that has left its vmap is taken (has_escaped, unusable_tensors)
    - if _functorch.is_batchedtensor(tensor) and _functorch.maybe_get_level(tensor) > transform_level():
    + if False:
a tensor of an outer vmap is taken for one that has left its vmap (has_escaped, unusable_tensors)
    - _functorch.maybe_get_level(tensor) > transform_level():
    + _functorch.maybe_get_level(tensor) >= transform_level():
a tensor of inference mode is kept as it is (usable, unusable_tensors)
    - return tensor.clone() if made_there else tensor
    + return tensor
a number for a leaf is made from the leaf, whatever its bits (_Binder._leafwise, unusable_tensors)
    - torch.tensor(slot, dtype=x.dtype, device=x.device)
    + x.new_tensor(slot)
implicit reads check before it is checked (implicit, odd_arguments)
    - check_flag("check", check)
    + pass
cite takes whatever it is given (_refuse_what_is_not_cited, odd_arguments)
    - if not known and named.__module__.split(".")[0] != "diffopt":
    + if False:
a class is called as if it were a loss (check_function, odd_arguments)
    - if not callable(value) or isinstance(value, type):
    + if not callable(value):

# a module as a function, and the names that a program finds
a module's frozen parameters are trained (_parameters, functional)
    - for name, parameter in named.items() if parameter.requires_grad}
    + for name, parameter in named.items()}
a parameter unfrozen after functional() is a silent constant (functional, functional)
    - if any(parameter.requires_grad for parameter in frozen.values()):
    + if False:
a layer writes into the buffers that the next call reads (functional, functional)
    - {name: buffer.clone() for name, buffer in buffers.items()}
    + dict(buffers)
a module's buffers are read when its function is called (functional, functional)
    - {name: buffer.detach().clone() for name, buffer in module.named_buffers()}
    + {name: buffer.detach() for name, buffer in module.named_buffers()}
a module's function takes fewer names than the module has (functional, functional)
    - params.keys() != named.keys()
    + not params.keys() <= named.keys()
functional() hands out the module's own parameters (functional, functional)
    - parameter.detach().clone().requires_grad_()
    + parameter.detach().requires_grad_()
inputs by name do not reach the module (functional_call, functional)
    - functional_call(module, tensors, inputs, named_inputs)
    + functional_call(module, tensors, inputs, {})
a lazy module's buffers are not looked at (_parameters, functional)
    - in (*module.named_parameters(), *module.named_buffers()):
    + in module.named_parameters():
an optimizer that is given a module's parameters is told nothing (for_hyperparameter, functional)
    -     if _is_of_module(value):
    -         return "an
    +     if False:
    +         return "an
dir() shows the modules of the inside (__dir__, public_names)
    - if name.startswith("__"))}
    + if name)}

# modes, hooks, threads and transforms around a solve, and derivatives in its loss
a backward pass runs in the caller's inference mode (_Solve.backward, modes)
    - if torch.is_inference_mode_enabled() else nullcontext()
    + if False else nullcontext()
a cotangent that was made in inference mode is recorded as it is (_Solve.backward, modes)
    - c.clone() if c.is_inference() else c for c in given
    + c for c in given
batched gradients meet the old vmap (_Solve.backward, gradient_batches)
    - transforms.over_batched_grads(pullback, ordinary, level) if level else
    + transforms.over_batched_grads(pullback, ordinary, level) if False else
the old vmap's level is forgotten where its gradients are handed back (over_batched_grads, gradient_batches)
    - tuple(old._add_batch_dim(result, 0, level) for result in results)
    + tuple(result[0] for result in results)
a change between solve and backward is torch's own error (_saved_tensors, changes_before_backward)
    -         if not is_in_place(error):
    -             raise
    -         raise InPlaceError(
    +         if error:
    +             raise
    +         raise InPlaceError(
ForwardMode forgets the imaginary part (ForwardMode._derivative, complex)
    - _rate(trajectory, place, 1j * tangent, cotangent)
    + 0 * part
ForwardMode gives the imaginary part the other sign (ForwardMode._derivative, complex)
    - 1j * tangent
    + -1j * tangent
a learned argument is expanded in place of copied (MovingProblem.of, derivatives_in_the_loss)
    - .expand(tangent.shape).contiguous()
    + .expand(tangent.shape)
complex inputs are read off the memory of a flat vector (Group._at_places, complex)
    - torch.complex(x[..., 0], x[..., 1]) if complexes
    + torch.view_as_complex(x.contiguous()) if complexes
compiled arguments that are one tensor are one object (_Lookup.__call__, compiled_arguments)
    - x.contiguous().view_as(x) for x in tensors
    + x.contiguous() for x in tensors
compiled arguments keep the layout they are given in (_Lookup.__call__, compiled_arguments)
    - x.contiguous().view_as(x) for x in tensors
    + x.view_as(x) for x in tensors
a sparse argument is given to the compiler (_Lookup.__call__, compiled_arguments)
    - if any(x.layout != torch.strided for x in tensors):
    + if False:
beside a thread the global generator is set back all the same (replayed, random_threads)
    - elif threading.active_count() > 1:
    + elif False:
what fills like another tensor draws from the global generator (_OwnGenerators.__torch_dispatch__, random_threads)
    - like = _LIKE.get(func.overloadpacket.__name__)
    + like = None
an operation with a generator of the caller's draws from another (_OwnGenerators.__torch_dispatch__, random_threads)
    - func.tags or given.get("generator") is not None:
    + func.tags:
integers like another tensor begin at zero (_bounds, random_threads)
    - (0, args[1]) if len(args) == 2 else (args[1], args[2])
    + (0, args[-1])
what the last order adds is measured at the step before (graded, warnings_of_estimates)
    - norm(row(adjoints, first) - before)
    + norm(row(adjoints, first - 1) - before)
a bad estimate is told of without checks too (Trajectory.warn_if_bad, warnings_of_estimates)
    - elif self.check:
    + else:
an estimate is bad only if that of every task is (Expected.excess, warnings_of_estimates)
    - measured, 0).max()
    + measured, 0).min()
first-order rules are warned of half precision (_Solve.forward, precision_warning)
    - if low and call.estimator.claims(layout.inner_steps).second_derivatives:
    + if low:
Unrolled warns of half precision where nothing is differentiated (unroll, precision_warning)
    - if problem.check and recorded and is_imprecise
    + if problem.check and is_imprecise
whatever torch.compile has made is refused, on the way to params or not (_refuse_compiled, torch_errors)
    - any(_leads_to(node, edges) for node in compiled)
    + compiled
an iterator that has ended is Python's own error (Dynamics.losses, torch_errors)
    -         except StopIteration as error:
    -             raise torch_errors.ended_iterator() from error
    +         except StopIteration as error:
    +             raise error
a loss is given the argument itself to mark (Dynamics.losses, derivatives_in_the_loss)
    - seen = [x.view_as(x) if view else x.detach()
    + seen = [x if view else x.detach()
without a step Unrolled returns the caller's tensor (unroll, unrolled)
    - tuple(final) if steps else tuple(x.clone() for x in final)
    + tuple(final)
Unrolled does not look at its hypergradient (unroll, unrolled)
    -     if problem.check and not transforms.transforms_active():
    -         inputs
    +     if False:
    +         inputs
a loss without params has a gradient under torch.func (functional_gradient, unrolled)
    - tuple(gradients) if depends else (None,) * len(params), values
    + tuple(gradients), values
a rollout that is taken again keeps what another thread drew (Draws.look, random_threads)
    - self.known.setdefault(step, self._now)
    + self.known[step] = self._now
in a replay beside a thread it is the global generator that is looked at (snapshot, random_threads)
    - [own["cpu"].get_state() if "cpu" in own else torch.get_rng_state()]
    + [torch.get_rng_state()]
what is preserved within a replay is the global generator (restore, random_threads)
    -         if place in own:
    -             own[place].set_state(state)
    -         elif
    +         if

# reports, tables, and advice that belongs to the solver or the estimator
a finding forgets what an error expected (Finding.of, reports)
    - error.got or str(error), error.expected, error.fix, error)
    + error.got or str(error), "", error.fix, error)
a failed check raises another error than its own (Report.raise_if_failed, reports)
    - raise finding.error or self._broken_claims()
    + raise self._broken_claims()
the fix of a note is not printed (Report.__str__, reports)
    - finding.outcome != "ok" else []
    + finding.outcome == "FAIL" else []
a pipe ends a cell in Markdown (table, reports)
    - cell.replace("|", "\\|")
    + cell
a wide letter takes one column of a table (_width, reports)
    - (unicodedata.east_asian_width(x) in "WF")
    + 0
a remark widens the column that it starts in (table, reports)
    - line if len(line) == len(columns) else line[:-1] for line
    + line for line
a table takes the last column's side for all (table, reports)
    - align = align.ljust(len(columns), align[-1])
    + align = align[-1] * len(columns)
every solver that breaks down needs the same matrix (refuse_unsolved, solver_advice)
    -             solver.needs,
    +             LinearSolver.needs,
every solver that does not converge gets the same advice (refuse_unsolved, solver_advice)
    - f"{solver.if_unsolved}, or pass
    + f"{LinearSolver.if_unsolved}, or pass
why a rule is wrong is said only where zero would do as well (_row_notes, compare_notes)
    - row.rule.if_wrong and row.relative_error > 0.5
    + row.rule.if_wrong and row.relative_error >= 1
every rule with a residual is taken for Krylov's (_row_notes, compare_notes)
    - fix = row.rule.if_unsolved if row.rule is not None else ""
    + fix = "take more orders"
a small curvature is warned of (_problem_notes, compare_notes)
    -     if curvature > 1:
    +     if curvature > 0:

# errors keep their parts
an error is copied by its text alone (DiffoptError.__reduce__, error_fields)
    - return copyreg.__newobj__, (type(self), *self.args), self.__dict__
    + return type(self), self.args
an error that a subclass made without parts has no text (DiffoptError.__str__, error_fields)
    -             return super().__str__()
    +             return ""
a lifted optimizer's error loses what was expected (named, lift_refusals)
    - cannot be lifted: {error.got}", error.expected,
    + cannot be lifted: {error.got}", "",
an option's error is one sentence (check_flag, error_fields)
    - raise HyperparameterError(f"{where} is {describe(value)}", "True or False")
    + raise HyperparameterError(f"{where} is {describe(value)}, expected True or False")

# recomputation inside a loss, and hooks around a solve
a recomputation reads the module's own weights (_Unpack.__call__, recomputation)
    -             members[name] = x
    -         reads
    +             members[name] = members.get(name)
    +         reads
modules that run are not looked for (RecomputingAsBefore.opened, recomputation)
    - for running in _running_modules():
    + for running in ():
a recomputation may read any parameter (_Unpack.__call__, recomputation)
    -         self._refuse_others(list(reads.read.values()))
    -         return
    +         return
what a recomputation makes for itself is refused (_Reads.__torch_dispatch__, recomputation)
    - makes = func is torch.ops.aten.lift_fresh.default
    + makes = False
a recomputation may not read what the loss was given (RecomputingAsBefore.opened, recomputation)
    - reads.known.update(_address(x) for part in self._given for x in part)
    + reads.known.update(())
a checkpoint of another shape is torch's own error (_Unpack.__call__, recomputation)
    - except CheckpointError as error:
    + except ZeroDivisionError as error:
hooks around a solve pack its graphs (kept_out, recomputation)
    - while (pair := _top()) is not None:
    + while (pair := None) is not None:
hooks around a solve are gone after it (kept_out, recomputation)
    - in reversed(outer):
    + in ():
torch's functions stay replaced (RecomputingAsBefore.__exit__, recomputation)
    - if _evaluations == 0:
    + if _evaluations < 0:

# state that a loss keeps
a state that moves is not judged (Checks.gradient, hidden_state)
    - step in (1, self._last) and self._held.has_moved()
    + step < 0
a state is judged at the first step only (Checks.gradient, hidden_state)
    - step in (1, self._last) and self._held.has_moved()
    + step == 1 and self._held.has_moved()
a large graph is given up although the loss keeps a state (Keeper._is_too_large, hidden_state)
    - if large and not (isinstance(steps, Checks) and steps.keeps_state(block.before, losses)):
    + if large:
a second backward pass computes steps of any loss again (_rolled_out_again, hidden_state)
    - watch=Watch(state=call.watch.values)
    + watch=Watch()
numbers and objects are no state (HiddenState.has_moved, hidden_state)
    - list(map(id, self._in_places())) != self._addresses
    + False
running statistics are no state (HiddenState.has_moved, hidden_state)
    - or not all(torch.equal(x, before)
    + or not all(True
a look at a state moves it on (HiddenState.put_back, hidden_state)
    -                     x.data.copy_(numbers)
    +                     pass
a look at a state leaves its lists and attributes moved (HiddenState.put_back, hidden_state)
    -                 refill(container, old)
    +                 pass
a look at a state leaves a variable moved (HiddenState.put_back, hidden_state)
    -                     cell.cell_contents = content
    +                     pass
a look at a state leaves a generator moved (HiddenState.put_back, hidden_state)
    -                 generator.set_state(state)
    +                 pass
a state is compared loosely (HiddenState.matters, hidden_state)
    - _same(value, losses, True)
    + torch.allclose(value, losses, rtol=1e-6)

# captured tensors
captured tensors are looked for at the first step only (Checks.gradient, captures)
    - if watch.captures:
    + if watch.captures and step == 1:
wrapped tensors are looked for at the first step only (Checks.levels_at, captures)
    - return self._watch.levels if self._wrapped_are_held else _NO_LEVELS
    + return _NO_LEVELS
a user's update is looked at in the first step only (Checks.update, captures)
    - raise changed_in_place()
    -             self._refuse_captured(after, [*state
    + raise changed_in_place()
    +             step == 1 and self._refuse_captured(after, [*state
captured tangents are passed over (Checks.__init__, captures)
    - watch.values and not passes_tangents and transforms.in_dual_level()
    + False
the tangent of an argument is dropped (Dynamics.losses, tangents)
    - x.requires_grad or (transformed and not (x.is_nested or transforms.is_sparse(x)))
    + x.requires_grad
the losses have no tangent without grad mode (roll_out_recorded, tangents)
    - transforms.in_dual_level() or transforms.transforms_active()
    + transforms.in_dual_level()
an inner gradient without forward mode is not named (no_tangent_error, tangents)
    - if "forward AD" not in said and "ZeroTensors" not in said:
    + if True:
the tangent of a cotangent is dropped in part (_Solve.backward, tangents)
    - if transforms.has_tangent([c for c in cotangents if c is not None]):
    + if False:
a tangent that a task loss captures is passed over (_of_chunk, tangents)
    - if transforms.has_tangent([losses]):
    + if False:
sparse tensors are viewed (is_sparse, sparse)
    - tensor.layout in _SPARSE
    + False
a sparse cotangent stays so (_Solve.backward, sparse)
    - c.to_dense() if c is not None and transforms.is_sparse(c) else c
    + c
implicit_gradients asks for those of sparse tensors (implicit_gradients, sparse)
    - if x.is_floating_point() and not transforms.is_sparse(x)
    + if x.is_floating_point()
captured results of operations are passed over (captured_nodes, captures)
    - if at < born or (at >= _NEVER and _is_leaf_besides(node, leaves)):
    + if at >= _NEVER and _is_leaf_besides(node, leaves):
a leaf that the loss makes for itself is captured (_captured, captures)
    - if sys.getrefcount(leaf) > _references_of_a_forgotten_leaf():
    + if True:
a compiled function is compared where it was traced (_checked, compiled)
    - others = [agreement.moved(x, i) for i, x in enumerate(arguments)]
    + others = list(arguments)
a binomial estimate outside its range is not warned of (Binomial.pullback, warnings_of_estimates)
    - "last_order", 1.0, what
    + "last_order", 1e9, what

# integers that nothing can count up to
an option counts beyond all integers (check_integer, odd_arguments)
    - not low <= number < high:
    -         most
    + not low <= number:
    +         most
the power method may take any number of products (Neumann.__post_init__, linear_solve_refusals)
    - "power_iterations", 1, high=MOST + 1,
    + "power_iterations", 1,

# the layout, the loop and the records of the core
a shared hyperparameter is taken for a task's own (Layout.level, levels)
    - Flags(own[first:second], own[second:])
    + Flags(tuple(own[first:second]), (True,) * len(own[second:]))
a task's own hyperparameter is taken for a shared one (Layout.level, levels)
    - Flags(own[first:second], own[second:])
    + Flags(tuple(own[first:second]), (False,) * len(own[second:]))
in a row, the hyperparameters come before what the loss reads (Inputs.flat, binomial)
    - (*self.params, *self.buffers, *self.read, *self.hyperparameters)
    + (*self.params, *self.buffers, *self.hyperparameters, *self.read)
by name, what the loss reads is the hyperparameters (Layout.inputs, binomial)
    - Leaves(plain[second:third]), Leaves(plain[third:])
    + Leaves(plain[third:]), Leaves(plain[second:third])
a push goes away from the params (Layout.pushed, step_by_step)
    - x + y for x, y in zip(state, push
    + x - y for x, y in zip(state, push
one more axis is one that every input has (Layout.over, es_jacobian)
    - Place(part, i) in places for i
    + True for i
a window's hyperparameters are those of the update with its number (Layout.slice_at, multi_step)
    - self.step_axis(place), (step - 1) * self.window
    + self.step_axis(place), step - 1
the axis of steps comes before those of tasks (Layout.step_axis, estimators)
    - return sum([level.has(place) for level in self.levels])
    + return 0
every update of a window takes the hyperparameters of its first (Dynamics.updates, multi_step)
    - self._of_update(hyperparameters, i), first
    + self._of_update(hyperparameters, 0), first
any update counts as one of this library's (_Binder.whole, captures)
    - .__module__.startswith(_OWN)
    + .__module__.startswith("")
a record that has been used up is taken for usable (_usable, randomness)
    - if record.usable and not call.restacked and
    + if not call.restacked and
a record of fewer tasks serves a pullback of more (_usable, nesting)
    - if record.usable and not call.restacked and
    + if record.usable and
a pullback is plain although gradients are batched (_Solve.backward, gradient_batches)
    - plainly = not (level or torch.is_grad_enabled() or
    + plainly = not (torch.is_grad_enabled() or
a pullback is plain although it is recorded (_Solve.backward, nesting)
    - plainly = not (level or torch.is_grad_enabled() or
    + plainly = not (level or
a second rollout draws anew (_rolled_out_again, randomness)
    - draws=old.draws,
    + draws=None,
a second rollout forgets the first one's autocast (_rolled_out_again, solution)
    - with old.replay(None, inputs.params[0].device):
    + if True:
a second rollout is not compared with the first (_usable, randomness)
    - refuse_other_losses(*_comparable(call, again.losses, old.losses), old.autocast)
    + pass
without a step a solve returns the caller's tensor (_Solve.forward, solution)
    - x.clone() if transforms.storage(x) in taken else x for x in final
    + x for x in final
what a rule has found of the initial state is left out (Cotangents.of, complex)
    - Leaves([found.get(place, torch.zeros_like(x)) for place, x in leaves])
    + Leaves([torch.zeros_like(x) for place, x in leaves])
the adjoint ends where the initial state is not wanted (_sweep_of_blocks, derivatives_in_the_loss)
    - state_count if start > first or wanted else 0
    + state_count if wanted else 0
a compiled sweep leaves its record usable (_compiled_sweep, compiled)
    -         record.usable = False
    -         with
    +         with
updates of a window are differentiated as one (_graph_of_any, multi_step)
    -     if layout.window > 1:
    -         raise
    +     if False:
    +         raise
the last state is not stored (Keeper.before, memory)
    - (step - self.first) % self._checkpoint == 0):
    + (step - self.first) % self._checkpoint == 0 and step < self._last):
graphs given up leave the state after the first step (Keeper.after, memory)
    - self._store(step, ground.before)
    + self._store(step, ground.state)
the graph of one step is measured for all (Keeper._is_too_large, memory)
    - expected = graph_bytes(graph, self._inputs) * (self._last - self.first + 1)
    + expected = graph_bytes(graph, self._inputs)
given draws are not drawn (roll_out, randomness)
    - with random_state.replayed(known[step], device) if step in known else nullcontext():
    + with nullcontext():
a compiled loss is not compared with the loss (roll_out, compiled)
    - compiled.refuse_stale(made.losses, rows[0])
    + pass
which nodes are older than a step is forgotten (Checks._look_at, captures)
    - self._born = max([self._born, *newest])
    + self._born = -1
a user's first update without a graph is not looked at (Checks.update, captures)
    - if step > 1 or not self._watch.values or self._own_update:
    + if True:
updates that are taken again are not looked at (Replay.__init__, captures)
    - Checks(dynamics, Watch(captures=True)) if check else dynamics
    + dynamics
what keeps a state is computed again (Rollout.replay, hidden_state)
    - if self.hidden_state is not None:
    + if False:
a replay forgets the rollout's autocast (Rollout.replay, solution)
    - nullcontext() if self.autocast is None else self.autocast.entered()
    + nullcontext()
the params of a step are no views (Block.slice, solution)
    - x.view_as(x) if x.requires_grad else x.detach().requires_grad_() for x in own
    + x if x.requires_grad else x.detach().requires_grad_() for x in own
terms of single steps are those of all (Block.pullback, estimators)
    - dict(zip(self._slices_at, rest[len(self._shared) :], strict=False))
    + dict(zip(self._slices_at, rest, strict=False))
the step that is not finite is named one late (refuse_divergence, checks)
    - enumerate(sound, 1)
    + enumerate(sound, 2)
an argument that is also the params is differentiated twice by Unrolled (roll_out_recorded, solution)
    - p.view_as(p) if p.requires_grad else p.detach().requires_grad_() for p in before
    + p if p.requires_grad else p.detach().requires_grad_() for p in before
no state of a loss is looked for (Adjoint.run, hidden_state)
    - state = check and (dynamics.compile or recomputed)
    + state = False
perturbed rollouts draw anew (Group.rolled_out, es_jacobian_losses)
    - inputs, counts=counts, draws=rollout.draws)
    -         counts
    + inputs, counts=counts)
    +         counts
what is below a vmap leaves torch without it (below_vmap, nesting)
    -         _functorch.push_dynamic_layer_stack(layer)
    +         pass
an error below a vmap leaves torch without it (below_vmap, levels)
    -     finally:
    -         _functorch.push_dynamic
    +     except ZeroDivisionError:
    +         raise
    +     else:
    +         _functorch.push_dynamic
the axis of tasks stays where it is (stacked, levels)
    - stacked[i] = tensor.movedim(dim, 0)
    + stacked[i] = tensor
what tasks share comes out with an axis of tasks (below_vmap, levels)
    - if all([dim is None for dim in dims]):
    + if False:

# what the short way leaves out, and looks at late
params that a later loss has written to are taken as they are (Checks.gradient, update_blocks)
    - if self._versions != [x._version for x in params]:
    + if step == 1 and self._versions != [x._version for x in params]:
only the last of some losses is looked at (Checks._look_at_noted, captures)
    - noted, self._noted = self._noted, []
    + noted, self._noted = self._noted[-1:], []
one problem's conjugate gradients take the old residual's size (ConjugateGradient._iterate_alone, linear_solve)
    -             rr = new
    -         size
    +         size
one problem's negative curvature goes unnoticed (ConjugateGradient._iterate_alone, linear_solve)
    - breakdown, rr = True, rr if
    + breakdown, rr = False, rr if
a chunk of tasks counts as all of them to a rule that does not look at the outer loss (_of_chunk, over_tasks)
    - scale = weight if losses.dtype is torch.float16 else 1.0
    + scale = weight
a loss may not mark its arguments under a transform that is no vmap (Checks.losses, derivatives_in_the_loss)
    - marking = not self.dynamics.layout.levels
    + marking = False
a kink is looked for at zero only (refuse_kink, stationarity)
    - reach = tasks.like(16 * at.length(tasks, 1e-6), at.params)
    + reach = tasks.like(0 * at.length(tasks, 1e-6), at.params)
conjugate gradients in plain numbers although somebody differentiates (is_alone, linear_solve)
    - torch.is_grad_enabled() or transforms.transforms_active() or transforms.in_dual_level()
    + transforms.transforms_active()
direct terms by anything but places are dropped (_terms, solution)
    - if not all([type(place) is Place for place in result.direct]):
    + if False:
buffers that an update hands on are the caller's own (_Solve.forward, solution)
    - layout.steps and not layout.buffers_layout)
    + layout.steps)
beside a thread a checkpoint draws whatever comes (RecomputingAsBefore.opened, recomputation)
    - place = random_state.standing() if _draws_again(pack) else None
    + place = None

# Going on from a state.
the optimizer counts its steps from one again (Dynamics.update, going_on)
    - hyperparameters, self.layout.start + step)
    + hyperparameters, step)
a window counts its updates from one again (Layout.first_update, going_on)
    - return self.start + (step - 1) * self.window + 1
    + return (step - 1) * self.window + 1
a solution's state does not say how many steps led to it (_solution, going_on)
    - layout.start + steps
    + steps
a detached state keeps the history of its buffers (State.detach, going_on)
    - return self._map(Tensor.detach)
    + return self._map(lambda x: x)
a live optimizer's buffers are not copied (read, going_on)
    - copied = [x.detach().clone() for x in tensors]
    + copied = [x.detach() for x in tensors]
a state is written without the number of its step (_write_buffers, going_on)
    - if "step" not in values and ("step" in store or (live.exact and counts)):
    + if False:

# What is handed out along the way, and where it ends.
the cotangent of an inner loss is that of the step before (Running.at, along)
    - return [None if x is None else x.select(self.axis, step - 1)
    + return [None if x is None else x.select(self.axis, max(0, step - 2))
what is observed is no output of a block that is taken again (_blocks_backwards, along)
    - (state, step, step, again, observes=observes)
    + (state, step, step, again, observes=False)
forward mode leaves out the inner losses (MovingProblem.take_step, along)
    - along = _weighed([losses], roots, tangents, cotangents[:1])
    + along = _weighed([], roots, tangents, cotangents[:1])
forward mode leaves out how the observer reads the arguments (MovingProblem.take_step, along)
    - rates = [*layout.params(after_moving), *([rate] if of_loss else [])]
    + rates = [*layout.params(after_moving), *([0 * rate] if of_loss else [])]
unrolled losses are cut off (roll_out_recorded, along)
    - loss = loss if recorded and as_written(dynamics.loss) is dynamics.loss else loss.detach()
    + loss = loss.detach()
a field's norm is differentiated (_Solve.setup_context, along)
    - constant = 0 if isinstance(ctx.call.dynamics.loss, VectorField) else -1
    + constant = -1
the backward pass of a stopped solve takes all steps (pull_back, along)
    - call = call.until_its_end()
    -     end
    + end
tasks stop where one of them is done (take_step, along)
    -     if enough is not None and bool(enough.all()):
    -         return
    +     if enough is not None and bool(enough.any()):
    +         return
on_step cannot stop (Stop.told, along)
    -         return answer is True
    +         return False
aux keeps its graph (Dynamics.losses, along)
    - aux += [x.detach() for x in found[1:]]
    + aux += found[1:]
a stopped solve does not look at the losses that it put off (Checks.stopped, along)
    -         self._look_at_noted()
    -         if self._held is not None and self._latest
    +         if self._held is not None and self._latest

# Many cotangents of one solve.
the adjoint of every cotangent goes on from the first one's (_sweep_of_blocks, many_cotangents)
    - adjoints[i] = terms.state
    + adjoints[i if len(adjoints) < 3 else 0] = terms.state
direct terms of many cotangents are added up (_sweep_of_blocks, many_cotangents)
    - direct[i].add_block(terms)
    + direct[0].add_block(terms)
each of many cotangents has its steps taken again (_LARGE, many_cotangents)
    - _LARGE = 2**15
    + _LARGE = 2**60

# vector fields: what stands in the place of a loss, and what takes its Jacobian for symmetric
the tangents of a field go through its transpose (MovingProblem.take_step, vector_field)
    - field = stands_behind(losses)
    + field = False
a field is a constant to its second derivative (_Norm.backward, vector_field)
    - field, axes = ctx.saved_tensors, ctx.shape.axes
    + field, axes = [x.detach() for x in ctx.saved_tensors], ctx.shape.axes
the norm of a field is minimised as well (_Norm.backward, vector_field)
    - *(None,) * len(field))
    + *field)
a field without its graph passes (refuse_constant, vector_field)
    - if not depends or nonzero:
    + if False:
an entry of a field without its graph passes (refuse_constant, vector_field)
    - if not depends or nonzero:
    + if not depends:
what is compiled for a loss serves a field (kind_of, vector_field)
    - type(loss), getattr(as_written(loss), "__func__", None)
    + None, getattr(as_written(loss), "__func__", None)
conjugate gradients for a field by default (chosen_solver, field_solutions)
    - return GMRES(max_iterations=100)
    + return ConjugateGradient()
a solver of symmetric systems is taken for a field (chosen_solver, field_solutions)
    - if solver.symmetric:
    + if False:
the way to a field's root is judged by its slope along itself (refuse_long_step, field_solutions)
    - tasks.norm(product) if at.is_field else tasks.dot(direction, product)
    + tasks.dot(direction, product)
a fixed point is run away from (_Residual.__call__, field_solutions)
    - [x - y for x, y in zip(leaves, moved, strict=True)]
    + [y - x for x, y in zip(leaves, moved, strict=True)]
tasks that share a player share its gradient (_Gradient._below, games)
    - vmap.batch_size, set(range(self.players))
    + vmap.batch_size, set()
a linear loss of a game is refused (_joined, games)
    - return gradient if gradient.requires_grad else gradient + 0 * param
    + return gradient
problems that share an argument share its hypergradient (_Solved.vmap, implicit_gradients)
    - place.part in ("params", "buffers") or place in call.wanted
    + place.part in ("params", "buffers")
check compares differences of a field with its transpose (_products, check_fields)
    - if stands_behind(loss):
    + if False:
check looks at no second derivative under vmap (check, check_fields)
    - partial(probe_vmap, products=second_derivative)
    + partial(probe_vmap, products=False)

# optimizers of optimizers, proximal maps, Muon
a clipped norm lacks its small number (Clip._clipped, clip)
    - / (total + _EPS)
    + / (total + 0 * _EPS)
the norm of gradients of zero has no derivative (norm, clip)
    - return root(first)
    + return first.sqrt()
clipping by norm counts as elementwise (Clip.elementwise, clip)
    - return self.value is not None and self.optimizer.elementwise
    + return self.optimizer.elementwise
the name of a group begins a longer key (Groups._group, groups)
    - path.startswith(f"{name}.")]
    + path.startswith(name)]
a group gets the first gradients (Groups.update, groups)
    - part.of(grads), own, step
    + grads[: len(part.places)], own, step
the step size of every leaf is that of the first (Groups.proximal_step_size, prox)
    - sizes[i] for i in range
    + sizes[0] for i in range
of a tree like params a group takes the first entries (Branches.entries, groups)
    - return [named[i] for i in places]
    + return named[: len(places)]
what an optimizer holds may mix coordinates unseen (_Binder.whole, nested)
    - self.found.elementwise &= bool
    + self.found.elementwise = bool
an optimizer within is not looked at for captured tensors (_Binder.whole, nested)
    - self.found.own &= type
    + self.found.own = type
buffers of groups are taken for copies of the params (Updates.blocks, groups)
    - alike = all([count == params for _, count in layout.buffers_layout])
    + alike = True
a prox takes a step size of one (Proximal.update, prox)
    - for_each(self.optimizer.proximal_step_size, moved)
    + for_each(1.0, moved)
L1 without strength has no derivative at zero (_soft_threshold, prox)
    - (x.abs() <= threshold) & (threshold > 0)
    + x.abs() <= threshold
the shift of the simplex is a constant (Simplex._of_leaf, prox)
    - shift = (inside.sum(-1, keepdim=True) - 1)
    + shift = (inside.detach().sum(-1, keepdim=True) - 1)
the bound of a box is not learned (_bounded, prox)
    - torch.where(beyond(x, y), y, x)
    + torch.where(beyond(x, y), y.detach(), x)
the norm of a group is a constant (GroupL1._of_leaf, prox)
    - x * (1 - threshold / safe)
    + x * (1 - threshold / safe.detach())
Muon scales wide matrices for tall ones (Muon._factor, muon)
    - math.sqrt(max(1.0, rows / columns))
    + math.sqrt(max(1.0, columns / rows))
Muon's weight decay forgets the learning rate (Muon.update, muon)
    - params.minus(self.lr * self.weight_decay, params)
    + params.minus(self.weight_decay, params)
the average lags by a step (EMA.update, averaging)
    - (1 - self.decay) * after
    + (1 - self.decay) * params
look ahead comes back a step late (Lookahead.update, averaging)
    - due: Any = step % self.period == 0
    + due: Any = (step - 1) % self.period == 0
what look ahead comes back to stays where it was (Lookahead.update, averaging)
    - slow = fast + 0.0
    + slow = slow + 0.0
optimizers within others are compiled as one (_kind, nested)
    - return _without_tensors(leaf)
    + return type(leaf)
compiled steps of a dict are the same in any order (_without_tensors, nested)
    - tuple(value) if isinstance(value, dict) else ()
    + ()
compiled steps of other groups are the same (kind_of, nested)
    - (dynamics.optimizer.template), dynamics.optimizer.placed
    + (dynamics.optimizer.template), ()
the battery does not look into optimizers within (_changed, nested_optimizers)
    - return changed(leaf, change, f"{name}.")
    + return leaf
optimizers in a dict are not cited (_names, nested)
    - for value in held for part in tree.flatten(value)[0]]
    + for value in held for part in [value]]

# the cost of checks
a sum that overflows is a bad number (all_finite, finite)
    - cmath.isfinite(total) or all([bool(x.isfinite().all()) for x in numbers])
    + cmath.isfinite(total)
only the first tensor is looked at for bad numbers (all_finite, finite)
    - map(Tensor.sum, numbers)
    + map(Tensor.sum, numbers[:1])
a graph of missing derivatives is only looked at if its first node lacks one (refuse_broken, checks)
    - for node in graph if suspects else ():
    + for node in graph[:1]:
what the losses of the last steps capture is not looked at (Checks._note_captured, captures)
    - if at_once or step == self._last or len(self._noted) == _AT_ONCE:
    + if at_once or len(self._noted) == _AT_ONCE:
only the params are given to a loss, its args are captured (Checks._note_captured, captures)
    - wanted = [x for x in read if x.requires_grad]
    + wanted = []
what a step hands on past its gradient is taken for what goes through it (Block.pullback_apart, implicit)
    - through = terms[len(direct) :]
    + through = terms[: len(read)]
an update's write to its state goes unnoticed where a graph is kept (Checks.update, in_place)
    - if versions != [leaf._version for leaf in state]:
    + if False:

# batches as a function of the step, in pieces, and what is attributed to them
a stream begins anew where a state goes on (Layout.at_step, streams)
    - self.stream.at(self.start + (step - 1) * self.window)
    + self.stream.at((step - 1) * self.window)
steps taken together share the first one's batch of a stream (Layout.read_at_steps, streams)
    - *[stacked(rows, i, names[i]) for i
    + *[rows[0][i].expand(len(rows), *rows[0][i].shape) for i
a batch of a stream may require grad (Stream._refuse_bad, streams)
    - if self._recorded and leaf.requires_grad:
    + if False:
a batch of a stream may hold a tensor of a transform (Stream.__init__, streams)
    - self._levels = range(1, level + 1)
    + self._levels = range(0)
a stream may draw random numbers (Stream._asked, streams)
    - if random_state.changed(before, random_state.snapshot(self._device)):
    + if False:
another batch in a compiled pullback passes (_compiled_sweep, streams)
    - trajectory.refuse_other_losses(seen)
    + trajectory.refuse_other_losses(again)
a compiled step of a stream is taken for one of any shape (_Lookup.__call__, streams)
    - if self._dynamics.layout.stream is not None:
    + if False:
all epochs have one order (Batches._order, batches)
    - f"{self.seed} {epoch}"
    + f"{self.seed}"
the kept order serves any epoch (Batches._order, batches)
    - if known == epoch:
    + if known >= 0:
pieces of a batch count alike whatever their sizes (Layout.pieces, micro_batches)
    - (last - first) / size)
    + 1 / parts)
pieces draw other random numbers in the backward pass (pieced, micro_batches)
    - _Taken(dynamics, before if drawn else None,
    + _Taken(dynamics, None,
the pullback of a piece is not weighted (_Pieced.backward, micro_batches)
    - _add(sums, every, weight)
    + _add(sums, every, 1.0)
only the first loss is compared with its pieces (pieced, micro_batches)
    - (step & (step - 1) == 0 or step == dynamics.layout.steps)
    + step == 1
metrics are attributed in sum (_rows, attribution)
    - torch.eye(len(measured), dtype
    + torch.ones(len(measured), len(measured), dtype

# few states and one graph: schedules, checkpoints, offloading
a state is stored where a piece is too long (split, schedules)
    - longest = comb(slots + rounds - 1, slots)
    + longest = comb(slots + rounds - 1, slots) + 1
as many states are stored as steps want (stored, schedules)
    - free -= 1
    + free -= 0
the state before the last step is not kept (Keeper._plan, schedules)
    - schedules.stored(count, slots)] + [self._last])
    + schedules.stored(count, slots)])
a state that has been handed out is kept (Replay.backwards, schedules)
    - states.take(step) if step == end else states[step]
    + states[step]
steps of a second rollout are not counted (_rolled_out_again, schedules)
    - counts.extra_steps += old.steps
    + counts.extra_steps += 0
slots of stored states are used twice (Replay.backwards, schedules)
    - slots - len(states) + 1
    + slots
graphs larger than states are linked in a block (Replay.block_of_small, memory)
    - > largest(sum(map(nbytes, state)), graph, self._inputs.params):
    + > 99 * largest(sum(map(nbytes, state)), graph, self._inputs.params):
the first step of a block is begun again (_blocks_backwards, memory)
    - linked, states[start], states[start + 1] = False, state, after
    + linked, states[start] = False, state
the graph is left out of the budget (slots_within, schedules)
    - 5 * state + 2 * graph + 2
    + 5 * state + 2
more states are stored than help (Keeper._choose, schedules)
    - self._plan(min(found, max(1, self._last - self.first)))
    + self._plan(found)
compiled first steps are not looked at on a graph (roll_out, schedules)
    - looks = step == 1 and watch.values and ground.linked
    + looks = False

# buffers held fixed, and ends that are no fixed point
a velocity under a penalty is held fixed (refuse_held_buffers, prox_at_rest)
    - if layout.buffers_layout and any(
    + if not layout.buffers_layout and any(
slow weights are held fixed where a step goes back to them (refuse_held_buffers, prox_at_rest)
    - if last // optimizer.period >
    + if last // optimizer.period > 1 +
a loss of buffers that are held fixed is not told (_warn_of_held_buffers, implicit_rule)
    - if trajectory.check and not all([tracing.holds(x == 0) for x in cotangents]):
    + if False:
a buffer that moves counts as an input of the step (LastStep.__init__, implicit_rule)
    - if _same(self._after[i], trajectory.final[i])]
    + if not whole_state or _same(self._after[i], trajectory.final[i])]
an end that is no fixed point is not told (_UNFINISHED, prox_at_rest)
    - _UNFINISHED = 0.5
    + _UNFINISHED = 500.0
a prox may end at a small gradient (_stop, prox_at_rest)
    - if tol is not None and any(
    + if tol is not None and not any(

# whose buffers a state has: written into a live optimizer, and given to a solve
a state of another optimizer is written (_keys, going_on)
    - if sorted(keys.values()) != expected:
    + if False:
what a live optimizer keeps besides is left as it was (_compare_with_store, going_on)
    - if not (kept - {"step"} <= keys <= there):
    + if not keys <= there:
a buffer is not looked up by the keys of params (buffer_leaves, going_on)
    - leaves, form = tree.flatten_up_to(structure, buffer), structure
    + leaves, form = leaves, form
the dtype of a written buffer is that of the state (_write_buffers, going_on)
    - store[key] = value.detach().clone().to(live.targets[i])
    + store[key] = value.detach().clone()
a subclass of a known class is not read by its names (read, going_on)
    - names = {} if isinstance(ours, LiftedClass) else keys_of(optimizer)
    + names = {} if type(optimizer) not in KEYS else keys_of(optimizer)
a tangent that observe captures is dropped (Checks._observed_without_tangents, along)
    - if transforms.has_tangent(observed):
    + if False:

# pickles: what a data set's file may name, call, or have taken
a name that is not listed is let in (_Reader.find_class, pickle)
    - if usual not in _NAMES.split():
    + if False:
the type of a reconstructed array is not looked at (_Reader._reduce, pickle)
    - _reconstruct"), (_Named("numpy.ndarray"), _, _)
    + _reconstruct"), (_, _, _)
fields of records are passed over (_Reader._build, pickle)
    - (_, order, None, None, None, _, _, _, *_)
    + (_, order, _, _, _, _, _, _, *_)
objects may be built without a call (_OPCODES, pickle)
    -     BINPUT LONG_BINPUT MEMOIZE
    +     NEWOBJ BINPUT LONG_BINPUT MEMOIZE
a string is encoded as often as it is asked for (_Reader._reduce, pickle_bombs)
    - if self._unencoded < 0:
    + if False:
integers of any size are keys (_Reader._fill, pickle_bombs)
    - (isinstance(key, int) and abs(key) < _LARGE)
    + isinstance(key, int)
tuples are keys (_Reader._fill, pickle_bombs)
    - isinstance(key, (str, bytes)) or
    + isinstance(key, (str, bytes, tuple)) or
places in the memo may be of any size (_Reader._put, pickle_bombs)
    - if not 0 <= index < _LARGE:
    + if index < 0:
the bytes of a buffer are taken before they are read (_Reader, pickle)
    - pickle._Unpickler.dispatch[pickle.BINBYTES8[0]]
    + pickle._Unpickler.dispatch[pickle.BYTEARRAY8[0]]
lengths beyond the file are believed (_Window.read, pickle)
    - self._stream.read(size) if size <= self._left else b""
    + self._stream.read(size)
values that a pickle leaves behind are passed over (read_pickle, pickle)
    - if reader.stack or reader.metastack:
    + if reader.metastack:
the name of a kind of number is not looked at (PickledNumber.dtype, pickle)
    - if code not in _KINDS or order
    + if order
long names are kept whole (text, pickle_bombs)
    - value[:_LONGEST].decode
    + value.decode

# training again without some of the examples: what is predicted, what is measured, and the file of it
a weight that is not one is taken away as one (predictions, datamodeling)
    - (scores.detach() * weights.to(scores))
    + scores.detach()
the predicted change has the sign of the score (predictions, datamodeling)
    - torch.stack([-effects[:, chosen]
    + torch.stack([effects[:, chosen]
a training may change the weights of the next (measure, datamodeling)
    - metric(train(weights.detach().clone()))
    + metric(train(weights.detach()))
what is known is trained again (retrain, datamodeling)
    - enumerate(left_out) if number not in known]
    + enumerate(left_out)]
after a training that failed, the others go on (retrain, datamodeling)
    -             future.cancel()
    +             future.done()
a metric that is not finite is taken (finite, datamodeling)
    - if not all_finite([measured]):
    + if False:
ties have the highest of their ranks (_ranks, rank_correlation)
    - below + 0.5 * equal.double()
    + below + equal.double()
a sample with a constant column has no mean (score_and_interval, rank_correlation)
    - .nanmean(1)
    + .mean(1)
the interval leaves out twice as much (score_and_interval, rank_correlation)
    - [(1 - confidence) / 2, 0.5, (1 + confidence) / 2]
    + [1 - confidence, 0.5, confidence]
the interval lies where its samples do (score_and_interval, rank_correlation)
    - min(1.0, score + high - middle)
    + min(1.0, high)
half a line of a killed run is kept (RetrainingFile.__init__, datamodeling)
    - self._file.truncate(sum(map(len, lines)))
    + self._file.tell()
trainings of another training are gone on with (RetrainingFile._compare, datamodeling)
    - if not distance <= slack:
    + if False:
trainings of another seed are gone on with (RetrainingFile._compare, datamodeling)
    - differ = [name for name in header if found.get(name) != header[name]]
    + differ: list[str] = []
no difference is allowed to a training that is not repeatable (datamodeling_score, datamodeling)
    - slack = 10 * float(difference.max())
    + slack = 0.0
the training of other processes is not compared with that here (datamodeling_score, datamodeling)
    - if elsewhere is None else
    + if True else
noise is not warned of (_warn_of, datamodeling)
    - if noise > NOISE:
    + if False:
changes that are all alike are ordered (_refuse_alike, datamodeling)
    - if alike.any():
    + if False:
scores of other metrics are taken (check_scores, datamodeling)
    - or (metric is not None and own != tuple(metric)):
    + or False:
the least helpful examples are called the most (helpful, attribution_experiment)
    - descending=not most
    + descending=most
gradient products have the other sign (gradient_products, attribution_experiment)
    - return -products
    + return products
the damping of an influence function is doubled (influences, attribution_experiment)
    - + damping / 2 * away
    + + damping * away
a changed label may be the same (changed_labels, attribution_experiment)
    - torch.randint(1, 10, labels.shape
    + torch.randint(0, 10, labels.shape

# whether a hypergradient is worth anything
a move has not the size of what is moved (_random_moves, smoothness)
    - return size * torch.randn(
    + return torch.ones_like(size) * torch.randn(
one-sided differences of the outer loss (_slopes, smoothness)
    - for sign in (size, -size))
    + for sign in (size, 0.0))
round-off counts as roughness (_lost, smoothness)
    - return larger < noise / CLOSE and (larger > 0 or math.isinf(noise))
    + return False
a wrong derivative is taken for roughness (smoothness, smoothness)
    - False if _settled(seen, smallest) else None
    + None
chaos is judged by moves that no outer optimizer makes (Smoothness.error, smoothness)
    - for size, error in self.errors.items() if size >= _MOVES[-1])
    + for size, error in self.errors.items())
chaos is a note (probe_smoothness, check_solve)
    - if worst.error > WORTHLESS and max(found.ratios) > _GROWN:
    + if False:
kinks are taken for chaos (probe_smoothness, check_solve)
    - if worst.error > WORTHLESS and max(found.ratios) > _GROWN:
    + if worst.error > CLOSE:
a hypergradient that half precision loses is a note (probe_precision, check_solve)
    - if worst > WORTHLESS:
    + if False:
what has no influence left counts in the precision (_error, check_solve)
    - least = _SHRUNK * reference.adjoints[-1] if
    + least = 0.0 * reference.adjoints[-1] if
the pieces of a solve all begin at its first step (Whole.derivatives, check_solve)
    - start=layout.start + first, inner_steps
    + start=layout.start, inner_steps
the growth of the adjoint is read off at the wrong end (Found.ratios, check_solve)
    - norm / self.adjoints[-1]
    + norm / self.adjoints[0]
the moved solve draws other random numbers (Whole._taken, check_solve)
    - random_state.replayed(self.generators, device), warnings
    + warnings.catch_warnings(), warnings
a cast within the loss makes double precision a lower one (InDouble.__torch_function__, check)
    - if func in _CASTS
    + if False and func in _CASTS
moved meta-parameters keep their new values (_at, compare_worth)
    - stack.callback(setattr, leaf, "data", leaf.data)
    + pass
a solve in double precision starts in a lower one (problem_in_double, compare_worth)
    - Leaves(map(doubled, part)) for part in problem.inputs
    + Leaves(part) for part in problem.inputs
a loss that is evaluated again in the backward pass is in its own precision (problem_in_double, check_solve)
    - else run_in_double(loss)
    + else loss
a learned rate of double precision meets params of a lower one (_in_double, compare_worth)
    - for raised in (leaves, ()):
    + for raised in (leaves,):
a raised copy is looked for in the graph (_needs_itself, compare_worth)
    - return func in _DIFFERENTIATING or name
    + return name
estimates report their quality in no unit (Trajectory.report, krylov)
    - torch.where(whole > 0, part / whole, 0)
    + part

# the estimators, read from top to bottom
the binomial window counts steps that were not made (Binomial._curved, binomial)
    - else min(self.window, steps)
    + else self.window
an estimate of which no order is missing is reported as a bad one (Binomial.pullback, warnings_of_estimates)
    - ["last_order"] = 0 * trajectory
    + ["last_order"] = trajectory

# attention with second derivatives, and blocks that are computed again
attention's second derivative forgets that the scores move with the direction (second, attention)
    - total.add(chunk, p * h, p, along_x)
    + total.add(chunk, p * h, 0 * p, along_x)
attention's curvature is not centred (second, attention)
    - by_scores = p * _centred(p, h * y + w)
    + by_scores = p * (h * y + w)
attention's third derivative drops the pairs of a cumulant (third, attention)
    - by_scores = p * (_centred(p, products) - pairs)
    + by_scores = p * _centred(p, products)
a direction of the mask is dropped (_moving, attention)
    - return rates if x.mask is None else rates + x.mask
    + return rates
a query that sees no key gets NaN (Chunk.weights, attention)
    - return weights.masked_fill((scores == -torch.inf).all(-1, keepdim=True), 0)
    + return weights
causal attention sees one key too many (Chunk.weights, attention)
    - torch.arange(self.keys, device=scores.device) > query, -torch.inf
    + torch.arange(self.keys, device=scores.device) > query + 1, -torch.inf
what is dropped depends on the chunk (Chunk._kept, attention)
    - query = torch.arange(self.first, self.last, device=noise.device)[:, None]
    + query = torch.arange(self.last - self.first, device=noise.device)[:, None]
all heads drop the same (_noise, attention)
    - torch.arange(math.prod(batch), device=device)
    + torch.zeros(math.prod(batch), dtype=torch.int64, device=device)
tasks that share a mask get the sum of its gradients (_in_front, attention)
    - return x.expand(size, *x.shape) if x.is_floating_point() else x.unsqueeze(0)
    + return x.unsqueeze(0)
the Hessian's own derivative by its direction is zero (_Second.backward, attention)
    -         if any(needs[5:]):
    +         if False:
half precision is computed in half (_wide, attention)
    - return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    + return x
modules that call torch's function of many heads are not reached (_with_ours, attention_in_modules)
    - "scaled_dot_product_attention" in function.__code__.co_names
    + "attention" in function.__code__.co_names
another mode takes the place of attention's (_copied, attention_in_modules)
    - ours[function.__name__] = copy
    + ours[function.__name__] = function
a block is computed again with the module's own weights (_Forward._run, checkpointed_blocks)
    - outputs, buffers = transforms.functional_call(self.inside, state, inputs, named)
    + state = state if self.note.is_first else {}
    +         outputs, buffers = transforms.functional_call(self.inside, state, inputs, named)
a block draws other numbers when it is computed again (Surroundings.entered, checkpointed_blocks)
    - stack.enter_context(random_state.replayed(self._drawn, self._device))
    + stack.enter_context(random_state.replayed(None, self._device))
a block is computed again without the function modes of the loss (_under, checkpointed_blocks)
    - missing = [mode for mode in modes if id(mode) not in there]
    + missing: list[Any] = []
a block is computed again by other kernels of attention (Surroundings.entered, checkpointed_blocks)
    - if _kernels() != self._kernels:
    + if False:
a block is computed again in another mode than it was in (Surroundings.entered, checkpointed_blocks)
    - stack.enter_context(_training(self._training))
    + stack.enter_context(_training([]))
what a block writes to a buffer is lost (_Block.__call__, checkpointed_blocks)
    - buffer.copy_(written)
    + buffer.copy_(buffer)
a block may read a tensor that requires grad from elsewhere (Note.first, checkpointed_blocks)
    - if rates or leads_past(gate, found):
    + if rates:
a block may read a tensor of a transform from elsewhere (Note.first, checkpointed_blocks)
    -             if self._levels:
    +             if False:
a gradient of a block keeps the graph of its recomputation (_Pulled.__call__, checkpointed_blocks)
    -         again = torch.is_grad_enabled()
    +         again = True
tasks that share a weight of a block get the sum of its gradients (_Pulled.apart, checkpointed_blocks)
    - return self.of.apart | {*self.wanted, *range(self.count, self.count + self.cotangents)}
    + return self.of.apart | {*range(self.count, self.count + self.cotangents)}
a cache may go into a block that is computed again (Note.refuse_objects_with_tensors, checkpointed_blocks)
    - if type(x).__module__ != "builtins" and everything_held([x]).tensors:
    + if False:

# where stored states wait
a place in the file is given out twice (_File.place, offload)
    - return self.free_places[size].pop()
    + return self.free_places[size][-1]
a place in the file overlaps the next one (_File.place, offload)
    - self._end += size
    + self._end += size // 2
a written state stays in memory (_OnDisk.wait, offload)
    -         self._unwritten = self._writing = None
    +         self._writing = None
writing goes on behind the solve (Keeper.finish, offload)
    -             self.states.settle()
    +             pass
what is stored later goes to the file of before (Disk.settle, offload)
    - self._thread = self._file = None
    + self._thread = None
a state that was brought ahead outlives another with its number (Store.__setitem__, offload)
    -         self._ahead = None  # else
    +         pass  # else
a state that was brought ahead is handed out for any (Store.__getitem__, offload)
    - if ahead is not None and ahead[0] == step
    + if ahead is not None
graphs of offloaded blocks are linked (_blocks_backwards, offload)
    - kept.kept.slots is None and not states.elsewhere
    + kept.kept.slots is None
a file that was cut is read (_File.read, offload)
    - raise EOFError("the file is shorter than what was written to it")
    + break
the disk is asked for what may never come (Keeper._store, offload)
    - if step == self.first and not self._stops:
    + if step == self.first:
one state less than will be stored is expected (Disk.expect, offload)
    - if count * nbytes > free:
    + if (count - 1) * nbytes > free:

# inner data over ranks: the pair of collectives, and what is compared between ranks
the cotangents of what is copied are not summed (_Copied.backward, inner_data)
    - return None, *_where_needed(_Summed, ctx, cotangents)
    + return None, *_where_needed(_Copied, ctx, cotangents)
the cotangent of a sum is summed once more (_Summed.backward, inner_data)
    - return None, *_where_needed(_Copied, ctx, cotangents)
    + return None, *_where_needed(_Summed, ctx, cotangents)
under vmap a sum over ranks is each rank's own (_Summed.vmap, inner_data)
    - return transforms.apply(_Summed, group, *tensors), in_dims[1:]
    + return transforms.apply(_Copied, group, *tensors), in_dims[1:]
tensors that differ are copied (refuse_other_copies, inner_data)
    - if worst <= tolerance(tensors):
    + if worst <= 10 * worst:
a collective in place is not heard (FirstStep.gradient, inner_data)
    - if "c10d::" in said and
    + if "c10d::!" in said and
a gradient that is summed twice is not noticed (FirstStep._refuse, inner_data)
    - naive = _sums_twice(losses)
    + naive = _sums_twice(losses)[:0]
params that were not copied are not noticed (FirstStep._refuse, inner_data)
    - if not alike and _sums_a_scalar(losses):
    + if not alike and False and _sums_a_scalar(losses):
a sum in the midst of a model is taken for a loss (_sums_a_scalar, inner_data)
    - return bool(nodes) and all(size == losses.numel() for node
    + return bool(nodes) and all(size >= losses.numel() for node
updates that differ between ranks are not noticed (FirstStep.refuse_other_updates, inner_data)
    - if apart > replicas.tolerance(state):
    + if apart < 0:
outer losses that differ between ranks are not noticed (refuse_other_cotangents, inner_data)
    - if apart > replicas.tolerance(cotangents):
    + if apart < 0:
what each rank holds is moved on all ranks at once (refuse_held_apart, inner_data)
    - if groups.is_running() and reaches_a_sum(
    + if groups.is_running() and not reaches_a_sum(
ranks take the same tasks (Ranks.share, training)
    - return slice(ends[self.rank], ends[self.rank + 1])
    + return slice(ends[0], ends[1])
a rank with fewer tasks weighs them more (meta_gradient, training)
    - torch.autograd.backward(losses.sum() / tasks)
    + torch.autograd.backward(losses.mean() / ranks.count)
episodes are evaluated on every rank, and added up (_over_episodes, training)
    - if number % ranks.count == ranks.rank:
    + if number % ranks.count >= 0:
a wrong mean over sharded numbers is not refused (refuse_wrong_means, sharded)
    - if name in _MEANS and node
    + if name in () and node
DTensors are copied over ranks (_refuse_unusual, sharded)
    -         if is_spread(x):
    +         if is_spread(x) and x.ndim > 9:

# programs: a solve as two scans
a traced sweep forgets the direct terms of earlier steps (TracedSweep._body, compiled_programs)
    - sums = [x + direct[place] for x, place in
    + sums = [direct[place] for x, place in
a traced sweep gives the terms of steps in the wrong order (scan_back, compiled_programs)
    - return carry, [x.flip(0) for x in made]
    + return carry, made
a traced step of a continued solve counts from one (Reading.numbers, compiled_programs)
    - first, window = self._layout.first_update(stretch.first), self._layout.window
    + first, window = self._layout.first_update(1), self._layout.window
a traced window reads the batch of another (Layout.slices_at, compiled_programs)
    - first, count = self.step_axis(place), (steps.start - 1) * self.window, len(steps)
    + first, count = self.step_axis(place), steps.start - 1, len(steps)
traced running costs are those of the steps before (TracedSweep._rows, compiled_programs)
    - running = [x[stretch.first - 1 : stretch.last] for x in self._running if x is not None]
    + running = [x.roll(1, 0)[stretch.first - 1 : stretch.last] for x in self._running if x is not None]
a traced scan freezes what is captured (_finishing, compiled_programs)
    - if constant is not None:
    + if False:
a program does not tell that numbers are not finite (Trace.unsound, compiled_programs)
    - total = total + number.to(like.device)
    + total = total + 0 * number.to(like.device).nan_to_num()
a program's key has no autocast (_Given.key, compiled_outer)
    - tuple(map(_kind, self.leaves)), casts, state
    + tuple(map(_kind, self.leaves)), state
one is as good as True to a program (_kind, compiled_outer)
    - return (type(leaf), repr(leaf)) if plain else _Same(leaf)
    + return leaf if plain else _Same(leaf)
a number that is read by closure is not looked at (Reads._values, compiled_outer)
    - yield from map(content_of, self._cells)
    + yield from ()
a program is never compared again (Compiled._run, compiled_outer)
    - if unsound.isfinite().item() and entry.calls & (entry.calls - 1):
    + if unsound.isfinite().item():

# what a program's function reads besides its arguments
a function with other code is the same function (Reads._values, compiled_reads)
    - yield from (function.__code__, function.__defaults__)
    + yield from (function.__defaults__,)
defaults that were replaced are the same ones (Reads._values, compiled_reads)
    - yield from (function.__code__, function.__defaults__)
    + yield from (function.__code__,)
what stands behind a weak reference is not looked at (Reads._besides, compiled_reads)
    - yield value()
    + yield None
zeros of both signs are one to a program (_kind, compiled_reads)
    - return (type(leaf), repr(leaf)) if plain else _Same(leaf)
    + return (type(leaf), leaf) if plain else _Same(leaf)
what a module is made up of is not looked at (Reads._besides, compiled_reads)
    - (own["_modules"], *hooks)
    + hooks
classes that stand in a variable are not looked at (Reads._besides, compiled_reads)
    - yield from self._of_class(value)
    + yield from ()
what is deep inside of what is read is not looked at (everything_held, compiled_reads)
    - deeper = depth if depth == 0 and is_own(value) else depth + 1
    + deeper = depth + 1
what a trace has put into a set or a slot stays there (left_alone, compiled_reads)
    - with Reads(functions).put_back(), ExitStack() as stack:
    + with ExitStack() as stack:
what is observed is not compared (_is_right, compiled_reads)
    - return sound and known.agrees([losses, *along, *state], [plain.losses, *plain.handed_out, *end])
    + return sound and known.agrees([losses, *state], [plain.losses, *end])
a conjugate is given to a program as it lies in memory (_ready, compiled_outer)
    - tensor = tensor.resolve_conj().resolve_neg()
    + pass
zeros of both signs that a function reads are one (Reads.unchanged, compiled_reads)
    - and repr(value) == repr(old)
    + and value == old
what a function reads of an imported module is not looked at (Reads._of_modules, compiled_reads)
    - spaces += [vars(found)] if not any(vars(found) is known for known in spaces) else []
    + pass
slots of what a function reads are not looked at (Reads._values, compiled_reads)
    - yield _in_slot(owner, slot)
    + yield 0
classes of what a function reads are not looked at (Reads._of_class, compiled_reads)
    - self._attributes.append((part, name))
    + pass
numbers of small arrays are not looked at (Reads._besides, compiled_reads)
    - self._asked.append(value.tobytes)
    + pass
a tensor that an outer loss has captured gets no gradient, silently (Compiled._function, compiled_reads)
    - if given.alone and roots and trace is None:
    + if False:
a captured tensor that has come to require grad is not noticed (Program.fits, compiled_reads)
    - return list(map(_kind, self._captured)) == self._kinds
    + return True
a trace freezes a captured tensor that is given for a number (_refusing_numbers, compiled_reads)
    - if func is torch.ops.aten._local_scalar_dense.default and _is_captured(args[0]):
    + if False:
a trace freezes numbers that are gathered (_refusing_numbers, compiled_reads)
    - if func in _GATHERING and any(map(_is_captured, _within([*args, *(kwargs or {}).values()]))):
    + if False:
a trace freezes numbers that are gathered from keywords (_refusing_numbers, compiled_reads)
    - _within([*args, *(kwargs or {}).values()])
    + _within(args)
a trace freezes numbers that are gathered the old way (_GATHERING, compiled_reads)
    - , Tensor.new_tensor, Tensor.new}
    + , Tensor.new_tensor}
a trace freezes a number that is calculated from captured tensors (refuse_frozen, compiled_reads)
    - if read and not isinstance
    + if False and not isinstance

# a solve with compile=True as two programs
a program is used though what its loss reads has changed (Known.unchanged, whole_programs)
    - return self._reads is not None and self._reads.unchanged
    + return True
a program is never compared with the plain way (Known.is_due, whole_programs)
    - return not self._calls & (self._calls - 1)
    + return False
a program goes on to read the tensors of then (Known.settle, whole_programs)
    - if self.program is not None and self.program.captured:
    + if False:
whole programs have no dtype, shape or autocast in their key (kind_of, whole_programs)
    - return (*what, *kind, shapes, layout.levels, structures, autocast, optimizer)
    + return (*what, *kind, layout.levels, structures, optimizer)
a program of a schedule serves every part of it (kind_of_steps, whole_programs)
    - layout.start if any(layout.stepped.hyperparameters) else None
    + None
a program counts steps from one, wherever a solve goes on (numbers_of, whole_programs)
    - return _numbers(layout.first_update(1), layout.steps
    + return _numbers(1, layout.steps
a program that is not finite passes (roll_out_wholly, whole_programs)
    - if not unchanged or (watch.values and (due or not sound)):
    + if not unchanged or (watch.values and due):
a loss that keeps a state has a program (_is_right, whole_programs)
    - if plain.hidden_state is not None or plain.copied_to
    + if plain.copied_to
a program of the backward pass serves other inputs (_pulled, whole_programs)
    - key = ("pullback", rule, trajectory.rollout.key, trajectory.wanted, tuple([x is None for x in running]))
    + key = ("pullback", rule, trajectory.rollout.key)
a stack of states is used twice (sweeps, whole_programs)
    - record.usable, record.rollout = False, replace(rollout, stack=None)
    + record.usable, record.rollout = True, replace(rollout, stack=None)

# threads that share a module, and numbers that are given as tensors
threads may call one module at once (functional, functional)
    - with nullcontext() if torch.compiler.is_compiling() else lock:
    + with nullcontext():
a scale that is a tensor is taken for a constant (attention, attention)
    - if isinstance(number, Tensor):
    + if False:
a block may read a tensor with a tangent from elsewhere (Note.first, checkpointed_blocks)
    - rates = transforms.has_tangent(found)
    + rates = False

# what blocks that are computed again leave behind
an output of a block is the tensor that is kept for it (_Recomputed.forward, checkpointed_blocks)
    - return _of_their_own(function(*tensors), tensors)
    + return function(*tensors)
a block may change its inputs (Note.first, checkpointed_blocks)
    - if versions != list(map(transforms.version, given)):
    + if False:
what a block leaves behind is a constant (_Gate.backward, checkpointed_blocks)
    - raise ctx.refusal()
    + return None, *cotangents
what a block leaves behind is a constant under a transform (Note.first, checkpointed_blocks)
    - raise self.left_behind()
    + pass
a block may keep a state that depends on its inputs in a buffer (_Forward._run, checkpointed_blocks)
    - raise self.note.left_behind()
    + pass
a block may give other numbers when it is computed again (Note.refuse_others_than_the_first, checkpointed_blocks)
    - if self.marks is not None and not self.marks.are_of(outputs, levels):
    + if False:
the precision of autocast does not count where numbers are compared (Marks.are_of, checkpointed_blocks)
    - max(self._eps, torch.finfo(x.dtype).eps) ** _POWER
    + torch.finfo(x.dtype).eps ** _POWER
numbers that are computed again under one more vmap are others (Marks.are_of, checkpointed_blocks)
    - found = [_mark(x[(0,) * more]) for x in floating]
    + found = [_mark(x) for x in floating]
a dictionary of blocks stands for nothing (_entries, checkpointed_blocks)
    - isinstance(block, nn.ModuleList | nn.ModuleDict)
    + isinstance(block, nn.ModuleList)
a list of blocks that is called itself stands for its entries (_entries, checkpointed_blocks)
    -  or _has_forward(block):
    + :
a class is taken for a function of a name (_blocks, checkpointed_blocks)
    - isinstance(checkpoint, str | nn.Module | type)
    + isinstance(checkpoint, str | nn.Module)

# what round-off hides, and what else is told of a solve
the round-off to expect is a hundredth (_slopes, smoothness)
    - noise = 100 * torch.finfo(
    + noise = 1 * torch.finfo(
a move that is rounded to none agrees (_lost, smoothness)
    - (larger > 0 or math.isinf(noise))
    + larger > 0
two moves above round-off make a wrong derivative (_settled, check_solve)
    - return enough and all(
    + return all(
what round-off hides is the end's roughness (probe_smoothness, check_solve)
    - if worst.cut_short:
    + if False:
other random numbers in float64 are lost precision (probe_precision, check_solve)
    - if own.drawn != reference.drawn:
    + if False:
whatever draws is not set beside float64 (probe_precision, check_solve)
    - if own.drawn != reference.drawn:
    + if own.drawn:
other random numbers in float64 are lost precision to compare (worth, compare_worth)
    - drawn = torch.float64 in kinds and _drawn(run, estimator) != kinds
    + drawn = False
meta-parameters change their precision, and lose the hooks of their accumulators (_at, compare_worth)
    -             leaf.data = value
    +             leaf.data = value if raised is None else value.double()
every entry moves by the mean size of its leaf (_random_moves, smoothness)
    - torch.where(mean > 0, mean, 1), x.abs())
    + torch.where(mean > 0, mean, 1), torch.where(mean > 0, mean, 1))
an outer loss that is not defined is called rough (Worth.notes, compare_worth)
    - elif self.smoothness.undefined:
    + elif False:

# what ranks hold apart, fields over ranks, and DTensors that are spread unevenly
what a rank wants beside the states is its own (slots_within, inner_data)
    - given = largest(sum(map(nbytes, inputs.params)) + direct, nodes, inputs.params)
    + given = sum(map(nbytes, inputs.params)) + direct
tensors of other shapes are compared over ranks (deviations, inner_data)
    - if not _alike(plain, group):
    + if not _alike(plain[:0] or plain, group) and False:
a penalty of shards is taken for a loss (_sums_a_scalar, inner_data)
    - return bool(nodes) and all(size
    + return bool(nodes) and any(size
a field that is not copied is not noticed (FirstStep._refuse, inner_data)
    - if alike and self._pulled:
    + if alike and self._pulled[9:]:
what comes back along an unrolled solve is not compared (_Watched.backward, inner_data)
    - refuse_other_cotangents(ctx.copied_to, cotangents)
    + refuse_other_cotangents(ctx.copied_to, cotangents[:1])
tasks are told of another optimizer (FirstStep._refuse, inner_data)
    - self._sums = any([is_summed(node)
    + self._sums = not any([is_summed(node) and False
a graph of DTensors weighs nothing (_add_storage, sharded)
    - storage = (tensor if type(tensor) is Tensor else _on_this_rank(tensor)).untyped_storage()
    + storage = tensor.untyped_storage()
the largest entry is that of a rank (largest_modulus, sharded)
    - torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX, group=group)
    + pass
losses that are spread in other ways are stacked (placed_alike, sharded)
    - return [x.redistribute(x.device_mesh, [Replicate()] * x.device_mesh.ndim) for x in tensors]
    + return list(tensors)
too many open files are a lack of room (_errors_named, offload)
    - in (errno.EMFILE, errno.ENFILE):
    + in (errno.ENFILE,):
a block is computed again while another thread calls the module (_Turn.taken, checkpointed_blocks)
    - return self._lock if self.has_ended else nullcontext()
    + return nullcontext()
a block that a call differentiates waits for the end of the call (_Turn.taken, checkpointed_blocks)
    - return self._lock if self.has_ended else nullcontext()
    + return self._lock
what a block leaves behind when it is computed again is a constant (_Pulled.__call__, checkpointed_blocks)
    - (given[i],) = gated(self.left_behind, given[i])
    + given[i] = given[i].detach().requires_grad_()
a first step under a transform keeps the numbers that an empty vmap draws (Checks._apart, randomness)
    - if not levels or not random_state.changed(before, random_state.snapshot(device)):
    + if True:
what is evaluated a second time returns both (Checks.losses, randomness)
    - aux.clear()  # of what
    + pass  # of what

# Claims of the experiments, and the intervals they are answered from.
an interval over starts leaves the episodes out that they share (two_level, claims)
    - if crossed and len(values[0]) > 1:
    + if False:
one start has an interval of no width (two_level, claims)
    - return Effect(mean, -math.inf, math.inf, starts)
    + return Effect(mean, mean, mean, starts)
an effect whose interval reaches to both sides is shown in part (judged, claims)
    - return "partly" if zero < margin and low > zero else "not decided"
    + return "partly"
numbers of different starts are compared (Formula.effects, claims)
    - both = group.merge(here, on=["seed", "draw"],
    + both = group.assign(k=0).merge(here.assign(k=0), on=["k", "draw"],
what holds in one setting holds (together, claims)
    - if all(answer == "yes" for answer in known):
    + if any(answer == "yes" for answer in known):
every start has the same random numbers (of_start, claims)
    - work.seed += STRIDE * number
    + work.seed += 0 * number
a loss that diverges with the number of inner steps saturates (saturation, anil_experiment)
    - return abs(last) / first if first > 0
    + return last / first if first > 0
tasks of many ways come in batches of few (learn, few_shot_experiment)
    - settings.tasks if way <= 10 else settings.wide_tasks
    + settings.tasks
the braces of a claim are left as they stand (_filled, meta_transfer_experiment)
    - return item.format(**values) if isinstance(item, str) else item
    + return item
what no gain is shown for is lost (_of_accuracy, meta_transfer_experiment)
    - _gains(runs[runs["kind"] == kind])
    + True

# one frame of runs: what is stored of one, its budget, and where Ctrl-C leaves it
a resumed training forgets the time before (Training.train, cli)
    - work.is_late(before + lasted + cost)
    + work.is_late(lasted + cost)
a training keeps no time for its next iteration (Training.train, cli)
    - work.is_late(before + lasted + cost)
    + work.is_late(before + cost)
a training keeps no time for its evaluation (Training.train, cli)
    - work.is_late(before + lasted + cost)
    + work.is_late(before + lasted)
lines after the checkpoint stay in the log (Training.train, resume)
    - self.log.cut()
    + pass
Ctrl-C saves nothing (Work.step, cli)
    - if out_of_time or heard or
    + if out_of_time or
what is said after Ctrl-C forgets the data (Run.run, cli)
    - [] if data is None else
    + [] if True else
a run of other versions is resumed (Header.check_same, reproduce)
    - if (here := getattr(self, name)) != there:
    + if (here := getattr(self, name)) is None:
a stored option may be a text where the command line makes a number (_check_value, resume)
    - parse(str(value)) == value
    + str(parse(str(value))) == str(value)
an option given again replaces that of the run to resume (read, resume)
    - if name in before and before[name] != value:
    + if False:

# data sets found by one entry, residual networks of one block
a form of a data set is read where only one of its files is (KnownSet.find, every_set)
    - if all(is_there(place / name) for name in form.files):
    + if any(is_there(place / name) for name in form.files):
a data set is looked for in its own folder only (KnownSet.find, every_set)
    - places = [root / self.folder, root] if self.folder else [root]
    + places = [root / self.folder]
a data set is looked for in the data folder only (KnownSet.find, mini_imagenet)
    - places = [root / self.folder, root] if self.folder else [root]
    + places = [root]
the default size of images is that of other sets (KnownSet.find, mini_imagenet)
    - size = self.size if size is None else size
    + size = 32 if size is None else size
a file larger than its limit is opened (open_file, damaged_data)
    - if limit is not None and size > limit:
    + if limit is not None and size > 2 * limit:
what is damaged is an error of the standard library (whole, damaged_data)
    -     except broken as error:
    +     except () as error:
a residual block ends before its sum (ResidualBlock.forward, models)
    - self.end(self.residual(inputs) + self.shortcut(inputs))
    + self.end(self.residual(inputs)) + self.shortcut(inputs)
the last layer of a residual block keeps its activation (ResidualBlock.__init__, models)
    - convolutions(channels, activation, generator)[:-1]
    + convolutions(channels, activation, generator)
every block of a stage projects its shortcut (ResidualStages.__init__, models)
    - project=s[0] != m
    + project=True
the first stage is behind a pooling, too (_staged, models)
    - stage(pool(hidden, 2) if i else hidden)
    + stage(pool(hidden, 2))
examples that a smaller class does not have are drawn (_drawn, episodes)
    - example_keys.masked_fill_(torch.arange(most, device=device) >= counts[class_index], -1.0)
    + example_keys.masked_fill_(torch.arange(most, device=device) > counts[class_index], -1.0)

# what is written, counted and looked at together, so that a solve is short
losses that were written together all go to the beginning (Tables._write_waiting, losses_of_many_steps)
    - narrow(self._axis, last - count, count)
    + narrow(self._axis, 0, count)
losses that wait when a solve ends early are left out (Tables.until, losses_of_many_steps)
    - if self._waiting:
    + if self._waiting and step % 2:
losses that have become wider are rounded to the first (Tables._write_waiting, losses_of_many_steps)
    - if self._tensors[0].dtype != rows.dtype:
    + if False:
what has been compiled since is not looked for (_anything_compiled, torch_errors)
    - if count != _seen[0] or _counter is None:
    + if _counter is None:
a torch that does not count its functions has never compiled any (_anything_compiled, torch_errors)
    - if count != _seen[0] or _counter is None:
    + if count != _seen[0]:
an argument that is no tree is not looked into for tensors of a transform (Dynamics.without_names, captures)
    - if not isinstance(x, Slot)
    + if x is None

# the public yardsticks, the decay in L, and MAML itself
influence balancing has one sign more (POSITIVE, yardsticks_experiment)
    - POSITIVE = 10
    + POSITIVE = 11
a descent is not stopped where it leaves (measure, yardsticks_experiment)
    - if abs(path[-1]) > FAR:
    + if path[-1] > 1e9 * FAR:
the slope of the toy lacks the gate's own derivative (slope, yardsticks_experiment)
    - turn.cos() * (1 - gate)
    + turn.cos()
images are standardised by a sample's deviation (load, yardsticks_experiment)
    - pairs[0][0].std(0, correction=0)
    + pairs[0][0].std(0)
ties do not count half (Cleaning.told_apart, yardsticks_experiment)
    - for side in (False, True)
    + for side in (True, True)
cleaning's table has the first of the draws alone (_cleaning_tables, yardsticks_experiment)
    - rows = data[data["corruption"] == corruption]
    + rows = data[(data["corruption"] == corruption) & (data["seed"] == 0)]
the decay is fitted against L log L (slope, bounds_decay)
    - kept = [(level + 1.0, error)
    + kept = [(level + 2.0, error)
an exponential decay counts as super-exponential (BEND, bounds_decay)
    - BEND = -0.5
    + BEND = 0.5
(34a) forgets that the last steps contract (bounds, bounds_decay)
    - 1 + (1 + x) ** dropped * kept
    + 1 + (1 + x) ** dropped
ANIL adapts the first layer (network, maml_experiment)
    - >= LAYERS - adapted]
    + < adapted]
every inner gradient reads the same part of the support images (learn, maml_experiment)
    - batches = torch.stack(orders)[:, : run.batch]
    + batches = torch.stack(orders)[:1, : run.batch].expand(settings.steps, run.batch)
every number of steps gets a program of its own, without end (_is_one_of_many, whole_programs)
    - return len(alike) >= _MOST_ALIKE
    + return False

# few-shot: Reptile's own algorithm, falling outer steps, equal time, which methods come first
Reptile steps by the sum of the tasks' directions (outer_steps, few_shot_experiment)
    - lr=rate / tasks
    + lr=rate
batches of Reptile lose the labels of their images (in_batches, few_shot_experiment)
    - for x in (inputs, targets)
    + for x in (inputs, targets.roll(1, 1))
a batch of Reptile holds an image twice (in_batches, few_shot_experiment)
    - keys.argsort(dim=2)
    + (keys.argsort(dim=2) // 2)
outer steps of few-shot fall by half only (learn, few_shot_experiment)
    - math.cos(math.pi * share)
    + math.cos(math.pi * share / 2)
accuracies in equal time are those before the first look (_between, few_shot_experiment)
    - left=math.nan
    + left=None
the fastest method of the other group says what equal time is (beside_exact, few_shot_experiment)
    - data.groupby(["seed", *group])["seconds"]
    + data.groupby("seed")["seconds"]
second levels come before further starts (turn, few_shot_experiment)
    - keys["L"] > 1
    + keys["L"] > 2
no start has all of the windows first (turn, few_shot_experiment)
    - int(second and keys["seed"] > 0)
    + int(second)
images that are averaged down lose half a grey level (_shrunk, few_shot_experiment)
    - .round().to(torch.uint8)
    + .to(torch.uint8)
the characters of Vinyals are never turned (_vinyals, few_shot_experiment)
    - rotations=rotations
    + rotations=False
seconds of few-shot training hold the validations before them (Validation.left_out, few_shot_experiment)
    - if after <= i)
    + if after > i)

# meta-transfer's images and steps, and the theorems of the memory-reduced algorithm
images to train with are tested too (Transfer, meta_transfer_experiment)
    - [row[settings.per_class :] for row in rows]
    + list(rows)
a problem is chosen on the classes of the test (domains, meta_transfer_experiment)
    - image_sets.load(problem, part, data_dir) for part in ("train", _split(split))]
    + image_sets.load(problem, part, data_dir) for part in ("train", "test")]
runs of other steps take the standard number (_of_steps, meta_transfer_experiment)
    - partial(learn, replace(settings, steps=steps), name, "adam", seed)
    + partial(learn, settings, name, "adam", seed)
nothing is kept of a task from one visit to the next (descend, memory_rates_experiment)
    - all_tasks[rows] = seen
    + seen.add_(all_tasks[rows], alpha=0)
targets are numbers, not parts of the first (reached, memory_rates_experiment)
    - value <= target * values[0]
    + value <= target
a floor that rises counts as one that falls (exponents_of, memory_rates_experiment)
    - -slope(group["tasks"], group["floor"])
    + slope(group["tasks"], group["floor"])
features that are computed once are still part of the inner loss (Embedding._fitted, esj_experiment)
    - of_features if method.once else of_images
    + of_images
ANIL's head starts from zero (Embedding._one, esj_experiment)
    - self.learned_head if method.learned else self.head
    + self.head
the slides' own form takes central differences (methods, esj_experiment)
    - sampling="gaussian", antithetic=False, generator=source)
    + sampling="gaussian", antithetic=True, generator=source)

# how long work takes on a GPU
on a GPU the processor's own time is taken, which ends when all is queued (seconds_of, timing)
    - if device.type != "cuda":
    + if True:
milliseconds between events are taken for seconds (seconds_of, timing)
    - return float(first.elapsed_time(last)) / 1e3
    + return float(first.elapsed_time(last))
compare times every problem as one of the CPU's, wherever its outer loss is (_timed, timing)
    - seconds = seconds_of(work, expected.device)
    + seconds = seconds_of(work, torch.device("meta"))

# the params of a linked step, and what is looked for where nothing is computed again
under a vmap, params that an update has computed from each other are no views (Block.__init__, params_of_a_block)
    - bool(layout.levels) and dynamics.own_update and
    + bool(layout.levels) and
without a vmap, params that a loss may hook are no views (Block.__init__, solution)
    - bool(layout.levels) and dynamics.own_update and
    + dynamics.own_update and
params that are observed are no views, and reach a later loss (Block.__init__, params_of_a_block)
    - dynamics.own_update and dynamics.observer is None
    + dynamics.own_update
the first inner gradient is taken of what is read, too (Block.__init__, params_of_a_block)
    - roots = *starts, *derivatives.make_leaves(map(inputs.at, self._shared))
    + roots = derivatives.make_roots([*state, *map(inputs.at, self._shared)])
state of a loss is looked for where no backward pass reads it (Adjoint.run, params_of_a_block)
    - recomputed = keep.evaluates and
    + recomputed =
an estimator that evaluates the loss at the end says that it does not (Implicit.keep, params_of_a_block)
    - Keep(first=steps + 1)
    + Keep(first=steps + 1, evaluates=False)

# the quick look at what a loss has captured, of each step
what waits to be looked at for captured tensors is forgotten by a quick look
    Checks._note_captured, captures_at_some_step
    - at_once and start is not None and not self._noted
    + at_once and start is not None
a quick look takes every leaf for a given one (ends_in_given, captures_at_some_step)
    - if id(parent.variable) not in leaves:
    + if not leaves:
of some graphs a quick look for captured tensors is enough for all (captured_nodes, captures_at_some_step)
    - if all([part.start is not None and
    + if any([part.start is not None and

# programs that keep every so-manieth state
a block of a program is taken again from the next one's state (TracedSweep._pull_blocks, compiled_programs)
    - states = [x[begin : begin + part.number] for
    + states = [x.roll(-1, 0)[begin : begin + part.number] for
a short last block of a program is pulled back from the first state (TracedSweep._pull_blocks, compiled_programs)
    - begin = (part.first - self._first) // parts[0].length
    + begin = 0
what runs over the steps of blocks is read in the order of the first block (TracedSweep._pull_blocks, compiled_programs)
    - carry, [*states, *rows], shared)
    + carry, [*states, *[x.flip(0) for x in rows]], shared)
the direct terms of blocks stay in the order of the backward pass (TracedSweep._pull_blocks, compiled_programs)
    - [x.flatten(0, 1) for x in own]
    + [x.flip(0).flatten(0, 1) for x in own]
a block's last state is that before the one before it (TracedSweep._states, compiled_programs)
    - made = [torch.cat([x, y[None]]) for x, y in zip(before, after, strict=True)]
    + made = [torch.cat([x, x[-1:]]) for x, y in zip(before, after, strict=True)]
a captured tensor that blocks read is an input of the inner graph (Trace.given, compiled_programs)
    - if self.inside:
    + if False:
a program of all states serves checkpoints (roll_out_wholly, whole_programs)
    - ("rollout", kept, *kind_of_steps(layout))
    + ("rollout", kept.first, *kind_of_steps(layout))
steps that a program takes again are not counted (_count_sweep, whole_programs)
    - again = steps - trajectory.rollout.kept.states
    + again = 0
compiled, all states are kept however large they are (Keep.within, whole_programs)
    - checkpoint=1 if size <= budget else "sqrt"
    + checkpoint=1
a plain backward pass over blocks takes every state for the next step's (_unstacked, whole_programs)
    - range(first, trajectory.steps + 1, block if isinstance(block, int) else 1)
    + range(first, trajectory.steps + 1, 1)

# what is read of which no change can be seen
a loss that reads a file has a program (_is_reader, unseen_reads)
    - return any([value is reader for reader in _READERS])
    + return False
an iterator counts as something that stays as it is (_changes_unseen, unseen_reads)
    - return isinstance(value, Iterator) and type(value).__module__ in ("builtins", "itertools")
    + return False
attributes that are called as a reader count as read (_read_by, unseen_reads)
    - if name in variables else None
what a function imports itself is not looked into (_variables, unseen_reads)
    - "LOAD_NAME", "IMPORT_NAME"
    + "LOAD_NAME"
a slot that a trace has filled stays filled (Reads.put_back, compiled_reads)
    - slot.__delete__(owner)
    + pass
what a trace has left in a cache stays there (Reads.put_back, compiled_reads)
    - cache.cache_clear()
    + pass
an attribute that a trace has given a class stays there (Reads.put_back, compiled_reads)
    - delattr(kind, name)
    + pass
a container is put back by the copy that its class makes (Reads.put_back, compiled_reads)
    - (x, _copied(x))
    + (x, x.copy())
a hook is not noticed where there was none (Reads._values, compiled_reads)
    - yield from map(len, self._sized)
    + pass
a sparse gradient stays so (Checks.gradient, sparse)
    - if self._sparse:
    + if False:
what other methods of an object read counts as read (Unseen._is_called, unseen_reads)
    - return by_itself or key not in self._methods or name in mentioned
    + return True
what the methods read that a loss calls is not looked at (Unseen._is_called, unseen_reads)
    - return by_itself or key not in self._methods or name in mentioned
    + return by_itself or key not in self._methods
attributes that no code names count as read (Unseen.what, unseen_reads)
    - if key in mentioned and _changes_unseen(x)]
    + if _changes_unseen(x)]
a whole solve has a program though it reads an iterator (_made, whole_programs)
    - if _functions[code] > _MOST or _reads(dynamics).unseen is not None:
    + if _functions[code] > _MOST:
unsafe code of the compiler is stored, and found by the next process (_looked_through, compiled_outer)
    - if place.type == "cpu" and frees_in_a_loop(code):
    + if False:
a compiler that does not show its code is trusted (_looked_through, compiled_outer)
    - if place.type == "cpu" and not seen and _from_store(counters) == found:
    + if False:

# what a trace does to what functions hold
packages of the system are the user's own code (_is_installed, compiled_reads)
    - {"site-packages", "dist-packages"}.isdisjoint
    + {"site-packages"}.isdisjoint
a trace leaves tensors without numbers behind (left_alone, whole_programs)
    - stack.enter_context(HiddenState(function).put_back())
    + pass
tensors that a program's check has written to stay as they are (HiddenState.put_back, whole_programs)
    - self._tensors if tensors is None else tensors
    + () if tensors is None else tensors
terms of blocks of steps are written in the wrong order (TracedSweep._pull_blocks, whole_programs)
    - x.flatten(0, 1)
    + x.flip(0).flatten(0, 1)

# what is left out altogether
a checkpoint without a seal is believed whatever its members' checksums (check_seal, run_files)
    -  or members.testzip() is not None
the text of an error leaves out its fix (DiffoptError.__str__, error_fields)
    - {f'; {self.fix}' if self.fix else ''}
a raised copy takes what is written into a tensor (InDouble.__torch_function__, check_solve)
    - and not _needs_itself(func)
a program goes on with captured tensors that have been written to since the rollout (_pulled, whole_programs)
    - found = None if known is None or moved else
    + found = None if known is None else
a program's own error is raised in place of the plain way's (Known.run, whole_programs)
    - return None if self.program is None else self.program(tensors)
    -         except Exception:  # such as of a matrix that is singular
    + return None if self.program is None else self.program(tensors)
    +         except KeyError:
a program of one observer serves another (Known.serves, whole_programs)
    - and self._observes == _identity(dynamics)
the descent of the toy is not held within its bounds (measure, yardsticks_experiment)
    - .clamp(LOW, HIGH)

# What is left out of these, or put into them, is a line as a whole.
the Krylov rule leaves out its free last step (Krylov._solved, krylov)
    - stack = stack + residual  # the free
    + stack = stack + 0 * residual  # the free
conjugate gradients take the old residual for the direction (ConjugateGradient.iterate, linear_solve)
    - p = tasks.plus(r, torch
    + p = tasks.plus(r + tasks.times(alpha, ap), torch
negative curvature goes unnoticed (ConjugateGradient.iterate, linear_solve)
    - breakdown, active = breakdown | (active & ~convex), active
    + breakdown, active = breakdown, active
the warning of what was not compiled does not name the path (warn, compiler_paths)
    - reason = compiler_paths.explanation(error)
    + reason = None
an error cannot be imported from the package (__all__, public_names)
    -     "GradModeError",
torch.compile traces into a solve (solve, modes)
    - @transforms.outside_compile
a generator's own state is not taken on by what takes none (_drawing_globally, random_threads)
    -         generator.set_state(snapshot(device)[-1])
autocast is not half precision (_precision, precision_warning)
    - if torch.is_autocast_enabled(place):
    + if False:
what torch.compile has made of a loss passes for a constant (gradient, torch_errors)
    -     if differentiable and _COMPILED in sys.modules and _anything_compiled():
    -         _refuse_compiled(output, inputs)
class weights get the advice for any operation (_SECOND_DERIVATIVES, torch_errors)
    - "with respect to argument 'weight'":
    + "no such words":
a row does not hold its rule (_row, compare_notes)
    -         rule=estimator,
modules keep the weights of a recomputation (_Unpack.__call__, recomputation)
    - members[name] = own
    + members[name] = members[name]
a generator of the loss's own is no state (HiddenState.has_moved, hidden_state)
    -             or self._have_drawn()
a step is judged on the random numbers of the first (Draws.look, hidden_state)
    -         self._now, self._bytes = after, now
    +         self._bytes = now
a schedule begins anew where a solve goes on (Layout.slice_at, going_on)
    -         first += self.start
the buffers of a state are dropped (checked_problem, going_on)
    - buffers = _given_buffers(given, buffers, bound, structure)
    + _given_buffers(given, buffers, bound, structure)
an estimator drops what happens along the way without a word (_Solve.backward, along)
    -             _refuse_running_costs(call.estimator)
what an observer captures is let through (Checks.observed, along)
    -         self._refuse_captured(observed, [*params, *read], "observe")
a stopped solve keeps the states of the first steps instead of the last (Keeper.finish, along)
    - self.first = max(1, steps - self._window + 1)
    + pass
a graph that is kept is not looked at for missing derivatives (Checks.look_at_graph, checks)
    -         autograd_graph.refuse_broken(graph)
the places of all classes are taken before one is counted (pickled_images, pickle_bombs)
    -     for label in listed:
    +     rows = {one: array(listed[one], name) for one in listed}
    +     for label in listed:
functional takes a module within hooks (functional, sharded)
    - refuse_wrapper(module)
    + pass
the checksum of a file is that of its beginning (KnownFile._compare, every_set)
    -             digest.update(part)
    +             digest.update(part[:CHUNK])
    +             break
a quick look for captured tensors does not say when it was (Checks._note_captured, captures_at_some_step)
    -             self._born = max(self._born, autograd_graph.number(start))
a first step's older tensors have no number (Checks.__init__, captures)
    - keep is None, autograd_graph.newest()
    + keep is None, -1
a graph keeps the state that it begins at, wherever it begins (Keeper.before, params_of_a_block)
    - ground.state, held=step == 1)
    + ground.state, held=True)
a step that drew hides whether the next one draws (Draws.look, draws)
    - self._now, self._bytes = after, now
    + self._now = after
the bytes of a generator are read under transforms (_bytes, draws)
    - if transforms.current_level() is not None:
    + if False:
only the first numbers of a generator are compared (_bytes, draws)
    - return [x.numpy().tobytes() for x in states]
    + return [x.numpy().tobytes()[8:16] for x in states]
a loop is given a row of its own as it lies (Trace.readable, what_loops_read)
    - given = node.op == "placeholder" and node not in self._rows
    + given = node.op == "placeholder"
a view is copied for every loop that reads it (Trace.readable, what_loops_read)
    - if node not in self._copies:
    + if True:
a loop on the way back begins with the first row (scan_back, what_loops_read)
    - [torch.arange(length - 1, -1, -1, device=carry[0].device)]
    + [torch.arange(length, device=carry[0].device)]
large products with vectors are loops of the compiler (_product, what_loops_read)
    - if matrix.numel() < _LARGE:
    + if True:
a graph is made for tensors as they lie in memory (in_order, what_loops_read)
    - return x.detach().resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)
    + return x.detach().clone()
a product is kept as it is after a change in place (Noting.__torch_dispatch__, kept_products)
    - self.found.append(found.clone())
    + self.found.append(found.detach())
what is done to a recalled product is done to what is kept (Recalling.__torch_dispatch__, kept_products)
    - return self._products.pop(0).clone()
    + return self._products.pop(0)
products are recalled in another order (Recalling.__torch_dispatch__, kept_products)
    - return self._products.pop(0).clone()
    + return self._products.pop().clone()
products are kept that outweigh the states (Noting.kept, kept_products)
    - return self.found if sum([x.nbytes for x in self.found]) <= sum([x.nbytes for x in state]) else []
    + return self.found
instruction sets are chosen though torch has no such option (_options, compiled_outer)
    - getattr(config.cpp, "vec_isa_ok", False) is None:
    + getattr(config.cpp, "vec_isa_ok", None) is None:
an old g++ is taken to know every instruction (_is_known_gcc, instruction_sets)
    - and least == [False, True]
what torch tries out is not given back (known_to_gcc, instruction_sets)
    - sets.check_build = before
    + pass
products of other steps are recalled (TracedSweep._pull_steps, kept_products)
    - *[x[begin:end] for x in self._trajectory.rollout.products]
    + *[x.flip(0)[begin:end] for x in self._trajectory.rollout.products]
HF-MAML's central difference is divided by half its length (HFMAML.product, hessian_free)
    - / (2 * self.radius)
    + / self.radius
directions of GGS-MAML are added up, not averaged (GGSMAML.product, hessian_free)
    - around.tasks.dot(z, vector) / self.directions
    + around.tasks.dot(z, vector)
the smoothed Hessian of ES-MAML keeps its trace (ESMAML.product, hessian_free)
    - around.tasks.times(around.tasks.dot(z, vector), z) - vector
    + around.tasks.times(around.tasks.dot(z, vector), z)
differences along a vector are taken of a vector field (HessianFree.refuse, hessian_free)
    - if isinstance(problem.dynamics.loss, VectorField):
    + if False:
directions are drawn anew where a run goes on (learn, hessian_free)
    - held["directions"] = source
    + source = None
equal time is that of the slowest run (beside_exact, hessian_free)
    - data.groupby(["seed", *group])["seconds"].transform("min")
    + data.groupby(["seed", *group])["seconds"].transform("max")
the deep embedding sees flat images (Embedding.features, esj_experiment)
    - if self.deep else inputs.flatten(1)
    + if not self.deep else inputs.flatten(1)
a step of the deep embedding is measured by methods of many rollouts too (of_one_step, esj_experiment)
    - if name not in (DIVIDED, *central)
    + if name != DIVIDED
a program of one order serves another (_pulled, whole_programs)
    - ("pullback", rule, trajectory.rollout.key,
    + ("pullback", type(rule), trajectory.rollout.key,
what a program of the backward pass computes is not counted (_pulled, whole_programs)
    - trajectory.record.counts.add(known.counts)
    + pass
the curvature of a loop over updates is that of the step after (TracedBlocks._loop, whole_programs)
    - for x in (*rows, *(pushes or ()))]
    + for x in (*rows, *[x.roll(1, 0) for x in pushes or ()])]
the sums of a traced gradient descent run the wrong way (TracedBlocks._sums, compiled_programs)
    - leaf.flip(0).cumsum(0).flip(0)
    + leaf.cumsum(0)
a program does not warn of a bad estimate (Compiled._run, compiled_outer)
    - entry.program.warn()
    + pass
an inner gradient is recorded in the backward pass, not at the point (_AtSolution.keep, implicit)
    - Keep(first=1, checkpoint=None)
    + Keep(first=steps + 1)
products go back to others than the params of a kept graph (Block.close, implicit)
    - len(inputs) - len(self._apart or inputs)
    + len(inputs) - len(self._apart or ())
implicit_gradients keep no graph of their point (_solved, implicit)
    - keep=Keep(first=1, checkpoint=None)
    + keep=None
a lone system's solution stays scaled (LinearSolver._run_alone, linear_solve)
    - value, residual = found.value * scale, found.residual * scale
    + value, residual = found.value, found.residual * scale
a lone system that is not finite counts as solved (LinearSolver._run_alone, linear_solve)
    - torch.zeros_like(found.converged),
    + torch.ones_like(found.converged),
a loop of a program goes on although no task does (_traced, compiled_implicit)
    - more & active(*apart(tensors)).any()
    + more
a loop of a program goes on until all tasks stop going on at once (_traced, compiled_implicit)
    - more & active(*apart(tensors)).any()
    + more & active(*apart(tensors)).all()
a loop of a program is made once too often (_traced, compiled_implicit)
    - tensors[0] < most
    + tensors[0] <= most
a program does not say whether what it took to hold did (Trace.expect_true, compiled_implicit)
    - torch.where(condition.all(), 0.0, torch.nan)
    + torch.where(condition.all(), 0.0, 0.0)
a program looks at some tasks' conditions only (Trace.expect_true, compiled_implicit)
    - condition.all()
    + condition.any()
a kink is not looked for in programs (refuse_kink, compiled_implicit)
    - tracing.holds(~(torch.stack(rests).any() & at.turns(tasks, 1e-6)))
    + pass
a parameter that is zero counts as a kink in programs (refuse_kink, compiled_implicit)
    - tracing.holds(~(torch.stack(rests).any() & at.turns(tasks, 1e-6)))
    + tracing.holds(~torch.stack(rests).any())
both parts of a loop take each other's tensors (_opened, compiled_implicit)
    - for key in constants:
    + for key in reversed(constants):
a program of a solve by Implicit takes a center that it is handed for a buffer that moves (_same, compiled_implicit)
    - return bool(a.untyped_storage()._cdata == b.untyped_storage()._cdata)
    + return False
a loop of a program is given a matrix and its transpose (while_loop, compiled_implicit)
    - _share_transposed(graphs[1])
    + pass
a program evaluates an inner loss again for the way back (_is_one_step, compiled_implicit)
    - keep == Keep(first=1, checkpoint=None)
    + False
a step that a trace records is not looked at (_record, compiled_implicit)
    - traced.note_finite([losses, *state])
    + pass
in single precision a program takes one product more than the plain way (ConjugateGradient._judged, compiled_implicit)
    - None if precision else lambda numbers: numbers[2]
    + None
GMRES is written out into a program (GMRES.iterate, compiled_implicit)
    - tracing.refuse("GMRES, whose space grows with every product")
    + pass
# what programs recall and look at
what was recalled is kept where the way back computes other products (TracedSweep._recorded, kept_products)
    - if not recalling.as_noted:
    + if False:
a product that was noted and is missing is none (Recalling.as_noted, kept_products)
    - self.differs or self._products
    + self.differs
another product than was noted is not told of (Recalling.__torch_dispatch__, kept_products)
    - self.differs = True
    + pass
a program takes starts that are not finite (_is_finite, compiled_implicit)
    - tracing.holds(x.isfinite())
    + True
losses of a second rollout for many cotangents are not compared (_comparable, changed_before_many_cotangents)
    - return again[..., :1], losses.expand_as(again)[..., :1]
    + return again, again
losses of tasks are compared with those of cotangents (_Pullback.vmap, changed_before_many_cotangents)
    - axis + 1 for axis
    + axis for axis
a graph is kept although a chunk size bounds it (ParallelCurvature.__init__, binomial)
    - again and chunk_size is None
    + again
in a program a single number takes over the precision of a step's (Dynamics.updates, compiled_programs)
    - after.cast(now) if isinstance(first, Tensor) else after
    + after
a lone system without a right-hand side keeps its start (LinearSolver._run_alone, linear_solve)
    - return x * (1 / scale) if 0 < largest < math.inf else x.zeros()
    + return x * (1 / scale)
"""

FAULTS = read(TABLE)
