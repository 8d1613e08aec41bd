"""The curvature of a linear's output error by its weights, H = E x x^T: E ||(W - Q) x||^2 = tr (W - Q) H (W - Q)^T.

What is made of it is made once for all linears that share their inputs.

Dimensions: n inputs.
"""

from dataclasses import dataclass, field
from functools import cached_property

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from compress.numerics.ridge import cholesky, damped

SOLVED = 256  # rows and columns that are inverted at once


@dataclass(frozen=True)
class Hessian:
    """
    second: E x x^T, or the covariance of x where a bias keeps the mean. damping: in units of its mean diagonal.
    name: says in an error whose inputs these are: NumericalError where they are not finite.
    """

    second: Float64[Tensor, "n n"]
    damping: float
    name: str
    _eigen: dict[torch.dtype, tuple[Tensor, Tensor]] = field(default_factory=dict, compare=False)

    @cached_property
    def damped(self) -> Float64[Tensor, "n n"]:
        if not self.second.any():  # inputs that are all zero, or that do not vary: all errors count alike
            return torch.eye(len(self.second), dtype=self.second.dtype, device=self.second.device)
        return damped(self.second, self.damping)

    @cached_property
    def order(self) -> Int64[Tensor, "n"]:
        """Inputs by decreasing activation."""
        return self.second.diagonal().argsort(descending=True, stable=True)

    @cached_property
    def inverse_root(self) -> Float64[Tensor, "n n"]:
        """U upper triangular, U^T U = H^-1."""
        return self._inverse_root(self.damped)

    @cached_property
    def ordered_inverse_root(self) -> Float64[Tensor, "n n"]:
        """The inverse root with the inputs in `order`."""
        return self._inverse_root(self.damped[self.order][:, self.order])

    def _inverse_root(self, H: Float64[Tensor, "n n"]) -> Float64[Tensor, "n n"]:
        """R^-1 of H = R R^T with R upper triangular: the Cholesky factor of H with its inputs in reverse order."""
        return triangular_inverse(cholesky(H.flip(0, 1), name=self.name).flip(0, 1))

    @cached_property
    def scale(self) -> Float64[Tensor, "n"]:
        """Scales by which inputs are divided so that H has a unit diagonal."""
        return self.damped.diagonal().sqrt()

    def scaled_eigen(self, dtype: torch.dtype) -> tuple[Float[Tensor, "n"], Float[Tensor, "n n"]]:
        """Eigenvalues and eigenvectors of H with a unit diagonal, found in a dtype."""
        if dtype not in self._eigen:
            cholesky(self.damped, name=self.name)
            values, Q = torch.linalg.eigh((self.damped / torch.outer(self.scale, self.scale)).to(dtype))
            self._eigen[dtype] = values.clamp_min(0), Q
        return self._eigen[dtype]


def triangular_inverse(R: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    """R^-1, R upper triangular. By halves, so that most of it is products: a third of what solving for it takes."""
    n = len(R)
    if n <= SOLVED:
        return torch.linalg.solve_triangular(R, torch.eye(n, dtype=R.dtype, device=R.device), upper=True)
    inverse, first, last = torch.zeros_like(R), slice(0, n // 2), slice(n // 2, n)
    inverse[first, first], inverse[last, last] = triangular_inverse(R[first, first]), triangular_inverse(R[last, last])
    inverse[first, last] = -inverse[first, first] @ (R[first, last] @ inverse[last, last])
    return inverse
