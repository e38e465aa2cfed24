"""The page that shows the claims: a Markdown file, and a picture of each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from normlab.claims.result import Result, told
from normlab.errors import NormlabError
from normlab.files import replace

__all__ = ["page"]

_ABOUT = """\
What is said of normalization, and what came of testing it. Each claim has numbers, one a seed, and a margin, both declared before anything was measured. A part that claims *more* is supported if the 95% interval of the mean lies above zero, and refuted if it lies below zero or inside the margin; one that claims *equal* is supported if the interval lies inside the margin, and refuted if it lies outside; one that claims exactness is supported if no number exceeds its tolerance. A claim is supported if all its parts are, and refuted if one is; with several parts each interval is the wider for it (Bonferroni). Otherwise it is inconclusive: these runs cannot tell. Each claim is judged by itself, at 5%: of twenty verdicts one may be chance. A verdict is on the setup that is named, and on no other.
"""  # noqa: E501 - Markdown's paragraphs are lines.


def page(results: Sequence[Result], path: Path) -> None:
    """Write the page, and beside it `images/claims/NAME.png` for each claim that was measured.

    Args:
        results: What to show, in this order.
        path: Of the Markdown file.

    Raises:
        NormlabError: It cannot be written.
    """
    import vl_convert

    images = path.parent / "images" / "claims"
    try:
        images.mkdir(parents=True, exist_ok=True)
        for each in results:
            if each.kept:
                picture = vl_convert.vegalite_to_png(each.chart().to_dict(), scale=1.5)
                replace(images / f"{each.claim.name}.png", picture)
        replace(path, _text(results))
    except OSError as error:
        raise NormlabError(f"{path}: cannot be written: {error.strerror}") from None


def _text(results: Sequence[Result]) -> str:
    lines = ["# Claims", "", _ABOUT, "| claim | | verdict | seeds |", "|---|---|---|--:|"]
    for each in results:
        name = each.claim.name
        lines.append(
            f"| [{name}](#{name}) | {each.claim.statement} | {_word(each)} | {len(each.kept)} |"
        )
    for each in results:
        lines += ["", *_section(each)]
    return "\n".join(lines) + "\n"


def _word(result: Result) -> str:
    if not result.verdict:
        return "not measured" if not result.kept else "not finished"
    return f"**{result.verdict}**" + (", with fewer steps" if result.quick else "")


def _section(result: Result) -> list[str]:
    claim = result.claim
    lines = [f"## {claim.name}", "", f"{claim.statement} ({claim.source})", ""]
    lines += [f"**Verdict.** {_word(result)}.", ""]
    lines += [f"- {told(each)}" for each in result.evidence]
    if claim.disagreement and result.verdict:
        lines += ["", claim.disagreement]
    lines += ["", f"**Measured.** {claim.metric} {claim.setup}"]
    lines += ["", f"**Published.** {claim.published}"]
    if result.kept:
        picture = f"images/claims/{claim.name}.png"
        lines += ["", f"![{claim.metric}]({picture})", ""]
        quick = " --quick" * result.quick
        lines.append(f"`normlab claims {claim.name}{quick}`; {len(result.kept)} seeds.")
    return lines
