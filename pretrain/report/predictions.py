"""Pictures of a dense task's predictions beside the truth, as HTML text; "" where there are none."""

from collections.abc import Iterable, Mapping
from html import escape
from typing import Any


def predictions(results: Iterable[Mapping[str, Any]]) -> str:
    """The pictures that the results keep: each predicted one, and the same with what its annotation says."""
    cards, credits = [], []
    for result in results:
        found = result.get("pictures")
        pictures = [one for one in found if isinstance(one, Mapping)] if isinstance(found, list) else []
        pairs = [(one.get("predicted"), one.get("truth")) for one in pictures]
        shown = [_card(str(predicted), str(truth)) for predicted, truth in pairs if _is_image(predicted, truth)]
        cards += shown
        if shown and result.get("attribution"):
            credits.append(str(result["attribution"]))
    if not cards:
        return ""
    credit = "".join(f'<p class="note">Pictures: {escape(text)}</p>' for text in dict.fromkeys(credits))
    return (
        '<section id="predictions"><h2>Predictions beside the truth</h2>'
        '<p class="note">Left what the model says, right what the annotation says.</p>'
        f'<div class="cards">{"".join(cards)}</div>{credit}</section>'
    )


def _is_image(*uris: object) -> bool:
    return all(isinstance(uri, str) and uri.startswith("data:image/") for uri in uris)


def _card(predicted: str, truth: str) -> str:
    images = "".join(
        f'<img src="{escape(uri)}" alt="{name}" style="width:50%">'
        for uri, name in ((predicted, "predicted"), (truth, "truth"))
    )
    return f'<figure class="card">{images}</figure>'
