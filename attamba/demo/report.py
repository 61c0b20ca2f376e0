"""The demo's page: one file of HTML with its pictures inside, made from results.json alone."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attamba import plots
from attamba.demo.measure import TEMPERATURE, TOP_P, table
from attamba.demo.settings import MODELS, SEED_SPREAD, DemoSettings, model_config

if TYPE_CHECKING:
    from matplotlib.figure import Figure

THEME = {
    plots.PAGE: "var(--card)",
    plots.INK: "var(--ink)",
    plots.FAINT: "var(--faint)",
    plots.HIDDEN: "var(--hidden)",
}
"""Colours of the pictures that follow the page into the dark."""

STYLE = """
:root { color-scheme: light dark; --page: #f6f7f9; --card: #ffffff; --ink: #1f2430;
  --faint: #747c88; --line: #e3e6ea; --hidden: #edeff2; --ours: #d96f1f; --theirs: #3d78b8; }
@media (prefers-color-scheme: dark) { :root { --page: #12151a; --card: #1a1e25; --ink: #e6e9ee;
  --faint: #98a1ae; --line: #2c323b; --hidden: #262c35; --ours: #f0934a; --theirs: #6fa6df; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); line-height: 1.55;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 960px; margin: 0 auto; padding: 3rem 1.25rem 4rem; }
h1 { font-size: clamp(1.6rem, 5vw, 2.3rem); line-height: 1.15; margin: 0 0 .6rem;
  letter-spacing: -.02em; text-wrap: balance; }
h2 { font-size: 1.15rem; margin: 0 0 .35rem; letter-spacing: -.005em; }
p { margin: 0 0 .9rem; max-width: 68ch; }
.lead { font-size: 1.08rem; color: var(--faint); }
section { background: var(--card); border: 1px solid var(--line); border-radius: 12px;
  padding: 1.4rem 1.5rem; margin-top: 1.25rem; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(170px, 1fr)); gap: 1rem;
  margin-top: 1.5rem; }
.fact { background: var(--card); border: 1px solid var(--line); border-radius: 12px;
  padding: 1rem 1.2rem; }
.fact b { display: block; font-size: 1.75rem; letter-spacing: -.02em; line-height: 1.2;
  font-variant-numeric: tabular-nums; }
.fact span { color: var(--faint); font-size: .9rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .45rem .7rem; text-align: right; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
tr:last-child td { border-bottom: 0; }
thead th { font-size: .9rem; }
.attamba { color: var(--ours); } .transformer { color: var(--theirs); }
figure { margin: .6rem 0 0; }
figure svg { width: 100%; height: auto; display: block; font-family: inherit; }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 360px), 1fr));
  gap: 1rem; }
.alone { max-width: 620px; }
.masks { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 300px), 1fr));
  gap: .5rem 1.2rem; }
.keys { display: flex; flex-wrap: wrap; gap: .3rem 1.3rem; color: var(--faint); font-size: .9rem;
  margin: .2rem 0 0; padding: 0; list-style: none; }
.keys i { display: inline-block; width: .8em; height: .8em; border-radius: 3px;
  margin-right: .45em; vertical-align: -.05em; }
pre { margin: .4rem 0 0; padding: .9rem 1rem; background: var(--page); border-radius: 8px;
  font: 13px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; overflow-x: auto;
  white-space: pre-wrap; overflow-wrap: anywhere; }
footer, .note { color: var(--faint); font-size: .9rem; }
.note { margin-top: .9rem; }
section > :last-child { margin-bottom: 0; }
footer { margin-top: 1.5rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .25rem 1.2rem; margin: .4rem 0 0;
  font-size: .93rem; }
dt { color: var(--faint); } dd { margin: 0; overflow-wrap: anywhere; }
@media (max-width: 520px) { main { padding: 2rem .9rem 3rem; } section { padding: 1.1rem 1rem; }
  th, td { padding: .4rem .35rem; font-size: .88rem; } dl { grid-template-columns: 1fr; }
  dd { margin-bottom: .4rem; } }
"""


def write_report(results: dict[str, Any], path: Path) -> None:
    """Write the page. results: what attamba.demo.run wrote to results.json."""
    sections = "\n".join(
        f"<section>\n<h2>{title}</h2>\n{body(results)}\n</section>" for title, body in SECTIONS
    )
    path.write_text(
        f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Attamba demo</title>
<style>{STYLE}</style>
</head>
<body>
<main>
{_opening(results)}
{sections}
{_closing(results)}
</main>
</body>
</html>
""",
        encoding="utf-8",
    )


def _opening(results: dict[str, Any]) -> str:
    last = results["decode"][-1]
    bits = " / ".join(f"{results['bits_per_byte'][name]:.3f}" for name in MODELS)
    facts = (
        (f"{last['bytes_ratio']:.1f}x", f"smaller cache at {last['length']:,} tokens"),
        (f"{last['speedup']:.1f}x", f"the decoding speed at {last['length']:,} tokens"),
        (bits, "bits per byte, Attamba / transformer"),
    )
    boxes = "\n".join(
        f'<div class="fact"><b>{figure}</b><span>{text}</span></div>' for figure, text in facts
    )
    settings = results["settings"]
    return f"""<h1>Attamba beside a transformer of its size</h1>
<p class="lead">Two models with the same number of parameters read the same
{settings["steps"] * settings["batch_size"] * settings["seq_len"]:,} bytes of Python's standard
library, in the same order. Attamba keeps one key and one value per
{settings["chunk_size"]} bytes, beside the last {settings["leading_tokens"]}; the transformer keeps
one per byte.</p>
<div class="facts">{boxes}</div>
<p class="note">Quality is measured on the first {settings["eval_bytes_per_file"]:,} bytes of each
of {results["scored"]["files"]} files that neither was trained on, {results["scored"]["bytes"]:,}
bytes in all. {_quality(results)} The learning rate of each was chosen from one list of rates, by
its score on other files, cut from the training text. All else in the training is the same for both;
the batch was picked with Attamba alone.</p>"""


def _quality(results: dict[str, Any]) -> str:
    """Who predicts the held-out files better, in a sentence."""
    ours, theirs = (results["bits_per_byte"][name] for name in MODELS)
    if abs(ours - theirs) < SEED_SPREAD:
        verdict = f"no clear difference, for another seed moves either by about {SEED_SPREAD:g}"
    else:
        verdict = f"{'Attamba' if ours < theirs else 'the transformer'} predicts better"
    return (
        f"Attamba needs {ours:.3f} bits for a byte of them and the transformer {theirs:.3f}: "
        f"{verdict}."
    )


def _table(results: dict[str, Any]) -> str:
    headers, rows = table(results)
    classes = ("", *MODELS)
    head = "".join(
        f'<th scope="col" class="{c}">{html.escape(h)}</th>' for h, c in zip(headers, classes)
    )
    body = "\n".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f"""<div class="wide"><table><thead><tr>{head}</tr></thead>
<tbody>{body}</tbody></table></div>
<p class="note">Cache bytes are counted in real caches that were filled to these lengths; speeds
are medians of {results["settings"]["decode_repeats"]} single-token steps on one thread, the
two models in turns.</p>"""


def _curves(results: dict[str, Any]) -> str:
    def training(ax: Any) -> None:
        curves = [_curve(results, name, "train", "loss") for name in MODELS]
        plots.draw_curves(ax, curves, x="step", y="training loss (nats per byte)")

    def validation(ax: Any) -> None:
        curves = [_curve(results, name, "valid", "valid_bits_per_byte") for name in MODELS]
        plots.draw_curves(ax, curves, x="step", y="held-out bits per byte")

    return f'<div class="pictures">{_picture(training)}{_picture(validation)}</div>'


def _curve(results: dict[str, Any], name: str, kind: str, figure: str) -> plots.Curve:
    records = [r for r in results["curves"][name] if r["kind"] == kind]
    return plots.Curve(name, [r["step"] for r in records], [r[figure] for r in records])


def _dial(results: dict[str, Any]) -> str:
    settings, reference = results["settings"], results["dial_reference"]

    def draw(ax: Any) -> None:
        plots.draw_dial(
            ax,
            [(f"P={r['value']}", r["cache_bytes"], r["perplexity"]) for r in results["dial"]],
            ("transformer", reference["cache_bytes"], reference["perplexity"]),
            trained=f"P={settings['chunk_size']}",
            y="perplexity per byte",
        )

    return f"""<p>The one trained Attamba checkpoint, run at other chunk sizes than the
{settings["chunk_size"]} it was trained with: a dial that is turned after training. Cache of
{settings["seq_len"]} bytes of context.</p>
<div class="alone">{_picture(draw, width=6.4, height=3.6)}</div>"""


def _mask(results: dict[str, Any]) -> str:
    tree = results["settings"]
    settings = DemoSettings(**{**tree, "chunk_sizes": (), "lengths": ()})
    config, n = model_config(settings, "attamba"), settings.mask_tokens

    def layer(layer_idx: int) -> str:
        return _picture(
            lambda ax: plots.draw_mask(ax, config, layer_idx, n, title=f"Layer {layer_idx + 1}"),
            width=4,
            height=4,
        )

    keys = (
        (plots.WINDOW, f"window: the last {settings.leading_tokens} bytes and itself, one by one"),
        (plots.PAST, "past: one entry per chunk, at its end"),
        (plots.SINK, "sink: position 0"),
        ("var(--hidden)", "forgotten"),
    )
    items = "".join(f'<li><i style="background:{colour}"></i>{text}</li>' for colour, text in keys)
    masks = "".join(layer(i) for i in range(settings.n_layers))
    return f"""<p>Which of {n} keys each of {n} queries attends to. The layers' chunks end at
different places, so that what one layer blurs another ends on. When this page was made, these
masks were compared with the keys to which the trained model's own layers give weight:
{results["mask_pairs"]:,} pairs, no difference.</p>
<ul class="keys">{items}</ul>
<div class="masks">{masks}</div>"""


def _samples(results: dict[str, Any]) -> str:
    blocks = "\n".join(
        f'<div><b class="{name}">{name}</b><pre>{html.escape(text.rstrip())}</pre></div>'
        for name, text in results["samples"].items()
    )
    return f"""<p>Both continue the same prompt, drawn with the same seed, temperature
{TEMPERATURE} and top&#8209;p {TOP_P}. After minutes of training they know the look of Python, not
its meaning.</p>
<div class="pictures">{blocks}</div>"""


def _settings(results: dict[str, Any]) -> str:
    data, machine = results["data"], results["environment"]
    entries = {
        **results["settings"],
        "training text": f"{data['train_bytes']:,} bytes, {data['train_files']} files",
        "held-out text": f"{data['held_out_bytes']:,} bytes, {data['held_out_files']} files",
        **machine,
        "seconds in all": f"{results['seconds']:.0f}",
    }
    items = "".join(
        f"<dt>{html.escape(key.replace('_', ' '))}</dt><dd>{html.escape(_plain(value))}</dd>"
        for key, value in entries.items()
    )
    return f"<dl>{items}</dl>"


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        value = [f"{key} {entry}" for key, entry in value.items()]
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _closing(results: dict[str, Any]) -> str:
    return (
        "<footer>Every figure on this page is in <code>results.json</code> beside it. "
        "Attamba: Akhauri, Huda, Abdelfattah, arXiv 2411.17685.</footer>"
    )


SECTIONS: tuple[tuple[str, Callable[[dict[str, Any]], str]], ...] = (
    ("Side by side", _table),
    ("Learning", _curves),
    ("Perplexity against cache bytes", _dial),
    ("The attention mask as it is", _mask),
    ("What they write", _samples),
    ("Exact settings", _settings),
)


def _picture(draw: Callable[[Any], None], width: float = 4.6, height: float = 3.2) -> str:
    """A figure of one plot as inline SVG in the page's colours and letters."""
    plt = plots.pyplot()
    with plt.rc_context({**plots.STYLE, "svg.fonttype": "none"}):
        figure, ax = plt.subplots(figsize=(width, height), layout="constrained")
        draw(ax)
        svg = _svg(figure)
        plt.close(figure)
    return f"<figure>{svg}</figure>"


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # names of parts, the same in every picture
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'font: ([^;"]*?)(\d+(?:\.\d+)?px) [^;"]*', r"font: \1\2 inherit", svg)
    for colour, variable in THEME.items():
        svg = svg.replace(colour.lower(), variable)
    return svg
