"""HanshuYAN/AdjointDPM's NeuralODESchedulerNoise: the result and the gradient, both of x / alpha."""

from samplers import adjoint


def run(setting, options):
    method, schedule = options.pop("method"), setting.schedule
    plan, back = (adjoint.published_plan(schedule, setting.steps, method, back=b) for b in (False, True))
    start, end = plan.alpha[[0, -1]]
    model, x = setting.model("epsilon"), plan.sigma[0] * setting.z
    x.requires_grad_()
    out = adjoint.sample(plan, back, model, x, as_published=True)
    loss = (setting.golden[setting.case["loss_weight"]].view(out.shape) * out / end).sum()
    loss.backward()
    setting.calls -= setting.case["nfe_backward"]
    return out.detach() / end, x.grad * start
