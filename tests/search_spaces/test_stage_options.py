"""Options of a space of stages: names, types and values are those of its dataclass, or refused in one line."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from torch import nn

from search_spaces.catalogue import spaces
from search_spaces.genotype import GenotypeError, StageGenotype
from search_spaces.stage_space import StageSpace, options_of


@dataclass(frozen=True)
class Settings:
    block: str = "basic"
    reduction: int = 16
    share: float = 0.5
    bias: bool = False

    def __post_init__(self) -> None:
        if self.reduction < 1:
            raise GenotypeError("option 'reduction' must be at least 1")


SPACE = StageSpace("tried", lambda genotype, **_: nn.Identity(), options=Settings)


def member(**options: object) -> StageGenotype:
    return StageGenotype("tried", (1,), (4,), tuple(options.items()))  # type: ignore[arg-type]


def test_what_is_not_stated_is_at_its_default() -> None:
    SPACE.check(member())
    assert options_of(member(), Settings) == Settings()
    assert options_of(member(share=0.25, bias=True), Settings) == Settings(share=0.25, bias=True)
    share = options_of(member(share=1), Settings).share
    assert share == 1.0 and type(share) is float


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"redution": 4}, "no option 'redution': did you mean 'reduction'?"),
        ({"zzz": 4}, "known: block, reduction, share, bias"),
        ({"reduction": 4.0}, "'reduction' of space 'tried' must be a whole number, not 4.0; for example 16"),
        ({"reduction": True}, "must be a whole number"),
        ({"reduction": "4"}, "must be a whole number"),
        ({"share": True}, "must be a number"),
        ({"bias": 1}, "must be true or false"),
        ({"block": 1}, "must be a text"),
        ({"reduction": 0}, "at least 1"),
    ],
)
def test_wrong_options_are_refused(options, says) -> None:
    with pytest.raises(GenotypeError) as caught:
        SPACE.check(member(**options))
    assert says in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(GenotypeError):
        SPACE.build(
            member(**options), channels=1, cells=1, input_shape=(1, 8, 8), classes=2, mean=(0.5,), std=(0.5,)
        )  # fmt: skip


def test_a_network_has_one_genotype_whatever_defaults_are_stated() -> None:
    plain = SPACE.genotype((1,), (4,))
    assert plain == SPACE.genotype((1,), (4,), block="basic", reduction=16) == StageGenotype("tried", (1,), (4,))
    assert SPACE.genotype((1,), (4,), share=1, reduction=16).options == (("share", 1.0),)
    assert SPACE.genotype((1,), (4,), share=1).digest == SPACE.genotype((1,), (4,), share=1.0).digest
    with pytest.raises(GenotypeError, match="did you mean 'bias'"):
        SPACE.genotype((1,), (4,), bais=True)


def test_spaces_without_options_refuse_them() -> None:
    with pytest.raises(GenotypeError, match="space 'plain' has no options: leave out 'se'"):
        spaces()["plain"].check(StageGenotype("plain", (1,), (4,), (("se", "none"),)))
    assert isinstance(plain := spaces()["plain"], StageSpace)
    assert plain.genotype((1,), (4,)) == StageGenotype("plain", (1,), (4,))
