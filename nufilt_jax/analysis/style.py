"""How the page of a merge looks, and what it may load: nothing."""

STYLE = """
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif; --line: #ddd; --rule: #ccc; --dim: #555;
  --page: #fff; }
html { color: #1a1a1a; background: var(--page); }
body { max-width: 64rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.6rem; }
h1, p { overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; border-bottom: 1px solid var(--rule); margin-top: 2rem; }
.scroll { overflow-x: auto; }
.scroll + .scroll { margin-top: 1rem; }
table { border-collapse: collapse; font-size: 0.875rem; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid var(--line); padding: 0.25rem 0.6rem; text-align: right; white-space: nowrap; }
th { white-space: normal; vertical-align: bottom; min-width: 4rem; }
th:first-child, td:first-child, .text { text-align: left; }
th:first-child, td:first-child { position: sticky; left: 0; background: var(--page); }
td.text { white-space: normal; overflow-wrap: anywhere; min-width: 8rem; vertical-align: top; }
td.text:last-child { min-width: 16rem; }
img { display: block; max-width: 100%; height: auto; margin: 0.5rem 0; background: #fff; }
.missing { color: var(--dim); font-style: italic; }
#verdict { font-size: 1.05rem; }
@media screen and (max-width: 40rem) {
  th:first-child, td:first-child { white-space: normal; overflow-wrap: break-word; min-width: 6.5rem; max-width: 40vw; }
}
@media screen and (prefers-color-scheme: dark) {
  :root { --line: #30363d; --rule: #444c56; --dim: #9da7b3; --page: #0d1117; }
  html { color: #e6edf3; }
  img { border-radius: 4px; filter: brightness(0.88); }
}
@media print {
  :root { font-size: 10pt; }
  body { max-width: none; padding: 0; }
  .scroll { overflow: visible; }
  th { min-width: 0; }
  img { max-height: 22cm; }
  table { font-size: 7.5pt; }
  th, td { white-space: normal; padding: 0.15rem 0.3rem; }
  h2, img, tr { break-inside: avoid; }
  h2 { break-after: avoid; }
}
"""
# Whatever a name holds: nothing is loaded and nothing runs.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
