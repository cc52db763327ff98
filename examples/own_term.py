"""A loss term of your own, trained from a recipe without a change to the package: `python examples/own_term.py`.

The same from the command line:

    distmatch train mnist "own_terms={smooth: {source: examples/own_term.py:TotalVariation, weight: 0.05}}" \
        terms=match,regress,smooth
"""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from distmatch import Recipe, distil
from distmatch.methods.own_terms import TermContext
from distmatch.methods.terms import Samples, Start


class TotalVariation:
    """Make images smoother: the mean absolute difference of neighbouring pixels.

    A term says which streams' images it sees: "noise" (fresh noise), "pairs" (the noise of the teacher's pairs). A term
    that also has `fake_loss(drawn, samples)` and `trained` takes part in the fake score's update and may train networks
    of its own there; see `distmatch.methods.terms.FakeTerm`.
    """

    reads = ("noise",)

    def __init__(self, context: TermContext, weight: float = 1.0):
        self.name, self.weight = context.name, weight  # logged as NAME/student; weighted in the student's loss

    def draw(self, starts: Sequence[Start], share: tuple[int, int]) -> None:
        """Draw what is random from `starts[0].generator`, so that a run can continue bit for bit. Nothing is here."""

    def student_loss(self, drawn: None, samples: Samples) -> Tensor:
        x = samples.x  # f[B,C,H,W], with the student's graph
        return x.diff(dim=-1).abs().mean() + x.diff(dim=-2).abs().mean()


if __name__ == "__main__":
    recipe = {
        "name": "smooth",
        "teacher": "mnist",
        "steps": 20,
        "terms": ["match", "smooth"],
        "own_terms": {"smooth": {"source": f"{__file__}:TotalVariation", "weight": 0.05}},
        "match": {"batch": 8},
        "student": {"optimizer": {"lr": 1e-3}},
        "fake": {"optimizer": {"lr": 1e-3}},
    }
    distil(Recipe.model_validate(recipe), Path("runs/smooth"))
