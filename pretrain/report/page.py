"""The page around the sections: one HTML file, no scripts, nothing fetched."""

from html import escape

# `default-src 'none'` makes the promise checkable: a browser refuses whatever would leave the file.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"

STYLE = """
:root { color-scheme: light dark; --ink: #1c2230; --soft: #5b6475; --line: #dfe3ea; --page: #f6f7f9; --card: #ffffff;
  --accent: #1f5fbf; --right: #14724a; --right-bg: #e4f4ec; --stop: #b3541e; --bad: #b3243c;
  --c1: #1f5fbf; --c2: #c4601d; --c3: #1d8459; --c4: #7d4bb5; --c5: #b3243c; --c6: #6a7283; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ef; --soft: #9aa4b5; --line: #303745; --page: #12151b;
  --card: #1a1f28;
  --accent: #6ea8fe; --right: #5fd3a0; --right-bg: #16352a; --stop: #f0a066; --bad: #ff7d90;
  --c1: #6ea8fe; --c2: #f0a066; --c3: #5fd3a0; --c4: #c39bf0; --c5: #ff7d90; --c6: #aab3c2; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue",
  "Liberation Sans", Arial, sans-serif; font-variant-numeric: tabular-nums; }
main { max-width: 1240px; margin: 0 auto; padding: 32px 20px 56px; }
header p { margin: 2px 0 0; color: var(--soft); }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0; letter-spacing: -.01em; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 44px 0 12px; }
h3 { font-size: 1rem; margin: 24px 0 8px; }
.note { color: var(--soft); font-size: .875rem; margin: 8px 0; max-width: 70ch; }
.answers { display: grid; grid-template-columns: repeat(auto-fit, minmax(220px, 1fr)); gap: 12px; margin: 20px 0 0; }
.answers div { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 10px 14px; }
.answers dt { color: var(--soft); font-size: .8125rem; } .answers dd { margin: 2px 0 0; font-size: .875rem;
  line-height: 1.4; overflow-wrap: anywhere; } .answers p { margin: 0 0 4px; }
.stages { list-style: none; margin: 0; padding: 0; } .stages h2 { margin: 28px 0 0; } .stages .note { margin: 2px 0 0; }
.stages .answers { margin-top: 8px; } .notice { color: var(--stop); }
.answers + .tiles { margin-top: 12px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(140px, 1fr)); gap: 12px; margin: 24px 0 0; }
.tiles div, figure, details, .wide { background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
.tiles + .charts { margin-top: 16px; }
.tiles div { padding: 12px 14px; }
.tiles dt { color: var(--soft); font-size: .8125rem; }
.tiles dd { margin: 2px 0 0; font-size: 1.375rem; font-weight: 600; line-height: 1.25; }
.tiles small { display: block; font-size: .8125rem; font-weight: 400; color: var(--soft); min-height: 1.25em; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9375rem; }
th, td { padding: 7px 14px; text-align: left; white-space: nowrap; border-top: 1px solid var(--line); }
thead th { border-top: 0; color: var(--soft); font-size: .8125rem; font-weight: 500; white-space: normal;
  vertical-align: bottom; }
tbody th { font-weight: 400; }
tr.group th { font-weight: 600; padding-top: 16px; }
tr.group small { font-weight: 400; color: var(--soft); margin-left: 8px; }
thead + tbody tr.group th { border-top-width: 1px; }
td:nth-child(n+2), thead th:nth-child(n+2) { text-align: right; }
table.confusion { width: auto; font-size: .8125rem; } table.confusion td { text-align: right; padding: 4px 8px;
  background: color-mix(in srgb, var(--accent) calc(.6 * var(--share, 0%)), transparent); min-width: 2.6em; }
table.confusion thead th { text-align: right; padding: 4px 8px; max-width: 8em; }
.mistakes { margin: 8px 0 12px; font-size: .875rem; color: var(--soft); }
table.events td { text-align: left; white-space: normal; }
table.events td:last-child { color: var(--soft); overflow-wrap: anywhere; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(420px, 100%), 1fr)); gap: 16px; }
figure { margin: 0; padding: 12px 14px 10px; min-width: 0; }
figcaption { font-weight: 600; font-size: .9375rem; margin-bottom: 4px; }
svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--soft); font-size: 12.5px; font-family: inherit; }
svg.bar { width: 130px; } table.scores :is(th, td) { padding: 7px 10px; } svg.timeline text { font-size: 15px; }
.grid { stroke: var(--line); } .axis { stroke: var(--soft); }
path.line { fill: none; stroke-width: 2; stroke-linejoin: round; }
path.band { stroke: none; opacity: .75; }
path.raw { fill: none; stroke-width: 1; opacity: .3; }
.mark { stroke: var(--soft); stroke-dasharray: 4 4; } .mark.stopped { stroke: var(--stop); }
.mark.resumed { stroke: var(--c3); } .mark.bad { stroke: var(--bad); }
.rail { fill: var(--line); } .fill { fill: var(--accent); }
.whisker { stroke: var(--ink); fill: none; stroke-width: 1.5; }
.tick { stroke: var(--soft); stroke-width: 2; } .tick.chance { stroke: var(--bad); }
.legend, .chips { list-style: none; display: flex; flex-wrap: wrap; gap: 4px 14px; margin: 4px 0 2px; padding: 0;
  font-size: .8125rem; color: var(--soft); }
.legend i, .dot { display: inline-block; width: 10px; height: 10px; border-radius: 50%; margin-right: 6px; }
.chips { margin: 10px 0; } .chips b { color: var(--ink); }
.event, .dot { fill: var(--c6); background: var(--c6); } .event { stroke: var(--page); stroke-width: 2; }
.event.good, .dot.good { fill: var(--c1); background: var(--c1); }
.event.bad, .dot.bad { fill: var(--bad); background: var(--bad); }
.event.stopped, .dot.stopped { fill: var(--stop); background: var(--stop); }
.event.resumed, .dot.resumed { fill: var(--c3); background: var(--c3); }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(240px, 100%), 1fr)); gap: 16px; }
.card img { width: 96px; height: 96px; object-fit: contain; border-radius: 8px; background: #fff; display: block;
  margin: 2px 0 10px; }
.card ol { margin: 8px 0 2px; padding-left: 1.3em; font-size: .875rem; color: var(--soft); }
.card li { padding: 1px 6px; border-radius: 5px; overflow-wrap: anywhere; }
.card li span { float: right; margin-left: 10px; }
.card p { margin: 6px 0 2px; font-size: .8125rem; color: var(--soft); }
.card li.right { background: var(--right-bg); color: var(--right); font-weight: 600; }
img.drawn { display: block; max-width: 100%; height: auto; background: #fff; border-radius: 6px; margin: 6px auto; }
details { margin: 12px 0 0; } summary { cursor: pointer; padding: 10px 14px; font-weight: 600; font-size: .9375rem; }
details .wide { border: 0; border-top: 1px solid var(--line); border-radius: 0; }
details .run { padding: 0 14px 14px; } details .run .tiles { margin-top: 4px; } details { overflow: hidden; }
details .note { padding: 0 14px; }
details .charts.inner { padding: 0 14px 14px; } details .charts.inner figure { border-color: transparent; padding: 0; }
pre { margin: 0; padding: 14px; overflow-x: auto; border-top: 1px solid var(--line);
  font: .8125rem/1.5 ui-monospace, "SF Mono", Menlo,
  Consolas, "Liberation Mono", monospace; }
footer { margin-top: 48px; color: var(--soft); font-size: .8125rem; }
@media (max-width: 560px) { main { padding: 20px 12px 40px; } .tiles { grid-template-columns: 1fr 1fr;
  } h1 { font-size: 1.375rem; } .answers { grid-template-columns: 1fr; gap: 8px; margin-top: 14px; }
  .answers div { padding: 8px 12px; } .answers dd { font-size: .8125rem; } .answers p { margin: 0; }
  table.scores thead { display: none; } table.scores tr { display: flex; flex-wrap: wrap; align-items: center;
  gap: 2px 14px; padding: 8px 12px; border-top: 1px solid var(--line); } table.scores :is(th, td) { display: block;
  border: 0; padding: 0; white-space: normal; text-align: left; } table.scores th { flex: 1 0 100%; }
  table.scores td.drawn { flex: 1 0 60%; } table.scores svg.bar { width: 100%; }
  table.scores td.none { display: none; }
  table.scores td[data-label] { font-size: .8125rem; color: var(--soft); }
  table.scores td[data-label]::before { content: attr(data-label) " "; } }
@media print { body { background: #fff; } figure, .tiles div { break-inside: avoid; } }
"""


def page(title: str, subtitle: str, body: str, footer: str) -> str:
    """A whole HTML document. `body` is HTML, the other texts are not."""
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{escape(title)}</title>\n'
        f'<link rel="icon" href="data:,">\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n'
        f"<header><h1>{escape(title)}</h1><p>{escape(subtitle)}</p></header>\n{body}\n"
        f"<footer>{escape(footer)}</footer>\n</main>\n</body>\n</html>\n"
    )
