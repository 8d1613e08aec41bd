"""Moments of a linear's inputs, and what is made of them once for all linears that share the inputs.

E ||(W - Q) x||^2 = tr (W - Q) H (W - Q)^T: the curvature of an output error by the weights is H = E x x^T, or the
covariance of x where a bias keeps the outputs' mean.

Dimensions: n inputs.
"""

from dataclasses import dataclass, field
from functools import cached_property

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from compress.numerics.frames import Lift
from compress.numerics.ridge import cholesky, damped

SOLVED = 256  # rows and columns that are inverted at once


@dataclass(frozen=True)
class Hessian:
    """The damped second moment of a linear's inputs, and what sweeps need of it.

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


@dataclass(frozen=True)
class Spread:
    """A positive semidefinite C and, when they are asked for, S with S S^T = C and the Hessian of an output error."""

    C: Float64[Tensor, "n n"]
    _hessians: dict[float, Hessian] = field(default_factory=dict, compare=False)

    def hessian(self, damping: float, *, name: str) -> Hessian:
        """The Hessian for a damping, cached; `name` is the first caller's."""
        return self._hessians.setdefault(damping, Hessian(self.C, damping, name))

    @cached_property
    def root(self) -> Float64[Tensor, "n n"]:
        variance, Q = torch.linalg.eigh(self.C)
        return Q * variance.clamp_min(0).sqrt()


@dataclass(frozen=True)
class InputMoments:
    """Moments of a linear's inputs x over the calibration tokens. second: E x x^T. mean: E x. mean_abs: E |x|."""

    second: Float64[Tensor, "n n"]
    mean: Float64[Tensor, "n"]
    mean_abs: Float64[Tensor, "n"]

    def spread(self, *, centered: bool) -> Spread:
        """The covariance, or the second moment, cached for all linears that share the inputs."""
        return self._centered if centered else self._uncentered

    @cached_property
    def _centered(self) -> Spread:
        C = self.second - torch.outer(self.mean, self.mean)
        if C.diagonal().sum() <= 1e-12 * self.second.diagonal().sum():  # what is left of a constant by rounding
            return Spread(torch.zeros_like(C))
        return Spread(C)

    @cached_property
    def _uncentered(self) -> Spread:
        return Spread(self.second)

    def lifted(self, lift: Lift) -> "InputMoments":
        """Moments of lift.up(x)."""
        if lift.is_identity:
            return self
        second = lift.rows(lift.rows(self.second).T)
        if lift.columns is not None:
            return normal_moments(second, lift.rows(self.mean))
        return InputMoments(second, lift.rows(self.mean), lift.rows(self.mean_abs))

    def through(self, A: Float64[Tensor, "r n"]) -> "InputMoments":
        """Moments of A x."""
        return normal_moments(A @ self.second @ A.T, A @ self.mean)

    def shifted(self, bias: Float64[Tensor, "n"]) -> "InputMoments":
        """Moments of x + bias."""
        cross = torch.outer(self.mean, bias)
        return normal_moments(self.second + cross + cross.T + torch.outer(bias, bias), self.mean + bias)


def normal_moments(second: Float64[Tensor, "n n"], mean: Float64[Tensor, "n"]) -> InputMoments:
    """Build moments from second moments alone, with E |x| of a centered normal distribution."""
    return InputMoments(second, mean, second.diagonal().clamp_min(0).sqrt() * (2 / torch.pi) ** 0.5)
