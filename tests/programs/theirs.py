"""The programs of peers that are not run here, as their documentation writes them: text, of which lines are counted.

What both sides are given (losses, data, networks) is left out, as it is on ours. A program without an entry, whose
answer is not the peer's own, cannot be written with the peer.
"""

from __future__ import annotations

ADAPT = """
maml = l2l.algorithms.{kind}
total = 0
for x, y, query_x, query_y in tasks:
    learner = maml.clone()
    for _ in range(5):
        learner.adapt(squares(learner({x}), y))
    total = total + squares(learner({query}), query_y) / len(tasks)
torch.autograd.grad(total, {learned})
"""

BETTY = """
class Inner(ImplicitProblem):
    def training_step(self, batch):
        return {inner}
class Outer(ImplicitProblem):
    def training_step(self, batch):
        return outer_loss(self.inner)
inner = Inner(name="inner", module=net, optimizer=sgd, train_data_loader=loader, config=Config(type="{rule}"))
outer = Outer(name="outer", module=learned, optimizer=adam, train_data_loader=loader)
dependencies = {{"u2l": {{outer: [inner]}}, "l2u": {{inner: [outer]}}}}
engine = Engine(config=EngineConfig(train_iters=100), problems=[outer, inner], dependencies=dependencies)
engine.run()
"""

THREE_LEVELS = """
class Top(ImplicitProblem):
    def training_step(self, batch):
        return top_loss(self.middle)
top = Top(name="top", module=learned_lr, optimizer=adam, train_data_loader=loader)
"""

JAXOPT = """
solver = jaxopt.{solver}
jax.grad(lambda theta: outer(solver.run(start, theta).params))(theta)
"""

OPTIMISTIX = """
found = lambda theta: optx.{solver}, start, theta{options}).value
jax.grad(lambda theta: outer(found(theta)))(theta)
"""

THESEUS = """
z, w = th.Vector(2, name="z"), th.Vector(tensor=weights, name="weights")
objective = th.Objective()
objective.add(th.AutoDiffCostFunction([z], residual, 7, aux_vars=[w]))
layer = th.TheseusLayer(th.GaussNewton(objective, max_iterations=60))
options = {{"backward_mode": "{mode}"}}
solution, _ = layer.forward({{"z": start, "weights": weights}}, optimizer_kwargs=options)
torch.autograd.grad(solution["z"].prod(), weights)
"""

CALLBACK = """
def callback(optimizer, info, delta, iteration):
    if last(info) - before(info) < 0.15:
        raise StopIteration
options = {"end_iter_callback": callback}
"""

HYPERTORCH = """
fp_map = diff_optimizers.GradientDescent(loss, {lr})
hg.{rule}([w], [penalty], {terms}, fp_map, outer_loss, set_grad=False)
"""

DESCENT = """
w = [torch.zeros(4)]
for _ in range(400):
    w = fp_map(w, [penalty], create_graph=False)
"""

THEIRS = {
    "meta_learning.maml": ADAPT.format(kind="MAML(net, lr=0.1)", x="x", query="query_x", learned="maml.parameters()"),
    "meta_learning.meta_sgd": ADAPT.format(
        kind="MetaSGD(net, lr=0.1)", x="x", query="query_x", learned="maml.parameters()"
    ),
    "meta_learning.anil": ADAPT.format(
        kind="MAML(head, lr=0.1)",
        x="body(x)",
        query="body(query_x)",
        learned="[*body.parameters(), *maml.parameters()]",
    ),
    "meta_learning.curvature": """
transform = l2l.optim.KroneckerTransform(l2l.nn.KroneckerLinear)
gbml = l2l.algorithms.GBML(net, transform=transform, lr=0.1, adapt_transform=False)
learner = gbml.clone()
for _ in range(3):
    learner.adapt(weighted(learner(x)))
torch.autograd.grad(judged(learner(query_x)), gbml.compute_update.parameters())
""",
    "meta_learning.reptile": """
learner = copy.deepcopy(net)
adapt_optimizer = torch.optim.SGD(learner.parameters(), lr=0.1)
for _ in range(5):
    adapt_optimizer.zero_grad()
    weighted(learner(x), weights).backward()
    adapt_optimizer.step()
for p, q in zip(net.parameters(), learner.parameters()):
    p.grad = p.data - q.data
""",
    "online.statistics": """
class PerStepNorm(nn.Module):
    def __init__(self, features, steps):
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(steps, features), requires_grad=False)
        self.var = nn.Parameter(torch.ones(steps, features), requires_grad=False)
    def forward(self, hidden, step):
        mean = 0.7 * self.mean[step] + 0.3 * hidden.mean(0).detach()
        var = 0.7 * self.var[step] + 0.3 * hidden.var(0).detach()
        self.mean[step + 1], self.var[step + 1] = mean, var
        return (hidden - mean) / (var + 0.1).sqrt()
maml = l2l.algorithms.MAML(net, lr=0.2)
learner = maml.clone()
for step in range(5):
    learner.adapt(squares(learner(x, step), y))
torch.autograd.grad(judged(learner(query_x, 5)), maml.parameters())
""",
    "optimizers.learned_optimizer": """
class Learned(torch.optim.Optimizer):
    def __init__(self, params, theta):
        super().__init__(params, {"theta": theta})
class DifferentiableLearned(higher.optim.DifferentiableOptimizer):
    def _update(self, grouped_grads, **kwargs):
        for group_index, (group, grads) in enumerate(zip(self.param_groups, grouped_grads)):
            for p_index, (p, g) in enumerate(zip(group["params"], grads)):
                state = self.state[group_index][p_index]
                state["mean"] = 0.8 * state.get("mean", 0 * g) + 0.2 * g
                group["params"][p_index] = p - move(group["theta"], g, state["mean"])
higher.register_optim(Learned, DifferentiableLearned)
with higher.innerloop_ctx(net, Learned(net.parameters(), None), override={"theta": [theta]}) as (fnet, inner):
    total = 0
    for _ in range(6):
        value = weighted(fnet(x), weights)
        inner.step(value)
        total = total + value
    torch.autograd.grad(total + weighted(fnet(x), weights), theta)
""",
    "optimizers.chain": """
rule = torchopt.chain(torchopt.clip.clip_grad_norm(0.7), torchopt.sgd(0.2, momentum=0.9))
now, state = tuple(net.parameters()), rule.init(tuple(net.parameters()))
for _ in range(4):
    grads = torch.autograd.grad(loss(now, weights), now, create_graph=True)
    updates, state = rule.update(grads, state, params=now, inplace=False)
    now = torchopt.apply_updates(now, updates, inplace=False)
torch.autograd.grad(outer(now), [weights, *net.parameters()])
""",
    "implicit.scalar": """
@torchopt.diff.implicit.custom_root(torch.func.grad(f, argnums=0), argnums=1, solve=torchopt.linear_solve.solve_cg())
def solver(start, a):
    return a.detach() ** (1 / 3)
torch.autograd.grad(solver(torch.ones(()), a), a)
""",
    "implicit.after_descent": HYPERTORCH.format(lr=0.5, rule="CG", terms=50) + DESCENT,
    "implicit.fixed_point_terms": HYPERTORCH.format(lr=0.2, rule="fixed_point", terms=7),
    "implicit.neumann": HYPERTORCH.format(lr=0.5, rule="fixed_point", terms=500),
    "hyperparameters.forward": """
fp_map = diff_optimizers.Momentum(loss, lambda hparams: hparams[0], lambda hparams: hparams[1])
state = fp_map.get_opt_params(params)
hg.forward(state, [lr, momentum], [fp_map] * 8, outer_loss, set_grad=False)
""",
    "hyperparameters.stored": """
fp_map = diff_optimizers.Momentum(loss, 0.1, 0.9)
history = [fp_map.get_opt_params(params)]
for _ in range(8):
    history.append(fp_map(history[-1], [weights], create_graph=False))
hg.reverse(history, [weights], [fp_map] * 8, outer_loss, set_grad=False)
""",
    "roots.equilibrium": """
def fp_map(z, hparams):
    return [layer(z[0], hparams[0])]
hg.fixed_point([z], [matrix], 60, fp_map, lambda z, hparams: z[0].square().sum(), set_grad=False)
""",
    "hyperparameters.levels": BETTY.format(inner="loss(self.module, self.outer())", rule="cg") + THREE_LEVELS,
    "hyperparameters.shares": BETTY.format(inner="shared(self.module, self.outer())", rule="neumann"),
    "hyperparameters.learned_loss": BETTY.format(inner="self.outer(self.module(x), y)", rule="darts"),
    "online.weight_net": BETTY.format(inner="weighed(self.module, self.outer)", rule="darts"),
    "online.darts": BETTY.format(inner="mixed(self.module, self.outer())", rule="darts"),
    "implicit.by_lbfgs": JAXOPT.format(solver="LBFGS(fun=logistic, maxiter=200, tol=1e-12)"),
    "implicit.path": """
solver = jaxopt.LBFGS(fun=loss, tol=1e-12)
fitted = jax.vmap(lambda factor, penalty: outer(solver.run(start, factor * penalty).params), (0, None))
jax.grad(lambda penalty: fitted(factors, penalty).sum())(penalty)
""",
    "implicit.lasso_unrolled": JAXOPT.format(
        solver="ProximalGradient(fun=squares, prox=jaxopt.prox.prox_lasso, maxiter=300, implicit_diff=False)"
    ),
    "implicit.lasso_in_place": """
@jaxopt.implicit_diff.custom_fixed_point(step)
def found(start, strength):
    return solution
jax.grad(lambda strength: outer(found(None, strength)))(strength)
""",
    "implicit.simplex": JAXOPT.format(
        solver="ProjectedGradient(fun=loss, projection=jaxopt.projection.projection_simplex, maxiter=600)"
    ),
    "implicit.box": JAXOPT.format(
        solver="ProjectedGradient(fun=loss, projection=jaxopt.projection.projection_box, maxiter=600)"
    ),
    "games.equilibrium": """
@jaxopt.implicit_diff.custom_root(field)
def found(start, a):
    return point
jax.grad(lambda a: outer(found(None, a)))(a)
""",
    "roots.kkt": """
qp = jaxopt.EqualityConstrainedQP()
solved = lambda penalty, b: qp.run(params_obj=(gram(penalty), -right), params_eq=(matrix, b)).params
jax.grad(lambda *theta: outer(solved(*theta).primal) + solved(*theta).dual_eq.prod(), (0, 1))(penalty, b)
""",
    "stopping.until_small": JAXOPT.format(solver="GradientDescent(fun=loss, stepsize=0.5, maxiter=2000, tol=1e-12)"),
    "stopping.unrolled_until_small": """
solver = jaxopt.GradientDescent(fun=loss, stepsize=0.5, acceleration=False, maxiter=2000, tol=1e-3, implicit_diff=False)
found = jax.grad(lambda penalty: outer(solver.run(start, penalty).params))(penalty)
steps = solver.run(start, penalty).state.iter_num
""",
    "stopping.together": """
solver = jaxopt.GradientDescent(fun=loss, stepsize=0.4, acceleration=False, maxiter=500, tol=1e-2, implicit_diff=False)
one = jax.vmap(lambda factor, penalty: outer(solver.run(start, factor * penalty).params), (0, None))
jax.grad(lambda penalty: one(factors, penalty).sum())(penalty)
""",
    "roots.root": OPTIMISTIX.format(solver="root_find(system, optx.Newton(rtol=1e-10, atol=1e-10)", options=""),
    "roots.cosine": OPTIMISTIX.format(
        solver="fixed_point(m, optx.FixedPointIteration(rtol=1e-12, atol=1e-12)", options=""
    ),
    "roots.least_squares": OPTIMISTIX.format(
        solver="least_squares(residual, optx.LevenbergMarquardt(rtol=1e-10, atol=1e-10)", options=""
    ),
    "roots.checkpointed": OPTIMISTIX.format(
        solver="fixed_point(layer, optx.FixedPointIteration(rtol=0, atol=0)",
        options=", max_steps=60, throw=False, adjoint=optx.RecursiveCheckpointAdjoint()",
    ),
    "games.fixed_values": OPTIMISTIX.format(solver="root_find(field, optx.Newton(rtol=1e-10, atol=1e-10)", options=""),
    "implicit.imaml": OPTIMISTIX.format(solver="minimise(near, optx.BFGS(rtol=1e-10, atol=1e-10)", options=""),
    "stopping.not_there": """
solver = optx.OptaxMinimiser(optax.sgd(0.5), rtol=1e-9, atol=1e-9)
found = optx.minimise(loss, solver, start, penalty, max_steps=5, throw=False)
found.value, found.stats["num_steps"], found.result == optx.RESULTS.successful
""",
    "roots.gauss_newton": THESEUS.format(mode="unroll"),
    "roots.truncated": THESEUS.format(mode="truncated"),
    "roots.implicit_end": THESEUS.format(mode="implicit"),
    "stopping.callback": THESEUS.format(mode="unroll") + CALLBACK,
    "hyperparameters.penalties": JAXOPT.format(solver="GradientDescent(fun=loss, maxiter=500, tol=1e-12)"),
    "hyperparameters.cleaning": JAXOPT.format(
        solver="GradientDescent(fun=loss, stepsize=0.5, maxiter=20, tol=0, acceleration=False, implicit_diff=False)"
    ),
    "hyperparameters.quadratics": JAXOPT.format(solver="LBFGS(fun=inner, tol=1e-12)"),
    "hyperparameters.soba": """
inner_grad = jax.grad(inner, argnums=0)
def one_iteration(carry, _):
    z, v, x = carry
    grad_z, vjp = jax.vjp(lambda z, x: inner_grad(z, x), z, x)
    hvp, cross = vjp(v)
    outer_z, outer_x = jax.grad(outer, argnums=(0, 1))(z, x)
    v = v + 0.5 * (outer_z - hvp)
    return (z - 0.5 * grad_z, v, x - 0.3 * (outer_x - cross)), None
(z, v, x), _ = jax.lax.scan(one_iteration, (z, v, x), length=30)
""",
    "hyperparameters.stocbio": """
for rows in batches:
    z = z - 0.5 * jax.grad(inner)(z, x, rows)
term, total = jax.grad(outer)(z), 0
_, hvp = jax.vjp(lambda z: jax.grad(inner)(z, x, other), z)
for _ in range(6):
    total = total + 0.4 * term
    term = term - 0.4 * hvp(term)[0]
_, cross = jax.vjp(lambda x: jax.grad(inner)(z, x, other), x)
found = -cross(total)[0]
""",
    "online.written_back": """
for _ in range(5):
    optimizer.zero_grad()
    loss(net(x)).backward()
    optimizer.step()
""",
}
"""By file and function of the program here."""
