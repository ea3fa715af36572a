"""Comparisons and sweeps as HTML: one file, without scripts, that loads nothing else."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from npt_fast.checkpoint.publish import disk_errors
from npt_fast.config import InjectionTime
from npt_fast.errors import TransferError
from npt_fast.paths import user_path
from npt_fast.tables import escaped, html_table
from npt_fast.transfer.compare import Comparison, Sweep, Token
from npt_fast.transfer.positions import named, reached

_FULL = 2.0  # nats of KL with full colour
_LEAST = 1e-4  # probability without colour

_STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --paper: #fff; --faint: #656d76;
  --line: #d0d7de; --box: #f6f8fa; --heat: 219 98 20; --mark: #0969da; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --paper: #0d1117; --faint: #8b949e;
    --line: #30363d; --box: #161b22; --heat: 219 109 40; --mark: #58a6ff; }
}
body { margin: 2rem auto; max-width: 64rem; padding: 0 1rem; color: var(--ink);
  background: var(--paper); font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; }
dt, th, .note { color: var(--faint); font-weight: normal; } dd { margin: 0; }
dd, td, th { overflow-wrap: anywhere; }
.sides { display: grid; grid-template-columns: repeat(auto-fit, minmax(18rem, 1fr)); gap: 1rem; }
.text { background: var(--box); border: 1px solid var(--line); border-radius: 6px;
  padding: .8rem 1rem; white-space: pre-wrap; overflow-wrap: anywhere;
  font-family: ui-monospace, monospace; }
.text h3 { margin: 0 0 .5rem; font: 1rem system-ui, sans-serif; color: var(--faint); }
.text span, .scale span { border-radius: 3px; } .hit { outline: 1px solid var(--mark); }
.prompt { color: var(--faint); }
.scale span { padding: .1rem .5rem; color: var(--ink); }
details { margin-top: 2rem; }
summary { font-size: 1.1rem; font-weight: bold; cursor: pointer; margin-bottom: .5rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .8rem; border: 1px solid var(--line); text-align: right; }
th:first-child { text-align: left; } td.token { text-align: left; white-space: pre-wrap;
  font-family: ui-monospace, monospace; }
"""


def comparison_html(
    comparison: Comparison,
    details: Mapping[str, str] | None = None,
    *,
    when: InjectionTime = "prefill",
) -> str:
    """Show both continuations side by side, tokens coloured by KL, and the likeliest next tokens.

    Args:
        comparison: Comparison to show.
        details: Lines for the head, such as the checkpoint's name.
        when: Time of the injection.

    Returns:
        A complete document in which all texts are escaped.
    """
    hit = comparison.positions if when != "decode" else []
    prompt = "".join(
        f'<span class="{"hit" if i in hit else "prompt"}">{escaped(token)}</span>'
        for i, token in enumerate(comparison.prompt)
    )
    plain = escaped(comparison.no_injection_text)
    injected = "".join(
        f'<span style="{kl_heat(kl)}" title="KL {kl:.4f}">{escaped(token)}</span>'
        for token, kl in zip(comparison.injected, comparison.kls, strict=True)
    )
    seen = {t.text: t for t in (*comparison.tracked, *comparison.top, *comparison.no_injection_top)}
    head = {
        **(details or {}),
        "layers": ", ".join(map(str, comparison.layers)),
        "tokens hit": reached(comparison.positions, comparison.prompt, when),
        "KL of the next token": f"{comparison.kl:.4f} nats",
        "time": f"{comparison.seconds:.2f} s, {comparison.no_injection_seconds:.2f} s without",
    }
    sections = [
        '<div class="sides">',
        f'<div class="text"><h3>no injection</h3>{prompt}{plain}</div>',
        f'<div class="text"><h3>injected</h3>{prompt}{injected}</div>',
        "</div>",
        '<p class="note">Outlined: tokens that received the modulation. Colour of others: KL from '
        f"no injection, nats {_kl_scale()}</p>",
        "<h2>Next token</h2>",
        html_table(_heads(seen.values()), [_probabilities(t) for t in seen.values()]),
        _legend(seen.values()),
        "<details><summary>Every generated token</summary>",
        html_table(
            [*_heads(comparison.generated), "KL, nats"],
            [
                [*_probabilities(token), f'<td style="{kl_heat(kl)}">{kl:.4f}</td>']
                for token, kl in zip(comparison.generated, comparison.kls, strict=True)
            ],
        ),
        '<p class="note">No injection: the probability of the token after the same text.</p>',
        "</details>",
    ]
    return document("What an injection does", head, sections)


def sweep_html(sweep: Sweep, details: Mapping[str, str] | None = None) -> str:
    """Show heat maps of layers by strengths or tokens: of KL, and of each tracked token.

    Args:
        sweep: Sweep to show.
        details: Lines for the head, such as the prompt.

    Returns:
        A complete document in which all texts are escaped.
    """
    head = {**(details or {}), "tokens hit": named(sweep.positions, sweep.tokens)}
    sections = ["<h2>KL of the next token, nats</h2>", _map(sweep, sweep.kl, kl_heat)]
    sections.append(f'<p class="note">Colour: KL from no injection, nats {_kl_scale()}</p>')
    for text, values in sweep.tracked.items():
        sections.append(f"<h2>Probability of {escaped(repr(text))}</h2>")
        sections.append(f'<p class="note">{sweep.no_injection[text]:.4f} without injection</p>')
        sections.append(_map(sweep, values))
    if sweep.tracked:
        sections.append(_legend())
    return document("Layer by layer", head, sections)


def write(html: str, path: str | Path) -> None:
    """Write a document.

    Raises:
        TransferError: the file cannot be written.
    """
    target = user_path(path)
    with disk_errors(target, TransferError):
        target.write_text(html, encoding="utf-8")


def document(title: str, details: Mapping[str, str], sections: Sequence[str]) -> str:
    head = "".join(f"<dt>{escaped(k)}</dt><dd>{escaped(v)}</dd>" for k, v in details.items())
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            # whatever a prompt contains, the browser fetches and runs nothing
            '<meta http-equiv="Content-Security-Policy" '
            "content=\"default-src 'none'; style-src 'unsafe-inline'\">",
            f"<title>{escaped(title)}</title><style>{_STYLE}</style></head><body>",
            f"<h1>{escaped(title)}</h1><dl>{head}</dl>",
            *sections,
            "</body></html>\n",
        ]
    )


def _heads(tokens: Iterable[Token]) -> list[str]:
    base = ["base model"] if any(token.base is not None for token in tokens) else []
    return ["token", *base, "no injection", "injected"]


def _probabilities(token: Token) -> list[str]:
    """Cells of a row: the token and its probabilities."""
    values = [token.before, token.after] if token.base is None else [
        token.base, token.before, token.after
    ]  # fmt: skip
    cells = (f'<td style="{probability_heat(p)}">{p:.4f}</td>' for p in values)
    return [f'<td class="token">{escaped(repr(token.text))}</td>', *cells]


def heat(share: float) -> str:
    """A translucent background, on which text is readable in light and dark mode."""
    return f"background: rgb(var(--heat) / {0.65 * max(0.0, min(share, 1.0)):.3f})"


def kl_heat(kl: float) -> str:
    """The colour of a KL in nats; the square root keeps small values visible."""
    return heat(max(0.0, kl / _FULL) ** 0.5)


def probability_heat(probability: float) -> str:
    """The colour of a probability: equal factors are equal steps, from 0.0001 to 1."""
    return heat(1 - math.log(max(_LEAST, probability)) / math.log(_LEAST))


def _kl_scale() -> str:
    return _scale((0, 0.25, 0.5, 1, 1.5, _FULL), kl_heat)


def _legend(tokens: Iterable[Token] = ()) -> str:
    """What the columns and colours of probabilities mean."""
    words = "No injection: the model with its NP layers as they are."
    if "base model" in _heads(tokens):
        words += " Base model: the same model with its NP layers turned off."
    return f'<p class="note">{words} {probability_scale()}</p>'


def probability_scale() -> str:
    """What the colours of `probability_heat` mean."""
    return f"Colour: probability {_scale((_LEAST, 0.001, 0.01, 0.1, 1), probability_heat)}"


def _scale(values: Sequence[float], colour: Callable[[float], str]) -> str:
    steps = "".join(f'<span style="{colour(value)}">{value:g}</span>' for value in values)
    return f'<span class="scale">{steps}</span>'


def _map(
    sweep: Sweep,
    values: Sequence[Sequence[float]],
    colour: Callable[[float], str] = probability_heat,
) -> str:
    rows = [
        [
            f"<th>{', '.join(map(str, layers))}</th>",
            *(f'<td style="{colour(value)}">{value:.4f}</td>' for value in row),
        ]
        for layers, row in zip(sweep.layers, values, strict=True)
    ]
    return html_table(["layers", *sweep.columns], rows)
