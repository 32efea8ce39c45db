"""What is known to fall short and is being put right: taken out of the counts, one line each; empty is the goal."""

from __future__ import annotations

# part of what a finding says, or of its call -> what it is
CALLS: dict[str, str] = {
    "Batching rule not implemented for aten::": "is_grads_batched",
    "aten::copy_(self, *extra_args) is not possible": "is_grads_batched",
    "called random operation while in randomness error mode": "is_grads_batched of ESJacobian",
    "calling random operations inside of vmap": "is_grads_batched of ESJacobian",
    "Unpack is being triggered": "a solve within torch.utils.checkpoint",
    "invalid python storage": "forward-mode derivatives in the loss",
    "that doesn't have storage": "numpy in the loss, Unrolled under torch.func",
    "DispatchKey Negative": "per-leaf floats beside a leaf with torch's negative bit",
    "escaped from inside a function being vmapped": "a checkpoint in the loss under a vmap",
    "attempting to call Tensor.requires_grad_()": "requires_grad_() in the loss under a vmap",
    "does not have vmap support": "a function of the caller's without a vmap rule, under a vmap",
    "don't yet support saved tensor hooks": "a checkpoint in the loss under torch.func (torch's own refusal)",
    "came out differently in the backward pass": "ForwardMode under autocast",
}
# names of losses that Unrolled accepts under torch.func, though they do not depend on params
UNROLLED_ACCEPTS = {"constant", "number", "detached", "item", "no_grad"}
# names of odd objects that some parameter still meets by a raw error
OBJECTS = {
    "beyond_64_bits",
    "deep_list",
    "dict_in_itself",
    "fake_tensor",
    "huge_integer",
    "inference_tensor",
    "lazy_module",
    "lazy_parameters",
    "list_in_itself",
    "mkldnn_tensor",
    "nested_tensor",
    "no_repr",
    "numpy_array",
    "numpy_objects",
    "torch_optimizer_class",
    "type",
    "weak_reference",
    "weird",
    "wrapped_tensor",
}
# names of parameters that still meet some ordinary object by a raw error
SLOTS = {
    "implicit(check=)",
    "implicit(params=)",
    "Preconditioned(diagonal=)",
    "cite",
}
