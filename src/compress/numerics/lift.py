"""Scaled isometries into a wider space: v' = scale * columns v, with orthonormal columns."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Lift:
    """
    columns: (wide, narrow); None for the identity.
    """

    columns: Tensor | None = None
    scale: float = 1.0

    @property
    def is_identity(self) -> bool:
        return self.columns is None and self.scale == 1.0

    def rows(self, M: Float[Tensor, "narrow *rest"]) -> Float[Tensor, "wide *rest"]:
        """Map each column of M, or the vector M."""
        return (M if self.columns is None else self.columns.to(M) @ M) * self.scale

    def functional(self, M: Float[Tensor, "rest narrow"]) -> Float[Tensor, "rest wide"]:
        """The matrix that maps v' to M v."""
        return (M if self.columns is None else M @ self.columns.T.to(M)) / self.scale

    def up(self, x: Float[Tensor, "*batch narrow"]) -> Float[Tensor, "*batch wide"]:
        return (x if self.columns is None else x @ self.columns.T.to(x)) * self.scale

    def down(self, x: Float[Tensor, "*batch wide"]) -> Float[Tensor, "*batch narrow"]:
        return (x if self.columns is None else x @ self.columns.to(x)) / self.scale
