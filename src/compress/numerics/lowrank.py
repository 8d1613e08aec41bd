"""Low-rank approximations of a linear layer, y = W x + b, by the methods' formulas. All in float64.

Each keeps r directions of the output: y' = B (A x) + b'. The methods differ in what they call near:

    svd       ||W - W'||                          Eckart-Young; no data
    asvd      ||(W - W') diag(E|x|)^a||           ASVD (arXiv 2312.05821)
    svd_llm   E ||(W - W') x||^2                  SVD-LLM (arXiv 2403.07378, section 3.1): whitening, by Cholesky
    lord      E ||(W - W')(x - E x)||^2, with b'  LoRD (arXiv 2309.14021, section 3): the outputs' principal components
    weighted  the same, an error of the output measured by the loss's gradient there

LoRD without its centering is SVD-LLM, written differently: [W S]_r S^-1 = U_r U_r^T W for any S S^T = E x x^T, with U
the eigenvectors of W E[x x^T] W^T. No inverse is needed and an input may be dead, so that all but `svd_llm`, which is
here as its paper has it, are computed this way.

Dimensions: W (m, n), n inputs, m outputs, r the rank, k = min(m, n).
"""

from dataclasses import dataclass, field
from functools import cached_property

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from compress.errors import NumericalError
from compress.numerics.hessian import Hessian
from compress.numerics.lift import Lift
from compress.numerics.linalg import pca
from compress.numerics.ridge import cholesky


@dataclass(frozen=True)
class Factors:
    """B (m, r), A (r, n) and the bias (m,): y = B (A x) + bias."""

    B: Float64[Tensor, "m r"]
    A: Float64[Tensor, "r n"]
    bias: Float64[Tensor, "m"] | None

    @property
    def product(self) -> Float64[Tensor, "m n"]:
        return self.B @ self.A


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
    """Moments of a linear's inputs x over the calibration tokens.

    second: E x x^T. mean: E x. mean_abs: E |x|.
    """

    second: Float64[Tensor, "n n"]
    mean: Float64[Tensor, "n"]
    mean_abs: Float64[Tensor, "n"]

    def spread(self, *, centered: bool) -> "Spread":
        """The covariance, or the second moment, cached for all linears that share the inputs."""
        return self._centered if centered else self._uncentered

    @cached_property
    def _centered(self) -> "Spread":
        C = self.second - torch.outer(self.mean, self.mean)
        if C.diagonal().sum() <= 1e-12 * self.second.diagonal().sum():  # what is left of a constant by rounding
            return Spread(torch.zeros_like(C))
        return Spread(C)

    @cached_property
    def _uncentered(self) -> "Spread":
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


def svd(W: Float64[Tensor, "m n"], rank: int) -> Factors:
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    return Factors(U[:, :rank], S[:rank, None] * Vh[:rank], None)


def asvd(W: Float64[Tensor, "m n"], mean_abs: Float64[Tensor, "n"], rank: int, *, alpha: float = 0.5) -> Factors:
    """ASVD; a dead input gets the scale of the least active one."""
    moving = mean_abs[mean_abs > 0]
    scale = (mean_abs.clamp_min(moving.min()) if len(moving) else torch.ones_like(mean_abs)) ** alpha
    scaled = svd(W * scale, rank)
    return Factors(scaled.B, scaled.A / scale, None)


def svd_llm(W: Float64[Tensor, "m n"], second: Float64[Tensor, "n n"], rank: int, *, name: str) -> Factors:
    """SVD-LLM, with the least damping for which the Cholesky factor exists. Raises NumericalError where none does."""
    if not (torch.isfinite(W).all() and torch.isfinite(second).all()):
        raise NumericalError(NOT_FINITE.format(name=name))
    S = least_damped_cholesky(second, name=name)
    U, sigma, Vh = torch.linalg.svd(W @ S, full_matrices=False)
    A = torch.linalg.solve_triangular(S, sigma[:rank, None] * Vh[:rank], upper=False, left=False)
    return Factors(U[:, :rank], A, None)


def least_damped_cholesky(C: Float64[Tensor, "n n"], *, name: str) -> Float64[Tensor, "n n"]:
    if not C.diagonal().mean() > 0:
        raise NumericalError(f"The inputs of {name} are all zero. Calibrate on other text.")
    damping = 0.0
    while True:
        try:
            return cholesky(
                C + damping * C.diagonal().mean() * torch.eye(len(C), dtype=C.dtype, device=C.device), name=name
            )
        except NumericalError:
            if damping > 1e-3:
                raise
            damping = max(10 * damping, 1e-12)


def lord(
    W: Float64[Tensor, "m n"],
    bias: Float64[Tensor, "m"] | None,
    moments: InputMoments,
    rank: int,
    *,
    name: str,
    centered: bool = True,
) -> Factors:
    """U_r of the outputs' covariance: B = U_r, A = U_r^T W, b' = U_r U_r^T b + (I - U_r U_r^T) E y.

    Not centered, the outputs' second moment takes the covariance's place and the bias stays as it is.
    """
    return weighted(W, bias, moments, rank, None, name=name, centered=centered)


def weighted(
    W: Float64[Tensor, "m n"],
    bias: Float64[Tensor, "m"] | None,
    moments: InputMoments,
    rank: int,
    metric: "Metric | None",
    *,
    name: str,
    centered: bool = True,
) -> Factors:
    """Least E ||L^T (y - y')||^2 with the metric L L^T: U the top left singular vectors of L^T W C^(1/2),
    B = L^-T U_r, A = U_r^T L^T W, and the bias keeps the outputs' mean."""
    seen = W if metric is None else metric.apply(W)
    U = output_directions(seen, moments.spread(centered=centered), rank, name=name)
    B = U if metric is None else metric.take_back(U)
    A = U.T @ seen
    if not centered:
        return Factors(B, A, bias)
    shift = W @ moments.mean - B @ (A @ moments.mean)
    return Factors(B, A, shift if bias is None else bias + shift)


def output_directions(M: Float64[Tensor, "m n"], spread: "Spread", rank: int, *, name: str) -> Float64[Tensor, "m r"]:
    """The first `rank` eigenvectors of M C M^T by decreasing eigenvalue; at most min(m, n).

    With fewer inputs than outputs they come from the smaller matrix S^T M^T M S, C = S S^T.
    """
    m, n = M.shape
    if not (torch.isfinite(M).all() and torch.isfinite(spread.C).all()):
        raise NumericalError(NOT_FINITE.format(name=name))
    if m <= n:
        return pca(M @ spread.C @ M.T, name=f"the outputs of {name}")[0][:, :rank]
    MS = M @ spread.root
    V, _ = pca(MS.T @ MS, name=f"the outputs of {name}")
    return orthonormal(MS @ V[:, :rank])


def orthonormal(columns: Float64[Tensor, "m k"]) -> Float64[Tensor, "m k"]:
    """Normalize orthogonal columns, by a QR that keeps signs; zero columns get an arbitrary direction."""
    Q, R = torch.linalg.qr(columns)
    signs = R.diagonal().sign()
    return Q * torch.where(signs == 0, torch.ones_like(signs), signs)


def output_energies(M: Float64[Tensor, "m n"], spread: "Spread") -> Float64[Tensor, "k"]:
    """The k eigenvalues of M C M^T alone, by decreasing size."""
    m, n = M.shape
    product = M @ spread.C @ M.T if m <= n else (M @ spread.root).T @ (M @ spread.root)
    return torch.linalg.eigvalsh(product).flip(0).clamp_min(0)


@dataclass(frozen=True)
class Metric:
    """A metric of output errors, ||L^T e||^2. L is lower triangular (m, m), or a vector, a diagonal."""

    L: Tensor

    def apply(self, W: Float64[Tensor, "m n"]) -> Float64[Tensor, "m n"]:
        """L^T W."""
        return self.L[:, None] * W if self.L.ndim == 1 else self.L.T @ W

    def take_back(self, U: Float64[Tensor, "m r"]) -> Float64[Tensor, "m r"]:
        """L^-T U."""
        return U / self.L[:, None] if self.L.ndim == 1 else torch.linalg.solve_triangular(self.L.T, U, upper=True)


def gradient_metric(gradient: Tensor, weight: float, *, name: str) -> Metric | None:
    """(1 - weight) I + weight G / mean(diag G), G the second moment (m, m) of the loss's gradient by the outputs, or
    its diagonal (m,). K-FAC's left factor (arXiv 1503.05671), drawn to the identity. None where nothing is felt."""
    gradient = gradient.double()
    if not torch.isfinite(gradient).all():
        raise NumericalError(f"The loss's gradient at {name} has a NaN or Inf. Check the weights and the text.")
    diagonal = gradient if gradient.ndim == 1 else gradient.diagonal()
    if weight == 0 or not diagonal.mean() > 0:
        return None
    if gradient.ndim == 1:
        return Metric(((1 - weight) + weight * gradient / diagonal.mean()).sqrt())
    identity = torch.eye(len(gradient), dtype=gradient.dtype, device=gradient.device)
    blended = (1 - weight) * identity + weight * gradient / diagonal.mean()
    return Metric(cholesky(blended, name=f"the loss's gradient at {name}"))


@dataclass(frozen=True)
class Pivoted:
    """W' = B A by r of its rows: the outputs `rows` are A x, all others are C times those (PIFA, arXiv 2501.19090).

    r (m + n - r) numbers instead of r (m + n), for the same W'. others: the rows that are left, increasing.
    """

    rows: Int64[Tensor, "r"]
    others: Int64[Tensor, "m_less_r"]
    A: Float64[Tensor, "r n"]
    C: Float64[Tensor, "m_less_r r"]


NOT_FINITE = "{name} or its inputs have a NaN or Inf. Check the weights before it and the text."

# No entry of C is larger: how strongly an error of the pivot rows can come through in the others.
LARGEST_ENTRY = 2.0
DEPENDENT = "A factor has fewer independent rows than its rank. Use a lower rank."


def pivoted(factors: Factors) -> Pivoted:
    """Ours takes the rows of a subset of almost the largest volume (Goreinov et al., How to find a good submatrix,
    2010): by partial pivoting, then exchanges until no entry of C exceeds `LARGEST_ENTRY`. The paper takes a QR's."""
    B = factors.B
    m, r = B.shape
    _, swaps, _ = torch.linalg.lu_factor_ex(B)
    order = permutation(swaps, m)
    chosen = order[:r].clone()
    C = by_rows(B, chosen)  # (m, r): every row by the chosen ones
    while True:
        place = int(C.abs().argmax())
        row, column = divmod(place, r)
        if C[row, column].abs() <= LARGEST_ENTRY:
            break
        # The row takes the chosen one's place: a rank-1 change of C.
        change = C[row].clone()
        change[column] -= 1
        C.addr_(C[:, column] / C[row, column], change, alpha=-1)
        chosen[column] = row
    rows = chosen.sort().values
    is_other = torch.ones(m, dtype=torch.bool, device=B.device)
    is_other[rows] = False
    others = is_other.nonzero()[:, 0]
    C = by_rows(B, rows)[others]
    if (C.abs() > LARGEST_ENTRY * (1 + 1e-9)).any():  # the exchanges went by rounding errors
        raise NumericalError(DEPENDENT)
    return Pivoted(rows, others, B[rows] @ factors.A, C)


def by_rows(B: Float64[Tensor, "m r"], rows: Int64[Tensor, "r"]) -> Float64[Tensor, "m r"]:
    """C with B = C B[rows]."""
    C, _ = torch.linalg.solve_ex(B[rows].T, B.T)
    if not torch.isfinite(C).all():
        raise NumericalError(DEPENDENT)
    return C.T


def permutation(swaps: Tensor, m: int) -> Int64[Tensor, "m"]:
    """Turn LAPACK's row exchanges (1-based, in sequence) into a permutation."""
    order = list(range(m))
    for i, other in enumerate((swaps.cpu() - 1).tolist()):
        order[i], order[other] = order[other], order[i]
    return torch.tensor(order, device=swaps.device)
