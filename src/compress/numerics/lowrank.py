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

Adapters B A are for the error of a compressed weight, E = W - S:

    naive     the nearest in weights: the SVD of E
    slim      SLiM-LoRA (arXiv 2410.09615, section 3.2): the SVD of E diag(x), x the mean |x| of each input and a shift
    whitened  the nearest in outputs: E ||(E - B A) x||^2, by `weighted`; a bias keeps what the mean lacks

SLiM shifts by the least |x|, which does not help where an input is dead; ours is the least of those that move. Its code
takes the inputs' norm for the mean, and falls back to `naive` without a word where one is zero.

Dimensions: W (m, n), n inputs, m outputs, r the rank, k = min(m, n).
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from compress.errors import NumericalError
from compress.numerics.frames import pca
from compress.numerics.moments import InputMoments, Spread
from compress.numerics.ridge import cholesky

Weight = Float64[Tensor, "m n"]
Outputs = Float64[Tensor, "m"]


@dataclass(frozen=True)
class Factors:
    """B (m, r), A (r, n) and the bias (m,): y = B (A x) + bias."""

    B: Float64[Tensor, "m r"]
    A: Float64[Tensor, "r n"]
    bias: Outputs | None

    @property
    def product(self) -> Weight:
        return self.B @ self.A


def svd(W: Weight, rank: int) -> Factors:
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    return Factors(U[:, :rank], S[:rank, None] * Vh[:rank], None)


def asvd(W: Weight, mean_abs: Float64[Tensor, "n"], rank: int, *, alpha: float = 0.5) -> Factors:
    """ASVD; a dead input gets the scale of the least active one."""
    moving = mean_abs[mean_abs > 0]
    scale = (mean_abs.clamp_min(moving.min()) if len(moving) else torch.ones_like(mean_abs)) ** alpha
    scaled = svd(W * scale, rank)
    return Factors(scaled.B, scaled.A / scale, None)


def svd_llm(W: Weight, second: Float64[Tensor, "n n"], rank: int, *, name: str) -> Factors:
    """SVD-LLM, with the least damping for which the Cholesky factor exists. Raises NumericalError where none does."""
    if not (torch.isfinite(W).all() and torch.isfinite(second).all()):
        raise NumericalError(NOT_FINITE.format(name=name))
    if not second.diagonal().mean() > 0:
        raise NumericalError(f"The inputs of {name} are all zero. Calibrate on other text.")
    S, damping = None, 0.0
    while S is None:
        try:
            identity = torch.eye(len(second), dtype=second.dtype, device=second.device)
            S = cholesky(second + damping * second.diagonal().mean() * identity, name=name)
        except NumericalError:
            if damping > 1e-3:
                raise
            damping = max(10 * damping, 1e-12)
    U, sigma, Vh = torch.linalg.svd(W @ S, full_matrices=False)
    A = torch.linalg.solve_triangular(S, sigma[:rank, None] * Vh[:rank], upper=False, left=False)
    return Factors(U[:, :rank], A, None)


def weighted(
    W: Weight,
    bias: Outputs | None,
    moments: InputMoments,
    rank: int,
    metric: "Metric | None" = None,
    *,
    name: str,
    centered: bool = True,
) -> Factors:
    """Least E ||L^T (y - y')||^2 with the metric L L^T: U the top left singular vectors of L^T W C^(1/2),
    B = L^-T U_r, A = U_r^T L^T W, and the bias keeps the outputs' mean.

    Without a metric this is LoRD. Not centered, the second moment takes the covariance's place and the bias stays.
    """
    seen = W if metric is None else metric.apply(W)
    spread = moments.spread(centered=centered)
    if not (torch.isfinite(seen).all() and torch.isfinite(spread.C).all()):
        raise NumericalError(NOT_FINITE.format(name=name))
    if len(seen) <= seen.shape[1]:
        U = pca(seen @ spread.C @ seen.T, name=f"the outputs of {name}")[0][:, :rank]
    else:  # by the smaller matrix S^T M^T M S, C = S S^T
        MS = seen @ spread.root
        V, _ = pca(MS.T @ MS, name=f"the outputs of {name}")
        # Orthogonal columns are normalized by a QR that keeps signs; zero columns get an arbitrary direction.
        Q, R = torch.linalg.qr(MS @ V[:, :rank])
        signs = R.diagonal().sign()
        U = Q * torch.where(signs == 0, torch.ones_like(signs), signs)
    B = U if metric is None else metric.take_back(U)
    A = U.T @ seen
    if not centered:
        return Factors(B, A, bias)
    shift = W @ moments.mean - B @ (A @ moments.mean)
    return Factors(B, A, shift if bias is None else bias + shift)


def output_energies(M: Weight, spread: Spread) -> Float64[Tensor, "k"]:
    """The k eigenvalues of M C M^T alone, by decreasing size."""
    m, n = M.shape
    product = M @ spread.C @ M.T if m <= n else (M @ spread.root).T @ (M @ spread.root)
    return torch.linalg.eigvalsh(product).flip(0).clamp_min(0)


@dataclass(frozen=True)
class Metric:
    """A metric of output errors, ||L^T e||^2. L is lower triangular (m, m), or a vector, a diagonal."""

    L: Tensor

    def apply(self, W: Weight) -> Weight:
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


AdapterMethod = Literal["naive", "slim", "whitened"]


def fit_adapter(
    method: AdapterMethod, E: Weight, moments: InputMoments, rank: int, *, centered: bool, name: str
) -> Factors:
    """Fit an adapter to the error E. centered: for `whitened`, errors about the mean count; a bias keeps the mean."""
    if method == "naive":
        return cut_off(E, rank, name=name)
    if method == "slim":
        x = moments.mean_abs
        if not torch.isfinite(x).all():
            raise NumericalError(f"The inputs of {name} have a NaN or Inf. Check the weights before it and the text.")
        moving = x[x > 1e-7 * x.max()]  # the others are dead: only rounding errors move them
        x = x + moving.min() if len(moving) else torch.ones_like(x)
        scaled = cut_off(E * x, rank, name=name)
        return Factors(scaled.B, scaled.A / x, None)
    return weighted(E, None, moments, rank, name=name, centered=centered)


def cut_off(E: Weight, rank: int, *, name: str) -> Factors:
    """The truncated SVD, by eigenvectors of the smaller of E E^T and E^T E: many times as fast as a whole one."""
    m, n = E.shape
    if m <= n:
        U = pca(E @ E.T, name=f"what {name} lacks")[0][:, :rank]
        return Factors(U, U.T @ E, None)
    V = pca(E.T @ E, name=f"what {name} lacks")[0][:, :rank]
    return Factors(E @ V, V.T, None)
