"""The workloads' losses in JAX, line by line those in torch; that they agree is looked at in float64 before timing."""

from __future__ import annotations

from typing import Any


class Waves:
    """W1: an MLP on sine waves."""

    def inner(self, params: Any, hyper: Any, support: Any) -> Any:
        """The same as the outer loss."""
        return self.outer(params, support)

    def outer(self, params: Any, query: Any) -> Any:
        """The mean squared error."""
        from jax.nn import relu

        inputs, targets = query
        hidden = relu(inputs @ params["w1"] + params["b1"])
        hidden = relu(hidden @ params["w2"] + params["b2"])
        return ((hidden @ params["w3"] + params["b3"] - targets) ** 2).mean()


class Images:
    """W2 and W3: Conv4 with batch statistics."""

    def inner(self, params: Any, hyper: Any, support: Any) -> Any:
        """The same as the outer loss."""
        return self.outer(params, support)

    def outer(self, params: Any, query: Any) -> Any:
        """The cross entropy."""
        from jax import lax
        from jax.nn import log_softmax, relu

        images, labels = query
        for i in range(4):
            images = lax.conv(images, params[f"w{i}"], (1, 1), "SAME")
            mean, spread = images.mean((0, 2, 3), keepdims=True), images.var((0, 2, 3), keepdims=True)
            scale, shift = (params[f"{name}{i}"][:, None, None] for name in ("scale", "shift"))
            images = relu((images - mean) * lax.rsqrt(spread + 1e-5) * scale + shift)
            images = lax.reduce_window(images, -float("inf"), lax.max, (1, 1, 2, 2), (1, 1, 2, 2), "VALID")
        logits = log_softmax(images.reshape(len(images), -1) @ params["head"] + params["bias"])
        return -_picked(logits, labels).mean()


class Penalties:
    """W4: logistic regression with one penalty per feature."""

    def inner(self, params: Any, hyper: Any, support: Any) -> Any:
        """The fit and the penalties."""
        from jax.numpy import exp

        return self.outer(params, support) + 0.5 * (exp(hyper["log_penalty"]) * params["w"] ** 2).sum()

    def outer(self, params: Any, query: Any) -> Any:
        """The fit."""
        from jax.nn import softplus

        inputs, labels = query
        logits = inputs @ params["w"]
        return (softplus(logits) - logits * labels).mean()


class Weights:
    """W5: example weights by a weight network."""

    def _each(self, params: Any, data: Any) -> Any:
        from jax.nn import log_softmax, relu

        inputs, labels = data
        logits = relu(inputs @ params["w1"] + params["b1"]) @ params["w2"] + params["b2"]
        return -_picked(log_softmax(logits), labels)

    def inner(self, params: Any, hyper: Any, support: Any) -> Any:
        """The weighted mean."""
        from jax.nn import relu, sigmoid

        each = self._each(params, support)
        hidden = relu(each[:, None] @ hyper["v1"] + hyper["c1"])
        weights = sigmoid(hidden @ hyper["v2"] + hyper["c2"])[:, 0]
        return (weights * each).mean()

    def outer(self, params: Any, query: Any) -> Any:
        """The mean."""
        return self._each(params, query).mean()


def _picked(logits: Any, labels: Any) -> Any:
    """The entry of each row that its label names."""
    from jax.numpy import take_along_axis

    return take_along_axis(logits, labels[:, None], axis=1)[:, 0]
